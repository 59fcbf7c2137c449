"""An interrupted training goes on to the weights of an undisturbed one."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import Cosine, Relation, Supervision
from semalign_geometry.base import SemalignError
from semalign_train import (
    FrontierConfig,
    FrontierTrainer,
    FullLayer,
    Guards,
    LoraLayer,
    Optimiser,
    StageRecord,
    StepRecord,
    kept_until,
)

from ..align.chain import TARGET_DEPTH, target_model

STEPS = 4
EVENTS = TARGET_DEPTH * (STEPS + 1)


class Killed(BaseException):
    """Stands for the end of the process."""


def config(**more: Any) -> FrontierConfig:
    settings = {"steps": STEPS, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 3e-3, "checkpoint_steps": 1}
    return FrontierConfig(**(settings | more))


def train(
    store: Supervision,
    folder: Path | str | None,
    *,
    kill_at: int | None = None,
    killed_by: type[BaseException] = Killed,
    dtype: torch.dtype = torch.float32,
    seen: list[StepRecord | StageRecord] | None = None,
    **more: Any,
) -> Any:
    """A target trained to the end, or to the given event; None when it was killed. `seen` gets the events."""
    events = [] if seen is None else seen

    def callback(record: StepRecord | StageRecord) -> None:
        events.append(record)
        if len(events) == kill_at:
            raise killed_by

    target = target_model(dtype=dtype)
    trainer = FrontierTrainer(target, store, config(**more), checkpoints=folder, callback=callback)
    try:
        report = trainer.fit()
    except (Killed, KeyboardInterrupt):
        return None
    return target, report


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def comparable(report: Any) -> Any:
    """The stages of a report, without their times."""
    return [stage.model_copy(update={"seconds": 0}) for stage in report.stages]


@pytest.mark.parametrize(
    ("trainable", "optimiser"),
    [(FullLayer(), "adamw"), (LoraLayer(rank=2), "adamw"), (FullLayer(), "muon"), (LoraLayer(rank=2), "muon")],
    ids=["full", "lora", "muon", "lora-muon"],
)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, "model"), (torch.float32, "bfloat16"), (torch.bfloat16, "model")],
    ids=["float32", "mixed", "bfloat16"],
)
@settings(max_examples=5)
@given(kills=st.lists(st.integers(1, EVENTS), min_size=1, max_size=3), every=st.sampled_from([None, 1, 2, 3]))
def test_killed_and_resumed_ends_at_the_same_bits(
    trainable: Any,
    optimiser: str,
    dtype: torch.dtype,
    autocast: str,
    top: Supervision,
    tmp_path_factory: Any,
    kills: list[int],
    every: int | None,
) -> None:
    more: dict[str, Any] = {"trainable": trainable, "optimiser": optimiser, "train_final_norm": True}
    more |= {"dtype": dtype, "autocast": autocast}
    whole, report = train(top, None, **more)
    folder = tmp_path_factory.mktemp("killed")
    for kill_at in kills:
        if train(top, folder, kill_at=kill_at, checkpoint_steps=every, **more) is not None:
            break
    resumed, again = train(top, folder, checkpoint_steps=every, **more)
    assert same_weights(whole, resumed)
    assert comparable(again) == comparable(report)


def test_a_finished_training_is_not_repeated(top: Supervision, tmp_path: Path) -> None:
    whole, report = train(top, tmp_path)
    again = train(top, tmp_path, kill_at=1)  # the first event would be fatal
    assert again is not None and same_weights(whole, again[0]) and again[1] == report
    assert sorted(place.name for place in tmp_path.iterdir()) == [
        f"stage-{layer:03}" for layer in range(1, TARGET_DEPTH + 1)
    ]


def test_the_last_two_states_are_kept(top: Supervision, tmp_path: Path) -> None:
    assert train(top, tmp_path, kill_at=STEPS + 1 + STEPS) is None  # the last step of the second stage
    assert sorted(place.name for place in tmp_path.iterdir()) == ["stage-001", "state-002-000002", "state-002-000003"]


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "manifest"])
def test_a_damaged_state_is_passed_over(damage: str, top: Supervision, tmp_path: Path) -> None:
    whole, _ = train(top, None)
    assert train(top, tmp_path, kill_at=STEPS) is None
    newest = max(tmp_path.glob("state-*"))
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(content[:-10])
    elif damage == "bit":
        content[-3] ^= 4
        tensors.write_bytes(content)
    elif damage == "missing":
        tensors.unlink()
    else:
        (newest / "manifest.json").write_text("{", encoding="utf-8")
    seen: list[Any] = []
    assert same_weights(whole, train(top, tmp_path, seen=seen)[0])
    assert seen[0].step == STEPS - 1, "from the state before"


def test_a_stage_goes_on_from_its_newest_state(top: Supervision, tmp_path: Path) -> None:
    assert train(top, tmp_path, kill_at=STEPS) is None
    seen: list[Any] = []
    train(top, str(tmp_path), seen=seen)
    assert (seen[0].layer, seen[0].step) == (1, STEPS)


@pytest.mark.parametrize("layer", [1, 2, TARGET_DEPTH])
def test_a_damaged_stage_is_trained_again(
    layer: int, top: Supervision, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = train(top, tmp_path)
    (tmp_path / f"stage-{layer:03}" / "tensors.safetensors").write_bytes(b"damaged")
    assert same_weights(whole, train(top, tmp_path)[0])
    assert "is damaged" in caplog.text and "trained again" in caplog.text


def test_what_others_keep_in_the_folder_stays(top: Supervision, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("precious", encoding="utf-8")
    (tmp_path / ".DS_Store").write_text("mine", encoding="utf-8")
    train(top, tmp_path)
    assert (tmp_path / ".git" / "config").exists() and (tmp_path / ".DS_Store").exists()


def test_half_written_folders_are_cleared_away(top: Supervision, tmp_path: Path) -> None:
    half = tmp_path / ".stage-001.abcd"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    train(top, tmp_path)
    assert not half.exists()


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"seed": 1}, {"objective": Cosine()}])
def test_another_training_is_refused(change: dict[str, Any], top: Supervision, tmp_path: Path) -> None:
    train(top, tmp_path)
    with pytest.raises(SemalignError, match="another training"):
        train(top, tmp_path, **change)


def test_another_target_is_refused(top: Supervision, tmp_path: Path) -> None:
    train(top, tmp_path)
    target = target_model()
    with torch.no_grad():
        next(target.parameters()).view(-1)[0] += 1
    with pytest.raises(SemalignError, match="another training"):
        FrontierTrainer(target, top, config(), checkpoints=tmp_path).fit()


def test_another_buffer_or_scalar_of_the_target_is_refused(top: Supervision, tmp_path: Path) -> None:
    def target(scale: float, scalar: float) -> Any:
        model = target_model()
        model.model.layers[0].register_buffer("scale", torch.tensor(float(scale)))
        model.model.layers[0].scalar = torch.nn.Parameter(torch.tensor(float(scalar)))
        return model

    FrontierTrainer(target(1, 1), top, config(), checkpoints=tmp_path).fit()
    for other in (target(2, 1), target(1, 2)):
        with pytest.raises(SemalignError, match="another training"):
            FrontierTrainer(other, top, config(), checkpoints=tmp_path).fit()


def test_a_target_that_was_changed_meanwhile_is_refused(top: Supervision, tmp_path: Path) -> None:
    trainer = FrontierTrainer(target_model(), top, config(), checkpoints=tmp_path)
    trainer.fit()
    with pytest.raises(SemalignError, match="another training"):
        trainer.fit()


class Scaled(Relation):
    """The relation objective, times a factor."""

    factor: float = 2.0


def test_settings_of_an_own_objective_count(top: Supervision, tmp_path: Path) -> None:
    FrontierTrainer(target_model(), top, config(), objective=Scaled(), checkpoints=tmp_path).fit()
    other = FrontierTrainer(target_model(), top, config(), objective=Scaled(factor=3.0), checkpoints=tmp_path)
    with pytest.raises(SemalignError, match="another training"):
        other.fit()


def test_states_of_another_training_are_refused(top: Supervision, tmp_path: Path) -> None:
    assert train(top, tmp_path, kill_at=STEPS) is None  # no stage is finished, two states are kept
    with pytest.raises(SemalignError, match="another training"):
        train(top, tmp_path, learning_rate=1e-4)


def test_what_only_warns_does_not_count(top: Supervision, tmp_path: Path) -> None:
    train(top, tmp_path)
    assert train(top, tmp_path, kill_at=1, guards=Guards(drowned=7.0), checkpoint_steps=3) is not None


def test_manifests_are_readable(top: Supervision, tmp_path: Path) -> None:
    train(top, tmp_path)
    manifest = json.loads((tmp_path / "stage-002" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["record"]["layer"] == 2 and manifest["record"]["steps"] == STEPS


def states(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.glob("state-*"))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr("semalign_train._checkpoint.monotonic", lambda: now[0])
    yield now


@pytest.mark.parametrize(("minutes", "kept"), [(0.5, [2, 3]), (1.0, [2]), (1.5, [3]), (None, [])])
def test_states_are_kept_by_time(
    minutes: float | None, kept: list[int], ticking: list[float], top: Supervision, tmp_path: Path
) -> None:
    def told(record: StepRecord | StageRecord) -> None:
        if isinstance(record, StepRecord):
            ticking[0] += 30
            if record.step == STEPS:
                raise Killed

    settings = config(checkpoint_steps=None, checkpoint_minutes=minutes)
    with pytest.raises(Killed):
        FrontierTrainer(target_model(), top, settings, checkpoints=tmp_path, callback=told).fit()
    assert states(tmp_path) == [f"state-001-{step:06}" for step in kept]
    whole, _ = train(top, None)
    seen: list[Any] = []
    resumed, _ = train(top, tmp_path, seen=seen, checkpoint_steps=None)
    assert seen[0].step == max(kept, default=0) + 1 and same_weights(whole, resumed)


def test_a_state_that_takes_long_to_write_is_kept_less_often(
    ticking: list[float], top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[float] = []

    def slow(*given: Any) -> Any:
        kept.append(ticking[0])
        ticking[0] += 10
        return write(*given)

    from semalign_train import _checkpoint

    write = _checkpoint.write_artifact
    monkeypatch.setattr(_checkpoint, "write_artifact", slow)

    def told(record: StepRecord | StageRecord) -> None:
        ticking[0] += 60

    settings = config(checkpoint_steps=None, checkpoint_minutes=1, steps=20, layers=(1,))
    FrontierTrainer(target_model(), top, settings, checkpoints=tmp_path, callback=told).fit()
    assert kept == [60, 430, 800, 1170, 1240], "330 seconds after ten of writing; the last one is the stage"


def test_a_full_disk_costs_a_state_by_time_and_not_the_training(
    ticking: list[float], top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from semalign_train import _checkpoint

    write = _checkpoint.write_artifact

    def full(folder: Path, *given: Any) -> Any:
        if folder.name.startswith("state"):
            raise OSError(28, "No space left on device")
        return write(folder, *given)

    monkeypatch.setattr(_checkpoint, "write_artifact", full)

    def told(record: StepRecord | StageRecord) -> None:
        ticking[0] += 300

    settings = config(checkpoint_steps=None)
    FrontierTrainer(target_model(), top, settings, checkpoints=tmp_path, callback=told).fit()
    assert "could not be kept" in caplog.text and caplog.records[0].levelno == logging.WARNING
    with pytest.raises(OSError, match="No space"):
        train(top, tmp_path / "other")


@pytest.mark.parametrize("trainable", [FullLayer(), LoraLayer(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("at", [1, 3, STEPS, STEPS + 1, STEPS + 3])
def test_ctrl_c_keeps_the_state_between_two_steps(at: int, trainable: Any, top: Supervision, tmp_path: Path) -> None:
    whole, report = train(top, None, trainable=trainable)
    more = {"trainable": trainable, "checkpoint_steps": None}
    assert train(top, tmp_path, kill_at=at, killed_by=KeyboardInterrupt, **more) is None
    layer, step = (1, at) if at <= STEPS else (2, at - STEPS - 1)
    assert kept_until(tmp_path) == (f"after step {step} of layer {layer}" if step else "after layer 1")
    seen: list[Any] = []
    resumed, again = train(top, tmp_path, seen=seen, **more)
    if step == STEPS:  # the stage is all that is left of it
        assert isinstance(seen[0], StageRecord) and seen[0].layer == layer
    else:
        assert (seen[0].layer, seen[0].step) == (layer, step + 1)
    assert same_weights(whole, resumed) and comparable(again) == comparable(report)


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_ctrl_c_within_a_step_keeps_no_half_of_it(
    when: str, top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights move in the middle of a step: interrupted before, the step before is kept; then or after, nothing."""
    whole, _ = train(top, None)
    step, calls = Optimiser.step, 0

    def interrupted(self: Optimiser, rate: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and when == "before":
            raise KeyboardInterrupt
        if calls == 3 and when == "within":
            part, inner = self._parts[0], self._parts[0].step

            def half() -> None:
                inner()
                raise KeyboardInterrupt

            monkeypatch.setattr(part, "step", half)
        step(self, rate)
        if calls == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "step", interrupted)
        assert train(top, tmp_path, checkpoint_steps=None) is None
    assert states(tmp_path) == (["state-001-000002"] if when == "before" else [])
    assert same_weights(whole, train(top, tmp_path, checkpoint_steps=None)[0])


def test_large_states_are_not_written_on_ctrl_c(
    top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semalign_train._checkpoint.QUICK_BYTES", 1000)
    assert train(top, tmp_path, kill_at=2, killed_by=KeyboardInterrupt, checkpoint_steps=None) is None
    assert kept_until(tmp_path) is None
