"""The page of several comparisons: the methods on several tasks, in one table and one figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..figures import draw_dots
from ._cells import arrow, distinct, interval, many
from ._comparison import READING, cell_of, command_of, panel_of
from ._page import Block, Code, Page, Picture, Row, Table, Text, sections_of
from ._read import ReportedComparison

if TYPE_CHECKING:
    from ..comparison import Comparison

KL = "KL"
BESIDES = ("answer NLL", "agreement")
"""What is left to the report of each comparison."""

Columns = Sequence[tuple[str, "Comparison", str]]
"""Title, comparison and metric."""


def comparisons_page(reported: Sequence[ReportedComparison]) -> Page:
    """The KL and the benchmarks of each comparison beside those of the others."""
    names = distinct([each.comparison.config.experiment.name for each in reported], [each.folder for each in reported])
    columns = [
        (f"{name}: {key}", each.comparison, key)
        for name, each in zip(names, reported, strict=True)
        for key in each.comparison.metrics
        if key not in BESIDES
    ]
    commands = [f"# {name}\n{command_of(each.comparison)}" for name, each in zip(names, reported, strict=True)]
    return Page(
        f"{len(reported)} comparisons",
        sections_of(
            ("Result", _result(columns)),
            ("Figures", _pictures(columns)),
            ("Protocol", [Text("To repeat them, each with its experiment in a file:"), Code("\n".join(commands))]),
        ),
    )


def _result(columns: Columns) -> list[Block]:
    metrics = [comparison.metrics[key] for _, comparison, key in columns]
    header = [
        f"{title} {arrow(lower_is_better=metric.lower_is_better)}"
        for (title, _, _), metric in zip(columns, metrics, strict=True)
    ]
    rows: list[Row] = [
        ("source", *(interval(metric.source, percent=metric.percent) for metric in metrics)),
        ("target before", *(interval(metric.before, percent=metric.percent) for metric in metrics)),
    ]
    methods = list(dict.fromkeys(name for _, comparison, _ in columns for name in comparison.methods))
    rows += [(name, *(cell_of(comparison, name, key) for _, comparison, key in columns)) for name in methods]
    items = ", ".join(
        f"{title}: {many(metric.items, 'item')}" for (title, _, _), metric in zip(columns, metrics, strict=True)
    )
    blocks: list[Block] = [
        Table(("", *header), tuple(rows)),
        Text(f"Means over the seeds of each comparison ({items}); {READING}"),
    ]
    own = [name for name in methods if len({_overrides(comparison, name) for _, comparison, _ in columns} - {None}) > 1]
    if own:
        blocks.append(Text(f"Not the same settings in all comparisons: {', '.join(own)}. The commands say which."))
    return blocks


def _overrides(comparison: "Comparison", name: str) -> tuple[str, ...] | None:
    return comparison.config.methods.get(name)


def _pictures(columns: Columns) -> list[Block]:
    blocks: list[Block] = []
    kinds = {
        "KL to the source: further left is better": [each for each in columns if each[2] == KL],
        "Benchmarks: further right is better": [each for each in columns if each[2] != KL],
    }
    for caption, of in kinds.items():
        panels = [panel for title, comparison, key in of if (panel := panel_of(comparison, key, title)).dots]
        if panels:
            blocks.append(Picture(draw_dots(panels), f"{caption}; 95% intervals over the items."))
    return blocks
