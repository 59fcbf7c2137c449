"""Evaluations as text."""

from collections.abc import Sequence

from ..results.evaluation import EvaluationResult, Name
from ..statistics import Aggregate, PairedComparison, chance, interval, share
from ..util.tables import aligned
from ._compare import Pair


def evaluation_table(result: EvaluationResult) -> str:
    """One line for each benchmark, with 95% intervals."""
    lines = [("", "figure [95% interval]", "bits per byte", "KL (nats/token)", "top-1 agreement", "items", "seconds")]
    for name, found in result.benchmarks.items():
        lines.append(
            (
                f"{name} {found.protocol.metric}",
                interval(found.figure, ".1%"),
                interval(found.bits_per_byte, ".3f"),
                interval(found.kl, ".3f"),
                interval(found.agreement, ".1%"),
                f"{found.figure.count} of {found.documents}",
                f"{found.seconds:.0f}",
            )
        )
        for other, figure in found.other.items():
            lines.append((f"  {other}", interval(figure, ".1%"), "", "", "", "", ""))
        if found.reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(found.reasons.items()))
            lines.append((f"  ({counts})", "", "", "", "", "", ""))
    prompts = "the chat template" if result.chat else "plain prompts"
    notes = [f"zero-shot, {prompts}, {result.dtype}"]
    if result.sandbox is not None:
        level = result.sandbox
        layers = [f"{level.namespaces} namespaces"] * (level.namespaces != "none")
        layers += [f"Landlock {level.landlock}"] * bool(level.landlock) + ["seccomp"] * level.seccomp
        notes.append(f"programs ran within {', '.join([*layers, 'resource limits'])}")
    return "\n".join([aligned(lines), *notes])


def pair_table(pairs: Sequence[Pair]) -> str:
    """The second evaluation against the first, benchmark by benchmark."""
    lines = [("", "second − first [95% interval]", "p", "only second : only first", "gap recovered")]
    for found in pairs:
        lines.append((found.name, *_compared(found.correct, "+.1%"), share(found.gap)))
        if found.bits_per_byte is not None:
            lines.append(("  bits per byte", *_compared(found.bits_per_byte, "+.4f"), share(found.gap_bits)))
    text = aligned(lines)
    unbounded = "\nunbounded: too few items, or a gap that they cannot tell from none"
    return text + unbounded * ("[unbounded]" in text)


def seeds_table(found: dict[tuple[Name, str], Aggregate]) -> str:
    """Mean, spread and interval of each figure over training seeds."""
    lines = [("", "mean", "spread", "95% interval of the mean", "seeds")]
    for (name, figure), over in found.items():
        form = ".4f" if figure == "bits per byte" else ".1%"
        spread = "–" if over.spread is None else format(over.spread, form)
        ends = f"[{over.low:{form}}, {over.high:{form}}]"
        lines.append((f"{name} {figure}", format(over.mean, form), spread, ends, str(over.seeds)))
    return aligned(lines)


def _compared(comparison: PairedComparison, form: str) -> tuple[str, str, str]:
    alone = "–" if comparison.only_first is None else f"{comparison.only_first} : {comparison.only_second}"
    return interval(comparison.difference, form), chance(comparison.p_value).removeprefix("p "), alone
