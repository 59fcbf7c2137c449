"""Settings and results of an evaluation, and their files."""

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator
from semalign_geometry.base import Contract, SemalignError, Settings

from ..benchmarks import BenchmarkProtocol, find_benchmark
from ..data.settings import DAY, TemplateOptions
from ..models.settings import ModelConfig
from ..sandbox import Level
from ..statistics import Estimate
from .files import EVALUATION, EXPERIMENT, RESULT, with_present_keys


def _known(name: str) -> str:
    return find_benchmark(name).name


Name = Annotated[str, AfterValidator(_known)]
"""Name of a benchmark, those of installed packages included."""


class EvaluationConfig(Settings):
    """Everything that the metrics of an evaluation depend on, except the machine."""

    model: ModelConfig
    """The evaluated model."""
    source: ModelConfig | None = None
    """A model with the same tokenizer, compared by KL and top-1 agreement on the gold answers."""
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] = ("mmlu", "gsm8k", "humaneval", "mbpp")
    """Benchmarks, in order."""
    data: str | None = None
    """Folder with `<benchmark>/test.jsonl.gz`, or other files of rows; None takes the rows from the hub."""
    limit: int | None = Field(None, ge=1)
    """Documents of each benchmark, drawn by `seed`; None for all."""
    seed: int = 0
    """Seed of the draw."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest response in tokens; None for each benchmark's own."""
    chat: bool | None = None
    """Whether prompts go through the chat template; None uses it where the tokenizer has one."""
    chat_template: TemplateOptions = {}
    """Options that the chat template reads, such as `enable_thinking: false`."""
    date: datetime.date = DAY
    """Date for chat templates that read the clock."""
    gold: bool = True
    """Whether the NLL of the gold answers is measured."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Library that runs the model."""
    device: str = "auto"
    """Device of the models: `cpu`, `cuda`, `mps`, …; `auto` takes the first accelerator, else the CPU."""
    batch_size: int | None = Field(None, ge=1)
    """Documents that run together; None chooses by the free memory."""
    allow_weak_sandbox: bool = False
    """Whether programs may run where the machine offers resource limits only."""


class ItemRecord(Settings):
    """One document: a line of `items-<benchmark>.jsonl`."""

    index: int
    """Its place in the benchmark's split, from 0."""
    prompt: str
    """Prompt of the model."""
    output: str
    """Text of the model, or the log-likelihoods of the choices."""
    extracted: str | None
    """Answer or program extracted from it."""
    correct: bool
    """Whether it is right."""
    other: dict[str, bool]
    """Further metrics by name."""
    reason: str | None = None
    """Reason why a program failed or passed, as a keyword."""
    detail: str = ""
    """The same in a sentence."""
    seconds: float
    """Wall time of the model on this document: for log-likelihoods its share of the batch, for a
    generated answer the time since the previous one ended."""
    batch: int
    """Requests in its batch: greedy results repeat exactly only with the same batch and dtype."""
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
        """NLL of the gold answer per byte; None when it was not measured or is empty."""
        return self.gold_bits / self.gold_bytes if self.gold_bits is not None and self.gold_bytes else None


class BenchmarkResult(Settings):
    """Metrics of one benchmark; every interval is 95%."""

    protocol: BenchmarkProtocol
    """Prompt, stop rule and extraction."""
    documents: int
    """Documents that the benchmark has."""
    documents_sha256: str
    """Hash of the drawn documents."""
    headline: Estimate
    """Share of correct documents."""
    other: dict[str, Estimate]
    """Further metrics."""
    bits_per_byte: Estimate | None
    """NLL of the gold answers: total bits per total bytes."""
    kl: Estimate | None
    """KL to the source, nats per token of the gold answers."""
    agreement: Estimate | None
    """Top-1 agreement with the source on tokens of the gold answers."""
    reasons: dict[str, int]
    """Number of programs by the reason of their end."""
    truncated: int
    """Prompts cut on the left because they exceed the model's context."""
    truncated_to_compare: int = 0
    """Prompts cut on the left for the KL, where both models need the same prompt."""
    seconds: float
    """Wall time of the model over all documents, earlier runs included."""


class EvaluationResult(Contract):
    """Benchmarks of one model."""

    config: EvaluationConfig
    """Its settings."""
    model_sha256: str
    """Hash of the weights, configuration and tokenizer; `hub:<id>@<commit>` for a model of the hub."""
    source_sha256: str | None
    """Hash of the source."""
    chat: bool
    """Whether prompts went through the chat template."""
    dtype: str
    """dtype of the model's computation."""
    sandbox: Level | None
    """Confinement of the programs; None when none ran."""
    packages: dict[str, str]
    """Versions of packages."""
    benchmarks: dict[Name, BenchmarkResult]
    """Results by benchmark."""

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        return with_present_keys(data)


class Evaluated(NamedTuple):
    """An evaluation folder in memory."""

    folder: Path
    result: EvaluationResult
    items: dict[Name, list[ItemRecord]]


def evaluation_file(folder: Path) -> Path:
    """Return the file of an evaluation; earlier versions wrote `result.json`."""
    files = [folder / name for name in (EVALUATION, RESULT)]
    return next((file for file in files if file.is_file()), files[0])


def read_evaluation(folder: Path) -> Evaluated:
    """Read the folder that `evaluate` wrote.

    Raises:
        SemalignError: the folder holds no evaluation, or a damaged one.
    """
    check_no_run(folder, remedy="give the folder of its evaluation")
    file = evaluation_file(folder)
    if not file.is_file():
        raise SemalignError(f"{folder} holds no {EVALUATION}: give the folder of a finished evaluation")
    result = EvaluationResult.read(file)
    return Evaluated(folder, result, {name: _items(folder, name) for name in result.benchmarks})


def check_no_run(folder: Path, *, remedy: str) -> None:
    """Refuse the folder of a run."""
    if (folder / EXPERIMENT).is_file():
        raise SemalignError(f"{folder} holds a run, not an evaluation: {remedy}")


def _items(folder: Path, name: Name) -> list[ItemRecord]:
    file = folder / f"items-{name}.jsonl"
    remedy = f"evaluate {name} again into {folder}"
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise SemalignError(f"{file} cannot be read ({error.strerror}): {remedy}") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            items.append(ItemRecord.model_validate_json(line))
        except ValueError as error:  # pydantic's, and ours of a nested section
            raise SemalignError(f"{file}, line {number} is damaged: {remedy}") from error
    return items
