"""Heads and vectors on a device: what is computed there is what the CPU computes."""

from collections.abc import Callable

import pytest
import torch
from semalign_geometry import (
    ClassHead,
    Head,
    PairedResiduals,
    SemanticBasis,
    answer_nll,
    decompose,
    fit_transport,
    kl_divergence,
    linear_cka,
    measure_fidelity,
    quadratic_divergence,
    recompose,
    relation_distance,
    span_divergence,
    top_entries,
    top_k_divergence,
)
from torch import Tensor
from torch.testing import assert_close

from ..devices import DEVICE, elsewhere, usable
from .strategies import from_svd, normal

EXACT = 1e3
"""Condition number of a head whose float32 products are exact enough; above it they are float64."""
each_condition = pytest.mark.parametrize("condition", [10.0, 10 * EXACT], ids=["float32", "float64"])


def test_the_device_without_float64_behaves_as_one() -> None:
    with usable("mps") as device:
        x = normal(0, 3, 2).to(device, torch.float32)
        assert x.device == (2 * x).device == torch.zeros(2, device=device).device == DEVICE
        assert x.cpu().device == torch.device("cpu")
        assert_close((x @ x.T).cpu(), x.cpu() @ x.cpu().T)
        for convert in (Tensor.double, lambda value: value.to("cpu", torch.float64)):
            with pytest.raises(TypeError, match="no float64"):
                convert(x)
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(2, device=device, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="tensors of the CPU and of mps"):
            x + torch.zeros(3, 2)
        with pytest.raises(RuntimeError, match="tensors of the CPU and of mps"):
            torch.zeros(3, 2)[x[:, 0] > 0]


def head_of(seed: int, width: int, condition: float, device: torch.device) -> Tensor:
    return from_svd(seed, 40, width, condition).float().to(device)


def basis_of(seed: int, width: int, condition: float, device: torch.device) -> SemanticBasis:
    gain = torch.linspace(0.5, 2.0, width).to(device)
    weight = head_of(seed, width, condition, device)
    return SemanticBasis.from_head(weight, gain=gain, entries=torch.arange(2, 40), chunk=16)


@elsewhere
@each_condition
@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
def test_bases(name: str, condition: float, fold: bool) -> None:
    expected = basis_of(0, 4, condition, torch.device("cpu"))
    assert expected.manifest.products == ("float32" if condition < EXACT else "float64")
    with usable(name) as device:
        basis = basis_of(0, 4, condition, device)
        assert basis.manifest.condition == pytest.approx(expected.manifest.condition, rel=1e-2)
        assert basis.manifest == expected.manifest.model_copy(update={"condition": basis.manifest.condition})
        assert basis.weight.device.type == device.type
        for power in (0.0, 0.5, 1.0):
            mine, theirs = (b.gram_power(power, fold_gain=fold) for b in (basis, expected))
            assert mine.dtype == torch.float64
            assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.norm()))
        mine, theirs = (torch.cat(list(b.columns(fold_gain=fold)), 1) for b in (basis, expected))
        assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.norm()))


@elsewhere
@each_condition
@pytest.mark.parametrize("frame", ["cosine", "dual", "parseval"])
def test_frames_and_transports(name: str, condition: float, frame: str) -> None:
    cpu = torch.device("cpu")
    vectors = normal(2, 5, 4).float()

    def results(device: torch.device) -> list[Tensor]:
        source, target = basis_of(0, 4, condition, device), basis_of(1, 3, 10.0, device)
        transport = fit_transport(source, target, frame=frame, fold_gain=True, chunk=16)
        residual = vectors.to(device)
        coefficients = decompose(source, residual, frame=frame, fold_gain=True)
        recomposed = recompose(target, coefficients, frame=frame, fold_gain=True)
        assert transport.matrix.dtype == torch.float32
        moved = transport(residual)
        has_float64 = device.type != "mps" or source.dtype == torch.float32
        assert moved.device.type == device.type
        assert {each.device.type for each in (coefficients, recomposed)} == {device.type if has_float64 else "cpu"}
        assert coefficients.dtype == recomposed.dtype == source.dtype
        return [tensor.cpu() for tensor in (transport.matrix, moved, coefficients, recomposed)]

    expected = results(cpu)
    with usable(name) as device:
        for mine, theirs in zip(results(device), expected, strict=True):
            assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.norm()))


@elsewhere
@pytest.mark.parametrize("widths", ["one basis in float64", "the other in float64"])
def test_transports_of_one_head_in_float64(name: str, widths: str) -> None:
    conditions = [10.0, 10 * EXACT]
    if widths.startswith("one"):
        conditions.reverse()
    expected = fit_transport(*(basis_of(i, 4, c, torch.device("cpu")) for i, c in enumerate(conditions))).matrix
    with usable(name) as device:
        matrix = fit_transport(*(basis_of(i, 4, c, device) for i, c in enumerate(conditions))).matrix.cpu()
        assert_close(matrix, expected, rtol=1e-3, atol=1e-4)


@elsewhere
@pytest.mark.parametrize("route", ["token", "feature"])
def test_relations(name: str, route: str) -> None:
    x, y = normal(0, 2, 5, 3).float(), normal(1, 2, 5, 4).float()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])

    def results(device: torch.device) -> list[Tensor]:
        moved = x.clone().to(device).requires_grad_()
        for use in (mask.to(device), None):
            relation_distance(moved, y.to(device), mask=use, route=route).backward()
        assert moved.grad is not None
        return [moved.grad.cpu(), linear_cka(x[0].to(device), y[0].to(device)).cpu()]

    expected = results(torch.device("cpu"))
    with usable(name) as device:
        for mine, theirs in zip(results(device), expected, strict=True):
            assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def in_classes(head: Head) -> ClassHead:
    return ClassHead.of(head, torch.arange(head.count) % 7, 7)


Divergence = Callable[[Tensor, Head, Tensor, Head], Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "exact": lambda s, source, t, target: kl_divergence(s, source, t, target, temperature=2.0, chunk=16),
    "coarse": lambda s, source, t, target: top_k_divergence(top_entries(s, source, 5, chunk=16), t, target, chunk=16),
    "classes": lambda s, source, t, target: kl_divergence(s, in_classes(source), t, in_classes(target), chunk=16),
    "coarse classes": lambda s, source, t, target: top_k_divergence(
        top_entries(s, in_classes(source), 5, chunk=16), t, in_classes(target), chunk=16
    ),
    "spans": lambda s, source, t, target: span_divergence(-s.square().sum(1), -t.square().sum(1)),
    "quadratic": lambda s, source, t, target: quadratic_divergence(t, s, target, chunk=16),
    "answer": lambda s, source, t, target: answer_nll(t, target, torch.arange(6, device=t.device), chunk=16),
}


@elsewhere
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences(name: str, kind: str) -> None:
    def results(device: torch.device) -> list[Tensor]:
        heads = [
            Head(normal(seed, 40, 4).float().to(device), bias=normal(9, 40).float().to(device), scale=0.5, softcap=20.0)
            for seed in (0, 1)
        ]
        source, target = (normal(seed, 6, 4).float().to(device) for seed in (2, 3))
        target.requires_grad_()
        value = DIVERGENCES[kind](source, heads[0], target, heads[1])
        value.sum().backward()
        assert target.grad is not None
        return [value.detach().cpu(), target.grad.cpu()]

    expected = results(torch.device("cpu"))
    with usable(name) as device:
        for mine, theirs in zip(results(device), expected, strict=True):
            assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@elsewhere
def test_fidelity_and_selected_heads(name: str) -> None:
    with usable(name) as device:
        source, target = basis_of(0, 4, 10.0, device), basis_of(1, 3, 10.0, device)
        pair = PairedResiduals(1, 2, normal(2, 6, 3).float().to(device), normal(3, 6, 4).float().to(device))
        transport, within = fit_transport(source, target), fit_transport(source, source)
        (layer,) = measure_fidelity([pair], transport=transport, within_source=within).layers
        assert layer.recomposition_cosine == pytest.approx(1, abs=1e-3)
        head = Head(head_of(0, 4, 10.0, device), bias=torch.zeros(40, device=device))
        assert head.select(torch.tensor([3, 1])).weight.device.type == device.type
