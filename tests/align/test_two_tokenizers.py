"""Supervision where source and target have different tokenizers: values at span starts, equal in a store and live."""

from collections.abc import Callable, Iterator
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
    LiveSupervision,
    Objective,
    OutputKL,
    PairedBatch,
    Relation,
    SpanLikelihood,
    Spans,
    Step,
    Supervision,
    SupervisionSource,
    check_objective,
    position_mask,
    store_bytes,
    supervise,
)
from semalign_align._boundary import _made_up
from semalign_attribution import view_of
from semalign_geometry import ClassHead, TopEntries, align_classes
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..models import collate
from ..processes import run_processes
from .chain import EXACT, PAIRED, SOURCE_WIDTH, TARGET_DEPTH, TARGET_WIDTH, TOP, pair, run_plainly, supervised_of
from .test_live import assert_same
from .toy_tokenizers import (
    BEGIN,
    CLASSES,
    ROWS,
    SOURCE_TOKENS,
    TARGET_TOKENS,
    example,
    paired,
    source_model,
    target_model,
    transport_between,
)

SOURCE, TARGET = source_model(), target_model()
TRANSPORT = transport_between(SOURCE, TARGET)
LAYERS = range(1, TARGET_DEPTH + 1)
EVERYTHING = list(range(len(ROWS)))
SPANS = paired().spans
NOTHING = PairedBatch(
    *({key: value[:0] for key, value in side.items()} for side in (paired().source, paired().target)), ()
)
SETTINGS = {"top_k": TOP, "final_hidden": EXACT}
ONES = [Spans((1,) * len(spans.source), (1,) * len(spans.source)) for spans in SPANS]

each_output = pytest.mark.parametrize("wanted", SETTINGS.values(), ids=SETTINGS)


def stored(folder: Path, *, batches: Any = None, source: Any = SOURCE, **more: Any) -> Supervision:
    given = {"settings": TOP, "classes": CLASSES} | more
    return supervise(source, [paired()] if batches is None else batches, pair(), TRANSPORT, folder, **given)


def live(*, batches: Any = None, **more: Any) -> LiveSupervision:
    given = {"settings": TOP, "classes": CLASSES} | more
    return LiveSupervision(SOURCE, [paired()] if batches is None else batches, pair(), TRANSPORT, **given)


# The straight computation: each row alone, all logits at once


def starts_of(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]


@torch.no_grad()
def dense_class_log_probs(
    model: Any, classes: Tensor, batch: dict[str, Tensor], at: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the classes at some positions of a row, with all entries that are in a class."""
    logits = run_plainly(model, batch).logits[0, at].float() / temperature
    members = classes[: logits.shape[1]] >= 0
    probabilities = logits[:, members].softmax(1)
    summed = torch.zeros(len(at), CLASSES.count).index_add(1, classes[: logits.shape[1]][members], probabilities)
    return summed.log()


@torch.no_grad()
def dense_likelihoods(model: Any, row: tuple[Tensor, int], sizes: tuple[int, ...]) -> Tensor:
    """Log-likelihood of each span of a row's answer."""
    ids, prompt = row
    log_probs = run_plainly(model, collate([row])).logits[0, supervised_of(row)].float().log_softmax(1)
    found = log_probs.gather(1, ids[prompt:, None])[:, 0]
    return torch.stack([part.sum() for part in found.split(list(sizes))])


def positions_of(row: tuple[Tensor, int], sizes: tuple[int, ...]) -> Tensor:
    """The positions that predict the first token of each span."""
    return torch.tensor(starts_of(sizes)) + row[1] - 1


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_stored_values_are_those_of_the_straight_computation(temperature: float, tmp_path: Path) -> None:
    store = stored(tmp_path / "store", settings=TOP.model_copy(update={"temperature": temperature}))
    for index, spans in enumerate(SPANS):
        row = example(SOURCE_TOKENS, ROWS[index])
        at, batch = positions_of(row, spans.source), collate([row])
        with torch.no_grad():
            hidden = run_plainly(SOURCE, batch).hidden
        for layer in LAYERS:
            reference, last = store.collate([index], layer=layer).reference, PAIRED[layer - 1]
            expected = (hidden[last] - hidden[last - 1])[0, at] @ TRANSPORT.matrix.T
            assert reference is not None
            torch.testing.assert_close(reference[0], expected, rtol=1e-4, atol=1e-4)
        data = store.collate([index])
        assert isinstance(data.output, TopEntries) and data.spans is not None
        likelihoods = dense_likelihoods(SOURCE, row, spans.source)
        torch.testing.assert_close(data.spans.log_likelihood, likelihoods, rtol=1e-4, atol=1e-4)
        dense = dense_class_log_probs(SOURCE, CLASSES.source, batch, at, temperature).topk(8, dim=1)
        assert torch.equal(data.output.ids.long(), dense.indices)
        torch.testing.assert_close(data.output.log_probs, dense.values, rtol=1e-4, atol=1e-4)


def test_likelihoods_add_up_to_that_of_the_answer(tmp_path: Path) -> None:
    spans = stored(tmp_path / "store").collate(EVERYTHING).spans
    assert spans is not None
    for row, part in zip(ROWS, spans.log_likelihood.split(spans.counts.tolist()), strict=True):
        whole = example(SOURCE_TOKENS, row)
        alone = dense_likelihoods(SOURCE, whole, (len(whole[0]) - whole[1],))
        torch.testing.assert_close(part.sum(), alone[0], rtol=1e-4, atol=1e-4)


def test_a_batch_says_where_its_spans_are(tmp_path: Path) -> None:
    chosen = [2, 0, 5]
    data = stored(tmp_path / "store").collate(chosen, layer=2)
    spans = [SPANS[index] for index in chosen]
    batch = paired([ROWS[index] for index in chosen])
    assert data.spans is not None and data.source is not None and data.reference is not None
    assert all(torch.equal(data.batch[key], batch.target[key]) for key in data.batch)
    assert all(torch.equal(data.source[key], batch.source[key]) for key in data.source)
    sizes = [len(each.source) for each in spans]
    assert data.counts.tolist() == data.spans.counts.tolist() == sizes
    assert data.reference.shape == (3, max(sizes), TARGET_WIDTH)
    source, target = (sum((getattr(each, side) for each in spans), ()) for side in ("source", "target"))
    assert data.spans.lengths.tolist() == list(target)
    assert data.spans.starts.tolist() == starts_of(target) and data.spans.source_starts.tolist() == starts_of(source)
    assert data.spans.several.tolist() == [max(pair) > 1 for pair in zip(source, target, strict=True)]
    values = torch.arange(sum(target))
    assert data.at_spans(values).tolist() == starts_of(target)
    assert len(data.positions.labels) == sum(target), "positions are those of all answer tokens of the target"


def test_the_manifest_says_what_the_store_holds(tmp_path: Path) -> None:
    for supervision in (stored(tmp_path / "store"), live()):
        manifest = supervision.manifest
        assert manifest.tokens == sum(len(example(TARGET_TOKENS, row)[0]) for row in ROWS)
        assert manifest.supervised_tokens == sum(sum(spans.target) for spans in SPANS)
        assert manifest.spans == sum(len(spans.source) for spans in SPANS) == int(supervision.counts.sum())
        assert supervision.answer_counts.tolist() == [sum(spans.target) for spans in SPANS]
        assert manifest.entries == CLASSES.count
        assert torch.equal(supervision.entries, torch.tensor([i for i, c in enumerate(CLASSES.target) if c >= 0]))
        assert supervision.largest_id == max(int(example(TARGET_TOKENS, row)[0].max()) for row in ROWS)
        assert isinstance(supervision, SupervisionSource)


@each_output
def test_a_store_opens_with_its_classes(wanted: Any, tmp_path: Path) -> None:
    written = stored(tmp_path / "store", settings=wanted)
    opened = Supervision.open(tmp_path / "store")
    assert opened.classes is not None and opened.classes.names == CLASSES.names
    for name in ("source", "target"):
        assert torch.equal(getattr(opened.classes, name), getattr(CLASSES, name))
    for name in ("source_ids", "target_ids"):
        assert torch.equal(getattr(opened.classes.shared, name), getattr(CLASSES.shared, name))
    assert opened.classes.shared.only_in_source == CLASSES.shared.only_in_source
    assert opened.classes.shared.only_in_target == CLASSES.shared.only_in_target
    assert_same(opened.collate(EVERYTHING, layer=3), written.collate(EVERYTHING, layer=3), rtol=0)


@each_output
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_live_values_are_those_of_a_store(wanted: Any, dtype: str, tmp_path: Path) -> None:
    wanted = wanted.model_copy(update={"dtype": dtype})
    kept, computed = stored(tmp_path / "store", settings=wanted), live(settings=wanted)
    assert torch.equal(kept.lengths, computed.lengths) and torch.equal(kept.counts, computed.counts)
    assert torch.equal(kept.entries, computed.entries)
    rtol = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2}[dtype]
    for layer in (None, *LAYERS):
        one, other = (supervision.collate([4, 0, 2], layer=layer) for supervision in (computed, kept))
        assert_same(one, other, rtol=rtol)
        assert one.spans is not None and other.spans is not None and one.source is not None and other.source is not None
        for name in ("counts", "starts", "lengths", "source_starts", "several"):
            assert torch.equal(getattr(one.spans, name), getattr(other.spans, name))
        torch.testing.assert_close(one.spans.log_likelihood, other.spans.log_likelihood)
        assert one.spans.log_likelihood.dtype == torch.float32
        assert all(torch.equal(one.source[key], other.source[key]) for key in one.source)


@settings(max_examples=10)
@given(order=st.permutations(EVERYTHING), size=st.sampled_from([1, 500, 10**9]), data=st.data())
def test_batches_and_shards_make_no_difference(
    order: list[int], size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cut = data.draw(st.integers(1, len(ROWS) - 1))
    batches = [paired(ROWS[:cut]), NOTHING, paired(ROWS[cut:])]
    folder = tmp_path_factory.mktemp("stores")
    store = stored(folder / "store", batches=batches, settings=TOP.model_copy(update={"shard_bytes": size}))
    whole = live()
    one, other = store.collate(order, layer=2), whole.collate(order, layer=2)
    assert_same(one, other, rtol=1e-4)
    assert one.spans is not None and other.spans is not None
    torch.testing.assert_close(one.spans.log_likelihood, other.spans.log_likelihood, rtol=1e-4, atol=1e-4)


class Killed(BaseException):
    """Stands for the end of the process."""


@each_output
def test_killed_and_repeated_gives_the_same_files(wanted: Any, tmp_path: Path) -> None:
    wanted = wanted.model_copy(update={"shard_bytes": 1})

    def batches(kill_at: int | None) -> Iterator[PairedBatch]:
        for number, row in enumerate(ROWS):
            if number == kill_at:
                raise Killed
            yield paired([row])

    whole = stored(tmp_path / "whole", batches=batches(None), settings=wanted)
    for kill_at in (2, 4):
        with pytest.raises(Killed):
            stored(tmp_path / "store", batches=batches(kill_at), settings=wanted, resume_key="key")
    found = stored(tmp_path / "store", batches=batches(None), settings=wanted, resume_key="key")
    assert found.manifest.model_copy(update={"key": ""}) == whole.manifest
    for name in whole.manifest.files:
        assert (found.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_other_classes_are_another_supervision(tmp_path: Path) -> None:
    first = stored(tmp_path / "store", resume_key="key").manifest.key
    other = replace(CLASSES, target=CLASSES.target.where(CLASSES.target != CLASSES.count - 1, -1))
    assert stored(tmp_path / "store", resume_key="key").manifest.key == first
    other.target[0] = CLASSES.count - 1
    assert stored(tmp_path / "store", resume_key="key", classes=other).manifest.key != first


def _supervise(folder: Path) -> None:
    stored(folder / "store", batches=[paired([row]) for row in ROWS])


def test_two_processes_write_the_store_of_one(tmp_path: Path) -> None:
    _supervise(tmp_path / "one")
    assert run_processes(_supervise, tmp_path / "two") == [0, 0]
    one, two = (Supervision.open(tmp_path / name / "store") for name in ("one", "two"))
    assert len(two.manifest.shards) == 2 and two.manifest.spans == one.manifest.spans
    assert_same(two.collate(EVERYTHING, layer=1), one.collate(EVERYTHING, layer=1), rtol=0)


@each_output
def test_its_size_is_known_before(wanted: Any, tmp_path: Path) -> None:
    store = stored(tmp_path / "store", settings=wanted)
    tensors = [file.get_tensor(key) for file in store._shards for key in file.keys()]  # noqa: SIM118
    taken = sum(tensor.nbytes for tensor in tensors)
    taken += (store.folder / "vocabulary.safetensors").stat().st_size - _header(store.folder / "vocabulary.safetensors")
    assert taken == store_bytes(
        wanted,
        examples=len(ROWS),
        tokens=int(store.lengths.sum()),
        supervised_tokens=store.manifest.supervised_tokens,
        layers=len(pair().paired_layers),
        width=TARGET_WIDTH,
        source_width=SOURCE_WIDTH,
        head_bytes=view_of(SOURCE).head.weight.nbytes,
        entries=CLASSES.count,
        source_tokens=sum(len(example(SOURCE_TOKENS, row)[0]) for row in ROWS),
        spans=store.manifest.spans,
        classes=CLASSES,
    )


def _header(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


# Objectives


def step_of(supervision: SupervisionSource, target: Any, indices: list[int], *, layer: int = 2) -> Step:
    """A step as the frontier trainer makes it."""
    view, data = view_of(target), supervision.collate(indices, layer=layer)
    mask = position_mask(data.counts)
    with torch.no_grad():
        trace = view.trace(data.batch, keep=[layer], positions=data.positions.mask)
    assert trace.final is not None and data.reference is not None
    residual = torch.zeros(*mask.shape, view.width)
    residual[mask] = data.at_spans(trace.residual(layer))
    return Step(
        residual=residual.requires_grad_(),
        reference=data.reference,
        mask=mask,
        hidden=trace.final[data.positions.mask].requires_grad_(),
        labels=data.positions.labels,
        output=data.output,
        head=view.head,
        shared_head=supervision.output_head(view.head),
        temperature=supervision.manifest.settings.temperature,
        spans=data.spans,
    )


OBJECTIVES: dict[str, Objective] = {
    "relation": Relation(),
    "cosine": Cosine(),
    "fisher": Fisher(),
    "output": OutputKL(),
    "span": SpanLikelihood(),
    "span, warm": SpanLikelihood(temperature=3.0),
    "answer": AnswerNLL(),
    "label": LabelCosine(),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@each_objective
@each_output
def test_totals_over_micro_batches_add_up(objective: Objective, wanted: Any) -> None:
    supervision = live(settings=wanted)
    whole = objective.total(step_of(supervision, TARGET, EVERYTHING))
    parts = [objective.total(step_of(supervision, TARGET, part)) for part in ([0, 1], [2], [3, 4, 5])]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-4, atol=1e-4)
    assert objective.count(supervision.counts) == sum(
        objective.count(supervision.counts[part]) for part in ([0, 1], [2], [3, 4, 5])
    )


def test_the_exact_divergence_is_that_of_the_dense_classes() -> None:
    found = OutputKL().total(step_of(live(settings=EXACT), TARGET, EVERYTHING))
    total = torch.zeros(())
    for row, spans in zip(ROWS, SPANS, strict=True):
        sides = []
        for model, tokens, ids, sizes in (
            (SOURCE, SOURCE_TOKENS, CLASSES.source, spans.source),
            (TARGET, TARGET_TOKENS, CLASSES.target, spans.target),
        ):
            whole = example(tokens, row)
            sides.append(dense_class_log_probs(model, ids, collate([whole]), positions_of(whole, sizes)))
        total += (sides[0].exp() * (sides[0] - sides[1])).sum()
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-3)


def test_the_span_term_is_the_binary_divergence_of_spans_with_several_tokens() -> None:
    found = SpanLikelihood().total(step_of(live(), TARGET, EVERYTHING))
    total = torch.zeros(())
    for row, spans in zip(ROWS, SPANS, strict=True):
        ours = dense_likelihoods(SOURCE, example(SOURCE_TOKENS, row), spans.source).exp().double()
        theirs = dense_likelihoods(TARGET, example(TARGET_TOKENS, row), spans.target).exp().double()
        several = torch.tensor([max(sizes) > 1 for sizes in zip(spans.source, spans.target, strict=True)])
        p, q = ours[several], theirs[several]
        total += (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-5)


def test_the_span_term_reaches_the_tokens_of_spans_with_several_alone() -> None:
    step = step_of(live(), TARGET, EVERYTHING)
    assert step.hidden is not None and step.spans is not None
    (gradient,) = torch.autograd.grad(SpanLikelihood().total(step), step.hidden)
    within = step.spans.several.repeat_interleave(step.spans.lengths)
    assert (gradient[~within] == 0).all() and (gradient[within] != 0).any(1).all()


def test_without_spans_the_span_term_is_zero_with_a_gradient() -> None:
    step = replace(step_of(live(), TARGET, [0]), spans=None)
    total = SpanLikelihood().total(step)
    assert total.item() == 0 and total.requires_grad


@each_objective
def test_made_up_examples_with_spans_fit_our_objectives(objective: Objective) -> None:
    step = _made_up(6, 6, spans=True, hidden=objective.needs_output)
    total = objective.total(step)
    assert total.dim() == 0 and total.requires_grad and objective.count(step.mask.sum(1)) > 0
    check_objective(objective, width=6, reference_width=6, spans=True)


# One tokenizer on both sides, through the code for two


ONE = align_classes(SOURCE_TOKENS.vocabulary, SOURCE_TOKENS.vocabulary, source_rows=20, target_rows=20)
for side in (ONE.source, ONE.target):
    side[BEGIN] = -1  # padding alone is left in the class of other special entries


def twice(folder: Path, wanted: Any) -> tuple[Supervision, Supervision]:
    """Stores of rows with one tokenizer, as such and as pairs."""
    rows = paired(target=SOURCE_TOKENS)
    members = (ONE.source >= 0).nonzero()[:, 0]
    members = members[ONE.source[members].argsort()]  # each is a class
    alone = supervise(SOURCE, [rows.source], pair(), TRANSPORT, folder / "one", settings=wanted, entries=members)
    both = supervise(SOURCE, [rows], pair(), TRANSPORT, folder / "two", settings=wanted, classes=ONE)
    return alone, both


def test_with_one_tokenizer_spans_are_tokens() -> None:
    spans = paired(target=SOURCE_TOKENS).spans
    assert all(set(each.source) == set(each.target) == {1} for each in spans)
    assert ONE.source[ONE.source >= 0].sort().values.tolist() == list(range(ONE.count))


@pytest.mark.parametrize("kept", ["top_k", "final_hidden"])
def test_with_one_tokenizer_layers_and_answers_have_the_same_bits(kept: str, tmp_path: Path) -> None:
    target = source_model()
    alone, both = twice(tmp_path, SETTINGS[kept])
    assert torch.equal(alone.counts, both.counts) and torch.equal(alone.lengths, both.lengths)
    for layer in LAYERS:
        one, other = (store.collate(EVERYTHING, layer=layer) for store in (alone, both))
        assert one.reference is not None and other.reference is not None
        assert torch.equal(one.reference, other.reference)
        assert other.spans is not None and not other.spans.several.any()
    if isinstance(one.output, FinalStates) and isinstance(other.output, FinalStates):
        assert torch.equal(one.output.hidden, other.output.hidden)
    steps = [step_of(store, target, EVERYTHING) for store in (alone, both)]
    for objective in (Relation(), AnswerNLL(), LabelCosine()):
        assert torch.equal(*(objective.total(step) for step in steps))
    assert SpanLikelihood().total(steps[1]).item() == 0


@pytest.mark.parametrize("kept", ["top_k", "final_hidden"])
def test_with_one_tokenizer_the_output_is_that_of_its_entries(kept: str, tmp_path: Path) -> None:
    alone, both = twice(tmp_path, SETTINGS[kept])
    one, other = (store.collate(EVERYTHING).output for store in (alone, both))
    if isinstance(one, TopEntries) and isinstance(other, TopEntries):
        for name in ("ids", "log_probs", "tail"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    steps = [step_of(store, source_model(), EVERYTHING) for store in (alone, both)]
    totals = [OutputKL().total(step) for step in steps]
    assert torch.equal(*totals)
    gradients = [torch.autograd.grad(total, step.hidden)[0] for total, step in zip(totals, steps, strict=True)]
    torch.testing.assert_close(*gradients)  # sums of top entries add up in another order


# Refusals


def broken(**changes: Any) -> PairedBatch:
    return replace(paired(), **changes)


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no classes": (paired, {"classes": None}, "rows have two tokenizers: pass the classes of both"),
    "no pairs": (lambda: paired().target, {}, "rows of one tokenizer take no classes: pass each batch as PairedBatch"),
    "both": (paired, {"entries": torch.arange(4)}, "entries and classes exclude each other"),
    "fewer spans": (lambda: broken(spans=SPANS[:2]), {}, "6 rows on the source's side, 6 on the target's and spans of"),
    "fewer rows": (lambda: broken(source=paired(ROWS[:2]).source), {}, "2 rows on the source's side, 6 on the"),
    "other spans": (
        lambda: broken(spans=(SPANS[0], *SPANS[2:], SPANS[1])),
        {},
        "row 1 of a batch has 2 answer tokens on the source's side, its spans cover 8",
    ),
    "other target": (
        lambda: broken(spans=(Spans(SPANS[0].source, (1, 2, 1)), *SPANS[1:])),
        {},
        "row 0 of a batch has 5 answer tokens on the target's side, its spans cover 4: make them with align_spans",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    make, more, match = REFUSALS[case]
    with pytest.raises(SemalignError, match=match):
        stored(tmp_path / "store", batches=[make()], **more)
    with pytest.raises(SemalignError, match=match):
        live(batches=[make()], **more)
    assert list(tmp_path.iterdir()) == []


def test_an_output_head_is_over_the_classes() -> None:
    head = live().output_head(view_of(TARGET).head)
    assert isinstance(head, ClassHead) and head.count == CLASSES.count
