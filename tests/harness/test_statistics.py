"""Intervals hold what they promise, comparisons are fair to both models, and few items never look like certainty."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from semalign_geometry.base import SemalignError
from semalign_harness import statistics
from semalign_harness.statistics import (
    BOOTSTRAP_ITEMS,
    SHARE,
    Aggregate,
    Estimate,
    GapRecovered,
    PairedComparison,
    across_seeds,
    compare_outcomes,
    compare_values,
    estimate_gap_recovered,
    mean,
    proportion,
)

REPEATS = 2_000
outcomes = st.lists(st.booleans(), min_size=1, max_size=60)
paired_outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
number = st.floats(-100, 100).map(lambda x: round(x, 3))
numbers = st.lists(number, min_size=1, max_size=40)
some_numbers = st.lists(number, min_size=BOOTSTRAP_ITEMS, max_size=20)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


bootstrap = pytest.mark.usefixtures("few_resamples")
few_examples = settings(max_examples=20)


def columns(pairs: Sequence[tuple[bool, bool]]) -> tuple[list[bool], list[bool]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


@given(outcomes)
def test_a_proportion_lies_in_its_interval_and_the_interval_in_0_to_1(outcomes: list[bool]) -> None:
    found = proportion(outcomes)
    assert found.value == sum(outcomes) / len(outcomes) and found.count == len(outcomes)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.05, "sixty outcomes at most, all equal or not, leave a width"


@given(outcomes)
def test_wrong_is_the_mirror_of_right(outcomes: list[bool]) -> None:
    right, wrong = proportion(outcomes), proportion([not outcome for outcome in outcomes])
    assert (wrong.value, wrong.low, wrong.high) == pytest.approx((1 - right.value, 1 - right.high, 1 - right.low))
    assert wrong.standard_error == pytest.approx(right.standard_error)


@given(outcomes, st.integers(2, 5))
def test_more_items_narrow_a_proportion(outcomes: list[bool], times: int) -> None:
    few, many = proportion(outcomes), proportion(outcomes * times)
    assert many.value == pytest.approx(few.value)
    assert many.high - many.low < few.high - few.low


def test_a_proportion_solves_the_score_equation() -> None:
    found = proportion([True] * 7 + [False] * 3)
    z = stats.norm.ppf(0.975)
    for end in (found.low, found.high):
        assert abs(0.7 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 10))
    assert found.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 10))


@given(numbers)
def test_equal_weights_give_the_plain_mean(values: list[float]) -> None:
    plain, weighted = mean(values), mean(values, weights=[2.5] * len(values))
    assert plain.value == pytest.approx(np.mean(values), abs=1e-9) == pytest.approx(weighted.value, abs=1e-9)
    if len(values) > 1:
        error = stats.sem(values)
        reach = stats.t.ppf(0.975, len(values) - 1) * error
        assert plain.standard_error == pytest.approx(error, abs=1e-9)
        assert weighted.standard_error == pytest.approx(error, abs=1e-9)
        assert (plain.low, plain.high) == pytest.approx((plain.value - reach, plain.value + reach), abs=1e-9)


def test_a_weighted_mean_is_a_ratio_of_sums_with_nearly_the_jackknife_error() -> None:
    generator = np.random.default_rng(4)
    amounts = generator.uniform(50, 500, 200)
    bits = amounts * generator.normal(1.2, 0.2, 200)
    found = mean((bits / amounts).tolist(), weights=amounts.tolist())
    assert found.value == pytest.approx(bits.sum() / amounts.sum())
    without = (bits.sum() - bits) / (amounts.sum() - amounts)
    jackknife = math.sqrt(199 / 200 * ((without - without.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(jackknife, rel=0.02)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_interval_of_a_mean_stays_where_its_figure_can_be(values: list[float]) -> None:
    free, cut = mean(values), mean(values, within=SHARE)
    assert (cut.value, cut.standard_error) == (free.value, free.standard_error)
    assert (cut.low, cut.high) == (max(0.0, free.low), min(1.0, free.high))
    assert mean(values[:1], within=SHARE) == mean(values[:1]), "one item still bounds nothing"


def test_one_item_bounds_nothing_but_a_share() -> None:
    assert mean([3.0]) == Estimate(value=3, standard_error=math.inf, low=-math.inf, high=math.inf, count=1)
    assert mean([3.0], weights=[7.0]).high == math.inf
    assert compare_values([1.0], [2.0], seed=0).p_value == 1
    lone = across_seeds([0.5])
    assert (lone.mean, lone.spread, lone.low, lone.seeds) == (0.5, None, -math.inf, 1)
    assert estimate_gap_recovered([1.0], [0.0], [0.5], seed=0) == GapRecovered(
        value=0.5, low=None, high=None, bounded=False, count=1
    )
    share = proportion([True])
    assert share.value == 1 and share.low == pytest.approx(1 / (1 + stats.norm.ppf(0.975) ** 2))
    assert Estimate.model_validate_json(mean([3.0]).model_dump_json()) == mean([3.0]), "infinity survives JSON"


def brute_force_mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided: all splits of the discordant items that are no likelier than this one."""
    total = only_first + only_second
    ways = [math.comb(total, k) for k in range(total + 1)]
    return sum(way for way in ways if way <= ways[only_first]) / 2**total


@given(paired_outcomes)
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(pairs: list[tuple[bool, bool]]) -> None:
    first, second = columns(pairs)
    found = compare_outcomes(first, second)
    assert found.only_first == pairs.count((True, False)) and found.only_second == pairs.count((False, True))
    assert found.p_value == pytest.approx(brute_force_mcnemar(found.only_first, found.only_second))
    assert found.method == "mcnemar" and found.count == len(pairs)


@given(paired_outcomes)
def test_exchanging_the_models_mirrors_the_comparison(pairs: list[tuple[bool, bool]]) -> None:
    first, second = columns(pairs)
    there, back = compare_outcomes(first, second), compare_outcomes(second, first)
    assert there.p_value == back.p_value
    assert there.difference.value == -back.difference.value
    assert (there.difference.low, there.difference.high) == pytest.approx((-back.difference.high, -back.difference.low))
    assert there.difference.standard_error == pytest.approx(back.difference.standard_error)


@given(paired_outcomes)
def test_a_difference_of_shares_lies_in_its_interval(pairs: list[tuple[bool, bool]]) -> None:
    first, second = columns(pairs)
    difference = compare_outcomes(first, second).difference
    assert difference.value == pytest.approx(proportion(first).value - proportion(second).value)
    assert -1 <= difference.low <= difference.value <= difference.high <= 1
    gaps = [a - b for a, b in pairs]
    assert difference.standard_error == pytest.approx(np.std(gaps) / math.sqrt(len(pairs)))


@given(outcomes)
def test_identical_models_cannot_be_told_apart(outcomes: list[bool]) -> None:
    found = compare_outcomes(outcomes, outcomes)
    assert found.p_value == 1 and found.difference.value == 0
    assert found.difference.low < 0 < found.difference.high, "equal on these items does not mean equal on all"


def test_the_interval_of_the_difference_is_that_of_the_literature() -> None:
    # Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8, square-and-add.
    first = [True] * 65 + [False] * 96
    second = [True] * 59 + [False] * 6 + [True] * 16 + [False] * 80
    difference = compare_outcomes(first, second).difference
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.0621, -0.1186, -0.0046), abs=5e-5)


@bootstrap
@few_examples
@given(st.data(), some_numbers, seeds)
def test_a_bootstrap_depends_on_its_seed_and_not_on_the_order(
    data: st.DataObject, first: list[float], seed: int
) -> None:
    count = len(first)
    second = data.draw(st.lists(number, min_size=count, max_size=count))
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    found = compare_values(first, second, weights=weights, seed=seed)
    assert compare_values(first, second, weights=weights, seed=seed) == found
    moved = compare_values(
        *([x[i] for i in order] for x in (first, second)), weights=[weights[i] for i in order], seed=seed
    )
    assert (moved.difference.low, moved.difference.high) == (found.difference.low, found.difference.high)
    assert moved.p_value == found.p_value
    assert moved.difference.value == pytest.approx(found.difference.value)


def test_another_seed_draws_other_resamples() -> None:
    first = np.random.default_rng(0).normal(size=30).tolist()
    one, other = (compare_values(first, [0.0] * 30, seed=seed) for seed in (1, 2))
    assert one.difference.value == other.difference.value and one.difference.low != other.difference.low
    assert one.difference.low == pytest.approx(other.difference.low, abs=0.05)


@bootstrap
@few_examples
@given(st.lists(number, min_size=8, max_size=20), st.floats(0.5, 5), seeds)
def test_a_shift_of_all_items_is_found_and_its_sign_is_kept(values: list[float], shift: float, seed: int) -> None:
    shifted = [value + shift for value in values]
    above, below = compare_values(shifted, values, seed=seed), compare_values(values, shifted, seed=seed)
    assert above.difference.value == pytest.approx(shift) == pytest.approx(-below.difference.value)
    assert above.difference.low == pytest.approx(shift) == pytest.approx(above.difference.high)
    assert above.p_value == below.p_value < 0.05
    same = compare_values(values, values, seed=seed)
    assert same.p_value == 1 and (same.difference.low, same.difference.value, same.difference.high) == (0, 0, 0)


def test_the_p_value_is_the_level_whose_interval_ends_at_0() -> None:
    generator = np.random.default_rng(5)
    for count, effect in ((8, 0.7), (30, 0.3), (400, 0.08)):
        first = generator.normal(effect, 1, count)
        found = compare_values(first.tolist(), [0.0] * count, seed=1)
        assert (found.p_value < 0.05) == (found.difference.low > 0 or found.difference.high < 0)
        assert found.p_value == pytest.approx(stats.ttest_1samp(first, 0).pvalue, rel=0.5, abs=0.005)


def test_few_items_get_the_width_of_a_t_interval() -> None:
    values = stats.norm.ppf((np.arange(10) + 0.5) / 10).tolist()
    expected = mean(values)
    for seed in range(3):
        found = compare_values(values, [0.0] * 10, seed=seed).difference
        assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.06)
        assert found.low <= expected.low and found.high >= expected.high


def test_fewer_than_five_items_bound_no_difference() -> None:
    found = compare_values([9.0, 9.1, 9.0, 9.2], [1.0, 1.0, 1.1, 1.0], seed=0)
    assert found.p_value == 1 and (found.difference.low, found.difference.high) == (-math.inf, math.inf)
    assert math.isfinite(found.difference.standard_error)


@given(st.lists(number, min_size=2, max_size=8))
def test_seeds_are_aggregated_by_their_t_interval(values: list[float]) -> None:
    found = across_seeds(values)
    assert found.values == tuple(values) and found.seeds == len(values)
    assert found.spread == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    interval = stats.ttest_1samp(values, 0).confidence_interval() if len(set(values)) > 1 else (values[0], values[0])
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-9)


@bootstrap
@few_examples
@given(st.data(), some_numbers, seeds)
def test_nothing_recovered_is_0_and_everything_is_1(data: st.DataObject, before: list[float], seed: int) -> None:
    before = before + before  # ten items or more bound a gap that varies by a factor of two
    gaps = data.draw(st.lists(st.floats(1, 2), min_size=len(before), max_size=len(before)))
    sign = data.draw(st.sampled_from([-1, 1]))
    source = [b + sign * gap for b, gap in zip(before, gaps, strict=True)]
    nothing = estimate_gap_recovered(source, before, before, seed=seed)
    assert (nothing.value, nothing.low, nothing.high, nothing.bounded) == (0, 0, 0, True)
    everything = estimate_gap_recovered(source, before, source, seed=seed)
    assert (everything.value, everything.low, everything.high, everything.bounded) == (1, 1, 1, True)
    half = [b + (s - b) / 2 for s, b in zip(source, before, strict=True)]
    found = estimate_gap_recovered(source, before, half, weights=gaps, seed=seed)
    assert found.value == pytest.approx(0.5) == pytest.approx(found.low) == pytest.approx(found.high)


def test_a_gap_that_may_be_zero_bounds_nothing() -> None:
    generator = np.random.default_rng(2)
    source, before, after = (generator.random(100) < rate for rate in (0.52, 0.5, 0.51))
    found = estimate_gap_recovered(source.tolist(), before.tolist(), after.tolist(), seed=0)
    assert found.value is not None and (found.low, found.high, found.bounded) == (None, None, False)
    none = estimate_gap_recovered(before.tolist(), before.tolist(), after.tolist(), seed=0)
    assert none == GapRecovered(value=None, low=None, high=None, bounded=False, count=100)


def test_a_gap_recovered_agrees_with_fiellers_interval() -> None:
    generator = np.random.default_rng(3)
    before = generator.normal(0, 1, 500)
    gap = generator.normal(1, 0.5, 500)
    gain = 0.6 * gap + generator.normal(0, 0.3, 500)
    found = estimate_gap_recovered((before + gap).tolist(), before.tolist(), (before + gain).tolist(), seed=0)
    t = stats.t.ppf(0.975, 499)
    means, covariance = np.array([gain.mean(), gap.mean()]), np.cov(gain, gap) / 500
    a, b, c = (
        means[1] ** 2 - t**2 * covariance[1, 1],
        -2 * (means[0] * means[1] - t**2 * covariance[0, 1]),
        means[0] ** 2 - t**2 * covariance[0, 0],
    )
    ends = sorted(np.roots([a, b, c]).real)
    assert found.bounded and (found.low, found.high) == pytest.approx(ends, abs=0.004)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: proportion([]), "no outcomes"),
        (lambda: mean([]), "no values"),
        (lambda: mean([1.0, math.nan]), "item 1 has the value nan"),
        (lambda: mean([1.0, 2.0], weights=[1.0, 0.0]), "smallest weight is 0"),
        (lambda: mean([1.0], weights=[1.0, 1.0]), "1 and 2 items"),
        (lambda: compare_outcomes([True], [True, False]), "1 and 2 items"),
        (lambda: compare_values([1.0], [1.0, 2.0], seed=0), "1 and 2"),
        (lambda: across_seeds([]), "no values"),
        (lambda: estimate_gap_recovered([1.0], [0.0], [], seed=0), "1 and 1 and 0"),
    ],
)
def test_figures_that_do_not_exist_are_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(SemalignError, match=words):
        call()


def coverage(intervals: Sequence[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def ends(found: Estimate | Aggregate) -> tuple[float, float]:
    return found.low, found.high


def test_intervals_of_shares_cover() -> None:
    generator = np.random.default_rng(7)
    rights = generator.binomial(80, 0.7, REPEATS)
    cached = {right: ends(proportion([True] * right + [False] * (80 - right))) for right in set(rights.tolist())}
    assert 0.93 <= coverage([cached[right] for right in rights.tolist()], 0.7) <= 0.97


def test_intervals_of_means_cover() -> None:
    generator = np.random.default_rng(8)
    draws = generator.normal(2, 3, (REPEATS, 12))
    assert 0.93 <= coverage([ends(mean(row)) for row in draws.tolist()], 2) <= 0.97
    assert 0.93 <= coverage([ends(across_seeds(row[:3])) for row in draws.tolist()], 2) <= 0.97


def test_intervals_of_ratios_cover() -> None:
    generator = np.random.default_rng(9)
    sizes = generator.gamma(4, 1, (REPEATS, 100))
    values = generator.normal(1, 0.3, (REPEATS, 100)) + 0.05 * sizes
    truth = 1 + 0.05 * (4 + 16) / 4  # E[w·x] / E[w], x = noise + 0.05 w, of a gamma of mean 4 and variance 4
    covered = coverage([ends(mean(x, weights=w)) for x, w in zip(values.tolist(), sizes.tolist(), strict=True)], truth)
    assert 0.93 <= covered <= 0.97


def test_intervals_of_paired_shares_cover() -> None:
    generator = np.random.default_rng(10)
    kinds = ((True, True), (True, False), (False, True), (False, False))
    counts, tallies = np.unique(generator.multinomial(100, (0.5, 0.2, 0.1, 0.2), REPEATS), axis=0, return_counts=True)
    covered = 0
    for row, tally in zip(counts.tolist(), tallies.tolist(), strict=True):
        first, second = columns([kind for kind, times in zip(kinds, row, strict=True) for _ in range(times)])
        low, high = ends(compare_outcomes(first, second).difference)
        covered += tally * (low <= 0.1 <= high)
    assert 0.93 <= covered / REPEATS <= 0.97


@pytest.mark.parametrize(
    ("items", "weighted", "least"), [(20, False, 0.9), (48, False, 0.92), (100, False, 0.93), (100, True, 0.92)]
)
def test_intervals_of_skewed_differences_cover(
    monkeypatch: pytest.MonkeyPatch, items: int, weighted: bool, least: float
) -> None:
    """KL of a few rows: most differences are small, some large. Percentile intervals cover 0.87, 0.90, 0.92, 0.91."""
    monkeypatch.setattr(statistics, "RESAMPLES", 399)
    generator, repeats = np.random.default_rng(12), 500
    rows = generator.lognormal(0, 1, (repeats, items))
    weights = generator.gamma(2, 20, (repeats, items)) + 5
    found = [
        ends(compare_values(row, [0.0] * items, weights=w if weighted else None, seed=number).difference)
        for number, (row, w) in enumerate(zip(rows.tolist(), weights.tolist(), strict=True))
    ]
    covered = coverage(found, math.exp(0.5))
    assert least <= covered <= 0.98, f"{covered:.3f} of the intervals hold the mean"


@pytest.mark.parametrize("items", [10, 100])
def test_one_item_that_differs_does_not_blow_up_an_interval(items: int) -> None:
    """Resamples without it scatter by nearly nothing, and would put its difference a thousand errors away."""
    rows = [*np.random.default_rng(3).normal(0, 0.001, items - 1).tolist(), 5.0]
    found = compare_values(rows, [0.0] * items, seed=0).difference
    assert found.low <= found.value <= found.high <= found.value + 10 * found.standard_error


@pytest.mark.parametrize("solved", [[1.0] + [0.0] * 19, [1.0, -1.0] + [0.0] * 8])
def test_ties_shorten_no_interval(solved: list[float]) -> None:
    """Many resamples hold no item that differs, and scatter by nothing."""
    found, of_t = compare_values(solved, [0.0] * len(solved), seed=0).difference, mean(solved)
    assert math.isfinite(found.low) and math.isfinite(found.high)
    assert found.low <= of_t.low and found.high >= of_t.high


def test_a_small_gap_is_seldom_bounded_and_then_not_more_often_wrong_than_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 199)
    generator, repeats, wrong, bounded = np.random.default_rng(5), 400, 0, 0
    for number in range(repeats):
        outcomes = [(generator.random(300) < rate).tolist() for rate in (0.51, 0.5, 0.505)]
        found = estimate_gap_recovered(*outcomes, seed=number)
        bounded += found.bounded
        wrong += found.low is not None and found.high is not None and not found.low <= 0.5 <= found.high
    assert bounded / repeats < 0.1 and wrong / repeats < 0.02


@pytest.mark.slow
def test_intervals_of_the_bootstrap_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    generator, repeats = np.random.default_rng(11), REPEATS // 2  # a resampling each: half as many, for time
    gaps = generator.normal(1, 0.8, (repeats, 20))
    gains = 0.6 * gaps + generator.normal(0, 0.5, (repeats, 20))
    zeros = [0.0] * 20
    differences, shares, significant = [], [], 0
    for number, (gap, gain) in enumerate(zip(gaps.tolist(), gains.tolist(), strict=True)):
        differences.append(ends(compare_values(gap, zeros, seed=number).difference))
        share = estimate_gap_recovered(gap, zeros, gain, seed=number)
        shares.append((-math.inf if share.low is None else share.low, math.inf if share.high is None else share.high))
        centred: PairedComparison = compare_values([x - 1 for x in gap], zeros, seed=number)
        significant += centred.p_value < 0.05
    assert 0.93 <= coverage(differences, 1) <= 0.97
    assert 0.93 <= coverage(shares, 0.6) <= 0.97
    assert 0.03 <= significant / repeats <= 0.07, "equal models differ significantly in about one case of twenty"


@pytest.mark.parametrize("items", [5, 50, 500])
def test_resampling_never_proves_a_difference(items: int) -> None:
    """No resample crossed zero is not the same as none can: p stays above 0."""
    found = compare_values([1.0 + 0.01 * i for i in range(items)], [0.0] * items, seed=0)
    assert 0 < found.p_value < 0.05
