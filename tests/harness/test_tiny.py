"""The tiny preset: right problems, a tokenizer with two laws, and a build that is whole or absent."""

import inspect
import itertools
import random
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry.base import SemalignError
from semalign_harness.data.arithmetic import Split, arithmetic_rows
from semalign_harness.models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENIZER, OTHER = tiny.build_tokenizer(), tiny.build_other_tokenizer()

# Under pytest a run-time type check wraps every function; it draws from the global random state and rejects a
# wrong literal before the function can. These are the functions that a caller meets.
plain_rows = inspect.unwrap(arithmetic_rows)
plain_build = inspect.unwrap(tiny.build_tiny_model)

seeds = st.integers(min_value=0, max_value=2**32)
splits = st.sampled_from(["train", "held_out"])

OPERATION_OF = {"buys": "+", "brings": "+", "adds": "+", "loses": "-", "gives": "-", "takes": "-"}


def prompt_of(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"]


def chain_of(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def read_problem(prompt: str) -> tuple[str, tuple[int, ...]]:
    """The operations and the numbers of a story, read from its words alone."""
    operations, numbers = "", []
    for sentence in prompt.split(" . "):
        words = sentence.split()
        numbers += [int(word) for word in words if word.isdigit()]
        operations += "*" * ("boxes" in words or "bags" in words)
        operations += "".join(OPERATION_OF[word] for word in words if word in OPERATION_OF)
    return operations, tuple(numbers)


def solve(prompt: str) -> int:
    operations, (value, *rest) = read_problem(prompt)
    assert len(operations) == len(rest)
    for operation, number in zip(operations, rest, strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number}[operation]
    return value


def encode(messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(seed=seeds, split=splits)
def test_answers_are_right(seed: int, split: Split) -> None:
    for row in arithmetic_rows(20, seed=seed, split=split):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["answer"] == str(solve(prompt_of(row)))
        assert re.findall(r"\d+", chain_of(row))[-1] == row["answer"]
        lines = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+) \.", chain_of(row))
        assert len(lines) == len(read_problem(prompt_of(row))[0])
        for left, operation, right, result in lines:
            step = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation]
            assert step(int(left), int(right)) == int(result) >= 0


@given(seed=seeds, split=splits, count=st.integers(0, 30))
def test_rows_are_a_function_of_their_arguments(seed: int, split: Split, count: int) -> None:
    rows = arithmetic_rows(count, seed=seed, split=split)
    assert len(rows) == count == len(set(map(prompt_of, rows)))
    assert rows == arithmetic_rows(count, seed=seed, split=split)
    assert rows == arithmetic_rows(count + 5, seed=seed, split=split)[:count]


def test_rows_do_not_read_the_global_random_state() -> None:
    state = random.getstate()
    try:
        random.seed(0)
        rows = arithmetic_rows(5, seed=0, split="train")
        random.seed(1)
        assert rows == arithmetic_rows(5, seed=0, split="train")
    finally:
        random.setstate(state)


def test_another_seed_gives_other_rows() -> None:
    assert arithmetic_rows(5, seed=0, split="train") != arithmetic_rows(5, seed=1, split="train")


@given(seed=seeds, other=seeds)
def test_splits_share_no_problem(seed: int, other: int) -> None:
    train = {read_problem(prompt_of(row)) for row in arithmetic_rows(300, seed=seed, split="train")}
    held_out = {read_problem(prompt_of(row)) for row in arithmetic_rows(100, seed=other, split="held_out")}
    assert not train & held_out


def test_both_splits_hold_every_kind_of_problem() -> None:
    kinds = [
        {read_problem(prompt_of(row))[0] for row in arithmetic_rows(500, seed=0, split=split)}
        for split in ("train", "held_out")
    ]
    assert kinds[0] == kinds[1] == {"+", "-", "*", "++", "+-", "-+", "--", "*+", "*-"}


def test_a_wrong_request_says_what_is_expected() -> None:
    with pytest.raises(SemalignError, match="'test'; expected 'train' or 'held_out'"):
        plain_rows(1, seed=0, split="test")
    with pytest.raises(SemalignError, match="-1; expected 0 or more"):
        arithmetic_rows(-1, seed=0, split="train")


def test_entries_and_ids_are_those_that_the_weights_were_trained_on() -> None:
    names = [name.removeprefix("▁") for name in sorted(TOKENIZER.get_vocab(), key=TOKENIZER.get_vocab().get)]
    assert names == tiny._vocabulary()


@given(seed=seeds, split=splits)
def test_text_survives_the_tokenizer(seed: int, split: Split) -> None:
    for row in arithmetic_rows(10, seed=seed, split=split):
        for message in row["messages"]:
            ids = TOKENIZER(message["content"])["input_ids"]
            assert TOKENIZER.unk_token_id not in ids
            assert len(ids) == len(message["content"].split())
            assert TOKENIZER.decode(ids) == message["content"]


@given(seed=seeds, split=splits)
def test_a_prompt_is_the_beginning_of_its_answer(seed: int, split: Split) -> None:
    for row in arithmetic_rows(10, seed=seed, split=split):
        prompt = encode(row["messages"][:1], prompt=True)
        whole = encode(row["messages"])
        assert whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :]
        assert answer[-1] == TOKENIZER.eos_token_id
        assert 8 <= len(answer) <= 18 and len(whole) <= 64
        assert TOKENIZER.decode(answer, skip_special_tokens=True) == chain_of(row)


def test_chat_template() -> None:
    turns = [
        {"role": "user", "content": "Ada has 2 figs ."},
        {"role": "assistant", "content": "The answer is 2"},
        {"role": "user", "content": "How many now ?"},
    ]
    text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = (
        "<bos> <user> ▁Ada ▁has ▁2 ▁figs ▁. <assistant> ▁The ▁answer ▁is ▁2 <eos> <user> ▁How ▁many ▁now ▁? <assistant>"
    ).split()
    assert TOKENIZER.tokenize(text) == tokens
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id, TOKENIZER.unk_token_id}) == 4
    with pytest.raises(Exception, match="not system"):
        TOKENIZER.apply_chat_template([{"role": "system", "content": "Hi"}], tokenize=False)


def test_the_head_has_full_column_rank(tmp_path: Path) -> None:
    models = {
        role: AutoModelForCausalLM.from_pretrained(tiny.build_tiny_model(role, tmp_path / role, steps=1))
        for role in typing.get_args(tiny.Role)
    }
    for larger, smaller in itertools.pairwise(("source", "target", "small")):
        assert models[larger].config.num_hidden_layers > models[smaller].config.num_hidden_layers
        assert models[larger].config.hidden_size > models[smaller].config.hidden_size
    shared = [
        OTHER.get_vocab()[f"Ġ{word[1:]}"] for word in TOKENIZER.get_vocab() if f"Ġ{word[1:]}" in OTHER.get_vocab()
    ]
    for role, model in models.items():
        head = model.get_output_embeddings().weight.detach().double()
        assert head.shape[0] == len(OTHER if role == "target-other" else TOKENIZER) >= 2 * head.shape[1]
        if role == "target-other":  # the basis reads the entries that both tokenizers have
            head = head[shared]
        assert len(head) >= 2 * models["source"].config.hidden_size - 10
        assert torch.linalg.matrix_rank(head) == head.shape[1]


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_the_other_tokenizer_gives_every_text_back(text: str) -> None:
    plain = text.replace("<", "")  # no special entries
    assert OTHER.decode(OTHER(plain, add_special_tokens=False)["input_ids"]) == plain


def test_the_other_tokenizer_writes_numbers_in_digits() -> None:
    assert OTHER.tokenize(" 3 + 17 = 20 .") == ["Ġ3", "Ġ+", "Ġ1", "7", "Ġ=", "Ġ2", "0", "Ġ."]
    assert TOKENIZER.tokenize("3 + 17 = 20 .") == ["▁3", "▁+", "▁17", "▁=", "▁20", "▁."]


def test_the_other_tokenizer_is_always_the_same() -> None:
    assert OTHER.backend_tokenizer.to_str() == tiny.build_other_tokenizer().backend_tokenizer.to_str()
    assert len(OTHER) == len(OTHER.get_vocab()) == 896
    longer = sum(len(OTHER.tokenize(f" {word[1:]}")) > 1 for word in TOKENIZER.get_vocab() if word[0] == "▁")
    assert longer > 40, "some words are in pieces"


def test_a_short_build_saves_a_model_that_generates(tmp_path: Path) -> None:
    calls = []
    state = torch.get_rng_state()
    folder = tiny.build_tiny_model(
        "target",
        tmp_path / "deep" / "model",
        steps=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    prompt = torch.tensor([encode([{"role": "user", "content": "How many figs now ?"}], prompt=True)])
    assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt.shape[1]


def test_training_lowers_the_loss_on_held_out_problems(tmp_path: Path) -> None:
    losses = []
    rows = arithmetic_rows(64, seed=0, split="held_out")
    for steps in (1, 8):
        folder = tiny.build_tiny_model("target", tmp_path / str(steps), steps=steps)
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids, labels = next(iter(tiny._batches(rows, TOKENIZER)))
        with torch.no_grad():
            losses.append(model(ids, labels=labels).loss.item())
    assert losses[1] < 0.8 * losses[0]


def test_labels_are_the_answer_and_its_end() -> None:
    rows = arithmetic_rows(100, seed=0, split="train")
    ids, labels = (torch.cat(parts) for parts in zip(*padded_batches(rows), strict=True))
    for row, row_ids, row_labels in zip(rows, ids, labels, strict=True):
        supervised = row_labels != -100
        assert torch.equal(row_ids[supervised], row_labels[supervised])
        assert TOKENIZER.decode(row_labels[supervised]) == f"{chain_of(row)}<eos>"


def padded_batches(rows: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    def pad(rectangle: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(rectangle, (0, 64 - rectangle.shape[1]), value=value)

    return [(pad(ids, 0), pad(labels, -100)) for ids, labels in tiny._batches(rows, TOKENIZER)]


def test_a_build_is_repeatable_and_follows_its_seed(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(name))  # the global state does not matter
            folder = tiny.build_tiny_model("target", tmp_path / name, seed=seed, steps=2)
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    first, again, other = weights("first", 0), weights("again", 0), weights("other", 1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_finished_folder_is_reused_and_never_mistaken(tmp_path: Path) -> None:
    def refuse(done: int, total: int) -> None:
        raise AssertionError("trained again")

    folder = tiny.build_tiny_model("target", tmp_path / "model", steps=1)
    assert tiny.build_tiny_model("target", folder, steps=1, progress=refuse) == folder
    with pytest.raises(SemalignError, match="holds the tiny model .*'seed': 0.* expected .*'seed': 7"):
        tiny.build_tiny_model("target", folder, seed=7, steps=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert tiny.build_tiny_model("target", foreign, steps=1) == foreign  # an empty folder is free
    (foreign / "tiny.json").unlink()
    with pytest.raises(SemalignError, match="holds no tiny model"):
        tiny.build_tiny_model("target", foreign, steps=1)
    with pytest.raises(SemalignError, match="is a file"):
        tiny.build_tiny_model("target", folder / "config.json", steps=1)
    with pytest.raises(SemalignError, match="role is 'teacher'"):
        plain_build("teacher", tmp_path / "x")
    with pytest.raises(SemalignError, match="steps is 0"):
        tiny.build_tiny_model("target", tmp_path / "x", steps=0)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    if moment == "saving":
        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.build_tiny_model(
            "target", tmp_path / "model", steps=2, progress=interrupt if moment == "training" else None
        )
    assert list(tmp_path.iterdir()) == []
