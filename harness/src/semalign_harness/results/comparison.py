"""What is compared, and what came of it."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from semalign_geometry.base import Contract, Settings

from ..experiment import Experiment
from ..statistics import Aggregate, Estimate, GapRecovered, PairedComparison
from .evaluation import Name


class Benchmarks(Settings):
    """Benchmarks that every trained target is put to."""

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Their names."""
    data: str | None = None
    """Folder with `<benchmark>/test.jsonl.gz`, or other files of rows; None takes the rows from the hub."""
    limit: int | None = Field(None, ge=1)
    """Documents of each; None for all."""
    chat: bool | None = None
    """Whether prompts go through the chat template; None where the tokenizer has one."""
    allow_weak_sandbox: bool = False
    """Whether programs may run where the machine offers resource limits only."""


class ComparisonConfig(Contract):
    """Methods on one experiment."""

    experiment: Experiment
    """What all methods have in common."""
    methods: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    """Overrides of each method's own, by its name (`METHOD`, or `METHOD.VARIANT`), in the order of the table."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of the order of the examples, and of what a method draws; each once."""
    against: str | None = None
    """The method that every other one is tested against; None for the best baseline of each metric."""
    benchmarks: Benchmarks | None = None
    """Benchmarks; None for the held-out rows alone."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, tree: Any) -> Any:
        """Read files that still name an equal budget."""
        return {key: value for key, value in tree.items() if key != "equal"} if isinstance(tree, dict) else tree

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


class Metric(Settings):
    """A figure that methods are compared in."""

    lower_is_better: bool
    """Its direction."""
    percent: bool
    """Whether it is a share."""
    items: int
    """Rows, or documents of a benchmark."""
    source: Estimate
    """The source's."""
    before: Estimate
    """The target's before any training."""
    rival: str | None
    """The method that the others are tested against in it: the one that was asked for, else the best baseline; None
    where there is none."""


class Figure(Settings):
    """One method in one metric."""

    estimate: Estimate
    """Mean over the seeds, with the interval over the items."""
    over_seeds: Aggregate
    """Mean and interval over the seeds."""
    gap: GapRecovered
    """Share of the gap between target and source that was closed."""
    versus_rival: PairedComparison | None
    """This method − the rival, item by item; None for the rival itself, or without one."""


class MethodFigures(Settings):
    """One method: what it gave and what it took; costs are means over its runs, save the memory."""

    figures: dict[str, Figure]
    """By the name of the metric; empty when a run is missing."""
    missing: tuple[str, ...] = ()
    """Why a run gave nothing."""
    same_as: str | None = None
    """Another method with the very same settings, whose runs these are."""
    trained_parameters: int = 0
    """Numbers that trained, of all stages together."""
    steps: int = 0
    """Optimiser steps."""
    supervised_tokens: int = 0
    """Supervised tokens that the trainable part saw."""
    train_rows: int = 0
    """Training rows, without those whose written answers could not be used; 0 where this was not kept."""
    training_seconds: float = 0.0
    """Wall time of the training."""
    source_seconds: float = 0.0
    """Wall time of what the source left behind, where the method needs it: as it was made, once for all methods."""
    peak_bytes: int = 0
    """Largest peak memory of its runs; of the process, or of a CUDA device."""
    training_peak_bytes: int | None = None
    """The same while they trained; None where a run does not know it."""
    stored_bytes: int = 0
    """Supervision on disk."""


class Comparison(Contract):
    """Methods side by side."""

    config: ComparisonConfig
    """What was asked for."""
    metrics: dict[str, Metric]
    """The figures, by name."""
    methods: dict[str, MethodFigures]
    """The methods, by name."""

    def train_rows(self) -> str:
        """Training rows of the methods, as words: those that were trained on, where that was kept."""
        asked_for = self.config.experiment.data.train_rows
        rows = sorted({found.train_rows or asked_for for found in self.methods.values() if found.figures})
        return f"{rows[0]:,}" + (f" to {rows[-1]:,}" if len(rows) > 1 else "")
