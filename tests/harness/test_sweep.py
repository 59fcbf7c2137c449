"""Sweeps: settings are ranked by the KL on tuning rows; the held-out rows of the experiment stay unread."""

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, RunResult, load_experiment
from semalign_harness.cli.main import main
from semalign_harness.comparison import compare
from semalign_harness.comparison.sweep import sweep_config, sweep_table
from semalign_harness.grid import submit
from semalign_harness.grid.folder import keep_reason
from semalign_harness.grid.matrix import Matrix
from semalign_harness.results.comparison import Comparison
from semalign_harness.util.console import Console

from .test_comparison import made_up

RATES = ("--over", "train.learning_rate=0.1,0.4,0.2,0.3")
"""Four values, of which the smallest is best."""


def rate(experiment: Experiment) -> float:
    assert experiment.train.learning_rate is not None
    return experiment.train.learning_rate


@dataclass
class Runs:
    """Runs that are made up, in place of those that train."""

    ran: list[float] = field(default_factory=list)
    """Their learning rates, in order."""
    failing: dict[str, str] = field(default_factory=dict)
    """Why a run fails."""
    interrupted_after: int | None = None
    """Runs that end before the user presses Ctrl-C."""
    kl: Callable[[Experiment], float] = rate
    """KL that a run measures."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs end at once."""
    runs = Runs()

    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        cells = {cell.name: cell.experiment for cell in Matrix.read(folder / "matrix.json").cells}
        for place, name in enumerate(todo):
            if place == runs.interrupted_after:
                raise KeyboardInterrupt
            runs.ran.append(rate(cells[name]))
            if name in runs.failing:
                keep_reason(folder, name, runs.failing[name])
                continue
            result, kl = made_up(cells[name], 6), runs.kl(cells[name])
            rows = result.after.by_row.model_copy(update={"kl": (kl,) * 6})
            after = result.after.model_copy(update={"kl": kl, "by_row": rows})
            result.model_copy(update={"after": after}).write(folder / name / "result.json")

    monkeypatch.setattr(submit, "_run_here", run_here)
    return runs


def swept(tmp_path: Path, *more: str) -> int:
    return main(["sweep", "tiny", *more, "--quiet", "--out", str(tmp_path / "sweep")])


def found(tmp_path: Path) -> Comparison:
    return Comparison.read(tmp_path / "sweep" / "comparison.json")


def cells(tmp_path: Path) -> list[Experiment]:
    matrix = Matrix.read(tmp_path / "sweep" / "runs" / "matrix.json")
    return [cell.experiment for cell in matrix.cells]


def test_the_best_settings_come_first(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(tmp_path, *RATES) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["train.learning_rate", "KL", "answer", "NLL", "seconds"]
    rows = [line.split() for line in lines[:4]]
    assert [row[:2] for row in rows] == [[f"0.{n}", f"0.{n}000"] for n in (1, 2, 3, 4)]
    assert lines[4] == "best on further rows of the training split: train.learning_rate=0.1"
    assert lines[5] == f"sweep folder: {tmp_path / 'sweep'}"
    for row in rows:
        (name,) = (name for name in found(tmp_path).methods if name.endswith(row[0]))
        run = RunResult.read(tmp_path / "sweep" / "runs" / f"{name}_seed-0" / "result.json")
        assert row[2:] == [f"{run.after.answer_nll:.4f}", f"{run.training.seconds:.0f}"]


def test_combinations_are_variants_of_the_method(tmp_path: Path, runs: Runs) -> None:
    runs.kl = lambda experiment: experiment.train.passes * rate(experiment)
    over = ["--over", "train.passes=2,1", "--over", "train.learning_rate=0.5,0.25"]
    assert swept(tmp_path, *over, "method.kind=kd") == 0
    methods = found(tmp_path).config.methods
    assert methods["kd.passes-2_learning_rate-0.25"] == ("train.passes=2", "train.learning_rate=0.25")
    assert len(methods) == 4 and {cell.method.kind for cell in cells(tmp_path)} == {"kd"}
    (best,) = sweep_table(found(tmp_path)).splitlines()[-1:]
    assert best.endswith(": train.passes=1 train.learning_rate=0.25")


@pytest.mark.parametrize("more", [[], ["data.held_out.split=held_out"]])
def test_held_out_rows_of_the_experiment_are_never_read(more: list[str], tmp_path: Path, runs: Runs) -> None:
    assert load_experiment("tiny").data.held_out is not None
    assert swept(tmp_path, *RATES, *more) == 0
    assert {cell.data.measure_on for cell in cells(tmp_path)} == {"tuning"}


def test_a_failed_run_is_named_and_tried_again(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    name = "semalign.learning_rate-0.1"
    runs.failing = {f"{name}_seed-0": "the loss is not finite"}
    assert swept(tmp_path, *RATES) == 2
    printed = capsys.readouterr().out
    assert f"failed: {name}_seed-0: the loss is not finite" in printed
    assert printed.splitlines()[4].split() == ["0.1", "–", "–", "–"]
    assert "training split: train.learning_rate=0.2" in printed
    runs.failing = {}
    runs.ran.clear()
    assert swept(tmp_path, *RATES) == 0
    assert runs.ran == [0.1] and "training split: train.learning_rate=0.1" in capsys.readouterr().out


def test_a_run_without_a_finite_kl_has_failed(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.kl = lambda experiment: math.nan if rate(experiment) == 1 else rate(experiment)
    assert swept(tmp_path, "--over", "train.learning_rate=1,0.1,0.2") == 2
    printed = capsys.readouterr().out
    assert "failed: semalign.learning_rate-1_seed-0: its KL or NLL is not finite" in printed
    assert "training split: train.learning_rate=0.1" in printed


def test_nothing_finished_is_one_sentence(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.failing = {f"semalign.learning_rate-{value}_seed-0": "too large" for value in (0.1, 0.2)}
    assert swept(tmp_path, "--over", "train.learning_rate=0.1,0.2") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("semalign: no method has finished all its runs: semalign.learning_rate-0.1_seed-0")
    assert captured.out == "" and captured.err.count("\n") == 1


def test_an_interrupted_sweep_resumes(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.interrupted_after = 3
    assert swept(tmp_path, *RATES) == 130
    assert "interrupted; the same command resumes: semalign " in capsys.readouterr().err
    runs.interrupted_after = None
    assert swept(tmp_path, *RATES) == 0
    assert runs.ran == [0.1, 0.4, 0.2, 0.3]
    before = (tmp_path / "sweep" / "comparison.json").read_bytes()
    assert swept(tmp_path, *RATES) == 0
    assert len(runs.ran) == 4 and (tmp_path / "sweep" / "comparison.json").read_bytes() == before


def test_further_values_extend_a_sweep_and_other_settings_are_refused(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, *RATES) == 0
    runs.ran.clear()
    assert swept(tmp_path, RATES[0], f"{RATES[1]},0.05") == 0
    assert runs.ran == [0.05] and "training split: train.learning_rate=0.05" in capsys.readouterr().out
    assert swept(tmp_path, *RATES, "train.batch_size=8") == 2
    assert "learning_rate-0.1_seed-0: train.batch_size is 32 there, 8 here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["experiment.json", "rung-1"])
def test_a_folder_of_other_files_is_refused(
    name: str, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / name).touch()
    assert swept(tmp_path, *RATES) == 2
    assert "is not empty, and holds no comparison: choose another folder with --out" in capsys.readouterr().err
    assert [place.name for place in (tmp_path / "sweep").iterdir()] == [name] and not runs.ran


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["--over key.key=value,value"]),
        ([*RATES, "--jobs", "0"], ["--jobs 0", "at least 1"]),
        (["--over", "data.held_out.split=train,held_out"], ["training split", "data.held_out.split"]),
        (["--over", "data.held_out=null"], ["training split", "data.held_out"]),
        (["--over", "data={measure_on: held_out}"], ["training split", "data.measure_on"]),
        (["--over", "data.measure_on=held_out,tuning"], ["--over", "data.measure_on"]),
        (["--over", "data.seed=0,1"], ["--over varies data.seed", "semalign submit"]),
        (["--over", "data.train_rows=8,16"], ["data.train_rows", "the same models and the same rows"]),
        (["--over", "source.path=a,b"], ["source.path"]),
        (["--over", "train.seed=0,1"], ["train.seed: methods share their seeds"]),
        (["--over", "train.lerning_rate=1,2"], ["did you mean 'learning_rate'"]),
        ([*RATES, "train.learning_rate=1"], ["both varied by --over and set"]),
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
    over = ["method.layers=[[1, 2], null]", "method.objective={kind: cosine}", "pairing.kind=uniform"]
    result = compare(sweep_config("tiny", over=over), tmp_path / "sweep")
    last = sweep_table(result).splitlines()[-1]
    assert """'method.objective={"kind": "cosine"}'""" in last and "pairing.kind=uniform" in last
    method = load_experiment("tiny", overrides=shlex.split(last.partition(": ")[2])).method.model_dump(mode="json")
    (text,) = (word for word in shlex.split(last.partition(": ")[2]) if word.startswith("method.layers="))
    assert method["layers"] == json.loads(text.partition("=")[2]) and method["objective"]["kind"] == "cosine"


def test_runs_that_train(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        for name in todo:
            with contextlib.suppress(SemalignError):
                submit.CellRun(str(folder))(name)

    monkeypatch.setattr(submit, "_run_here", run_here)
    assert swept(tmp_path, *overrides, "--over", "train.learning_rate=1e-3,1e-1", "measure.answer_rows=0") == 0
    methods = found(tmp_path).methods
    assert list(methods) == ["semalign.learning_rate-1e-3", "semalign.learning_rate-1e-1"]
    for name, method in methods.items():
        run = RunResult.read(tmp_path / "sweep" / "runs" / f"{name}_seed-0" / "result.json")
        assert method.metrics["KL"].estimate.value == pytest.approx(run.after.kl)
