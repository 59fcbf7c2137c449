"""A run that is killed and repeated resumes, to the same weights; a folder has one experiment and one process."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from semalign_harness import Experiment
from semalign_harness.cli.main import main
from semalign_harness.loading import load_experiment
from semalign_harness.methods import _semalign, settings_of
from semalign_harness.report import _write
from semalign_harness.results.run import RunResult
from semalign_harness.results.source_phase import SourcePhase
from semalign_harness.run import pipeline, source_phase
from semalign_harness.run.run_folder import claimed, cut_metrics, differences, pick_folder, steps_of
from semalign_train import StepRecord
from semalign_train._loop import Loop

KILLS = int(os.environ.get("SEMALIGN_KILLS", "3"))
"""Kills of the test that kills; each costs some seconds."""


@pytest.fixture
def longer(overrides: list[str]) -> list[str]:
    """A run with enough steps to be killed in the middle."""
    return [*overrides, "train.steps=12", "train.checkpoint_steps=2", "method.trainable.kind=full"]


def run(folder: Path, settings: list[str], *more: str) -> int:
    return main(["run", "tiny", *settings, *more, "--out", str(folder)])


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, at: Any, folder: Path, settings: list[str]) -> None:
    """A run that ends when the training has come to a step, or when a function is called."""
    with monkeypatch.context() as patch:
        if isinstance(at, str):

            def stop(*arguments: object, **more: object) -> None:
                raise KeyboardInterrupt

            patch.setattr({"_train": _semalign, "write_report": _write}.get(at, pipeline), at, stop)
        else:
            watch_steps(patch, stop_at=at)
        assert run(folder, settings) == 130


def watch_steps(monkeypatch: pytest.MonkeyPatch, *, stop_at: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """The steps that run, each with its layer, 0 without stages; the run ends before one of them."""
    seen: list[tuple[int, int]] = []
    step = Loop._step

    def watched(self: Loop, number: int, *arguments: Any) -> StepRecord:
        if (self._layer, number) == stop_at:
            raise KeyboardInterrupt
        seen.append((self._layer, number))
        return step(self, number, *arguments)

    monkeypatch.setattr(Loop, "_step", watched)
    return seen


def test_killed_at_any_moment_and_repeated(tmp_path: Path, longer: list[str]) -> None:
    found: list[list[list[str]]] = []
    command = [sys.executable, "-m", "semalign_harness.cli.main", "run", "tiny", *longer, "--out"]

    def environment(name: str) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "SEMALIGN_CACHE": str(tmp_path / "caches" / name)}

    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], env=environment("whole"), check=True, capture_output=True)
    duration = time.monotonic() - started
    generator = random.Random(7)
    hits = 0
    for _ in range(KILLS + 8):
        killed = [*command, str(tmp_path / "killed")]
        process = subprocess.Popen(
            killed, env=environment("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.5, 1.0) * duration)
        process.kill()
        hits += process.wait() == -signal.SIGKILL
        if hits == KILLS:
            break
        if process.returncode == 0:  # faster than the whole run, beside which the machine had more to do
            duration *= 0.7
            shutil.rmtree(tmp_path / "killed")
            shutil.rmtree(tmp_path / "caches" / "killed")
    assert hits, "no run was killed"
    subprocess.run([*command, str(tmp_path / "killed")], env=environment("killed"), check=True, capture_output=True)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    for place in ("killed", "caches/killed/supervision"), ("whole", "caches/whole/supervision"):
        names = [sorted(str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*")) for name in place]
        found.append([[name for name in each if "/users" not in name] for each in names])
    assert found[0] == found[1], "nothing is left over"


@pytest.mark.parametrize("at", [(1, 1), (2, 6), (3, 12), "source_stores", "_train", "save_and_reload"])
def test_an_interrupted_run_goes_on(
    at: Any, tmp_path: Path, longer: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("SEMALIGN_CACHE", str(tmp_path / "another"))
        assert run(tmp_path / "whole", longer, "--quiet") == 0
    folder = tmp_path / "run"
    interrupt(monkeypatch, at, folder, longer)
    assert "the same command resumes" in capsys.readouterr().err
    assert not (folder / "result.json").exists()
    steps_run = watch_steps(monkeypatch)
    if at != "source_stores":
        monkeypatch.setattr(source_phase, "_make", None)  # the source is not needed again
    assert run(folder, longer) == 0
    assert "resuming the interrupted run" in capsys.readouterr().err
    peaks = [RunResult.read(place / "result.json").training_peak_bytes for place in (folder, tmp_path / "whole")]
    assert peaks[0] is None and peaks[1], "an earlier process took its own memory"
    assert weights(folder) == weights(tmp_path / "whole")
    if isinstance(at, tuple):
        assert steps_run[0] == at, "it resumes with the step that was interrupted"
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["layer"], r["step"]) for r in read] == [(layer, n) for layer in (1, 2, 3) for n in range(1, 13)]


@pytest.mark.parametrize(
    ("at", "place"),
    [
        ((2, 6), "the training after step 5 of layer 2"),
        ((2, 1), "the training after layer 1"),
        ((1, 1), "at the first step of the training"),
        ("source_stores", "before the training, where finished answers and supervision are kept"),
        ("save_and_reload", "the training after layer 3"),
        ("write_report", "with the report of the finished run"),
    ],
)
def test_ctrl_c_says_where_the_command_resumes(
    at: Any,
    place: str,
    tmp_path: Path,
    overrides: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default, without `checkpoint_steps`."""
    interrupt(monkeypatch, at, tmp_path / "run", [*overrides, "train.steps=6"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"semalign: interrupted; the same command resumes {place}: semalign run tiny ")


@pytest.mark.parametrize("method", ["kd", "kd_full", "pissa", "hidden", "seeking"])
def test_an_interrupted_method_without_stages_goes_on_from_the_state_that_was_kept(
    method: str, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [f"{key}={json.dumps(value)}" for key, value in settings_of(method).items()]
    given = [*overrides, *named, "train.steps=4", "train.checkpoint_steps=5", "--quiet"]
    assert run(tmp_path / "whole", given) == 0
    with monkeypatch.context() as patch:
        watch_steps(patch, stop_at=(0, 8))
        assert run(tmp_path / "run", given) == 130
    ran = watch_steps(monkeypatch)
    random_state = torch.get_rng_state()
    assert run(tmp_path / "run", given) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert ran == [(0, number) for number in range(8, 13)], "it resumes with the step that was interrupted"
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert [step["step"] for step in steps_of(tmp_path / "run")] == list(range(1, 13))
    reports = [RunResult.read(tmp_path / name / "result.json").training for name in ("run", "whole")]
    assert len({(each.steps, each.supervised_tokens, each.trained_parameters) for each in reports}) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, longer: list[str]) -> None:
    given = ["run", "tiny", *longer, "train.steps=3000", "--out", str(tmp_path / "run")]
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 180
    # A child would inherit that Ctrl-C is ignored, as it is for what a shell runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "semalign_harness", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        try:
            while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    told, _, again = err.splitlines()[-1].partition(" -m semalign_harness ")
    place = r"(the training after step \d+ of layer \d|at the first step of the training|before the training, .*)"
    assert re.fullmatch(rf"semalign: interrupted; the same command resumes {place}: \S*python\S*", told)
    assert again == shlex.join(given)
    assert "\r" not in err and "Traceback" not in err
    assert (tmp_path / "run" / "experiment.json").is_file() and not (tmp_path / "run" / "result.json").exists()


def test_a_finished_run_is_shown_not_repeated(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "run", overrides) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(pipeline, "read_inputs", None)  # nothing is opened
    assert run(tmp_path / "run", overrides) == 0
    assert capsys.readouterr().out == first


def test_another_experiment_is_refused_with_the_difference(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", overrides, "--quiet") == 0
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))}
    assert run(tmp_path / "run", overrides, "train.learning_rate=0.5", "train.seed=3") == 2
    message = capsys.readouterr().err
    assert "train.learning_rate is" in message and "there, 0.5 here; train.seed is 0 there, 3 here" in message
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))} == before


def test_changed_rows_are_refused(
    tmp_path: Path,
    longer: list[str],
    rows_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(rows_file.read_bytes())
    settings = [*longer, f"data.train.path={mine}"]
    interrupt(monkeypatch, (1, 3), tmp_path / "run", settings)
    mine.write_bytes(b"".join(reversed(rows_file.read_bytes().splitlines(keepends=True))))
    assert run(tmp_path / "run", settings) == 2
    assert f"the file {mine} changed from " in (message := capsys.readouterr().err) and "since the run" in message
    mine.write_bytes(rows_file.read_bytes())
    assert run(tmp_path / "run", settings, "--quiet") == 0


@pytest.mark.parametrize("damage", ["cut", "bit", "shard", "manifest", "pairing.json", "phase.json", "no pairing.json"])
@pytest.mark.parametrize("store", ["supervision", "held_out"])
def test_damaged_supervision_is_made_again(
    store: str,
    damage: str,
    tmp_path: Path,
    longer: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    interrupt(monkeypatch, (2, 5), folder, longer)
    place = Path(SourcePhase.read(folder / "supervision.json").folder)
    shard = place / store / "shard-000-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    if damage == "cut":
        shard.write_bytes(content[:-100])
    elif damage == "bit":
        shard.write_bytes(content)
    elif damage.endswith(".json"):
        record = place / damage.removeprefix("no ")
        record.unlink() if damage.startswith("no ") else record.write_text('{"kind', encoding="utf-8")
    else:
        (shard if damage == "shard" else place / store / "manifest.json").unlink()
    assert run(folder, longer) == 0
    assert "made again" in capsys.readouterr().err
    assert run(tmp_path / "whole", longer, "--quiet") == 0
    assert weights(folder) == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "at", ["environment.json", "experiment.json", "supervision.json", "before.json", "result.json"]
)
@pytest.mark.parametrize("half_written", [False, True])
def test_killed_while_a_file_is_written(
    at: str, half_written: bool, tmp_path: Path, longer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9: no cleaning up runs."""
    folder, longer = tmp_path / "run", [*longer, "name=run"]

    def replace(source: str, goal: Path) -> None:
        if Path(goal).name == at:
            if half_written:
                shutil.copy(source, folder / f".{at}.abcdef")
            raise KeyboardInterrupt
        rename(source, goal)

    rename = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert run(folder, longer) == 130
    assert pick_folder(tmp_path, load_experiment("tiny", overrides=longer)).name == "run"
    assert run(folder, longer, "--quiet") == 0
    assert (folder / "result.json").is_file() and not list(folder.glob(".*"))


def test_what_others_keep_in_the_folder_stays(
    tmp_path: Path, longer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    interrupt(monkeypatch, (1, 3), folder, longer)
    (folder / ".git").mkdir()
    assert run(folder, longer, "--quiet") == 0
    assert (folder / ".git").is_dir()


def test_how_often_states_are_kept_may_change(
    tmp_path: Path, longer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, (2, 6), tmp_path / "run", longer)
    assert run(tmp_path / "run", longer, "train.checkpoint_steps=5", "--quiet") == 0


def test_other_threads_are_refused(
    tmp_path: Path, longer: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, (2, 6), tmp_path / "run", longer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert run(tmp_path / "run", longer) == 2
    told = "the number of CPU threads changed from 1 to 3 (OMP_NUM_THREADS=1 restores it), since the run in "
    assert told + str(tmp_path / "run") in capsys.readouterr().err


def test_one_process_at_a_time(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    experiment = load_experiment("tiny", overrides=overrides)
    with claimed(tmp_path / "run", experiment):
        assert run(tmp_path / "run", overrides) == 2
        assert "another process runs in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "an empty folder does not stay"


def test_an_interrupted_run_is_found_by_its_experiment(tmp_path: Path, overrides: list[str]) -> None:
    experiment = load_experiment("tiny", overrides=overrides)
    other = load_experiment("tiny", overrides=[*overrides, "train.seed=5"])
    assert pick_folder(tmp_path, experiment).name == "tiny"
    experiment.write(tmp_path / "tiny" / "experiment.json")
    assert pick_folder(tmp_path, experiment).name == "tiny"
    assert pick_folder(tmp_path, other).name == "tiny-2"
    with FileLock(tmp_path / "tiny" / ".lock"):
        assert pick_folder(tmp_path, experiment).name == "tiny-2", "a running one is left alone"
    (tmp_path / "tiny" / "result.json").write_text("{}", encoding="utf-8")
    assert pick_folder(tmp_path, experiment).name == "tiny", "its report is missing"
    (tmp_path / "tiny" / "report.html").write_text("", encoding="utf-8")
    assert pick_folder(tmp_path, experiment).name == "tiny-2"
    (tmp_path / "tiny" / "result.json").unlink()
    (tmp_path / "tiny" / "experiment.json").write_text("{", encoding="utf-8")
    assert pick_folder(tmp_path, experiment).name == "tiny-2"


def test_differences_name_each_setting(overrides: list[str]) -> None:
    one = load_experiment("tiny", overrides=overrides)
    other = load_experiment("tiny", overrides=[*overrides, "method.trainable.kind=lora", "data.seed=9"])
    found = "; ".join(differences(one, other))
    assert "data.seed is 0 there, 9 here" in found and "method.trainable.rank is None there, 16 here" in found
    assert differences(one, Experiment.parse(one.model_dump(mode="json"))) == []


def test_metrics_are_cut_before_a_step(tmp_path: Path) -> None:
    steps = [(1, 1), (1, 2), (2, 1), (2, 2)]
    lines = [json.dumps({"layer": layer, "step": step}) for layer, step in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"lay', encoding="utf-8")
    values = {name: 1 for name in ("steps", "gradient_norm", "learning_rate", "supervised_tokens", "tokens")}
    at = StepRecord(layer=2, step=2, losses={}, gradient_norms={}, seconds=1, tokens_per_second=1, **values)
    assert cut_metrics(tmp_path, at) == 3
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines() == lines[:3]


def test_training_that_diverges_leaves_its_batch(
    tmp_path: Path, longer: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", longer, "train.learning_rate=1e30", "train.warmup=0") == 2
    message = capsys.readouterr().err
    assert "the gradient is not finite" in message and "diverged.json" in message
    found = json.loads((tmp_path / "run" / "diverged.json").read_text(encoding="utf-8"))
    assert found["step"]["skipped"] and len(found["batch"]) == 8
    assert all(row["text"] and row["input_ids"] for row in found["batch"])


def test_a_stage_that_is_undone_is_reported(
    tmp_path: Path, longer: list[str], pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    itself = [f"source.path={pair[1]}", "pairing.kind=uniform"]  # no step can improve on the source
    settings = [*longer, *itself, "method.rollback=0", "train.learning_rate=0.1"]
    assert run(tmp_path / "run", settings) == 0
    assert "undone, the held-out loss rose from" in capsys.readouterr().err
