"""Two evaluations of the same items, and several of the same kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from semalign_geometry.base import SemalignError

from ..results.evaluation import BenchmarkResult, EvaluationResult, ItemRecord, Name
from ..results.files import EXPERIMENT
from ..statistics import (
    Aggregate,
    GapRecovered,
    PairedComparison,
    across_seeds,
    compare_outcomes,
    compare_values,
    estimate_gap_recovered,
)


class Evaluated(NamedTuple):
    """An evaluation folder, read."""

    folder: Path
    result: EvaluationResult
    items: dict[Name, list[ItemRecord]]


class Pair(NamedTuple):
    """One benchmark of two evaluations."""

    name: Name
    correct: PairedComparison
    """Headline figure: second − first."""
    bits_per_byte: PairedComparison | None
    """NLL of the gold answers, second − first; None when one of them did not measure it."""
    gap: GapRecovered | None
    """Share of the headline's gap to the source that the second closed; None without a source."""
    gap_bits: GapRecovered | None
    """The same of the bits per byte."""


def read_evaluation(folder: Path) -> Evaluated:
    """Read what `evaluate` wrote.

    Raises:
        SemalignError: the folder holds no evaluation, or a damaged one.
    """
    check_no_run(folder, remedy="give the folder of its evaluation")
    if not (folder / "result.json").is_file():
        raise SemalignError(f"{folder} holds no result.json: give the folder of a finished evaluation")
    result = EvaluationResult.read(folder / "result.json")
    return Evaluated(folder, result, {name: _items(folder, name) for name in result.benchmarks})


def check_no_run(folder: Path, *, remedy: str) -> None:
    """Refuse the folder of a run, whose `result.json` is another one."""
    if (folder / EXPERIMENT).is_file():
        raise SemalignError(f"{folder} holds a run, not an evaluation: {remedy}")


def _items(folder: Path, name: Name) -> list[ItemRecord]:
    file = folder / f"items-{name}.jsonl"
    remedy = f"evaluate {name} again into {folder}"
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise SemalignError(f"{file} cannot be read ({error.strerror}): {remedy}") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            items.append(ItemRecord.model_validate_json(line))
        except ValueError as error:  # pydantic's, and ours of a nested section
            raise SemalignError(f"{file}, line {number} is damaged: {remedy}") from error
    return items


def pair(first: Evaluated, second: Evaluated, *, source: Evaluated | None = None, seed: int = 0) -> list[Pair]:
    """Compare two models on the benchmarks that both were evaluated on.

    Raises:
        SemalignError: they share no benchmark, or were asked different documents or in different ways.
    """
    names = [name for name in first.items if name in second.items]
    if not names:
        raise SemalignError(f"{first.folder} and {second.folder} have no benchmark in common")
    pairs = []
    for name in names:
        for other in (second, *([source] if source and name in source.items else [])):
            _check_alike(name, first, other)
        before, after = first.items[name], second.items[name]
        of_source = source.items[name] if source and name in source.items else None
        bits = [[item.bits_per_byte for item in items] for items in (before, after, of_source or [])]
        weights = [item.gold_bytes or 0 for item in before]
        measured = all(value is not None for value in (*bits[0], *bits[1]))
        values = [[value for value in column if value is not None] for column in bits]
        pairs.append(
            Pair(
                name,
                correct=compare_outcomes([item.correct for item in after], [item.correct for item in before]),
                bits_per_byte=compare_values(values[1], values[0], weights=weights, seed=seed) if measured else None,
                gap=estimate_gap_recovered(
                    *([float(item.correct) for item in items] for items in (of_source, before, after)), seed=seed
                )
                if of_source
                else None,
                gap_bits=estimate_gap_recovered(values[2], values[0], values[1], weights=weights, seed=seed)
                if measured and len(values[2]) == len(before)
                else None,
            )
        )
    return pairs


def over_seeds(evaluations: Sequence[Evaluated]) -> dict[tuple[str, str], Aggregate]:
    """Mean and spread of each figure, by benchmark and metric, over evaluations of models that differ by their
    training seed.

    Raises:
        SemalignError: they were asked different documents or in different ways, or have no benchmark in common.
    """
    first = evaluations[0]
    names = [name for name in first.items if all(name in other.items for other in evaluations)]
    if not names:
        raise SemalignError("the evaluations have no benchmark in common")
    found: dict[tuple[str, str], Aggregate] = {}
    for name in names:
        for other in evaluations[1:]:
            _check_alike(name, first, other)
        results: list[BenchmarkResult] = [each.result.benchmarks[name] for each in evaluations]
        found[name, first.result.benchmarks[name].protocol.metric] = across_seeds([r.figure.value for r in results])
        bits = [r.bits_per_byte.value for r in results if r.bits_per_byte is not None]
        if len(bits) == len(results):
            found[name, "bits per byte"] = across_seeds(bits)
    return found


def _check_alike(name: Name, first: Evaluated, second: Evaluated) -> None:
    one, two = first.result.benchmarks[name], second.result.benchmarks[name]
    if one.protocol != two.protocol:
        raise SemalignError(
            f"{name} was put differently in {first.folder} and {second.folder}: evaluate both with the same chat "
            "setting, and the same version and code of the benchmark"
        )
    if one.documents_sha256 != two.documents_sha256:
        raise SemalignError(
            f"{first.folder} and {second.folder} drew different documents of {name}: evaluate both with the same "
            "limit, seed and data"
        )
