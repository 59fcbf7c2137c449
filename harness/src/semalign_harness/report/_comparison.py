"""Pages of one comparison of methods and of several."""

import shlex
from collections.abc import Sequence

from ..comparison.tables import (
    COSTS_READING,
    READING,
    SPREADS_READING,
    budget,
    costs_table,
    metric_cell,
    metric_title,
    missing_reasons,
    result_table,
    spreads_table,
    tests_reading,
    tests_table,
)
from ..results.comparison import Comparison
from ..results.metrics import DETAILS
from ..statistics import interval
from ..util.text import many
from ._evaluations import example_blocks
from ._page import Block, Code, Facts, Page, Picture, Text, page_of, table_blocks
from ._protocol import benchmark_flags, describe_rows, protocol_blocks
from ._read import ReportedComparison, distinct
from .plots import Dot, Line, Panel, draw_dots, shortened

Columns = Sequence[tuple[str, Comparison, str]]
"""Name of a comparison, the comparison, and the name of one of its metrics."""


def comparison_page(reported: ReportedComparison) -> Page:
    """Return the page of one comparison: metrics, tests, spreads, costs, examples and protocol."""
    comparison = reported.comparison
    config = comparison.config
    examples = example_blocks(reported.evaluations)
    if examples:
        examples.insert(0, Text(f"Target after: {reported.shown}, seed {config.seeds[0]}."))
    reading = f"Means over {many(len(config.seeds), 'seed')}. {READING}"
    return page_of(
        f"{config.experiment.name}: {many(len(config.methods), 'method')}",
        {
            "Result": [
                _facts(comparison),
                *table_blocks(result_table(comparison), reading),
                *(Text(f"Without metrics: {reason}") for reason in missing_reasons(comparison)),
            ],
            "Plots": _plots([("", comparison, key) for key in comparison.metrics]),
            f"Against {config.against or 'the best baseline'}": table_blocks(
                tests_table(comparison), tests_reading(comparison)
            ),
            "Over the seeds": table_blocks(spreads_table(comparison), SPREADS_READING),
            "Cost": table_blocks(costs_table(comparison), COSTS_READING),
            "Examples": examples,
            "Protocol": protocol_blocks(
                config.experiment,
                reported.environment,
                reported.evaluations,
                command=f"# experiment.yaml: all settings, below\n{command_of(comparison, 'experiment.yaml')}",
            ),
        },
    )


def comparisons_page(reported: Sequence[ReportedComparison]) -> Page:
    """Return the page of several comparisons: KL and benchmarks of all in one table."""
    names = distinct([each.comparison.config.experiment.name for each in reported], [each.folder for each in reported])
    named = {name: each.comparison for name, each in zip(names, reported, strict=True)}
    columns = [(name, of, key) for name, of in named.items() for key in of.metrics if key not in DETAILS]
    commands = [
        f"# {name}.yaml: the experiment in {each.folder}/comparison.json\n{command_of(named[name], f'{name}.yaml')}"
        for name, each in zip(names, reported, strict=True)
    ]
    metrics = [(f"{name}: {metric_title(key, of.metrics[key])}", of.metrics[key]) for name, of, key in columns]
    methods = dict.fromkeys(method for of in named.values() for method in of.methods)
    rows = [
        ("", *(title for title, _ in metrics)),
        ("source", *(interval(metric.source, metric.form()) for _, metric in metrics)),
        ("target before", *(interval(metric.before, metric.form()) for _, metric in metrics)),
        *((method, *(metric_cell(of, method, key) for _, of, key in columns)) for method in methods),
    ]
    return page_of(
        f"{len(reported)} comparisons",
        {
            "Result": [*table_blocks(rows, f"Means over the seeds of each comparison. {READING}"), *_notes(named)],
            "Plots": _plots(columns),
            "Compared": [block for name, of in named.items() for block in (Text(f"{name}:"), _facts(of))],
            "Protocol": [Text("To repeat them:"), Code("\n".join(commands))],
        },
    )


def command_of(comparison: Comparison, file: str) -> str:
    """Return the command of a comparison whose experiment is in a file."""
    config = comparison.config
    words = ["semalign", "compare", file, "--methods", ",".join(config.methods)]
    words += ["--seeds", ",".join(map(str, config.seeds))]
    words += [] if config.against is None else ["--against", config.against]
    words += [] if config.benchmarks is None else benchmark_flags(config.benchmarks)
    words += [f"{name}:{override}" for name, own in config.methods.items() for override in own]
    return shlex.join(words)


def _facts(comparison: Comparison) -> Facts:
    """Models, rows and budget."""
    config, experiment = comparison.config, comparison.config.experiment
    return Facts(
        (
            ("source → target", f"{experiment.source.path} → {experiment.target.path}"),
            ("rows", f"{comparison.train_rows()} of {describe_rows(experiment.data.train)}"),
            ("seeds", ", ".join(map(str, config.seeds))),
            ("budget", budget(comparison)),
            (
                "measured on",
                ", ".join(f"{name}: {many(metric.items, 'item')}" for name, metric in comparison.metrics.items()),
            ),
        )
    )


def _notes(named: dict[str, Comparison]) -> list[Block]:
    """Methods with different settings per comparison, with the runs of another method, or without metrics."""
    given: dict[str, set[tuple[str, ...]]] = {}
    for comparison in named.values():
        for name, overrides in comparison.config.methods.items():
            given.setdefault(name, set()).add(overrides)
    own = [name for name, settings in given.items() if len(settings) > 1]
    notes = [f"With different overrides per comparison: {', '.join(own)}."] if own else []
    for title, comparison in named.items():
        notes += [
            f"{title}: {name} is {found.same_as}, by the same runs."
            for name, found in comparison.methods.items()
            if found.same_as is not None
        ]
        notes += [f"{title}, without metrics: {reason}" for reason in missing_reasons(comparison)]
    return [Text(note) for note in notes]


def _plots(columns: Columns) -> list[Block]:
    """One plot for each metric of one comparison; for several comparisons one for each direction."""
    groups: dict[tuple[str, bool], list[Panel]] = {}
    for title, comparison, key in columns:
        lower = comparison.metrics[key].lower_is_better
        panel = _panel(comparison, key, title)
        if panel.dots:
            groups.setdefault(("" if title else key, lower), []).append(panel)
    return [
        Picture(
            draw_dots(panels),
            f"{key or 'All'}: {'left' if lower else 'right'} is better; 95% intervals over the items.",
        )
        for (key, lower), panels in sorted(groups.items(), key=lambda group: not group[0][1])
    ]


def _panel(comparison: Comparison, key: str, title: str) -> Panel:
    """One metric of all methods with runs of their own, beside source and target before."""
    metric = comparison.metrics[key]
    dots = [
        Dot(name, found.metrics[key].estimate)
        for name, found in comparison.methods.items()
        if key in found.metrics and found.same_as is None
    ]
    lines = [Line("target before", metric.before.value), Line("source", metric.source.value)]
    above = f"{shortened(title)}\n" if title else ""
    return Panel(above + metric_title(key, metric), dots, lines, metric.percent)
