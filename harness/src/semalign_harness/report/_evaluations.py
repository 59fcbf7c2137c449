"""Benchmarks of source, target before and target after: figures, and questions that they answer differently."""

from typing import TYPE_CHECKING

from ._cells import NOTHING, interval, many, share
from ._draw import Dot, draw_bars
from ._page import Answer, Block, Example, Picture, Row, Table, Text
from ._read import ROLES, Evaluations, Role

if TYPE_CHECKING:
    from ..evaluation import ItemRecord

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
        figures = [interval(results[role].figure, percent=True) if role in results else NOTHING for role in there]
        compared = [pairs.get(name, (NOTHING, NOTHING))] if pairs else []
        items = f"{any_result.figure.count} of {any_result.documents}"
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
            f"{interval(found.correct.difference, percent=True, sign='+')}, p {found.correct.p_value:.3f}",
            share(found.gap),
        )
        for found in pairs
    }


def example_blocks(evaluations: Evaluations) -> list[Block]:
    """Documents where source, target before and target after differ, as many of each kind."""
    if any(role not in evaluations for role in ROLES):
        return []
    blocks: list[Block] = []
    of_all = [evaluations[role].items for role in ROLES]
    for name in of_all[0]:
        if not all(name in items for items in of_all):
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
