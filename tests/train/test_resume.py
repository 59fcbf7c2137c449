"""An interrupted training goes on to the weights of an undisturbed one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import Relation, Supervision
from semalign_geometry import SemalignError
from semalign_train import FrontierTrainer, FullLayer, Guards, LoraLayer, StageRecord, StepRecord, TransferConfig

from ..align.chain import TARGET_DEPTH, target_model

STEPS = 4
EVENTS = TARGET_DEPTH * (STEPS + 1)


class Killed(BaseException):
    """Stands for the end of the process."""


def config(**more: Any) -> TransferConfig:
    settings = {"steps": STEPS, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 3e-3, "checkpoint_steps": 1}
    return TransferConfig(**(settings | more))


def train(
    store: Supervision,
    folder: Path | str | None,
    *,
    kill_at: int | None = None,
    dtype: torch.dtype = torch.float32,
    seen: list[StepRecord | StageRecord] | None = None,
    **more: Any,
) -> Any:
    """A target trained to the end, or to the given event; None when it was killed. `seen` gets the events."""
    events = [] if seen is None else seen

    def callback(record: StepRecord | StageRecord) -> None:
        events.append(record)
        if len(events) == kill_at:
            raise Killed

    target = target_model(dtype=dtype)
    trainer = FrontierTrainer(target, store, config(**more), checkpoints=folder, callback=callback)
    try:
        report = trainer.fit()
    except Killed:
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


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"seed": 1}, {"objective": Relation(unit_tokens=True)}])
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


def test_settings_of_an_own_objective_count(top: Supervision, tmp_path: Path) -> None:
    FrontierTrainer(target_model(), top, config(), objective=Relation(), checkpoints=tmp_path).fit()
    other = FrontierTrainer(target_model(), top, config(), objective=Relation(unit_tokens=True), checkpoints=tmp_path)
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
