"""Metrics of methods from their runs: intervals over items, spread over seeds, gap recovered, paired tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..results.comparison import ComparedMetric, MethodMetric
from ..results.evaluation import Evaluated
from ..results.measurement import Measurement
from ..results.metrics import COMPARED, SEED, Items
from ..results.run import RunResult
from ..statistics import across_seeds, compare_outcomes, compare_values, estimate_gap_recovered

LOWER = {metric.name for metric in COMPARED if metric.lower_is_better}
"""Metrics of which less is better."""


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    result: RunResult
    evaluation: Evaluated | None


def items_of(measured: Measurement, evaluation: Evaluated | None) -> dict[str, Items]:
    """Return every metric of one model, item by item."""
    found = {metric.name: metric.items(measured.by_row) for metric in COMPARED}
    for name, items in (evaluation.items if evaluation else {}).items():
        found[name] = Items([float(item.correct) for item in items], outcomes=True)
    return {name: items for name, items in found.items() if items.values}


def describe_metrics(
    source: Mapping[str, Items],
    before: Mapping[str, Items],
    runs: Mapping[str, Sequence[Run]],
    rivals: Sequence[str],
) -> dict[str, ComparedMetric]:
    """Return direction, source, target before and rival of every metric that all runs have; the rival is the best of
    `rivals`."""
    found = {}
    of_runs = [_of_run(run) for finished in runs.values() for run in finished]  # earlier versions measured less
    for name, items in before.items():
        if not all(name in each for each in (source, *of_runs)):
            continue
        sign = 1 if name in LOWER else -1
        others = {method: sign * _averaged(runs[method], name).value for method in rivals if runs.get(method)}
        found[name] = ComparedMetric(
            lower_is_better=name in LOWER,
            percent=name not in LOWER,
            items=len(items.values),
            source=source[name].estimate(),
            before=items.estimate(),
            rival=min(others, key=others.__getitem__) if others else None,
        )
    return found


def metrics_of_method(
    method: str,
    runs: Mapping[str, Sequence[Run]],
    metrics: Mapping[str, ComparedMetric],
    source: Mapping[str, Items],
    before: Mapping[str, Items],
) -> dict[str, MethodMetric]:
    """Return every metric of a method whose runs are complete."""
    found = {}
    for name, metric in metrics.items():
        ours = _averaged(runs[method], name)
        rival = None if metric.rival in (None, method) else _averaged(runs[str(metric.rival)], name)
        versus = None
        if rival is not None and ours.outcomes and len(runs[method]) == len(runs[str(metric.rival)]) == 1:
            versus = compare_outcomes(*([bool(value) for value in each.values] for each in (ours, rival)))
        elif rival is not None:
            versus = compare_values(ours.values, rival.values, weights=ours.weights, seed=SEED)
        found[name] = MethodMetric(
            estimate=ours.estimate(),
            over_seeds=across_seeds([_of_run(run)[name].value for run in runs[method]]),
            gap=estimate_gap_recovered(
                source[name].values, before[name].values, ours.values, weights=ours.weights, seed=SEED
            ),
            versus_rival=versus,
        )
    return found


def _averaged(runs: Sequence[Run], name: str) -> Items:
    """Mean of each item over the seeds."""
    found = [_of_run(run)[name] for run in runs]
    values = [sum(values) / len(values) for values in zip(*(each.values for each in found), strict=True)]
    return replace(found[0], values=values)


def _of_run(run: Run) -> dict[str, Items]:
    return items_of(run.result.after, run.evaluation)
