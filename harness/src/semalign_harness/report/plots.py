"""Plots as SVG with colours from the page: the same data give the same text."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semalign_attribution import LayerPairing, LayerScores
from semalign_geometry.base import replace_file
from semalign_train import StageRecord, StepRecord

from ..results.fidelity import RunFidelity
from ..results.similarity import LayerSimilarity
from ..statistics import Estimate

if TYPE_CHECKING:  # slow to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

WIDTH = 4.4
"""Inches; the page scales plots to its columns."""
POINTS = 400
"""Most points of a curve; neighbouring steps are averaged."""
MANY = 16
"""Most layers with large dots."""
LABEL = 22
"""Longest name beside a plot."""

# The page replaces these colours by its own: ink and rules follow its scheme, the others are Okabe and
# Ito's and differ in lightness too.
INK, FAINT, BLUE, ORANGE, GREEN, PURPLE = "#0b0c0d", "#a1a2a3", "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_NAMES = {INK: "ink", FAINT: "faint", BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple"}
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.color": FAINT,
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}


@dataclass(frozen=True)
class Dot:
    """A value with its interval."""

    name: str
    estimate: Estimate


@dataclass(frozen=True)
class Line:
    """A reference value."""

    name: str
    value: float


@dataclass(frozen=True)
class Panel:
    """One metric of several methods or runs, with reference values."""

    title: str
    dots: Sequence[Dot]
    lines: Sequence[Line]
    percent: bool
    """Whether the values are shares."""


def draw_attribution(scores: LayerScores, pairing: LayerPairing | None) -> str:
    """Return bars of the scores with standard errors, under the pairing, target layers on the right."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        layers = range(1, len(scores.mean) + 1)
        axes.bar(layers, scores.mean, color=BLUE, alpha=0.55, width=0.7, label="score")
        _whiskers(axes, x=layers, y=scores.mean, yerr=scores.standard_error, label="standard error")
        axes.set(xlabel="source layer", ylabel="score", xlim=(0.4, len(scores.mean) + 0.6))
        _whole(axes, "x")
        if pairing is not None:
            right = axes.twinx()
            right.grid(False)
            right.spines["right"].set_visible(True)
            targets = range(1, pairing.target_depth + 1)
            size = _dot_size(pairing.target_depth)
            right.plot(pairing.source_layers, targets, "o-", color=ORANGE, markersize=size, label="pairing")
            right.set(ylabel="target layer", ylim=(0, pairing.target_depth + 0.5))
            _whole(right, "y")
        _legend(figure)

    return _drawn("attribution", 2.6, draw)


def draw_similarity(similarity: Sequence[Sequence[float]], pairing: LayerPairing | None) -> str:
    """Return a heat map of source × target layers, with the pairing as dots."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        image = _heat(axes, similarity, None if pairing is None else pairing.source_layers, bottom=0.5)
        axes.set(ylabel="source layer")
        _whole(axes, "y")
        figure.colorbar(image, label="CKA")

    return _drawn("similarity", 3.2, draw)


def draw_before_and_after(similarity: LayerSimilarity, pairing: LayerPairing | None) -> str:
    """Return heat maps of source × target layers before and after, with the pairing as dots; source layers that were
    not compared stay blank."""
    depth = similarity.source_layers[-1] if pairing is None else pairing.source_depth
    places = {layer: place for place, layer in enumerate(similarity.source_layers)}

    def whole(row: Sequence[float]) -> list[float]:
        return [row[places[layer]] if layer in places else math.nan for layer in range(1, depth + 1)]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, title, rows in zip(panels, ("before", "after"), (similarity.before, similarity.after), strict=True):
            image = _heat(axes, list(map(whole, rows)), None if pairing is None else pairing.source_layers, bottom=0.5)
            axes.set(title=title)
        panels[0].set(ylabel="source layer")
        _whole(panels[0], "y")
        figure.colorbar(image, ax=panels, label="CKA")

    return _drawn("before and after", 2.6, draw)


def write_heat_map(similarity: Sequence[Sequence[float]], pairing: LayerPairing | None, file: Path) -> Path:
    """Write the heat map of source × target layers as an SVG file; the same values give the same file."""
    return replace_file(file, standalone(draw_similarity(similarity, pairing)))


def draw_fidelity(report: RunFidelity) -> str:
    """Return CKA of paired layers without a transport, with the run's and, thinner, with other frames, and the
    cosine of recomposition, by target layer."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        layers = [layer.target_layer for layer in report.layers]
        size = _dot_size(len(layers))
        own, direct = f"CKA, {shortened(report.frame)}", [each.cka_direct for each in report.layers]
        moved, kept = zip(*((each.cka_transported, each.recomposition_cosine) for each in report.layers), strict=True)
        axes.plot(layers, direct, "s--", color=INK, markersize=size, label="CKA, no transport")
        axes.plot(layers, moved, "o-", color=BLUE, markersize=size, zorder=3, label=own)
        styles = itertools.cycle((("D-.", GREEN), ("v--", PURPLE), ("x:", INK)))
        for other, (style, colour) in zip(report.others, styles, strict=False):
            theirs, label = [each.cka_transported for each in other.layers], f"CKA, {shortened(other.frame)}"
            axes.plot(layers, theirs, style, color=colour, markersize=0.8 * size, linewidth=0.9, label=label)
        axes.plot(layers, kept, "^:", color=ORANGE, markersize=size, label="recomposition")
        axes.set(xlabel="target layer", ylabel="CKA or cosine")
        axes.set(xlim=(0.6, len(layers) + 0.4), ylim=(min(0.0, *kept), 1.05))
        _whole(axes, "x")
        _legend(figure)

    return _drawn("fidelity", 3.0 if report.others else 2.6, draw)


def draw_losses(steps: Sequence[StepRecord]) -> str:
    """Return every term over the steps, one panel each; thin lines separate the stages."""
    terms = list(dict.fromkeys(name for step in steps for name in step.losses))
    starts = [place for place in range(1, len(steps)) if steps[place].layer != steps[place - 1].layer]
    bounds = [0, *starts, len(steps)]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(terms), 1, sharex=True, squeeze=False)[:, 0]
        for axes, term in zip(panels, terms, strict=True):
            for begin, end in zip(bounds, bounds[1:], strict=False):
                values = [step.losses.get(term, math.nan) for step in steps[begin:end]]
                xs, ys = _thinned(begin, values, POINTS * (end - begin) // len(steps))
                axes.plot(xs, ys, color=BLUE, marker="." if len(xs) == 1 else "")
            for place in starts:
                axes.axvline(place + 0.5, color=FAINT, linewidth=0.6)
            axes.set(ylabel=term)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        panels[-1].set(xlabel="step", xlim=(0.5, len(steps) + 0.5))
        _whole(panels[-1], "x")
        if starts:
            top = panels[0].secondary_xaxis("top")
            every = math.ceil((len(bounds) - 1) / 10)
            stages = list(zip(bounds, bounds[1:], strict=False))[::every]
            centres = [(begin + end + 1) / 2 for begin, end in stages]
            top.set_xticks(centres, [str(steps[begin].layer) for begin, _ in stages])
            top.tick_params(length=0)
            top.spines["top"].set_visible(False)
            top.set_xlabel("target layer that trains")

    return _drawn("losses", 0.9 + 1.3 * len(terms), draw)


def draw_held_out(stages: Sequence[StageRecord]) -> str:
    """Return the held-out loss before each stage and the one kept after it; crosses mark undone stages."""
    measured = [(place, stage, stage.held_out) for place, stage in enumerate(stages, 1) if stage.held_out is not None]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        places = [place for place, _, _ in measured]
        before, after = ([pair[end] for _, _, pair in measured] for end in (0, 1))
        kept = [pair[0] if stage.rolled_back else pair[1] for _, stage, pair in measured]
        axes.vlines(places, before, after, color=FAINT, linewidth=1)
        axes.plot(places, before, "o", color=INK, markerfacecolor="none", label="before the stage")
        axes.plot(places, kept, "o-", color=BLUE, label="kept after it")
        undone = [(place, pair[1]) for place, stage, pair in measured if stage.rolled_back]
        if undone:
            axes.plot(*zip(*undone, strict=True), "x", color=ORANGE, markersize=8, label="undone")
        every = math.ceil(len(measured) / 12)
        axes.set_xticks(places[::every], [str(stage.layer) for _, stage, _ in measured][::every])
        axes.set(xlabel="target layer that trains", ylabel="held-out loss")
        _legend(figure)

    return _drawn("held-out", 2.4, draw)


def draw_bars(groups: Sequence[tuple[str, Sequence[Dot]]]) -> str:
    """Return shares as bars with intervals, in groups from top to bottom; each name has a colour and a hatch."""
    names = list(dict.fromkeys(dot.name for _, dots in groups for dot in dots))
    colours, hatches = (INK, ORANGE, BLUE, GREEN), ("", "////", "", "....")

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        thick = 0.8 / len(names)
        for index, name in enumerate(names):
            of_all = [(place, dot) for place, (_, dots) in enumerate(groups) for dot in dots]
            found = [dot.estimate for _, dot in of_all if dot.name == name]
            shift = thick * (index - (len(names) - 1) / 2)
            places = [place + shift for place, dot in of_all if dot.name == name]
            values = [estimate.value for estimate in found]
            colour, hatch = colours[index % 4], hatches[index % 4]
            bars = axes.barh(places, values, height=thick * 0.9, label=name, alpha=0.6, linewidth=0.6)
            for bar in bars:
                bar.set(facecolor="none" if hatch else colour, edgecolor=colour, hatch=hatch)
            reach = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
            _whiskers(axes, x=values, y=places, xerr=reach)
        axes.set_yticks(range(len(groups)), [shortened(title) for title, _ in groups])
        axes.set(xlim=(0, None))
        axes.xaxis.set_major_formatter(_percent)
        axes.invert_yaxis()
        _legend(figure)

    return _drawn("bars", 0.8 + (0.18 * len(names) + 0.12) * len(groups), draw)


def draw_dots(panels: Sequence[Panel]) -> str:
    """Return values of methods or runs with intervals, and reference values as vertical lines; panels stand in
    two columns, each name in the same place in all of them."""
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(dot.name for panel in panels for dot in panel.dots))
    first = next((panel for panel in panels if panel.lines), None)

    def draw(figure: "Figure") -> None:
        columns = min(2, len(panels))
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, number + 1)
            axes.grid(visible=False, axis="y")
            for line, style in zip(panel.lines, ("--", ":"), strict=False):
                label = line.name if panel is first else None
                axes.axvline(line.value, color=ORANGE, linestyle=style, linewidth=1.2, label=label)
            for dot in panel.dots:
                place, low, high = names.index(dot.name), dot.estimate.low, dot.estimate.high
                if math.isfinite(low) and math.isfinite(high):
                    axes.plot([low, high], [place, place], "-", color=BLUE, linewidth=1)
                axes.plot([dot.estimate.value], [place], "o", color=BLUE)
            axes.set_yticks(range(len(names)), [shortened(name) for name in names] if number % columns == 0 else [])
            axes.set(ylim=(len(names) - 0.5, -0.5))
            axes.set_xlabel(panel.title)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))
            if panel.percent:
                axes.xaxis.set_major_formatter(_percent)
        _legend(figure)

    rows = math.ceil(len(panels) / 2)
    title = ", ".join(panel.title for panel in panels)
    return _drawn(f"dots {title}", 0.4 + (0.7 + 0.2 * len(names)) * rows, draw)


def _percent(value: float, _: float) -> str:
    """Return the label of a tick, unrounded: equal distances stay equal numbers."""
    return f"{round(100 * value, 6):g}%"


def _thinned(begin: int, values: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """The steps of a stage and their values, averaged over neighbours down to `points`."""
    size = math.ceil(len(values) / max(2, points))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    centres = [begin + start + (min(size, len(values) - start) + 1) / 2 for start in range(0, len(values), size)]
    return centres, [math.fsum(part) / len(part) for part in parts]


def _dot_size(layers: int) -> float:
    """Size of the dots for a number of layers, in points."""
    return 4.0 if layers <= MANY else 2.5


def shortened(name: str) -> str:
    """Return a name that fits beside or below the axes."""
    return name if len(name) <= LABEL else f"{name[: LABEL - 1]}…"


def _heat(axes: "Axes", rows: Sequence[Sequence[float]], paired: Sequence[int] | None, *, bottom: float) -> "AxesImage":
    """Shares of 0 to 1 as colours: a column for each row, from 1, its values upwards from `bottom`; pairs as dots."""
    axes.grid(False)
    extent = (0.5, len(rows) + 0.5, bottom, bottom + len(rows[0]))
    columns = list(zip(*rows, strict=True))
    image = axes.imshow(
        columns, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="none", aspect="auto", extent=extent
    )
    if paired is not None:
        size = _dot_size(len(rows))
        axes.plot(range(1, len(paired) + 1), paired, "o", color="white", markeredgecolor="black", markersize=size)
    axes.set(xlabel="target layer")
    _whole(axes, "x")
    return image


def _whole(axes: "Axes", which: str) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8))


def _whiskers(axes: "Axes", **data: Any) -> None:
    axes.errorbar(**data, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)


def _legend(figure: "Figure") -> None:
    """One legend above all axes."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = [handle for each, _ in found for handle in each]
    labels = [label for _, each in found for label in each]
    if handles:
        columns = len(labels) if sum(map(len, labels)) <= 48 else 2
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, columnspacing=1.2, handletextpad=0.5)


def _drawn(name: str, height: float, draw: "Callable[[Figure], None]") -> str:
    import matplotlib.style
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.style.context(["default", {**_SETTINGS, "svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page brings other fonts
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """A plot as a part of a page: no prologue, no size, only ids with references, named colours."""
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    used = set(re.findall(r'#([^")]+)[")]', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*\n", "\n", svg).strip()


def standalone(svg: str) -> str:
    """Return a plot as a file of its own, on white, with the colours of the page."""
    colours = "".join(f"--{name}:{colour};" for colour, name in _NAMES.items())
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f'<svg {spaces} style="background:#fff;{colours}" ', 1) + "\n"
