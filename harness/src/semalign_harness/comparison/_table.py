"""A comparison as Markdown and as CSV."""

import csv
import io

from ..estimate import gb
from ..statistics import Estimate, GapRecovered
from ._contracts import Comparison, Figure, MethodFigures, Metric

Row = list[str]


def comparison_markdown(comparison: Comparison) -> str:
    """One table of figures and costs, one of tests against the best baseline, and what they are."""
    metrics, config = comparison.metrics, comparison.config
    arrows = {name: "↓" if metric.lower_is_better else "↑" for name, metric in metrics.items()}
    header = ["", *(f"{name} {arrows[name]}" for name in metrics), "trained", "seconds", "memory", "stored"]
    rows = [
        ["source", *(_interval(metric.source, metric) for metric in metrics.values()), *[""] * 4],
        ["target before", *(_interval(metric.before, metric) for metric in metrics.values()), *[""] * 4],
        *(_row(name, found, metrics) for name, found in comparison.methods.items()),
    ]
    seeds = f"{len(config.seeds)} seed" + "s" * (len(config.seeds) > 1)
    items = ", ".join(f"{name} {metric.items}" for name, metric in metrics.items())
    budget = {
        "tokens": "the same supervised tokens for every method",
        "time": "methods without stages train as long as semalign did, the making of the supervision included",
    }[config.equal]
    lines = [
        _table(header, rows),
        f"Mean over {seeds}; in brackets the 95% interval over the items ({items}), after it the share of the gap "
        "between target and source that was closed. "
        f"Budget: {budget}; {config.experiment.data.train_rows} training rows. "
        "Trained: numbers of all stages together. Seconds: training, then what the source left behind, where the "
        "method needs it (made once for all).",
    ]
    if len(config.seeds) > 1:
        lines += ["Spread (standard deviation) over the seeds:", _spreads(comparison)]
    tested = _tests(comparison)
    if tested:
        lines += ["Against the best baseline of each metric, paired by item, p-values of single tests:", tested]
    return "\n\n".join(lines) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """One line for each method and metric, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    costs = list(MethodFigures.model_fields)[3:]
    writer.writerow(
        ["method", "metric", "value", "low", "high", "spread", "gap", "gap_low", "gap_high"]
        + ["best_baseline", "difference", "difference_low", "difference_high", "p", *costs]
    )
    for name, found in comparison.methods.items():
        cost = [getattr(found, field) for field in costs]
        for metric, figure in found.figures.items():
            versus, best = figure.versus_best, comparison.metrics[metric].best_baseline
            tested: list[object] = ["", "", "", "", ""]
            if versus is not None:
                apart = versus.difference
                tested = [best, apart.value, apart.low, apart.high, versus.p_value]
            estimate, gap = figure.estimate, figure.gap
            shares = ["" if value is None else value for value in (gap.value, gap.low, gap.high)]
            spread = "" if figure.over_seeds.spread is None else figure.over_seeds.spread
            row = [name, metric, estimate.value, estimate.low, estimate.high, spread, *shares, *tested, *cost]
            writer.writerow(row)
    return text.getvalue()


def _row(name: str, found: MethodFigures, metrics: dict[str, Metric]) -> Row:
    if not found.figures:
        return [name, "; ".join(found.missing), *[""] * (len(metrics) + 3)]
    label = name if found.same_as is None else f"{name} (= {found.same_as})"
    figures = found.figures
    cells = [
        f"{_interval(figures[key].estimate, metric)} {_share(figures[key].gap)}" for key, metric in metrics.items()
    ]
    seconds = f"{found.training_seconds:.0f}" + f" + {found.source_seconds:.0f}" * (found.source_seconds > 0)
    return [label, *cells, f"{found.trained_parameters:,}", seconds, gb(found.peak_bytes), gb(found.stored_bytes)]


def _tests(comparison: Comparison) -> str:
    metrics = {name: metric for name, metric in comparison.metrics.items() if metric.best_baseline is not None}
    rows = [
        [name, *(_test(found.figures[key], metric) for key, metric in metrics.items())]
        for name, found in comparison.methods.items()
        if found.figures and found.same_as is None
    ]
    header = ["", *(f"{name} − {metric.best_baseline}" for name, metric in metrics.items())]
    return _table(header, rows) if metrics else ""


def _spreads(comparison: Comparison) -> str:
    rows = []
    for name, found in comparison.methods.items():
        if not found.figures or found.same_as is not None:
            continue
        metrics = comparison.metrics.items()
        rows.append([name, *(_number(found.figures[key].over_seeds.spread or 0.0, metric) for key, metric in metrics)])
    return _table(["", *comparison.metrics], rows)


def _test(figure: Figure, metric: Metric) -> str:
    if figure.versus_best is None:
        return "–"
    apart = figure.versus_best.difference
    value, low, high = (_number(each, metric, sign="+") for each in (apart.value, apart.low, apart.high))
    return f"{value} [{low}, {high}], p {figure.versus_best.p_value:.3f}"


def _interval(estimate: Estimate, metric: Metric) -> str:
    return f"{_number(estimate.value, metric)} [{_number(estimate.low, metric)}, {_number(estimate.high, metric)}]"


def _share(gap: GapRecovered) -> str:
    if gap.value is None or not gap.bounded:
        return "–"
    return f"{gap.value:.0%}"


def _number(value: float, metric: Metric, sign: str = "") -> str:
    return format(100 * value, f"{sign}.1f") + "%" if metric.percent else format(value, f"{sign}.3f")


def _table(header: Row, rows: list[Row]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
