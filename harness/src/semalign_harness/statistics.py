"""How sure a figure is: 95% intervals, paired comparisons on the same items, training seeds, and the recovered gap.

Items are questions, programs or documents, drawn independently; every interval is about other items of the same kind.
Where one item or one seed cannot say how far figures scatter, the interval is the whole line, not a point.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import stats  # type: ignore[import-untyped]
from semalign_geometry import Contract, SemalignError

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

    Items are resampled with both of their values. The interval is the percentile interval, expanded so that few items
    give the width of a t interval; the p-value is its inverse: below 0.05 exactly when the interval leaves out 0, up to
    the grain of the resamples. Fewer than five items bound nothing: p is 1. The order of the items does not matter.

    Args:
        first: one value for each item.
        second: the other model's, on the same items.
        weights: one for each item, above 0, as in `mean`; None for equal ones.
        seed: seed of the resampling.

    Raises:
        SemalignError: as for `mean`.

    Source: Hesterberg (2015), The American Statistician 69, "expanded percentile".
    """
    a, b, w = _aligned(first, second, weights=weights)
    count = len(a)
    gaps = a - b
    value = float(_weighted(gaps, w))
    resampled = _resampled(_weighted, gaps, w, seed=seed)
    low, high = _expanded_percentiles(resampled, count)
    return PairedComparison(
        difference=Estimate(value=value, standard_error=_linearised_error(gaps, w), low=low, high=high, count=count),
        p_value=_inverted(resampled, count),
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

    Laws: 0 with a point interval when `after` is `before`, 1 likewise when it is `source`. A ratio whose denominator
    may be zero has no bounded interval (Fieller 1954): when the 95% interval of source − before holds 0, `bounded` is
    False and no ends are given. Lower may be better (NLL) or higher (accuracy).

    Args:
        source: the source's value on each item.
        before: the target's before the transfer.
        after: the target's after it.
        weights: one for each item, above 0, as in `mean`; None for equal ones.
        seed: seed of the resampling.

    Raises:
        SemalignError: as for `mean`.
    """
    s, b, t, w = _aligned(source, before, after, weights=weights)
    count = len(s)
    gap = float(_weighted(s - b, w))
    value = float(_weighted(t - b, w)) / gap if gap else None
    gaps = _resampled(_weighted, s - b, w, seed=seed)
    nearest, farthest = _expanded_percentiles(gaps, count)
    if value is None or nearest <= 0 <= farthest:
        return GapRecovered(value=value, low=None, high=None, bounded=False, count=count)
    shares = _resampled(_share, s - b, t - b, w, seed=seed)
    low, high = _expanded_percentiles(shares[~np.isnan(shares)], count)
    bounded = bool(np.isfinite([low, high]).all())
    return GapRecovered(
        value=value, low=low if bounded else None, high=high if bounded else None, bounded=bounded, count=count
    )


def _weighted(x: Values, w: Values, axis: int = -1) -> Values | np.float64:
    total: Values | np.float64 = (w * x).sum(axis) / w.sum(axis)
    return total


def _share(gap: Values, gain: Values, w: Values, axis: int = -1) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):  # resamples without a gap: infinite, or nan and left out
        share: Values = (w * gain).sum(axis) / (w * gap).sum(axis)
    return share


def _linearised_error(x: Values, w: Values) -> float:
    count = len(x)
    if count == 1:
        return float("inf")
    residual = w * (x - _weighted(x, w))
    return float((count / (count - 1) * (residual**2).sum()) ** 0.5 / w.sum())


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


def _resampled(statistic: Callable[..., Values | np.float64], *columns: Values, seed: int) -> Values:
    """The statistic on resampled items; the items are sorted first, so that their order does not matter."""
    count = len(columns[0])
    if count < BOOTSTRAP_ITEMS:
        return np.zeros(0)
    order = np.lexsort(columns)
    # scipy also takes the interval and the variance of statistics that are infinite in some resamples.
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            [column[order] for column in columns],
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, VALUES_AT_ONCE // count),
            vectorized=True,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    distribution: Values = found.bootstrap_distribution
    return distribution


def _expanded_percentiles(resampled: Values, count: int) -> tuple[float, float]:
    """Percentile interval as wide as a t interval: resamples of n items scatter by a factor √((n − 1)/n) too little."""
    if count < BOOTSTRAP_ITEMS:
        return -float("inf"), float("inf")
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * (count / (count - 1)) ** 0.5
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(resampled, [stats.norm.cdf(-reach), stats.norm.cdf(reach)])
    return float(low), float(high)


def _inverted(resampled: Values, count: int) -> float:
    """The level at which `_expanded_percentiles` begins to leave out 0."""
    if count < BOOTSTRAP_ITEMS:
        return 1.0
    beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
    tail = min(0.5, (1 + beyond) / (1 + len(resampled)))
    return float(2 * stats.t.cdf(stats.norm.ppf(tail) * ((count - 1) / count) ** 0.5, count - 1))


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
