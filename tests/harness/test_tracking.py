"""Trackers are told what `metrics.jsonl` is told, once; none of them can stop or change a run."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from semalign_geometry.base import SemalignError
from semalign_harness.cli.main import main
from semalign_harness.run import tracking
from semalign_harness.run.tracking import Metrics, Start, figures, find_trackers
from semalign_train import StepRecord
from semalign_train._loop import Loop


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.told: list[tuple[int, dict[str, float]]] = []
        self.whole: bool | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.told.append((step, dict(values)))

    def finish(self, *, whole: bool) -> None:
        self.whole = whole


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The trackers that were started in place of trackio."""
    found: list[Recorder] = []
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    monkeypatch.setitem(tracking.TRACKERS, "trackio", lambda start: found.append(Recorder(start)) or found[-1])
    return found


def run(folder: Path, settings: list[str], *more: str) -> int:
    return main(["run", "tiny", *settings, *more, "--quiet", "--out", str(folder)])


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trained(recorder: Recorder) -> list[tuple[int, dict[str, float]]]:
    return [(step, values) for step, values in recorder.told if any(name.startswith("train/") for name in values)]


@pytest.mark.parametrize("method", ["semalign", "kd", "laten"])
def test_tensorboard_holds_what_the_metrics_hold(method: str, tmp_path: Path, overrides: list[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = [*overrides, f"method.kind={method}", *(["method.steps=2"] if method == "laten" else [])]
    assert run(tmp_path / "run", settings, "--track", "tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = [figures("train", step) for step in steps(tmp_path / "run")]
    assert {"train/gradient_norm", "train/learning_rate"} < set(expected[0])
    for name in expected[0]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(n, pytest.approx(values[name])) for n, values in enumerate(expected, 1)]
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert [event.value for event in events.Scalars("result/after/kl")] == [pytest.approx(result["after"]["kl"])]
    assert events.SummaryMetadata("_hparams_/session_start_info")


def test_an_interrupted_run_goes_on_in_its_tracker(
    tmp_path: Path, overrides: list[str], recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*overrides, "train.steps=4", "train.checkpoint_steps=2", "method.rollback=10"]
    step = Loop._step

    def stopping(self: Loop, number: int, *arguments: Any) -> StepRecord:
        if (self._layer, number) == (2, 4):
            raise KeyboardInterrupt
        return step(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stopping)
        assert run(tmp_path / "run", settings, "--track", "trackio") == 130
    assert run(tmp_path / "run", settings, "--track", "trackio") == 0
    first, second = recorders
    assert not first.start.resumed and second.start.resumed and first.start.id == second.start.id
    assert (first.whole, second.whole) == (False, True)
    expected = [figures("train", step) for step in steps(tmp_path / "run")]
    expected = [{key: value for key, value in values.items() if "second" not in key} for values in expected]
    told = trained(first) + trained(second)
    assert [number for number, _ in told] == list(range(1, 13))
    for (_, values), wanted in zip(told, expected, strict=True):
        assert {key: value for key, value in values.items() if "second" not in key} == pytest.approx(wanted)
    stages = [(step, values["stage/layer"]) for step, values in first.told + second.told if "stage/layer" in values]
    assert stages == [(4, 1), (8, 2), (12, 3)]
    assert all("stage/held_out/before" in values for _, values in first.told if "stage/layer" in values)
    last, result = second.told[-1]
    assert last == 13 and result["result/training/steps"] == 12 and "result/before/kl" in result


def test_a_tracker_that_is_new_to_a_run_is_told_its_steps(
    tmp_path: Path, overrides: list[str], recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("semalign_harness.run.pipeline.save_and_reload", lambda *_: sys.exit(3))
        with pytest.raises(SystemExit):
            run(tmp_path / "run", overrides)
    assert run(tmp_path / "run", overrides, "--track", "trackio") == 0
    assert [number for number, _ in trained(recorders[0])] == [1, 2, 3, 4, 5, 6]
    assert recorders[0].start.config["train"]["steps"] == 2


def test_a_tracker_that_fails_later_is_left_behind_with_one_warning(
    tmp_path: Path, overrides: list[str], recorders: list[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Recorder):
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise ConnectionError("no network")

    tracking.TRACKERS["trackio"] = Failing  # which the fixture puts back
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "run", overrides, "--track", "trackio") == 0
    told = [record.getMessage() for record in caplog.records if record.name == "semalign_harness.run.tracking"]
    assert told == ["trackio fails and is dropped: no network; metrics.jsonl holds every step"]
    assert len(steps(tmp_path / "run")) == 6


def test_a_tracker_that_does_not_start_is_one_sentence(
    tmp_path: Path, overrides: list[str], recorders: list[Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(start: Start) -> Recorder:
        raise RuntimeError("no key")

    tracking.TRACKERS["trackio"] = refuse
    assert run(tmp_path / "run", overrides, "--track", "trackio") == 2
    assert "semalign: trackio does not start (no key)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_names_are_checked_before_anything_starts(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for command in ("run", "submit", "compare", "sweep"):
        over = ["--over", "train.seed=0,1"] if command in ("submit", "sweep") else []
        assert main([command, "tiny", *overrides, *over, "--track", "wandb", "--out", str(tmp_path / "run")]) == 2
        assert 'wandb is not installed: pip install "semalign-harness[wandb]"' in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    with pytest.raises(SemalignError, match="tracker 'wandbb' is unknown: choose among tensorboard, wandb, trackio"):
        find_trackers(["wandbb"])
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    assert find_trackers(["wandb,trackio", "wandb"]) == ("wandb", "trackio")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_libraries_get_name_config_and_steps(
    name: str, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", {"step": step, **values}))

        def finish(self, **settings: Any) -> None:
            calls.append(("finish", settings))

    fake: Any = ModuleType(name)
    fake.Settings = lambda **settings: settings
    fake.init = lambda **settings: calls.append(("init", settings)) or Run()
    monkeypatch.setitem(sys.modules, name, fake)
    assert run(tmp_path / "mine", overrides, "--track", name) == 0
    assert [call for call, _ in calls] == ["init", *["log"] * (6 + 3 + 1), "finish"]
    settings = calls[0][1]
    assert (settings["project"], settings["name"]) == ("semalign", "mine")
    assert settings["config"]["train"]["steps"] == 2
    assert calls[-1][1] == ({"exit_code": 0} if name == "wandb" else {})


def test_a_method_without_trackers_writes_the_metrics_alone(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    counts = ("steps", "gradient_norm", "learning_rate", "supervised_tokens", "tokens", "seconds", "tokens_per_second")
    values: Any = dict.fromkeys(counts, 1)
    for number in (1, 2):
        record = StepRecord(layer=0, step=number, losses={}, gradient_norms={}, **values)
        assert metrics.add(record) == number - 1
    metrics.close(whole=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
