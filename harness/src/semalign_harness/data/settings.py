"""Settings of the rows of an experiment."""

from typing import Literal

from pydantic import Field
from semalign_geometry.base import Settings


class RowsConfig(Settings):
    """Where rows come from, and which of their fields are prompt and answer."""

    path: str
    """File of rows: JSON objects, one a line or in one array (`.jsonl`, `.json`), `.csv` and `.tsv` with a header,
    whose fields are text, `.parquet` or `.arrow`; each also packed (`.gz`, `.zst`, `.bz2`, `.xz`, `.lz4`, `.zip`). Or
    a folder of such files, or one that `save_to_disk` wrote; id of a data set on the hub; `generated:arithmetic`."""
    subset: str | None = None
    """Configuration name of a hub data set or a folder, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a hub data set or a folder, or of generated rows (`train`, `held_out`)."""
    prompt: str = "prompt"
    """Field of the prompt, in rows without `messages`; or, with `{{`, a Jinja template over the fields. A null counts
    as a missing field, in templates too."""
    completion: str = "completion"
    """Field of the answer, in rows without `messages`; or, with `{{`, a Jinja template over the fields."""


class WritingConfig(Settings):
    """How a model writes answers of rows."""

    keep: Literal["all", "correct"] = "all"
    """Whether written answers are trained on whatever they say, or only where they arrive at the number of the row's
    own answer."""
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
    """The training rows' own answers, or what the source or the untrained target writes after their prompts."""
    held_out_answers: Literal["gold", "source", "target"] = "gold"
    """The same for the rows to measure on: NLL, KL and agreement are of these answers."""
    writing: WritingConfig = WritingConfig()
    """How they are written, where a model does."""
    train_rows: int = Field(256, ge=1)
    """Rows to train on, drawn by `seed`."""
    held_out_rows: int = Field(48, ge=1)
    """Rows to measure on."""
    measure_on: Literal["held_out", "tuning"] = "held_out"
    """`tuning` measures on as many further rows of `train` that are neither trained on nor held out: settings are
    chosen on them."""
    attribution_rows: int = Field(32, ge=1)
    """Rows to attribute on: the first of the training rows."""
    max_length: int = Field(512, ge=2)
    """Longest prompt with answer, in tokens; longer rows are left out, and counted in the output."""
    seed: int = 0
    """Seed of the draw of rows."""
