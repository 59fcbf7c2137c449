"""Rows for two tokenizers: one answer on both sides, cut into spans; answers are carried over as text."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from semalign_align import PairedBatch
from semalign_attribution import IGNORE
from semalign_geometry.base import SemalignError
from semalign_harness import arithmetic_rows, build_tokenizer
from semalign_harness.data.encoding import Conversation, Example, Role, TextEncoder
from semalign_harness.data.paired import PairedEncoder, TextChanged
from semalign_harness.data.rows import batches, split_rows
from semalign_harness.data.settings import DataConfig, RowsConfig
from semalign_harness.models.tiny import build_other_tokenizer
from tokenizers.normalizers import Lowercase

from . import families_of_tokenizers as families

TOKENIZERS = {
    "bpe": families.byte_level(),
    "digits": families.byte_level(digits=True),
    "nfc": families.normalising(),
    "sentencepiece": families.sentencepiece(),
    "plain": families.byte_level(template=None),
    "plain sentencepiece": families.sentencepiece(None),
}
PAIRS = {
    names: PairedEncoder.of(*(TextEncoder(TOKENIZERS[name]) for name in names))
    for names in itertools.product(TOKENIZERS, repeat=2)
}
ROLES: list[Role] = ["source", "target"]

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=30) | st.sampled_from(
    [
        "The answer is 72",
        "She sold 48 + 24 = 72 clips\n\n\tgone  and  more",
        "漢字 🙂 naïve",
        "  def f():\n    return 1\n",
    ]
)


def conversation(answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": "What is 7 + 5?"}, {"role": "assistant", "content": answer}])


def sides(encoder: PairedEncoder, row: Example) -> tuple[tuple[bytes | None, ...], tuple[bytes | None, ...]]:
    """Bytes of the answer's tokens of both models."""
    assert row.source is not None
    ours = encoder.source_vocabulary.bytes_of(row.source.answer_ids)
    return ours, encoder.target_vocabulary.bytes_of(row.answer_ids)


def text_of(pieces: tuple[bytes | None, ...]) -> str:
    return b"".join(piece for piece in pieces if piece is not None).decode()


@given(names=st.sampled_from(sorted(PAIRS)), answer=texts)
def test_both_sides_hold_the_answer_and_end_spans_at_equal_text(names: tuple[str, str], answer: str) -> None:
    encoder = PAIRS[names]
    try:
        row = encoder.example(conversation(answer), name="row")
    except TextChanged as refusal:  # of one token, which one side alone writes behind a space, nothing is left
        assert "nfc" in names or not answer.strip() or "no span besides" in str(refusal)
        return
    assert row.source is not None
    for role, pieces in zip(ROLES, sides(encoder, row), strict=True):
        assert text_of(pieces).strip() == answer.strip() or "nfc" in names
        assert row.on(role).answer_ids[-1] in getattr(encoder, role).ends
        assert sum(getattr(row.source.spans, role)) == len(pieces)
        assert row.on(role).prompt_ids == getattr(encoder, role).example(conversation(answer), name="").prompt_ids
    ours, theirs = (list(itertools.accumulate(getattr(row.source.spans, role), initial=0)) for role in ROLES)
    for a, b, c, d in zip(ours, ours[1:], theirs, theirs[1:], strict=False):
        left, right = (text[m:n] for text, m, n in zip(sides(encoder, row), (a, c), (b, d), strict=True))
        framed = a == 0 or b == len(sides(encoder, row)[0])
        assert b"".join(piece or b"" for piece in left).strip(b" " * framed) == b"".join(
            piece or b"" for piece in right
        ).strip(b" " * framed)


@given(names=st.sampled_from(sorted(PAIRS)), answer=texts, writer=st.sampled_from(ROLES), ended=st.booleans())
def test_an_answer_is_carried_over_as_text(names: tuple[str, str], answer: str, writer: Role, ended: bool) -> None:
    encoder = PAIRS[names]
    row = encoder.example(conversation("7 + 5 = 12"), name="row")
    try:
        gold = encoder.example(conversation(answer), name="row")
    except TextChanged:
        return
    ids = gold.on(writer).answer_ids
    assume(ended or len(ids) > 1)
    written = encoder.with_answer(row, writer, ids if ended else ids[:-1])
    assert written.answer == "7 + 5 = 12" and written.prompt_ids == row.prompt_ids
    if ended:
        assert written.on("source").answer_ids == gold.on("source").answer_ids
        assert written.answer_ids == gold.answer_ids
    else:
        assert all(written.on(role).answer_ids[-1] not in getattr(encoder, role).ends for role in ROLES)
        assert len({text_of(pieces).strip() for pieces in sides(encoder, written)}) == 1


@pytest.mark.parametrize("writer", ROLES)
def test_a_writer_keeps_its_own_tokens(writer: Role) -> None:
    encoder = PAIRS["bpe", "digits"]
    row = encoder.example(conversation("7 + 5 = 12"), name="row")
    tokenizer = TOKENIZERS["bpe" if writer == "source" else "digits"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "clips"]
    written = encoder.with_answer(row, writer, [*letters, tokenizer.eos_token_id])
    other: Role = "target" if writer == "source" else "source"
    assert written.on(writer).answer_ids == (*letters, tokenizer.eos_token_id)
    assert len(written.on(other).answer_ids) < len(letters)
    assert written.source is not None and sum(getattr(written.source.spans, writer)) == len(letters) + 1


def test_space_around_a_written_answer_is_encoded_again() -> None:
    encoder, tokenizer = PAIRS["bpe", "sentencepiece"], TOKENIZERS["bpe"]
    row = encoder.example(conversation("7 + 5 = 12"), name="row")
    ids = [*tokenizer("\n\n7 + 5 = 12\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert encoder.with_answer(row, "source", ids) == row


def test_what_is_no_text_is_not_carried_over() -> None:
    encoder, tokenizer = PAIRS["bpe", "digits"], TOKENIZERS["bpe"]
    row = encoder.example(conversation("7 + 5 = 12"), name="row")
    half = tokenizer("漢", add_special_tokens=False)["input_ids"][:-1]
    with pytest.raises(TextChanged, match="cut off inside a character"):
        encoder.with_answer(row, "source", half)
    with pytest.raises(TextChanged, match="special entries before its end"):
        encoder.with_answer(row, "source", [tokenizer.bos_token_id, *half, tokenizer.eos_token_id])


def test_space_that_one_template_writes_is_not_supervised() -> None:
    """The template of Llama 2 has a space on both sides of an answer."""
    row = PAIRS["sentencepiece", "bpe"].example(conversation("7 + 5 = 12"), name="row")
    assert row.source is not None and row.source.framed == (True, True)
    (batch,) = batches([row], 1)
    assert isinstance(batch, PairedBatch)
    for role, tokenizer in (("source", TOKENIZERS["sentencepiece"]), ("target", TOKENIZERS["bpe"])):
        labels = getattr(batch, role)["labels"][0]
        supervised = labels[labels != IGNORE].tolist()
        assert tokenizer.decode(supervised).strip() == "+ 5 = 12"
        assert len(supervised) == sum(getattr(batch.spans[0], role))
    assert len(batch.spans[0].source) == len(row.source.spans.source) - 2
    alike = PAIRS["bpe", "digits"].example(conversation("7 + 5 = 12"), name="row")
    assert alike.source is not None and alike.source.framed == (False, False)


def test_templates_that_write_more_than_the_answer_are_named() -> None:
    thinking = TextEncoder(families.byte_level(template=families.THINKING))
    encoder = PairedEncoder.of(thinking, TextEncoder(TOKENIZERS["digits"]))
    config = DataConfig(train=RowsConfig(path="rows"), train_rows=4, held_out_rows=2)
    rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(8)]
    with pytest.raises(SemalignError, match="different text in every answer .*<think>.*: set options in chat_template"):
        split_rows(config, [rows], encoder)


def test_rows_that_a_normaliser_changes_are_left_out_and_counted() -> None:
    config = DataConfig(train=RowsConfig(path="rows"), train_rows=6, held_out_rows=2)
    rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(8)]
    rows += [{"prompt": f"Where is {i}?", "completion": "cafe\u0301"} for i in range(3)]
    split = split_rows(config, [rows], PAIRS["bpe", "nfc"])
    assert (len(split.train), len(split.held_out)) == (6, 2)
    assert split.changed and "the tokenizers read different text" in split.change
    with pytest.raises(SemalignError, match="0 were longer .*, 0 repeated a prompt, 3 are different texts"):
        split_rows(config.model_copy(update={"train_rows": 9}), [rows], PAIRS["bpe", "nfc"])


@pytest.mark.parametrize("names", [("bpe", "digits"), ("digits", "bpe")])
def test_rows_that_are_too_long_on_either_side_are_left_out(names: tuple[str, str]) -> None:
    encoder = PAIRS[names]
    rows = [{"prompt": "How many?", "completion": f"{i} 1234567"} for i in range(4)]
    rows[0]["prompt"] = "Why?"
    longest = encoder.example(conversation_of(rows[1]), name="").longest
    config = DataConfig(train=RowsConfig(path="rows"), train_rows=1, held_out_rows=1, max_length=longest - 1)
    with pytest.raises(SemalignError, match=f"the longest has {longest}"):
        split_rows(config, [rows[1:]], encoder)


def conversation_of(row: dict[str, Any]) -> Conversation:
    return Conversation(
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    )


def test_batches_hold_both_sides_in_one_order() -> None:
    encoder = PairedEncoder.of(TextEncoder(build_tokenizer()), TextEncoder(build_other_tokenizer()))
    rows = [
        encoder.example(Conversation(row["messages"]), name="row") for row in arithmetic_rows(20, seed=0, split="train")
    ]
    found = batches(rows, 8)
    assert [len(batch.spans) for batch in found] == [8, 8, 4]
    by_answer = {row.answer_ids: row for row in rows}
    for batch in found:
        for place, spans in enumerate(batch.spans):
            labels = {role: getattr(batch, role)["labels"][place] for role in ROLES}
            answers = {role: tuple(label[label != IGNORE].tolist()) for role, label in labels.items()}
            row = by_answer[answers["target"]]
            assert row.source is not None
            assert answers["source"] == row.source.answer_ids and spans == row.source.spans
    one = [dataclasses.replace(row, source=None) for row in rows]
    assert not isinstance(batches(one, 8)[0], PairedBatch)


def test_tokenizers_that_lose_text_are_refused_in_one_sentence() -> None:
    tokenizer = families.byte_level(digits=True)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(SemalignError, match="do not give the text back: its Lowercase changes the text; choose"):
        PairedEncoder.of(TextEncoder(TOKENIZERS["bpe"]), TextEncoder(tokenizer))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ends_are_those_of_the_template(name: str) -> None:
    encoder = TextEncoder(TOKENIZERS[name])
    assert encoder.ends == {TOKENIZERS[name].eos_token_id}
    tokenizer = families.byte_level(template=families.CHATML.replace("{{ eos_token }}", "<pad>"))
    assert TextEncoder(tokenizer).ends == {tokenizer.eos_token_id, tokenizer.pad_token_id}
