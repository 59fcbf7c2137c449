"""Settings and results of a comparison of methods."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from semalign_geometry.base import Contract, Settings

from ..experiment import Experiment, upgraded
from ..statistics import Aggregate, Estimate, GapRecovered, PairedComparison
from .evaluation import Name
from .files import with_present_keys
from .metrics import arrow, number_format


class Benchmarks(Settings):
    """Benchmarks of every trained target."""

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Their names."""
    data: str | None = None
    """Folder with `<benchmark>/test.jsonl.gz`, or other files of rows; None takes the rows from the hub."""
    limit: int | None = Field(None, ge=1)
    """Documents of each; None for all."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest response in tokens; None for each benchmark's own."""
    chat: bool | None = None
    """Whether prompts go through the chat template; None where the tokenizer has one."""
    allow_weak_sandbox: bool = False
    """Whether programs may run where the machine offers resource limits only."""


class ComparisonConfig(Settings):
    """Methods on one experiment."""

    experiment: Experiment
    """Settings that all methods share."""
    methods: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    """Overrides of each method, by its name (`METHOD` or `METHOD.VARIANT`), in the order of the table."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of the order of the examples and of random parts of a method; each once."""
    against: str | None = None
    """Method that every other one is tested against; None for the best baseline of each metric."""
    benchmarks: Benchmarks | None = None
    """Benchmarks; None for the held-out rows alone."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, tree: Any) -> Any:
        """Read files that still name an equal budget, or older settings of the experiment."""
        if not isinstance(tree, dict) or not isinstance(tree.get("experiment"), dict):
            return tree
        kept = {key: value for key, value in tree.items() if key != "equal"}
        return kept | {"experiment": upgraded(tree["experiment"])}

    @model_validator(mode="after")
    def _against_is_compared(self) -> "ComparisonConfig":
        if self.against is not None and self.against not in self.methods:
            raise ValueError(f"the others are tested against {self.against}: name it among the methods too")
        return self

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice: leave one out")
        return seeds


class ComparedMetric(Settings):
    """A metric that methods are compared by."""

    lower_is_better: bool
    """Its direction."""
    percent: bool
    """Whether it is a share."""
    items: int
    """Rows, or documents of a benchmark."""
    source: Estimate
    """The source's value."""
    before: Estimate
    """The target's value before training."""
    rival: str | None
    """Method that the others are tested against: the one that the settings name, else the best baseline, if any."""

    @property
    def arrow(self) -> str:
        """Arrow of the better direction."""
        return arrow(lower_is_better=self.lower_is_better)

    def form(self, sign: str = "") -> str:
        """Return the format of its numbers."""
        return number_format(percent=self.percent, sign=sign)


class MethodMetric(Settings):
    """One metric of one method."""

    estimate: Estimate
    """Mean over the seeds, with the interval over the items."""
    over_seeds: Aggregate
    """Mean and interval over the seeds."""
    gap: GapRecovered
    """Share of the gap between target and source that was closed."""
    versus_rival: PairedComparison | None
    """This method − the rival, item by item; None for the rival itself, or without one."""


class MethodResult(Settings):
    """Metrics and costs of one method; costs are means over its runs, except the memory."""

    metrics: dict[str, MethodMetric]
    """By the name of the metric; empty when a run is missing."""
    missing: tuple[str, ...] = ()
    """Reasons why runs are missing."""
    same_as: str | None = None
    """Another method with the same settings, whose runs this one shares."""
    trained_parameters: int = 0
    """Trained parameters of all stages together."""
    steps: int = 0
    """Optimiser steps."""
    supervised_tokens: int = 0
    """Supervised tokens that the trainable part saw."""
    train_rows: int = 0
    """Training rows without those whose written answers were not usable; 0 in results of earlier versions."""
    training_seconds: float = 0.0
    """Wall time of the training."""
    source_seconds: float = 0.0
    """Wall time of the supervision, where the method needs it; computed once for all methods."""
    peak_bytes: int = 0
    """Largest peak memory of its runs; of the process, or of a CUDA device."""
    training_peak_bytes: int | None = None
    """The same during training; None where a run did not measure it."""
    stored_bytes: int = 0
    """Supervision on disk."""


class Comparison(Contract):
    """Methods side by side."""

    config: ComparisonConfig
    """Its settings."""
    metrics: dict[str, ComparedMetric]
    """The metrics, by name."""
    methods: dict[str, MethodResult]
    """The methods, by name."""

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        return with_present_keys(data)

    def train_rows(self) -> str:
        """Return the number of training rows of the methods as text, as a range where they differ."""
        configured = self.config.experiment.data.train_rows
        rows = sorted({found.train_rows or configured for found in self.methods.values() if found.metrics})
        return f"{rows[0]:,}" + (f" to {rows[-1]:,}" if len(rows) > 1 else "")
