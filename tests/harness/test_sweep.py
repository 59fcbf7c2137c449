"""Sweeps: the better half goes on with twice the passes, and held-out rows of the experiment are never looked at."""

import contextlib
import csv
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from semalign_geometry import SemalignError
from semalign_harness import Experiment, RunResult, load_experiment
from semalign_harness.cli.main import main
from semalign_harness.comparison.sweep import Sweep, Trial, sweep, sweep_table
from semalign_harness.grid import submit
from semalign_harness.grid.matrix import Matrix
from semalign_harness.util.console import Console

from ..contracts import assert_keeps_the_laws
from .test_comparison import made_up

RATES = ("--over", "train.learning_rate=0.1,0.4,0.2,0.3")
"""Four values, of which the smallest is best."""


def rate(experiment: Experiment) -> float:
    return experiment.train.learning_rate


@dataclass
class Runs:
    """Runs that are made up, in place of those that train."""

    ran: list[str] = field(default_factory=list)
    """Folder of the rung and name of the cell, in order."""
    failing: dict[str, str] = field(default_factory=dict)
    """Why a cell fails."""
    interrupted_after: int | None = None
    """Cells of a rung that end before the user presses Ctrl-C."""
    kl: Callable[[Experiment], float] = rate
    """What a run measures."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Cells end at once."""
    runs = Runs()

    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        cells = {cell.name: cell.experiment for cell in Matrix.read(folder / "matrix.json").cells}
        for place, name in enumerate(todo):
            if place == runs.interrupted_after:
                raise KeyboardInterrupt
            runs.ran.append(f"{folder.name}/{name}")
            if name in runs.failing:
                submit._keep_reason(folder, name, runs.failing[name])
                continue
            result = made_up(cells[name], 6)
            after = result.after.model_copy(update={"kl": runs.kl(cells[name])})
            result.model_copy(update={"after": after}).write(folder / name / "result.json")

    monkeypatch.setattr(submit, "_run_here", run_here)
    return runs


def swept(tmp_path: Path, *more: str) -> int:
    return main(["sweep", "tiny", *more, "--quiet", "--out", str(tmp_path / "sweep")])


def found(tmp_path: Path) -> Sweep:
    return Sweep.read(tmp_path / "sweep" / "sweep.json")


def rates(trials: Sequence[Trial], rung: int) -> list[float]:
    return [trial.values["train.learning_rate"] for trial in trials if trial.rung == rung]


def cells(tmp_path: Path, rung: int) -> dict[str, Experiment]:
    matrix = Matrix.read(tmp_path / "sweep" / f"rung-{rung}" / "matrix.json")
    return {cell.name: cell.experiment for cell in matrix.cells}


def test_rungs_halve_while_the_passes_double(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(tmp_path, *RATES, "--rungs", "3", "train.passes=6") == 0
    result = found(tmp_path)
    assert [trial.rung for trial in result.trials] == [3, 2, 2, 1, 1, 1, 1]
    assert [rates(result.trials, rung) for rung in (1, 2, 3)] == [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2], [0.1]]
    assert {trial.rung: trial.passes for trial in result.trials} == {1: 1.5, 2: 3, 3: 6}, "the last has all"
    for rung, passes in ((1, 1.5), (2, 3), (3, 6)):
        assert {cell.train.passes for cell in cells(tmp_path, rung).values()} == {passes}
    assert result.best.values == {"train.learning_rate": 0.1} and result.best.kl == 0.1 and not result.failed
    printed = capsys.readouterr().out
    assert "trials: 4 with 1.5 passes, 2 with 3 passes, 1 with 6 passes" in printed
    assert "best on further rows of the training split: train.learning_rate=0.1\n" in printed
    assert str(tmp_path / "sweep") in printed


def test_figures_are_those_of_the_runs(tmp_path: Path, runs: Runs) -> None:
    assert swept(tmp_path, *RATES, "--rungs", "2") == 0
    result = found(tmp_path)
    for trial in result.trials:
        name = f"learning_rate-{trial.values['train.learning_rate']}"
        run = RunResult.read(tmp_path / "sweep" / f"rung-{trial.rung}" / name / "result.json")
        assert (trial.kl, trial.answer_nll, trial.seconds) == (
            run.after.kl,
            run.after.answer_nll,
            run.training.seconds,
        )
    with (tmp_path / "sweep" / "sweep.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line, trial in zip(lines, result.trials, strict=True):
        keys = ("rung", "passes", "train.learning_rate", "kl", "answer_nll", "seconds")
        figures = [trial.rung, trial.passes, rate(cells(tmp_path, 1)[f"learning_rate-{line['train.learning_rate']}"])]
        assert [float(line[key]) for key in keys] == [*figures, trial.kl, trial.answer_nll, trial.seconds]
        assert line["note"] == ""


def test_a_grid_is_sorted_and_has_the_passes_of_its_cells(tmp_path: Path, runs: Runs) -> None:
    runs.kl = lambda experiment: experiment.train.passes * experiment.method.weights.geometry
    assert swept(tmp_path, "--over", "train.passes=2,1", "--over", "method.weights.geometry=0.5,0.25") == 0
    assert [(trial.kl, trial.passes) for trial in found(tmp_path).trials] == [(0.25, 1), (0.5, 2), (0.5, 1), (1, 2)]
    assert swept(tmp_path / "steps", "--over", "train.steps=1,2") == 0
    assert [trial.passes for trial in found(tmp_path / "steps").trials] == [None, None]


@pytest.mark.parametrize("more", [[], ["data.held_out.split=held_out"], ["--rungs", "2"]])
def test_held_out_rows_of_the_experiment_are_never_looked_at(more: list[str], tmp_path: Path, runs: Runs) -> None:
    assert load_experiment("tiny").data.held_out is not None
    assert swept(tmp_path, *RATES, *more) == 0
    for rung in range(1, 2 + ("--rungs" in more)):
        assert all(cell.data.measure_on == "tuning" for cell in cells(tmp_path, rung).values())


def test_a_failed_trial_is_told_and_tried_again(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.failing = {"learning_rate-0.1": "the loss is not finite"}
    assert swept(tmp_path, *RATES, "--rungs", "2") == 2
    result, printed = found(tmp_path), capsys.readouterr().out
    assert result.failed and rates(result.trials, 2) == [0.2, 0.3]
    failed = result.trials[-1]
    assert (failed.rung, failed.kl, failed.note) == (1, None, "learning_rate-0.1: the loss is not finite")
    assert "failed: learning_rate-0.1: the loss is not finite (rung 1)" in printed
    assert "training split: train.learning_rate=0.2" in printed
    # Once it succeeds, it is among the better half.
    runs.failing = {}
    runs.ran.clear()
    assert swept(tmp_path, *RATES, "--rungs", "2") == 0
    assert runs.ran == ["rung-1/learning_rate-0.1", "rung-2/learning_rate-0.1"]
    assert rates(found(tmp_path).trials, 2) == [0.1, 0.2]


def test_nothing_finished_is_one_sentence(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.failing = {f"learning_rate-{value}": "too large" for value in (0.1, 0.2)}
    assert swept(tmp_path, "--over", "train.learning_rate=0.1,0.2", "--rungs", "2") == 2
    captured = capsys.readouterr()
    assert captured.err == "semalign: every run of rung 1 failed, such as learning_rate-0.1: too large\n"
    assert captured.out == "" and not (tmp_path / "sweep" / "sweep.json").exists()


def test_an_interrupted_sweep_goes_on(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    call = [*RATES, "--rungs", "2"]
    runs.interrupted_after = 3
    assert swept(tmp_path, *call) == 130
    assert "interrupted; the same command resumes: semalign " in capsys.readouterr().err
    runs.interrupted_after = 1
    assert swept(tmp_path, *call) == 130
    runs.interrupted_after = None
    assert swept(tmp_path, *call) == 0
    assert len(runs.ran) == len(set(runs.ran)) == 6
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    assert swept(tmp_path, *call) == 0
    assert len(runs.ran) == 6 and (tmp_path / "sweep" / "sweep.json").read_bytes() == before


def test_further_values_extend_a_sweep_and_other_settings_are_refused(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, *RATES, "--rungs", "2") == 0
    runs.ran.clear()
    assert swept(tmp_path, RATES[0], f"{RATES[1]},0.05", "--rungs", "2") == 0
    assert runs.ran == ["rung-1/learning_rate-0.05", "rung-2/learning_rate-0.05"]
    assert found(tmp_path).best.values == {"train.learning_rate": 0.05}
    capsys.readouterr()
    assert swept(tmp_path, *RATES) == 2
    assert "learning_rate-0.1: train.passes is 6.0 there, 12.0 here" in capsys.readouterr().err
    assert swept(tmp_path, *RATES, "--rungs", "2", "train.batch_size=8") == 2
    assert "train.batch_size is 32 there, 8 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["--over", "method.weights.output=1,2"], "varies train.learning_rate there, method.weights.output here"),
        (
            [*RATES, "--over", "train.seed=1"],
            "varies train.learning_rate there, train.learning_rate and train.seed here",
        ),
    ],
)
def test_a_sweep_over_other_keys_is_refused(
    keys: list[str], words: str, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, *RATES) == 0
    capsys.readouterr()
    file = tmp_path / "sweep" / "rung-1" / "matrix.json"
    before = file.read_bytes()
    assert swept(tmp_path, *keys) == 2
    sentence = capsys.readouterr().err
    assert words in sentence and "choose another folder with --out" in sentence and file.read_bytes() == before


@pytest.mark.parametrize("name", ["experiment.json", "runs"])
def test_a_folder_of_other_files_is_refused(
    name: str, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / name).touch()
    assert swept(tmp_path, *RATES) == 2
    assert "is not empty, and holds no sweep: choose another folder with --out" in capsys.readouterr().err
    assert [place.name for place in (tmp_path / "sweep").iterdir()] == [name] and not runs.ran


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["--over key.key=value,value"]),
        ([*RATES, "--rungs", "0"], ["--rungs 0", "at least 1"]),
        ([*RATES, "--jobs", "0"], ["--jobs 0", "at least 1"]),
        ([*RATES, "--rungs", "2", "train.steps=5"], ["leave train.steps and --over train.passes out"]),
        (["--over", "train.passes=1,2", "--rungs", "2"], ["leave train.steps and --over train.passes out"]),
        (["--over", "train.steps=1,2", "--rungs", "2"], ["leave train.steps and --over train.passes out"]),
        (
            ["--over", "train={passes: 4},{passes: 5}", "--rungs", "2"],
            ["leave train.steps and --over train.passes out"],
        ),
        (["--over", "data.held_out.split=train,held_out"], ["training split", "data.held_out.split out"]),
        (["--over", "data.held_out=null"], ["training split", "data.held_out out"]),
        (["--over", "data.measure_on=held_out,tuning"], ["training split", "data.measure_on out"]),
        (["--over", "data={measure_on: held_out}"], ["training split", "data.measure_on out"]),
        (["--over", "data.seed=0,1"], ["--over varies data.seed", "semalign submit"]),
        (["--over", "data.train_rows=8,16"], ["data.train_rows", "the same models and rows"]),
        (["--over", "source.path=a,b"], ["source.path"]),
        (["--over", "train.lerning_rate=1,2"], ["did you mean 'learning_rate'"]),
        ([*RATES, "train.learning_rate=1"], ["varied by --over and set besides"]),
    ],
)
def test_wrong_input_is_one_sentence(
    more: list[str], words: list[str], tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, *more) == 2
    captured = capsys.readouterr()
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("semalign: ") and captured.out == ""
    for word in words:
        assert word in sentence
    assert not runs.ran and not list(tmp_path.iterdir()), "nothing is written"


def test_without_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 2
    assert "sweep needs an experiment" in capsys.readouterr().err


def test_the_best_settings_can_be_pasted(tmp_path: Path, runs: Runs) -> None:
    result = sweep("tiny", tmp_path / "sweep", over=["method.layers=[[1, 2], null]", "method.objective={kind: cosine}"])
    *_, last = sweep_table(result).splitlines()
    assert "'method.layers=[1, 2]'" in last or "method.layers=null" in last
    assert """'method.objective={"kind": "cosine"}'""" in last
    given = shlex.split(last.partition(": ")[2])
    experiment = load_experiment("tiny", overrides=given)
    assert (
        json.loads(experiment.train.model_dump_json(include={"layers"}))["layers"]
        == result.best.values["method.layers"]
    )
    assert experiment.method.objective.model_dump()["kind"] == "cosine"


def test_contracts_keep_the_laws(tmp_path: Path, runs: Runs) -> None:
    result = sweep("tiny", tmp_path / "sweep", over=["train.learning_rate=0.1,0.2"])
    for value in (result, result.best):
        assert_keeps_the_laws(value)


def test_trials_that_train(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        for name in todo:
            with contextlib.suppress(SemalignError):
                submit.CellRun(str(folder))(name)

    monkeypatch.setattr(submit, "_run_here", run_here)
    settings = [text for text in overrides if not text.startswith("train.steps")]
    rungs = ["--rungs", "2", "train.passes=1.5", "measure.answer_rows=0"]
    assert swept(tmp_path, *settings, "--over", "train.learning_rate=1e-3,1e-1", *rungs) == 0
    result = found(tmp_path)
    assert len(result.trials) == 3 and result.best.passes == 1.5
    assert None not in [trial.kl for trial in result.trials]
    (name,) = cells(tmp_path, 2)
    run = RunResult.read(tmp_path / "sweep" / "rung-2" / name / "result.json")
    assert result.best.kl == run.after.kl and run.training.steps == 2 * 3 // 2


def test_a_run_without_a_finite_kl_has_failed(tmp_path: Path, runs: Runs) -> None:
    runs.kl = lambda experiment: math.nan if experiment.train.learning_rate == 1 else rate(experiment)
    assert swept(tmp_path, "--over", "train.learning_rate=1,0.1,0.2") == 2
    first, *_, last = found(tmp_path).trials
    assert first.values == {"train.learning_rate": 0.1}
    assert (
        last.kl is None and last.note == "learning_rate-1: the KL to the source is not finite: leave this setting out"
    )
