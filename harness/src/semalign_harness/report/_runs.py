"""The page of several runs: one column for each."""

import json
from collections.abc import Sequence
from typing import Any

from ..experiment import Experiment
from ..run.run_folder import differences
from ..statistics import interval, share
from ._cells import NOTHING, distinct
from ._metrics import METRICS, Metric, metrics_of
from ._page import Block, Code, Facts, Page, Picture, Row, Table, Text, sections_of
from ._protocol import describe_method, describe_rows, environment_facts, repeat_command
from ._read import ReportedRun
from ._run import INTERVALS, cost_pairs, describe_budget
from .plots import Dot, Line, Panel, draw_bars, draw_dots

DRAWN = 24
"""Most runs that a figure shows."""


def runs_page(runs: Sequence[ReportedRun]) -> Page:
    """What came of each run, which settings made the difference, and what each took."""
    names = distinct([run.result.name for run in runs], [run.folder for run in runs])
    commands = "\n".join(repeat_command(run.folder) for run in runs)
    return Page(
        f"{len(runs)} runs",
        sections_of(
            ("Result", _result(runs, names)),
            ("Settings that differ", _settings(runs, names)),
            ("Figures", _pictures(runs, names)),
            ("Benchmarks", _benchmarks(runs, names)),
            ("Cost", [_by_run(names, [dict(cost_pairs(run)) for run in runs])]),
            ("Protocol", [*_environments(runs, names), Text("To repeat them:"), Code(commands)]),
        ),
    )


def _result(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    pairs = sorted({f"{run.experiment.source.path} → {run.experiment.target.path}" for run in runs})
    rows: list[Row] = []
    others: list[Row] = []
    for metric in _shared(runs):
        rows.append((f"{metric.title}, target after", *(metric.cell(run.result.after) for run in runs)))
        rows.append((f"{metric.name}, gap recovered", *(share(metric.gap(run.result)) for run in runs)))
        others.append((f"{metric.name}, target before", *(metric.cell(run.result.before) for run in runs)))
        others.append((f"{metric.name}, source", *(metric.of_source(run.result.source) for run in runs)))
    blocks: list[Block] = [
        Table(("", *names), tuple(rows)),
        Text(INTERVALS),
        Table(("", *names), tuple(others), folded="target before, and source"),
    ]
    if len(pairs) == 1:
        blocks.insert(0, Facts((("source → target", pairs[0]),)))
    if len({(run.result.after.by_row.tokens, *_models(run)) for run in runs}) > 1:
        blocks.append(Text("The runs differ in their models or held-out rows: their figures do not compare directly."))
    return blocks


def _models(run: ReportedRun) -> tuple[str, ...]:
    return () if run.environment is None else tuple(run.environment.models)


def _settings(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    first, *others = (run.experiment for run in runs)
    keys = [line.partition(" is ")[0] for other in others for line in differences(first, other)]
    keys = [key for key in dict.fromkeys(keys) if key != "name"]
    columns = [
        {
            "method": describe_method(run.experiment),
            "budget": describe_budget(run),
            "rows": f"{run.result.train_rows:,} of {describe_rows(run.experiment.data.train)}",
            **{key: _value(run.experiment, key) for key in keys},
        }
        for run in runs
    ]
    apart = [key for key in columns[0] if len({column[key] for column in columns}) > 1]
    if not apart:
        return [Text("None: the runs repeat one experiment.")]
    return [_by_run(names, [{key: column[key] for key in apart} for column in columns])]


def _value(experiment: Experiment, key: str) -> str:
    found: Any = experiment.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return NOTHING
        found = found[part]
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return found if isinstance(found, str) else json.dumps(found)


def _pictures(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    if len(runs) > DRAWN:
        return [Text(f"Figures show up to {DRAWN} runs: give fewer.")]
    blocks: list[Block] = []
    for metric in _shared(runs):
        found = [metric.estimate(run.result.after) for run in runs]
        if any(estimate is None for estimate in found):
            continue
        dots = [Dot(name, estimate) for name, estimate in zip(names, found, strict=True) if estimate is not None]
        before, source = ({metric.value(each) for each in of} for of in _sides(runs))
        lines = [
            Line(label, float(next(iter(of)) or 0.0))
            for label, of in (("target before", before), ("source", source))
            if len(of) == 1
        ]
        better = "left" if metric.lower_is_better else "right"
        held = " Lines: what all runs have in common." if lines else ""
        caption = f"{metric.name}: further {better} is better; 95% intervals over the rows.{held}"
        blocks.append(Picture(draw_dots([Panel(metric.title, dots, lines, metric.percent)]), caption))
    return blocks


def _sides(runs: Sequence[ReportedRun]) -> tuple[list[Any], list[Any]]:
    return [run.result.before for run in runs], [run.result.source for run in runs]


def _benchmarks(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    """Benchmarks of the trained targets."""
    found = [run.evaluations.get("target after") for run in runs]
    benchmarks = list(dict.fromkeys(name for each in found if each is not None for name in each.result.benchmarks))
    if not benchmarks:
        return []
    rows: list[Row] = []
    groups = []
    for benchmark in benchmarks:
        results = [None if each is None else each.result.benchmarks.get(benchmark) for each in found]
        cells = (interval(None if each is None else each.figure, ".1%") for each in results)
        metric = next(each.protocol.metric for each in results if each is not None)
        rows.append((f"{benchmark} {metric} ↑", *cells))
        dots = [Dot(name, each.figure) for name, each in zip(names, results, strict=True) if each is not None]
        groups.append((benchmark, dots))
    alike = [
        len({(each.documents_sha256, each.protocol.model_dump_json()) for each in of}) == 1
        for of in (
            [each.result.benchmarks[name] for each in found if each is not None and name in each.result.benchmarks]
            for name in benchmarks
        )
    ]
    blocks: list[Block] = [Table(("", *names), tuple(rows))]
    if len(runs) <= 4:
        caption = "Shares of documents that were solved; whiskers: 95% intervals over the documents."
        blocks.insert(0, Picture(draw_bars(groups), caption))
    if not all(alike):
        blocks.append(Text("Some runs were put to other documents or prompts: those figures do not compare directly."))
    return blocks


def _environments(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    """What the runs ran on: in one where it is the same, by run where it differs."""
    columns = [dict(environment_facts(run.environment)) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    same = [key for key in keys if len({column.get(key) for column in columns}) == 1]
    apart = [{key: value for key, value in column.items() if key not in same} for column in columns]
    blocks: list[Block] = [Facts(tuple((key, columns[0][key]) for key in same))] if same else []
    return [*blocks, _by_run(names, apart)] if any(apart) else blocks


def _by_run(names: Sequence[str], columns: Sequence[dict[str, str]]) -> Table:
    keys = dict.fromkeys(key for column in columns for key in column)
    return Table(("", *names), tuple((key, *(column.get(key, NOTHING) for column in columns)) for key in keys))


def _shared(runs: Sequence[ReportedRun]) -> list[Metric]:
    """The figures that every run has."""
    return [metric for metric in METRICS if all(metric in metrics_of(run.result) for run in runs)]
