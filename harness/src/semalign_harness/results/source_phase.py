"""Contract of the supervision that is kept for further runs."""

from semalign_geometry.base import Contract

from .measurement import Measurement

PHASE = "phase.json"


class SourcePhase(Contract):
    """What a source left behind; the file is written last, so that what it describes is whole."""

    key: str
    """Hash of all that decides the content."""
    folder: str
    """Where it lies."""
    source: str
    """Path or hub id of the source."""
    target: str
    """Path or hub id of the target whose width and depth it fits."""
    train_rows: int
    """Supervised training rows."""
    held_out_rows: int
    """Supervised held-out rows."""
    supervised_tokens: int
    """Supervised tokens of the training rows."""
    residual_error: float
    """Relative error of rounding the residuals of the training rows."""
    measurement: Measurement
    """The source on the held-out rows."""
    seconds: float
    """Wall time of attribution, pairing, transport and supervision, in the process that finished them."""
