"""Contract of the cached supervision."""

from semalign_geometry.base import Contract

from .measurement import Measurement

PHASE = "phase.json"


class SourcePhase(Contract):
    """Cached supervision; its file is written last, so that the described content is complete."""

    key: str
    """Cache key."""
    folder: str
    """Folder of the content."""
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
