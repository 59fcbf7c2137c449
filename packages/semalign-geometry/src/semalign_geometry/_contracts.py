"""Contracts of bases, transports and their fidelity, without tensors; and the divergences by name."""

from typing import Literal

from .base import ArtifactManifest, Contract

Divergence = Literal["forward", "reverse", "jensen_shannon"]
"""`forward`: KL(p_S ‖ p_T), which covers all that the source may say. `reverse`: KL(p_T ‖ p_S), which keeps to what
it is likely to say. `jensen_shannon`: half of each, against their mean."""


class BasisManifest(ArtifactManifest):
    """Sizes, rank and conditioning of a semantic basis, without its tensors."""

    width: int
    """d, the model's width."""
    entries: int
    """v, the vocabulary entries that span the basis."""
    rank: int
    """Numerical rank of the head over these entries; below `width` the basis spans only what the head can read."""
    condition: float
    """Condition number estimate (1-norm) of the Gram matrix WᵀW; above 1e12, or infinite, when the rank is
    deficient."""
    products: str
    """dtype of the chunk products behind the Gram matrix; sums over chunks are float64 always."""


class TransportManifest(ArtifactManifest):
    """Frame and widths of a transport, without its matrix."""

    frame: str
    """Name of the frame; `none` for the identity."""
    fold_gain: bool
    """Whether both heads were read through the gain of their final norms."""
    unit_tokens: bool
    """Whether each vector is scaled to unit length before the matrix is applied (frame `cosine`)."""
    source_width: int
    """d_S."""
    target_width: int
    """d_T."""
    entries: int
    """Shared vocabulary entries that the two bases are aligned on; 0 for the identity."""


class LayerFidelity(Contract):
    """Fidelity at one target layer."""

    target_layer: int
    """k, counted from 1."""
    source_layer: int
    """π(k), counted from 1."""
    recomposition_cosine: float
    """Mean cosine between a source residual and its own recomposition in the source's space; 1 for an exact frame."""
    cka_transported: float
    """CKA between the target's residual contributions and the transported ones of the source, in [0, 1]."""
    cka_direct: float
    """The same without any transport (CKA needs no common width): what the transport could at most keep, roughly."""


class FidelityReport(Contract):
    """Fidelity of a transport over the depth, before training."""

    frame: str
    """Frame of the transport."""
    fold_gain: bool
    """Whether the gain of the final norms was folded in."""
    tokens: int
    """n, the tokens that it was measured on."""
    layers: tuple[LayerFidelity, ...]
    """One entry for each target layer, shallow to deep."""

    @property
    def mean_cka_transported(self) -> float:
        """Mean over the layers of `cka_transported`."""
        return sum(layer.cka_transported for layer in self.layers) / max(1, len(self.layers))
