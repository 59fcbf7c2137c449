"""Experiments with semantic alignment: a YAML file in, a run folder with the trained target and its figures out."""

from .data import encode_rows as encode_rows
from .data import load_rows as load_rows
from .encoding import Example as Example
from .experiment import Experiment as Experiment
from .experiment import load_experiment as load_experiment
from .measure import Measurement as Measurement
from .measure import gap_recovered as gap_recovered
from .measure import measure as measure
from .models import LoadedModel as LoadedModel
from .models import load_model as load_model
from .pipeline import RunResult as RunResult
from .pipeline import run_experiment as run_experiment
from .tiny import arithmetic_rows as arithmetic_rows
from .tiny import build_tiny_model as build_tiny_model
from .tiny import build_tokenizer as build_tokenizer

__all__ = [
    "Example",
    "Experiment",
    "LoadedModel",
    "Measurement",
    "RunResult",
    "arithmetic_rows",
    "build_tiny_model",
    "build_tokenizer",
    "encode_rows",
    "gap_recovered",
    "load_experiment",
    "load_model",
    "load_rows",
    "measure",
    "run_experiment",
]
