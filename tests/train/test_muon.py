"""Muon in float32 against torch's, and the laws of its orthogonalisation."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_train._muon import Muon, orthogonalised
from torch import Tensor, nn

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 12)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, sides, sides, st.floats(1e-2, 1e2))
def test_rotations_pass_through_and_scale_does_not(seed: int, rows: int, columns: int, scale: float) -> None:
    x = normal(seed, 2, rows, columns)
    left, right = (torch.linalg.qr(normal(seed + 1 + n, n, n)).Q for n in (rows, columns))
    torch.testing.assert_close(
        orthogonalised(scale * left @ x @ right), left @ orthogonalised(x) @ right, rtol=1e-6, atol=1e-6
    )


@given(seeds, st.integers(2, 12), st.integers(2, 12))
def test_singular_values_come_close_to_one_and_vectors_stay(seed: int, rows: int, columns: int) -> None:
    small = min(rows, columns)
    left, right = (torch.linalg.qr(normal(seed + place, n, small)).Q for place, n in enumerate((rows, columns)))
    values = torch.linspace(0.2, 1, small, dtype=torch.float64)
    result = orthogonalised(((left * values) @ right.T)[None])[0]
    inner = left.T @ result @ right
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-8)
    assert 0.6 < float(inner.diagonal().min()) and float(inner.diagonal().max()) < 1.3


def test_matrices_move_alike_together_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for together in (1, 100, 10_000):
        monkeypatch.setattr("semalign_train._muon.TOGETHER", together)
        parameters = [nn.Parameter(normal(seed, 6, 8)) for seed in range(5)]
        muon = Muon(parameters, weight_decay=0.01)
        for number, parameter in enumerate(parameters):
            parameter.grad = normal(10 + number, 6, 8)
        muon.param_groups[0]["lr"] = 0.02
        muon.step()
        moved.append(torch.stack(list(parameters)))
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0], moved[2])


@pytest.mark.filterwarnings("ignore:.*TF32.*")
def test_it_moves_as_torch_does_up_to_bfloat16() -> None:
    ours = [nn.Parameter(normal(seed, *shape).float()) for seed, shape in enumerate([(8, 8), (6, 12), (12, 6), (8, 8)])]
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    steppers = (
        Muon(ours, weight_decay=0.01),
        torch.optim.Muon(theirs, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        for parameters, optimiser in zip((ours, theirs), steppers, strict=True):
            for number, parameter in enumerate(parameters):
                parameter.grad = normal(10 * step + number, *parameter.shape).float()
            optimiser.param_groups[0]["lr"] = 0.02
            optimiser.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = float((other - before).detach().norm())
        assert float((mine - other).detach().norm()) < 0.05 * moved, "bfloat16 has three digits"
        assert moved > 0.01
