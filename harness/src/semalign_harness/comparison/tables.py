"""Tables of a comparison, which Markdown and the report share, and its CSV."""

import csv
import io
from collections import Counter
from collections.abc import Iterator

from ..results.comparison import ComparedMetric, Comparison, MethodMetric, MethodResult
from ..results.metrics import NOTHING
from ..statistics import chance, interval, share
from ..util.tables import markdown
from ..util.text import gb, many, seconds_text

Row = tuple[str, ...]
COSTS = ("trained parameters", "steps", "supervised tokens", "training", "supervision", "memory", "stored")
READING = (
    "In brackets: 95% intervals over the items. Gap: share of the gap between target before and source that was "
    "closed, 0% none and 100% all of it; unbounded where the items cannot distinguish the gap from none. ↓: lower is "
    "better, ↑: higher is better. KL to the source and NLL are in nats per token, or per span where the tokenizers "
    "differ; agreement is top-1 agreement with the source."
)
COSTS_READING = (
    "Means over the runs. Supervised tokens count repeats. Supervision: computed once for all methods that need it. "
    "Memory: the largest peak during training, – where a run was resumed. Stored: size of the supervision on disk."
)
SPREADS_READING = "Mean ± standard deviation over the seeds; in brackets the 95% interval of the mean over seeds."
_COST_FIELDS = (
    "trained_parameters",
    "steps",
    "supervised_tokens",
    "training_seconds",
    "source_seconds",
    "peak_bytes",
    "training_peak_bytes",
    "stored_bytes",
)


def metric_title(name: str, metric: ComparedMetric) -> str:
    """Return the title of a metric's column."""
    return f"{name} {metric.arrow}"


def metric_cell(comparison: Comparison, name: str, key: str) -> str:
    """Return one metric of one method with the share of the gap; – where the method lacks it."""
    found = comparison.methods.get(name)
    if found is None or key not in found.metrics:
        return NOTHING
    ours = found.metrics[key]
    return f"{interval(ours.estimate, comparison.metrics[key].form())}\ngap {share(ours.gap)}"


def result_table(comparison: Comparison) -> list[Row]:
    """Return the metrics of source, target before and all methods, the header first."""
    metrics = comparison.metrics
    return [
        ("", *(metric_title(name, metric) for name, metric in metrics.items())),
        ("source", *(interval(metric.source, metric.form()) for metric in metrics.values())),
        ("target before", *(interval(metric.before, metric.form()) for metric in metrics.values())),
        *(
            (_label(name, found), *(metric_cell(comparison, name, key) for key in metrics))
            for name, found in comparison.methods.items()
        ),
    ]


def tests_table(comparison: Comparison) -> list[Row]:
    """Return the tests of each method against the rival of each metric; empty without any."""
    metrics = {key: metric for key, metric in comparison.metrics.items() if metric.rival is not None}
    rows = [
        (name, *(_test(found.metrics[key], metric) for key, metric in metrics.items()))
        for name, found in _own_runs(comparison)
    ]
    header = ("", *(f"{key} − {metric.rival}" for key, metric in metrics.items()))
    return [header, *rows] if metrics and len(rows) > 1 else []


def tests_reading(comparison: Comparison) -> str:
    """Return the explanation of the tests."""
    rival = comparison.config.against or "the best baseline of the metric"
    return f"Each method − {rival}, paired by item, with p-values of single tests."


def spreads_table(comparison: Comparison) -> list[Row]:
    """Return mean and spread over the seeds; empty for one seed."""
    if len(comparison.config.seeds) < 2:
        return []
    rows = [
        (name, *(_spread(found.metrics[key], metric) for key, metric in comparison.metrics.items()))
        for name, found in _own_runs(comparison)
    ]
    return [("", *comparison.metrics), *rows]


def costs_table(comparison: Comparison) -> list[Row]:
    """Return the costs of each method with metrics."""
    rows = [
        (
            _label(name, found),
            f"{found.trained_parameters:,}",
            f"{found.steps:,}",
            f"{found.supervised_tokens:,}",
            seconds_text(found.training_seconds),
            seconds_text(found.source_seconds) if found.source_seconds else NOTHING,
            NOTHING if found.training_peak_bytes is None else gb(found.training_peak_bytes),
            gb(found.stored_bytes),
        )
        for name, found in comparison.methods.items()
        if found.metrics
    ]
    return [("", *COSTS), *rows]


def budget(comparison: Comparison) -> str:
    """Return the supervised tokens that the methods share, and the methods with others."""
    finished = {name: found for name, found in comparison.methods.items() if found.metrics}
    (tokens, _), *others = Counter(found.supervised_tokens for found in finished.values()).most_common()
    if not others:
        return "the same supervised tokens for every method"
    apart = ", ".join(name for name, found in finished.items() if found.supervised_tokens != tokens)
    return f"{tokens:,} supervised tokens for every method but {apart}"


def missing_reasons(comparison: Comparison) -> list[str]:
    """Return the reasons why methods have no metrics."""
    return list(dict.fromkeys(reason for found in comparison.methods.values() for reason in found.missing))


def comparison_markdown(comparison: Comparison) -> str:
    """Return the tables with their explanations as Markdown."""
    items = ", ".join(f"{name} {metric.items}" for name, metric in comparison.metrics.items())
    parts = [_markdown(result_table(comparison))]
    if failed := missing_reasons(comparison):
        parts += ["Failed; the same command repeats them:", "\n".join(f"- {reason}" for reason in failed)]
    parts += [
        f"Mean over {many(len(comparison.config.seeds), 'seed')}. {READING} Items: {items}. "
        f"Budget: {budget(comparison)}; {comparison.train_rows()} training rows.",
        _markdown(costs_table(comparison)),
        COSTS_READING,
    ]
    for table, reading in (
        (spreads_table(comparison), SPREADS_READING),
        (tests_table(comparison), tests_reading(comparison)),
    ):
        parts += [_markdown(table), reading] if table else []
    return "\n\n".join(parts) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """Return one line for each method and metric with all digits, and one for each method without metrics."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["value", "low", "high", "spread", "gap", "gap_low", "gap_high"]
    columns += ["rival", "difference", "difference_low", "difference_high", "p"]
    writer.writerow(["method", "metric", *columns, *_COST_FIELDS, "note"])
    for name, found in comparison.methods.items():
        if not found.metrics:
            writer.writerow([name, "", *[""] * len(columns), *[""] * len(_COST_FIELDS), "; ".join(found.missing)])
        costs = [getattr(found, field) for field in _COST_FIELDS]
        note = "" if found.same_as is None else f"same settings as {found.same_as}"
        for key, ours in found.metrics.items():
            estimate, gap, versus = ours.estimate, ours.gap, ours.versus_rival
            tested: list[object] = [""] * 5
            if versus is not None:
                apart = versus.difference
                tested = [comparison.metrics[key].rival, apart.value, apart.low, apart.high, versus.p_value]
            own = [estimate.value, estimate.low, estimate.high, ours.over_seeds.spread, gap.value, gap.low, gap.high]
            writer.writerow([name, key, *own, *tested, *costs, note])
    return text.getvalue()


def _own_runs(comparison: Comparison) -> Iterator[tuple[str, MethodResult]]:
    """Methods with metrics of runs of their own."""
    for name, found in comparison.methods.items():
        if found.metrics and found.same_as is None:
            yield name, found


def _label(name: str, found: MethodResult) -> str:
    return name if found.same_as is None else f"{name} (= {found.same_as})"


def _test(ours: MethodMetric, metric: ComparedMetric) -> str:
    if ours.versus_rival is None:
        return NOTHING
    return f"{interval(ours.versus_rival.difference, metric.form('+'))}, {chance(ours.versus_rival.p_value)}"


def _spread(ours: MethodMetric, metric: ComparedMetric) -> str:
    over, form = ours.over_seeds, metric.form()
    return f"{over.mean:{form}} ± {over.spread or 0.0:{form}}; [{over.low:{form}}, {over.high:{form}}]"


def _markdown(rows: list[Row]) -> str:
    return markdown([[cell.replace("|", r"\|") for cell in row] for row in rows])
