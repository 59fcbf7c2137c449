"""Evaluations as text."""

from collections.abc import Sequence

from ..results.evaluation import EvaluationResult, Name
from ..results.metrics import BITS, EVALUATED, NOTHING, SOLVED
from ..statistics import Aggregate, PairedComparison, chance, interval, share
from ..util.tables import aligned
from ._compare import Pair


def evaluation_table(result: EvaluationResult) -> str:
    """Return one line for each benchmark, with 95% intervals."""
    lines = [("[95% intervals]", *(metric.label for metric in EVALUATED), "documents", "seconds")]
    blank = ("",) * (len(EVALUATED) + 1)
    for name, found in result.benchmarks.items():
        lines.append(
            (
                f"{name} {found.protocol.metric}",
                *(interval(metric.benchmark(found), metric.form) for metric in EVALUATED),
                f"{found.headline.count} of {found.documents}",
                f"{found.seconds:.0f}",
            )
        )
        lines += [(f"  {other}", interval(also, SOLVED.form), *blank) for other, also in found.other.items()]
        if found.reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(found.reasons.items()))
            lines.append((f"  ({counts})", "", *blank))
    prompts = "the chat template" if result.chat else "plain prompts"
    notes = [f"zero-shot, {prompts}, {result.dtype}"]
    if result.sandbox is not None:
        level = result.sandbox
        layers = [f"{level.namespaces} namespaces"] * (level.namespaces != "none")
        layers += [f"Landlock {level.landlock}"] * bool(level.landlock) + ["seccomp"] * level.seccomp
        notes.append(f"programs ran within {', '.join([*layers, 'resource limits'])}")
    return "\n".join([aligned(lines), *notes])


def pair_table(pairs: Sequence[Pair]) -> str:
    """Return the second evaluation against the first, benchmark by benchmark."""
    lines = [("", "second − first [95% interval]", "p", "only second : only first", "gap recovered")]
    for found in pairs:
        lines.append((found.name, *_compared(found.correct, f"+{SOLVED.form}"), share(found.gap)))
        if found.bits_per_byte is not None:
            lines.append((f"  {BITS.name}", *_compared(found.bits_per_byte, f"+{BITS.form}"), share(found.gap_bits)))
    text = aligned(lines)
    unbounded = "\nunbounded: too few items, or a gap that they cannot distinguish from none"
    return text + unbounded * ("[unbounded]" in text)


def seeds_table(found: dict[tuple[Name, str], Aggregate]) -> str:
    """Return mean, spread and interval of each metric over training seeds."""
    lines = [("", "mean", "spread", "95% interval of the mean", "seeds")]
    for (name, metric), over in found.items():
        form = BITS.form if metric == BITS.name else SOLVED.form
        spread = NOTHING if over.spread is None else format(over.spread, form)
        ends = f"[{over.low:{form}}, {over.high:{form}}]"
        lines.append((f"{name} {metric}", format(over.mean, form), spread, ends, str(over.seeds)))
    return aligned(lines)


def _compared(comparison: PairedComparison, form: str) -> tuple[str, str, str]:
    alone = NOTHING if comparison.only_first is None else f"{comparison.only_first} : {comparison.only_second}"
    return interval(comparison.difference, form), chance(comparison.p_value).removeprefix("p "), alone
