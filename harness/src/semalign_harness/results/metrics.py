"""The table of metrics: name, direction, number format, kind of interval, and how each is read from a result.

The terminal, matrices, sweeps, comparisons and reports read this table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from semalign_geometry.base import SemalignError

from ..statistics import (
    NATS,
    SHARE,
    Estimate,
    GapRecovered,
    Numbers,
    estimate_gap_recovered,
    interval,
    mean,
    proportion,
)
from .evaluation import BenchmarkResult
from .measurement import Measurement, RowMetrics
from .run import RunResult

NOTHING = "–"
"""Cell of a table without a value."""
SEED = 0
"""Seed of the bootstraps."""


def number_format(*, percent: bool, sign: str = "") -> str:
    """Return the format of a metric's numbers: shares in percent, others with four decimals."""
    return f"{sign}.1%" if percent else f"{sign}.4f"


def arrow(*, lower_is_better: bool) -> str:
    """Return the arrow of the better direction."""
    return "↓" if lower_is_better else "↑"


def _no_value(_: Measurement) -> None: ...


def _no_rows(_: RowMetrics) -> Numbers:
    return ()


def _spans(rows: RowMetrics) -> Numbers:
    return rows.tokens


def _no_estimate(_: BenchmarkResult) -> None: ...


@dataclass(frozen=True)
class Items:
    """One metric of one model, item by item."""

    values: Numbers
    weights: Numbers | None = None
    """Weight of each item, such as its tokens; None where all items count the same."""
    outcomes: bool = False
    """Whether each item is right or wrong."""
    within: tuple[float, float] = SHARE
    """Range of the metric."""

    @property
    def value(self) -> float:
        """Mean over the items."""
        return mean(self.values, weights=self.weights).value

    def estimate(self) -> Estimate:
        """Return the mean with its interval: Wilson's for outcomes, Student's t inside the range otherwise."""
        if self.outcomes and set(self.values) <= {0.0, 1.0}:
            return proportion([bool(value) for value in self.values])
        return mean(self.values, weights=self.weights, within=self.within)


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    """Title of its column, and its key in a comparison."""
    label: str
    """Its name with its unit."""
    value: Callable[[Measurement], float | None] = _no_value
    """Read it from a measurement."""
    rows: Callable[[RowMetrics], Numbers] = _no_rows
    """Read it row by row."""
    weights: Callable[[RowMetrics], Numbers] = _spans
    """Weights of the rows in their mean; ignored for outcomes."""
    benchmark: Callable[[BenchmarkResult], Estimate | None] = _no_estimate
    """Read it from a benchmark's result."""
    lower_is_better: bool = False
    outcomes: bool = False
    """Whether each row is right or wrong."""
    to_source: bool = False
    """Whether it compares with the source, whose own value then follows from the definition, without an interval."""

    @property
    def percent(self) -> bool:
        """Whether it is a share."""
        return not self.lower_is_better

    @property
    def form(self) -> str:
        """Format of its numbers."""
        return number_format(percent=self.percent)

    @property
    def title(self) -> str:
        """Its label with the better direction."""
        return f"{self.label} {arrow(lower_is_better=self.lower_is_better)}"

    def items(self, rows: RowMetrics) -> Items:
        """Return the metric row by row; without values where it was not measured."""
        if self.outcomes:
            return Items([float(value) for value in self.rows(rows)], outcomes=True)
        return Items(self.rows(rows), self.weights(rows), within=SHARE if self.percent else NATS)

    def estimate(self, measured: Measurement) -> Estimate | None:
        """Return the measured value with its interval over the rows; None where rows cannot give one."""
        value, items = self.value(measured), self.items(measured.by_row)
        if value is None or not items.values:
            return None
        try:
            return items.estimate().model_copy(update={"value": value})
        except SemalignError:  # a row is not finite
            return None

    def gap(self, result: RunResult) -> GapRecovered | None:
        """Return the share of the gap that the transfer closed; None where rows cannot give it."""
        source, before, after = (self.items(each.by_row) for each in (result.source, result.before, result.after))
        try:
            return estimate_gap_recovered(source.values, before.values, after.values, weights=before.weights, seed=SEED)
        except SemalignError:
            return None

    def text(self, value: float | None) -> str:
        """Return a value as text."""
        return NOTHING if value is None else format(value, self.form)

    def cell(self, measured: Measurement) -> str:
        """Return the measured value with its interval, where rows give one."""
        estimate = self.estimate(measured)
        return self.text(self.value(measured)) if estimate is None else interval(estimate, self.form)

    def source_cell(self, measured: Measurement) -> str:
        """Return the source's own value."""
        return self.text(self.value(measured)) if self.to_source else self.cell(measured)


NLL = Metric(
    "answer NLL",
    "answer NLL (nats/token)",
    value=lambda measured: measured.answer_nll,
    rows=lambda rows: rows.nll,
    lower_is_better=True,
)
KL = Metric(
    "KL",
    "KL to the source (nats/token)",
    value=lambda measured: measured.kl,
    rows=lambda rows: rows.kl,
    benchmark=lambda result: result.kl,
    lower_is_better=True,
    to_source=True,
)
AGREEMENT = Metric(
    "agreement",
    "top-1 agreement",
    value=lambda measured: measured.agreement,
    rows=lambda rows: rows.agreement,
    benchmark=lambda result: result.agreement,
    to_source=True,
)
EXACT = Metric(
    "exact answers",
    "exact answers",
    value=lambda measured: measured.accuracy,
    rows=lambda rows: rows.correct,
    outcomes=True,
)
SOLVED = Metric("solved", "solved documents", benchmark=lambda result: result.headline, outcomes=True)
BITS = Metric(
    "bits per byte",
    "bits per byte",
    value=lambda measured: measured.bits_per_byte,
    rows=lambda rows: rows.bits_per_byte,
    weights=lambda rows: rows.answer_bytes,
    benchmark=lambda result: result.bits_per_byte,
    lower_is_better=True,
)

MEASURED = (NLL, BITS, KL, AGREEMENT, EXACT)
"""Metrics of held-out rows."""
COMPARED = (KL, NLL, BITS, AGREEMENT, EXACT)
"""The same in the order of a comparison."""
DETAILS = (NLL.name, BITS.name, AGREEMENT.name)
"""Metrics that explain the KL; the report of several comparisons leaves them out."""
EVALUATED = (SOLVED, BITS, KL, AGREEMENT)
"""Metrics of benchmarks."""


def metrics_of(results: Sequence[RunResult]) -> list[Metric]:
    """Return the metrics that source, target before and target after of every run have, labelled with their unit."""
    measured = [each for result in results for each in (result.source, result.before, result.after)]
    units = " or ".join(sorted({"token" if each.spans is None else "span" for each in measured}, reverse=True))
    return [
        replace(metric, label=metric.label.replace("token", units))
        for metric in MEASURED
        if all(metric.value(each) is not None for each in measured)
    ]
