"""The objectives: sums over micro-batches, defined zeros, and agreement with other implementations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import (
    AnswerNLL,
    Cosine,
    FinalStates,
    Fisher,
    LabelCosine,
    Objective,
    OutputKL,
    Relation,
    Step,
    Supervision,
    position_mask,
    supervise,
)
from semalign_attribution import view_of
from semalign_geometry import Divergence, Head, TopEntries, Transport, categorical_divergence, relation_distance
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..models import collate
from .chain import EXACT, EXAMPLES, SOURCE_DEPTH, SOURCE_WIDTH, TOP, make_store, pair, source_model, target_model

WIDTH, ENTRIES = 6, 11

ON_LAYER: dict[str, Objective] = {
    "relation": Relation(),
    "cosine": Cosine(),
    "fisher": Fisher(),
}
OBJECTIVES: dict[str, Objective] = ON_LAYER | {"output": OutputKL(), "answer": AnswerNLL(), "label": LabelCosine()}

each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
seeds = st.integers(0, 10_000)
counts_of = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def random_step(seed: int, counts: list[int], *, final: bool = True, reference_width: int = WIDTH) -> Step:
    """A step in float64 with these numbers of supervised tokens; padding holds junk."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total, longest = sum(counts), max(counts)
    head = Head(normal(ENTRIES + 4, WIDTH))
    if final:
        output: Any = FinalStates(normal(total, 4), Head(normal(ENTRIES, 4)))
    else:
        best = normal(total, ENTRIES).log_softmax(1).topk(3, dim=1)
        output = TopEntries(best.indices, best.values, torch.log1p(-best.values.exp().sum(1)))
    return Step(
        residual=normal(len(counts), longest, WIDTH),
        reference=normal(len(counts), longest, reference_width),
        mask=position_mask(torch.tensor(counts)),
        hidden=normal(total, WIDTH),
        labels=torch.randint(ENTRIES + 4, (total,), generator=generator),
        output=output,
        head=head,
        shared_head=head.select(torch.arange(2, ENTRIES + 2)),
        temperature=1.5,
    )


def part_of(step: Step, start: int, end: int) -> Step:
    """Examples start … end − 1 of a step, padded anew."""
    counts = step.mask.sum(1)
    longest = int(counts[start:end].max())
    first, last = int(counts[:start].sum()), int(counts[:end].sum())
    rows = slice(first, last)
    if isinstance(step.output, FinalStates):
        output: Any = FinalStates(step.output.hidden[rows], step.output.head)
    else:
        output = TopEntries(step.output.ids[rows], step.output.log_probs[rows], step.output.tail[rows])
    assert step.hidden is not None
    return replace(
        step,
        residual=step.residual[start:end, :longest],
        reference=step.reference[start:end, :longest],
        mask=step.mask[start:end, :longest],
        hidden=step.hidden[rows],
        labels=step.labels[rows],
        output=output,
    )


@each_objective
@settings(max_examples=20)
@given(seeds, counts_of, st.booleans(), st.data())
def test_totals_over_any_split_add_up(
    objective: Objective, seed: int, counts: list[int], final: bool, data: st.DataObject
) -> None:
    step = random_step(seed, counts, final=final)
    whole, units = objective.total(step), objective.count(torch.tensor(counts))
    total, added, start = torch.zeros((), dtype=torch.float64), 0, 0
    while start < len(counts):
        end = data.draw(st.integers(start + 1, len(counts)))
        total = total + objective.total(part_of(step, start, end))
        added += objective.count(torch.tensor(counts[start:end]))
        start = end
    assert added == units
    torch.testing.assert_close(total, whole)


@each_objective
@given(seeds, counts_of, st.booleans())
def test_values_are_not_negative_and_gradients_finite(
    objective: Objective, seed: int, counts: list[int], final: bool
) -> None:
    step = random_step(seed, counts, final=final)
    leaves = [step.residual.requires_grad_(), step.hidden.requires_grad_()]  # type: ignore[union-attr]
    total = objective.total(step)
    assert total.shape == () and torch.isfinite(total) and total >= 0
    for gradient in torch.autograd.grad(total, leaves, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@each_objective
def test_padding_plays_no_part(objective: Objective) -> None:
    step = random_step(0, [1, 4, 2])
    junk = step.residual.clone()
    junk[~step.mask] = torch.nan
    reference = step.reference.clone()
    reference[~step.mask] = torch.inf
    residual = junk.requires_grad_()
    total = objective.total(replace(step, residual=residual, reference=reference))
    torch.testing.assert_close(total, objective.total(step), rtol=0, atol=0)
    if objective in ON_LAYER.values():
        assert torch.isfinite(torch.autograd.grad(total, residual)[0]).all()


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "constant"])
@each_objective
def test_gradients_are_finite_for_tokens_that_do_not_vary(objective: Objective, value: float) -> None:
    step = random_step(1, [3, 1])
    for residual, reference in [
        (torch.full_like(step.residual, value), step.reference),
        (step.residual, torch.full_like(step.reference, value)),
        (torch.full_like(step.residual, value), torch.full_like(step.reference, value)),
    ]:
        leaf = residual.detach().clone().requires_grad_()
        hidden = step.hidden.detach().clone().requires_grad_()  # type: ignore[union-attr]
        total = objective.total(replace(step, residual=leaf, reference=reference, hidden=hidden))
        assert torch.isfinite(total)
        for gradient in torch.autograd.grad(total, [leaf, hidden], allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all()


def test_names_and_needs() -> None:
    assert [objective.name for objective in OBJECTIVES.values()] == [
        "relation",
        "cosine",
        "fisher",
        "output",
        "answer",
        "label",
    ]
    assert [objective.needs_output for objective in OBJECTIVES.values()] == [False] * 3 + [True] * 3
    # Layer objectives work without what the target feeds its head.
    for objective in ON_LAYER.values():
        objective.total(replace(random_step(0, [2, 3]), hidden=None))


@given(counts_of)
def test_units_are_tokens_or_sequences_with_a_relation(counts: list[int]) -> None:
    tensor = torch.tensor(counts)
    assert Relation().count(tensor) == sum(count >= 3 for count in counts)
    for objective in (Cosine(), Fisher(), OutputKL(), AnswerNLL()):
        assert objective.count(tensor) == sum(counts)


@given(seeds, counts_of, st.integers(1, 9))
def test_relation_is_the_relation_distance(seed: int, counts: list[int], width: int) -> None:
    step = random_step(seed, counts, reference_width=width)
    objective = Relation()
    expected = relation_distance(step.residual, step.reference, mask=step.mask)
    torch.testing.assert_close(objective.total(step) / max(1, objective.count(torch.tensor(counts))), expected)


@given(seeds, counts_of)
def test_relation_is_one_minus_cka_of_each_sequence(seed: int, counts: list[int]) -> None:
    step = random_step(seed, counts)
    total = 0.0
    for row, count in enumerate(counts):
        if count < 3:
            continue
        x, y = step.residual[row, :count], step.reference[row, :count]
        k, l = ((v - v.mean(0)) @ (v - v.mean(0)).T for v in (x, y))  # noqa: E741
        total += float((k / k.norm() - l / l.norm()).square().sum() / 2)
    torch.testing.assert_close(float(Relation().total(step)), total, rtol=1e-9, atol=1e-9)


@given(seeds, counts_of, st.floats(0.1, 50))
def test_cosine_is_zero_for_parallel_and_two_for_opposite_vectors(seed: int, counts: list[int], factor: float) -> None:
    step = random_step(seed, counts)
    for sign, each in ((1, 0.0), (-1, 2.0)):
        parallel = replace(step, reference=sign * factor * step.residual)
        torch.testing.assert_close(float(Cosine().total(parallel)), each * sum(counts), rtol=1e-9, atol=1e-9)


@given(seeds, counts_of)
def test_cosine_agrees_with_its_definition(seed: int, counts: list[int]) -> None:
    step = random_step(seed, counts)
    x, y = step.residual[step.mask], step.reference[step.mask]
    expected = (1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).sum()
    torch.testing.assert_close(Cosine().total(step), expected)


@given(seeds, counts_of)
def test_fisher_is_zero_for_equal_vectors_and_its_definition_elsewhere(seed: int, counts: list[int]) -> None:
    step = random_step(seed, counts)
    assert float(Fisher().total(replace(step, reference=step.residual))) == 0
    weight = step.shared_head.weight
    z, aligned = step.residual[step.mask] @ weight.T, step.reference[step.mask] @ weight.T
    p, u = aligned.softmax(1), z - aligned
    expected = ((p * u.square()).sum(1) - (p * u).sum(1).square()).sum() / 2
    torch.testing.assert_close(Fisher().total(step), expected)


@pytest.mark.parametrize("objective", [Cosine(), Fisher()], ids=["cosine", "fisher"])
def test_objectives_on_vectors_need_one_width(objective: Objective) -> None:
    with pytest.raises(SemalignError, match=f"the {objective.name} objective compares vectors of one width") as caught:
        objective.total(random_step(0, [2, 3], reference_width=9))
    assert "has 9 and the target 6" in str(caught.value)


@pytest.mark.parametrize("objective", [Cosine(), Fisher(), Relation()], ids=["cosine", "fisher", "relation"])
def test_a_layer_that_adds_nothing_gets_a_gradient_of_ordinary_size(objective: Objective) -> None:
    step = random_step(0, [2, 3])
    sizes = []
    for scale in (0.0, 1.0):
        residual = (scale * step.residual).requires_grad_()
        (gradient,) = torch.autograd.grad(objective.total(replace(step, residual=residual)), residual)
        sizes.append(float(gradient.norm()))
    assert sizes[0] <= 100 * sizes[1]


@pytest.mark.parametrize("objective", [Cosine(), Fisher(), Relation()], ids=["cosine", "fisher", "relation"])
def test_references_in_half_precision_are_taken(objective: Objective) -> None:
    step = random_step(0, [2, 3])
    single = replace(
        step,
        residual=step.residual.float(),
        reference=step.reference.bfloat16(),
        shared_head=Head(step.shared_head.weight.float()),
    )
    total = objective.total(single)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), objective.total(step), rtol=0.05, atol=0.05)


@given(seeds, counts_of)
def test_output_and_answer_agree_with_dense_sums(seed: int, counts: list[int]) -> None:
    step = random_step(seed, counts)
    assert isinstance(step.output, FinalStates) and step.hidden is not None
    p = (step.output.hidden @ step.output.head.weight.T / 1.5).log_softmax(1)
    q = (step.hidden @ step.shared_head.weight.T / 1.5).log_softmax(1)
    torch.testing.assert_close(OutputKL().total(step), (p.exp() * (p - q)).sum())
    logits = step.hidden @ step.head.weight.T  # the answer may lie outside of the shared entries
    nll = torch.nn.functional.cross_entropy(logits, step.labels, reduction="sum")
    torch.testing.assert_close(AnswerNLL().total(step), nll)


@given(seeds, counts_of)
def test_top_entries_give_a_lower_bound(seed: int, counts: list[int]) -> None:
    step = random_step(seed, counts)
    assert isinstance(step.output, FinalStates)
    dense = (step.output.hidden @ step.output.head.weight.T / 1.5).log_softmax(1)
    best = dense.topk(3, dim=1)
    tail = (1 - best.values.exp().sum(1)).clamp_min(1e-300).log()
    coarse = OutputKL().total(replace(step, output=TopEntries(best.indices, best.values, tail)))
    assert float(coarse) <= float(OutputKL().total(step)) + 1e-9


@pytest.mark.parametrize("kind", ["reverse", "jensen_shannon"])
def test_other_divergences_are_those_of_the_cells_and_need_top_entries(kind: Divergence) -> None:
    step, objective = random_step(3, [2, 4], final=False), OutputKL(divergence=kind)
    assert isinstance(step.output, TopEntries) and step.hidden is not None
    q = (step.hidden @ step.shared_head.weight.T / 1.5).log_softmax(1)
    tail = q.scatter(1, step.output.ids, -torch.inf).logsumexp(1)
    log_q = torch.cat([q.gather(1, step.output.ids), tail[:, None]], 1)
    log_p = torch.cat([step.output.log_probs, step.output.tail[:, None]], 1)
    expected = categorical_divergence(log_p, log_q, kind=kind).sum()
    torch.testing.assert_close(objective.total(step), expected)
    assert not torch.isclose(expected, OutputKL().total(step))
    with pytest.raises(SemalignError, match=f"no {kind} divergence: supervise by top entries"):
        objective.total(random_step(3, [2, 4], final=True))


# On stores


def step_of(store: Supervision, target: Any, layer: int) -> Step:
    """All examples of a store after a plain forward run of the target."""
    view = view_of(target)
    data = store.collate(range(len(store)), layer=layer)
    with torch.no_grad():
        trace = view.trace(data.batch, keep=[layer])
    mask = position_mask(data.positions.counts)
    residual = torch.zeros(*mask.shape, view.width)
    residual[mask] = trace.residual(layer)[data.positions.mask]
    assert data.reference is not None and trace.final is not None
    return Step(
        residual=residual,
        reference=data.reference,
        mask=mask,
        hidden=trace.final[data.positions.mask],
        labels=data.positions.labels,
        output=data.output,
        head=view.head,
        shared_head=view.head.select(store.entries),
        temperature=store.manifest.settings.temperature,
    )


@pytest.mark.parametrize("kept", [TOP, EXACT], ids=["top_k", "final_hidden"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_a_target_that_is_the_source_is_at_distance_zero(architecture: str, kept: Any, tmp_path: Path) -> None:
    model = source_model(architecture)
    pairing = pair(range(1, SOURCE_DEPTH + 1))
    transport = Transport.identity(SOURCE_WIDTH)
    store = supervise(model, [collate(EXAMPLES)], pairing, transport, tmp_path, settings=kept)
    for layer in (1, 4, SOURCE_DEPTH):
        step = step_of(store, model, layer)
        for objective in (Relation(), Cosine(), OutputKL()):
            assert float(objective.total(step)) == pytest.approx(0, abs=1e-3), objective.name
        assert float(Fisher().total(step)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "phi"])
def test_the_answer_nll_is_the_loss_of_transformers(architecture: str, tmp_path: Path) -> None:
    source, target = source_model(architecture), target_model(architecture)
    store = make_store(source, target, tmp_path)
    step = step_of(store, target, 1)
    with torch.no_grad():
        expected = target(**collate(EXAMPLES)).loss
    objective = AnswerNLL()
    found = objective.total(step) / objective.count(store.counts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(seeds, counts_of)
def test_label_cosine_is_the_cosine_with_a_one_hot_vector(seed: int, counts: list[int]) -> None:
    step = random_step(seed, counts)
    assert step.hidden is not None
    logits = step.head.logits(step.hidden)
    one_hot = torch.nn.functional.one_hot(step.labels, logits.shape[1]).to(logits)
    wanted = (1 - torch.cosine_similarity(logits, one_hot, dim=1)).sum()
    torch.testing.assert_close(LabelCosine().total(step), wanted)
