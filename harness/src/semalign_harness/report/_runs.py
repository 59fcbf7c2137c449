"""Page of several runs: one column for each."""

import json
from collections.abc import Sequence
from typing import Any

from ..experiment import Experiment
from ..results.metrics import NOTHING, metrics_of
from ..run.run_folder import differences
from ..statistics import share
from ._evaluations import benchmark_blocks
from ._page import Block, Code, Facts, Page, Picture, Row, Table, Text, page_of
from ._protocol import describe_method, environment_facts, repeat_command
from ._read import ReportedRun, distinct
from ._run import INTERVALS, cost_pairs, describe_budget, run_rows
from .plots import Dot, Line, Panel, draw_dots

DRAWN = 24
"""Most runs in a plot."""


def runs_page(runs: Sequence[ReportedRun]) -> Page:
    """Return the page of several runs: results, settings that differ, benchmarks and costs."""
    names = distinct([run.result.name for run in runs], [run.folder for run in runs])
    found = [run.evaluations.get("target after") for run in runs]
    evaluations = {name: each and each.result for name, each in zip(names, found, strict=True)}
    commands = "\n".join(repeat_command(run.folder) for run in runs)
    return page_of(
        f"{len(runs)} runs",
        {
            "Result": _result(runs, names),
            "Settings that differ": _settings(runs, names),
            "Plots": _plots(runs, names),
            "Benchmarks": benchmark_blocks(evaluations),
            "Cost": [_by_run(names, [dict(cost_pairs(run)) for run in runs])],
            "Protocol": [*_environments(runs, names), Text("To repeat them:"), Code(commands)],
        },
    )


def _result(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    pairs = {("source → target", f"{run.experiment.source.path} → {run.experiment.target.path}") for run in runs}
    results = [run.result for run in runs]
    rows: list[Row] = []
    others: list[Row] = []
    for metric in metrics_of(results):
        rows.append((f"{metric.title}, target after", *(metric.cell(result.after) for result in results)))
        rows.append((f"{metric.label}, gap recovered", *(share(metric.gap(result)) for result in results)))
        others.append((f"{metric.label}, target before", *(metric.cell(result.before) for result in results)))
        others.append((f"{metric.label}, source", *(metric.source_cell(result.source) for result in results)))
    blocks: list[Block] = [Facts(tuple(pairs))] if len(pairs) == 1 else []
    blocks += [
        Table(("", *names), tuple(rows)),
        Text(INTERVALS),
        Table(("", *names), tuple(others), folded="target before, and source"),
    ]
    inputs = {(run.result.after.by_row.tokens, *(run.environment.models if run.environment else ())) for run in runs}
    if len(inputs) > 1:
        blocks.append(Text("The runs differ in their models or held-out rows: their metrics do not compare directly."))
    return blocks


def _settings(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    first, *others = (run.experiment for run in runs)
    keys = [line.partition(" is ")[0] for other in others for line in differences(first, other)]
    columns = [
        {
            "method": describe_method(run.experiment),
            "budget": describe_budget(run),
            "rows": run_rows(run),
            **{key: _value(run.experiment, key) for key in dict.fromkeys(keys) if key != "name"},
        }
        for run in runs
    ]
    differing = [key for key in columns[0] if len({column[key] for column in columns}) > 1]
    if not differing:
        return [Text("None: the runs repeat one experiment.")]
    return [_by_run(names, [{key: column[key] for key in differing} for column in columns])]


def _value(experiment: Experiment, key: str) -> str:
    found: Any = experiment.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return NOTHING
        found = found[part]
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return found if isinstance(found, str) else json.dumps(found)


def _plots(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    if len(runs) > DRAWN:
        return [Text(f"Plots show up to {DRAWN} runs: give fewer.")]
    results = [run.result for run in runs]
    blocks: list[Block] = []
    for metric in metrics_of(results):
        estimates = [metric.estimate(result.after) for result in results]
        dots = [Dot(name, found) for name, found in zip(names, estimates, strict=True) if found is not None]
        if len(dots) < len(runs):
            continue
        shared = {
            "target before": {metric.value(result.before) for result in results},
            "source": {metric.value(result.source) for result in results},
        }
        lines = [Line(name, next(iter(of)) or 0.0) for name, of in shared.items() if len(of) == 1]
        better = "left" if metric.lower_is_better else "right"
        common = " Lines: values that all runs share." if lines else ""
        caption = f"{metric.label}: {better} is better; 95% intervals over the rows.{common}"
        blocks.append(Picture(draw_dots([Panel(metric.title, dots, lines, metric.percent)]), caption))
    return blocks


def _environments(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Block]:
    """Environment of the runs: facts that all share, and a table of the others."""
    columns = [dict(environment_facts(run.environment)) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    same = [key for key in keys if len({column.get(key) for column in columns}) == 1]
    differing = [{key: value for key, value in column.items() if key not in same} for column in columns]
    blocks: list[Block] = [Facts(tuple((key, columns[0][key]) for key in same))] if same else []
    return [*blocks, _by_run(names, differing)] if any(differing) else blocks


def _by_run(names: Sequence[str], columns: Sequence[dict[str, str]]) -> Table:
    keys = dict.fromkeys(key for column in columns for key in column)
    return Table(("", *names), tuple((key, *(column.get(key, NOTHING) for column in columns)) for key in keys))
