"""A comparison as Markdown and as CSV."""

import csv
import io
from collections import Counter

from ..results.comparison import Comparison, Figure, MethodFigures, Metric
from ..statistics import GapRecovered, chance, interval
from ..util.tables import markdown
from ..util.text import gb

Row = list[str]
COSTS = ("trained", "tokens", "seconds", "memory", "stored")
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


def comparison_markdown(comparison: Comparison) -> str:
    """One table of figures and costs, one of tests against a rival, and what they are."""
    metrics, config = comparison.metrics, comparison.config
    arrows = {name: "↓" if metric.lower_is_better else "↑" for name, metric in metrics.items()}
    header = ["", *(f"{name} {arrows[name]}" for name in metrics), *COSTS]
    rows = [
        ["source", *(interval(metric.source, _form(metric)) for metric in metrics.values()), *[""] * len(COSTS)],
        ["target before", *(interval(metric.before, _form(metric)) for metric in metrics.values()), *[""] * len(COSTS)],
        *(_row(name, found, metrics) for name, found in comparison.methods.items()),
    ]
    seeds = f"{len(config.seeds)} seed" + "s" * (len(config.seeds) > 1)
    items = ", ".join(f"{name} {metric.items}" for name, metric in metrics.items())
    failed = dict.fromkeys(reason for found in comparison.methods.values() for reason in found.missing)
    lines = [_table(header, rows)]
    if failed:
        lines += ["Failed, and tried again by the same command:", "\n".join(f"- {reason}" for reason in failed)]
    lines += [
        f"Mean over {seeds}; in brackets the 95% interval over the items ({items}), after it the share of the gap "
        "between target and source that was closed, – where the items cannot tell the gap from none. "
        f"Budget: {_budget(comparison)}; {comparison.train_rows()} training rows. "
        "Trained: numbers of all stages together. Tokens: supervised ones that were trained on, repeats included. "
        "Seconds: training, then what the source left behind, where the method needs it (made once for all). Memory: "
        "the largest peak while a run trained, – where a run went on from an earlier process. Stored: supervision on "
        "disk.",
    ]
    if len(config.seeds) > 1:
        lines += ["Spread (standard deviation) over the seeds:", _spreads(comparison)]
    tested = _tests(comparison)
    if tested:
        rival = config.against or "the best baseline of each metric"
        lines += [f"Against {rival}, paired by item, p-values of single tests:", tested]
    return "\n\n".join(lines) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """One line for each method and metric, with all digits; one for a method without figures, which says why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ["value", "low", "high", "spread", "gap", "gap_low", "gap_high"]
    figures += ["rival", "difference", "difference_low", "difference_high", "p"]
    writer.writerow(["method", "metric", *figures, *_COST_FIELDS, "note"])
    for name, found in comparison.methods.items():
        if not found.figures:
            writer.writerow([name, "", *[""] * len(figures), *[""] * len(_COST_FIELDS), "; ".join(found.missing)])
        cost = ["" if (value := getattr(found, field)) is None else value for field in _COST_FIELDS]
        note = "" if found.same_as is None else f"same settings as {found.same_as}"
        for metric, figure in found.figures.items():
            versus, best = figure.versus_rival, comparison.metrics[metric].rival
            tested: list[object] = ["", "", "", "", ""]
            if versus is not None:
                apart = versus.difference
                tested = [best, apart.value, apart.low, apart.high, versus.p_value]
            estimate, gap = figure.estimate, figure.gap
            shares = ["" if value is None else value for value in (gap.value, gap.low, gap.high)]
            spread = "" if figure.over_seeds.spread is None else figure.over_seeds.spread
            row = [name, metric, estimate.value, estimate.low, estimate.high, spread, *shares, *tested, *cost, note]
            writer.writerow(row)
    return text.getvalue()


def _row(name: str, found: MethodFigures, metrics: dict[str, Metric]) -> Row:
    label = name if found.same_as is None else f"{name} (= {found.same_as})"
    if not found.figures:
        return [label, "failed", *[""] * (len(metrics) - 1 + len(COSTS))]
    figures = found.figures
    cells = [
        f"{interval(figures[key].estimate, _form(metric))} {_share(figures[key].gap)}"
        for key, metric in metrics.items()
    ]
    seconds = f"{found.training_seconds:.0f}" + f" + {found.source_seconds:.0f}" * (found.source_seconds > 0)
    numbers = [f"{found.trained_parameters:,}", f"{found.supervised_tokens:,}"]
    memory = "–" if found.training_peak_bytes is None else gb(found.training_peak_bytes)
    return [label, *cells, *numbers, seconds, memory, gb(found.stored_bytes)]


def _budget(comparison: Comparison) -> str:
    """What the methods had alike, and which of them had not."""
    finished = {name: found for name, found in comparison.methods.items() if found.figures}
    (tokens, _), *others = Counter(found.supervised_tokens for found in finished.values()).most_common()
    if not others:
        return "the same supervised tokens for every method"
    apart = ", ".join(name for name, found in finished.items() if found.supervised_tokens != tokens)
    return f"{tokens:,} supervised tokens for every method but {apart}"


def _tests(comparison: Comparison) -> str:
    metrics = {name: metric for name, metric in comparison.metrics.items() if metric.rival is not None}
    rows = [
        [name, *(_test(found.figures[key], metric) for key, metric in metrics.items())]
        for name, found in comparison.methods.items()
        if found.figures and found.same_as is None
    ]
    header = ["", *(f"{name} − {metric.rival}" for name, metric in metrics.items())]
    return _table(header, rows) if metrics and len(rows) > 1 else ""


def _spreads(comparison: Comparison) -> str:
    rows = []
    for name, found in comparison.methods.items():
        if not found.figures or found.same_as is not None:
            continue
        metrics = comparison.metrics.items()
        rows.append(
            [name, *(f"{found.figures[key].over_seeds.spread or 0.0:{_form(metric)}}" for key, metric in metrics)]
        )
    return _table(["", *comparison.metrics], rows)


def _test(figure: Figure, metric: Metric) -> str:
    if figure.versus_rival is None:
        return "–"
    return f"{interval(figure.versus_rival.difference, _form(metric, sign='+'))}, {chance(figure.versus_rival.p_value)}"


def _share(gap: GapRecovered) -> str:
    if gap.value is None or not gap.bounded:
        return "–"
    return f"{gap.value:.0%}"


def _form(metric: Metric, sign: str = "") -> str:
    return f"{sign}.1%" if metric.percent else f"{sign}.3f"


def _table(header: Row, rows: list[Row]) -> str:
    return markdown([[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)])
