"""Experiments with semantic alignment: a YAML file in, a run folder with the trained target and its figures out."""

from .data.arithmetic import arithmetic_rows as arithmetic_rows
from .data.encoding import Example as Example
from .data.rows import encode_rows as encode_rows
from .data.rows import load_rows as load_rows
from .experiment import Experiment as Experiment
from .experiment import load_experiment as load_experiment
from .models.loading import LoadedModel as LoadedModel
from .models.loading import load_model as load_model
from .models.tiny import build_tiny_model as build_tiny_model
from .models.tiny import build_tokenizer as build_tokenizer
from .results.measurement import Measurement as Measurement
from .results.measurement import gap_recovered as gap_recovered
from .results.run import RunResult as RunResult
from .run.measure import measure as measure
from .run.pipeline import run_experiment as run_experiment

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
