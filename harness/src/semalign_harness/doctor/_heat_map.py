"""The similarity of layers as a picture."""

import importlib.util
from pathlib import Path

from semalign_geometry import FidelityReport

from ._findings import Finding, ok, warning


def draw_heat_map(similarity: tuple[tuple[float, ...], ...], report: FidelityReport, file: Path) -> Finding:
    """CKA of source × target layers, with the pairing as dots, as an SVG file; the same figures give the same file."""
    if importlib.util.find_spec("matplotlib") is None:
        return warning("heat map", "not drawn, since matplotlib is not installed", "pip install matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    targets, sources = len(similarity), len(similarity[0])
    with matplotlib.rc_context({"svg.hashsalt": "semalign", "font.size": 8}):
        figure = Figure(figsize=(1.6 + 0.16 * targets, 1.2 + 0.16 * sources), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            list(zip(*similarity, strict=True)),
            origin="lower",
            vmin=0,
            vmax=1,
            cmap="viridis",
            extent=(0.5, targets + 0.5, 0.5, sources + 0.5),
        )
        axes.plot(
            [layer.target_layer for layer in report.layers],
            [layer.source_layer for layer in report.layers],
            "o",
            color="white",
            markersize=2.5,
        )
        axes.set_xlabel("target layer")
        axes.set_ylabel("source layer")
        figure.colorbar(image, label="linear CKA of contributions")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return ok("heat map", f"{file}, source × target layers, the pairing as dots")
