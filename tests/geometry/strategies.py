"""Hypothesis strategies for matrices, heads, vocabularies and contracts.

Matrices come in two kinds. Element-wise ones have small whole entries, so that zeros, ties and repeated rows
are common and every Gram matrix is exact. Conditioned ones are made from an SVD with a drawn condition number
and a drawn seed.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from semalign_geometry import BasisManifest, FidelityReport, Frame, Head, LayerFidelity, TransportManifest
from semalign_geometry.base import ArtifactManifest, Contract
from torch import Tensor

seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(seed, size, size)).Q


def from_svd(seed: int, rows: int, columns: int, condition: float) -> Tensor:
    """A matrix of full rank, largest singular value 1, with this 2-norm condition number."""
    rank = min(rows, columns)
    rng = generator(seed)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=rng, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=rng, dtype=torch.float64)).Q
    return (left * torch.logspace(0, -torch.tensor(condition).log10(), rank, dtype=torch.float64)) @ right.T


def condition_number(matrix: Tensor) -> float:
    """Largest over smallest non-zero singular value; 1 for a zero matrix."""
    values = torch.linalg.svdvals(matrix.double())
    values = values[values > 1e-7 * values.max()]
    return float(values.max() / values.min()) if len(values) else 1.0


@st.composite
def elementwise(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    row = st.lists(st.integers(-3, 3), min_size=columns, max_size=columns)
    pool = draw(st.lists(row, min_size=1, max_size=rows))
    picks = draw(st.lists(st.integers(0, len(pool) - 1), min_size=rows, max_size=rows))
    return torch.tensor([pool[pick] for pick in picks], dtype=torch.float64)


@st.composite
def conditioned(draw: st.DrawFn, rows: int, columns: int, max_condition: float = 1e3) -> Tensor:
    exponent = draw(st.floats(0, float(torch.tensor(max_condition).log10())))
    return from_svd(draw(seeds), rows, columns, 10**exponent) * 10 ** draw(st.floats(-2, 2))


def matrices(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    return st.one_of(elementwise(rows, columns), conditioned(rows, columns))


@st.composite
def heads(draw: st.DrawFn, max_condition: float = 1e3) -> Tensor:
    """(v, d) heads in float64, duplicated columns included."""
    columns = draw(st.integers(1, 4))
    rows = draw(st.integers(columns + 1, 12))
    head = draw(st.one_of(elementwise(rows, columns), conditioned(rows, columns, max_condition)))
    if draw(st.booleans()):
        head = torch.cat([head, head[:, :1]], 1)
    return head


@st.composite
def tall_heads(draw: st.DrawFn, max_condition: float = 1e2, entries: int | None = None) -> Tensor:
    """(v, d) heads of full rank with v > d."""
    columns = draw(st.integers(1, 5))
    rows = draw(st.integers(columns + 1, 14)) if entries is None else entries
    return draw(conditioned(rows, columns, max_condition))


@st.composite
def gains(draw: st.DrawFn, width: int) -> Tensor:
    sizes = draw(st.lists(st.floats(0.25, 4.0), min_size=width, max_size=width))
    return torch.tensor(sizes, dtype=torch.float64) * draw(st.sampled_from([1.0, -1.0]))


@st.composite
def frames(draw: st.DrawFn) -> str | Frame:
    """The named frames, and a frame of one's own."""
    power = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    own = st.builds(Frame, st.just("own"), power, power, st.booleans())
    return draw(st.one_of(st.sampled_from(["cosine", "dual", "parseval"]), own))


@dataclass(frozen=True)
class Sides:
    """Two sets of vectors of the same tokens, (n, d) and (n, e)."""

    x: Tensor
    y: Tensor


@st.composite
def sides(
    draw: st.DrawFn, min_tokens: int = 2, kind: Callable[[int, int], st.SearchStrategy[Tensor]] = matrices
) -> Sides:
    tokens, x_width, y_width = (
        draw(st.integers(min_tokens, 7)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
    )
    return Sides(draw(kind(tokens, x_width)), draw(kind(tokens, y_width)))


@dataclass(frozen=True)
class Outputs:
    """Hidden states and heads of both models over the same entries, and every setting of the objective."""

    source: Tensor
    source_head: Head
    target: Tensor
    target_head: Head
    temperature: float
    chunk: int

    @property
    def entries(self) -> int:
        return len(self.source_head.weight)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Dense logits of source and target, temperature applied."""
        return (
            dense_logits(self.source, self.source_head) / self.temperature,
            dense_logits(self.target, self.target_head) / self.temperature,
        )


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    """softcap(scale · (hidden Wᵀ + bias)), written out."""
    bias = 0.0 if head.bias is None else head.bias
    logits = head.scale * (hidden @ head.weight.T + bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@st.composite
def output_heads(draw: st.DrawFn, entries: int, width: int) -> Head:
    element = elementwise(entries, width)
    weight = draw(element) if draw(st.booleans()) else normal(draw(seeds), entries, width)
    return Head(
        weight=weight,
        bias=normal(draw(seeds), entries) if draw(st.booleans()) else None,
        scale=draw(st.sampled_from([1.0, 0.25, 1.5])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
    )


@st.composite
def outputs(draw: st.DrawFn) -> Outputs:
    entries, tokens = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    s, t = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Outputs(
        source=normal(draw(seeds), tokens, s),
        source_head=draw(output_heads(entries, s)),
        target=normal(draw(seeds), tokens, t),
        target_head=draw(output_heads(entries, t)),
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
        chunk=draw(st.integers(1, entries + 1)),
    )


vocabularies = st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=3), min_size=1, max_size=12, unique=True)

_words = st.text(max_size=8)
_files = st.dictionaries(_words, st.text("0123456789abcdef", min_size=64, max_size=64), max_size=2)
_numbers = st.floats(allow_nan=False)
_layers = st.builds(LayerFidelity, recomposition_cosine=_numbers, cka_transported=_numbers, cka_direct=_numbers)

contracts: dict[type[Contract], st.SearchStrategy[Contract]] = {
    ArtifactManifest: st.builds(ArtifactManifest, files=_files),
    BasisManifest: st.builds(BasisManifest, files=_files, condition=_numbers),
    TransportManifest: st.builds(TransportManifest, files=_files),
    LayerFidelity: _layers,
    FidelityReport: st.builds(FidelityReport, layers=st.lists(_layers, max_size=3).map(tuple)),
}
"""Every contract of the library."""
