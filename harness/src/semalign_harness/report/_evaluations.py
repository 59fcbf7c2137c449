"""Benchmarks of several models, and documents that source, target before and target after answer differently."""

from collections.abc import Mapping

from ..results.evaluation import EvaluationResult, ItemRecord
from ..results.metrics import NOTHING, SOLVED
from ..statistics import chance, interval, share
from ..util.text import many
from ._page import Answer, Block, Example, Picture, Row, Table, Text
from ._read import ROLES, Evaluations
from .plots import Dot, draw_bars

OF_EACH = 2
"""Examples of each kind shown per benchmark."""
QUESTION, ANSWER = 1_500, 800
"""Longest question and answer, in characters."""
DRAWN = 4
"""Most models in a plot of bars."""

# Kind of example, and whether source, target before and target after are right; None where it does not matter.
KINDS: tuple[tuple[str, tuple[bool | None, bool, bool]], ...] = (
    ("gained", (None, False, True)),
    ("lost", (None, True, False)),
    ("still missed, the source has it", (True, False, False)),
)


def benchmark_blocks(
    columns: Mapping[str, EvaluationResult | None], pairs: Mapping[str, tuple[str, str]] | None = None
) -> list[Block]:
    """Return a table and bars of all benchmarks, a column for each model; `pairs` adds columns by benchmark."""
    known = {column: result for column, result in columns.items() if result is not None}
    rows: list[Row] = []
    groups = []
    alike = True
    for name in dict.fromkeys(name for result in known.values() for name in result.benchmarks):
        found = {column: each.benchmarks[name] for column, each in known.items() if name in each.benchmarks}
        items = dict.fromkeys(f"{each.headline.count} of {each.documents}" for each in found.values())
        rows.append(
            (
                f"{name} {next(iter(found.values())).protocol.metric}",
                *(interval(found[of].headline if of in found else None, SOLVED.form) for of in columns),
                *(pairs.get(name, (NOTHING, NOTHING)) if pairs else ()),
                ", ".join(items),
            )
        )
        groups.append((name, [Dot(column, each.headline) for column, each in found.items()]))
        alike = (
            alike and len({(each.documents_sha256, each.protocol.model_dump_json()) for each in found.values()}) == 1
        )
    if not rows:
        return []
    more = ("after − before", "gap recovered") if pairs else ()
    blocks: list[Block] = [Table(("benchmark ↑", *columns, *more, "documents"), tuple(rows))]
    if len(columns) <= DRAWN:
        caption = "Shares of solved documents; whiskers: 95% intervals over the documents."
        blocks.insert(0, Picture(draw_bars(groups), caption))
    if not alike:
        blocks.append(Text("Documents or prompts differ between the models: these values do not compare directly."))
    return blocks


def run_benchmarks(evaluations: Evaluations) -> list[Block]:
    """Return the benchmarks of a run's models, with the paired difference of the target after and before."""
    from ..evaluation import pair  # loads lm-eval

    results = {role: evaluations[role].result for role in ROLES if role in evaluations}
    before, after = (evaluations.get(role) for role in ROLES[1:])
    if before is None or after is None or not set(before.items) & set(after.items):
        return benchmark_blocks(results)
    pairs = {
        found.name: (
            f"{interval(found.correct.difference, f'+{SOLVED.form}')}, {chance(found.correct.p_value)}",
            share(found.gap),
        )
        for found in pair(before, after, source=evaluations.get("source"))
    }
    return benchmark_blocks(results, pairs)


def example_blocks(evaluations: Evaluations) -> list[Block]:
    """Return documents on which source, target before and target after differ, the same number of each kind."""
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
                answers = tuple(_answer(role, record) for role, record in zip(ROLES, records, strict=True))
                blocks.append(Example(title, _cut(records[1].prompt, QUESTION), answers))
    if not blocks:
        return []
    return [Text("The first documents of each kind, in the order of the benchmark; long texts are cut."), *blocks]


def _is(records: tuple[ItemRecord, ...], wanted: tuple[bool | None, bool, bool]) -> bool:
    return all(right is None or record.correct == right for record, right in zip(records, wanted, strict=True))


def _answer(role: str, record: ItemRecord) -> Answer:
    verdict = "right" if record.correct else "wrong"
    if record.extracted is None:
        verdict += ", no answer found in it"
    elif len(record.extracted) <= 40 and "\n" not in record.extracted:
        verdict += f", read as {record.extracted}"
    if record.reason is not None and not record.correct:
        verdict += f" ({record.reason})"
    return Answer(role, verdict, _cut(record.output, ANSWER))


def _cut(text: str, longest: int) -> str:
    """Text without its middle where it is too long."""
    text = text.strip("\n")
    return text if len(text) <= longest else f"{text[: longest // 2]}\n[…]\n{text[-longest // 2 :]}"
