"""Frozen, closed, versioned pydantic models that one library hands to the next, readable as JSON."""

import difflib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ._errors import SemalignError
from ._files import replace_file

# Not typing.Self: a run-time checker that decorates single methods cannot resolve it.
SettingsT = TypeVar("SettingsT", bound="Settings")
ContractT = TypeVar("ContractT", bound="Contract")


class Settings(BaseModel):
    """Base of every group of settings: immutable, without unknown keys, without tensors."""

    # JSON has no infinity, and a deficient basis has an infinite condition number: written and read as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Fill in the default's kind in a section without one, and refuse a truth value for a number."""
        if not isinstance(data, dict):
            return data
        kinds = {}
        for name, field in cls.model_fields.items():
            value, kind = data.get(name), getattr(field.default, "kind", None)
            if isinstance(value, dict) and "kind" not in value and isinstance(kind, str):
                kinds[name] = {"kind": kind, **value}
            taken = {field.annotation, *typing.get_args(field.annotation)}
            if isinstance(value, bool) and taken & {int, float} and bool not in taken:
                or_none = " or null" if type(None) in taken else ""
                raise ValueError(f"{name} is {value}: expected a number{or_none}")
        return data | kinds

    @classmethod
    def parse(cls: type[SettingsT], data: Any, *, origin: str = "input") -> SettingsT:
        """Validate plain data into this model.

        Args:
            data: parsed JSON or YAML, usually a dict.
            origin: where the data came from, for the message.

        Raises:
            SemalignError: one sentence that names the key, its value, and for an unknown key the nearest known one.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SemalignError(f"{origin}: {_first_problem(cls, error)}") from error


class Contract(Settings):
    """Base of every contract: settings or results with a format version, written to and read from JSON.

    A subclass raises `current_version` when a change makes older readers wrong.
    """

    current_version: ClassVar[int] = 1
    """The newest format version that this class reads, and the one that it writes."""

    version: int = 1
    """Format version of this contract; a reader refuses versions newer than its own."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_newer_version(cls, data: Any) -> Any:
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int | str) and str(version).isdigit() and int(version) > cls.current_version:
            raise SemalignError(
                f"{cls.__name__} has format version {version}, this installation reads up to "
                f"{cls.current_version}: upgrade semalign"
            )
        return data

    @classmethod
    def read(cls: type[ContractT], path: str | Path) -> ContractT:
        """Read a contract from a JSON file.

        Raises:
            SemalignError: the file is missing, is not JSON, or does not fit this contract.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SemalignError(f"{path} does not exist; expected a {cls.__name__} as JSON") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SemalignError(f"{path} cannot be read as JSON: {error}") from error
        return cls.parse(data, origin=str(path))

    def write(self, path: str | Path) -> Path:
        """Write this contract as indented JSON, whole or not at all; returns the path."""
        return replace_file(Path(path), self.model_dump_json(indent=2) + "\n")


class MisfitError(SemalignError):
    """Settings that do not fit their class, which the annotation of the field around them does not name."""

    def __init__(self, model: type[BaseModel], error: ValidationError) -> None:
        """Take the first error of a validation.

        Args:
            model: the class.
            error: what its validation raised.
        """
        super().__init__(_first_problem(model, error))
        self.model = model
        self.error = error


def _first_problem(model: type[BaseModel], error: ValidationError, *, within: Sequence[str] = ()) -> str:
    """One sentence for the first error of a validation; `within` are the keys that lead to the model."""
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, MisfitError):
        return _first_problem(cause.model, cause.error, within=[*within, *_walk(model, problem["loc"])[0]])
    if isinstance(cause, SemalignError):
        return str(cause)
    *place, last = problem["loc"] or ("",)
    parts, models = _walk(model, place)
    parts = [*within, *parts]
    known = sorted({name for candidate in models for name in candidate.model_fields})
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known) or 'none'}"
        return f"unknown key {'.'.join([*parts, str(last)])!r}: {hint}"
    if last in known or isinstance(last, int) or problem["type"] == "missing":
        parts.append(str(last))
    key = ".".join(parts) or "the whole"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # a rule about several keys
        return f"{key!r}: {message}" if parts else message
    return f"{key!r} is {problem['input']!r}: {message}"


def _walk(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys along a location inside `model`, without the tags of unions, and the models at its end."""
    parts: list[str] = []
    found = [model]
    for part in location:
        fields = [candidate.model_fields[str(part)] for candidate in found if part in candidate.model_fields]
        if fields:
            found = [inner for field in fields for inner in _models_in(field.annotation)]
        else:  # an index, or the tag of a union, which narrows the candidates
            found = [candidate for candidate in found if _tag_fits(candidate, part)] or found
        if fields or isinstance(part, int):
            parts.append(str(part))
    return parts, found


def _tag_fits(model: type[BaseModel], part: int | str) -> bool:
    kind = model.model_fields.get("kind")
    return kind is None or part in typing.get_args(kind.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
