"""Rows from files, the hub or a generator, as token ids with the answers supervised."""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import semalign_align
import semalign_attribution
from jinja2 import StrictUndefined, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from semalign_geometry.base import SemalignError

from ..util.failures import reason
from .arithmetic import arithmetic_rows
from .encoding import Conversation, Example, Message, SourceSide, TextEncoder
from .paired import PairedEncoder, TextChanged
from .row_files import Row, is_file_name, read_local
from .settings import DataConfig, RowsConfig

if TYPE_CHECKING:
    from semalign_align import AnyBatch
    from semalign_attribution import Batch
    from transformers import PreTrainedTokenizerBase

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
    changed: int = 0
    """Rows that were left out because two tokenizers read different text in their answers."""
    change: str = ""
    """The first such difference."""


def read_rows(config: DataConfig) -> tuple[list[Row], ...]:
    """Read the pools of rows: for training, and held out where the experiment names others."""
    return tuple(load_rows(origin) for origin in (config.train, config.held_out) if origin is not None)


def split_rows(config: DataConfig, pools: Sequence[list[Row]], encoder: TextEncoder | PairedEncoder) -> Split:
    """Draw train and held-out rows from the pools that `read_rows` returned, and encode them.

    Raises:
        SemalignError: too few rows, none short enough, or rows without a prompt or an answer.
    """
    import torch  # for the order of the rows alone

    generator = torch.Generator().manual_seed(config.seed)
    shuffled = []
    for pool in pools:
        order = torch.randperm(len(pool), generator=generator).tolist()
        shuffled.append([(index + 1, pool[index]) for index in order])
    draw = _Draw(config, encoder)
    train = draw.take(shuffled[0], config.train, config.train_rows, "train")
    measured = draw.take(shuffled[-1], config.held_out or config.train, config.held_out_rows, "held_out")
    if config.measure_on == "tuning":
        measured = draw.take(shuffled[0], config.train, config.held_out_rows, "held_out")
    return Split(
        train,
        measured,
        draw.too_long,
        draw.longest,
        dict(sorted(draw.unread.items())),
        draw.several,
        draw.ended_within,
        draw.changed,
        draw.change,
    )


class _Draw:
    """Encodes rows of which no two have one prompt, and counts them as `Split` does."""

    def __init__(self, config: DataConfig, encoder: TextEncoder | PairedEncoder) -> None:
        self._config, self._encoder = config, encoder
        self._seen: set[tuple[int, ...]] = set()
        self.too_long = self.longest = self.several = self.ended_within = self.changed = 0
        self.change = ""
        self.unread: Counter[str] = Counter()

    def take(self, pool: list[tuple[int, Row]], origin: RowsConfig, wanted: int, part: str) -> list[Example]:
        """Take rows from the end of a pool, each with its number in the file."""
        found: list[Example] = []
        too_long = repeated = changed = 0
        while pool and len(found) < wanted:
            number, row = pool.pop()
            name = f"row {number} of {origin.path}"
            conversation = read_conversation(row, origin, name)
            try:
                example = self._encoder.example(conversation, name=name)
            except TextChanged as difference:
                changed += 1
                self.change = self.change or f"in {name}, {difference}"
                continue
            self.longest = max(self.longest, example.longest)
            if example.prompt_ids in self._seen:
                repeated += 1
                continue
            self._seen.add(example.prompt_ids)
            if example.longest > self._config.max_length:
                too_long += 1
                continue
            found.append(example)
            self.unread.update(self._encoder.unread(conversation))
            self.several += sum(message["role"] == "assistant" for message in conversation.messages) > 1
            self.ended_within += self._encoder.holds_end(example.answer)
        self.too_long += too_long
        self.changed += changed
        limit = f"data.max_length={self._config.max_length}"
        untouched = part == "train" or self._config.held_out is not None
        if not found and too_long and untouched:
            raise SemalignError(
                f"every row of {origin.path} is longer than {limit} tokens (the longest has {self.longest}): raise "
                "data.max_length"
            )
        if not found and changed:
            raise SemalignError(
                f"the tokenizers read different text in every answer ({self.change}): set options in chat_template, "
                "such as enable_thinking=false, with which both templates render an answer alike"
            )
        if len(found) < wanted:
            left_out = f"{too_long} were longer than {limit}, {repeated} repeated a prompt"
            left_out += f", {changed} are different texts to both models" if changed else ""
            raise SemalignError(
                f"{origin.path} has {len(found)} {part} rows of the {wanted} that data.{part}_rows sets "
                f"({left_out}): lower data.{part}_rows"
            )
        return found


def load_rows(config: RowsConfig) -> list[Row]:
    """Load all rows of a local file or folder, a hub data set or a generator.

    Raises:
        SemalignError: nothing is found there, it cannot be read, or there are no rows.
    """
    if config.path.startswith("generated:"):
        if config.path != "generated:arithmetic":
            raise SemalignError(f"unknown generator {config.path!r}: the one known is generated:arithmetic")
        if config.split not in ("train", "held_out"):
            raise SemalignError(f"generated rows have the splits train and held_out, not {config.split!r}")
        rows: list[Row] = arithmetic_rows(GENERATED_ROWS, seed=0, split=config.split)  # type: ignore[arg-type]
    elif comes_from_hub(config):
        rows = _read_hub(config)
    else:
        rows = read_local(Path(config.path).expanduser(), config)
    if not rows:
        raise SemalignError(f"{config.path} holds no rows")
    return rows


def comes_from_hub(config: RowsConfig) -> bool:
    """Return whether rows come from the hub: they are neither generated nor in a local file."""
    path = Path(config.path).expanduser()
    return not (config.path.startswith("generated:") or is_file_name(path) or path.exists())


def _read_hub(config: RowsConfig) -> list[Row]:
    import datasets  # takes a second to import

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the hub client has no common base class of errors
        raise SemalignError(
            f"{config.path!r} is no local file, and the hub did not return it ({reason(error)})"
        ) from error
    return [dict(row) for row in found]


def encode_rows(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", *, config: RowsConfig | None = None
) -> list[Example]:
    """Encode rows that hold `messages`, or the fields that `config` names."""
    origin, encoder = config or RowsConfig(path="rows"), TextEncoder(tokenizer)
    return [encode_row(number, row, encoder, origin) for number, row in enumerate(rows, 1)]


def encode_row(number: int, row: Row, encoder: TextEncoder, config: RowsConfig) -> Example:
    """Encode one row; errors name it by the place of its rows and its number, counted from 1.

    Raises:
        SemalignError: the row has no prompt or no answer, or the template does not fit.
    """
    name = f"row {number} of {config.path}"
    return encoder.example(read_conversation(row, config, name), name=name)


def read_conversation(row: Row, config: RowsConfig, name: str) -> Conversation:
    """Read the turns, tools and documents of a row; the last turn is its answer.

    Raises:
        SemalignError: the row has no prompt or no answer.
    """
    messages = _messages(row, config, name)
    if row.get("messages") is None:
        return Conversation(messages)
    return Conversation(messages, *(_without_nulls(_listed(row, field)) for field in ("tools", "documents")))


def _listed(row: Row, field: str) -> Any:
    """A list beside the messages of a row, which some data sets write as JSON."""
    value = row.get(field)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def glued(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the text around a border where the answer's word directly follows a word or a stop.

    None where something is between them, as with every chat template.
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
                "supervised, so leave the row out or end it with the answer to train on"
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
    """The messages of a row with text as content, empty where a turn only calls tools."""
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
    if "{{" in field:
        return _filled(row, field, name)
    value = row[field]
    if value is None:
        raise SemalignError(f"{name} has no answer or prompt: its field {field!r} is null")
    number = math.isfinite(value) if isinstance(value, float) else type(value) is int
    if not (isinstance(value, str) or number):
        raise SemalignError(
            f"the field {field!r} of {name} holds {str(value)[:60]!r} of type {type(value).__name__}: name a field of "
            f"text or numbers, or a template such as '{{{{ {field} | join(\" \") }}}}'"
        )
    return str(value)


def _filled(row: Row, template: str, name: str) -> str:
    present = _without_nulls(row, TEMPLATES.undefined("a list of the row holds a null"))
    try:
        return TEMPLATES.from_string(template).render(present)
    except Exception as error:  # an expression in a template can fail in any way
        undefined = isinstance(error, UndefinedError)
        remedy = "; 'FIELD | default(\"\")' fills in a field that is missing or null" * undefined
        fields = ", ".join(present)
        raise SemalignError(
            f"the template {template[:60]!r} does not fit {name}, whose fields are {fields}: {error}{remedy}"
        ) from error


def _without_nulls(value: Any, null: Any = None) -> Any:
    """A value of a row without null fields, and with `null` for a null in a list.

    Parquet has no missing fields.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item, null) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [null if item is None else _without_nulls(item, null) for item in value]
    return value


def batches(examples: Sequence[Example], batch_size: int) -> "list[AnyBatch]":
    """Make padded batches with supervised answers, in order of length so that little is padded.

    They are paired where the source has a tokenizer of its own.
    """
    order = sorted(examples, key=len)
    return [_batch(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def _batch(examples: Sequence[Example]) -> "AnyBatch":
    sources = [each.source for each in examples if each.source is not None]
    if not sources:
        return _padded(examples, [slice(None)] * len(examples))
    assert len(sources) == len(examples)
    spans = tuple(
        semalign_align.Spans(each.spans.source[each.compared], each.spans.target[each.compared]) for each in sources
    )
    return semalign_align.PairedBatch(
        _padded(sources, [_tokens_in(each.spans.source, each.compared) for each in sources]),
        _padded(examples, [_tokens_in(each.spans.target, each.compared) for each in sources]),
        spans,
    )


def _tokens_in(lengths: Sequence[int], spans: slice) -> slice:
    """The tokens of an answer that belong to some of its spans."""
    return slice(sum(lengths[: spans.start]), sum(lengths[: spans.stop]))


def _padded(sides: Sequence[Example | SourceSide], answers: Sequence[slice]) -> "Batch":
    """Return a batch of rows in which some tokens of each answer are supervised."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ignored = semalign_attribution.IGNORE
    ids = [torch.tensor(e.prompt_ids + e.answer_ids) for e in sides]
    labels = [torch.full_like(row, ignored) for row in ids]
    for side, row, label, answer in zip(sides, ids, labels, answers, strict=True):
        begin = len(side.prompt_ids)
        label[begin:][answer] = row[begin:][answer]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=ignored),
    }
