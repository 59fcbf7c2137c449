"""How sure a figure is: 95% intervals, paired comparisons on the same items, training seeds, and the recovered gap.

Items are questions, programs or documents, drawn independently; every interval is about other items of the same kind.
Where one item or one seed cannot say how far figures scatter, the interval is the whole line, not a point.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import stats  # type: ignore[import-untyped]
from semalign_geometry.base import Contract, SemalignError

Numbers = Sequence[float | int]
"""One number for each item; outcomes count as 0 and 1."""
Values = npt.NDArray[np.float64]
"""One number for each item, as an array."""
CONFIDENCE = 0.95
"""How often an interval holds the figure of all items."""
RESAMPLES = 9_999
"""Resamples of a bootstrap."""
BOOTSTRAP_ITEMS = 5
"""Items below which resamples do not reach the ends of a 95% interval, so that a bootstrap bounds nothing."""
VALUES_AT_ONCE = 2**22
"""Resampled values that are in memory at a time."""
_ROUNDING = 1e-12
"""Share of numbers up to which their difference is rounding alone."""
SHARE = (0.0, 1.0)
"""Where a share lies."""
NATS = (0.0, float("inf"))
"""Where a KL, a negative log-likelihood of tokens or their bits lie."""


class Estimate(Contract):
    """A figure with its 95% interval."""

    value: float
    """The figure."""
    standard_error: float
    """Its standard error; infinite for one item."""
    low: float
    """Lower end of the 95% interval; −infinity where the items bound nothing."""
    high: float
    """Upper end of the 95% interval; infinity where the items bound nothing."""
    count: int = Field(ge=1)
    """Items."""


class PairedComparison(Contract):
    """Two models on the same items."""

    difference: Estimate
    """First − second."""
    p_value: float = Field(ge=0, le=1)
    """Two-sided, of the hypothesis that both are equally good."""
    method: Literal["mcnemar", "paired_bootstrap"]
    """The test behind `p_value`."""
    only_first: int | None = None
    """Items that only the first model solves; None for values."""
    only_second: int | None = None
    """Items that only the second model solves; None for values."""
    count: int = Field(ge=1)
    """Items."""


class Aggregate(Contract):
    """One figure over several training seeds."""

    mean: float
    """Mean over the seeds."""
    spread: float | None
    """Standard deviation over the seeds (divisor seeds − 1); None for one seed."""
    low: float
    """Lower end of the 95% interval of the mean; −infinity for one seed."""
    high: float
    """Upper end of the 95% interval of the mean; infinity for one seed."""
    seeds: int = Field(ge=1)
    """Seeds."""
    values: tuple[float, ...]
    """The figure of each seed."""


class GapRecovered(Contract):
    """The share of the gap between source and target that a transfer closed."""

    value: float | None
    """(after − before) / (source − before): 0 nothing, 1 all of it; None when there is no gap."""
    low: float | None
    """Lower end of the 95% interval; None when it is unbounded."""
    high: float | None
    """Upper end of the 95% interval; None when it is unbounded."""
    bounded: bool
    """Whether the items bound the share: False when they cannot tell the gap itself from zero."""
    count: int = Field(ge=1)
    """Items."""


def proportion(outcomes: Sequence[bool]) -> Estimate:
    """The share of true outcomes, with Wilson's interval, which is defined at 0 and at 1 and stays between them.

    The standard error is √(p(1 − p)/n), hence 0 when all outcomes are equal; the interval is not.

    Raises:
        SemalignError: there are no outcomes.

    Source: Wilson (1927), Journal of the American Statistical Association 22.
    """
    right, count = int(_outcomes(outcomes).sum()), len(outcomes)
    value = right / count
    low, high = _wilson(right, count)
    return Estimate(value=value, standard_error=(value * (1 - value) / count) ** 0.5, low=low, high=high, count=count)


def mean(
    values: Numbers, *, weights: Numbers | None = None, within: tuple[float, float] = (-float("inf"), float("inf"))
) -> Estimate:
    """The weighted mean Σ w·x / Σ w with the t interval of n − 1 degrees of freedom.

    With weights the mean is a ratio of two sums that both vary with the items; its standard error is the linearised
    one, √(n/(n − 1) · Σ w²(x − mean)²) / Σ w. Equal weights give the plain mean and s/√n. Bits per byte of a corpus:
    `values` the bits per byte of each document, `weights` its bytes.

    Args:
        values: one for each item.
        weights: one for each item, above 0; None for equal ones.
        within: the smallest and the largest that the figure can be: a longer interval is cut there, which costs it
            nothing of its coverage.

    Raises:
        SemalignError: there are no values, the lengths differ, a value is not finite, or a weight is not above 0.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), eq. 6.13.
    """
    x, w = _aligned(values, weights=weights)
    value = float(_weighted(x, w))
    error = _linearised_error(x, w)
    low, high = _t_interval(value, error, len(x))
    if len(x) > 1:
        low, high = max(low, within[0]), min(high, within[1])
    return Estimate(value=value, standard_error=error, low=low, high=high, count=len(x))


def compare_outcomes(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Two models' outcomes on the same items: the exact McNemar test, and the interval of the difference of shares.

    Only the items that one model alone solves count in the test: under the hypothesis each goes to either model with
    probability ½. Without any such item p is 1. The interval is Newcombe's method 10, built of both Wilson intervals
    and their correlation; it is not the inverse of the test, so near p = 0.05 the two can disagree.

    Raises:
        SemalignError: there are no outcomes, or the lengths differ.

    Source: McNemar (1947), Psychometrika 12; Newcombe (1998), Statistics in Medicine 17, 2635–2650, method 10.
    """
    a, b = _outcomes(first), _outcomes(second)
    _check_lengths(a, b)
    count = len(a)
    both, only_first = int((a & b).sum()), int((a & ~b).sum())
    only_second, neither = int((~a & b).sum()), int((~a & ~b).sum())
    discordant = only_first + only_second
    difference = (only_first - only_second) / count
    below, above = _newcombe(both, only_first, only_second, neither)
    variance = max(0.0, discordant / count - difference**2) / count
    return PairedComparison(
        difference=Estimate(
            value=difference,
            standard_error=variance**0.5,
            low=max(-1.0, difference - below),
            high=min(1.0, difference + above),
            count=count,
        ),
        p_value=float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        method="mcnemar",
        only_first=only_first,
        only_second=only_second,
        count=count,
    )


def compare_values(first: Numbers, second: Numbers, *, weights: Numbers | None = None, seed: int) -> PairedComparison:
    """Two models' values on the same items: difference of the (weighted) means, by the paired bootstrap.

    Items are resampled with both of their values. The interval is the studentised one (bootstrap-t), which follows the
    skew of the differences, united with the t interval, so that few items or many ties never shorten it. The p-value is
    its inverse: below 0.05 exactly when the interval leaves out 0, up to the grain of the resamples. Fewer than five
    items bound nothing: p is 1. The order of the items does not matter.

    Measured coverage of 95% intervals where every difference has the skew of a log-normal of σ = 1: 0.93, 0.94 and 0.96
    for 20, 48 and 100 items (0.90 to 0.93 with weights), where percentile intervals cover 0.87, 0.90 and 0.92. At σ of
    1.5 they cover 0.88, 0.90 and 0.92.

    Args:
        first: one value for each item.
        second: the other model's, on the same items.
        weights: one for each item, above 0, as in `mean`; None for equal ones.
        seed: seed of the resampling.

    Raises:
        SemalignError: as for `mean`.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5.
    """
    a, b, w = _in_order(_aligned(first, second, weights=weights))
    count = len(a)
    gaps = a - b
    value, error = float(_weighted(gaps, w)), _linearised_error(gaps, w)
    pivots = _pivots(gaps, w, seed=seed)
    below, above = _reaches(pivots, count)
    return PairedComparison(
        difference=Estimate(
            value=value, standard_error=error, low=value - below * error, high=value + above * error, count=count
        ),
        p_value=_inverted(value, error, pivots, count),
        method="paired_bootstrap",
        count=count,
    )


def chance(p_value: float) -> str:
    """A p-value; one that three decimals would show as 0 as what it is below."""
    return "p < 0.001" if p_value < 0.0005 else f"p {p_value:.3f}"


def interval(found: Estimate | GapRecovered | None, form: str) -> str:
    """A figure with its 95% interval, its numbers in a form such as `.1%`; – where there is none."""
    if found is None or found.value is None:
        return "–"
    low, high = found.low, found.high
    bounded = low is not None and high is not None and np.isfinite([low, high]).all()
    return f"{found.value:{form}} " + (f"[{low:{form}}, {high:{form}}]" if bounded else "[unbounded]")


def share(gap: GapRecovered | None) -> str:
    """The share of a gap with its interval."""
    return interval(gap, ".0%")


def across_seeds(values: Numbers) -> Aggregate:
    """Mean, spread and t interval of one figure over training seeds.

    Raises:
        SemalignError: there are no values, or one is not finite.
    """
    found = mean(values)
    spread = None if found.count == 1 else found.standard_error * found.count**0.5
    return Aggregate(
        mean=found.value, spread=spread, low=found.low, high=found.high, seeds=found.count, values=tuple(values)
    )


def estimate_gap_recovered(
    source: Numbers,
    before: Numbers,
    after: Numbers,
    *,
    weights: Numbers | None = None,
    seed: int,
) -> GapRecovered:
    """(after − before) / (source − before) on the same items, with its interval by the paired bootstrap.

    Laws: 0 with a point interval when `after` is `before`, 1 likewise when it is `source`. The interval is Fieller's:
    the shares ρ for which the mean of gain − ρ · gap may be zero, with the quantiles of `compare_values` for t's.
    Where the interval of the gap itself, source − before, holds 0, or would at the larger quantile of gain − ρ · gap,
    no share is ruled out: `bounded` is False and no ends are given. Lower may be better (NLL) or higher (accuracy).

    Where the true gap is small against its standard error, few intervals are bounded, and those are the draws in which
    the gap came out large, so that fewer than 95% of them hold the share: read it beside the gap's own interval.

    Args:
        source: the source's value on each item.
        before: the target's before the transfer.
        after: the target's after it.
        weights: one for each item, above 0, as in `mean`; None for equal ones.
        seed: seed of the resampling.

    Raises:
        SemalignError: as for `mean`.

    Source: Fieller (1954), Journal of the Royal Statistical Society B 16.
    """
    s, b, t, w = _in_order(_aligned(source, before, after, weights=weights))
    count = len(s)
    sign = 1.0 if _weighted(s - b, w) > 0 else -1.0
    gaps, gains = sign * (s - b), sign * (t - b)
    gap = float(_weighted(gaps, w))
    value = float(_weighted(gains, w)) / gap if gap else None
    if value is None or count < BOOTSTRAP_ITEMS:
        return GapRecovered(value=value, low=None, high=None, bounded=False, count=count)
    residuals = gains - value * gaps
    residuals = np.where(np.abs(residuals) > _ROUNDING * np.abs(gains).max(), residuals, 0.0)
    below, above = _reaches(_pivots(residuals, w, seed=seed), count)
    reach_of_gap = max(below, above, _reaches(_pivots(gaps, w, seed=seed), count)[0])
    if gap <= reach_of_gap * _linearised_error(gaps, w):
        return GapRecovered(value=value, low=None, high=None, bounded=False, count=count)
    low, high = (value + _fieller(gap, residuals, gaps, w, reach) for reach in (-below, above))
    return GapRecovered(value=value, low=low, high=high, bounded=True, count=count)


def _fieller(gap: float, residuals: Values, gaps: Values, w: Values, reach: float) -> float:
    """The δ at which the mean of residuals − δ · gaps, −δ · gap, is −`reach` of its standard errors."""
    curvature = gap**2 - reach**2 * _linearised_covariance(gaps, gaps, w)
    shared = reach * _linearised_covariance(residuals, gaps, w)
    root = math.sqrt(shared**2 + curvature * _linearised_covariance(residuals, residuals, w))
    return reach * (root - shared) / curvature


def _weighted(x: Values, w: Values, axis: int = -1) -> Values | np.float64:
    total: Values | np.float64 = (w * x).sum(axis) / w.sum(axis)
    return total


def _linearised_covariance(x: Values, y: Values, w: Values) -> float:
    """Of two weighted means of the same items."""
    count = len(x)
    products = w**2 * (x - _weighted(x, w)) * (y - _weighted(y, w))
    return float(count / (count - 1) * products.sum() / w.sum() ** 2)


def _linearised_error(x: Values, w: Values) -> float:
    return float("inf") if len(x) == 1 else _linearised_covariance(x, x, w) ** 0.5


def _t_interval(value: float, error: float, count: int) -> tuple[float, float]:
    if count == 1:
        return -float("inf"), float("inf")
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return value - reach, value + reach


def _wilson(right: int, count: int) -> tuple[float, float]:
    interval = stats.binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """How far the interval of the difference reaches below and above it, by method 10 of the source."""
    count = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(covariance - count / 2, 0.0)
    margins = first * (count - first) * second * (count - second)
    correlation = covariance / margins**0.5 if margins else 0.0
    (low_1, high_1), (low_2, high_2) = _wilson(first, count), _wilson(second, count)
    down_1, up_1 = first / count - low_1, high_1 - first / count
    down_2, up_2 = second / count - low_2, high_2 - second / count
    below = down_1**2 - 2 * correlation * down_1 * up_2 + up_2**2
    above = up_1**2 - 2 * correlation * up_1 * down_2 + down_2**2
    return max(below, 0.0) ** 0.5, max(above, 0.0) ** 0.5


def _in_order(columns: list[Values]) -> list[Values]:
    """Items sorted by their numbers, so that the order that they come in changes nothing, not even rounding."""
    order = np.lexsort(columns)
    return [column[order] for column in columns]


def _pivots(x: Values, w: Values, *, seed: int) -> Values:
    """(Mean of resampled items − mean) / its standard error in the resample.

    The error is at least a quarter of that in x: a resample that misses the one item that differs from the others has
    nearly none, and would decide the interval alone.
    """
    count = len(x)
    if count < BOOTSTRAP_ITEMS:
        return np.zeros(0)
    x = x - _weighted(x, w)
    columns = np.stack([w, w * x, w**2, w**2 * x, w**2 * x**2], axis=1)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, RESAMPLES, step := max(1, VALUES_AT_ONCE // count)):
        rows = min(step, RESAMPLES - start)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(times.astype(np.float64) @ columns)
    total, sums, squares, crossed, own = np.concatenate(parts).T
    means = sums / total
    spread = own - 2 * means * crossed + means**2 * squares  # Σ w²(x − mean)²
    errors = (count / (count - 1) * spread.clip(0)) ** 0.5 / total
    pivots: Values = means / np.maximum(errors, _linearised_error(x, w) / 4 or np.inf)
    return pivots


def _reaches(pivots: Values, count: int) -> tuple[float, float]:
    """How many standard errors the 95% interval reaches below and above its figure: never fewer than those of t."""
    if count < BOOTSTRAP_ITEMS:
        return float("inf"), float("inf")
    low, high = np.quantile(pivots, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    of_t = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return max(of_t, float(high)), max(of_t, -float(low))


def _inverted(value: float, error: float, pivots: Values, count: int) -> float:
    """The level at which the interval of `_reaches` begins to leave out 0."""
    if count < BOOTSTRAP_ITEMS or not value:
        return 1.0
    pivot = value / error if error else float(np.sign(value)) * float("inf")
    beyond = int((pivots >= pivot).sum() if pivot > 0 else (pivots <= pivot).sum())
    tail = max((1 + beyond) / (1 + len(pivots)), float(stats.t.sf(abs(pivot), count - 1)))
    return min(1.0, 2 * tail)


def _outcomes(outcomes: Sequence[bool]) -> npt.NDArray[np.bool_]:
    if not len(outcomes):
        raise SemalignError("there are no outcomes: a figure needs at least one item")
    return np.asarray(outcomes, dtype=np.bool_)


def _aligned(*columns: Numbers, weights: Numbers | None) -> list[Values]:
    """The columns and the weights as float64, checked."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if not len(arrays[0]):
        raise SemalignError("there are no values: a figure needs at least one item")
    arrays.append(np.ones(len(arrays[0])) if weights is None else np.asarray(weights, dtype=np.float64))
    _check_lengths(*arrays)
    for array in arrays:
        if not np.isfinite(array).all():
            place = int(np.flatnonzero(~np.isfinite(array))[0])
            raise SemalignError(f"item {place} has the value {array[place]}: leave it out, or find out why")
    if not (arrays[-1] > 0).all():
        raise SemalignError(f"the smallest weight is {arrays[-1].min():g}, expected above 0: leave such items out")
    return arrays


def _check_lengths(*arrays: npt.NDArray[np.bool_] | Values) -> None:
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise SemalignError(f"there are {' and '.join(map(str, lengths))} items, expected the same items in one order")
