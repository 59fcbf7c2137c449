"""Figures of methods from their runs: intervals over items, spread over seeds, gap recovered, tests by pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..evaluation import Evaluated
from ..results.comparison import Figure, Metric
from ..results.measurement import Measurement
from ..results.run import RunResult
from ..statistics import (
    NATS,
    SHARE,
    Estimate,
    Numbers,
    across_seeds,
    compare_outcomes,
    compare_values,
    estimate_gap_recovered,
    mean,
    proportion,
)


@dataclass(frozen=True)
class Values:
    """One metric of one model, item by item."""

    items: Numbers
    weights: Numbers | None
    """Tokens of each item; None where all count alike."""
    outcomes: bool
    """Whether each item is right or wrong."""
    within: tuple[float, float] = SHARE
    """Where the figure can lie."""

    @property
    def value(self) -> float:
        """The figure."""
        return mean(self.items, weights=self.weights).value

    def estimate(self) -> Estimate:
        """The figure with its interval over the items."""
        if self.outcomes and set(self.items) <= {0.0, 1.0}:
            return proportion([bool(item) for item in self.items])
        return mean(self.items, weights=self.weights, within=self.within)


KL, NLL, AGREEMENT = "KL", "answer NLL", "agreement"
LOWER = (NLL, KL)
"""Metrics of which less is better."""
BESIDES = (NLL, AGREEMENT)
"""Metrics that say how the KL comes about."""


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    result: RunResult
    evaluation: Evaluated | None


def metrics_of(measured: Measurement, evaluation: Evaluated | None) -> dict[str, Values]:
    """Every metric of one model."""
    rows = measured.by_row
    found = {
        KL: Values(rows.kl, rows.tokens, False, NATS),
        NLL: Values(rows.nll, rows.tokens, False, NATS),
        AGREEMENT: Values(rows.agreement, rows.tokens, False),
    }
    if rows.correct:
        found["exact answers"] = Values([float(right) for right in rows.correct], None, True)
    for name, items in (evaluation.items if evaluation else {}).items():
        found[name] = Values([float(item.correct) for item in items], None, True)
    return found


def describe_metrics(
    source: Mapping[str, Values],
    before: Mapping[str, Values],
    runs: Mapping[str, Sequence[Run]],
    rivals: Sequence[str],
) -> dict[str, Metric]:
    """What is known of every metric before methods are looked at one by one; the best of `rivals` is its rival."""
    found = {}
    for name, values in before.items():
        sign = 1 if name in LOWER else -1
        others = {method: sign * _averaged(runs[method], name).value for method in rivals if runs.get(method)}
        found[name] = Metric(
            lower_is_better=name in LOWER,
            percent=name not in LOWER,
            items=len(values.items),
            source=source[name].estimate(),
            before=values.estimate(),
            rival=min(others, key=others.__getitem__) if others else None,
        )
    return found


def figures_of(
    method: str,
    runs: Mapping[str, Sequence[Run]],
    metrics: Mapping[str, Metric],
    source: Mapping[str, Values],
    before: Mapping[str, Values],
    *,
    seed: int = 0,
) -> dict[str, Figure]:
    """Every figure of one method, whose runs are all there."""
    found = {}
    for name, metric in metrics.items():
        ours = _averaged(runs[method], name)
        rival = None if metric.rival in (None, method) else _averaged(runs[str(metric.rival)], name)
        versus = None
        if rival is not None and ours.outcomes and len(runs[method]) == len(runs[str(metric.rival)]) == 1:
            versus = compare_outcomes(*([bool(item) for item in each.items] for each in (ours, rival)))
        elif rival is not None:
            versus = compare_values(ours.items, rival.items, weights=ours.weights, seed=seed)
        gap = estimate_gap_recovered(
            source[name].items, before[name].items, ours.items, weights=ours.weights, seed=seed
        )
        found[name] = Figure(
            estimate=ours.estimate(),
            over_seeds=across_seeds([_of_run(run)[name].value for run in runs[method]]),
            gap=gap,
            versus_rival=versus,
        )
    return found


def _averaged(runs: Sequence[Run], name: str) -> Values:
    """Each item's mean over the seeds."""
    found = [_of_run(run)[name] for run in runs]
    items = [sum(values) / len(values) for values in zip(*(each.items for each in found), strict=True)]
    return replace(found[0], items=items)


def _of_run(run: Run) -> dict[str, Values]:
    return metrics_of(run.result.after, run.evaluation)
