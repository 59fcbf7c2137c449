"""Parameters move as torch's own optimisers move them, and go on from a kept state as if nothing had happened."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry.base import SemalignError
from semalign_train import FrontierConfig, Optimiser
from semalign_train._muon import Muon
from torch import Tensor, nn

seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple), min_size=1, max_size=5)
rates = st.floats(1e-4, 1e-1)


def normal(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(seed: int, shapes: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    return [nn.Parameter(normal(seed + place, shape)) for place, shape in enumerate(shapes)]


def config(optimiser: str, **more: Any) -> FrontierConfig:
    return FrontierConfig(optimiser=optimiser, **more)


def move(optimiser: Optimiser, moved: Sequence[nn.Parameter], seed: int, rate: float, steps: int = 3) -> None:
    for step in range(steps):
        for place, parameter in enumerate(moved):
            parameter.grad = normal(seed + 100 * step + place, parameter.shape)
        optimiser.step(rate)


@given(seeds, shapes, rates, st.floats(0, 0.1))
def test_adamw_is_that_of_torch(seed: int, shapes: list[Any], rate: float, decay: float) -> None:
    ours = parameters(seed, shapes)
    theirs = copy.deepcopy(ours)
    move(Optimiser(ours, config("adamw", weight_decay=decay)), ours, seed, rate)
    reference = torch.optim.AdamW(theirs, lr=rate, betas=FrontierConfig().betas, weight_decay=decay)
    for step in range(3):
        for place, parameter in enumerate(theirs):
            parameter.grad = normal(seed + 100 * step + place, parameter.shape)
        reference.step()
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@given(seeds, shapes, rates)
def test_muon_moves_matrices_only_and_leaves_the_rest_to_adamw(seed: int, shapes: list[Any], rate: float) -> None:
    ours = parameters(seed, shapes)
    start, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    move(Optimiser(ours, config("muon")), ours, seed, rate)
    move(Optimiser(theirs, config("adamw")), theirs, seed, rate)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        if mine.ndim == 1:
            assert torch.equal(mine, other)
        else:
            assert not torch.equal(mine, before)


@given(seeds, shapes, st.data())
def test_muon_moves_no_other_matrices_than_it_may(seed: int, shapes: list[Any], data: st.DataObject) -> None:
    ours, theirs = parameters(seed, shapes), parameters(seed, shapes)
    chosen = data.draw(st.sets(st.integers(0, len(shapes) - 1)))
    move(Optimiser(ours, config("muon"), matrices=[ours[place] for place in chosen]), ours, seed, 0.01)
    move(Optimiser(theirs, config("adamw")), theirs, seed, 0.01)
    for place in set(range(len(shapes))) - chosen:
        assert torch.equal(ours[place], theirs[place])


@pytest.mark.filterwarnings("ignore:.*TF32.*")
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_muon_moves_as_far_as_torch_matched_to_adamw(products: torch.dtype | None) -> None:
    ours = parameters(0, [(8, 8), (6, 24), (24, 6)])
    start, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    move(Optimiser(ours, config("muon", weight_decay=0.01), products=products), ours, 7, 0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for place, parameter in enumerate(theirs):
            parameter.grad = normal(7 + 100 * step + place, parameter.shape)
        reference.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = float((other - before).detach().norm())
        assert float((mine - other).detach().norm()) < 0.05 * moved, "bfloat16 has three digits"
        assert moved > 0.01


@given(seeds, st.integers(2, 12), st.integers(2, 12), rates)
def test_a_step_of_muon_is_about_as_long_as_one_of_adamw(seed: int, rows: int, columns: int, rate: float) -> None:
    small = min(rows, columns)
    left, right = (torch.linalg.qr(normal(seed + n, (n, small))).Q for n in (rows, columns))
    moved = nn.Parameter(torch.zeros(rows, columns))
    moved.grad = (left * torch.linspace(0.2, 1, small)) @ right.T
    Optimiser([moved], config("muon")).step(rate)
    length = float(moved.detach().square().mean().sqrt())
    assert 0.6 * 0.2 * rate < length < 1.3 * 0.2 * rate


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_muon_stays_where_there_is_no_gradient(products: torch.dtype | None) -> None:
    moved = parameters(0, [(4, 6)])
    before = moved[0].detach().clone()
    moved[0].grad = torch.zeros(4, 6)
    Optimiser(moved, config("muon"), products=products).step(0.1)
    assert torch.equal(moved[0], before)


@given(seeds, shapes, rates, st.sampled_from(["adamw", "muon"]))
def test_a_kept_state_goes_on_to_the_same_bits(seed: int, shapes: list[Any], rate: float, kind: str) -> None:
    whole = parameters(seed, shapes)
    first = Optimiser(whole, config(kind))
    move(first, whole, seed, rate)
    kept = {name: value.clone() for name, value in first.tensors().items()}
    move(first, whole, seed + 1, rate)
    resumed = parameters(seed + 50, shapes)
    second = Optimiser(resumed, config(kind))
    second.load(kept)
    move(second, resumed, seed + 1, rate)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))


@given(seeds, shapes, rates, st.sampled_from(["adamw", "muon"]))
def test_an_iterator_is_taken_for_what_it_yields(seed: int, shapes: list[Any], rate: float, kind: str) -> None:
    ours, theirs = parameters(seed, shapes), parameters(seed, shapes)
    move(Optimiser(iter(ours), config(kind)), ours, seed, rate)
    move(Optimiser(theirs, config(kind)), theirs, seed, rate)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not any(torch.equal(one, start) for one, start in zip(ours, parameters(seed, shapes), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_has_no_gradient_stays(kind: str) -> None:
    used, unused = parameters(0, [(4, 3), (4, 3)])
    before = unused.detach().clone()
    used.grad = torch.ones_like(used)
    Optimiser([used, unused], config(kind, weight_decay=0.1)).step(0.1)
    assert torch.equal(unused, before) and not torch.equal(used, parameters(0, [(4, 3)])[0])


def test_parameters_that_cannot_be_moved_are_refused() -> None:
    with pytest.raises(SemalignError, match="there are no parameters to train"):
        Optimiser(iter([]), config("adamw"))
    with pytest.raises(SemalignError, match=r"Muon moves matrices, got a parameter of shape \(5,\)"):
        Muon(parameters(0, [(2, 3), (5,)]), weight_decay=0.0)


@given(seeds, shapes, st.sampled_from(["adamw", "muon"]))
def test_gradients_are_dropped(seed: int, shapes: list[Any], kind: str) -> None:
    moved = parameters(seed, shapes)
    optimiser = Optimiser(moved, config(kind))
    move(optimiser, moved, seed, 1e-3, steps=1)
    optimiser.zero_grad()
    assert all(parameter.grad is None for parameter in moved)
