"""Evaluations of a comparison's models: made once, and used again while they ask the same."""

import gc
import shutil
from pathlib import Path

import torch
from semalign_geometry.base import SemalignError

from ..benchmarks import find_benchmark
from ..evaluation import Evaluated, EvaluationConfig, evaluate, protocol_of, read_evaluation
from ..experiment import Experiment
from ..models.settings import ModelConfig
from ..results.comparison import Benchmarks
from ..results.evaluation import evaluation_file
from ..util.console import Console


def evaluated(
    model: ModelConfig, place: Path, experiment: Experiment, benchmarks: Benchmarks | None, console: Console
) -> Evaluated | None:
    """The answers of one model to the benchmarks; its folder may hold further ones.

    Raises:
        SemalignError: the folder holds an evaluation of another kind.
    """
    if benchmarks is None:
        return None
    config = _config(model, experiment, benchmarks)
    there = read_evaluation(place) if evaluation_file(place).is_file() else None
    if there is None or not _is_answered(there, config):
        if there is not None and (there.result.config.gold or there.result.config.source is not None):
            raise SemalignError(
                f"{place} holds an evaluation that a comparison does not make (with gold answers or a source): move it "
                "elsewhere, or choose another folder with --out"
            )
        console.note(f"evaluate {model.path} on {', '.join(benchmarks.tasks)}")
        if there is not None and not _is_alike(there, config):
            shutil.rmtree(place)  # of other documents or another form; the cache keeps the answers
        evaluate(config, place, console=console)
        if torch.cuda.is_available():  # free the memory for the runs, which are other processes
            gc.collect()
            torch.cuda.empty_cache()
    found = read_evaluation(place)
    return found._replace(items={name: found.items[name] for name in benchmarks.tasks})


def check_evaluation(model: ModelConfig, place: Path, experiment: Experiment, benchmarks: Benchmarks | None) -> None:
    """Refuse a folder with an evaluation of other documents.

    Raises:
        SemalignError: it has one.
    """
    if benchmarks is None or not evaluation_file(place).is_file():
        return
    if not _is_alike(read_evaluation(place), _config(model, experiment, benchmarks)):
        raise SemalignError(f"{place} is not of this comparison: choose another folder with --out")


def _config(model: ModelConfig, experiment: Experiment, benchmarks: Benchmarks) -> EvaluationConfig:
    return EvaluationConfig(
        model=model,
        **dict(benchmarks),
        chat_template=experiment.chat_template,
        date=experiment.date,
        gold=False,
        device=experiment.device,
    )


def _is_answered(found: Evaluated, config: EvaluationConfig) -> bool:
    if not (_is_alike(found, config) and set(config.tasks) <= set(found.items)):
        return False
    chat, options = found.result.chat, config.chat_template
    for name in config.tasks:
        there = found.result.benchmarks[name].protocol
        date = None if there.date is None else config.date  # whether the model's template reads the clock stays
        benchmark = find_benchmark(name).within(config.max_new_tokens)
        if there != protocol_of(benchmark, chat=chat, options=options, date=date):
            return False
    return True


def _is_alike(found: Evaluated, config: EvaluationConfig) -> bool:
    """Whether the same documents were asked in the same way; further measurements do not matter."""
    return found.result.config.model_copy(update={"tasks": config.tasks, "gold": False, "source": None}) == config
