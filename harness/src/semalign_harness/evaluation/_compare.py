"""Two evaluations of the same items, and several of the same kind."""

from collections.abc import Sequence
from typing import NamedTuple

from semalign_geometry.base import SemalignError

from ..results.evaluation import Evaluated, ItemRecord, Name
from ..results.metrics import BITS
from ..statistics import (
    Aggregate,
    GapRecovered,
    PairedComparison,
    across_seeds,
    compare_outcomes,
    compare_values,
    estimate_gap_recovered,
)


class Pair(NamedTuple):
    """One benchmark of two evaluations."""

    name: Name
    correct: PairedComparison
    """Headline metric: second − first."""
    bits_per_byte: PairedComparison | None
    """NLL of the gold answers, second − first; None when one of them did not measure it."""
    gap: GapRecovered | None
    """Share of the headline's gap to the source that the second closed; None without a source."""
    gap_bits: GapRecovered | None
    """The same of the bits per byte."""


def pair(first: Evaluated, second: Evaluated, *, source: Evaluated | None = None, seed: int = 0) -> list[Pair]:
    """Compare two models on the benchmarks that both were evaluated on.

    Raises:
        SemalignError: they share no benchmark, or were asked different documents or in different ways.
    """
    names = _common([first, second])
    return [_pair(name, first, second, source if source and name in source.items else None, seed) for name in names]


def _pair(name: Name, first: Evaluated, second: Evaluated, source: Evaluated | None, seed: int) -> Pair:
    evaluations = [each for each in (first, second, source) if each is not None]
    _check_alike(name, evaluations)
    before, after = (
        [item.correct for item in first.items[name]],
        [item.correct for item in second.items[name]],
    )
    bits = [_bits(each.items[name]) for each in evaluations]
    weights = [item.gold_bytes or 0 for item in first.items[name]]
    compared = gap = gap_bits = None
    if bits[0] is not None and bits[1] is not None:
        compared = compare_values(bits[1], bits[0], weights=weights, seed=seed)
    if source is not None:
        best = [float(item.correct) for item in source.items[name]]
        gap = estimate_gap_recovered(best, [*map(float, before)], [*map(float, after)], seed=seed)
        if bits[0] is not None and bits[1] is not None and bits[2] is not None:
            gap_bits = estimate_gap_recovered(bits[2], bits[0], bits[1], weights=weights, seed=seed)
    return Pair(name, compare_outcomes(after, before), compared, gap, gap_bits)


def over_seeds(evaluations: Sequence[Evaluated]) -> dict[tuple[str, str], Aggregate]:
    """Return mean and spread over models that differ by training seed, by benchmark and metric.

    Raises:
        SemalignError: they were asked different documents or in different ways, or have no benchmark
            in common.
    """
    found: dict[tuple[str, str], Aggregate] = {}
    for name in _common(evaluations):
        _check_alike(name, evaluations)
        results = [each.result.benchmarks[name] for each in evaluations]
        found[name, results[0].protocol.metric] = across_seeds([each.headline.value for each in results])
        bits = [each.bits_per_byte.value for each in results if each.bits_per_byte is not None]
        if len(bits) == len(results):
            found[name, BITS.name] = across_seeds(bits)
    return found


def _common(evaluations: Sequence[Evaluated]) -> list[Name]:
    names = [name for name in evaluations[0].items if all(name in other.items for other in evaluations)]
    if not names:
        folders = " and ".join(str(each.folder) for each in evaluations)
        raise SemalignError(f"{folders} have no benchmark in common")
    return names


def _bits(items: list[ItemRecord]) -> list[float] | None:
    """Bits per byte of every item; None when one was not measured."""
    values = [item.bits_per_byte for item in items]
    return None if None in values else [value for value in values if value is not None]


def _check_alike(name: Name, evaluations: Sequence[Evaluated]) -> None:
    first, *others = evaluations
    one = first.result.benchmarks[name]
    for other in others:
        two = other.result.benchmarks[name]
        if one.protocol != two.protocol:
            raise SemalignError(
                f"{name} was put differently in {first.folder} and {other.folder}: evaluate both with the same chat "
                "setting, and the same version and code of the benchmark"
            )
        if one.documents_sha256 != two.documents_sha256:
            raise SemalignError(
                f"{first.folder} and {other.folder} drew different documents of {name}: evaluate both with the same "
                "limit, seed and data"
            )
