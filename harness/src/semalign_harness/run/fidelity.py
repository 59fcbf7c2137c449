"""Fidelity of the frames: the geometry of paired layers that they keep."""

from collections.abc import Sequence

from semalign_geometry import (
    FidelityReport,
    PairedResiduals,
    SemanticBasis,
    Transport,
    fit_transport,
    measure_fidelity,
)

from ..util.console import Console

_EXACT = ("dual", "parseval")
"""Frames that are exact within a model whose head reads every direction."""


def fit_and_measure(
    pairs: Sequence[PairedResiduals],
    source: SemanticBasis,
    target: SemanticBasis,
    frame: str,
    *,
    fold_gain: bool,
    console: Console,
) -> tuple[Transport, FidelityReport]:
    """Fit a transport by a frame, and measure its fidelity.

    Args:
        pairs: contributions of each target layer and its source layer.
        source: basis of the source, over the shared entries.
        target: basis of the target, over the same entries.
        frame: its name.
        fold_gain: read both heads through the gain of their final norms.
        console: display of progress.

    Raises:
        SemalignError: an unknown frame, or a gain that is asked for and missing.
    """
    with console.step(f"fit the transport ({frame})"):
        transport = fit_transport(source, target, frame=frame, fold_gain=fold_gain)
        if frame in _EXACT and _reads_all(source, fold_gain=fold_gain):
            within = Transport.identity(source.manifest.width)
        else:
            within = fit_transport(source, source, frame=frame, fold_gain=fold_gain)
        return transport, measure_fidelity(pairs, transport=transport, within_source=within)


def _reads_all(basis: SemanticBasis, *, fold_gain: bool) -> bool:
    """Return whether a head has full rank, through the gain of its final norm where that is folded in."""
    closed = fold_gain and basis.gain is not None and bool((basis.gain == 0).any())
    return basis.inverse is not None and not closed
