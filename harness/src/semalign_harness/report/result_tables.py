"""Table of a run for the terminal."""

from ..results.measurement import gap_recovered
from ..results.metrics import NOTHING, metrics_of
from ..results.run import RunResult
from ..util.tables import aligned
from ..util.text import gb

COLUMNS = ("", "source", "target before", "target after", "gap recovered")


def result_table(result: RunResult) -> str:
    """Return the metrics of source, target before and target after, with the share of the gap recovered."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for metric in metrics_of([result]):
        source, before, after = (metric.value(each) or 0.0 for each in (result.source, result.before, result.after))
        recovered = gap_recovered(source, before, after)
        gap = NOTHING if recovered is None else f"{recovered:.0%}"
        rows.append((metric.label, *map(metric.text, (source, before, after)), gap))
    measured = f"{result.after.rows} held-out rows, {result.after.tokens} supervised tokens"
    if result.after.spans is not None:
        measured += f", {result.after.spans} spans"
    if result.after.answer_rows:
        measured += f", {result.after.answer_rows} generated answers"
    training = result.training
    stages = f"{len(training.transfer.stages)} stages" if training.transfer else training.method
    # A resumed run has trained for longer than its last process took.
    of_all = f" of {result.seconds:.0f} s" if training.seconds <= result.seconds else " over all interruptions"
    cost = (
        f"{result.train_rows} training rows, {stages}, {training.steps} steps, "
        f"training {training.seconds:.0f} s{of_all}, "
        f"peak memory {gb(result.peak_bytes)}, supervision {gb(result.supervision_bytes)}"
    )
    return f"{aligned(rows)}\nmeasured on {measured}\n{cost}"
