"""Frames: from a vector to one coefficient for each vocabulary entry, and back from coefficients to a vector.

Shape suffixes: N tokens, V vocabulary entries, D width.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ._basis import CHUNK, SemanticBasis
from ._frame import Frame, find_frame
from ._head import accumulation_dtype, full_precision, least_size, to_float64
from .base import SemalignError, checked


@checked
@full_precision
def decompose(
    basis: SemanticBasis,
    residual: Float[Tensor, "n d"],
    *,
    frame: str | Frame = "parseval",
    fold_gain: bool = False,
    top_k: int | None = None,
) -> Float[Tensor, "n v"]:
    """Coefficients of vectors on a frame, one for each vocabulary entry; they are all in memory at once.

    A vector that holds a value that is not finite gets coefficients that are not finite; other vectors keep theirs.

    Args:
        basis: the semantic basis of the model that the vectors come from.
        residual: (n, d) vectors.
        frame: name or `Frame`.
        fold_gain: read the vectors through the gain of the final norm.
        top_k: keep the k coefficients largest in size per vector, and zero the others; the map is no longer linear.

    Returns:
        (n, v), float32; float64 for float64 input and for a basis whose conditioning needs float64, then on the CPU if
        the device of the vectors has none.

    Raises:
        SemalignError: vectors of another width, an unknown frame, a `top_k` below 1, or a gain that is needed and
            missing.

    Source: v1 eq. 1 (`cosine`); method of ACL (`dual`); ours (`parseval`).
    """
    frame = find_frame(frame)
    if residual.shape[-1] != basis.manifest.width:
        raise SemalignError(
            f"vectors of width {residual.shape[-1]} for a basis of width {basis.manifest.width}: decompose on the "
            "basis of the model that they come from"
        )
    if top_k is not None and top_k < 1:
        raise SemalignError(f"top_k is {top_k}, expected at least 1")
    vectors_ND = _wide(residual, basis)
    if frame.unit:
        vectors_ND = unit_rows(vectors_ND)
    vectors_ND = vectors_ND @ outer_power(basis, frame, frame.analysis, fold_gain=fold_gain).to(vectors_ND)
    rows = frame_rows(basis, frame, frame.analysis, fold_gain=fold_gain)
    coefficients_NV = torch.cat([vectors_ND @ _beside(rows_VD, vectors_ND).T for rows_VD in rows], dim=1)
    if top_k is None or top_k >= coefficients_NV.shape[1]:
        return coefficients_NV
    kept = coefficients_NV.abs().topk(top_k, dim=1).indices
    return torch.zeros_like(coefficients_NV).scatter(1, kept, coefficients_NV.gather(1, kept))


@checked
@full_precision
def recompose(
    basis: SemanticBasis,
    coefficients: Float[Tensor, "n v"],
    *,
    frame: str | Frame = "parseval",
    fold_gain: bool = False,
) -> Float[Tensor, "n d"]:
    """Vectors from coefficients, in the space of the basis' model.

    Law: recompose(target, decompose(source, r)) is `fit_transport(source, target)(r)`, to a tolerance from the
    condition numbers. Coefficients that are not finite make their vector so, and no other.

    Args:
        basis: the semantic basis of the model that the vectors go to.
        coefficients: (n, v), one for each entry of the basis.
        frame: name or `Frame`.
        fold_gain: whether to read through the gain of the final norm.

    Returns:
        (n, d) vectors; dtype and place as in `decompose`.

    Raises:
        SemalignError: the number of coefficients is not the number of entries, an unknown frame, or a gain that is
            needed and missing.

    Source: v1 eq. 2 (`cosine`), method of ACL (`dual`), ours (`parseval`).
    """
    frame = find_frame(frame)
    if coefficients.shape[1] != basis.manifest.entries:
        raise SemalignError(
            f"{coefficients.shape[1]} coefficients for a basis of {basis.manifest.entries} entries: "
            "build both bases on the shared entries (align_vocabularies)"
        )
    coefficients_NV = _wide(coefficients, basis)
    vectors_ND = coefficients_NV.new_zeros(len(coefficients), basis.manifest.width)
    start = 0
    for rows_VD in frame_rows(basis, frame, frame.synthesis, fold_gain=fold_gain):
        vectors_ND += coefficients_NV[:, start : start + len(rows_VD)] @ _beside(rows_VD, vectors_ND)
        start += len(rows_VD)
    return vectors_ND @ outer_power(basis, frame, frame.synthesis, fold_gain=fold_gain).to(vectors_ND)


def _wide(vectors: Tensor, basis: SemanticBasis) -> Tensor:
    """In float64 where the vectors are or the basis needs it, else in float32."""
    if torch.float64 in (basis.dtype, accumulation_dtype(vectors)):
        return to_float64(vectors)
    return vectors.to(torch.float32)


def _beside(rows: Tensor, vectors: Tensor) -> Tensor:
    """In the dtype and at the place of the vectors."""
    return (to_float64(rows) if vectors.dtype == torch.float64 else rows).to(vectors)


def frame_rows(
    basis: SemanticBasis, frame: Frame, power: float, *, fold_gain: bool, chunk: int = CHUNK
) -> Iterator[Float[Tensor, "w d"]]:
    """Chunks of the rows that `outer_power` completes: W, or for unit columns N⁻¹ W G^(−power), which takes its power
    row by row, as a sum over entries would lose digits that unit columns keep."""
    if not frame.unit:
        yield from basis.rows(fold_gain=fold_gain, chunk=chunk)
        return
    inverse_DD, power_DD = (basis.gram_power(each, fold_gain=fold_gain) for each in (1.0, power))
    for rows_VD in basis.rows(fold_gain=fold_gain, chunk=chunk):
        columns_VD = rows_VD @ inverse_DD.to(rows_VD)
        norms = columns_VD.norm(dim=1, keepdim=True)
        powered_VD = columns_VD if power == 1 else rows_VD @ power_DD.to(rows_VD)
        yield powered_VD / torch.where(norms > 0, norms, 1.0)  # a row of zeros has no direction: its column stays zero


def outer_power(basis: SemanticBasis, frame: Frame, power: float, *, fold_gain: bool) -> Float[Tensor, "d d"]:
    """G^(−power), which is left to apply to `frame_rows`; the identity for unit columns."""
    return basis.gram_power(0.0 if frame.unit else power, fold_gain=fold_gain)


@checked
def unit_rows(vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Scale rows to unit length, with finite gradients; computed in float32 (float64 for float64), cast back once.

    Rows whose largest number is below `least_size` of that dtype (1e-31 in float32) stay zero; a row with a value that
    is not finite comes out as NaN.
    """
    rows = vectors.to(accumulation_dtype(vectors))
    sizes = rows.detach().abs().amax(-1, keepdim=True)
    none = sizes < least_size(rows.dtype)
    # Squares of very small or large numbers would leave the range of the dtype.
    scaled = torch.where(none, 0.0, rows / torch.where(none, 1.0, sizes))
    return (scaled / torch.where(none, 1.0, scaled.square().sum(-1, keepdim=True)).sqrt()).to(vectors.dtype)
