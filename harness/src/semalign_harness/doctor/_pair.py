"""Both models as far as they are known without their weights, and a sample of the rows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from semalign_attribution import DecoderView
from semalign_geometry import SemalignError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..data import Example, encode_row, load_rows
from ..estimate import ModelShape
from ..experiment import DataConfig, Experiment, ModelConfig
from ..models import OpenedModel, open_model
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
class Sample:
    """Rows over the whole length of the data, encoded by the target's tokenizer."""

    examples: list[Example]
    total: int
    """Rows of the training data, those not encoded included."""


@dataclass(frozen=True, eq=False)
class Pair:
    """What the checks look at."""

    experiment: Experiment
    device: torch.device
    source: Candidate
    target: Candidate
    sample: Sample | None
    """None when no data was given."""

    @property
    def both(self) -> tuple[Candidate, Candidate]:
        """Source and target."""
        return self.source, self.target


def open_candidate(
    role: Literal["source", "target"], settings: ModelConfig, device: torch.device
) -> Candidate | Finding:
    """A model of the pair, or why it cannot be one.

    Raises:
        SemalignError: nothing is found there.
    """
    remedy = f"{role}.path=…: a decoder-only language model, whose class ends in ForCausalLM"
    try:
        opened = open_model(settings)
    except SemalignError as failure:
        if not _is_there(settings):
            raise
        return error(role, str(failure), remedy)
    dtype = opened.dtype(device)
    known = settings.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})  # found once, as it is by trying
    candidate = replace(opened, settings=known)
    try:
        with torch.device("meta"):
            view = DecoderView(AutoModelForCausalLM.from_config(opened.config))
        _ = candidate.shape  # which can fail in the same ways
    except Exception as failure:  # transformers has no common base class of errors
        reason = " ".join(str(failure).split())[:200]
        return error(role, f"{settings.path} is no decoder-only causal language model: {reason}", remedy)
    return Candidate(role, candidate, view, dtype)


def draw_sample(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Rows at equal distances in the training data, and in the held-out data where it is another.

    Raises:
        SemalignError: no rows are there, or rows without a prompt or an answer.
    """
    examples, totals = [], []
    for origin in (data.train, data.held_out):
        if origin is not None:
            rows = load_rows(origin)
            totals.append(len(rows))
            examples += [encode_row(row, tokenizer, origin) for row in rows[:: -(-len(rows) // SAMPLED)]]
    return Sample(examples, totals[0])


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
