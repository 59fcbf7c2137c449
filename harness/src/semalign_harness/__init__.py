"""Experiments with semantic alignment: settings in, a run folder with the trained target and its metrics out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.arithmetic import arithmetic_rows as arithmetic_rows
    from .data.encoding import Example as Example
    from .data.rows import encode_rows as encode_rows
    from .data.rows import load_rows as load_rows
    from .experiment import Experiment as Experiment
    from .loading import load_experiment as load_experiment
    from .models.loading import LoadedModel as LoadedModel
    from .models.loading import load_model as load_model
    from .models.tiny import build_tiny_model as build_tiny_model
    from .models.tiny import build_tokenizer as build_tokenizer
    from .results.measurement import Measurement as Measurement
    from .results.measurement import gap_recovered as gap_recovered
    from .results.run import RunResult as RunResult
    from .run.measure import measure as measure
    from .run.pipeline import run_experiment as run_experiment

_HOMES = {
    "Example": "data.encoding",
    "Experiment": "experiment",
    "LoadedModel": "models.loading",
    "Measurement": "results.measurement",
    "RunResult": "results.run",
    "arithmetic_rows": "data.arithmetic",
    "build_tiny_model": "models.tiny",
    "build_tokenizer": "models.tiny",
    "encode_rows": "data.rows",
    "gap_recovered": "results.measurement",
    "load_experiment": "loading",
    "load_model": "models.loading",
    "load_rows": "data.rows",
    "measure": "run.measure",
    "run_experiment": "run.pipeline",
}
"""Module of each public name, which is imported when the name is first used."""
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return found
