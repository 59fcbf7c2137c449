"""The folder of a matrix: its cells, their states, and their table."""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from semalign_geometry.base import SemalignError, replace_file

from ..results.run import RunResult
from ..run.environment import check_code
from ..run.run_folder import decisive, differences
from ..util.tables import aligned
from .jobs import read_jobs
from .matrix import Cell, Matrix, as_text, labels

MATRIX, TABLE, LOGS = "matrix.json", "matrix.csv", "logs"
_LOCK = ".lock"
_METRICS = {"KL before": ".4f", "KL after": ".4f", "NLL after": ".4f", "agreement": ".1%", "seconds": ".0f"}
"""Columns of the table, with their formats."""


@dataclass(frozen=True)
class Standing:
    """State of a cell."""

    cell: Cell
    state: Literal["finished", "running", "failed", "not run", "refused"]
    """`not run` is neither finished nor failed, and nothing runs it; `refused` would fail, by a dry run."""
    note: str = ""
    """Why it failed or would be refused, which job runs it, or what a dry run has not checked."""
    result: RunResult | None = None
    """Measurements of a finished cell."""


@contextmanager
def claimed_matrix(folder: Path, matrix: Matrix) -> Iterator[None]:
    """Hold the folder for this process alone, with the matrix added to the cells that it has.

    Raises:
        SemalignError: the folder holds something else, cannot be used, or another process works on it.
    """
    check_folder(folder, matrix)
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise SemalignError(f"another process works on the matrix in {folder}: wait for it") from None
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        there = Matrix.read(folder / MATRIX) if (folder / MATRIX).exists() else matrix
        if (united := _united(there, matrix)) != there or there is matrix:
            united.write(folder / MATRIX)
        yield
    finally:
        lock.release()


def check_folder(folder: Path, matrix: Matrix) -> None:
    """Refuse a folder with anything but cells of such a matrix; nothing is written.

    A cell that has not begun may change its settings.

    Raises:
        SemalignError: the folder varies other settings, a cell has begun with other settings or with other code of
            its components, or a file cannot be read.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise SemalignError(f"{folder} is a file: choose another folder with --out")
        names = {place.name for place in folder.iterdir()}
    except OSError as error:
        raise _unusable(folder, error) from None
    if MATRIX in names:
        if changes := _differences(folder, Matrix.read(folder / MATRIX), matrix):
            raise SemalignError(
                f"{folder} holds another matrix ({'; '.join(changes[:5])}): choose another folder with --out"
            )
        for cell in matrix.cells:
            check_code(folder / cell.name, cell.experiment)
    elif any(name != _LOCK and not name.startswith(f".{MATRIX}.") for name in names):
        raise SemalignError(f"{folder} is not empty, and holds no {MATRIX}: choose another folder with --out")


def _unusable(folder: Path, error: OSError) -> SemalignError:
    return SemalignError(f"{folder} cannot be used ({error}): choose another folder with --out")


def _differences(folder: Path, there: Matrix, here: Matrix) -> list[str]:
    """Differences in the varied keys, or in the cells of both matrices that have begun."""
    if set(there.over) != set(here.over):
        keys = (" and ".join(each.over) for each in (there, here))
        return ["it varies {} there, {} here".format(*keys)]
    jobs = read_jobs(folder)
    begun = {cell.name: cell for cell in there.cells if cell.name in jobs or (folder / cell.name).exists()}
    both = [(cell, begun[cell.name]) for cell in here.cells if cell.name in begun]
    return [
        f"{ours.name}: {change}"
        for ours, theirs in both
        for change in differences(decisive(theirs.experiment), decisive(ours.experiment))
    ]


def _united(there: Matrix, here: Matrix) -> Matrix:
    """The cells and values of both; of a cell in both, that of `here`."""
    cells = list({cell.name: cell for cell in (*there.cells, *here.cells)}.values())
    over = {
        key: [*there.over[key], *(value for value in values if value not in there.over[key])]
        for key, values in here.over.items()
    }
    return here.model_copy(update={"cells": cells, "over": over})


def failure_file(folder: Path, name: str) -> Path:
    """File with the reason why a cell failed."""
    return folder / LOGS / f"{name}.failed"


def keep_reason(folder: Path, name: str, reason: str) -> None:
    """Write the reason why a cell failed."""
    file = failure_file(folder, name)
    file.parent.mkdir(exist_ok=True)
    replace_file(file, reason + "\n")


def matrix_table(found: Sequence[Standing]) -> str:
    """The varied values of each cell with its metrics and state, in lines of text."""
    keys = list(found[0].cell.values)
    short = labels(keys)
    rows = [(*(short[key] for key in keys), *_METRICS)]
    for each in found:
        metrics = [format(value, form) for value, form in zip(_metrics(each), _METRICS.values(), strict=False)]
        rows.append((*(as_text(each.cell.values[key]) for key in keys), *(metrics or ["–"] * len(_METRICS))))
    header, *lines = aligned(rows).splitlines()
    states = [each.state + (f": {each.note}" if each.note else "") for each in found]
    return "\n".join([header, *(f"{line}  {state}" for line, state in zip(lines, states, strict=True))])


def write_table(folder: Path, found: Sequence[Standing]) -> Path:
    """Write `matrix.csv`, with whole keys and all digits; returns its path."""
    keys = list(found[0].cell.values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *keys, *(name.lower().replace(" ", "_") for name in _METRICS), "state", "note"])
    for each in found:
        values = [as_text(each.cell.values[key]) for key in keys]
        metrics = [*map(repr, _metrics(each))] or [""] * len(_METRICS)
        writer.writerow([each.cell.name, *values, *metrics, each.state, each.note])
    return replace_file(folder / TABLE, text.getvalue())


def _metrics(standing: Standing) -> list[float]:
    """The metrics of a finished cell; empty for any other."""
    if (result := standing.result) is None:
        return []
    return [result.before.kl, result.after.kl, result.after.answer_nll, result.after.agreement, result.seconds]
