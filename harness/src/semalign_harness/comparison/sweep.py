"""A grid of settings, or a tournament among them: the best by the KL on held-out rows, all from one supervision."""

import csv
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semalign_geometry import Contract, SemalignError, Settings, replace_file

from ..experiment import load_experiment
from ..grid.matrix import Matrix, Standing, measured_differently, read_matrix
from ..grid.submit import Target, submit_matrix
from ..results.metrics import KL, NLL, NOTHING
from ..util.console import Console
from ..util.tables import aligned

SWEEP = "sweep.json"
_ALIKE_RUNGS = "rungs differ in train.passes: leave train.steps and --over train.passes out"


class Trial(Settings):
    """One combination of settings in one rung."""

    rung: int
    """Counted from 1; every rung has twice the passes of the one before."""
    passes: float | None
    """Passes over the examples; None where `train.steps` counts instead."""
    values: dict[str, Any]
    """The varied settings."""
    kl: float | None
    """KL to the source on held-out rows, nats per token; None for a run that failed."""
    answer_nll: float | None
    """Answer NLL on the same rows."""
    seconds: float | None
    """Wall time of the training."""
    note: str = ""
    """Why it failed."""


class Sweep(Contract):
    """All trials, the best of the last rung first."""

    over: dict[str, list[Any]]
    """The varied settings."""
    trials: list[Trial]
    """Sorted by rung, the last first, and by KL."""

    @property
    def best(self) -> Trial:
        """The best trial of the last rung."""
        return self.trials[0]

    @property
    def failed(self) -> bool:
        """Whether a run failed."""
        return any(trial.kl is None for trial in self.trials)


def sweep(
    base: str | Path,
    folder: Path,
    *,
    over: Sequence[str],
    configs: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    rungs: int = 1,
    jobs: int = 1,
    trackers: Sequence[str] = (),
    console: Console | None = None,
) -> Sweep:
    """Run every combination, or with several rungs the better half of each rung with twice the passes.

    What is tuned is measured on further rows of the training split (`data.measure_on=tuning`), never on those that a
    run is measured on; all trials on the same ones. The last rung has the passes of the experiment.

    Args:
        base: name of a preset, or path of a YAML file.
        folder: where the runs are; an interrupted sweep goes on there, and takes further values.
        over: `key.key=value,value`, as for a matrix.
        configs: YAML files merged on top.
        overrides: settings of all trials.
        rungs: 1 for the plain grid.
        jobs: runs at a time.
        trackers: names of trackers that are told of every step of every run.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: a setting is wrong, rungs cannot be made, or every run of a rung failed.
    """
    experiment = load_experiment(base, configs=configs, overrides=overrides)
    if rungs < 1:
        raise SemalignError(f"--rungs {rungs}: expected at least 1")
    for text in over:
        if (key := text.partition("=")[0]) == "data.measure_on" or f"{key}.".startswith("data.held_out."):
            raise SemalignError(f"a sweep is measured on rows of the training split: leave --over {key} out")
        if rungs > 1 and key == "train.passes":
            raise SemalignError(_ALIKE_RUNGS)
    target = Target(at_once=jobs, trackers=tuple(trackers))
    trials: list[Trial] = []
    names: list[str] | None = None
    matrix: Matrix | None = None
    for rung in range(1, rungs + 1):
        passes = None if rungs == 1 else experiment.train.passes / 2 ** (rungs - rung)
        settings = [*overrides, "data.measure_on=tuning", *([] if passes is None else [f"train.passes={passes}"])]
        matrix = read_matrix(base, over=over, configs=configs, overrides=settings)
        _check(matrix, passes)
        _check_folder(folder)
        if names is not None:
            matrix = matrix.model_copy(update={"cells": [cell for cell in matrix.cells if cell.name in names]})
        # What failed before may be among the better half now: a rung takes further cells.
        found = submit_matrix(matrix, folder / f"rung-{rung}", target, extend=True, console=console)
        done = sorted((_trial(each, rung) for each in found), key=lambda t: float("inf") if t.kl is None else t.kl)
        if done[0].kl is None:
            raise SemalignError(f"every run of rung {rung} failed, such as {done[0].note}")
        trials = [*done, *trials]
        better = [trial.values for trial in done if trial.kl is not None][: max(1, (len(done) + 1) // 2)]
        names = [cell.name for cell in matrix.cells if cell.values in better]
    assert matrix is not None
    result = Sweep(over=matrix.over, trials=trials)
    result.write(folder / SWEEP)
    replace_file(folder / "sweep.csv", _csv(result))
    return result


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but a sweep.

    Raises:
        SemalignError: it does.
    """
    if folder.is_file():
        raise SemalignError(f"{folder} is a file: choose another folder with --out")
    if not folder.is_dir() or (folder / SWEEP).is_file() or (folder / "rung-1").is_dir():
        return  # a rung's own folder is checked when it runs
    if any(folder.iterdir()):
        raise SemalignError(f"{folder} is not empty, and holds no sweep: choose another folder with --out")


def _check(matrix: Matrix, passes: float | None) -> None:
    """Refuse trials that are not measured alike, or that do not have the passes of their rung.

    Raises:
        SemalignError: they are or do.
    """
    first = matrix.cells[0].experiment
    for cell in matrix.cells:
        if cell.experiment.data.measure_on != "tuning":
            raise SemalignError(
                "a sweep is measured on rows of the training split: leave data.measure_on out of --over"
            )
        if changed := measured_differently(first, cell.experiment):
            raise SemalignError(
                f"--over varies {', '.join(changed)}: trials compare on the same models and rows alone, so vary it "
                "with `semalign submit`"
            )
        train = cell.experiment.train
        if passes is not None and (train.steps is not None or train.passes != passes):
            raise SemalignError(_ALIKE_RUNGS)


def _trial(standing: Standing, rung: int) -> Trial:
    result, train, note = standing.result, standing.cell.experiment.train, standing.note or standing.state
    if result is not None and not math.isfinite(result.after.kl):
        result, note = None, "the KL to the source is not finite: leave this setting out"
    return Trial(
        rung=rung,
        passes=train.passes if train.steps is None else None,
        values=standing.cell.values,
        kl=None if result is None else result.after.kl,
        answer_nll=None if result is None else result.after.answer_nll,
        seconds=None if result is None else result.training.seconds,
        note="" if result is not None else f"{standing.cell.name}: {note}",
    )


def sweep_table(found: Sweep) -> str:
    """The trials of the last rung, the best first, and its settings as overrides."""
    last = [trial for trial in found.trials if trial.rung == found.best.rung]
    rows = [(*found.over, KL.name, NLL.name, "seconds")]
    for trial in last:
        seconds = NOTHING if trial.seconds is None else format(trial.seconds, ".0f")
        shown = (KL.text(trial.kl), NLL.text(trial.answer_nll), seconds)
        rows.append((*(_text(trial.values[key]) for key in found.over), *shown))
    overrides = " ".join(shlex.quote(f"{key}={_text(value)}") for key, value in found.best.values.items())
    lines = [aligned(rows)]
    if found.best.rung > 1:
        counts = Counter(trial.passes or 0.0 for trial in reversed(found.trials))
        lines.append("trials: " + ", ".join(f"{count} with {passes:g} passes" for passes, count in counts.items()))
    lines += [f"failed: {trial.note} (rung {trial.rung})" for trial in found.trials if trial.kl is None]
    return "\n".join([*lines, f"best on further rows of the training split: {overrides}"])


def _text(value: Any) -> str:
    """A value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _csv(found: Sweep) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rung", "passes", *found.over, "kl", "answer_nll", "seconds", "note"])
    for trial in found.trials:
        passes, *figures = (
            "" if value is None else value for value in (trial.passes, trial.kl, trial.answer_nll, trial.seconds)
        )
        writer.writerow([trial.rung, passes, *(_text(trial.values[key]) for key in found.over), *figures, trial.note])
    return text.getvalue()
