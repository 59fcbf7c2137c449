"""The page of a comparison of methods."""

import shlex
from typing import TYPE_CHECKING

from ..statistics import chance, interval, share
from ..util.text import gb
from ._cells import NOTHING, arrow, form, many, seconds
from ._evaluations import chat_words, example_blocks
from ._page import Block, Facts, Page, Picture, Row, Table, Text, sections_of
from ._protocol import describe_rows, protocol_blocks
from ._read import ReportedComparison
from .plots import Dot, Line, Panel, draw_dots, shortened

if TYPE_CHECKING:
    from ..comparison import Comparison

READING = (
    "in brackets 95% intervals over the items. Gap: the share of the gap between target before and source that was "
    "closed, 0% nothing and 100% all of it; unbounded where the items cannot tell the gap itself from none. ↓ less is "
    "better, ↑ more is. KL to the source and NLL are in nats per token; agreement is top-1, with the source."
)


def comparison_page(reported: ReportedComparison) -> Page:
    """What every method gave and what it took."""
    comparison = reported.comparison
    config = comparison.config
    examples = example_blocks(reported.evaluations)
    if examples:
        examples.insert(0, Text(f"Target after: {reported.shown}, seed {config.seeds[0]}."))
    return Page(
        f"{config.experiment.name}: {many(len(config.methods), 'method')}",
        sections_of(
            ("Result", _result(comparison)),
            ("Figures", _pictures(comparison)),
            (f"Against {config.against or 'the best baseline'}", _tests(comparison)),
            ("Over the seeds", _spreads(comparison)),
            ("Cost", _costs(comparison)),
            ("Examples", examples),
            (
                "Protocol",
                protocol_blocks(
                    config.experiment,
                    reported.environment,
                    reported.evaluations,
                    command=f"# experiment.yaml: all settings, below\n{command_of(comparison, 'experiment.yaml')}",
                ),
            ),
        ),
    )


def facts_of(comparison: "Comparison") -> dict[str, str]:
    """Models, rows and budget."""
    config, experiment = comparison.config, comparison.config.experiment
    measured = (f"{name}: {many(metric.items, 'item')}" for name, metric in comparison.metrics.items())
    return {
        "source → target": f"{experiment.source.path} → {experiment.target.path}",
        "rows": f"{comparison.train_rows()} of {describe_rows(experiment.data.train)}",
        "seeds": ", ".join(map(str, config.seeds)),
        "equal for all": "the supervised tokens that the trainable part sees",
        "measured on": ", ".join(measured),
    }


def reasons_of(comparison: "Comparison") -> list[str]:
    """Why methods have no figures."""
    return list(dict.fromkeys(reason for found in comparison.methods.values() for reason in found.missing))


def _result(comparison: "Comparison") -> list[Block]:
    config, metrics = comparison.config, comparison.metrics
    header = ["", *(f"{name} {arrow(lower_is_better=metric.lower_is_better)}" for name, metric in metrics.items())]
    rows: list[Row] = [
        ("source", *(interval(metric.source, form(percent=metric.percent)) for metric in metrics.values())),
        ("target before", *(interval(metric.before, form(percent=metric.percent)) for metric in metrics.values())),
    ]
    for name, found in comparison.methods.items():
        label = name if found.same_as is None else f"{name} (= {found.same_as})"
        rows.append((label, *(cell_of(comparison, name, key) for key in metrics)))
    blocks: list[Block] = [
        Facts(tuple(facts_of(comparison).items())),
        Table(tuple(header), tuple(rows)),
        Text(f"Means over {many(len(config.seeds), 'seed')}; {READING}"),
    ]
    blocks += [Text(f"Without figures: {reason}") for reason in reasons_of(comparison)]
    return blocks


def _pictures(comparison: "Comparison") -> list[Block]:
    blocks: list[Block] = []
    for key, metric in comparison.metrics.items():
        drawn = panel_of(comparison, key)
        if drawn.dots:
            better = "left" if metric.lower_is_better else "right"
            caption = f"{key}: further {better} is better; 95% intervals over {many(metric.items, 'item')}."
            blocks.append(Picture(draw_dots([drawn]), caption))
    return blocks


def panel_of(comparison: "Comparison", key: str, title: str | None = None) -> Panel:
    """One metric of all methods that have it, beside the source and the target before; under a title where there is
    one."""
    metric = comparison.metrics[key]
    dots = [
        Dot(name, found.figures[key].estimate)
        for name, found in comparison.methods.items()
        if key in found.figures and found.same_as is None
    ]
    lines = [Line("target before", metric.before.value), Line("source", metric.source.value)]
    above = "" if title is None else f"{shortened(title)}\n"
    return Panel(f"{above}{key} {arrow(lower_is_better=metric.lower_is_better)}", dots, lines, metric.percent)


def cell_of(comparison: "Comparison", name: str, key: str) -> str:
    """One metric of one method, with the share of the gap."""
    found = comparison.methods.get(name)
    if found is None or key not in found.figures:
        return NOTHING
    figure = found.figures[key]
    return f"{interval(figure.estimate, form(percent=comparison.metrics[key].percent))}\ngap {share(figure.gap)}"


def _tests(comparison: "Comparison") -> list[Block]:
    metrics = {key: metric for key, metric in comparison.metrics.items() if metric.rival is not None}
    rows: list[Row] = []
    for name, found in comparison.methods.items():
        if not found.figures or found.same_as is not None:
            continue
        cells = []
        for key, metric in metrics.items():
            versus = found.figures[key].versus_rival
            apart = NOTHING if versus is None else interval(versus.difference, form(percent=metric.percent, sign="+"))
            cells.append(apart if versus is None else f"{apart}, {chance(versus.p_value)}")
        rows.append((name, *cells))
    if not metrics or len(rows) < 2:
        return []
    header = ("", *(f"{key}, − {metric.rival}" for key, metric in metrics.items()))
    return [
        Table(header, tuple(rows)),
        Text(
            f"Each method − {comparison.config.against or 'the best baseline of the metric'}, paired by item, with "
            "p-values of single tests."
        ),
    ]


def _spreads(comparison: "Comparison") -> list[Block]:
    if len(comparison.config.seeds) < 2:
        return []
    rows: list[Row] = []
    for name, found in comparison.methods.items():
        if not found.figures or found.same_as is not None:
            continue
        cells = []
        for key, metric in comparison.metrics.items():
            over = found.figures[key].over_seeds
            numbers = form(percent=metric.percent)
            ends = f"[{over.low:{numbers}}, {over.high:{numbers}}]"
            cells.append(f"{over.mean:{numbers}} ± {over.spread or 0.0:{numbers}}; {ends}")
        rows.append((name, *cells))
    return [
        Table(("", *comparison.metrics), tuple(rows)),
        Text("Mean ± standard deviation over the seeds; in brackets the 95% interval of the mean over seeds."),
    ]


def _costs(comparison: "Comparison") -> list[Block]:
    rows: list[Row] = []
    for name, found in comparison.methods.items():
        if not found.figures:
            continue
        label = name if found.same_as is None else f"{name} (= {found.same_as})"
        source = seconds(found.source_seconds) if found.source_seconds else NOTHING
        numbers = (f"{found.trained_parameters:,}", f"{found.steps:,}", f"{found.supervised_tokens:,}")
        memory = NOTHING if found.training_peak_bytes is None else gb(found.training_peak_bytes)
        sizes = (memory, gb(found.stored_bytes))
        rows.append((label, *numbers, seconds(found.training_seconds), source, *sizes))
    if not rows:
        return []
    header = ("", "trained parameters", "steps", "supervised tokens", "training", "source's part", "memory", "stored")
    return [
        Table(header, tuple(rows)),
        Text(
            "Means over the runs; memory: the largest peak while a run trained, – where a run went on from an earlier "
            "process. The source's part is made once for all methods that need it; stored: its size on disk. "
            "Supervised tokens count repeats."
        ),
    ]


def command_of(comparison: "Comparison", file: str) -> str:
    """The command, with the experiment in a file."""
    config = comparison.config
    words = ["semalign", "compare", file, "--methods", ",".join(config.methods)]
    words += ["--seeds", ",".join(map(str, config.seeds))]
    words += [] if config.against is None else ["--against", config.against]
    if config.benchmarks is not None:
        words += ["--tasks", ",".join(config.benchmarks.tasks)]
        words += [] if config.benchmarks.data is None else ["--data", config.benchmarks.data]
        words += [] if config.benchmarks.limit is None else ["--limit", str(config.benchmarks.limit)]
        words += chat_words(config.benchmarks.chat)
        words += ["--allow-weak-sandbox"] * config.benchmarks.allow_weak_sandbox
    words += [f"{name}:{override}" for name, own in config.methods.items() for override in own]
    return shlex.join(words)
