"""The page of several comparisons: the methods on several tasks, in one table and one figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..statistics import interval
from ._cells import arrow, distinct, form
from ._comparison import READING, cell_of, command_of, facts_of, panel_of, reasons_of
from ._page import Block, Code, Facts, Page, Picture, Row, Table, Text, sections_of
from ._read import ReportedComparison
from .plots import draw_dots

if TYPE_CHECKING:
    from ..comparison import Comparison

Named = dict[str, "Comparison"]
Columns = Sequence[tuple[str, "Comparison", str]]
"""Name of a comparison, itself, and one of its metrics."""


def comparisons_page(reported: Sequence[ReportedComparison]) -> Page:
    """The KL and the benchmarks of each comparison beside those of the others."""
    from ..comparison import BESIDES

    names = distinct([each.comparison.config.experiment.name for each in reported], [each.folder for each in reported])
    named = {name: each.comparison for name, each in zip(names, reported, strict=True)}
    columns = [(name, of, key) for name, of in named.items() for key in of.metrics if key not in BESIDES]
    places = [
        f"{name}.yaml: the experiment in {each.folder}/comparison.json"
        for name, each in zip(names, reported, strict=True)
    ]
    commands = [
        f"# {place}\n{command_of(of, f'{name}.yaml')}" for place, (name, of) in zip(places, named.items(), strict=True)
    ]
    return Page(
        f"{len(reported)} comparisons",
        sections_of(
            ("Result", [*_result(columns), *_notes(named)]),
            ("Figures", _pictures(columns)),
            ("What was compared", _facts(named)),
            ("Protocol", [Text("To repeat them:"), Code("\n".join(commands))]),
        ),
    )


def _result(columns: Columns) -> list[Block]:
    header, source, before = [""], ["source"], ["target before"]
    for name, comparison, key in columns:
        metric = comparison.metrics[key]
        header.append(f"{name}: {key} {arrow(lower_is_better=metric.lower_is_better)}")
        source.append(interval(metric.source, form(percent=metric.percent)))
        before.append(interval(metric.before, form(percent=metric.percent)))
    methods = dict.fromkeys(name for _, comparison, _ in columns for name in comparison.methods)
    rows: list[Row] = [tuple(source), tuple(before)]
    rows += [(name, *(cell_of(comparison, name, key) for _, comparison, key in columns)) for name in methods]
    return [Table(tuple(header), tuple(rows)), Text(f"Means over the seeds of each comparison; {READING}")]


def _notes(named: Named) -> list[Block]:
    """Methods that are not the same everywhere, that are another one, or that have no figures."""
    given: dict[str, set[tuple[str, ...]]] = {}
    for comparison in named.values():
        for name, overrides in comparison.config.methods.items():
            given.setdefault(name, set()).add(overrides)
    own = [name for name, settings in given.items() if len(settings) > 1]
    notes = [f"Not the same settings of its own in all comparisons: {', '.join(own)}."] if own else []
    for title, comparison in named.items():
        notes += [
            f"{title}: {name} is {found.same_as}, by the same runs."
            for name, found in comparison.methods.items()
            if found.same_as is not None
        ]
        notes += [f"{title}, without figures: {reason}" for reason in reasons_of(comparison)]
    return [Text(note) for note in notes]


def _facts(named: Named) -> list[Block]:
    facts = [(Text(f"{name}:"), Facts(tuple(facts_of(comparison).items()))) for name, comparison in named.items()]
    return [block for of_one in facts for block in of_one]


def _pictures(columns: Columns) -> list[Block]:
    blocks: list[Block] = []
    for better, lower in (("left", True), ("right", False)):
        of = [each for each in columns if each[1].metrics[each[2]].lower_is_better == lower]
        panels = [panel for name, comparison, key in of if (panel := panel_of(comparison, key, name)).dots]
        if panels:
            blocks.append(Picture(draw_dots(panels), f"Further {better} is better; 95% intervals over the items."))
    return blocks
