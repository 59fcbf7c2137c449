"""Frames: how a vector becomes one coefficient for each vocabulary entry, and how coefficients become a vector.

Shape suffixes: N tokens, V vocabulary entries, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ._basis import CHUNK, SemanticBasis
from ._components import Components
from ._errors import SemalignError
from ._head import accumulation_dtype


@dataclass(frozen=True)
class Frame:
    """A frame on the rows of a head; write your own by choosing the powers.

    With W the head over v entries and G = WᵀW, a frame has the analysis rows A and the synthesis columns S

        coefficients a = A r,   A = N⁻¹ W G^(−analysis)          (v, d)
        recomposed r̃ = S a,     S = G^(−synthesis) Wᵀ N⁻¹        (d, v)

    with N = diag(‖column of B = W⁺‖) for unit columns, else the identity. The three published and measured frames:

        cosine     B̂ᵀ r/‖r‖            B̂ a           v1 eq. 1–2
        dual       W r                 W⁺ a          ACL, "target-space aligned logits"
        parseval   W G^(−½) r          G^(−½)Wᵀ a    ours: a tight frame, S = Aᵀ, S A = I
    """

    name: str
    """What configurations and results call it."""
    analysis: float
    """Power p of A = W G^(−p)."""
    synthesis: float
    """Power q of S = G^(−q) Wᵀ."""
    unit: bool = False
    """Whether the columns of the basis, and the vector itself, are scaled to unit length first."""


FRAMES = {
    frame.name: frame
    for frame in (Frame("cosine", 1.0, 1.0, unit=True), Frame("dual", 0.0, 1.0), Frame("parseval", 0.5, 0.5))
}
"""The frames that come along, by name."""
KNOWN_FRAMES = Components(
    "semalign.frames",
    "frame",
    FRAMES,
    expected="Frame",
    fits=lambda given: isinstance(given, Frame),
    name_of=lambda frame: frame.name,
)
"""The frames that a name stands for, those of installed packages included."""


def find_frame(frame: str | Frame) -> Frame:
    """A frame by name; a `Frame` passes through.

    Raises:
        SemalignError: unknown name.
    """
    return frame if isinstance(frame, Frame) else KNOWN_FRAMES.find(frame)


def decompose(
    basis: SemanticBasis,
    residual: Float[Tensor, "n d"],
    *,
    frame: str | Frame = "parseval",
    fold_gain: bool = False,
    top_k: int | None = None,
) -> Float[Tensor, "n v"]:
    """Coefficients of vectors on a basis: the explicit route, v numbers for each token.

    Args:
        basis: the semantic basis of the model that the vectors come from.
        residual: (n, d) vectors.
        frame: name or `Frame`.
        fold_gain: whether to read through the gain of the final norm.
        top_k: keep this many coefficients of each token, the largest in size, the others zero (v1's "strength").

    Returns:
        (n, v) coefficients, float32 (float64 for float64 input).

    Raises:
        SemalignError: vectors of another width, an unknown frame, a `top_k` below 1, or a gain that is asked for and
            missing.

    Source: v1 eq. 1 (`cosine`); method of ACL (`dual`); ours (`parseval`).
    """
    frame = find_frame(frame)
    if residual.shape[-1] != basis.manifest.width:
        raise SemalignError(
            f"vectors of width {residual.shape[-1]} for a basis of width {basis.manifest.width}: decompose on the "
            "basis of the model that they come from"
        )
    dtype = accumulation_dtype(residual)
    vectors_ND = residual.to(dtype)
    if frame.unit:
        vectors_ND = unit_rows(vectors_ND)
    vectors_ND = vectors_ND @ basis.gram_power(frame.analysis, fold_gain=fold_gain).to(vectors_ND)
    parts = [
        vectors_ND @ rows_VD.to(vectors_ND).T / norms.to(vectors_ND)
        for rows_VD, norms in scaled_rows(basis, frame, fold_gain=fold_gain)
    ]
    coefficients_NV = torch.cat(parts, dim=1)
    if top_k is None or top_k >= coefficients_NV.shape[1]:
        return coefficients_NV
    if top_k < 1:
        raise SemalignError(f"top_k is {top_k}, expected at least 1")
    kept = coefficients_NV.abs().topk(top_k, dim=1).indices
    return torch.zeros_like(coefficients_NV).scatter(1, kept, coefficients_NV.gather(1, kept))


def recompose(
    basis: SemanticBasis,
    coefficients: Float[Tensor, "n v"],
    *,
    frame: str | Frame = "parseval",
    fold_gain: bool = False,
) -> Float[Tensor, "n d"]:
    """Vectors from coefficients, in the space of the basis' model.

    Args:
        basis: the semantic basis of the model that the vectors go to.
        coefficients: (n, v), one for each entry of the basis.
        frame: name or `Frame`.
        fold_gain: whether to read through the gain of the final norm.

    Returns:
        (n, d) vectors, float32 (float64 for float64 coefficients).

    Raises:
        SemalignError: the number of coefficients is not the number of entries, an unknown frame, or a gain that is
            asked for and missing.

    Source: v1 eq. 2 (`cosine`), method of ACL (`dual`), ours (`parseval`).
    """
    frame = find_frame(frame)
    if coefficients.shape[1] != basis.manifest.entries:
        raise SemalignError(
            f"{coefficients.shape[1]} coefficients for a basis of {basis.manifest.entries} entries: "
            "build both bases on the shared entries (align_vocabularies)"
        )
    dtype = accumulation_dtype(coefficients)
    vectors_ND = torch.zeros(len(coefficients), basis.manifest.width, dtype=dtype, device=coefficients.device)
    start = 0
    for rows_VD, norms in scaled_rows(basis, frame, fold_gain=fold_gain):
        part_NV = coefficients[:, start : start + len(rows_VD)].to(dtype)
        vectors_ND += part_NV @ (rows_VD.to(part_NV) / norms.to(part_NV)[:, None])
        start += len(rows_VD)
    return vectors_ND @ basis.gram_power(frame.synthesis, fold_gain=fold_gain).to(vectors_ND)


def scaled_rows(
    basis: SemanticBasis, frame: Frame, *, fold_gain: bool, chunk: int = CHUNK
) -> Iterator[tuple[Float[Tensor, "w d"], Float[Tensor, " w"]]]:
    """Chunks of W with the length of each entry's column of B = W⁺ (ones for frames without unit columns)."""
    inverse_DD = basis.gram_power(1.0, fold_gain=fold_gain) if frame.unit else None
    for rows_VD in basis.rows(fold_gain=fold_gain, chunk=chunk):
        if inverse_DD is None:
            yield rows_VD, torch.ones(len(rows_VD), dtype=rows_VD.dtype, device=rows_VD.device)
        else:
            norms = (rows_VD @ inverse_DD.to(rows_VD)).norm(dim=1)
            yield rows_VD, torch.where(norms > 0, norms, 1.0)  # a row of zeros has no direction: its column stays zero


def unit_rows(vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Rows scaled to unit length; zero rows stay zero, with finite gradients."""
    sizes = vectors.detach().abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(sizes > 0, sizes, 1.0)  # squares of very small or large numbers would leave float32
    squares = scaled.square().sum(-1, keepdim=True)
    return scaled / torch.where(squares > 0, squares, 1.0).sqrt()
