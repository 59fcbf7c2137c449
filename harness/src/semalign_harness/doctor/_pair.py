"""Both models as far as they are known without their weights, and a sample of the rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from semalign_attribution import DecoderView
from semalign_geometry import SemalignError
from transformers import PreTrainedConfig

from ..data.encoding import Example, TextEncoder
from ..data.rows import encode_row, load_rows
from ..data.settings import DataConfig
from ..experiment import Experiment
from ..models.opening import OpenedModel, check_trainable, open_model
from ..models.settings import ModelConfig
from ..models.shape import ModelShape, empty_view
from ._findings import Finding, error

SAMPLED = 512
"""Rows that are encoded of each file: enough for the lengths, and done within a second."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One model of the pair."""

    role: Literal["source", "target"]
    opened: OpenedModel
    view: DecoderView
    """Of a model without memory for its weights."""
    dtype: torch.dtype
    """That the weights would be loaded in here."""

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""
        return self.opened.shape

    @property
    def entries(self) -> dict[str, int]:
        """Vocabulary of its tokenizer, without fillers of padded rows."""
        return self.opened.entries

    @property
    def path(self) -> str:
        """As it was given."""
        return self.opened.settings.path


@dataclass(frozen=True, eq=False)
class Pool:
    """Data that rows are drawn from."""

    part: str
    """`train` or `held_out`."""
    path: str
    """Where they come from."""
    examples: list[Example]
    total: int
    """Rows, those not encoded included."""
    wanted: int
    """Rows that a run takes."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows over the whole length of the data, encoded by the target's tokenizer."""

    pools: tuple[Pool, ...]
    """The training data, and the held-out data where it is another."""

    @property
    def examples(self) -> list[Example]:
        """Those of all data."""
        return [example for pool in self.pools for example in pool.examples]


@dataclass(frozen=True, eq=False)
class Pair:
    """What the checks look at."""

    experiment: Experiment
    device: torch.device
    source: Candidate
    target: Candidate
    encoder: TextEncoder
    """Turns texts into token ids as a run does, by the target's tokenizer."""
    sample: Sample | None
    """None when no data was given."""

    @property
    def both(self) -> tuple[Candidate, Candidate]:
        """Source and target."""
        return self.source, self.target


def open_candidate(
    role: Literal["source", "target"],
    settings: ModelConfig,
    device: torch.device,
    *,
    note: Callable[[str], None] | None = None,
) -> Candidate | Finding:
    """A model of the pair, or why it cannot be one; `note` is told when its file is converted.

    Raises:
        SemalignError: nothing is found there.
    """
    remedy = f"a decoder-only language model as the {role}: semalign models list shows some"
    try:
        opened = open_model(settings, note=note)
        if role == "target":
            check_trainable(opened)
    except SemalignError as failure:
        if not _is_there(settings):
            raise
        return error(role, str(failure), remedy)
    dtype = opened.dtype(device)
    known = settings.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})  # found once, as it is by trying
    candidate = replace(opened, settings=known)
    try:
        view = empty_view(opened.config)
        _ = candidate.shape  # which can fail in the same ways
    except SemalignError as failure:
        return error(role, f"{settings.path} is no decoder-only causal language model: {failure}", remedy)
    return Candidate(role, candidate, view, dtype)


def draw_sample(data: DataConfig, encoder: TextEncoder) -> Sample:
    """Rows at equal distances in the training data, and in the held-out data where it is another.

    Raises:
        SemalignError: no rows are there, or rows without a prompt or an answer.
    """
    of_train = data.train_rows + (data.held_out_rows if data.held_out is None else 0)
    pools = []
    for part, origin, wanted in (("train", data.train, of_train), ("held_out", data.held_out, data.held_out_rows)):
        if origin is not None:
            rows = load_rows(origin)
            drawn = range(0, len(rows), -(-len(rows) // SAMPLED))
            examples = [encode_row(index + 1, rows[index], encoder, origin) for index in drawn]
            pools.append(Pool(part, origin.path, examples, len(rows), wanted))
    return Sample(tuple(pools))


def _is_there(settings: ModelConfig) -> bool:
    """Whether a model that could not be opened exists at all."""
    path = Path(settings.path).expanduser()
    if path.exists():
        return path.suffix == ".gguf" or (path / "config.json").is_file()
    try:
        PreTrainedConfig.get_config_dict(settings.path, revision=settings.revision)
    except Exception:  # the hub client has no common base class of errors
        return False
    return True
