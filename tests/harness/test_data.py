"""Rows become token ids whose answers, and nothing else, are supervised."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semalign_attribution import IGNORE
from semalign_geometry.base import SemalignError
from semalign_harness import arithmetic_rows, build_tokenizer, encode_rows, load_experiment, load_rows
from semalign_harness.data.encoding import TextEncoder
from semalign_harness.data.row_files import FORMS
from semalign_harness.data.rows import batches, glued, read_rows, split_rows
from semalign_harness.data.settings import DataConfig, RowsConfig
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

TOKENIZER = build_tokenizer()
ENCODER = TextEncoder(TOKENIZER)


def letters() -> PreTrainedTokenizerFast:
    """A token for every byte, and none that ends a sequence."""
    tokenizer = Tokenizer(BPE({letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write(path: Path, rows: list[Any]) -> RowsConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RowsConfig(path=str(path))


@given(st.integers(0, 50), st.integers(1, 5))
def test_prompt_and_answer_make_up_the_template(seed: int, count: int) -> None:
    rows = arithmetic_rows(count, seed=seed, split="train")
    for row, example in zip(rows, encode_rows(rows, TOKENIZER), strict=True):
        whole = TOKENIZER.apply_chat_template(row["messages"], tokenize=False)
        assert example.prompt_ids + example.answer_ids == tuple(TOKENIZER(whole, add_special_tokens=False)["input_ids"])
        assert example.answer_ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(example.answer_ids[:-1]).strip() == row["messages"][-1]["content"]


def test_rows_with_fields_are_rows_with_messages(tmp_path: Path) -> None:
    messages = arithmetic_rows(5, seed=1, split="train")
    fields = [{"q": row["messages"][0]["content"], "a": row["messages"][1]["content"]} for row in messages]
    config = RowsConfig(path="rows", prompt="q", completion="a")
    assert encode_rows(fields, TOKENIZER, config=config) == encode_rows(messages, TOKENIZER)


def test_without_a_chat_template_the_answer_ends_with_eos() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    (example,) = encode_rows([{"prompt": "How many apples now ?", "completion": "The answer is 3"}], tokenizer)
    assert example.answer_ids == tuple(tokenizer("The answer is 3")["input_ids"]) + (tokenizer.eos_token_id,)


def test_the_prompt_begins_with_bos_once_and_the_answer_has_none(starting: PreTrainedTokenizerFast) -> None:
    rows = arithmetic_rows(1, seed=0, split="train")
    (chat,) = encode_rows(rows, starting)
    assert chat == encode_rows(rows, TOKENIZER)[0], "the template has it"
    starting.chat_template = None
    (plain,) = encode_rows(rows, starting)
    for example in (chat, plain):
        assert example.prompt_ids[0] == starting.bos_token_id
        assert (example.prompt_ids + example.answer_ids).count(starting.bos_token_id) == 1


def test_of_several_turns_the_last_answer_alone_is_supervised() -> None:
    first, last = (row["messages"] for row in arithmetic_rows(2, seed=4, split="train"))
    (example,) = encode_rows([{"messages": first + last}], TOKENIZER)
    text = TOKENIZER.apply_chat_template(first + last, tokenize=False)
    whole = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    answer = [*TOKENIZER(last[1]["content"])["input_ids"], TOKENIZER.eos_token_id]
    assert [*example.prompt_ids, *example.answer_ids] == whole
    assert example.prompt_ids.count(TOKENIZER.eos_token_id) == 1, "the end of the first answer"
    assert list(example.answer_ids) == answer and example.answer == last[1]["content"]
    (batch,) = batches([example], 1)
    assert batch["labels"].tolist() == [[IGNORE] * (len(whole) - len(answer)) + answer]


def test_without_a_chat_template_several_turns_are_lines_of_the_prompt() -> None:
    turns = [("user", "2 + 3"), ("assistant", "5"), ("user", "And - 1 ?"), ("assistant", "4")]
    messages = [{"role": role, "content": text} for role, text in turns]
    tokenizer = letters()
    (example,) = encode_rows([{"messages": messages}], tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "2 + 3\n5\nAnd - 1 ?"
    assert tokenizer.decode(example.answer_ids) == "4"


@pytest.mark.parametrize(
    ("end", "start", "found"),
    [
        ("in total?", "Natalia", "a. in total?Natalia"),
        ("Answer:", "A", "mma. Answer:A"),
        ("Answer: ", "A", None),
        ("Answer:", " A", None),
        ("def f():\n", "return 1", None),
        ("2 + 3 =", "5", None),
    ],
)
def test_prompts_that_run_into_their_answers_are_found(end: str, start: str, found: str | None) -> None:
    tokenizer = letters()
    (example,) = encode_rows([{"prompt": f"Dilemma. {end}", "completion": start}], tokenizer)
    assert glued(example, tokenizer) == found
    (chat,) = encode_rows(arithmetic_rows(1, seed=0, split="train"), TOKENIZER)
    assert glued(chat, TOKENIZER) is None


def test_batches_supervise_answers_and_pad_on_the_right() -> None:
    examples = encode_rows(arithmetic_rows(7, seed=2, split="train"), TOKENIZER)
    seen = 0
    for batch in batches(examples, 3):
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            real = int(mask.sum())
            assert mask[:real].all() and not mask[real:].any() and (labels[real:] == IGNORE).all()
            tokens = tuple(ids[:real].tolist())
            (example,) = [e for e in examples if e.prompt_ids + e.answer_ids == tokens]
            assert tuple(labels[labels != IGNORE].tolist()) == example.answer_ids
            seen += 1
    assert seen == 7


@given(st.integers(0, 10), st.integers(1, 10), st.integers(1, 10))
def test_splits_share_no_prompt(rows_file: Path, seed: int, train: int, held_out: int) -> None:
    config = DataConfig(train=RowsConfig(path=str(rows_file)), train_rows=train, held_out_rows=held_out, seed=seed)
    split = split_rows(config, read_rows(config), ENCODER)
    assert (len(split.train), len(split.held_out)) == (train, held_out)
    assert not {e.prompt_ids for e in split.train} & {e.prompt_ids for e in split.held_out}
    assert split_rows(config, read_rows(config), ENCODER) == split


@given(st.integers(0, 10), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_rows_to_tune_on_are_neither_trained_on_nor_held_out(
    rows_file: Path, seed: int, train: int, held_out: int, apart: bool
) -> None:
    rows = RowsConfig(path=str(rows_file))
    config = DataConfig(
        train=rows, held_out=rows if apart else None, train_rows=train, held_out_rows=held_out, seed=seed
    )
    measured = split_rows(config, read_rows(config), ENCODER)
    tuned = split_rows(config.model_copy(update={"measure_on": "tuning"}), read_rows(config), ENCODER)
    assert tuned.train == measured.train and len(tuned.held_out) == held_out
    used = {e.prompt_ids for e in (*measured.train, *measured.held_out)}
    assert not {e.prompt_ids for e in tuned.held_out} & used


def test_repeated_prompts_are_used_once(tmp_path: Path) -> None:
    rows = arithmetic_rows(4, seed=5, split="train")
    config = DataConfig(train=write(tmp_path / "rows.jsonl", rows * 3), train_rows=2, held_out_rows=2)
    split = split_rows(config, read_rows(config), ENCODER)
    assert len({e.prompt_ids for e in (*split.train, *split.held_out)}) == 4
    more = config.model_copy(update={"held_out_rows": 3, "train_rows": 3})
    with pytest.raises(SemalignError, match="has 1 held_out rows of the 3 .*, [1-9] repeated a prompt"):
        split_rows(more, read_rows(config), ENCODER)


def test_compressed_files_and_unicode_line_separators(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "completion": "c\u0085d"}, {"prompt": "e", "completion": "f"}]
    plain = write(tmp_path / "rows.jsonl", rows)
    packed = tmp_path / "rows.jsonl.gz"
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    packed.write_bytes(gzip.compress(raw.encode()))
    assert load_rows(plain) == load_rows(RowsConfig(path=str(packed))) == rows


def test_too_long_rows_are_counted_and_all_too_long_refused(tmp_path: Path) -> None:
    rows = arithmetic_rows(40, seed=6, split="train")
    lengths = sorted(len(example) for example in encode_rows(rows, TOKENIZER))
    config = DataConfig(
        train=write(tmp_path / "rows.jsonl", rows), train_rows=5, held_out_rows=5, max_length=lengths[20]
    )
    split = split_rows(config, read_rows(config), ENCODER)
    assert all(len(example) <= lengths[20] for example in (*split.train, *split.held_out))
    with pytest.raises(SemalignError, match="longer than data.max_length=3"):
        split_rows(config.model_copy(update={"max_length": 3}), read_rows(config), ENCODER)


def test_rows_that_are_left_may_all_be_too_long(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "completion": "yes " * (99 if number > 6 else 1)} for number in range(9)]
    config = DataConfig(train=write(tmp_path / "rows.jsonl", rows), train_rows=7, held_out_rows=1, max_length=60)
    for seed in range(9):
        with pytest.raises(SemalignError, match="has 0 held_out rows of the 1 .* lower data.held_out_rows"):
            split_rows(config.model_copy(update={"seed": seed}), read_rows(config), ENCODER)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "hello"}, ["completion", "prompt"]),
        ({"question": "hello", "answer": "x"}, ["question, answer", "data.train.prompt", "data.held_out"]),
        ({"prompt": "hello", "completion": " "}, ["no answer", "completion"]),
        ({"prompt": "hello", "completion": None}, ["no answer", "'completion' is null"]),
        ({"messages": [{"role": "user", "content": "hello"}]}, ["no answer"]),
        ({"messages": None}, ["neither messages nor the field 'prompt'"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
            ["role and content"],
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ["the chat template refuses"],
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, ["no answer"]),
    ],
)
def test_rows_without_an_answer_are_refused(row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SemalignError) as error:
        encode_rows([row], TOKENIZER)
    assert all(word in str(error.value) for word in words)


def test_places_without_rows_are_named(tmp_path: Path) -> None:
    for content, words in (("", "holds no rows"), ("{", "line 1 is not JSON"), ("[1]\n", "not a JSON object")):
        file = tmp_path / "rows.jsonl"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(SemalignError, match=words):
            load_rows(RowsConfig(path=str(file)))
    with pytest.raises(SemalignError, match="does not exist"):
        load_rows(RowsConfig(path=str(tmp_path / "none.jsonl")))
    broken = tmp_path / "rows.jsonl.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(SemalignError, match="cannot be read"):
        load_rows(RowsConfig(path=str(broken)))
    with pytest.raises(SemalignError, match="generated:arithmetic"):
        load_rows(RowsConfig(path="generated:poems"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.json", b'[{"prompt": "a"}, 2]\n', ", item 2 is not a JSON object"),
        ("rows.json", b'[\n{"prompt": "a"}\n{"prompt": "b"}]\n', ", line 3 is not JSON (Expecting ',' delimiter)"),
        ("rows.json", b'{\n"data": [{"prompt": "a"}]\n}\n', ", line 1 is not JSON (Expecting property name"),
        ("rows.bin", b"\x00\x01\x02", ", line 1 is not JSON (Expecting value)"),
        ("rows.jsonl", b"PAR1\x15\x04\x15\xf8\xff\nPAR1", " is not text in UTF-8"),
        ("rows.jsonl.gz", gzip.compress(b"PAR1\xff\xfe", mtime=0), " is not text in UTF-8"),
    ],
)
def test_a_file_of_another_format_is_told_what_rows_are(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(SemalignError) as error:
        load_rows(RowsConfig(path=str(file)))
    assert str(error.value).startswith(f"{file}{words}") and str(error.value).endswith(f": {FORMS}")


def test_a_damaged_archive_and_rows_beyond_the_reader_are_one_sentence(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b'{"prompt": "a"}\n'))
    packed[10] = 0xFF  # the first block, after ten bytes of header
    archive = tmp_path / "rows.jsonl.gz"
    archive.write_bytes(packed)
    with pytest.raises(SemalignError, match="rows.jsonl.gz cannot be read"):
        load_rows(RowsConfig(path=str(archive)))
    file = tmp_path / "rows.jsonl"
    for value in ("[" * 100_000 + "]" * 100_000, "9" * 5_000):
        file.write_text(f'{{"prompt": "a"}}\n{{"prompt": {value}}}\n', encoding="utf-8")
        with pytest.raises(SemalignError, match="line 2 .* leave it out"):
            load_rows(RowsConfig(path=str(file)))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    raw = "\ufeff" + json.dumps({"prompt": "a"}) + "\r\n"
    (tmp_path / "rows.jsonl").write_bytes(raw.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(raw.encode()))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert load_rows(RowsConfig(path=str(tmp_path / name))) == [{"prompt": "a"}]


@pytest.mark.parametrize("value", [[4], {"a": 1}, True, float("nan"), float("inf")])
def test_values_that_are_no_text_are_refused(value: object) -> None:
    with pytest.raises(SemalignError, match=rf"'completion' .* {type(value).__name__}.*template such as '{{{{ "):
        encode_rows([{"prompt": "hello", "completion": value}], TOKENIZER)


@pytest.mark.parametrize("bad", [1, 3, 5])
def test_an_error_names_the_row_by_its_place_in_the_file(bad: int) -> None:
    rows = [{"prompt": f"question {i}", "completion": "" if i == bad else "yes"} for i in range(1, 6)]
    config = DataConfig(train=RowsConfig(path="rows.jsonl"), train_rows=4, held_out_rows=1, attribution_rows=1)
    with pytest.raises(SemalignError, match=rf"^row {bad} of rows.jsonl has no answer .* 'completion' is empty$"):
        split_rows(config, [rows], ENCODER)


@pytest.mark.parametrize("value", [4, 2.5, 10**400])
def test_numbers_are_text(value: float) -> None:
    (example,) = encode_rows([{"prompt": "hello", "completion": value}], TOKENIZER)
    assert example.answer == str(value)


def test_a_template_makes_text_of_several_fields() -> None:
    config = load_experiment("llama-2-13b-7b", "mmlu").data.train
    row = {"question": " 1 + 1? ", "subject": "abstract_algebra", "choices": ["1", "2", "3", "None"], "answer": 1}
    fields = RowsConfig(path="rows", prompt="question", completion="answer")
    text = (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. None\nAnswer:"
    )
    (found,) = encode_rows([row], TOKENIZER, config=config)
    (expected,) = encode_rows([{"question": text, "answer": "The answer is: B"}], TOKENIZER, config=fields)
    assert found == expected and found.answer == "The answer is: B"
    for broken in ({"question": "?"}, {**row, "answer": 7}, {**row, "choices": []}):
        with pytest.raises(SemalignError, match=r"template .* does not fit row 1 of cais/mmlu, whose fields are"):
            encode_rows([broken], TOKENIZER, config=config)


NULLS = [
    ({"question": "1 + 1", "hint": None}, "{{ question }}{{ hint }}", "'hint' is undefined; 'FIELD | default"),
    ({"question": "1 + 1"}, "{{ question }}{{ hint }}", "'hint' is undefined; 'FIELD | default"),
    ({"question": "1 + 1", "hint": None}, "{{ question }}{{ hint | trim }}", "'hint' is undefined"),
    ({"question": None}, "{{ question }}", "'question' is undefined"),
    ({"of": {"q": None}}, "{{ of.q }}", "no attribute 'q'"),
    ({"choices": ["a", None]}, "{{ choices | join(', ') }}", "a list of the row holds a null"),
]


@pytest.mark.parametrize(("row", "template", "words"), NULLS)
def test_a_null_is_a_missing_field_in_a_template_too(row: dict[str, Any], template: str, words: str) -> None:
    config = RowsConfig(path="rows", prompt=template, completion="answer")
    with pytest.raises(SemalignError, match="does not fit row 1 of rows") as error:
        encode_rows([row | {"answer": "2"}], TOKENIZER, config=config)
    assert words in str(error.value) and "whose fields are " in str(error.value)


def test_a_null_takes_the_default_of_a_template() -> None:
    config = RowsConfig(path="rows", prompt="{{ question }}{{ hint | default('') }}", completion="answer")
    rows = [{"question": "1 + 1", "hint": hint, "answer": 2, "messages": None} for hint in (None, "")]
    null, empty = encode_rows(rows, TOKENIZER, config=config)
    assert null == empty
