"""Training notices what goes wrong: gradients without a number, stages that harm, terms without a say."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import Relation, Step, Supervision, supervise
from semalign_geometry import Transport, relation_distance
from semalign_geometry.base import SemalignError
from semalign_train import DivergedError, FrontierConfig, FrontierTrainer, Guards, LossWeights, StageRecord, StepRecord
from torch import Tensor
from torch.nn import functional as F

from ..align.chain import (
    EXACT,
    EXAMPLES,
    TOP,
    make_store,
    pair,
    run_plainly,
    source_model,
    supervised_of,
    target_model,
    tokens_of,
    transport_between,
)
from ..models import collate


class Faulty(Relation):
    """The relation objective, but not a number at some calls."""

    faults: tuple[int, ...] = ()

    def total(self, step: Step) -> Tensor:
        CALLS.append(step)
        return super().total(step) * (float("nan") if len(CALLS) in self.faults else 1.0)


CALLS: list[Step] = []


def config(**more: Any) -> FrontierConfig:
    return FrontierConfig(**({"steps": 5, "batch_size": 4, "micro_batch_size": 4, "layers": (2, 3)} | more))


def fit(store: Supervision, settings: FrontierConfig, *, target: Any = None, **more: Any) -> tuple[Any, list[Any]]:
    CALLS.clear()
    target, records = target or target_model(), []
    FrontierTrainer(target, store, settings, callback=records.append, **more).fit()
    return target, records


def test_a_step_that_is_not_finite_is_skipped_and_counted(top: Supervision) -> None:
    target, records = fit(top, config(), objective=Faulty(faults=(2, 3)))
    steps = [record for record in records if isinstance(record, StepRecord)]
    stages = [record for record in records if isinstance(record, StageRecord)]
    assert [record.skipped for record in steps] == [False, True, True, *[False] * 7]
    assert [stage.skipped for stage in stages] == [2, 0]
    assert all(torch.isfinite(value).all() for value in target.state_dict().values())


def test_a_skipped_step_leaves_weights_and_moments_alone(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of which one is skipped are the four others."""
    monkeypatch.setattr("semalign_train._loop.rate_factor", lambda *arguments: 1.0)
    batches = [[0, 1], [2, 3], [4, 0], [1, 2]] * 4
    monkeypatch.setattr("semalign_train._frontier.optimisation_batches", lambda *arguments: iter(batches))
    skipping, _ = fit(top, config(layers=(2,), steps=3), objective=Faulty(faults=(2,)))
    batches = [[0, 1], [4, 0]] * 4
    without, _ = fit(top, config(layers=(2,), steps=2))
    for ours, theirs in zip(skipping.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("faults", "most", "step"), [((1, 2), 1, 2), ((5,), 3, 5), ((1,), 0, 1), ((2, 3, 4), 2, 4)])
def test_too_many_skipped_steps_stop_the_training(
    faults: tuple[int, ...], most: int, step: int, top: Supervision
) -> None:
    with pytest.raises(DivergedError, match=rf"^layer 2, step {step}: the gradient is not finite") as e:
        fit(top, config(guards=Guards(max_skipped=most)), objective=Faulty(faults=faults))
    assert e.value.record.step == step
    examples = CALLS[-1].mask.sum(1).sort().values
    assert torch.equal(top.counts[list(e.value.record.examples)].sort().values, examples)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    """The target as its own source, which no step can improve on."""
    folder = tmp_path_factory.mktemp("own") / "store"
    return make_store(
        target_model(), target_model(), folder, settings=EXACT, pairing=pair((1, 2, 3, 4), source_depth=4)
    )


def test_a_stage_that_harms_is_undone(own: Supervision) -> None:
    settings = config(learning_rate=0.1, warmup=0.0, rollback=0.5)
    target, records = fit(own, settings, held_out=own)
    stages = [record for record in records if isinstance(record, StageRecord)]
    assert all(stage.rolled_back and stage.held_out and stage.held_out[1] > stage.held_out[0] for stage in stages)
    for ours, theirs in zip(target.parameters(), target_model().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stage_that_helps_is_kept_and_its_figures_are_the_stage_s(top: Supervision, exact: Supervision) -> None:
    settings = config(learning_rate=3e-3, weights=LossWeights(geometry=0, output=1), rollback=0.0)
    _, records = fit(top, settings, held_out=exact)
    first, second = [record for record in records if isinstance(record, StageRecord)]
    assert first.held_out and second.held_out and not (first.rolled_back or second.rolled_back)
    assert first.held_out[1] < first.held_out[0]
    assert second.held_out[0] == pytest.approx(first.held_out[1], rel=1e-5)  # the KL does not know of layers
    _, plain = fit(top, settings.model_copy(update={"rollback": None}))
    assert plain[-1].held_out is None and plain[-1].last_losses == second.last_losses


def test_held_out_rows_are_measured_by_the_weighted_means_of_the_terms(exact: Supervision, tmp_path: Path) -> None:
    source, target, examples = source_model(), target_model(), EXAMPLES[:5]
    held_out = make_store(source, target, tmp_path / "held_out", settings=EXACT, examples=examples)
    relations, divergences, answers = [], [], []
    for index, example in enumerate(examples):
        where = supervised_of(example)
        with torch.no_grad():
            ours, theirs = (run_plainly(model, collate([example])) for model in (target, source))
        residual, y = (ours.hidden[2] - ours.hidden[1])[:, where], tokens_of(held_out, index, 2)[None]
        if len(y[0]) >= 3:
            relations.append(relation_distance(residual, y, mask=torch.ones(1, len(y[0]), dtype=torch.bool))[None])
        p, q = (run.logits[0, where].log_softmax(1) for run in (theirs, ours))
        divergences.append((p.exp() * (p - q)).sum(1))
        answers.append(F.nll_loss(q, example[0][example[1] :], reduction="none"))
    assert len(relations) == 4
    terms = [float(torch.cat(values).mean()) for values in (relations, divergences, answers)]
    weights = LossWeights(geometry=0.7, output=1.3, answer=0.4)
    settings = config(layers=(2,), steps=1, micro_batch_size=2, weights=weights, rollback=0.0)
    _, records = fit(exact, settings, held_out=held_out)
    assert records[-1].held_out[0] == pytest.approx(0.7 * terms[0] + 1.3 * terms[1] + 0.4 * terms[2], rel=1e-4)


@pytest.mark.parametrize("before", [1.0, 100.0])
@pytest.mark.parametrize(("factor", "undone"), [(1.019, False), (1.021, True)])
def test_the_margin_is_a_share_of_the_loss_before(
    factor: float, undone: bool, before: float, top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([before, before * factor])
    monkeypatch.setattr(FrontierTrainer, "_held_out_loss", lambda self, layer: next(measured))
    target, records = fit(top, config(layers=(2,), rollback=0.02), held_out=top)
    assert records[-1].held_out == (before, before * factor) and records[-1].rolled_back == undone
    pairs = zip(target.parameters(), target_model().parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs) == undone


def test_a_margin_tolerates_a_small_rise(own: Supervision) -> None:
    target = target_model()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1.001)
    settings = config(learning_rate=0.1, warmup=0.0, layers=(3,), rollback=1e12)
    _, records = fit(own, settings, target=target, held_out=own)
    assert records[-1].held_out[1] > records[-1].held_out[0] > 0 and not records[-1].rolled_back


def test_the_rollback_needs_held_out_rows(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="^rollback needs held-out rows"):
        FrontierTrainer(target_model(), top, config(rollback=0.1))


def test_held_out_rows_are_supervised_alike(top: Supervision, tmp_path: Path) -> None:
    other = make_store(source_model(), target_model(), tmp_path / "other", settings=EXACT, pairing=pair((1, 2, 3, 6)))
    with pytest.raises(SemalignError, match="supervise both alike"):
        FrontierTrainer(target_model(), top, config(rollback=0.1), held_out=other)
    warm = make_store(
        source_model(), target_model(), tmp_path / "warm", settings=TOP.model_copy(update={"temperature": 2.0})
    )
    with pytest.raises(SemalignError, match="another pairing, transport, .*temperature or .*supervise both alike"):
        FrontierTrainer(target_model(), top, config(rollback=0.1), held_out=warm)


def test_a_transport_that_was_saved_is_the_same(top: Supervision, tmp_path: Path) -> None:
    source, target = source_model(), target_model()
    transport = transport_between(source, target)
    transport.save(tmp_path / "transport")
    read = Transport.load(tmp_path / "transport")
    other = supervise(source, [collate(EXAMPLES)], pair(), read, tmp_path / "store", settings=TOP)
    FrontierTrainer(target, top, config(rollback=0.1), held_out=other)


def test_other_divergences_need_top_entries(top: Supervision, exact: Supervision) -> None:
    with pytest.raises(SemalignError, match="the training rows have final hidden states: .* or set divergence=forward"):
        FrontierTrainer(target_model(), exact, config(divergence="reverse"))
    settings = config(divergence="reverse", rollback=0.1)
    with pytest.raises(SemalignError, match="the held-out rows have final hidden states: "):
        FrontierTrainer(target_model(), top, settings, held_out=exact)
    FrontierTrainer(target_model(), top, settings, held_out=top)
    unguarded = config(divergence="reverse")
    FrontierTrainer(target_model(), top, unguarded, held_out=exact)
    FrontierTrainer(target_model(), exact, config(divergence="reverse", weights=LossWeights(geometry=1, output=0)))


def test_a_term_without_a_say_is_named(top: Supervision, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(top, config(weights=LossWeights(geometry=1e-6, output=1)))
    assert len(caplog.records) == 2  # once for each stage
    assert "layer 2: the gradient of output is" in caplog.text and "that of relation" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit(top, config(weights=LossWeights(geometry=1e-6, output=1), guards=Guards(drowned=1e12)))
    assert not caplog.records


def test_the_store_folder_is_untouched(top: Supervision, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in sorted(top.folder.iterdir())}
    fit(top, config(), checkpoints=tmp_path / "checkpoints")
    assert {file: file.read_bytes() for file in sorted(top.folder.iterdir())} == before
