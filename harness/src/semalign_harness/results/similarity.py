"""Contract of the similarity of the layers of two models."""

from semalign_geometry.base import Contract

Matrix = tuple[tuple[float, ...], ...]


class LayerSimilarity(Contract):
    """Linear CKA of what the target's layers and the paired source layers, as transported, add to the residual stream,
    on held-out rows; a row for each target layer."""

    source_layers: tuple[int, ...]
    """The paired source layers in order, without repeats: one for each column."""
    tokens: int
    """Supervised tokens that were compared."""
    before: Matrix
    """With the target before the transfer."""
    after: Matrix
    """With the target after it."""
