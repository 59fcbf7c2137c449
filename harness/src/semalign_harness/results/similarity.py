"""Contract of the similarity of the layers of two models."""

from semalign_geometry.base import Contract

Matrix = tuple[tuple[float, ...], ...]


class LayerSimilarity(Contract):
    """Linear CKA of the contributions of target layers and of paired, transported source layers to the
    residual stream, on held-out rows; a row for each target layer."""

    source_layers: tuple[int, ...]
    """Paired source layers in order, without repeats: one for each column."""
    tokens: int
    """Compared spans, which are supervised tokens with one tokenizer."""
    before: Matrix
    """Similarity before the transfer."""
    after: Matrix
    """Similarity after the transfer."""
