"""Laws of the semantic basis: Moore–Penrose identities, precision, and what it does not depend on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import SemanticBasis
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.testing import assert_close

from .strategies import condition_number, conditioned, elementwise, from_svd, gains, heads, normal, seeds

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def inverse(basis: SemanticBasis, **options: bool | int) -> Tensor:
    return torch.cat(list(basis.columns(**options)), 1)


def assert_pseudo_inverse(w: Tensor, b: Tensor, eps: float) -> None:
    """The four Moore–Penrose identities, each to a tolerance from the condition number of the Gram matrix."""
    w, b = w.double(), b.double()
    tolerance = 200 * max(w.shape) * eps * condition_number(w) ** 2
    w_size, b_size = float(w.norm()), float(b.norm())
    assert_close(w @ b @ w, w, rtol=0, atol=tolerance * w_size + 1e-300)
    assert_close(b @ w @ b, b, rtol=0, atol=tolerance * b_size + 1e-300)
    assert_close((w @ b).T, w @ b, rtol=0, atol=tolerance)
    assert_close((b @ w).T, b @ w, rtol=0, atol=tolerance)


@given(heads(), st.integers(1, 13))
def test_columns_are_the_moore_penrose_inverse(w: Tensor, chunk: int) -> None:
    basis = SemanticBasis.from_head(w, chunk=chunk)
    assert basis.manifest.products == "float64"
    assert basis.manifest.rank == int(torch.linalg.matrix_rank(w, rtol=1e-7))
    assert_pseudo_inverse(w, inverse(basis, chunk=chunk), EPS)


@given(heads(max_condition=1e2), st.data())
def test_folded_columns_are_the_inverse_of_the_effective_readout(w: Tensor, data: st.DataObject) -> None:
    gain = data.draw(gains(w.shape[1]))
    basis = SemanticBasis.from_head(w, gain=gain)
    assert_pseudo_inverse(w * gain, inverse(basis, fold_gain=True), EPS)
    assert_pseudo_inverse(w, inverse(basis), EPS)


@given(conditioned(12, 4, max_condition=10), st.sampled_from([torch.float32, torch.bfloat16]))
def test_narrow_heads_run_in_float32(w: Tensor, dtype: torch.dtype) -> None:
    narrow = w.to(dtype)
    basis = SemanticBasis.from_head(narrow)
    b = inverse(basis)
    assert basis.manifest.products == "float32"
    assert basis.gram.dtype == torch.float64
    assert b.dtype == torch.float32
    assert_pseudo_inverse(narrow, b, EPS32)


@given(seeds, st.floats(3, 5), st.booleans())
def test_ill_conditioned_float32_heads_go_to_float64_and_stay_accurate(seed: int, power: float, repeat: bool) -> None:
    w = from_svd(seed, 40, 4, 10**power).float()
    if repeat:
        w = torch.cat([w, w[:, :1]], 1)
    basis = SemanticBasis.from_head(w)
    assert basis.manifest.products == "float64"
    assert basis.manifest.rank == 4
    assert basis.manifest.condition > 1e5
    assert_pseudo_inverse(w, inverse(basis), EPS)


@given(elementwise(8, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_deficient_narrow_heads_have_an_inverse(w: Tensor, dtype: torch.dtype) -> None:
    doubled = torch.cat([w, w], 1)
    basis = SemanticBasis.from_head(doubled.to(dtype))
    assert basis.manifest.rank == int(torch.linalg.matrix_rank(w))
    assert_pseudo_inverse(doubled, inverse(basis), EPS)


@given(heads(), st.sampled_from([0.25, 0.5, 1.0, 1.5]))
def test_gram_power_is_the_pseudo_power(w: Tensor, power: float) -> None:
    basis = SemanticBasis.from_head(w)
    _, values, rights = torch.linalg.svd(w, full_matrices=False)
    keep = values > 1e-7 * values.max()
    expected = (rights[keep].T * values[keep] ** (-2 * power)) @ rights[keep]
    size = float(expected.norm())
    tolerance = 500 * max(w.shape) * EPS * condition_number(w) ** 2
    assert_close(basis.gram_power(power), expected, rtol=0, atol=tolerance * size + 1e-300)


@given(heads())
def test_power_zero_is_the_identity(w: Tensor) -> None:
    assert_close(SemanticBasis.from_head(w).gram_power(0.0), torch.eye(w.shape[1], dtype=torch.float64))


@given(elementwise(9, 3), st.data())
def test_the_basis_is_that_of_the_chosen_entries(w: Tensor, data: st.DataObject) -> None:
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True)))
    chosen = SemanticBasis.from_head(w, entries=ids)
    expected = SemanticBasis.from_head(w[ids], entries=torch.arange(len(ids)))
    assert chosen.manifest == expected.manifest
    assert_close(inverse(chosen), inverse(expected))
    assert_close(torch.cat(list(chosen.rows())), w[ids])


@given(elementwise(9, 3), st.integers(1, 10), st.permutations(range(9)))
def test_gram_does_not_depend_on_chunks_nor_order(w: Tensor, chunk: int, order: list[int]) -> None:
    permuted = SemanticBasis.from_head(w, entries=torch.tensor(order), chunk=chunk)
    assert_close(permuted.gram, SemanticBasis.from_head(w).gram)
    assert_close(inverse(permuted), inverse(SemanticBasis.from_head(w))[:, order])


@given(heads(max_condition=1e2))
def test_condition_bounds_the_two_norm_condition_number(w: Tensor) -> None:
    values = torch.linalg.svdvals(w)
    if len(values) == w.shape[1] and values.min() > 1e-5 * values.max():
        assert SemanticBasis.from_head(w).manifest.condition >= float((values.max() / values.min()) ** 2) * (1 - 1e-6)


@pytest.mark.parametrize("ids", [[], [-1], [0, 5]])
def test_entries_outside_of_the_head_are_refused(ids: list[int]) -> None:
    with pytest.raises(SemalignError, match=r"rows 0 … 4"):
        SemanticBasis.from_head(normal(0, 5, 2), entries=torch.tensor(ids, dtype=torch.long))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_damaged_heads_are_refused(value: float, dtype: torch.dtype) -> None:
    w = normal(0, 5, 2).to(dtype)
    w[2, 1] = value
    with pytest.raises(SemalignError, match="not finite"):
        SemanticBasis.from_head(w)


def test_folding_needs_a_gain() -> None:
    with pytest.raises(SemalignError, match="fold_gain needs the gain"):
        SemanticBasis.from_head(normal(0, 5, 2)).gram_power(1.0, fold_gain=True)
