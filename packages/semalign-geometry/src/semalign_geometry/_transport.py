"""Transport of residual contributions from the source's width to the target's, as one matrix.

Shape suffixes: N tokens, V vocabulary entries, S source width, T target width.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ._basis import CHUNK, COARSE, SemanticBasis
from ._contracts import TransportManifest
from ._frame import Frame, find_frame
from ._frames import frame_rows, outer_power, unit_rows
from ._head import accumulation_dtype, full_precision, to_float64
from .base import SemalignError, checked, read_artifact, short_repr, write_artifact

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Transport:
    """A frame's decompose-in-the-source, recompose-in-the-target, collapsed into one (d_T, d_S) matrix."""

    matrix: Float[Tensor, "t s"]
    """float32; float64 when a head is float64. It follows the vectors to their device when it is applied."""
    manifest: TransportManifest
    """Frame and widths."""

    __repr__ = short_repr

    @classmethod
    def identity(cls, width: int) -> "Transport":
        """No transport: relation geometry may be matched in the source's own space (frame `none`)."""
        manifest = TransportManifest(
            frame="none", fold_gain=False, unit_tokens=False, source_width=width, target_width=width, entries=0
        )
        return cls(torch.eye(width), manifest)

    @checked
    @full_precision
    def __call__(self, residual: Float[Tensor, "*n s"]) -> Float[Tensor, "*n t"]:
        """Transport vectors: (…, d_S) → (…, d_T), float32 (float64 for float64 input).

        A vector that holds a value that is not finite comes out so, and no other.

        Raises:
            SemalignError: the vectors have another width.
        """
        if residual.shape[-1] != self.manifest.source_width:
            raise SemalignError(
                f"the transport takes vectors of width {self.manifest.source_width}, got {residual.shape[-1]}: pass "
                "vectors of its source, or fit another transport"
            )
        vectors = residual.to(accumulation_dtype(residual))
        if self.manifest.unit_tokens:
            vectors = unit_rows(vectors)
        return vectors @ self.matrix.to(vectors).T

    def save(self, folder: str | Path) -> "Transport":
        """Write manifest and matrix to a folder, whole or not at all."""
        return Transport(self.matrix, write_artifact(folder, self.manifest, {"matrix": self.matrix}))

    @classmethod
    def load(cls, folder: str | Path) -> "Transport":
        """Read what `save` wrote.

        Raises:
            SemalignError: a file is missing or damaged.
        """
        manifest, tensors = read_artifact(folder, TransportManifest)
        return cls(tensors["matrix"], manifest)


@checked
@full_precision
def fit_transport(
    source: SemanticBasis,
    target: SemanticBasis,
    *,
    frame: str | Frame = "parseval",
    fold_gain: bool = False,
    chunk: int = CHUNK,
) -> Transport:
    """Collapse a frame's two steps into M = G_T^(−q) [Σ_i w_T,i w_S,iᵀ / (n_T,i n_S,i)] G_S^(−p).

    The sum streams over the vocabulary: cost v·d_S·d_T once, and no coefficients. Laws: `dual` and `parseval` are
    the identity when both bases are the same (on the row space of a rank-deficient head); `parseval` from T to S is
    the transpose and never lengthens a vector; for every frame M r = recompose(target, decompose(source, r)).

    Rounding changes M by a relative error of about `SemanticBasis.rounding` of the worse head, for frames of unit
    columns by less, and by 10⁻⁵ where the products of the bases are float32. A warning is logged above `COARSE`, and
    for a head that does not read every direction.

    Args:
        source: basis of the source, over the shared entries in order.
        target: basis of the target, over the same entries in the same order.
        frame: name or `Frame`.
        fold_gain: read both heads through the gain of their final norms.
        chunk: vocabulary rows in memory at a time.

    Raises:
        SemalignError: the bases have different numbers of entries, a gain is needed and missing, or the matrix is
            not finite in its dtype.

    Example:
        >>> import torch
        >>> source, target = (SemanticBasis.from_head(torch.randn(500, width)) for width in (32, 16))
        >>> transport = fit_transport(source, target)
        >>> transport(torch.randn(5, 32)).shape
        torch.Size([5, 16])
        >>> torch.testing.assert_close(fit_transport(target, target).matrix, torch.eye(16), rtol=0, atol=1e-4)

    Source: v1 eq. 1–2 (`cosine`), ACL (`dual`), ours (`parseval` and the collapse).
    """
    frame = find_frame(frame)
    if source.manifest.entries != target.manifest.entries:
        raise SemalignError(
            f"the source basis has {source.manifest.entries} entries, the target basis {target.manifest.entries}: "
            "build both with entries=… of align_vocabularies"
        )
    for role, basis in (("source", source), ("target", target)):
        _warn_of_loss(role, basis, frame, fold_gain)
    cross_TS = target.gram.new_zeros(target.manifest.width, source.manifest.width)
    rows = zip(
        frame_rows(target, frame, frame.synthesis, fold_gain=fold_gain, chunk=chunk),
        frame_rows(source, frame, frame.analysis, fold_gain=fold_gain, chunk=chunk),
        strict=True,
    )
    wide = torch.float64 in (source.dtype, target.dtype)
    for pair in rows:
        target_VT, source_VS = (to_float64(part) if wide else part for part in pair)
        cross_TS += to_float64(target_VT.T @ source_VS.to(target_VT))
    left_TT = outer_power(target, frame, frame.synthesis, fold_gain=fold_gain)
    right_SS = outer_power(source, frame, frame.analysis, fold_gain=fold_gain).to(cross_TS.device)
    manifest = TransportManifest(
        frame=frame.name,
        fold_gain=fold_gain,
        unit_tokens=frame.unit,
        source_width=source.manifest.width,
        target_width=target.manifest.width,
        entries=source.manifest.entries,
    )
    matrix_TS = (left_TT @ cross_TS @ right_SS).to(accumulation_dtype(source.weight, target.weight))
    if not torch.isfinite(matrix_TS).all():
        raise SemalignError(
            f"the transport by {frame.name} is not finite: the two heads differ too much in size for "
            f"{str(matrix_TS.dtype).removeprefix('torch.')}, pass them in float64 or choose the frame parseval"
        )
    return Transport(matrix_TS, manifest)


def _warn_of_loss(role: str, basis: SemanticBasis, frame: Frame, fold_gain: bool) -> None:
    """Log the loss that a head causes in a transport."""
    manifest, rounding = basis.manifest, basis.rounding(fold_gain=fold_gain)
    if manifest.rank < manifest.width:
        LOGGER.warning(
            "the %s's head has rank %d of %d over the shared entries: the transport drops what it cannot read",
            *(role, manifest.rank, manifest.width),
        )
    elif rounding > COARSE and not frame.unit:
        LOGGER.warning(
            "the columns of the %s's head are nearly dependent (condition number of WᵀW about %.0e): rounding changes "
            "the %s transport by about one part in %.0e",
            *(role, manifest.condition, frame.name, 1 / rounding),
        )
