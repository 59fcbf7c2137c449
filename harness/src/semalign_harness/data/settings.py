"""Settings of the rows of an experiment, and of the chat template that they go through."""

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue
from semalign_geometry.base import Settings

DAY = datetime.date(2024, 7, 26)
"""Default date of a template that reads the clock, which is that of Llama's templates.

A fixed date makes a run the same on every day."""
CLOCK = "strftime_now"
"""Name of the clock in chat templates."""
RESERVED = frozenset(
    (
        "add_generation_prompt chat_template continue_final_message conversation documents kwargs max_length "
        "messages padding return_assistant_tokens_mask return_dict return_tensors sanitize_control_tokens "
        "self tokenize tokenizer_kwargs tools truncation"
    ).split()
)
"""Arguments of transformers' `apply_chat_template`, and the messages: no options of a template."""


def _checked(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if reserved := sorted({*RESERVED, CLOCK} & {*options}):
        remedy = "set date for the day" if reserved == [CLOCK] else "leave it out"
        raise ValueError(f"{reserved[0]} is no option of a chat template, it is set by semalign: {remedy}")
    return options


TemplateOptions = Annotated[dict[str, JsonValue], AfterValidator(_checked)]
"""Keyword arguments of a chat template by their names, such as `enable_thinking`."""


class RowsConfig(Settings):
    """Where rows come from, and which of their fields are prompt and answer."""

    path: str
    """File or folder of rows, a folder that `save_to_disk` wrote, the id of a data set on the hub, or
    `generated:arithmetic`. Files are `.jsonl` and `.json` (one object a line, or one array), `.csv`
    and `.tsv` with a header, whose fields are text, `.parquet` or `.arrow`; each may be packed
    (`.gz`, `.zst`, `.bz2`, `.xz`, `.lz4`, `.zip`)."""
    subset: str | None = None
    """Configuration name of a hub data set or a folder, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a hub data set or a folder, or of generated rows (`train`, `held_out`)."""
    prompt: str = "prompt"
    """Field of the prompt, in rows without `messages`, or with `{{` a Jinja template over the fields.
    A null counts as a missing field, in templates too."""
    completion: str = "completion"
    """Field of the answer, in rows without `messages`, or with `{{` a Jinja template over the fields."""


class WritingConfig(Settings):
    """Settings of a model that writes answers of rows."""

    keep: Literal["all", "correct"] = "all"
    """Written answers to train on: all, or those with the final number of the row's own answer."""
    temperature: float = Field(0.0, ge=0)
    """0 writes the likeliest tokens; above it, tokens are drawn."""
    seed: int = 0
    """Seed of the draw."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest written answer, in tokens."""


class DataConfig(Settings):
    """The rows of an experiment; train and held-out rows never share a prompt."""

    train: RowsConfig
    """Rows to train and attribute on."""
    held_out: RowsConfig | None = None
    """Rows to measure on; None takes other rows of `train`."""
    answers: Literal["gold", "source", "target"] = "gold"
    """Answers of the training rows: their own, or written by the source or the untrained target."""
    held_out_answers: Literal["gold", "source", "target"] = "gold"
    """The same for the rows to measure on: NLL, KL and agreement are of these answers."""
    writing: WritingConfig = WritingConfig()
    """Settings of a model that writes answers."""
    train_rows: int = Field(256, ge=1)
    """Rows to train on, drawn by `seed`."""
    held_out_rows: int = Field(48, ge=1)
    """Rows to measure on."""
    measure_on: Literal["held_out", "tuning"] = "held_out"
    """Rows to measure on. `tuning` takes as many further rows of `train`, to choose settings on."""
    attribution_rows: int = Field(32, ge=1)
    """Rows for attribution: the first of the training rows."""
    max_length: int = Field(512, ge=2)
    """Longest prompt with answer, in tokens; longer rows are left out and counted."""
    seed: int = 0
    """Seed of the draw of rows."""
