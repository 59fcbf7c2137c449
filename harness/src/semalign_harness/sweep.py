"""A grid of settings, or a tournament among them: the best by the KL on held-out rows, all from one supervision."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semalign_geometry import Contract, SemalignError, Settings, replace_file

from .console import Console
from .experiment import load_experiment
from .matrix import Matrix, Standing, read_matrix
from .submit import Target, submit_matrix
from .table import aligned


class Trial(Settings):
    """One combination of settings in one rung."""

    rung: int
    """Counted from 1; every rung has twice the passes of the one before."""
    passes: float
    """Passes over the examples."""
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
    console: Console | None = None,
) -> Sweep:
    """Run every combination, or with several rungs the better half of each rung with twice the passes.

    What is tuned is measured on further rows of the training split: `data.held_out` plays no part. The last rung has
    the passes of the experiment.

    Args:
        base: name of a preset, or path of a YAML file.
        folder: where the runs are; an interrupted sweep goes on there.
        over: `key.key=value,value`, as for a matrix.
        configs: YAML files merged on top.
        overrides: settings of all trials.
        rungs: 1 for the plain grid.
        jobs: runs at a time.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: a setting is wrong, rungs cannot be made, or every run of a rung failed.
    """
    experiment = load_experiment(base, configs=configs, overrides=overrides)
    if rungs < 1:
        raise SemalignError(f"--rungs {rungs}: expected at least 1")
    if rungs > 1 and (experiment.train.steps is not None or any(text.startswith("train.passes") for text in over)):
        raise SemalignError("rungs differ in train.passes: leave train.steps and --over train.passes out")
    trials: list[Trial] = []
    names: list[str] | None = None
    matrix: Matrix | None = None
    for rung in range(1, rungs + 1):
        passes = experiment.train.passes / 2 ** (rungs - rung)
        settings = ["data.held_out=null", *overrides] + [f"train.passes={passes}"] * (rungs > 1)
        matrix = read_matrix(base, over=over, configs=configs, overrides=settings)
        if names is not None:
            matrix = matrix.model_copy(update={"cells": [cell for cell in matrix.cells if cell.name in names]})
        found = submit_matrix(matrix, folder / f"rung-{rung}", Target(at_once=jobs), console=console)
        done = sorted(
            (_trial(each, rung, passes) for each in found), key=lambda t: float("inf") if t.kl is None else t.kl
        )
        if done[0].kl is None:
            raise SemalignError(f"every run of rung {rung} failed, such as {done[0].note}")
        trials = [*done, *trials]
        better = [trial.values for trial in done if trial.kl is not None][: max(1, (len(done) + 1) // 2)]
        names = [cell.name for cell in matrix.cells if cell.values in better]
    assert matrix is not None
    result = Sweep(over=matrix.over, trials=trials)
    result.write(folder / "sweep.json")
    replace_file(folder / "sweep.csv", _csv(result))
    return result


def _trial(standing: Standing, rung: int, passes: float) -> Trial:
    result = standing.result
    return Trial(
        rung=rung,
        passes=passes,
        values=standing.cell.values,
        kl=None if result is None else result.after.kl,
        answer_nll=None if result is None else result.after.answer_nll,
        seconds=None if result is None else result.training.seconds,
        note="" if result is not None else f"{standing.cell.name}: {standing.note or standing.state}",
    )


def sweep_table(found: Sweep) -> str:
    """The trials of the last rung, the best first, and its settings as overrides."""
    last = [trial for trial in found.trials if trial.rung == found.best.rung]
    rows = [(*found.over, "KL", "answer NLL", "seconds")]
    for trial in last:
        figures = (trial.kl, trial.answer_nll, trial.seconds)
        shown = [
            "–" if value is None else format(value, form)
            for value, form in zip(figures, (".4f", ".4f", ".0f"), strict=True)
        ]
        rows.append((*(str(trial.values[key]) for key in found.over), *shown))
    overrides = " ".join(f"{key}={value}" for key, value in found.best.values.items())
    failed = [trial.note for trial in found.trials if trial.kl is None]
    return "\n".join([aligned(rows), *(f"failed: {note}" for note in failed), f"best on held-out rows: {overrides}"])


def _csv(found: Sweep) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rung", "passes", *found.over, "kl", "answer_nll", "seconds", "note"])
    for trial in found.trials:
        figures = ["" if value is None else value for value in (trial.kl, trial.answer_nll, trial.seconds)]
        writer.writerow([trial.rung, trial.passes, *(trial.values[key] for key in found.over), *figures, trial.note])
    return text.getvalue()
