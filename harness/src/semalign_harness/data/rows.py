"""Rows from files, the hub or a generator, as token ids with the answers supervised."""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import StrictUndefined, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from semalign_attribution import IGNORE, Batch
from semalign_geometry.base import SemalignError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .arithmetic import arithmetic_rows
from .encoding import Conversation, Example, Message, TextEncoder
from .row_files import Row, is_file_name, read_local
from .settings import DataConfig, RowsConfig

GENERATED_ROWS = 5_000
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Split:
    """The rows of an experiment, disjoint by prompt."""

    train: list[Example]
    held_out: list[Example]
    too_long: int
    """Rows that were left out because they are longer than the limit."""
    longest: int
    """Tokens of the longest row that was seen."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Of the rows above, how many hold a key that the chat template never reads, by its name."""
    several: int = 0
    """Of the rows above, those with several answers, of which the last is supervised."""
    ended_within: int = 0
    """Of the rows above, those whose answer names the end-of-sequence token before its end."""


def read_rows(config: DataConfig) -> tuple[list[Row], ...]:
    """The rows to draw from: those for training, and those held out where the experiment names others."""
    return tuple(load_rows(origin) for origin in (config.train, config.held_out) if origin is not None)


def split_rows(config: DataConfig, pools: Sequence[list[Row]], encoder: TextEncoder) -> Split:
    """Draw the train and held-out rows of an experiment from what `read_rows` gave, and encode them.

    Raises:
        SemalignError: too few rows, none short enough, or rows without a prompt or an answer.
    """
    generator = torch.Generator().manual_seed(config.seed)
    seen: set[tuple[int, ...]] = set()
    dropped = longest = several = ended_within = 0
    unread: Counter[str] = Counter()

    def draw(pool: list[tuple[int, Row]], origin: RowsConfig, wanted: int, part: str) -> Iterator[Example]:
        nonlocal dropped, longest, several, ended_within
        found = too_long = repeated = 0
        while pool and found < wanted:
            number, row = pool.pop()
            name = f"row {number} of {origin.path}"
            conversation = read_conversation(row, origin, name)
            example = encoder.example(conversation, name=name)
            longest = max(longest, len(example))
            if example.prompt_ids in seen:
                repeated += 1
                continue
            seen.add(example.prompt_ids)
            if len(example) > config.max_length:
                too_long += 1
                dropped += 1
                continue
            found += 1
            unread.update(encoder.unread(conversation))
            several += sum(message["role"] == "assistant" for message in conversation.messages) > 1
            ended_within += encoder.holds_end(example.answer)
            yield example
        untouched = part == "train" or config.held_out is not None
        if found == 0 and too_long and untouched:
            raise SemalignError(
                f"every row of {origin.path} is longer than data.max_length={config.max_length} tokens "
                f"(the longest has {longest}): raise data.max_length"
            )
        if found < wanted:
            raise SemalignError(
                f"{origin.path} gives {found} {part} rows of the {wanted} that data.{part}_rows asks for "
                f"({too_long} were longer than data.max_length={config.max_length}, {repeated} repeated a prompt): "
                f"lower data.{part}_rows"
            )

    shuffled = []
    for pool in pools:
        order = torch.randperm(len(pool), generator=generator).tolist()
        shuffled.append([(index + 1, pool[index]) for index in order])
    train = list(draw(shuffled[0], config.train, config.train_rows, "train"))
    measured = list(draw(shuffled[-1], config.held_out or config.train, config.held_out_rows, "held_out"))
    if config.measure_on == "tuning":
        measured = list(draw(shuffled[0], config.train, config.held_out_rows, "held_out"))
    return Split(train, measured, dropped, longest, dict(sorted(unread.items())), several, ended_within)


def load_rows(config: RowsConfig) -> list[Row]:
    """All rows of a local file or folder, a hub data set or a generator.

    Raises:
        SemalignError: nothing is found there, it cannot be read, or there are no rows.
    """
    path = Path(config.path).expanduser()
    if config.path.startswith("generated:"):
        if config.path != "generated:arithmetic":
            raise SemalignError(f"unknown generator {config.path!r}: the one known is generated:arithmetic")
        if config.split not in ("train", "held_out"):
            raise SemalignError(f"generated rows have the splits train and held_out, not {config.split!r}")
        rows: list[Row] = arithmetic_rows(GENERATED_ROWS, seed=0, split=config.split)  # type: ignore[arg-type]
    elif comes_from_hub(config):
        rows = _read_hub(config)
    else:
        rows = read_local(path, config)
    if not rows:
        raise SemalignError(f"{config.path} holds no rows")
    return rows


def comes_from_hub(config: RowsConfig) -> bool:
    """Whether rows are those of a data set on the hub: neither generated nor in a local file."""
    path = Path(config.path).expanduser()
    return not (config.path.startswith("generated:") or is_file_name(path) or path.exists())


def _read_hub(config: RowsConfig) -> list[Row]:
    import datasets  # a second to import, which only rows from the hub are worth

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the hub client has no common base class of errors
        reason = " ".join(str(error).split())[:200]
        raise SemalignError(
            f"{config.path!r} is no local file, and the hub did not give it ({type(error).__name__}: {reason})"
        ) from error
    return [dict(row) for row in found]


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, config: RowsConfig | None = None
) -> list[Example]:
    """Encode rows that hold `messages`, or the prompt and completion fields that `config` names."""
    origin, encoder = config or RowsConfig(path="rows"), TextEncoder(tokenizer)
    return [encode_row(number, row, encoder, origin) for number, row in enumerate(rows, 1)]


def encode_row(number: int, row: Row, encoder: TextEncoder, config: RowsConfig) -> Example:
    """Encode one row of a place; errors call it by its number, counted from 1.

    Raises:
        SemalignError: the row has no prompt or no answer, or the template does not fit.
    """
    name = f"row {number} of {config.path}"
    return encoder.example(read_conversation(row, config, name), name=name)


def read_conversation(row: Row, config: RowsConfig, name: str) -> Conversation:
    """Read the turns of a row, the last one its answer, and what its template may read besides; errors call it `name`.

    Raises:
        SemalignError: the row has no prompt or no answer.
    """
    messages = _messages(row, config, name)
    if row.get("messages") is None:
        return Conversation(messages)
    return Conversation(messages, *(_without_nulls(_listed(row, field)) for field in ("tools", "documents")))


def _listed(row: Row, field: str) -> Any:
    """A list that stands beside the messages of a row; data sets whose columns cannot hold it write it as JSON."""
    value = row.get(field)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def glued(example: Example, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What stands around the end of a prompt whose answer begins with a word right after a word or a stop.

    None where something is between them, as a chat template always has it.
    """
    end = len(str(tokenizer.decode(list(example.prompt_ids))))
    whole = str(tokenizer.decode(list(example.prompt_ids + example.answer_ids)))
    return whole[max(0, end - 12) : end + 12] if re.fullmatch(r"[\w.:?!]\w", whole[end - 1 : end + 1]) else None


def _messages(row: Row, config: RowsConfig, name: str) -> list[Message]:
    if row.get("messages") is not None:
        messages = _turns(row["messages"], name)
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise SemalignError(f"{name} has no answer: its last message must be text by the assistant")
        if messages[-1].get("weight") == 0:
            raise SemalignError(
                f"{name} has nothing to train on: its last message has weight 0, and only the last answer of a row is "
                "supervised, so leave the row out or end it with the answer that is meant"
            )
        return messages
    missing = [field for field in (config.prompt, config.completion) if "{{" not in field and field not in row]
    if missing:
        raise SemalignError(
            f"{name} has neither messages nor the field {missing[0]!r}; its fields are "
            f"{', '.join(row)}: name the right ones in data.train.prompt and data.train.completion, or in those of "
            "data.held_out for its rows"
        )
    prompt, completion = (_text(row, field, name) for field in (config.prompt, config.completion))
    if not prompt.strip() or not completion.strip():
        empty = config.completion if prompt.strip() else config.prompt
        raise SemalignError(f"{name} has no answer or prompt: its field {empty!r} is empty")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _turns(messages: Any, name: str) -> list[Message]:
    """The messages of a row, each with text as content, which is empty where a turn that calls tools has none."""
    found: list[Message] = []
    for turn in messages if isinstance(messages, list) else [None]:
        turn = _without_nulls(turn)
        if isinstance(turn, dict) and turn.get("tool_calls"):
            turn = {"content": "", **turn}
        texts = isinstance(turn, dict) and [turn.get(key) for key in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise SemalignError(f"{name} has messages that are not role and content, both text")
        found.append(turn)
    return found


def _text(row: Row, field: str, name: str) -> str:
    """A field of a row that holds text or a number, or a template filled with its fields."""
    if "{{" not in field:
        value = row[field]
        if value is None:
            raise SemalignError(f"{name} has no answer or prompt: its field {field!r} is null")
        number = math.isfinite(value) if isinstance(value, float) else type(value) is int
        if not (isinstance(value, str) or number):
            raise SemalignError(
                f"the field {field!r} of {name} holds {str(value)[:60]!r} of type "
                f"{type(value).__name__}: name a field of text or numbers, or a template such as "
                f"'{{{{ {field} | join(\" \") }}}}'"
            )
        return str(value)
    present = _without_nulls(row, TEMPLATES.undefined("a list of the row holds a null"))
    try:
        return TEMPLATES.from_string(field).render(present)
    except Exception as error:  # an expression in a template can fail in any way
        remedy = "; 'FIELD | default(\"\")' fills in a field that is missing or null" * isinstance(
            error, UndefinedError
        )
        raise SemalignError(
            f"the template {field[:60]!r} does not fit {name}, whose fields are {', '.join(present)}: {error}{remedy}"
        ) from error


def _without_nulls(value: Any, null: Any = None) -> Any:
    """A value of a row as templates see it: a null is a missing field, as Parquet has no missing ones; within a list,
    where nothing can be missing, it becomes `null`."""
    if isinstance(value, dict):
        return {key: _without_nulls(item, null) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [null if item is None else _without_nulls(item, null) for item in value]
    return value


def batches(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """Padded batches with supervised answers, in order of length so that little is padded."""
    order = sorted(examples, key=len)
    return [_batch(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def _batch(examples: Sequence[Example]) -> Batch:
    ids = [torch.tensor(e.prompt_ids + e.answer_ids) for e in examples]
    labels = [torch.tensor((IGNORE,) * len(e.prompt_ids) + e.answer_ids) for e in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }
