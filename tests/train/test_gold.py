"""The laws of GOLD's loss, and its distance from TRL's formula."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import categorical_divergence
from semalign_geometry.base import SemalignError
from semalign_train import GoldLoss, JointConfig, JointTrainer, StepRecord
from semalign_train._gold import generalised_divergence, merged_log_probs, ranked_distance
from torch import Tensor
from torch.nn import functional as F

from ..align.chain import make_store, pair, target_model
from ..attribution.snapshot import snapshot, unsettle
from . import paired

seeds = st.integers(0, 2**32 - 1)
betas = st.sampled_from([0.0, 0.1, 0.5, 0.8, 1.0])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spans_of(seed: int, *, spans: int = 4, vocabulary: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Log-distributions of the tokens of some spans, the tokens, and the lengths of the spans."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (spans,), generator=generator)
    labels = torch.randint(vocabulary, (int(lengths.sum()),), generator=generator)
    return drawn(seed, len(labels), vocabulary).log_softmax(1), labels, lengths


@given(seed=seeds, last=st.booleans())
def test_a_span_of_one_token_keeps_its_distribution(seed: int, last: bool) -> None:
    log_probs, labels, _ = spans_of(seed)
    assert torch.equal(merged_log_probs(log_probs, labels, torch.ones_like(labels), last=last), log_probs)


@given(seed=seeds, last=st.booleans())
def test_the_merged_distribution_holds_the_likelihood_of_the_span(seed: int, last: bool) -> None:
    log_probs, labels, lengths = spans_of(seed)
    merged = merged_log_probs(log_probs, labels, lengths, last=last)
    ends = lengths.cumsum(0)
    for row, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
        places = range(int(start), int(end))
        kept = places[-1] if last else places[0]
        likelihood = sum(log_probs[place, labels[place]] for place in places)
        torch.testing.assert_close(merged[row, labels[kept]], likelihood)
        torch.testing.assert_close(merged[row] - merged[row].logsumexp(0), log_probs[kept])  # ratios stay


@given(seed=seeds, beta=betas, mass=st.floats(-3, 3))
def test_the_divergence_of_equal_rows_is_0_and_no_other_is_below(seed: int, beta: float, mass: float) -> None:
    log_p, log_q = drawn(seed, 3, 6).log_softmax(1) - 0.5, drawn(seed + 1, 3, 6).log_softmax(1) + mass - 4
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(generalised_divergence(log_p, log_p, beta=beta), zero, atol=1e-12, rtol=0)
    if 0 < beta < 1:  # of measures whose sums are not 1
        assert bool((generalised_divergence(log_p, log_q, beta=beta) >= -1e-12).all())
    swapped = generalised_divergence(log_q, log_p, beta=1 - beta)
    torch.testing.assert_close(generalised_divergence(log_p, log_q, beta=beta), swapped)


@given(seed=seeds)
def test_of_distributions_it_is_the_divergence_of_that_name(seed: int) -> None:
    log_p, log_q = (drawn(seed + i, 3, 6).log_softmax(1) for i in range(2))
    kinds: dict[float, Any] = {0.0: "forward", 0.5: "jensen_shannon", 1.0: "reverse"}
    for beta, kind in kinds.items():
        expected = categorical_divergence(log_p, log_q, kind=kind)
        torch.testing.assert_close(generalised_divergence(log_p, log_q, beta=beta), expected)


def test_a_probability_of_0_has_a_finite_divergence_and_gradient() -> None:
    log_p = torch.tensor([[0.0, -math.inf]])
    log_q = torch.tensor([[-math.inf, 0.0]], requires_grad=True)
    for beta in (0.0, 0.5, 1.0):
        generalised_divergence(log_p, log_q, beta=beta).sum().backward()
        assert log_q.grad is not None and bool(torch.isfinite(log_q.grad).all())


@given(seed=seeds, sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_ranks_are_matched_as_if_both_sides_were_sorted_and_filled_up(seed: int, sizes: tuple[int, int]) -> None:
    p, q = (drawn(seed + i, 3, size).exp() for i, size in enumerate(sizes))
    filled = [F.pad(each.sort(1, descending=True).values, (0, max(sizes) - each.shape[1])) for each in (p, q)]
    distance = ranked_distance(p, q)
    torch.testing.assert_close(distance, (filled[0] - filled[1]).abs().sum(1))
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ranked_distance(p, q[:, order]), distance)
    torch.testing.assert_close(ranked_distance(q, q[:, order]), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_side_without_other_entries_has_no_distance() -> None:
    q = torch.rand(3, 4, requires_grad=True)
    assert torch.equal(ranked_distance(torch.zeros(3, 0), q), torch.zeros(3))


@given(seed=seeds, beta=betas, last=st.booleans())
def test_gradients_are_finite_differences(seed: int, beta: float, last: bool) -> None:
    log_p, labels, lengths = spans_of(seed)
    hidden = drawn(seed + 1, *log_p.shape).requires_grad_()
    source = merged_log_probs(log_p, labels, lengths, last=last)

    def loss(hidden: Tensor) -> Tensor:
        merged = merged_log_probs(hidden.log_softmax(1), labels, lengths, last=last)
        equal = generalised_divergence(source[:, :3], merged[:, :3], beta=beta)
        return equal.sum() + ranked_distance(source[:, 3:].exp(), merged[:, 3:].exp()).sum()

    assert torch.autograd.gradcheck(loss, hidden, atol=1e-5)


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_target_that_is_its_own_source_has_no_loss(merge: Any, beta: float, tmp_path: Path) -> None:
    """With one tokenizer every token is a span."""
    target, records = target_model(), list[StepRecord]()
    own = pair((1, 2, 3, 4), source_depth=4)
    store = make_store(target_model(), target, tmp_path / "store", pairing=own)
    loss = GoldLoss(target_model(), merge=merge, beta=beta, weights=(1.0, 1.0), answer=1.0)
    JointTrainer(target, store, JointConfig(steps=1), loss=loss, callback=records.append).fit()
    losses = records[0].losses
    assert losses == pytest.approx({"matched": 0, "unmatched": 0, "answer": losses["answer"]}, abs=1e-5)
    assert losses["answer"] > 1


def test_the_weights_are_the_share_of_the_source_s_entries_that_are_equal(tmp_path: Path) -> None:
    store = paired.make_store(tmp_path / "store")
    step, entries = paired.step_of(store), len(set(paired.SOURCE) & set(paired.TARGET)) - 1
    plain = GoldLoss(paired.source_model(), weights=(1.0, 1.0)).terms(step)
    found = GoldLoss(paired.source_model()).terms(step)
    share = entries / paired.SOURCE_ROWS
    assert float(found["matched"].detach()) == pytest.approx(share * float(plain["matched"].detach()))
    assert float(found["unmatched"].detach()) == pytest.approx((1 - share) * float(plain["unmatched"].detach()))


def test_chunks_of_spans_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, found = paired.make_store(tmp_path / "store"), []
    for chunk in (1, 5, 1000):
        monkeypatch.setattr("semalign_train._gold.CHUNK", chunk)
        step = paired.step_of(store, trains=True)
        head: Any = step.view.model.get_output_embeddings()
        torch.stack(list(GoldLoss(paired.source_model(), answer=0.5).terms(step).values())).sum().backward()
        found.append(head.weight.grad)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_the_source_is_left_as_it_was_and_beta_is_a_share(tmp_path: Path) -> None:
    source = paired.source_model()
    unsettle(source)
    before = snapshot(source)
    GoldLoss(source).terms(paired.step_of(paired.make_store(tmp_path / "store")))
    assert snapshot(source) == before
    with pytest.raises(SemalignError, match="^beta is 1.5, expected 0 to 1$"):
        GoldLoss(source, beta=1.5)
