"""The laws of joint training."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import LiveSupervision, Supervision
from semalign_attribution import DecoderView, undisturbed, view_of
from semalign_geometry import Divergence
from semalign_geometry.base import ComponentError, SemalignError
from semalign_train import (
    AnswerLoss,
    DivergedError,
    FullLayer,
    HiddenLoss,
    JointConfig,
    JointLoss,
    JointReport,
    JointStep,
    JointTrainer,
    LoraLayer,
    Muon,
    Optimiser,
    OutputLoss,
    StepRecord,
    kept_until,
    optimisation_batches,
    trained,
)
from semalign_train._batches import rate_factor
from torch import Tensor, nn
from torch.nn import functional as F

from ..align.chain import (
    EXACT,
    EXAMPLES,
    PAIRED,
    SOURCE_WIDTH,
    TARGET_DEPTH,
    TARGET_WIDTH,
    pair,
    run_plainly,
    source_model,
    supervised_of,
    target_model,
    transport_between,
)
from ..attribution.snapshot import snapshot, unsettle
from ..models import collate

STEPS = 5
LORA = LoraLayer(rank=2)
LOSSES: dict[str, JointLoss] = {"sft": AnswerLoss(), "kd": OutputLoss(), "mixed": OutputLoss(answer=0.25)}

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_trainable = pytest.mark.parametrize("trainable", [FullLayer(), LORA], ids=["full", "lora"])


class Killed(BaseException):
    """Stands for the end of the process."""


def quick(**more: Any) -> JointConfig:
    """Few steps with a rate that moves the weights."""
    return JointConfig(**({"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2} | more))


def fit(
    target: Any, store: Any, config: JointConfig, loss: JointLoss | None = None, **more: Any
) -> tuple[JointReport, list[StepRecord]]:
    records: list[StepRecord] = []
    given = {"callback": records.append} | more
    return JointTrainer(target, store, config, loss=loss or OutputLoss(), **given).fit(), records


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before: Mapping[str, Tensor], after: nn.Module) -> set[str]:
    return {name for name, value in after.named_parameters() if not torch.equal(value, before[name])}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def hidden_loss(source: Any, target: Any, **more: Any) -> HiddenLoss:
    return HiddenLoss(source, target, pair(), **more)


# Steps


def plain_loss(loss: JointLoss, model: Any, store: Supervision, indices: list[int]) -> Tensor:
    """Mean over the supervised tokens, from the model's own logits."""
    data = store.collate(indices)
    logits = model(input_ids=data.batch["input_ids"], attention_mask=data.batch["attention_mask"]).logits
    logits, labels = logits[:, :-1], data.batch["labels"][:, 1:]
    answer = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    if isinstance(loss, AnswerLoss):
        return answer
    assert isinstance(loss, OutputLoss)
    output: Any = data.output
    log_p = (output.hidden @ output.head.weight.T).double().log_softmax(1)
    log_q = logits[labels != -100].log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    return (1 - loss.answer) * kl + loss.answer * answer


@each_loss
@pytest.mark.parametrize("frozen", ["nothing", "the head"])
def test_training_is_a_plain_torch_loop(loss: JointLoss, frozen: str, exact: Supervision) -> None:
    """With a head that trains the logits are whole, with a frozen one they are streamed: the same steps."""
    ours, plain = target_model(dtype=torch.float64), target_model(dtype=torch.float64)
    config = quick(weight_decay=0.1, clip=0.7, warmup=0.4, trainable=FullLayer())
    parts: list[Any] = [model if frozen == "nothing" else model.model.layers for model in (ours, plain)]
    with undisturbed(ours), trained(parts[0], FullLayer()) as found:
        report, records = fit(ours, exact, config, loss, parameters=found)
    moved = list(parts[1].parameters())
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    for parameter in moved:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(moved, betas=config.betas, weight_decay=0.1)
    plain.eval()
    order = optimisation_batches(config, len(exact))
    for number, indices in enumerate(itertools.islice(order, STEPS), 1):
        value = plain_loss(loss, plain, exact, indices)
        value.backward()
        norm = nn.utils.clip_grad_norm_(moved, 0.7)
        optimiser.param_groups[0]["lr"] = 1e-2 * rate_factor(number, STEPS, config)
        optimiser.step()
        optimiser.zero_grad()
        record = records[number - 1]
        assert sum(record.losses.values()) == pytest.approx(float(value.detach()), rel=1e-5)
        assert record.gradient_norm == pytest.approx(float(norm), rel=1e-5)
        assert record.supervised_tokens == int(exact.counts[indices].sum()) and record.examples == tuple(indices)
    assert report.steps == STEPS
    for ours_value, value in zip(ours.parameters(), plain.parameters(), strict=True):
        # The source's values are float32; AdamW divides by the gradient's own size.
        torch.testing.assert_close(ours_value.detach(), value.detach(), rtol=1e-4, atol=1e-5)
    assert not same(ours, target_model(dtype=torch.float64))


@each_loss
@each_trainable
def test_the_loss_falls_and_the_rest_of_the_model_stays(loss: JointLoss, trainable: Any, top: Supervision) -> None:
    target = target_model()
    unsettle(target)
    before, values = snapshot(target), weights(target)
    report, records = fit(target, top, quick(steps=60, trainable=trainable), loss)
    after = snapshot(target)
    for part in ("modules", "gradients", "random"):
        assert after[part] == before[part]
    assert [(flag, number) for flag, number, *_ in after["parameters"].values()] == [
        (flag, number) for flag, number, *_ in before["parameters"].values()
    ]
    assert [record.step for record in records] == list(range(1, 61)) and {record.layer for record in records} == {0}
    ends = [sum(sum(record.losses.values()) for record in some) for some in (records[:5], records[-5:])]
    assert ends[1] < 0.9 * ends[0]
    assert report.first_losses == records[0].losses and report.last_losses == records[-1].losses
    assert report.supervised_tokens == sum(record.supervised_tokens for record in records)
    found = changed(values, target)
    if isinstance(trainable, FullLayer):
        assert found == set(values)
    else:
        wanted = {name for name in values if "layers" in name and name.split(".")[-2] in LORA.modules}
        assert found == wanted and len(wanted) == TARGET_DEPTH * len(LORA.modules)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_muon_moves_the_layers_and_leaves_embeddings_and_head_to_adamw(kind: str, top: Supervision) -> None:
    target, adamw = target_model(), target_model()
    fit(target, top, quick(optimiser=kind, steps=1, trainable=FullLayer()))
    fit(adamw, top, quick(steps=1, trainable=FullLayer()))
    expected = {name for name, value in adamw.named_parameters() if value.ndim == 2 and "layers" in name}
    assert changed(weights(adamw), target) == (expected if kind == "muon" else set())


@each_trainable
def test_micro_batches_make_no_difference(trainable: Any, top: Supervision) -> None:
    targets = []
    for size in (1, 4):
        targets.append(target_model())
        fit(targets[-1], top, quick(micro_batch_size=size, trainable=trainable))
    for one, other in zip(targets[0].parameters(), targets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@each_trainable
def test_recomputed_layers_train_alike_and_keep_less(trainable: Any, top: Supervision) -> None:
    after, kept = [], []
    for recompute in (False, True):
        held: dict[int, int] = {}

        def pack(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        after.append(target_model())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit(after[-1], top, quick(recompute=recompute, steps=2, trainable=trainable))
        kept.append(sum(held.values()))
    assert same(*after) and kept[1] < 0.8 * kept[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile reads every input's
@each_trainable
def test_compiled_layers_train_alike(trainable: Any, top: Supervision, compiled: list[nn.Module]) -> None:
    plain, target = target_model(), target_model()
    fit(plain, top, quick(steps=2, trainable=trainable))
    assert not compiled
    fit(target, top, quick(steps=2, trainable=trainable, compile=True))
    assert compiled == list(target.model.layers)
    for one, other in zip(plain.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@each_trainable
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, "model"), (torch.bfloat16, "model"), (torch.float32, "bfloat16")]
)
def test_products_are_in_the_precision_that_is_set(
    trainable: Any, dtype: torch.dtype, autocast: str, top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, product = set(), nn.functional.linear

    def watched(*given: Any) -> Tensor:
        found = product(*given)
        seen.add(found.dtype)
        return found

    monkeypatch.setattr(nn.functional, "linear", watched)
    target = target_model(dtype=dtype)
    fit(target, top, quick(steps=1, trainable=trainable, autocast=autocast))
    assert (torch.bfloat16 in seen) == (dtype == torch.bfloat16 or autocast == "bfloat16")
    assert {parameter.dtype for parameter in target.parameters()} == {dtype}


@pytest.mark.parametrize("loss", [AnswerLoss(), OutputLoss()], ids=["sft", "kd"])
def test_a_live_source_trains_as_a_store_does(loss: JointLoss, exact: Supervision) -> None:
    source, targets = source_model(), [target_model(), target_model()]
    transport = transport_between(source, target_model())
    live = LiveSupervision(source, [collate(EXAMPLES)], pair(), transport, settings=EXACT)
    stored, lived = (fit(target, store, quick(), loss)[1] for target, store in zip(targets, (exact, live), strict=True))
    for one, other in zip(stored, lived, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3) and one.examples == other.examples


def test_the_caller_may_choose_the_parameters(top: Supervision) -> None:
    """Modes are left to the caller, whose adapters may have dropout."""
    target = target_model()
    before, gains = weights(target), [p for name, p in target.named_parameters() if "norm" in name]
    for parameter in target.parameters():
        parameter.requires_grad_(any(parameter is gain for gain in gains))
    modes = list[bool]()
    target.model.layers[0].train()
    target.model.layers[0].register_forward_hook(lambda module, *given: modes.append(module.training))
    report, _ = fit(target, top, quick(), parameters=gains)
    assert set(modes) == {True}
    assert changed(before, target) == {name for name in before if "norm" in name}
    assert report.trained_parameters == sum(gain.numel() for gain in gains)


@pytest.mark.parametrize("start", ["zero", "pissa"])
def test_adapters_start_at_no_change_of_the_target(start: str, top: Supervision) -> None:
    """Principal components are taken out of the weights: the same function, rounding aside, but other steps."""
    trainable, target, plain = LoraLayer(rank=4, start=start), target_model(), target_model()
    with undisturbed(target), trained(view_of(target).layers, trainable) as found:
        moved = any(bool(parameter.any()) for parameter in found[1::2])  # B
    assert moved == (start == "pissa")
    for one, other in zip(target.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if start == "pissa" else 0)
    fit(target, top, quick(trainable=trainable))
    fit(plain, top, quick(trainable=LoraLayer(rank=4)))
    assert same(target, plain) == (start == "zero")


# Losses


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [("top", "forward"), ("top", "reverse"), ("top", "jensen_shannon"), ("exact", "forward")],
)
def test_losses_do_not_depend_on_whether_the_head_trains(
    kind: str, divergence: Divergence, request: pytest.FixtureRequest
) -> None:
    store: Supervision = request.getfixturevalue(kind)
    view = DecoderView(target_model())
    data = store.collate(range(len(store)))
    step = JointStep(view, view.trace(data.batch), data, store)
    loss, found = OutputLoss(answer=0.5, divergence=divergence), []
    for trains in (False, True):
        step.view.model.get_output_embeddings().requires_grad_(trains)  # type: ignore[union-attr, operator]
        found.append({name: value.detach() for name, value in loss.terms(step).items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_the_output_is_trained_by_the_divergence_that_is_set(top: Supervision) -> None:
    losses, target = set(), target_model()
    for divergence in ("forward", "reverse", "jensen_shannon"):
        for loss in (OutputLoss(divergence=divergence), hidden_loss(source_model(), target, divergence=divergence)):
            _, (record, *_) = fit(target_model(), top, quick(), loss)
            losses.add(round(record.losses["output"], 4))
    assert len(losses) == 3


def test_a_mix_of_both_terms_is_their_mix(top: Supervision) -> None:
    output, answer, mixed = (
        fit(target_model(), top, quick(steps=1), loss)[1][0].losses
        for loss in (OutputLoss(), AnswerLoss(), OutputLoss(answer=0.25))
    )
    assert set(output) == {"output"} and set(answer) == {"answer"}
    assert mixed == pytest.approx({"output": 0.75 * output["output"], "answer": 0.25 * answer["answer"]}, rel=1e-4)


def test_hidden_matching_leaves_the_source_as_it_was_and_trains_its_projections(top: Supervision) -> None:
    source, target = source_model(), target_model()
    unsettle(source)
    before = snapshot(source)
    loss = hidden_loss(source, target)
    starts = [projection.detach().clone() for projection in loss.parameters]
    report, records = fit(target, top, quick(steps=40), loss)
    assert snapshot(source) == before
    assert records[-1].losses["hidden"] < 0.9 * records[0].losses["hidden"]
    assert not any(torch.equal(one, other) for one, other in zip(starts, loss.parameters, strict=True))
    adapters, _ = fit(target_model(), top, quick())
    assert report.trained_parameters == adapters.trained_parameters + TARGET_DEPTH * SOURCE_WIDTH * TARGET_WIDTH


@torch.no_grad()
def test_hidden_matching_is_the_relative_error_of_each_paired_layer(top: Supervision) -> None:
    source, target = source_model(), target_model()
    generator = torch.Generator().manual_seed(3)
    shape = SOURCE_WIDTH, TARGET_WIDTH
    projections = [TARGET_WIDTH**-0.5 * torch.randn(shape, generator=generator) for _ in PAIRED]
    _, (step, *_) = fit(target_model(), top, quick(), hidden_loss(source, target, weight=2.5, seed=3))
    errors: list[Tensor] = []
    for example in (EXAMPLES[index] for index in step.examples):
        ours, theirs = (run_plainly(model, collate([example])).hidden for model in (target, source))
        where = supervised_of(example)
        for layer, (paired, projection) in enumerate(zip(PAIRED, projections, strict=True), 1):
            wanted = theirs[paired][0, where]
            error = ours[layer][0, where] @ projection.T - wanted
            errors.extend(error.norm(dim=1) ** 2 / wanted.norm(dim=1) ** 2)
    assert len(errors) == TARGET_DEPTH * step.supervised_tokens
    assert step.losses["hidden"] == pytest.approx(2.5 * float(torch.stack(errors).mean()), rel=1e-4)


def test_the_projections_are_left_to_adamw(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[nn.Parameter] = []

    class Seen(Muon):
        def __init__(self, matrices: Any, **more: Any) -> None:
            given.extend(matrices)
            super().__init__(given, **more)

    monkeypatch.setattr("semalign_train._optimiser.Muon", Seen)
    target = target_model()
    fit(target, top, quick(optimiser="muon", steps=1, trainable=LORA), hidden_loss(source_model(), target))
    assert given and all(LORA.rank in matrix.shape for matrix in given), "adapters, no projection"


def test_a_pairing_of_other_depths_is_refused() -> None:
    with pytest.raises(SemalignError, match="have 6 and 5 layers, the pairing is for 6 and 4"):
        hidden_loss(source_model(), target_model(depth=5))


@dataclass(frozen=True)
class Own(JointLoss):
    """A loss of somebody else."""

    result: Any = None

    def terms(self, step: JointStep) -> Any:
        return self.result(step) if callable(self.result) else self.result


WRONG: dict[str, Any] = {
    "nothing": None,
    "no term": {},
    "number": {"own": 1.5},
    "vector": lambda step: {"own": step.hidden.sum(1)},
    "tensor": lambda step: step.hidden.sum(),
}


@pytest.mark.parametrize("result", WRONG.values(), ids=WRONG)
def test_a_loss_that_returns_something_else_is_named(result: Any, top: Supervision) -> None:
    with pytest.raises(ComponentError, match="^the loss Own returned .* from terms: expected a mapping of names"):
        fit(target_model(), top, quick(), Own(result))


def test_a_loss_without_a_gradient_is_named(top: Supervision) -> None:
    with pytest.raises(ComponentError, match="^the loss Own returned terms without a gradient: compute them from step"):
        fit(target_model(), top, quick(), Own(lambda step: {"own": step.hidden.detach().sum()}))


@dataclass(frozen=True)
class Streams(JointLoss):
    """The squared stream of one layer."""

    layer: int = 2
    factor: float = 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def terms(self, step: JointStep) -> dict[str, Tensor]:
        return {"stream": self.factor * step.stream(self.layer).square().sum()}


def test_an_own_loss_reads_streams_and_trains(top: Supervision) -> None:
    target = target_model()
    before = weights(target)
    _, records = fit(target, top, quick(steps=20), Streams())
    assert records[-1].losses["stream"] < records[0].losses["stream"]
    assert not any(f"layers.{layer}." in name for name in changed(before, target) for layer in (2, 3)), "above it"


# Checkpoints


@dataclass(frozen=True)
class Noisy(JointLoss):
    """Draws from the global random state, as dropout does."""

    def terms(self, step: JointStep) -> dict[str, Tensor]:
        return {"noisy": torch.rand(()) * AnswerLoss().terms(step)["answer"]}


def train(
    store: Supervision, folder: Path | None, *, kill_at: int | None = None, killed_by: Any = Killed, **more: Any
) -> Any:
    """A target trained to the end, or to the given step; None when it was killed."""
    target, seen = target_model(dtype=more.pop("dtype", torch.float32)), more.pop("seen", [])
    loss = more.pop("loss", None) or hidden_loss(source_model(), target)

    def callback(record: StepRecord) -> None:
        seen.append(record.step)
        if record.step == kill_at:
            raise killed_by

    trainer = JointTrainer(target, store, quick(**more), loss=loss, checkpoints=folder, callback=callback)
    try:
        report = trainer.fit()
    except (Killed, KeyboardInterrupt):
        return None
    return target, report.model_copy(update={"seconds": 0, "config": JointConfig()})


CASES: dict[str, dict[str, Any]] = {
    "hidden": {},
    "full": {"loss": OutputLoss(answer=0.5), "trainable": FullLayer()},
    "muon": {"loss": OutputLoss(), "trainable": FullLayer(), "optimiser": "muon"},
    "noisy": {"loss": Noisy()},
    "pissa": {"loss": AnswerLoss(), "trainable": LoraLayer(rank=2, start="pissa")},
    "bfloat16": {"loss": OutputLoss(), "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("more", CASES.values(), ids=CASES)
@settings(max_examples=4)
@given(kills=st.lists(st.integers(1, STEPS), min_size=1, max_size=3), every=st.sampled_from([None, 1, 2, 3]))
def test_killed_and_resumed_ends_at_the_same_bits(
    more: dict[str, Any], top: Supervision, tmp_path_factory: Any, kills: list[int], every: int | None
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole, report = train(top, None, **more)
        folder = tmp_path_factory.mktemp("killed")
        for kill_at in [*kills, None]:
            kept = any(folder.glob("state-*"))
            torch.manual_seed(2 if kept else 1)  # a kept state has the random state with it
            found = train(top, folder, kill_at=kill_at, checkpoint_steps=every, **more)
        assert same(whole, found[0]) and found[1] == report


@pytest.mark.parametrize("name", ["noisy", "full"])
@pytest.mark.parametrize("at", [1, 3, STEPS])
def test_ctrl_c_keeps_the_state_between_two_steps(name: str, at: int, top: Supervision, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole, report = train(top, None, **CASES[name])
        torch.manual_seed(1)
        assert train(top, tmp_path, kill_at=at, killed_by=KeyboardInterrupt, **CASES[name]) is None
        assert kept_until(tmp_path) == f"after step {at}"
        random, seen = torch.get_rng_state(), list[int]()
        resumed, again = train(top, tmp_path, seen=seen, **CASES[name])
        assert torch.equal(torch.get_rng_state(), random)
    assert seen == list(range(at + 1, STEPS + 1))
    assert same(whole, resumed) and again == report


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_within_a_step_keeps_no_half_of_it(
    when: str, top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(top, None, **CASES["full"])
    step, calls = Optimiser.step, 0

    def interrupted(self: Optimiser, rate: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and when == "before":
            raise KeyboardInterrupt
        step(self, rate)
        if calls == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "step", interrupted)
        assert train(top, tmp_path, **CASES["full"]) is None
    assert kept_until(tmp_path) == ("after step 2" if when == "before" else None)
    assert same(whole, train(top, tmp_path, **CASES["full"])[0])


def test_states_are_kept_when_they_are_due_and_at_the_end(top: Supervision, tmp_path: Path) -> None:
    _, report = train(top, tmp_path, checkpoint_steps=3, loss=AnswerLoss())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-000-000003", f"state-000-{STEPS:06}"]
    seen: list[int] = []
    assert train(top, tmp_path, seen=seen, loss=AnswerLoss())[1] == report and not seen


@pytest.mark.parametrize("change", [{"seed": 1}, {"loss": Streams(factor=2.0)}, {"loss": AnswerLoss()}])
def test_another_training_is_refused(change: dict[str, Any], top: Supervision, tmp_path: Path) -> None:
    train(top, tmp_path, loss=Streams(), checkpoint_steps=1)
    with pytest.raises(SemalignError, match="another training"):
        train(top, tmp_path, **({"loss": Streams()} | change))


def test_checkpoints_need_to_identify_the_training(exact: Supervision, tmp_path: Path) -> None:
    source, target = source_model(), target_model()
    live = LiveSupervision(source, [collate(EXAMPLES)], pair(), transport_between(source, target), settings=EXACT)
    with pytest.raises(SemalignError, match="supervision of the training rows need its key"):
        JointTrainer(target, live, loss=OutputLoss(), checkpoints=tmp_path)
    with pytest.raises(SemalignError, match="need the settings of Own as JSON .* begin with an underscore"):
        JointTrainer(target, exact, loss=Own(target), checkpoints=tmp_path)


# Guards


@dataclass(frozen=True)
class Faulty(JointLoss):
    """Not a number in some batches."""

    faults: tuple[int, ...] = ()

    def terms(self, step: JointStep) -> dict[str, Tensor]:
        CALLS.append(1)
        return {"faulty": AnswerLoss().terms(step)["answer"] * (math.nan if len(CALLS) in self.faults else 1.0)}


CALLS: list[int] = []


@pytest.mark.parametrize(("faults", "most", "step"), [((1, 2), 1, 2), ((5,), 3, 5), ((1,), 0, 1), ((2, 3, 4), 2, 4)])
def test_too_many_skipped_steps_stop_the_training(
    faults: tuple[int, ...], most: int, step: int, top: Supervision
) -> None:
    CALLS.clear()
    target = target_model()
    message = rf"^step {step}: the gradient is not finite.* lower learning_rate, else load the target in another dtype"
    with pytest.raises(DivergedError, match=message) as e:
        fit(target, top, quick(micro_batch_size=4, guards={"max_skipped": most}), Faulty(faults))
    assert e.value.record.step == step and e.value.record.skipped
    assert all(torch.isfinite(value).all() for value in target.parameters())


def test_a_skipped_step_is_counted_and_changes_nothing(top: Supervision) -> None:
    CALLS.clear()
    target, before = target_model(), list[dict[str, Tensor]]()
    config = quick(micro_batch_size=4, trainable=FullLayer())
    trainer = JointTrainer(target, top, config, loss=Faulty((2,)), callback=lambda _: before.append(weights(target)))
    assert trainer.steps == STEPS and trainer.fit().skipped == 1
    assert all(torch.equal(value, before[1][name]) for name, value in before[0].items())
    assert not all(torch.equal(value, before[2][name]) for name, value in before[1].items())


def test_weights_that_are_not_finite_at_the_end_stop_the_training(top: Supervision) -> None:
    wild = quick(steps=1, learning_rate=1e30, weight_decay=1e30, warmup=0.0, schedule="constant")
    with pytest.raises(DivergedError, match="^step 1: the weights are not finite after the last step"):
        fit(target_model(), top, wild.model_copy(update={"trainable": FullLayer()}))


def test_a_target_that_does_not_fit_is_refused(top: Supervision) -> None:
    for target, message in (
        (target_model(dtype=torch.float16), "the target's weights are float16"),
        (target_model(vocabulary=90), "vocabulary ids up to 96, the target's head has 90 rows"),
    ):
        with pytest.raises(SemalignError, match=message):
            JointTrainer(target, top, loss=OutputLoss())
    JointTrainer(target_model(depth=5, width=40), top, loss=OutputLoss())  # only layers need a depth and a width
