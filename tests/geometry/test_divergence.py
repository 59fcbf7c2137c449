"""Laws of the output divergences: each against its dense counterpart, value and gradient."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from semalign_geometry import (
    Divergence,
    Head,
    TopEntries,
    _divergence,
    _logits,
    answer_nll,
    categorical_divergence,
    kl_divergence,
    quadratic_divergence,
    top_entries,
    top_k_divergence,
)
from semalign_geometry._divergence import head_statistics
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from .strategies import Outputs, dense_logits, normal, output_heads, outputs, seeds

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "jensen_shannon")
each_kind = pytest.mark.parametrize("kind", KINDS)
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def assert_same_gradient(mine: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Values and the gradients under random weights agree."""
    here, there = at.clone().requires_grad_(), at.clone().requires_grad_()
    value, expected = mine(here), dense(there)
    assert_close(value, expected, **TIGHT)
    weights = normal(7, *value.shape)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(here.grad, there.grad, rtol=1e-7, atol=1e-9)


def exact(case: Outputs) -> Callable[[Tensor], Tensor]:
    return lambda hidden: kl_divergence(
        case.source,
        case.source_head,
        hidden,
        case.target_head,
        temperature=case.temperature,
        chunk=case.chunk,
    )


def dense_kl(case: Outputs) -> Callable[[Tensor], Tensor]:
    def kl(hidden: Tensor) -> Tensor:
        log_p = F.log_softmax(case.logits()[0], dim=1)
        log_q = F.log_softmax(dense_logits(hidden, case.target_head) / case.temperature, dim=1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    return kl


def kept(case: Outputs, k: int) -> TopEntries:
    return top_entries(case.source, case.source_head, k, temperature=case.temperature, chunk=case.chunk)


def coarse(case: Outputs, top: TopEntries, kind: Divergence = "forward") -> Callable[[Tensor], Tensor]:
    return lambda hidden: top_k_divergence(
        top, hidden, case.target_head, temperature=case.temperature, kind=kind, chunk=case.chunk
    )


def even(case: Outputs) -> Outputs:
    """The case with a target that gives every entry some mass.

    The tail is one minus the mass of the kept entries: its relative rounding error is about eps / tail.
    """
    target = case.target / (1 + case.target.norm(dim=1, keepdim=True))
    case = replace(case, target=target, temperature=max(1.0, case.temperature))
    assume(float(F.log_softmax(case.logits()[1], dim=1).min()) > -12)
    return case


def dense_coarse(case: Outputs, ids: Tensor, kind: Divergence = "forward") -> Callable[[Tensor], Tensor]:
    """Divergence of the distributions coarsened to `ids` and all others, written out."""
    outside = torch.ones(len(ids), case.entries).scatter(1, ids, 0).bool()

    def coarsened(logits: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        if not outside.any():
            return log_p.gather(1, ids)
        tail = torch.where(outside, log_p, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([log_p.gather(1, ids), tail], 1)

    def divergence(hidden: Tensor) -> Tensor:
        log_p = coarsened(case.logits()[0])
        log_q = coarsened(dense_logits(hidden, case.target_head) / case.temperature)
        p, q = log_p.exp(), log_q.exp()
        log_m = ((p + q) / 2).log()
        return {
            "forward": p * (log_p - log_q),
            "reverse": q * (log_q - log_p),
            "jensen_shannon": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
        }[kind].sum(1)

    return divergence


@given(outputs())
def test_exact_divergence_is_the_dense_one(case: Outputs) -> None:
    assert_same_gradient(exact(case), dense_kl(case), case.target)


@given(outputs())
def test_exact_divergence_passes_gradcheck(case: Outputs) -> None:
    assert gradcheck(exact(case), (case.target.clone().requires_grad_(),), atol=1e-5, rtol=1e-4, fast_mode=True)


@given(outputs())
def test_exact_divergence_is_not_negative_and_zero_for_equal_logits(case: Outputs) -> None:
    assert (exact(case)(case.target) >= 0).all()
    same = kl_divergence(
        case.source,
        case.source_head,
        case.source,
        case.source_head,
        temperature=case.temperature,
        chunk=case.chunk,
    )
    assert_close(same, torch.zeros_like(same), **TIGHT)


@given(outputs(), st.floats(-50, 50))
def test_a_constant_on_all_logits_changes_nothing(case: Outputs, shift: float) -> None:
    head = Head(case.source_head.weight)
    bias = torch.full((case.entries,), shift, dtype=torch.float64)
    shifted = kl_divergence(case.source, head, case.source, Head(head.weight, bias), chunk=case.chunk)
    assert_close(shifted, torch.zeros_like(shifted), **TIGHT)


@given(outputs(), st.integers(1, 10), st.integers(1, 9), st.data())
def test_chunks_and_micro_batches_change_nothing(case: Outputs, chunk: int, k: int, data: st.DataObject) -> None:
    case = even(case)
    cut = data.draw(st.integers(0, len(case.target)))
    top = kept(case, k)

    def divergences(at: slice) -> tuple[Tensor, Tensor]:
        hidden = case.target[at].clone().requires_grad_()
        some = TopEntries(top.ids[at], top.log_probs[at], top.tail[at])
        values = torch.stack(
            [
                kl_divergence(
                    case.source[at],
                    case.source_head,
                    hidden,
                    case.target_head,
                    temperature=case.temperature,
                    chunk=chunk,
                ),
                top_k_divergence(some, hidden, case.target_head, temperature=case.temperature, chunk=chunk),
                quadratic_divergence(hidden, case.target[at] * 0.5, case.target_head, chunk=chunk),
            ]
        )
        values.sum().backward()
        assert hidden.grad is not None
        return values.detach(), hidden.grad

    whole = divergences(slice(None))
    first, second = divergences(slice(0, cut)), divergences(slice(cut, None))
    assert_close(torch.cat([first[0], second[0]], 1), whole[0], **TIGHT)
    assert_close(torch.cat([first[1], second[1]]), whole[1], rtol=1e-7, atol=1e-9)
    assert_close(whole[0][0], exact(case)(case.target), **TIGHT)


@given(outputs(), st.integers(1, 10))
def test_top_entries_are_a_dense_top_k(case: Outputs, k: int) -> None:
    top = kept(case, k)
    log_p = F.log_softmax(case.logits()[0], dim=1)
    k = min(k, case.entries)
    assert_close(top.log_probs, log_p.topk(k, dim=1).values, **TIGHT)
    assert_close(top.log_probs, log_p.gather(1, top.ids), **TIGHT)
    assert all(len(set(row)) == k for row in top.ids.tolist())
    masses = top.log_probs.exp().sum(1) + top.tail.exp()
    assert_close(masses, torch.ones_like(masses), **TIGHT)
    assert bool(torch.isinf(top.tail).all()) == (k == case.entries)


@given(st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 50), st.floats(1, 30))
def test_the_tail_is_exact_in_single_precision(seed: int, k: int, chunk: int, confidence: float) -> None:
    """Also where it is far below the rounding of the kept mass, which is 1 there."""
    hidden, weight = normal(seed, 4, 6), normal(seed + 1, 50, 6)
    hidden[:2] += confidence * weight[seed % 50] / weight[seed % 50].norm()
    top = top_entries(hidden.float(), Head(weight.float()), k, chunk=chunk)
    log_p = F.log_softmax(hidden @ weight.T, dim=1)
    assert_close(top.log_probs.double(), log_p.gather(1, top.ids), rtol=1e-5, atol=1e-4)
    assert_close(top.tail.double(), log_p.scatter(1, top.ids, -torch.inf).logsumexp(1), rtol=1e-5, atol=1e-4)


@each_kind
@given(outputs(), st.integers(1, 9))
def test_coarse_divergence_is_the_dense_one(kind: Divergence, case: Outputs, k: int) -> None:
    case = even(case)
    top = kept(case, k)
    assert_same_gradient(coarse(case, top, kind), dense_coarse(case, top.ids, kind), case.target)


@each_kind
@given(outputs())
def test_coarse_divergence_grows_with_k_up_to_the_exact_one(kind: Divergence, case: Outputs) -> None:
    case = even(case)
    # Prefixes of one order: among ties, top-k with another k may keep other entries, not nested ones.
    full = kept(case, case.entries)
    values = []
    for k in range(1, case.entries + 1):
        tail = full.log_probs[:, k:].logsumexp(1) if k < case.entries else full.tail
        values.append(coarse(case, TopEntries(full.ids[:, :k], full.log_probs[:, :k], tail), kind)(case.target))
    for coarser, finer in zip(values, values[1:], strict=False):
        assert (coarser <= finer + 1e-9).all()
    assert (values[0] >= 0).all()
    for k in range(1, case.entries):
        assert (coarse(case, kept(case, k), kind)(case.target) <= values[-1] + 1e-9).all()
    if kind == "forward":
        assert_close(values[-1], exact(case)(case.target), **TIGHT)


@given(seeds, seeds, st.integers(1, 5), st.integers(1, 9), st.floats(0.1, 30))
def test_cell_divergences_swap_their_sides(first: int, second: int, rows: int, cells: int, spread: float) -> None:
    p, q = (F.log_softmax(spread * normal(seed, rows, cells), dim=1) for seed in (first, second))
    assert_close(categorical_divergence(p, q, kind="reverse"), categorical_divergence(q, p))
    mixed = categorical_divergence(p, q, kind="jensen_shannon")
    assert_close(mixed, categorical_divergence(q, p, kind="jensen_shannon"))
    assert (mixed <= math.log(2) + 1e-9).all()
    for kind in KINDS:
        assert (categorical_divergence(p, q, kind=kind) >= 0).all()
        assert_close(categorical_divergence(p, p, kind=kind), torch.zeros(rows, dtype=p.dtype), **TIGHT)
        empty = torch.full((rows, 1), -torch.inf, dtype=p.dtype)  # a tail without entries
        assert_close(
            categorical_divergence(torch.cat([p, empty], 1), torch.cat([q, empty], 1), kind=kind),
            categorical_divergence(p, q, kind=kind),
        )


@given(outputs(), st.data())
def test_head_statistics_are_the_dense_ones(case: Outputs, data: st.DataObject) -> None:
    tokens, k = len(case.target), data.draw(st.integers(1, 3))
    k = min(k, case.entries)
    entry = st.lists(st.integers(0, case.entries - 1), min_size=k, max_size=k, unique=True)
    ids = torch.tensor(data.draw(st.lists(entry, min_size=tokens, max_size=tokens)))

    def mine(hidden: Tensor) -> Tensor:
        found = head_statistics(hidden, case.target_head, ids, temperature=case.temperature, chunk=case.chunk)
        return torch.cat([found.normaliser[:, None], found.selected], 1)

    def dense(hidden: Tensor) -> Tensor:
        logits = dense_logits(hidden, case.target_head) / case.temperature
        return torch.cat([logits.logsumexp(1, keepdim=True), logits.gather(1, ids)], 1)

    assert_same_gradient(mine, dense, case.target)
    assert gradcheck(mine, (case.target.clone().requires_grad_(),), atol=1e-5, rtol=1e-4, fast_mode=True)


@given(outputs(), st.data())
def test_answer_nll_is_cross_entropy(case: Outputs, data: st.DataObject) -> None:
    tokens = len(case.target)
    drawn = data.draw(st.lists(st.integers(0, case.entries - 1), min_size=tokens, max_size=tokens))
    labels = torch.tensor(drawn)
    assert_same_gradient(
        lambda hidden: answer_nll(hidden, case.target_head, labels, chunk=case.chunk),
        lambda hidden: F.cross_entropy(dense_logits(hidden, case.target_head), labels, reduction="none"),
        case.target,
    )


@given(output_heads(7, 3), seeds, st.integers(1, 8))
def test_quadratic_divergence_is_the_dense_one(head: Head, seed: int, chunk: int) -> None:
    target, reference = normal(seed, 3, 3), normal(seed + 1, 3, 3)

    def dense(hidden: Tensor) -> Tensor:
        p = (reference @ head.weight.T).softmax(1)
        u = (hidden - reference) @ head.weight.T
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nv,nvw,nw->n", u, fisher, u) / 2

    def mine(hidden: Tensor) -> Tensor:
        return quadratic_divergence(hidden, reference, head, chunk=chunk)

    assert_same_gradient(mine, dense, target)
    assert gradcheck(mine, (target.clone().requires_grad_(),), atol=1e-5, rtol=1e-4, fast_mode=True)
    assert (mine(target) >= 0).all()
    assert_close(mine(reference), torch.zeros(3, dtype=torch.float64), **TIGHT)


@given(seeds, st.floats(1e-3, 1e-1))
def test_quadratic_divergence_approximates_kl(seed: int, size: float) -> None:
    head, reference = Head(normal(seed, 7, 3)), normal(seed + 1, 4, 3)
    target = reference + size * normal(seed + 2, 4, 3)
    kl = kl_divergence(reference, head, target, head)
    quadratic = quadratic_divergence(target, reference, head)
    u = (target - reference) @ head.weight.T
    spread = u.amax(1) - u.amin(1)
    # The third derivative of log-sum-exp along u is at most its variance times its spread.
    assert ((kl - quadratic).abs() <= quadratic * spread * spread.exp() + 1e-12).all()


def test_quadratic_divergence_has_no_gradient_to_the_reference() -> None:
    reference = normal(0, 2, 3).requires_grad_()
    target = normal(1, 2, 3).requires_grad_()
    quadratic_divergence(target, reference, Head(normal(2, 5, 3))).sum().backward()
    assert reference.grad is None
    assert target.grad is not None


@given(seeds, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_narrow_heads_agree_with_float64_on_the_same_logits(seed: int, chunk: int, dtype: torch.dtype) -> None:
    source_head, target_head = (Head(normal(seed + i, 40, 4).to(dtype)) for i in (0, 1))
    source, target = normal(seed + 2, 3, 4).to(dtype), normal(seed + 3, 3, 4).to(dtype).requires_grad_()
    value = kl_divergence(source, source_head, target, target_head, chunk=chunk)
    s, t = source_head.logits(source).double(), target_head.logits(target).detach().double()
    expected = (s.softmax(1) * (s.log_softmax(1) - t.log_softmax(1))).sum(1)
    assert value.dtype == torch.float32
    assert_close(value, expected.float(), rtol=1e-4, atol=1e-5)
    value.sum().backward()
    assert target.grad is not None and target.grad.dtype == dtype
    gradient = (t.softmax(1) - s.softmax(1)) @ target_head.weight.double()
    slack = 1e-4 if dtype == torch.float32 else 0.1
    assert_close(target.grad.double(), gradient, rtol=slack, atol=slack)


@given(seeds, st.integers(1, 40))
def test_the_gradient_vanishes_with_the_divergence_in_bfloat16(seed: int, chunk: int) -> None:
    """Rounding is relative to the difference of the distributions, not to either of them."""
    head = Head(normal(seed, 40, 4).bfloat16())
    bias = (1e-3 * normal(seed + 1, 40)).float()
    hidden = normal(seed + 2, 3, 4).bfloat16()
    target = hidden.float().requires_grad_()
    kl_divergence(hidden, head, target, Head(head.weight, bias), chunk=chunk).sum().backward()
    s = head.logits(hidden).double()
    gradient = ((s + bias.double()).softmax(1) - s.softmax(1)) @ head.weight.double()
    assert target.grad is not None
    assert_close(target.grad.double(), gradient, rtol=0, atol=5e-5)


def test_autocast_leaves_the_gradient_alone() -> None:
    heads, states = [Head(normal(i, 40, 4).float()) for i in (0, 1)], [normal(i, 3, 4).float() for i in (2, 3)]

    def gradient(autocast: bool) -> Tensor:
        target = states[1].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values = kl_divergence(states[0], heads[0], target, heads[1], chunk=16)
            values = values + answer_nll(target, heads[1], torch.arange(3), chunk=16)
        values.sum().backward()
        assert target.grad is not None
        return target.grad

    assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("needed", [True, False])
def test_the_gradient_is_summed_only_if_it_is_needed(needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = _logits.weighted_rows
    monkeypatch.setattr(_logits, "weighted_rows", lambda *args: calls.append(1) or original(*args))
    head, hidden = Head(normal(0, 5, 3)), normal(1, 2, 3)
    target = hidden.clone().requires_grad_()
    with torch.set_grad_enabled(needed):
        kl_divergence(hidden, head, target, head)
        answer_nll(target, head, torch.arange(2))
    assert len(calls) == (3 if needed else 0)


def test_peaked_distributions_stay_finite() -> None:
    head = Head(torch.eye(4) * 1e4)
    target = torch.eye(4).roll(1, 0).requires_grad_()
    value = kl_divergence(torch.eye(4), head, target, head, chunk=3)
    coarse_value = top_k_divergence(top_entries(torch.eye(4), head, 2), target, head)
    (value + coarse_value).sum().backward()
    assert_close(value, torch.full((4,), 1e4), rtol=1e-5, atol=0)
    assert torch.isfinite(coarse_value).all()
    assert target.grad is not None and torch.isfinite(target.grad).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature: float) -> None:
    hidden, head = normal(0, 2, 3), Head(normal(1, 5, 3))
    with pytest.raises(SemalignError, match="expected more than 0"):
        kl_divergence(hidden, head, hidden, head, temperature=temperature)
    with pytest.raises(SemalignError, match="expected more than 0"):
        top_entries(hidden, head, 2, temperature=temperature)
    with pytest.raises(SemalignError, match="expected more than 0"):
        top_k_divergence(top_entries(hidden, head, 2), hidden, head, temperature=temperature)


def test_different_tokens_are_refused() -> None:
    # The functions' own annotations are checked here, and would be the first to complain.
    one, other, wide = torch.zeros(5, 3), torch.zeros(1, 3), torch.zeros(5, 4)
    for sides, widths in (((one, other), False), ((one, other), True), ((one, wide), True)):
        with pytest.raises(SemalignError, match="the two sides must have the same tokens"):
            _divergence._check_tokens(*sides, widths=widths)
    _divergence._check_tokens(one, wide)


def test_different_entry_counts_are_refused() -> None:
    hidden = normal(0, 2, 3)
    with pytest.raises(SemalignError, match="source head has 5 entries, the target head 6"):
        kl_divergence(hidden, Head(normal(1, 5, 3)), hidden, Head(normal(1, 6, 3)))
