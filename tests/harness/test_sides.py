"""Both sides of a row go through the same spans."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import PairedBatch, Spans
from semalign_attribution import supervised
from semalign_harness.data.encoding import Conversation, Example, SourceSide
from semalign_harness.data.rows import batches
from semalign_harness.data.sides import batches_of, one_sided, side_of, span_starts

Role = Literal["source", "target"]
NOTHING = Conversation([])
LENGTHS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5)


def example(number: int, prompts: tuple[int, int], lengths: list[tuple[int, int]]) -> Example:
    """A row whose answer token k of either side has the id 100 · row + k."""
    spans = Spans(tuple(of[0] for of in lengths), tuple(of[1] for of in lengths))
    answers = [tuple(100 * number + k for k in range(sum(side))) for side in (spans.source, spans.target)]
    side = SourceSide((1,) * prompts[0], answers[0], spans, (False, False), NOTHING)
    return Example((2,) * prompts[1], answers[1], "", side)


ROWS = st.lists(st.tuples(st.tuples(st.integers(1, 4), st.integers(1, 4)), LENGTHS), min_size=1, max_size=4)


@given(ROWS, st.sampled_from(["source", "target"]))
def test_a_span_starts_where_its_first_token_is_predicted(
    rows: list[tuple[tuple[int, int], list[tuple[int, int]]]], role: Role
) -> None:
    examples = [example(number, *row) for number, row in enumerate(rows, 1)]
    (batch,) = batches(examples, len(examples))
    assert isinstance(batch, PairedBatch)
    starts, side = span_starts(batch, role), side_of(batch, role)
    found = side["input_ids"][:, 1:][starts[:, :-1]].tolist()
    expected = []
    for row in sorted(examples, key=len):
        assert row.source is not None
        place, (first, *_) = 0, row.on(role).answer_ids
        for length in getattr(row.source.spans, role):
            expected.append(first + place)
            place += length
    assert found == expected
    assert not starts[:, -1].any()


def test_with_one_tokenizer_every_answer_token_is_a_span() -> None:
    rows = [Example((1, 2), (3, 4, 5), "a"), Example((1,), (6,), "b")]
    (batch,) = batches(rows, 2)
    for role in ("source", "target"):
        assert side_of(batch, role) is batch  # type: ignore[arg-type]
        assert torch.equal(span_starts(batch, role), supervised(side_of(batch, role)).mask)  # type: ignore[arg-type]
        assert one_sided(rows[0], role) is rows[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["source", "target"])
def test_one_side_is_a_row_of_its_own(role: Role) -> None:
    row = example(1, (3, 2), [(1, 2), (2, 1)])
    alone = one_sided(row, role)
    assert alone.source is None and (alone.prompt_ids, alone.answer_ids) == (
        row.on(role).prompt_ids,
        row.on(role).answer_ids,
    )
    (batch,) = batches_of([row], 1, role)
    assert batch["input_ids"][0].tolist() == [*alone.prompt_ids, *alone.answer_ids]
