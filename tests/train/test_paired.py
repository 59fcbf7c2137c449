"""Training with two tokenizers: every term at the starts of spans, and the laws of both trainers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import LiveSupervision, Supervision
from semalign_attribution import DecoderView, Supervised, view_of
from semalign_geometry import relation_distance
from semalign_geometry.base import SemalignError
from semalign_train import (
    AlmLoss,
    AnswerLoss,
    FrontierConfig,
    FrontierTrainer,
    FullLayer,
    GoldLoss,
    HiddenLoss,
    JointConfig,
    JointLoss,
    JointStep,
    JointTrainer,
    LoraLayer,
    LossWeights,
    OutputLoss,
    StageRecord,
    StepRecord,
)
from torch import Tensor, nn

from ..align.chain import EXACT, PAIRED, TOP, pair
from .paired import (
    ROWS,
    SOURCE,
    TARGET,
    batch_of,
    classes,
    make_store,
    source_model,
    step_of,
    target_model,
    transport_between,
)

LOSSES: dict[str, Callable[[Any], JointLoss]] = {
    "sft": lambda target: AnswerLoss(),
    "kd": lambda target: OutputLoss(),
    "mixed": lambda target: OutputLoss(answer=0.25, span=2.0),
    "hidden": lambda target: HiddenLoss(source_model(), target, pair()),
    "gold": lambda target: GoldLoss(source_model(), answer=0.1),
    "gold, last": lambda target: GoldLoss(source_model(), merge="bayesian", beta=0.0),
    "alm": lambda target: AlmLoss(),
    "alm, spans": lambda target: AlmLoss(threshold=None, temperature=1.0, answer=0.1),
}
ALL = LossWeights(geometry=1, output=1, span=0.5, answer=0.3, label=0.2)

each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
each_trainable = pytest.mark.parametrize("trainable", [FullLayer(), LoraLayer(rank=2)], ids=["full", "lora"])
each_trainer = pytest.mark.parametrize("trainer", ["frontier", *LOSSES])
each_store = pytest.mark.parametrize("kind", ["paired_top", "paired_exact"])


@pytest.fixture(scope="module")
def paired_top(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    """Top classes."""
    return make_store(tmp_path_factory.mktemp("top") / "store", settings=TOP)


@pytest.fixture(scope="module")
def paired_exact(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    """Final hidden states."""
    return make_store(tmp_path_factory.mktemp("exact") / "store", settings=EXACT)


Fit = tuple[nn.Module, list[StepRecord]]


def fit(trainer: str, store: Any, *, checkpoints: Path | None = None, kill_at: int = 0, **more: Any) -> Fit:
    """A target after a few steps of a trainer, and its steps; stopped by Ctrl-C after a step."""
    target, records = target_model(dtype=more.pop("dtype", torch.float32)), list[StepRecord]()

    def callback(record: Any) -> None:
        if isinstance(record, StepRecord):
            records.append(record)
        if kill_at and len(records) == kill_at:
            raise KeyboardInterrupt

    common = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2} | more
    given: dict[str, Any] = {"callback": callback, "checkpoints": checkpoints}
    if trainer == "frontier":
        config = FrontierConfig(**({"weights": ALL, "layers": (2, 4)} | common))
        FrontierTrainer(target, store, config, **given).fit()
    else:
        JointTrainer(target, store, JointConfig(**common), loss=LOSSES[trainer](target), **given).fit()
    return target, records


def total(record: StepRecord) -> float:
    return sum(record.losses.values())


def assert_close(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_rows_have_spans_of_every_sort() -> None:
    sorts = {sizes for spans in batch_of(ROWS).spans for sizes in zip(spans.source, spans.target, strict=True)}
    assert {(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)} <= sorts


# Terms


class Plain:
    """Both models on one row, and its spans."""

    @torch.no_grad()
    def __init__(self, row: tuple[bytes, bytes], target: Any) -> None:
        batch = batch_of([row])
        (self.spans,) = batch.spans
        self.sides = []
        for model, side, tokens in (
            (source_model(), batch.source, self.spans.source),
            (target, batch.target, self.spans.target),
        ):
            view, positions = DecoderView(model), Supervised.of(side)
            trace = view.trace(side, keep=range(1, view.depth + 1))
            assert trace.final is not None
            log_p = view.head.logits(trace.final[positions.mask]).log_softmax(1)
            starts = torch.tensor([0, *tokens]).cumsum(0)[:-1]
            streams = {layer: value[positions.mask][starts] for layer, value in trace.outputs.items()}
            inputs = {layer: value[positions.mask][starts] for layer, value in trace.inputs.items()}
            of_tokens = log_p.gather(1, positions.labels[:, None])[:, 0]
            likelihoods = torch.stack([part.sum() for part in of_tokens.split(tokens)])
            self.sides.append((log_p[starts], likelihoods, of_tokens, streams, inputs, log_p, positions.labels, starts))

    def class_kl(self) -> Tensor:
        p, q = (
            torch.stack([side[0].exp()[:, ids == c].sum(1) for c in range(classes().count)], 1)
            for side, ids in zip(self.sides, (classes().source, classes().target), strict=True)
        )
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        return (p * (p / q).log()).sum()

    def span_kl(self) -> Tensor:
        several = torch.tensor([a > 1 or b > 1 for a, b in zip(self.spans.source, self.spans.target, strict=True)])
        p, q = (side[1].double().exp()[several] for side in self.sides)
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def test_the_terms_of_frontier_training_are_read_at_the_starts_of_spans(paired_exact: Supervision) -> None:
    _, (record, *_) = fit("frontier", paired_exact, layers=(2,))
    plain = {index: Plain(ROWS[index], target_model()) for index in record.examples}
    spans = sum(len(each.spans.source) for each in plain.values())
    relations = []
    for index, each in plain.items():
        reference = paired_exact.collate([index], layer=2).reference
        assert reference is not None and len(reference[0]) == len(each.spans.source)
        theirs = transport_between(source_model(), target_model())(
            (each.sides[0][3][PAIRED[1]] - each.sides[0][4][PAIRED[1]]).float()
        )
        torch.testing.assert_close(reference[0], theirs, rtol=1e-3, atol=1e-4)
        ours = (each.sides[1][3][2] - each.sides[1][4][2])[None]
        if ours.shape[1] >= 3:
            relations.append(relation_distance(ours, reference, mask=torch.ones(1, ours.shape[1], dtype=torch.bool)))
    expected = {
        "relation": float(torch.stack(relations).mean()),
        "output": float(sum(each.class_kl() for each in plain.values())) / spans,
        "span": float(sum(each.span_kl() for each in plain.values())) / spans,
        "answer": -float(sum(each.sides[1][2].sum() for each in plain.values())) / spans,
    }
    assert {name: record.losses[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    tokens = sum(sum(each.spans.target) for each in plain.values())
    assert record.supervised_tokens == tokens > spans


@torch.no_grad()
def test_hidden_states_are_compared_at_the_starts_of_spans(paired_top: Supervision) -> None:
    target = target_model()
    loss = HiddenLoss(source_model(), target, pair(), weight=2.5)
    projections = [each.detach().clone() for each in loss.parameters]
    records: list[StepRecord] = []
    config = JointConfig(steps=1, batch_size=4, micro_batch_size=2)
    JointTrainer(target, paired_top, config, loss=loss, callback=records.append).fit()
    errors = []
    for index in records[0].examples:
        source, ours = Plain(ROWS[index], target_model()).sides
        for layer, (paired, projection) in enumerate(zip(PAIRED, projections, strict=True), 1):
            wanted = source[3][paired]
            errors.append((ours[3][layer] @ projection.T - wanted).square().sum(1) / wanted.square().sum(1))
    assert records[0].losses["hidden"] == pytest.approx(2.5 * float(torch.cat(errors).mean()), rel=1e-4)


def trl(log_p: Tensor, labels: Tensor, groups: list[range], *, last: bool) -> Tensor:
    """Merged probabilities, group by group as in TRL's `_merge_probabilities_with_alignment_groups`."""
    probs, merged = log_p.exp(), []
    for group in groups:
        base, others = (group[-1], group[:-1]) if last else (group[0], group[1:])
        product = torch.ones(())
        for place in others:
            product = product * probs[place, labels[place]]
        merged.append(probs[base] * product)
    return torch.stack(merged)


@torch.no_grad()
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_gold_is_the_hybrid_loss_of_trl_on_our_spans(merge: Any, paired_top: Supervision) -> None:
    target, records = target_model(), list[StepRecord]()
    loss = GoldLoss(source_model(), merge=merge, weights=(0.6, 0.7))
    config = JointConfig(steps=1, batch_size=4, micro_batch_size=2)
    JointTrainer(target, paired_top, config, loss=loss, callback=records.append).fit()
    pairs = [(SOURCE.index(entry), TARGET.index(entry)) for entry in set(SOURCE) & set(TARGET) if entry]
    sums, spans = torch.zeros(2), 0
    for index in records[0].examples:
        plain, sides = Plain(ROWS[index], target_model()), []
        for side, tokens in zip(plain.sides, (plain.spans.source, plain.spans.target), strict=True):
            groups = [range(int(start), int(start) + size) for start, size in zip(side[7], tokens, strict=True)]
            sides.append(trl(side[5], side[6], groups, last=merge == "bayesian"))
        equal = [side[:, [both[place] for both in pairs]].clamp_min(1e-8) for place, side in enumerate(sides)]
        mean = (equal[0] + equal[1]) / 2
        sums[0] += sum((each * (each / mean).log()).sum() / 2 for each in equal)
        others = []
        for place, side in enumerate(sides):
            kept = [entry for entry in range(side.shape[1]) if entry not in [both[place] for both in pairs]]
            others.append(nn.functional.pad(side[:, kept].sort(1, descending=True).values, (0, 40 - len(kept))))
        sums[1] += (others[0] - others[1]).abs().sum()
        spans += len(plain.spans.source)
    expected = {"matched": 0.6 * float(sums[0]) / spans, "unmatched": 0.7 * float(sums[1]) / spans}
    assert records[0].losses == pytest.approx(expected, rel=1e-4)


# Joint steps


@each_store
@each_loss
def test_losses_do_not_depend_on_whether_the_head_trains(
    kind: str, make: Callable[[Any], JointLoss], request: pytest.FixtureRequest
) -> None:
    found: list[Mapping[str, Tensor]] = []
    for trains in (False, True):
        step = step_of(request.getfixturevalue(kind), trains=trains)
        found.append({name: value.detach() for name, value in make(step.view.model).terms(step).items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@each_loss
@pytest.mark.parametrize("trains", ["the head", "a layer"])
def test_gradients_are_finite_differences(
    trains: str, make: Callable[[Any], JointLoss], paired_top: Supervision
) -> None:
    """Along a random direction, in float64 but for the norms of layers. Distances of ranks have kinks, and a test of
    their own."""
    target = target_model(dtype=torch.float64)
    target.requires_grad_(False)
    part: Any = target.lm_head if trains == "the head" else target.model.layers[1].mlp
    parameters = list(part.requires_grad_(True).parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    view, data, loss = view_of(target), paired_top.collate(range(len(paired_top))), make(target)
    if isinstance(loss, GoldLoss):
        loss.weights = (1.0, 0.0)

    def value() -> Tensor:
        trace = view.trace(data.batch, keep=loss.layers)
        terms = loss.terms(JointStep(view, trace, data, paired_top))
        return torch.stack([term.double() for term in terms.values()]).sum()

    slope = sum((p * d).sum() for p, d in zip(torch.autograd.grad(value(), parameters), direction, strict=True))
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += step * way
            values.append(float(value()))
            for parameter, way in zip(parameters, direction, strict=True):
                parameter -= step * way
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-3, rel=5e-3, abs=1e-6)


def test_weights_of_0_leave_terms_out(paired_top: Supervision) -> None:
    names = {
        name: set(FrontierTrainer(target_model(), paired_top, FrontierConfig(steps=1, layers=(2,), weights=weights))
        .fit().stages[0].first_losses)
        for name, weights in {
            "default": LossWeights(),
            "no span": LossWeights(span=0),
            "no output": LossWeights(output=0),
        }.items()
    }  # fmt: skip
    assert names == {
        "default": {"relation", "output", "span"},
        "no span": {"relation", "output"},
        "no output": {"relation"},
    }
    assert set(OutputLoss().terms(step_of(paired_top))) == {"output", "span"}
    assert set(OutputLoss(span=0.0).terms(step_of(paired_top))) == {"output"}
    mixed, plain = (loss.terms(step_of(paired_top)) for loss in (OutputLoss(answer=0.25, span=3.0), OutputLoss()))
    assert float(mixed["span"]) == pytest.approx(0.75 * 3 * float(plain["span"]))


# Trainings


@each_loss
@each_trainable
def test_the_loss_falls(make: Callable[[Any], JointLoss], trainable: Any, paired_top: Supervision) -> None:
    target, records = target_model(), list[StepRecord]()
    config = JointConfig(steps=40, batch_size=4, micro_batch_size=4, learning_rate=1e-2, trainable=trainable)
    JointTrainer(target, paired_top, config, loss=make(target), callback=records.append).fit()
    first, last = (sum(total(record) for record in some) for some in (records[:5], records[-5:]))
    assert last < 0.8 * first


def test_every_stage_lowers_its_loss(paired_top: Supervision) -> None:
    config = FrontierConfig(steps=20, batch_size=8, learning_rate=3e-3, weights=LossWeights(geometry=1), rollback=0.0)
    stages = FrontierTrainer(target_model(), paired_top, config, held_out=paired_top).fit().stages
    assert len(stages) == 4 and set(stages[0].last_losses) == {"relation", "output", "span"}
    assert all(stage.held_out and stage.held_out[1] < stage.held_out[0] for stage in stages)


@each_trainer
def test_micro_batches_make_no_difference(trainer: str, paired_top: Supervision) -> None:
    (one, steps), (other, others) = (fit(trainer, paired_top, micro_batch_size=size) for size in (1, 4))
    assert_close(one, other, 1e-4)
    for mine, theirs in zip(steps, others, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-3, abs=1e-5)


@each_trainer
@pytest.mark.parametrize("kill_at", [1, 2])
def test_killed_and_resumed_ends_at_the_same_bits(
    trainer: str, kill_at: int, paired_top: Supervision, tmp_path: Path
) -> None:
    whole, records = fit(trainer, paired_top)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, paired_top, checkpoints=tmp_path, kill_at=kill_at)
    resumed, rest = fit(trainer, paired_top, checkpoints=tmp_path)
    assert same(whole, resumed)
    assert [record.losses for record in rest] == [record.losses for record in records[kill_at:]]


@each_trainer
def test_bfloat16_products_are_near_those_of_float32(trainer: str, paired_top: Supervision) -> None:
    plain, cast = (fit(trainer, paired_top, steps=2, autocast=mode) for mode in ("model", "bfloat16"))
    assert {parameter.dtype for parameter in cast[0].parameters()} == {torch.float32}
    assert cast[1][0].losses != plain[1][0].losses
    assert cast[1][0].losses == pytest.approx(plain[1][0].losses, rel=0.1, abs=1e-2)


@each_trainer
def test_a_live_source_trains_as_a_store_does(trainer: str, paired_exact: Supervision) -> None:
    source = source_model()
    live = LiveSupervision(
        source,
        [batch_of([row]) for row in ROWS],
        pair(),
        transport_between(source, target_model()),
        settings=EXACT,
        classes=classes(),
    )
    stored, lived = (fit(trainer, store, steps=2)[1] for store in (paired_exact, live))
    for one, other in zip(stored, lived, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3, abs=1e-5) and one.examples == other.examples
        assert one.supervised_tokens == other.supervised_tokens


# Checks


def test_a_target_with_fewer_rows_than_the_classes_is_refused(paired_top: Supervision) -> None:
    small = target_model()
    small.resize_token_embeddings(len(TARGET) - 2)
    with pytest.raises(SemalignError, match="the target's head has 16 rows: supervise with classes of its target_rows"):
        JointTrainer(small, paired_top, loss=OutputLoss())


def test_held_out_rows_have_the_same_classes(paired_top: Supervision, tmp_path: Path) -> None:
    config = FrontierConfig(rollback=0.1)
    FrontierTrainer(target_model(), paired_top, config, held_out=paired_top)
    swap = torch.tensor([1, 0, *range(2, classes().count), -1])  # the last place is that of −1
    over = replace(classes(), source=swap[classes().source], target=swap[classes().target])
    other = make_store(tmp_path / "store", over=over)
    assert torch.equal(other.entries, paired_top.entries)
    with pytest.raises(
        SemalignError, match="another pairing, .* or classes than the training rows: supervise both alike"
    ):
        FrontierTrainer(target_model(), paired_top, config, held_out=other)
    fingerprints = {FrontierTrainer(target_model(), store)._fingerprint() for store in (paired_top, other)}
    assert len(fingerprints) == 2
