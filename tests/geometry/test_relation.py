"""Laws of relation geometry."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from semalign_geometry import linear_cka, linear_cka_matrix, relation_distance, relation_distances, unit_rows
from semalign_geometry._relation import _alignments
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from .strategies import Sides, conditioned, from_svd, matrices, normal, rotation, seeds, sides

TIGHT = {"rtol": 0.0, "atol": 1e-9}
routes = st.sampled_from(["auto", "token", "feature"])


def smooth_sides() -> st.SearchStrategy[Sides]:
    """Sides that vary, away from the definitions at zero variance."""
    return sides(min_tokens=3, kind=lambda rows, columns: conditioned(rows, columns, max_condition=10))


def dense(x: Tensor, y: Tensor) -> Tensor:
    """½ ‖K/‖K‖ − L/‖L‖‖², written out; a relation matrix without variance is zero."""
    relations = []
    for side in (x, y):
        centred = side - side.mean(0)
        k = centred @ centred.T
        relations.append(k / k.norm() if k.norm() > 1e-12 else torch.zeros_like(k))
    return (relations[0] - relations[1]).square().sum() / 2


def varies(side: Tensor) -> bool:
    return bool((side != side[0]).any())


@given(sides(min_tokens=3), routes)
def test_it_is_the_formula(case: Sides, route: str) -> None:
    assert_close(relation_distance(case.x, case.y, route=route), dense(case.x, case.y), **TIGHT)


@given(sides(), routes)
def test_it_lies_in_the_unit_interval_and_is_symmetric(case: Sides, route: str) -> None:
    distance = relation_distance(case.x, case.y, route=route)
    assert 0 <= float(distance) <= 1 + 1e-12
    assert_close(distance, relation_distance(case.y, case.x, route=route), **TIGHT)


@given(matrices(6, 3), seeds, st.floats(0.1, 10))
def test_equal_relations_have_distance_zero(x: Tensor, seed: int, scale: float) -> None:
    turned = scale * x @ rotation(seed, 5)[:3]
    assert_close(relation_distance(x, turned), torch.tensor(0.0, dtype=torch.float64), **TIGHT)


@given(sides(), seeds, st.floats(1e-3, 1e3), st.booleans(), st.data())
def test_rotation_translation_scale_and_token_order_change_nothing(
    case: Sides, seed: int, scale: float, first: bool, data: st.DataObject
) -> None:
    expected = relation_distance(case.x, case.y)
    x, y = (case.x, case.y) if first else (case.y, case.x)
    width = x.shape[1]
    size = float(x.abs().max())
    for moved in (x @ rotation(seed, width), x + size * normal(seed, width), scale * x):
        assert_close(relation_distance(moved, y), expected, rtol=0, atol=1e-8)
    order = data.draw(st.permutations(range(len(x))))
    assert_close(relation_distance(x[order], y[order]), expected, **TIGHT)


@given(sides(), seeds)
def test_token_and_feature_routes_agree(case: Sides, seed: int) -> None:
    mask = torch.rand(len(case.x), generator=torch.Generator().manual_seed(seed)) < 0.7
    values = [relation_distance(case.x, case.y, mask=mask, route=route) for route in ("token", "feature", "auto")]
    assert_close(values[0], values[1], **TIGHT)
    assert_close(values[0], values[2], **TIGHT)


@given(sides(), st.data(), routes)
def test_masked_tokens_are_removed_whatever_they_hold(case: Sides, data: st.DataObject, route: str) -> None:
    tokens = len(case.x)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    junk = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]))
    x, y = (torch.where(mask[:, None], side, junk).requires_grad_() for side in (case.x, case.y))
    distance = relation_distance(x, y, mask=mask, route=route)
    kept = relation_distance(case.x[mask], case.y[mask], route=route)
    assert_close(distance, kept, **TIGHT)
    distance.backward()
    for side in (x, y):
        assert side.grad is not None
        assert torch.isfinite(side.grad).all()
        assert_close(side.grad[~mask], torch.zeros_like(side.grad[~mask]))


@given(st.data())
def test_sequences_average_over_those_with_three_tokens(data: st.DataObject) -> None:
    x = torch.stack([data.draw(matrices(4, 2)) for _ in range(3)])
    y = torch.stack([data.draw(matrices(4, 3)) for _ in range(3)])
    flags = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))
    mask = torch.tensor(flags).reshape(3, 4)
    each = [relation_distance(x[b][mask[b]], y[b][mask[b]]) for b in range(3) if mask[b].sum() >= 3]
    expected = torch.stack(each).mean() if each else torch.tensor(0.0, dtype=torch.float64)
    assert_close(relation_distance(x, y, mask=mask), expected, **TIGHT)
    distances, counted = relation_distances(x, y, mask=mask)
    assert counted.tolist() == (mask.sum(1) >= 3).tolist()
    for value, expected in zip(distances[counted], each, strict=True):
        assert_close(value, expected, **TIGHT)


@given(matrices(4, 2), st.floats(-5, 5), routes)
def test_sides_without_variance(x: Tensor, value: float, route: str) -> None:
    assume(varies(x))
    flat = torch.full((4, 3), value, dtype=torch.float64)
    assert_close(relation_distance(x, flat, route=route), torch.tensor(0.5, dtype=torch.float64))
    assert_close(relation_distance(flat, x, route=route), torch.tensor(0.5, dtype=torch.float64))
    assert float(relation_distance(flat, flat, route=route)) == 0
    assert float(linear_cka(x, flat)) == 0


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_fewer_than_three_tokens_have_distance_zero(tokens: int) -> None:
    x = normal(0, tokens, 3).requires_grad_()
    distance = relation_distance(x, normal(1, tokens, 2))
    distance.backward()
    assert float(distance.detach()) == 0
    assert x.grad is not None and not x.grad.any()


@given(matrices(2, 3), matrices(2, 2))
def test_any_two_tokens_are_related_alike(x: Tensor, y: Tensor) -> None:
    assert_close(linear_cka(x, y), torch.tensor(float(varies(x) and varies(y)), dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool), torch.ones(4, 6), torch.ones(4, 6, 8) > 0],
)
def test_a_mask_of_another_shape_is_refused(mask: Tensor) -> None:
    with pytest.raises(SemalignError, match=r"one truth value for each token, shape \(4, 6\), got"):
        _alignments(normal(0, 4, 6, 8), normal(1, 4, 6, 3), mask, "auto")


def test_all_masked_has_distance_zero_and_no_gradient() -> None:
    x = torch.full((2, 3, 2), float("nan")).requires_grad_()
    distance = relation_distance(x, torch.ones(2, 3, 4), mask=torch.zeros(2, 3, dtype=torch.bool))
    distance.backward()
    assert float(distance.detach()) == 0
    assert x.grad is not None and not x.grad.any()


@given(sides(min_tokens=1), routes, st.sampled_from([torch.float64, torch.float32]))
def test_gradients_are_finite_everywhere(case: Sides, route: str, dtype: torch.dtype) -> None:
    x, y = case.x.to(dtype).requires_grad_(), case.y.to(dtype).requires_grad_()
    relation_distance(x, y, route=route).backward()
    for side in (x, y):
        assert side.grad is not None
        assert torch.isfinite(side.grad).all()


@given(smooth_sides(), routes)
def test_gradients_equal_finite_differences(case: Sides, route: str) -> None:
    x, y = (side / side.norm(dim=1).min().clamp_min(0.1) for side in (case.x, case.y))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return relation_distance(a, b, route=route)

    assert gradcheck(
        distance, (x.clone().requires_grad_(), y.clone().requires_grad_()), atol=1e-4, rtol=1e-3, fast_mode=True
    )


@given(seeds)
def test_gradients_of_batches_equal_finite_differences(seed: int) -> None:
    x, y = normal(seed, 2, 4, 3).requires_grad_(), normal(seed + 1, 2, 4, 2)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert gradcheck(lambda a: relation_distance(a, y, mask=mask), (x,), atol=1e-5, fast_mode=True)


@given(seeds, st.integers(-46, -28), routes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_gradients_of_denormal_vectors_are_finite(seed: int, power: int, route: str, dtype: torch.dtype) -> None:
    x = (normal(seed, 6, 4) * 10.0**power).to(dtype).requires_grad_()
    distance = relation_distance(x, normal(seed + 1, 6, 3).float(), route=route)
    distance.backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    if power < -32:
        assert float(distance.detach()) == 0.5, "as a side without variance"
    rows = (normal(seed, 6, 4) * 10.0**power).to(dtype).requires_grad_()
    unit_rows(rows).sum().backward()
    assert rows.grad is not None and torch.isfinite(rows.grad).all()


def test_vectors_near_the_largest_number_do_not_overflow() -> None:
    x, y = normal(0, 6, 4), normal(1, 6, 3)
    huge = (x / x.abs().max() * 3e38).float().requires_grad_()
    distance = relation_distance(huge, y.float())
    assert_close(distance, relation_distance(x, y).float(), rtol=0, atol=1e-5)
    distance.backward()
    assert huge.grad is not None and torch.isfinite(huge.grad).all()


@given(seeds, st.integers(-15, 12), st.integers(-15, 12), routes)
def test_huge_and_tiny_float32_vectors(seed: int, x_power: int, y_power: int, route: str) -> None:
    x, y = from_svd(seed, 6, 4, 10.0), from_svd(seed + 1, 6, 3, 10.0)
    scaled_x = (x * 10.0**x_power).float().requires_grad_()
    scaled_y = (y * 10.0**y_power).float()
    distance = relation_distance(scaled_x, scaled_y, route=route)
    expected = relation_distance(x, y).float()
    assert distance.dtype == torch.float32
    assert_close(distance, expected, rtol=0, atol=1e-5)
    distance.backward()
    assert scaled_x.grad is not None
    assert torch.isfinite(scaled_x.grad).all()
    assert scaled_x.grad.any()


@given(seeds, routes)
def test_bfloat16_is_accumulated_in_float32(seed: int, route: str) -> None:
    x, y = normal(seed, 6, 4).bfloat16(), normal(seed + 1, 6, 3).bfloat16()
    distance = relation_distance(x, y, route=route)
    assert distance.dtype == torch.float32
    assert_close(distance, dense(x.double(), y.double()).float(), rtol=0, atol=1e-5)


@given(sides(min_tokens=3))
def test_cka_is_one_minus_the_distance_where_both_vary(case: Sides) -> None:
    cka = linear_cka(case.x, case.y)
    assert 0 <= float(cka) <= 1
    assert_close(cka, linear_cka(case.y, case.x), **TIGHT)
    if varies(case.x) and varies(case.y):
        assert_close(cka, 1 - relation_distance(case.x, case.y), **TIGHT)
    else:
        assert float(cka) == 0


@given(st.data(), st.integers(0, 6), st.sampled_from([torch.float64, torch.float32]), st.sampled_from([1, 30, 2**22]))
def test_the_cka_of_every_pair_is_that_of_each(data: st.DataObject, tokens: int, dtype: torch.dtype, held: int) -> None:
    xs, ys = (
        [data.draw(matrices(tokens, width)).to(dtype) if tokens else torch.zeros(0, width).to(dtype) for width in side]
        for side in ((3, 2), (2, 1, 4, 2))
    )
    xs.append(torch.full((tokens, 3), 0.1).to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semalign_geometry._relation.HELD", held)
        values = linear_cka_matrix(iter(xs), ys)
    expected = torch.stack([torch.stack([linear_cka(x, y) for y in ys]) for x in xs])
    assert_close(values, expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-6)
    assert not values[-1].any()


def test_the_cka_of_every_pair_needs_the_same_tokens() -> None:
    with pytest.raises(SemalignError, match=r"the same tokens, got \[3, 5\] tokens"):
        linear_cka_matrix(iter([normal(0, 3, 4)]), iter([normal(1, 3, 4), normal(1, 5, 4)]))
    with pytest.raises(SemalignError, match="both sides need a representation, got 1 and 0"):
        linear_cka_matrix([normal(0, 3, 4)], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_rows_have_unit_length_in_every_dtype(dtype: torch.dtype) -> None:
    rows = torch.nn.functional.normalize(torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)))
    lengths = unit_rows(rows.to(dtype)).double().norm(dim=1)
    assert_close(lengths, torch.ones(4, dtype=torch.float64), rtol=0, atol=2 * torch.finfo(dtype).eps)


def estimate(k: Tensor, m: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, written out."""
    n = len(k)
    k, m = (side - torch.diag(side.diagonal()) for side in (k, m))
    sums = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
    return sums / (n * (n - 3))


@given(sides(min_tokens=4, kind=lambda rows, columns: conditioned(rows, columns, max_condition=10)))
def test_debiased_cka_is_the_formula(case: Sides) -> None:
    k, m = case.x @ case.x.T, case.y @ case.y.T
    squares = estimate(k, k) * estimate(m, m)
    assume(float(squares) > 1e-6 * float(k.square().sum() * m.square().sum()))
    found = linear_cka(case.x, case.y, debiased=True)
    assert_close(found, estimate(k, m) / squares.sqrt(), rtol=0, atol=1e-6)
    assert -1 <= float(found) <= 1
    assert_close(found, linear_cka(case.y, case.x, debiased=True), **TIGHT)
    assert_close(linear_cka(case.x, case.x, debiased=True), torch.ones_like(found), **TIGHT)


@given(matrices(5, 3), matrices(5, 2))
def test_debiased_cka_is_zero_in_the_mean_over_all_orders_of_one_side(x: Tensor, y: Tensor) -> None:
    orders = [linear_cka(x, y[list(order)], debiased=True) for order in itertools.permutations(range(5))]
    assert_close(torch.stack(orders).mean(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-7)


@given(sides(min_tokens=4, kind=lambda r, c: conditioned(r, c, max_condition=10)), seeds, st.floats(1e-3, 1e3))
def test_debiased_cka_ignores_rotation_translation_and_scale(case: Sides, seed: int, scale: float) -> None:
    relations = case.x @ case.x.T
    assume(float(estimate(relations, relations)) > 1e-6 * float(relations.square().sum()))
    expected = linear_cka(case.x, case.y, debiased=True)
    width, size = case.x.shape[1], float(case.x.abs().max())
    for moved in (case.x @ rotation(seed, width), case.x + size * normal(seed, width), scale * case.x):
        assert_close(linear_cka(moved, case.y, debiased=True), expected, rtol=0, atol=1e-6)


def test_debiased_cka_of_unrelated_sides_and_of_relations_that_are_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(0, 500, 64).float(), normal(1, 500, 64).float()
    assert 0.1 < float(linear_cka(x, y)) < 0.13
    whole = linear_cka(x, y, debiased=True)
    assert abs(float(whole)) < 0.01
    monkeypatch.setattr("semalign_geometry._relation.HELD", 20_000)
    assert_close(linear_cka(x, y, debiased=True), whole, rtol=0, atol=1e-6)
    assert float(linear_cka(torch.eye(500), y, debiased=True)) == 0
    assert float(linear_cka(torch.ones(500, 2), y, debiased=True)) == 0


def test_debiased_cka_needs_four_tokens() -> None:
    with pytest.raises(SemalignError, match=r"4 at least, got shapes \(3, 2\) and \(3, 2\)"):
        linear_cka(normal(0, 3, 2), normal(1, 3, 2), debiased=True)
