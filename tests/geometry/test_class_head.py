"""Laws of heads over classes: each divergence against its dense counterpart, value and gradient."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import (
    ClassHead,
    Divergence,
    Head,
    categorical_divergence,
    kl_divergence,
    top_entries,
    top_k_divergence,
)
from semalign_geometry._divergence import head_statistics
from semalign_geometry._logits import chunks
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from .strategies import dense_logits, normal, output_heads, seeds
from .test_divergence import TIGHT, assert_same_gradient


@dataclass(frozen=True)
class Side:
    """Hidden states of a model, its head, and the class of each row of the head."""

    hidden: Tensor
    head: Head
    classes: Tensor
    count: int

    @property
    def class_head(self) -> ClassHead:
        return ClassHead.of(self.head, self.classes, self.count)

    def log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of the classes, written out."""
        logits = dense_logits(hidden, self.head) / temperature
        sums = [logits[:, self.classes == c].logsumexp(1) for c in range(self.count)]
        return torch.stack(sums, 1).log_softmax(1)


@dataclass(frozen=True)
class Case:
    """Both sides over the same classes, and every setting."""

    source: Side
    target: Side
    temperature: float
    chunk: int

    def kl(self, hidden: Tensor) -> Tensor:
        return kl_divergence(
            self.source.hidden,
            self.source.class_head,
            hidden,
            self.target.class_head,
            temperature=self.temperature,
            chunk=self.chunk,
        )

    def dense_kl(self, hidden: Tensor) -> Tensor:
        p = self.source.log_probs(self.source.hidden, self.temperature)
        return (p.exp() * (p - self.target.log_probs(hidden, self.temperature))).sum(1)


@st.composite
def assignments(draw: st.DrawFn, rows: int, count: int) -> Tensor:
    """Class of each row: each class has a member, and some rows are in none."""
    others = draw(st.lists(st.integers(-1, count - 1), min_size=rows - count, max_size=rows - count))
    return torch.tensor(draw(st.permutations([*range(count), *others])))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 4))

    def side() -> Side:
        rows, width = count + draw(st.integers(0, 8)), draw(st.integers(1, 4))
        head, classes = draw(output_heads(rows, width)), draw(assignments(rows, count))
        return Side(normal(draw(seeds), tokens, width), head, classes, count)

    return Case(side(), side(), draw(st.sampled_from([1.0, 0.5, 3.0])), draw(st.integers(1, 16)))


@given(cases())
def test_class_divergence_is_the_dense_one(case: Case) -> None:
    assert_same_gradient(case.kl, case.dense_kl, case.target.hidden)
    assert gradcheck(case.kl, (case.target.hidden.clone().requires_grad_(),), atol=1e-5, rtol=1e-4, fast_mode=True)


@given(cases())
def test_class_divergence_is_not_negative_and_zero_for_equal_distributions(case: Case) -> None:
    assert (case.kl(case.target.hidden) >= 0).all()
    side = case.source
    again = torch.cat([torch.arange(side.count), torch.full((len(side.classes),), -1)])
    mass = side.log_probs(side.hidden, case.temperature)
    one = Head(torch.cat([torch.eye(side.count), torch.zeros(len(side.classes), side.count)]).double())
    found = kl_divergence(
        side.hidden,
        side.class_head,
        case.temperature * mass,
        ClassHead.of(one, again, side.count),
        temperature=case.temperature,
        chunk=case.chunk,
    )
    assert_close(found, torch.zeros_like(found), **TIGHT)


@given(cases(), st.data())
def test_coarser_classes_are_never_further_apart(case: Case, data: st.DataObject) -> None:
    """Data processing; the finest classes are the entries, with the exact divergence."""
    head, other = case.target.head, data.draw(output_heads(case.target.head.count, 3))
    hidden = normal(data.draw(seeds), len(case.target.hidden), 3)
    every = torch.arange(head.count)
    values = [kl_divergence(hidden, other, case.target.hidden, head, temperature=case.temperature)]
    counts = [head.count]
    for classes in (every, case.target.classes.clamp_min(0), torch.zeros_like(every)):
        counts.append(int(classes.max()) + 1)
        heads = [ClassHead.of(each, classes, counts[-1]) for each in (other, head)]
        values.append(
            kl_divergence(
                hidden, heads[0], case.target.hidden, heads[1], temperature=case.temperature, chunk=case.chunk
            )
        )
    assert_close(values[0], values[1], **TIGHT)
    for finer, coarser in zip(values, values[1:], strict=False):
        assert (coarser <= finer + 1e-9).all()


@given(cases(), st.integers(1, 20))
def test_chunks_change_nothing(case: Case, chunk: int) -> None:
    source, target = case.source.class_head, case.target.class_head
    kept = top_entries(case.source.hidden, source, 2)  # once: among ties, another chunk may keep others

    def results(chunk: int) -> list[Tensor]:
        hidden = case.target.hidden.clone().requires_grad_()
        top = top_entries(case.source.hidden, source, 2, chunk=chunk)
        value = kl_divergence(case.source.hidden, source, hidden, target, chunk=chunk)
        value = torch.stack([value, top_k_divergence(kept, hidden, target, chunk=chunk)])
        value.sum().backward()
        assert hidden.grad is not None
        return [value.detach(), hidden.grad, top.log_probs, top.tail]

    for mine, other in zip(results(chunk), results(case.chunk), strict=True):
        assert_close(mine, other, rtol=1e-7, atol=1e-9)


@given(cases())
def test_chunks_cover_the_classes_and_keep_to_their_size(case: Case) -> None:
    heads = (case.source.class_head, case.target.class_head)
    slices = chunks(case.chunk, *heads)
    assert [c for rows in slices for c in range(rows.start, rows.stop)] == list(range(case.source.count))
    for rows in slices:
        most = max(len(head.members(rows)[0]) for head in heads)
        assert most <= case.chunk or rows.stop == rows.start + 1


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
@given(cases(), st.integers(1, 8))
def test_top_classes_and_their_divergence_are_the_dense_ones(kind: Divergence, case: Case, k: int) -> None:
    source, target = case.source, case.target
    top = top_entries(source.hidden, source.class_head, k, temperature=case.temperature, chunk=case.chunk)
    log_p = source.log_probs(source.hidden, case.temperature)
    assert_close(top.log_probs, log_p.topk(min(k, source.count), 1).values, **TIGHT)
    assert_close(top.log_probs, log_p.gather(1, top.ids), **TIGHT)
    outside = torch.ones_like(log_p).scatter(1, top.ids, 0).bool()
    assert_close(top.tail, torch.where(outside, log_p, -torch.inf).logsumexp(1), **TIGHT)

    def mine(hidden: Tensor) -> Tensor:
        return top_k_divergence(
            top, hidden, target.class_head, temperature=case.temperature, kind=kind, chunk=case.chunk
        )

    def dense(hidden: Tensor) -> Tensor:
        log_q = target.log_probs(hidden, case.temperature)
        cells_q, cells_p = log_q.gather(1, top.ids), top.log_probs
        if outside.any():
            tail = torch.where(outside, log_q, -torch.inf).logsumexp(1, keepdim=True)
            cells_q, cells_p = torch.cat([cells_q, tail], 1), torch.cat([cells_p, top.tail[:, None]], 1)
        return categorical_divergence(cells_p, cells_q, kind=kind)

    assert_same_gradient(mine, dense, target.hidden)


@given(cases(), st.data())
def test_head_statistics_of_classes_are_the_dense_ones(case: Case, data: st.DataObject) -> None:
    side, tokens = case.target, len(case.target.hidden)
    row = st.lists(st.integers(0, side.count - 1), min_size=1, max_size=1)
    ids = torch.tensor(data.draw(st.lists(row, min_size=tokens, max_size=tokens)))

    def mine(hidden: Tensor) -> Tensor:
        found = head_statistics(hidden, side.class_head, ids, temperature=case.temperature, chunk=case.chunk)
        return found.selected[:, 0] - found.normaliser

    assert_same_gradient(
        mine, lambda hidden: side.log_probs(hidden, case.temperature).gather(1, ids)[:, 0], side.hidden
    )


@given(cases())
def test_dense_log_probabilities_are_differentiable_in_hidden_states_and_weights(case: Case) -> None:
    side = case.target
    every = Side(side.hidden, side.head, torch.arange(side.head.count), side.head.count)

    def of_classes(hidden: Tensor, weight: Tensor) -> Tensor:
        head = ClassHead.of(replace(side.head, weight=weight), side.classes, side.count)
        return head.log_probs(hidden, temperature=case.temperature)

    def of_entries(hidden: Tensor, weight: Tensor) -> Tensor:
        return replace(side.head, weight=weight).log_probs(hidden, temperature=case.temperature)

    given = (side.hidden.clone().requires_grad_(), side.head.weight.clone().requires_grad_())
    for log_probs, expected in ((of_classes, side), (of_entries, every)):
        assert_close(log_probs(*given), expected.log_probs(side.hidden, case.temperature), **TIGHT)
        assert gradcheck(log_probs, given, atol=1e-5, rtol=1e-4, fast_mode=True)


@given(output_heads(6, 3), seeds, st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_with_one_entry_in_each_class_it_is_the_selected_head(head: Head, seed: int, ids: list[int]) -> None:
    hidden, chosen = normal(seed, 2, 3), torch.tensor(ids)
    classes = torch.full((6,), -1).scatter(0, chosen, torch.arange(len(ids)))
    mine, selected = ClassHead.of(head, classes, len(ids)), head.select(chosen)
    assert mine.count == selected.count
    assert_close(mine.log_probs(hidden), selected.log_probs(hidden), **TIGHT)
    top, expected = (top_entries(hidden, each, 3) for each in (mine, selected))
    assert_close(top.log_probs, expected.log_probs, **TIGHT)


@given(seeds, st.floats(20, 400))
def test_a_class_far_below_the_others_keeps_its_digits(seed: int, gap: float) -> None:
    """Each class is summed against its own largest member: the smallest class does not vanish in float32."""
    bias = (normal(seed, 6) - gap * torch.tensor([0, 0, 0, 0, 1, 1])).float()
    head = Head(torch.zeros(6, 2), bias)
    classes = ClassHead.of(head, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    expected = bias.double().unflatten(0, (3, 2)).logsumexp(1).log_softmax(0)
    top = top_entries(torch.zeros(1, 2), classes, 3)
    assert_close(top.log_probs[0].double(), expected[top.ids[0]], rtol=1e-6, atol=1e-5)


def test_entries_of_probability_zero_are_members_like_others() -> None:
    bias = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf, -torch.inf])
    head = ClassHead.of(Head(torch.ones(5, 2), bias), torch.tensor([0, 0, 1, 2, 2]), 3)
    hidden = torch.zeros(1, 2, requires_grad=True)
    top = top_entries(hidden, head, 3)
    assert top.ids[0].tolist() == [1, 0, 2] and top.log_probs[0, 2] == -torch.inf
    kl_divergence(hidden.detach(), head, hidden, head)
    top_k_divergence(top_entries(hidden, head, 1), hidden, head).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("classes", "count", "words"),
    [
        ([0, 1, 0, 0], 2, "row 3 is in a class, the head has 3 rows"),
        ([0, 1, 2], 2, "classes run from 0 to 2, expected −1 to 1"),
        ([0, -2, 1], 2, "classes run from -2 to 1"),
        ([0, 2, -1], 3, "class 1 has no member"),
    ],
)
def test_classes_that_do_not_fit_are_refused(classes: list[int], count: int, words: str) -> None:
    with pytest.raises(SemalignError, match=words):
        ClassHead.of(Head(torch.zeros(3, 2)), torch.tensor(classes), count)


def test_rows_beyond_the_head_may_be_in_no_class() -> None:
    head = ClassHead.of(Head(torch.zeros(3, 2)), torch.tensor([1, 0, 1, -1, -1]), 2)
    assert_close(head.log_probs(torch.zeros(1, 2)).exp(), torch.tensor([[1 / 3, 2 / 3]]))
    assert ClassHead.of(Head(torch.zeros(3, 2)), torch.tensor([1, 0]), 2).count == 2
