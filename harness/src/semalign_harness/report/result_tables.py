"""Results as tables in plain text."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..results.measurement import Measurement, gap_recovered
from ..results.run import RunResult
from ..run.phase_cache import Entry
from ..util.tables import aligned

COLUMNS = ("", "source", "target before", "target after", "gap recovered")


def result_table(result: RunResult) -> str:
    """Source, target before and target after, with the share of the gap that was recovered."""
    rows = [
        _row(result, "answer NLL (nats/token)", lambda m: m.answer_nll, "{:.4f}"),
        _row(result, "KL to the source (nats/token)", lambda m: m.kl, "{:.4f}"),
        _row(result, "top-1 agreement", lambda m: m.agreement, "{:.1%}"),
        _row(result, "exact answers", lambda m: m.accuracy, "{:.1%}"),
    ]
    lines = [COLUMNS, *[row for row in rows if row]]
    text = aligned(lines)
    measured = f"{result.after.rows} held-out rows, {result.after.tokens} supervised tokens"
    if result.after.answer_rows:
        measured += f", {result.after.answer_rows} generated answers"
    training = result.training
    stages = f"{len(training.transfer.stages)} stages" if training.transfer else training.method
    # A resumed run has trained for longer than its last process took.
    of_all = f" of {result.seconds:.0f} s" if training.seconds <= result.seconds else " over all interruptions"
    cost = (
        f"{result.train_rows} training rows, {stages}, {training.steps} steps, "
        f"training {training.seconds:.0f} s{of_all}, "
        f"peak memory {result.peak_bytes / 2**30:.2f} GiB, supervision {result.supervision_bytes / 2**20:.0f} MiB"
    )
    return f"{text}\nmeasured on {measured}\n{cost}"


def entries_table(found: Sequence[Entry]) -> str:
    """Places of the cache, one a line."""
    rows = [("key", "source → target", "rows", "tokens", "size", "last used")]
    for entry in found:
        phase = entry.phase
        names = "unfinished" if phase is None else f"{Path(phase.source).name} → {Path(phase.target).name}"
        rows.append(
            (
                entry.folder.name,
                names,
                "" if phase is None else str(phase.train_rows),
                "" if phase is None else str(phase.supervised_tokens),
                f"{entry.size / 1e6:.1f} MB",
                f"{entry.unused_days:.1f} days ago",
            )
        )
    return aligned(rows)


def _row(
    result: RunResult, label: str, figure: Callable[[Measurement], float | None], form: str
) -> tuple[str, ...] | None:
    source, before, after = (figure(m) for m in (result.source, result.before, result.after))
    if source is None or before is None or after is None:
        return None
    recovered = gap_recovered(source, before, after)
    share = "–" if recovered is None else f"{recovered:.0%}"
    return (label, form.format(source), form.format(before), form.format(after), share)
