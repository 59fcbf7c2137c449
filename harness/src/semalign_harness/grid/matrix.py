"""A matrix: the product of varied settings over one experiment."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator
from semalign_geometry.base import Contract, SemalignError, Settings

from ..experiment import Experiment, upgraded
from ..loading import load_experiment

_LONGEST_VALUE, _LONGEST_NAME = 24, 100


class Cell(Settings):
    """One experiment of a matrix."""

    name: str
    """Name of its run folder, made of its values."""
    values: dict[str, Any]
    """The varied settings, by their dotted keys."""
    experiment: Experiment
    """All settings."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, tree: Any) -> Any:
        """Read files that hold older settings of the experiment."""
        if not isinstance(tree, dict) or not isinstance(tree.get("experiment"), dict):
            return tree
        return tree | {"experiment": upgraded(tree["experiment"])}


class Matrix(Contract):
    """Experiments that differ only in some settings."""

    name: str
    """Name of the experiment that is varied."""
    over: dict[str, list[Any]]
    """Values of each varied setting; the cells are their product."""
    cells: list[Cell]
    """The experiments, the last setting varying fastest."""


def read_matrix(
    base: str | Path,
    task: str | None = None,
    *,
    over: Sequence[str],
    configs: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
) -> Matrix:
    """Parse and check the cells: the product of varied settings over one experiment.

    Args:
        base: name of a pair, or path of a YAML file.
        task: task of the pair.
        over: `key.key=value,value`, each value read as YAML; or one list in brackets that holds the values.
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
        experiment = load_experiment(base, task, configs=configs, overrides=[*overrides, *own])
        cells.append(Cell(name=_name(values), values=values, experiment=experiment))
    _refuse_doubles(cells)
    taken = Counter(cell.name.casefold() for cell in cells)  # some file systems ignore case
    for index, cell in enumerate(cells):
        if taken[cell.name.casefold()] > 1:
            cells[index] = cell.model_copy(update={"name": f"{cell.name}-{_digest(cell.values)}"})
    # The same as its file: a date among the values becomes text.
    return Matrix.parse(json.loads(Matrix(name=cells[0].experiment.name, over=varied, cells=cells).model_dump_json()))


def _varied(over: Sequence[str]) -> dict[str, list[Any]]:
    if not over:
        raise SemalignError("no setting is varied: give --over key.key=value,value")
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
            raise SemalignError(f"{key} is both varied by --over and set: leave one of them out")


def _refuse_doubles(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.experiment.model_dump_json(exclude={"name"}), cell)
        if other is not cell:
            one, two = (", ".join(f"{k}={v}" for k, v in each.values.items()) for each in (other, cell))
            raise SemalignError(f"two cells are the same experiment ({one}; {two}): leave one of them out")


def labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key where no other key ends in it, else the whole key."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}


def as_text(value: Any) -> str:
    """A value as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _name(values: Mapping[str, Any]) -> str:
    short = labels(list(values))
    name = "_".join(f"{short[key]}-{_safe(value)}" for key, value in values.items())
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{_digest(values)}"


def _safe(value: Any) -> str:
    text = as_text(value)
    if len(text) <= _LONGEST_VALUE and re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        return text
    readable = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:_LONGEST_VALUE].strip("-.")
    return f"{readable}-{_digest(value)}".lstrip("-")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:8]
