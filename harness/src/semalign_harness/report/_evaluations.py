"""Benchmarks of source, target before and target after: figures, and questions that they answer differently."""

import json
import shlex
from typing import TYPE_CHECKING

from ..models.settings import ModelConfig
from ..statistics import chance, interval, share
from ._cells import NOTHING, many
from ._page import Answer, Block, Code, Example, Picture, Row, Table, Text
from ._read import BESIDE, ROLES, Evaluations, ReportedRun, Role
from .plots import Dot, draw_bars

if TYPE_CHECKING:
    from ..evaluation import EvaluationConfig, ItemRecord
    from ..experiment import Experiment

OF_EACH = 2
"""Examples of each kind that are shown of a benchmark."""
QUESTION, ANSWER = 1_500, 800
"""Longest question and answer, in characters."""

# What a kind is called, and who is right in it: source, target before, target after; None where it does not matter.
KINDS: tuple[tuple[str, tuple[bool | None, bool, bool]], ...] = (
    ("gained", (None, False, True)),
    ("lost", (None, True, False)),
    ("still missed, the source has it", (True, False, False)),
)


def benchmark_blocks(evaluations: Evaluations) -> list[Block]:
    """A table and bars of every benchmark that one of the models was put to."""
    names = list(dict.fromkeys(name for found in evaluations.values() for name in found.items))
    if not names:
        return []
    there = [role for role in ROLES if role in evaluations]
    pairs = _pairs(evaluations)
    rows: list[Row] = []
    groups = []
    for name in names:
        results = {role: evaluations[role].result.benchmarks[name] for role in there if name in evaluations[role].items}
        any_result = next(iter(results.values()))
        metric = any_result.protocol.metric
        figures = [interval(results[role].figure, ".1%") if role in results else NOTHING for role in there]
        compared = [pairs.get(name, (NOTHING, NOTHING))] if pairs else []
        items = ", ".join(dict.fromkeys(f"{each.figure.count} of {each.documents}" for each in results.values()))
        rows.append((f"{name} {metric}", *figures, *(cell for pair in compared for cell in pair), items))
        groups.append((name, [Dot(role, results[role].figure) for role in there if role in results]))
    more = ("after − before", "gap recovered") if pairs else ()
    return [
        Picture(draw_bars(groups), "Shares of documents that were solved; whiskers: 95% intervals over the documents."),
        Table(("benchmark ↑", *there, *more, "documents"), tuple(rows)),
    ]


def _pairs(evaluations: Evaluations) -> dict[str, tuple[str, str]]:
    """Target after − target before, and the gap recovered, by benchmark; empty where one of both is missing."""
    from ..evaluation import pair

    before, after = (evaluations.get(role) for role in ROLES[1:])
    if before is None or after is None or not set(before.items) & set(after.items):
        return {}
    pairs = pair(before, after, source=evaluations.get("source"))
    return {
        found.name: (
            f"{interval(found.correct.difference, '+.1%')}, {chance(found.correct.p_value)}",
            share(found.gap),
        )
        for found in pairs
    }


def missing_blocks(run: ReportedRun) -> list[Block]:
    """How the models of a run that were not put to benchmarks are; generated ones have nothing to say there."""
    paths = (run.experiment.source.path, run.experiment.target.path, str(run.folder / "model"))
    missing = {role: path for role, path in zip(ROLES, paths, strict=True) if role not in run.evaluations}
    if not missing or not run.model_bytes or any(path.startswith("generated:") for path in paths):
        return []
    known = [found.result.config for found in run.evaluations.values()]
    flags = ["--limit", "200"]
    if known:  # the same documents
        flags = ["--tasks", ",".join(known[0].tasks), "--seed", str(known[0].seed)]
        flags += [] if known[0].data is None else ["--data", known[0].data]
        flags += [] if known[0].limit is None else ["--limit", str(known[0].limit)]
        flags += chat_words(known[0].chat)
        flags += ["--allow-weak-sandbox"] if known[0].allow_weak_sandbox else []
    flags += template_overrides(known[0] if known else run.experiment)
    places = {role: run.folder / name for role, name in BESIDE.items()}
    elsewhere = [str(each.folder) for role, each in run.evaluations.items() if each.folder != places[role]]
    models = dict(zip(ROLES, (run.experiment.source, run.experiment.target), strict=False))
    commands = [
        ["semalign", "evaluate", path, *flags, *_model_words(models.get(role)), "--out", str(places[role])]
        for role, path in missing.items()
    ]
    commands.append(["semalign", "report", str(run.folder), *elsewhere])
    return [
        Text(
            f"Not put to benchmarks: {', '.join(missing)}. These commands do so, and add what they find to this page:"
        ),
        Code("\n".join(map(shlex.join, commands))),
    ]


def _model_words(model: ModelConfig | None) -> list[str]:
    """What a command says of how a model is loaded, besides its path."""
    chosen = {} if model is None else model.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
    return [f"model.{name}={json.dumps(value)}" for name, value in chosen.items()]


def template_overrides(config: "Experiment | EvaluationConfig") -> list[str]:
    """What a command says of the options of the chat template, and of the day that it is told."""
    chosen = config.model_dump(mode="json", include={"chat_template", "date"}, exclude_defaults=True)
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def chat_words(chat: bool | None) -> list[str]:
    """What a command says of the chat template."""
    return [] if chat is None else ["--chat" if chat else "--plain"]


def example_blocks(evaluations: Evaluations) -> list[Block]:
    """Documents where source, target before and target after differ, as many of each kind."""
    if any(role not in evaluations for role in ROLES):
        return []
    blocks: list[Block] = []
    of_all = [evaluations[role].items for role in ROLES]
    for name in of_all[0]:
        if not all(name in items for items in of_all):
            continue
        results = [evaluations[role].result.benchmarks[name] for role in ROLES]
        if len({(each.documents_sha256, each.protocol.model_dump_json()) for each in results}) > 1:
            continue
        documents = list(zip(*(items[name] for items in of_all), strict=True))
        for kind, wanted in KINDS:
            found = [each for each in documents if _is(each, wanted)]
            for records in found[:OF_EACH]:
                title = f"{name}, document {records[0].index}: {kind} ({many(len(found), 'document')} of this kind)"
                blocks.append(_example(title, records))
    if not blocks:
        return []
    return [Text("The first documents of each kind, in the order of the benchmark; long texts are cut."), *blocks]


def _is(records: tuple["ItemRecord", ...], wanted: tuple[bool | None, bool, bool]) -> bool:
    return all(right is None or record.correct == right for record, right in zip(records, wanted, strict=True))


def _example(title: str, records: tuple["ItemRecord", ...]) -> Example:
    answers = tuple(_answer(role, record) for role, record in zip(ROLES, records, strict=True))
    return Example(title, _cut(records[1].prompt, QUESTION), answers)


def _answer(role: Role, record: "ItemRecord") -> Answer:
    verdict = "right" if record.correct else "wrong"
    if record.extracted is not None and len(record.extracted) <= 40 and "\n" not in record.extracted:
        verdict += f", read as {record.extracted}"
    elif record.extracted is None:
        verdict += ", no answer found in it"
    if record.reason is not None and not record.correct:
        verdict += f" ({record.reason})"
    return Answer(role, verdict, _cut(record.output, ANSWER))


def _cut(text: str, longest: int) -> str:
    """The text; without its middle where it is too long."""
    text = text.strip("\n")
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}\n[…]\n{text[-longest // 2 :]}"
