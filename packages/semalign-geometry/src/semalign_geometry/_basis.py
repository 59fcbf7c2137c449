"""The semantic basis B = W⁺ of a language-model head, through one d×d Gram matrix.

Shape suffixes: V vocabulary entries, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._contracts import BasisManifest
from ._head import Head, accumulation_dtype, final_norm, full_precision, norm_gain, to_float64
from .base import SemalignError, checked, short_repr

CHUNK = 8192
"""Vocabulary rows in memory at a time, by default."""

COARSE = 1e-6
"""Relative rounding error of a basis above which transports on it come with a warning."""


@dataclass(frozen=True, eq=False)
class SemanticBasis:
    """Semantic basis of a head: column i of B = W⁺ = (WᵀW)⁻¹Wᵀ is the direction that means vocabulary entry i.

    Only WᵀW is held; columns of B are made chunk by chunk, so that no (d, v) matrix exists.

    Example:
        >>> import torch
        >>> basis = SemanticBasis.from_head(torch.randn(100, 8))
        >>> columns = torch.cat(list(basis.columns()), dim=1)
        >>> columns.shape, basis.manifest.rank
        (torch.Size([8, 100]), 8)
        >>> torch.testing.assert_close(columns @ basis.weight, torch.eye(8), rtol=0, atol=1e-4)

    Source: VDS; v1 §3.1.
    """

    weight: Float[Tensor, "rows d"]
    """The whole head, a reference to the model's own tensor."""
    ids: Int[Tensor, " v"]
    """Rows of `weight` that span the basis."""
    gain: Float[Tensor, " d"] | None
    """Gain of the final norm, for frames on the effective readout W·diag(gain)."""
    gram: Float[Tensor, "d d"]
    """WᵀW over `ids`, float64, without the gain; where `weight` lies, or on the CPU if that has no float64."""
    inverse: Float[Tensor, "d d"] | None
    """(WᵀW)⁻¹, float64, where `gram` lies; None where the rank is deficient."""
    manifest: BasisManifest
    """Sizes, rank and conditioning."""

    __repr__ = short_repr

    @classmethod
    @checked
    def from_model(cls, model: nn.Module, *, entries: Int[Tensor, " v"] | None = None) -> "SemanticBasis":
        """The basis of a transformers causal LM, with the gain of its final norm.

        Args:
            model: the language model.
            entries: (v,) vocabulary ids that span the basis; None takes every row of the head.

        Raises:
            SemalignError: no head, no final norm, an id outside of the head, or values that are not finite.
        """
        weight = Head.from_model(model).weight
        entries = torch.arange(len(weight)) if entries is None else entries
        return cls.from_head(weight, gain=norm_gain(final_norm(model), weight.shape[1]), entries=entries)

    @classmethod
    @checked
    @full_precision
    def from_head(
        cls,
        weight: Float[Tensor, "rows d"],
        *,
        gain: Float[Tensor, " d"] | None = None,
        entries: Int[Tensor, " v"] | None = None,
        chunk: int = CHUNK,
    ) -> "SemanticBasis":
        """The basis of a head matrix.

        Products of float32 and narrower heads run in float32 and are summed over chunks in float64. Where the condition
        number makes float32 products too coarse (relative error of the smallest eigenvalue above about 1e-3),
        they are computed again in float64.

        Args:
            weight: (rows, d) head, any floating dtype.
            gain: (d,) gain of the final norm; kept for frames that fold it.
            entries: (v,) row ids; None takes all rows of a head that has more rows than columns.
            chunk: rows in memory at a time.

        Raises:
            SemalignError: an id outside of the head, no entries, fewer rows than columns without `entries` (the head is
                probably transposed), a gain of another width, or values that are not finite.
        """
        rows, width = weight.shape
        if entries is None and rows < width:
            raise SemalignError(
                f"the head has {rows} rows and {width} columns, expected one row for each vocabulary entry: pass "
                f"weight.T, or entries=torch.arange({rows}) if the vocabulary is that small"
            )
        if gain is not None and (gain.shape != (width,) or not torch.isfinite(gain).all()):
            raise SemalignError(
                f"the gain has shape {tuple(gain.shape)}, expected {width} finite numbers: pass norm_gain(…) of the "
                "model's final norm"
            )
        ids = torch.arange(rows) if entries is None else entries.cpu()
        if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise SemalignError(
                f"entries must name some of the head's rows 0 … {rows - 1}, got {len(ids)} ids"
                + (f" from {int(ids.min())} to {int(ids.max())}" if len(ids) else "")
            )
        products = accumulation_dtype(weight)
        gram_DD = _gram(weight, ids, products, chunk)
        inverse_DD = _inverse(gram_DD)
        condition = _condition(gram_DD, inverse_DD)
        if products == torch.float32 and condition * torch.finfo(torch.float32).eps > 1e-3:
            products = torch.float64
            gram_DD = _gram(weight, ids, products, chunk)
            inverse_DD = _inverse(gram_DD)
            condition = _condition(gram_DD, inverse_DD)
        if not torch.isfinite(gram_DD).all():
            raise SemalignError("the head holds values that are not finite: the checkpoint is damaged, fetch it again")
        rank = width if condition < _MAX_CONDITION else int((torch.linalg.eigvalsh(gram_DD) > _cutoff(gram_DD)).sum())
        inverse_DD = inverse_DD if rank == width else None
        manifest = BasisManifest(
            width=width, entries=len(ids), rank=rank, condition=condition, products=str(products).removeprefix("torch.")
        )
        gain = None if gain is None else to_float64(gain).to(gram_DD.device)
        return cls(weight, ids, gain, gram_DD, inverse_DD, manifest)

    @property
    def dtype(self) -> torch.dtype:
        """dtype that this basis' own products need: float64 where the conditioning needs it."""
        return torch.float64 if self.manifest.products == "float64" else torch.float32

    def rows(self, *, fold_gain: bool = False, chunk: int = CHUNK) -> Iterator[Float[Tensor, "w d"]]:
        """W, or W·diag(gain), over the basis' entries, chunk by chunk, in the basis' dtype.

        Args:
            fold_gain: multiply each column by the gain of the final norm.
            chunk: rows of a chunk, w; the last may have fewer.

        Raises:
            SemalignError: the gain is needed and missing.
        """
        gain = self._gain(fold_gain)
        for rows_VD in _rows(self.weight, self.ids, self.dtype, chunk):
            yield rows_VD if gain is None else rows_VD * gain.to(rows_VD)

    def rounding(self, *, fold_gain: bool = False) -> float:
        """Relative error, about, that rounding leaves in (WᵀW)⁻¹: ε·cond(WᵀW), with ε = 2·10⁻¹⁶.

        It is that of the Gram matrix, which is float64. Where the products of a basis are float32 (`dtype`), they add
        about 10⁻⁵. 0 for a deficient rank: there, eigenvalues that are rounding alone are left out.

        Args:
            fold_gain: of the effective readout W·diag(gain).

        Raises:
            SemalignError: the gain is needed and missing.
        """
        gain = self._gain(fold_gain)
        condition = self.manifest.condition
        if gain is not None:
            condition = _condition(gain[:, None] * self.gram * gain, self.gram_power(1.0, fold_gain=True))
        return condition * torch.finfo(torch.float64).eps if self.inverse is not None else 0.0

    @full_precision
    def gram_power(self, power: float, *, fold_gain: bool = False) -> Float[Tensor, "d d"]:
        """G^(−power) of the Gram matrix G = WᵀW (of W·diag(gain) when folded), float64.

        Power 1 is the inverse (by Cholesky), 0.5 the inverse square root, 0 the identity. A rank-deficient head
        returns the Moore–Penrose power: directions that no entry reads map to zero.

        Raises:
            SemalignError: the gain is needed and missing.
        """
        gain = self._gain(fold_gain)
        gram_DD = self.gram if gain is None else gain[:, None] * self.gram * gain
        if power == 0:
            return torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
        if power == 1 and self.inverse is not None:
            inverse_DD = self.inverse if gain is None else _inverse(gram_DD)
            if inverse_DD is not None:
                return inverse_DD
        eigenvalues, vectors = torch.linalg.eigh(gram_DD)
        powers = torch.where(eigenvalues > _cutoff(gram_DD), eigenvalues.clamp_min(1e-300) ** -power, 0.0)
        power_DD: Tensor = (vectors * powers) @ vectors.T
        return power_DD

    def columns(self, *, fold_gain: bool = False, chunk: int = CHUNK) -> Iterator[Float[Tensor, "d w"]]:
        """Columns of the semantic basis B = W⁺, chunk by chunk over the entries, in the basis' dtype.

        Args:
            fold_gain: those of the effective readout W·diag(gain).
            chunk: columns of a chunk, w; the last may have fewer.

        Raises:
            SemalignError: the gain is needed and missing.
        """
        inverse_DD = self.gram_power(1.0, fold_gain=fold_gain)
        for rows_VD in self.rows(fold_gain=fold_gain, chunk=chunk):
            with torch.autocast(rows_VD.device.type, enabled=False):
                columns_DV = inverse_DD.to(rows_VD) @ rows_VD.T
            yield columns_DV

    def _gain(self, fold_gain: bool) -> Float[Tensor, " d"] | None:
        if fold_gain and self.gain is None:
            raise SemalignError("fold_gain needs the gain of the final norm: pass gain=…, or build with from_model")
        return self.gain if fold_gain else None


_STRIPS = 4
_MAX_CONDITION = 1e12
"""Above it, a float64 Gram matrix is treated as possibly rank-deficient."""


def _gram(weight: Tensor, ids: Tensor, dtype: torch.dtype, chunk: int) -> Float[Tensor, "d d"]:
    """WᵀW in strips from the diagonal to the right: five eighths of the whole product."""
    width = weight.shape[1]
    gram_DD = to_float64(weight.new_zeros(width, width))
    starts = range(0, width, -(-width // _STRIPS))
    for rows_VD in _rows(weight, ids, dtype, chunk):
        for start in starts:
            strip = slice(start, start + starts.step)
            gram_DD[strip, start:] += to_float64(rows_VD[:, strip].T @ rows_VD[:, start:])
    return gram_DD.triu() + gram_DD.triu(1).T


def _rows(weight: Tensor, ids: Tensor, dtype: torch.dtype, chunk: int) -> Iterator[Float[Tensor, "w d"]]:
    for some in ids.split(chunk):
        first = int(some[0])
        consecutive = torch.equal(some, torch.arange(first, first + len(some)))
        # A slice is no copy.
        rows_VD = weight[first : first + len(some)] if consecutive else weight[some.to(weight.device)]
        yield to_float64(rows_VD) if dtype == torch.float64 else rows_VD.to(dtype)


def _inverse(gram_DD: Tensor) -> Float[Tensor, "d d"] | None:
    """G⁻¹; None where Cholesky finds no positive matrix."""
    factor, failed = torch.linalg.cholesky_ex(gram_DD)
    return None if failed else torch.cholesky_inverse(factor)


def _condition(gram_DD: Tensor, inverse_DD: Tensor | None) -> float:
    """‖G‖₁‖G⁻¹‖₁, at least the 2-norm condition number; infinite without an inverse."""
    if inverse_DD is None:
        return float("inf")
    return float(torch.linalg.matrix_norm(gram_DD, 1) * torch.linalg.matrix_norm(inverse_DD, 1))


def _cutoff(gram_DD: Tensor) -> Float[Tensor, ""]:
    """Eigenvalues up to here are rounding noise of a float64 Gram matrix."""
    # The Frobenius norm is at least the largest eigenvalue, and needs no decomposition.
    cutoff: Tensor = torch.linalg.matrix_norm(gram_DD) * len(gram_DD) * torch.finfo(torch.float64).eps * 8
    return cutoff
