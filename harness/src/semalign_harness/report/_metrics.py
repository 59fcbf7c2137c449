"""The figures of a run, each with its column of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from semalign_geometry.base import SemalignError

from ..results.measurement import Measurement, RowFigures
from ..results.run import RunResult
from ..statistics import NATS, SHARE, Estimate, GapRecovered, estimate_gap_recovered, interval, mean, proportion, share
from ._cells import NOTHING, arrow, form

SEED = 0
"""Seed of the bootstraps."""


@dataclass(frozen=True)
class Metric:
    """One figure of a measurement."""

    name: str
    value: Callable[[Measurement], float | None]
    column: Callable[[RowFigures], Sequence[float]]
    lower_is_better: bool = False
    of_tokens: bool = True
    """Whether rows count by their supervised tokens; otherwise each row is right or wrong."""
    to_source: bool = False
    """Whether it compares with the source, whose own figure is then what it is by definition, without an interval."""

    @property
    def percent(self) -> bool:
        """Whether it is a share."""
        return not self.lower_is_better

    @property
    def form(self) -> str:
        """How its numbers stand."""
        return form(percent=self.percent)

    @property
    def title(self) -> str:
        """Its name, with the direction that is better."""
        return f"{self.name} {arrow(lower_is_better=self.lower_is_better)}"

    def estimate(self, measured: Measurement) -> Estimate | None:
        """The figure as it was measured, with its interval over the rows; None where rows cannot give one."""
        value, column = self.value(measured), self.column(measured.by_row)
        if value is None or not column:
            return None
        try:
            if self.of_tokens:
                within = SHARE if self.percent else NATS
                found = mean(column, weights=measured.by_row.tokens, within=within)
            else:
                found = proportion([*map(bool, column)])
        except SemalignError:  # a row is not finite
            return None
        return found.model_copy(update={"value": value})

    def gap(self, result: RunResult) -> GapRecovered | None:
        """Share of the gap that the transfer closed."""
        source, before, after = (self.column(each.by_row) for each in (result.source, result.before, result.after))
        weights = result.before.by_row.tokens if self.of_tokens else None
        try:
            return estimate_gap_recovered(source, before, after, weights=weights, seed=SEED)
        except SemalignError:
            return None

    def cell(self, measured: Measurement) -> str:
        """The figure with its interval; without one where rows cannot give it."""
        value, estimate = self.value(measured), self.estimate(measured)
        if value is None:
            return NOTHING
        return format(value, self.form) if estimate is None else interval(estimate, self.form)

    def of_source(self, measured: Measurement) -> str:
        """The source's own figure."""
        value = self.value(measured)
        return format(value, self.form) if self.to_source and value is not None else self.cell(measured)


METRICS = (
    Metric("answer NLL (nats/token)", lambda m: m.answer_nll, lambda rows: rows.nll, lower_is_better=True),
    Metric("KL to the source (nats/token)", lambda m: m.kl, lambda rows: rows.kl, lower_is_better=True, to_source=True),
    Metric("top-1 agreement", lambda m: m.agreement, lambda rows: rows.agreement, to_source=True),
    Metric("exact answers", lambda m: m.accuracy, lambda rows: rows.correct, of_tokens=False),
)


def metrics_of(result: RunResult) -> list[Metric]:
    """The figures that source, target before and target after have."""
    all_three = (result.source, result.before, result.after)
    return [metric for metric in METRICS if all(metric.value(measured) is not None for measured in all_three)]


def result_rows(result: RunResult) -> tuple[tuple[str, ...], ...]:
    """Source, target before and target after with intervals, and the share of the gap that was recovered."""
    return tuple(
        (
            metric.title,
            metric.of_source(result.source),
            metric.cell(result.before),
            metric.cell(result.after),
            share(metric.gap(result)),
        )
        for metric in metrics_of(result)
    )
