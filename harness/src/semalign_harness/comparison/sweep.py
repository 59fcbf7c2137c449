"""A sweep: a comparison of one experiment's settings, ranked by the KL on rows that no run reports."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from semalign_geometry.base import SemalignError

from ..grid.matrix import read_matrix
from ..loading import load_experiment
from ..results.comparison import Comparison, ComparisonConfig
from ..results.metrics import KL, NLL, NOTHING
from ..util.tables import aligned
from ._compared import measured_differently

_COLUMNS = (KL, NLL)


def sweep_config(
    base: str | Path,
    task: str | None = None,
    *,
    over: Sequence[str],
    configs: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
) -> ComparisonConfig:
    """The comparison of every combination of settings, each as a variant of the experiment's method.

    All are measured on the same further rows of the training split (`data.measure_on=tuning`), never on those
    that a run reports.

    Args:
        base: name of a pair, or path of a YAML file.
        task: task of the pair.
        over: `key.key=value,value`, as for a matrix.
        configs: YAML files merged on top.
        overrides: settings of all combinations.

    Raises:
        SemalignError: a setting is wrong, or combinations would be measured on different rows or models.
    """
    overrides = [*overrides, "data.measure_on=tuning"]
    experiment = load_experiment(base, task, configs=configs, overrides=overrides)
    matrix = read_matrix(base, task, over=over, configs=configs, overrides=overrides)
    methods = {}
    for cell in matrix.cells:
        if changed := measured_differently(experiment, cell.experiment):
            raise SemalignError(
                f"--over varies {', '.join(changed)}: a sweep compares settings on the same models and the same rows "
                "of the training split, so vary it with `semalign submit`"
            )
        kind = cell.experiment.method.kind
        methods[f"{kind}.{cell.name}"] = tuple(_overrides(cell.values))
    return ComparisonConfig(experiment=experiment, methods=methods, seeds=(experiment.train.seed,))


def sweep_table(found: Comparison) -> str:
    """The combinations of settings in lines of text, the best first, and the best as overrides."""

    def kl(name: str) -> float:
        metrics = found.methods[name].metrics
        return metrics[KL.name].estimate.value if metrics else math.inf

    best, *_ = ranked = sorted(found.methods, key=kl)
    settings = {name: [text.split("=", 1) for text in found.config.methods[name]] for name in ranked}
    rows = [(*(key for key, _ in settings[best]), *(metric.name for metric in _COLUMNS), "seconds")]
    for name in ranked:
        method = found.methods[name]
        metrics = [
            metric.text(method.metrics[metric.name].estimate.value) if method.metrics else NOTHING
            for metric in _COLUMNS
        ]
        seconds = f"{method.training_seconds:.0f}" if method.metrics else NOTHING
        rows.append((*(value for _, value in settings[name]), *metrics, seconds))
    failed = dict.fromkeys(reason for method in found.methods.values() for reason in method.missing)
    chosen = " ".join(map(shlex.quote, found.config.methods[best]))
    lines = [aligned(rows), *(f"failed: {reason}" for reason in failed)]
    return "\n".join([*lines, f"best on further rows of the training split: {chosen}"])


def _overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides, quoted where YAML would read a text as something else."""
    found = []
    for key, value in values.items():
        plain = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) and yaml.safe_load(value) == value
        found.append(f"{key}={value if plain else json.dumps(value)}")
    return found
