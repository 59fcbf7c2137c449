"""All checks of a pair: those of a run, then its heads, the machine, and the weights where that is set."""

from dataclasses import replace

import torch
from semalign_geometry.base import SemalignError

from ..data.rows import read_rows
from ..experiment import Experiment
from ..models.opening import MissingModel, OpenedModel, check_pulled, open_model
from ..models.settings import ModelConfig
from ..run.checks import Finding, Pair, check_pair, check_rows, error, refused
from ..util.console import Console
from ..util.resources import pick_device
from ._deep import check_layers
from ._diagnosis import Diagnosis
from ._heads import check_adapters, check_head
from ._machine import check_machine


def diagnose(
    experiment: Experiment, *, has_rows: bool, deep: bool = False, console: Console | None = None
) -> Diagnosis:
    """Check what a run checks, the heads and the machine; no weights are loaded, unless `deep`.

    A model as a GGUF file that was never used before is converted first, with a note on the console.

    Args:
        experiment: the experiment that would run.
        has_rows: whether its rows are read.
        deep: loads both models, one after the other, and compares their layers.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: a model or the rows do not exist, or rows are needed.
    """
    if deep and not has_rows:
        raise SemalignError("--deep compares layers on rows: give --data FILE")
    console = console or Console(quiet=True)
    device = pick_device(experiment.device)
    for model in (experiment.source, experiment.target):
        check_pulled(model)
    pools = read_rows(experiment.data) if has_rows else ()
    opened = [
        _open(role, model, device, console)
        for role, model in (("source", experiment.source), ("target", experiment.target))
    ]
    diagnosis = Diagnosis(source=experiment.source.path, target=experiment.target.path, device=str(device), findings=())
    source, target = opened
    if isinstance(source, Finding) or isinstance(target, Finding):
        return diagnosis.model_copy(update={"findings": tuple(each for each in opened if isinstance(each, Finding))})
    pair, failure = Pair.of(experiment, source, target), None
    if has_rows:
        pair, failure = pair.reading(pools)
    findings = [*check_pair(pair)]
    if failure is not None and not any(each.message in str(failure) for each in findings if each.level == "error"):
        findings.append(refused("rows", failure))
    if pair.split is not None or not has_rows:
        findings += check_rows(pair)
    for role, each in pair.both:
        findings += check_adapters(role, each)
    findings += [check_head(role, each, pair) for role, each in pair.both]
    findings += check_machine(pair, device)
    diagnosis = diagnosis.model_copy(update={"findings": tuple(findings)})
    if not deep or not diagnosis.is_usable:
        return diagnosis
    assert pair.split is not None
    return check_layers(diagnosis, pair, pair.split, device, console)


def _open(role: str, settings: ModelConfig, device: torch.device, console: Console) -> OpenedModel | Finding:
    """Open a model in the dtype that it has here, or return the reason why it cannot be one of the pair.

    Raises:
        SemalignError: nothing is found there.
    """
    try:
        opened = open_model(settings, note=console.note)
        _ = opened.shape  # which fails for another kind of model
    except MissingModel:
        raise
    except SemalignError as failure:
        remedy = f"a decoder-only language model as the {role}: semalign models list shows some"
        return error(role, str(failure), remedy)
    dtype = str(opened.dtype(device)).removeprefix("torch.")
    return replace(opened, settings=settings.model_copy(update={"dtype": dtype}))
