"""A matrix of experiments: the product of varied settings, with a run folder for each cell, and one table."""

import csv
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout
from semalign_geometry import Contract, SemalignError, Settings, replace_file

from ..experiment import Experiment, load_experiment
from ..results.files import RESULT
from ..results.metrics import AGREEMENT, KL, NLL, NOTHING
from ..results.run import RunResult
from ..run.pipeline import check_code
from ..run.run_folder import decisive, differences
from ..util.tables import aligned

MATRIX, TABLE, LOGS = "matrix.json", "matrix.csv", "logs"
_LOCK = ".lock"
_LONGEST_VALUE, _LONGEST_NAME = 24, 100
_COLUMNS = ("KL before", "KL after", "NLL after", "agreement", "seconds")
_FORMS = (KL.form, KL.form, NLL.form, AGREEMENT.form, ".0f")


class Cell(Settings):
    """One experiment of a matrix."""

    name: str
    """Name of its run folder, made of its values."""
    values: dict[str, Any]
    """The varied settings, by their dotted keys."""
    experiment: Experiment
    """All settings."""


class Matrix(Contract):
    """Experiments that differ in some settings only."""

    name: str
    """Name of the experiment that is varied."""
    over: dict[str, list[Any]]
    """Values of each varied setting; the cells are their product."""
    cells: list[Cell]
    """The experiments, the last setting varying fastest."""


@dataclass(frozen=True)
class Standing:
    """Where a cell stands."""

    cell: Cell
    state: Literal["finished", "running", "failed", "not run", "refused"]
    """`not run` is neither finished nor failed, and nothing runs it; `refused` would be, by a dry run."""
    note: str = ""
    """Why it failed or would be refused, which job runs it, or what a dry run has not checked."""
    result: RunResult | None = None
    """What a finished cell measured."""


def read_matrix(
    base: str | Path, *, over: Sequence[str], configs: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> Matrix:
    """The product of varied settings over one experiment; each cell is parsed and checked.

    Args:
        base: name of a preset, or path of a YAML file.
        over: `key.key=value,value`, each value read as YAML; or one list in brackets, whose items are the values.
        configs: YAML files merged on top of `base`.
        overrides: `key.key=value`, for all cells.

    Raises:
        SemalignError: a setting is unknown, wrong, without values or varied twice, or two cells are one experiment.
    """
    varied = _varied(over)
    _refuse_overlap(list(varied), [override.partition("=")[0] for override in overrides])
    cells = []
    for combination in itertools.product(*varied.values()):
        values = dict(zip(varied, combination, strict=True))
        own = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()]
        experiment = load_experiment(base, configs=configs, overrides=[*overrides, *own])
        cells.append(Cell(name=_name(values), values=values, experiment=experiment))
    _refuse_doubles(cells)
    taken = Counter(cell.name.casefold() for cell in cells)  # some file systems know no case
    for index, cell in enumerate(cells):
        if taken[cell.name.casefold()] > 1:
            cells[index] = cell.model_copy(update={"name": f"{cell.name}-{_digest(cell.values)}"})
    # A matrix is what its file says: a date among the values is text there.
    return Matrix.parse(json.loads(Matrix(name=cells[0].experiment.name, over=varied, cells=cells).model_dump_json()))


def _varied(over: Sequence[str]) -> dict[str, list[Any]]:
    if not over:
        raise SemalignError("a matrix varies something: give --over key.key=value,value")
    varied: dict[str, list[Any]] = {}
    for text in over:
        key, equals, listed = text.partition("=")
        if not equals or not key:
            raise SemalignError(f"--over {text!r} is not of the form key.key=value,value, such as train.seed=0,1")
        try:
            values = yaml.safe_load(f"[{listed}]")
        except yaml.YAMLError:
            raise SemalignError(f"--over {text!r}: the values are not valid YAML") from None
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        if not values:
            raise SemalignError(f"--over {text!r} names no values: give one or more, with commas")
        if key in varied:
            raise SemalignError(f"--over varies {key} twice: name all its values in one --over")
        varied[key] = values
    return varied


def _refuse_overlap(varied: Sequence[str], overridden: Sequence[str]) -> None:
    for one, other in itertools.permutations(varied, 2):
        if other.startswith(f"{one}."):
            raise SemalignError(f"--over varies both {one} and {other}, a part of it: vary one of them")
    for key in overridden:
        if key in varied:
            raise SemalignError(f"{key} is varied by --over and set besides: leave one of them out")


def _refuse_doubles(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.experiment.model_dump_json(exclude={"name"}), cell)
        if other is not cell:
            one, two = (", ".join(f"{k}={v}" for k, v in each.values.items()) for each in (other, cell))
            raise SemalignError(f"two cells are the same experiment ({one}; {two}): leave one of them out")


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key where it is clear, else the whole."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}


def _name(values: Mapping[str, Any]) -> str:
    labels = _labels(list(values))
    name = "_".join(f"{labels[key]}-{_safe(value)}" for key, value in values.items())
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{_digest(values)}"


def _safe(value: Any) -> str:
    text = _text(value)
    if len(text) <= _LONGEST_VALUE and re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        return text
    readable = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:_LONGEST_VALUE].strip("-.")
    return f"{readable}-{_digest(value)}".lstrip("-")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:8]


@contextmanager
def claimed_matrix(folder: Path, matrix: Matrix, *, extend: bool = False) -> Iterator[None]:
    """The folder for this process alone, with the matrix written; with `extend`, beside the cells it has already.

    Raises:
        SemalignError: the folder holds something else, cannot be used, or another process works on it.
    """
    check_folder(folder, matrix, extend=extend)
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise SemalignError(f"another process works on the matrix in {folder}: wait for it") from None
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        if extend and (folder / MATRIX).exists():
            _united(Matrix.read(folder / MATRIX), matrix).write(folder / MATRIX)
        elif not (folder / MATRIX).exists():
            matrix.write(folder / MATRIX)
        yield
    finally:
        lock.release()


def check_folder(folder: Path, matrix: Matrix, *, extend: bool = False) -> None:
    """Refuse a folder that holds anything but this matrix, or with `extend` other cells of it; nothing is written.

    Raises:
        SemalignError: it does, holds runs of components with another code, or cannot be read.
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
        there = Matrix.read(folder / MATRIX)
        changes = _cell_differences(folder, there, matrix) if extend else _matrix_differences(there, matrix)
        if changes:
            raise SemalignError(
                f"{folder} holds another matrix ({'; '.join(changes[:5])}): choose another folder with --out"
            )
        for cell in matrix.cells:
            check_code(folder / cell.name, cell.experiment)
    elif any(name != _LOCK and not name.startswith(f".{MATRIX}.") for name in names):
        raise SemalignError(f"{folder} is not empty, and holds no {MATRIX}: choose another folder with --out")


def _unusable(folder: Path, error: OSError) -> SemalignError:
    return SemalignError(f"{folder} cannot be used ({error}): choose another folder with --out")


def _matrix_differences(there: Matrix, here: Matrix) -> list[str]:
    if list(there.over.items()) != list(here.over.items()):
        keys = [key for key in {**there.over, **here.over} if there.over.get(key) != here.over.get(key)]
        listed = [f"--over {key} is {there.over.get(key)} there, {here.over.get(key)} here" for key in keys]
        return listed or [f"--over is in the order {', '.join(there.over)} there, {', '.join(here.over)} here"]
    if [cell.name for cell in there.cells] != [cell.name for cell in here.cells]:
        return [f"it has {len(there.cells)} cells there, {len(here.cells)} here"]
    found: dict[str, None] = {}
    for one, other in zip(there.cells, here.cells, strict=True):
        found.update(dict.fromkeys(differences(one.experiment, other.experiment)))
    return list(found)


def _cell_differences(folder: Path, there: Matrix, here: Matrix) -> list[str]:
    """What differs in the settings that vary, or in the cells that both matrices have, and that have begun."""
    if set(there.over) != set(here.over):
        keys = (" and ".join(each.over) for each in (there, here))
        return ["it varies {} there, {} here".format(*keys)]
    known = {cell.name: decisive(cell.experiment) for cell in there.cells if (folder / cell.name).exists()}
    shared = {cell.name: decisive(cell.experiment) for cell in here.cells if cell.name in known}
    return [f"{name}: {change}" for name, ours in shared.items() for change in differences(known[name], ours)]


def measured_differently(one: Experiment, other: Experiment) -> list[str]:
    """Settings in which two experiments differ, and by which their figures are of other models or other rows."""
    keys = [change.partition(" is ")[0] for change in differences(one, other)]
    decisive = ("source.", "target.path", "target.revision", "data.", "measure.", "chat_template", "date")
    training: tuple[str, ...] = ("data.answers", "data.writing.keep", "data.attribution_rows")
    if one.data.held_out_answers == "gold":
        training += ("data.writing",)
    return [key for key in keys if key.startswith(decisive) and not key.startswith(training)]


def _united(there: Matrix, here: Matrix) -> Matrix:
    """Both matrices' cells; a cell that both have is the one of `here`, as only what has not begun may differ."""
    cells = list({cell.name: cell for cell in (*there.cells, *here.cells)}.values())
    over = {
        key: [*there.over.get(key, []), *(value for value in values if value not in there.over.get(key, []))]
        for key, values in here.over.items()
    }
    return here.model_copy(update={"cells": cells, "over": over})


def failure_file(folder: Path, name: str) -> Path:
    """Where the reason stands for which a cell failed."""
    return folder / LOGS / f"{name}.failed"


def standings(
    folder: Path, matrix: Matrix, *, running: Mapping[str, str] | None = None, ended: Mapping[str, str] | None = None
) -> list[Standing]:
    """Where each cell stands.

    Args:
        folder: folder of the matrix; it need not exist.
        matrix: its contents.
        running: what runs a cell, by its name.
        ended: why what ran a cell left neither a result nor a reason, by its name.
    """
    found = []
    for cell in matrix.cells:
        reason = failure_file(folder, cell.name)
        if (folder / cell.name / RESULT).is_file():
            found.append(Standing(cell, "finished", result=RunResult.read(folder / cell.name / RESULT)))
        elif running and cell.name in running:
            found.append(Standing(cell, "running", running[cell.name]))
        elif reason.is_file():
            found.append(Standing(cell, "failed", reason.read_text(encoding="utf-8").strip()))
        elif ended and cell.name in ended:
            found.append(Standing(cell, "failed", ended[cell.name]))
        else:
            found.append(Standing(cell, "not run"))
    return found


def matrix_table(found: Sequence[Standing]) -> str:
    """The varied values of each cell, and what it measured or why it failed."""
    keys = list(found[0].cell.values)
    labels = _labels(keys)
    rows = [(*(labels[key] for key in keys), *_COLUMNS)]
    for each in found:
        measured = _measured(each) or [None] * len(_COLUMNS)
        cells = [
            NOTHING if value is None else format(value, form) for value, form in zip(measured, _FORMS, strict=True)
        ]
        rows.append((*(_text(each.cell.values[key]) for key in keys), *cells))
    header, *lines = aligned(rows).splitlines()
    said = [each.state + (f": {each.note}" if each.note else "") for each in found]
    return "\n".join([header, *(line + "  " + text for line, text in zip(lines, said, strict=True))])


def write_table(folder: Path, found: Sequence[Standing]) -> Path:
    """Write `matrix.csv`: the table with whole keys and all digits; returns its path."""
    keys = list(found[0].cell.values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *keys, *(name.lower().replace(" ", "_") for name in _COLUMNS), "state", "note"])
    for each in found:
        values = [_text(each.cell.values[key]) for key in keys]
        measured = [*map(repr, _measured(each))] or [""] * len(_COLUMNS)
        writer.writerow([each.cell.name, *values, *measured, each.state, each.note])
    return replace_file(folder / TABLE, text.getvalue())


def _measured(standing: Standing) -> list[float | None]:
    """The metrics of a finished cell; empty for any other."""
    if (result := standing.result) is None:
        return []
    return [KL.value(result.before), *(metric.value(result.after) for metric in (KL, NLL, AGREEMENT)), result.seconds]
