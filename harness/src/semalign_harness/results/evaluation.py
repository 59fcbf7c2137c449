"""What is evaluated, and what came of it."""

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from semalign_geometry.base import Contract, Settings

from ..benchmarks import BenchmarkProtocol, find_benchmark
from ..data.encoding import DAY, TemplateOptions
from ..models.settings import ModelConfig
from ..sandbox import Level
from ..statistics import Estimate


def _known(name: str) -> str:
    return find_benchmark(name).name


Name = Annotated[str, AfterValidator(_known)]
"""A benchmark, one of an installed package included."""


class EvaluationConfig(Contract):
    """Everything that the figures of an evaluation depend on, the machine aside."""

    model: ModelConfig
    """The model that is evaluated."""
    source: ModelConfig | None = None
    """A model of the same tokenizer to compare distributions with: KL and top-1 agreement on the gold answers."""
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] = ("mmlu", "gsm8k", "humaneval", "mbpp")
    """Benchmarks, in order."""
    data: str | None = None
    """Folder with `<benchmark>/test.jsonl.gz`, or other files of rows; None takes the rows from the hub."""
    limit: int | None = Field(None, ge=1)
    """Documents of each benchmark, drawn by `seed`; None for all."""
    seed: int = 0
    """Seed of the draw."""
    chat: bool | None = None
    """Whether prompts go through the chat template; None uses it where the tokenizer has one."""
    chat_template: TemplateOptions = {}
    """Options that the chat template reads, such as `enable_thinking: false`."""
    date: datetime.date = DAY
    """The day that a chat template is told which reads the clock."""
    gold: bool = True
    """Whether the NLL of the gold answers is measured."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the model."""
    device: str = "auto"
    """Device of the models: `cpu`, `cuda`, `mps`, …; `auto` takes the first accelerator, else the CPU."""
    batch_size: int | None = Field(None, ge=1)
    """Documents that run together; None chooses by the memory that is free."""
    allow_weak_sandbox: bool = False
    """Whether programs may run where the machine offers resource limits only."""


class ItemRecord(Settings):
    """One document: a line of `items-<benchmark>.jsonl`."""

    index: int
    """Its place in the benchmark's split, from 0."""
    prompt: str
    """What the model was given."""
    output: str
    """What the model wrote, or the log-likelihoods of the choices."""
    extracted: str | None
    """The answer or program that was read out of it."""
    correct: bool
    """Whether it is right."""
    other: dict[str, bool]
    """Further metrics by name."""
    reason: str | None = None
    """Why a program failed or passed."""
    detail: str = ""
    """The same in a sentence."""
    seconds: float
    """Wall time of the model on this document: for log-likelihoods its share of the batch, for a generated answer the
    time since the one before it ended."""
    batch: int
    """Requests that ran together with it: greedy results repeat exactly only with the same batch and dtype."""
    gold_bits: float | None = None
    """NLL of the gold answer, in bits."""
    gold_bytes: int | None = None
    """Length of the gold answer in UTF-8."""
    kl: float | None = None
    """Mean KL(p_S ‖ p_T) to the source over the tokens of the gold answer, in nats."""
    agreement: float | None = None
    """Share of these tokens where the likeliest entry is the source's."""
    tokens: int | None = None
    """Tokens of the gold answer."""

    @property
    def bits_per_byte(self) -> float | None:
        """NLL of the gold answer by its length; None when it was not measured, or is empty."""
        return self.gold_bits / self.gold_bytes if self.gold_bits is not None and self.gold_bytes else None


class BenchmarkResult(Settings):
    """Figures of one benchmark; every interval is 95%."""

    protocol: BenchmarkProtocol
    """Prompt, stop rule and extraction."""
    documents: int
    """Documents that the benchmark has."""
    documents_sha256: str
    """Hash of the documents that were drawn."""
    figure: Estimate
    """The headline: the share of correct documents."""
    other: dict[str, Estimate]
    """Further metrics."""
    bits_per_byte: Estimate | None
    """NLL of the gold answers: all bits by all bytes."""
    kl: Estimate | None
    """KL to the source, nats per token of the gold answers."""
    agreement: Estimate | None
    """Top-1 agreement with the source on tokens of the gold answers."""
    reasons: dict[str, int]
    """How often programs ended in each way."""
    truncated: int
    """Prompts that were cut on the left because they are longer than the model reads."""
    truncated_to_compare: int = 0
    """Prompts that were cut on the left for the KL, where both models read the same."""
    seconds: float
    """Wall time of the model over all documents, earlier runs included."""


class EvaluationResult(Contract):
    """Benchmarks of one model."""

    config: EvaluationConfig
    """What was asked for."""
    model_sha256: str
    """Hash of the weights, configuration and tokenizer; `hub:<id>@<commit>` for a model of the hub."""
    source_sha256: str | None
    """The same of the source."""
    chat: bool
    """Whether prompts went through the chat template."""
    dtype: str
    """dtype that the model computed in."""
    sandbox: Level | None
    """What confined the programs; None when none ran."""
    packages: dict[str, str]
    """Versions."""
    benchmarks: dict[Name, BenchmarkResult]
    """Results by benchmark."""
