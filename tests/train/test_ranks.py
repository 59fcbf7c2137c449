"""Two processes train as one does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from semalign_align import LiveSupervision, Ranks, Relation, Step, Supervision, supervise
from semalign_train import (
    AnswerLoss,
    DivergedError,
    FrontierConfig,
    FrontierTrainer,
    FullLayer,
    Guards,
    JointConfig,
    JointLoss,
    JointTrainer,
    LoraLayer,
    LossWeights,
    OutputLoss,
    StageRecord,
    StepRecord,
)
from torch import Tensor

from ..align.chain import EXACT, EXAMPLES, pair, source_model, target_model, transport_between
from ..models import collate
from ..processes import run_processes

COMMON: dict[str, Any] = {"steps": 3, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 3e-3}
CASES: dict[str, FrontierConfig] = {
    "full": FrontierConfig(**COMMON, rollback=1.0),
    "terms": FrontierConfig(**COMMON, weights=LossWeights(geometry=1, output=1, answer=1)),
    "lora": FrontierConfig(**COMMON, trainable=LoraLayer(rank=4)),
    "sharded": FrontierConfig(**(COMMON | {"micro_batch_size": 3}), shard_frozen=True, rollback=1.0),
    "sharded, some layers": FrontierConfig(**COMMON, shard_frozen=True, layers=(2, 4)),
    "sharded, recomputed": FrontierConfig(**COMMON, shard_frozen=True, recompute=True),
    "muon": FrontierConfig(**COMMON, optimiser="muon", shard_frozen=True),
    "one example a step": FrontierConfig(**(COMMON | {"batch_size": 1})),
}


JOINT_CASES: dict[str, tuple[JointConfig, JointLoss]] = {
    "joint": (JointConfig(**COMMON, trainable=FullLayer()), OutputLoss(answer=0.5)),
    "joint, lora": (JointConfig(**COMMON, optimiser="muon"), AnswerLoss()),
    "joint, one example a step": (JointConfig(**(COMMON | {"batch_size": 1})), OutputLoss()),
}


def store_of(folder: Path) -> Supervision:
    """Written by all processes: one example a batch, one batch a shard."""
    source, batches = source_model(), [collate([example]) for example in EXAMPLES]
    settings = EXACT.model_copy(update={"shard_bytes": 1})
    transport = transport_between(source, target_model())
    return supervise(source, batches, pair(), transport, folder / "store", settings=settings, resume_key="key")


def train(folder: Path, store: Any, config: FrontierConfig, name: str, **more: Any) -> None:
    """Train a target; its weights and the curve go to files of each process."""
    ranks, target = Ranks.current(), target_model()
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, float]] = []

    def record(entry: Any) -> None:
        if isinstance(entry, StepRecord):
            curve.append({**entry.losses, "norm": entry.gradient_norm})
        if isinstance(entry, StageRecord) and entry.held_out:
            curve.append(dict(zip(("before", "after"), entry.held_out, strict=True)))

    more = {"callback": record, "scratch": scratch, "held_out": store} | more
    FrontierTrainer(target, store, config, **more).fit()
    save_file(target.state_dict(), folder / f"{name}-{ranks.rank}.safetensors")
    (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(curve), encoding="utf-8")


def train_jointly(
    folder: Path, store: Any, config: JointConfig, loss: JointLoss, name: str, kill_at: int = 0, **more: Any
) -> None:
    ranks, target = Ranks.current(), target_model()
    curve: list[dict[str, float]] = []

    def record(entry: StepRecord) -> None:
        curve.append({**entry.losses, "norm": entry.gradient_norm, "step": entry.step})
        if entry.step == kill_at:
            raise KeyboardInterrupt

    try:
        JointTrainer(target, store, config, loss=loss, callback=record, **more).fit()
    except KeyboardInterrupt:
        return
    save_file(target.state_dict(), folder / f"{name}-{ranks.rank}.safetensors")
    (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(curve), encoding="utf-8")


def all_cases(folder: Path) -> None:
    store = store_of(folder)
    for name, config in CASES.items():
        train(folder, store, config, name)
    for name, (joint, loss) in JOINT_CASES.items():
        train_jointly(folder, store, joint, loss, name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    all_cases(one)
    assert run_processes(all_cases, two) == [0, 0]
    return one, two


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    steps: list[dict[str, float]] = json.loads((folder / f"{name}-0.json").read_text(encoding="utf-8"))
    return steps


def test_two_processes_write_the_store_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (Supervision.open(folder / "store") for folder in runs)
    assert {shard.file[:9] for shard in two.manifest.shards} == {"shard-000", "shard-001"}
    plain = {"files": {}, "shards": (), "residual_error": 0.0}
    assert two.manifest.model_copy(update=plain) == one.manifest.model_copy(update=plain)
    assert torch.equal(two.lengths, one.lengths)
    for index in range(len(one)):
        ours, theirs = two.collate([index], layer=1), one.collate([index], layer=1)
        assert torch.equal(ours.batch["input_ids"], theirs.batch["input_ids"])
        assert ours.reference is not None and theirs.reference is not None
        torch.testing.assert_close(ours.reference, theirs.reference)
    assert not list(runs[1].glob("*.partial")) and not list((runs[1] / "scratch").iterdir())


@pytest.mark.parametrize("name", [*CASES, *JOINT_CASES])
def test_two_processes_train_as_one(name: str, runs: tuple[Path, Path]) -> None:
    one, two = runs
    steps, expected = curve(two, name), curve(one, name)
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected, strict=True):
        assert step == pytest.approx(other, abs=1e-5, rel=1e-5)
    assert steps[0] != steps[-2]  # the last may be of a stage
    theirs = weights(one, name)
    for key, value in weights(two, name).items():
        # AdamW divides by the gradient's own size, so rounding moves an entry that has next to no gradient.
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-4)
        assert torch.equal(value, weights(two, name, rank=1)[key])  # the copies never drift apart


def on_machines_of_their_own(folder: Path) -> None:
    """Under a launcher that does not tell which processes share a machine."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    scratch = folder / f"machine-{Ranks.current().rank}"
    scratch.mkdir()
    train(folder, Supervision.open(folder / "store"), CASES["full"], "apart", scratch=scratch)
    assert not list(scratch.iterdir())


def test_processes_that_share_no_machine_train_as_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(runs[1] / "store")
    assert run_processes(on_machines_of_their_own, tmp_path) == [0, 0]
    together = weights(runs[1], "full")
    for key, value in weights(tmp_path, "apart").items():
        torch.testing.assert_close(value, together[key], rtol=1e-4, atol=1e-4)


def interrupted_and_resumed(folder: Path) -> None:
    store, (config, loss) = Supervision.open(folder / "store"), JOINT_CASES["joint"]
    for kill_at in (2, 0):
        train_jointly(folder, store, config, loss, "resumed", kill_at, checkpoints=folder / "kept")


def test_joint_training_on_two_processes_resumes_to_the_same_bits(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(runs[1] / "store")
    assert run_processes(interrupted_and_resumed, tmp_path) == [0, 0]
    assert [step["step"] for step in curve(tmp_path, "resumed")] == [3]
    undisturbed = weights(runs[1], "joint")
    for rank in (0, 1):
        assert all(torch.equal(value, undisturbed[key]) for key, value in weights(tmp_path, "resumed", rank).items())


class Faulty(Relation):
    """Never a number."""

    def total(self, step: Step) -> Tensor:
        return super().total(step) * float("nan")


def diverging(folder: Path) -> None:
    target = target_model()
    config = CASES["sharded"].model_copy(update={"guards": Guards(max_skipped=0), "rollback": None})
    with pytest.raises(DivergedError):
        FrontierTrainer(target, Supervision.open(folder / "store"), config, objective=Faulty()).fit()
    for parameter, other in zip(target.parameters(), target_model().parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_sharded_target_that_diverges_is_whole_again(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(runs[1] / "store")
    assert run_processes(diverging, tmp_path) == [0, 0]


def dying(folder: Path, dies: bool) -> None:
    ranks, steps = Ranks.current(), 0

    def record(entry: Any) -> None:
        nonlocal steps
        steps += isinstance(entry, StepRecord)
        if dies and ranks.rank == 1 and steps == 5:
            os._exit(9)

    config = CASES["full"].model_copy(update={"checkpoint_steps": 1})
    train(folder, Supervision.open(folder / "store"), config, "died", callback=record, checkpoints=folder / "kept")


def test_when_one_process_dies_the_training_ends_and_can_go_on(runs: tuple[Path, Path], tmp_path: Path) -> None:
    two = runs[1]
    (tmp_path / "store").symlink_to(two / "store")
    codes = run_processes(dying, tmp_path, True)
    assert codes[1] == 9 and codes[0] != 0
    assert len(list((tmp_path / "kept").glob("st*"))) >= 2  # a stage, and a state within the next
    assert run_processes(dying, tmp_path, False) == [0, 0]
    undisturbed = weights(two, "full")
    for rank in (0, 1):
        assert all(torch.equal(value, undisturbed[key]) for key, value in weights(tmp_path, "died", rank).items())


def live(name: str, folder: Path) -> LiveSupervision:
    source, batches = source_model(), [collate([example]) for example in EXAMPLES]
    return LiveSupervision(source, batches, pair(), transport_between(source, target_model()), settings=EXACT, key=name)


def live_case(folder: Path) -> None:
    train(folder, live("key", folder), FrontierConfig(**COMMON, objective=Relation(), trainable=FullLayer()), "live")


def test_a_live_source_on_two_processes_trains_as_a_store_does(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert run_processes(live_case, tmp_path) == [0, 0]
    stored = weights(runs[0], "full")
    for key, value in weights(tmp_path, "live").items():
        torch.testing.assert_close(value, stored[key], rtol=1e-4, atol=5e-5)
