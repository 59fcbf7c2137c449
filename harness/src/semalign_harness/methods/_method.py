"""Contract between a run and its method: needs beforehand, a context in, a report out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from semalign_geometry.base import Contract, SemalignError, Settings
from semalign_train import JointReport, LoraLayer, StageRecord, StepRecord, TrainSettings, TransferReport

from ..models.shape import ModelShape

if TYPE_CHECKING:
    from semalign_align import Supervision, SupervisionSource
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.encoding import Example

T = TypeVar("T")
LayerUse = Literal["none", "paired", "transported"]
"""Use of the source's layers: none; only which of them belongs to each target layer; or also their contributions to
the stream, transported to the target's width."""


@runtime_checkable
class Progress(Protocol):
    """Display of a method's progress, besides that of its steps."""

    def note(self, text: str) -> None:
        """Show a line."""
        ...

    def progress(self, label: str, items: Sequence[T]) -> Iterator[T]:
        """Pass the items on under a bar."""
        ...


@dataclass(frozen=True, eq=False)
class MethodContext:
    """Everything that a method may use; it changes the target alone."""

    target: "PreTrainedModel"
    """The model that trains, changed in place."""
    tokenizer: "PreTrainedTokenizerBase"
    """The target's tokenizer."""
    source_tokenizer: "PreTrainedTokenizerBase"
    """The source's; where it splits text as the target's does, rows have one side for both models."""
    supervision: "SupervisionSource"
    """The source's supervision of the training rows."""
    held_out: "Supervision"
    """The source's supervision of the held-out rows."""
    rows: "Sequence[Example]"
    """The training rows, as `supervision` holds them."""
    attribution_rows: "Sequence[Example]"
    """The training rows that source and target are compared on."""
    batch_size: int
    """Rows in a forward run without gradients."""
    train: TrainSettings
    """Settings that all methods share; the method's own are its fields."""
    folder: Path
    """The run folder, for files of the method."""
    load_source: "Callable[[], PreTrainedModel]"
    """Loads the source's weights; the caller lets go of them."""
    progress: Progress
    """Display of progress."""
    callback: Callable[[StepRecord | StageRecord], None]
    """Records a step or a stage; the first process shows and keeps it, the others ignore it."""

    @property
    def checkpoints(self) -> Path:
        """Folder for the states that an interrupted training resumes from."""
        return self.folder / "checkpoints"


class MethodReport(Contract):
    """Work of a method."""

    method: str
    """Its kind."""
    trained_parameters: int
    """Numbers that trained, of all stages together."""
    steps: int
    """Optimiser steps."""
    supervised_tokens: int
    """Supervised tokens that the trainable part saw, repeats included."""
    seconds: float
    """Wall time of the training."""
    transfer: TransferReport | None = None
    """The stages of frontier training; None for methods without stages."""

    @classmethod
    def of(cls, kind: str, found: JointReport) -> "MethodReport":
        """Return the report of a trainer as that of a method."""
        shared = found.model_dump(include={"trained_parameters", "steps", "supervised_tokens", "seconds"})
        return cls(method=kind, **shared)


class Work(NamedTuple):
    """Amount of a training."""

    steps: int
    """Optimiser steps."""
    examples: int
    """Examples in all steps, repeats included."""


class MethodNeeds(NamedTuple):
    """Needs of a method beside the models' weights and activations; upper bounds."""

    trained: int
    """Numbers that train together: each is kept in float32 with its moments."""
    gradients: int = 2
    """Gradients in float32 that are kept of each trained number: one of a micro-batch, and their sum."""
    beside_source: int = 0
    """Numbers in float32 that are computed from the source's weights, with both models in memory."""
    scratch: int = 0
    """Numbers in the target's dtype on disk until the run ends."""


class Method(Settings):
    """A way to move knowledge from the source into the target; its settings are its fields.

    A method derives from this class and overrides `run` and whatever of its needs is not the default.
    """

    stored: ClassVar[bool] = False
    """Whether it trains on the source's supervision, whose cost then counts as the method's."""
    layer_use: ClassVar[LayerUse] = "none"
    """Use of the source's layers."""
    keeps_source: ClassVar[bool] = False
    """Whether the source stays in memory while the target trains."""
    one_tokenizer: ClassVar[bool] = True
    """Whether it presumes that one tokenisation serves both models: that every answer token has supervision, and that
    the source reads the target's tokens. A method that reads spans, or no supervision at all, says False."""
    two_tokenizers: ClassVar[bool] = False
    """Whether it needs tokenizers that differ."""

    kind: str

    @property
    def default_rate(self) -> float:
        """Peak learning rate where `train.learning_rate` is null."""
        return 1e-4

    @property
    def needs_top_entries(self) -> bool:
        """Whether the source's output must be stored by its top entries."""
        return False

    def check(self, source: ModelShape, target: ModelShape, train: TrainSettings, *, reference_width: int) -> None:
        """Check that the settings fit a pair of models, before any weights are read.

        Args:
            source: shape of the larger model.
            target: shape of the model that trains.
            train: settings that all methods share.
            reference_width: width of the source's contributions after the transport.

        Raises:
            SemalignError: they do not fit.
        """

    def work(self, train: TrainSettings, depth: int, rows: int) -> Work:
        """Return the amount of training: `train.steps` for each layer of the target, else `train.passes` over the rows.

        Args:
            train: settings that all methods share.
            depth: layers of the target.
            rows: training rows.
        """
        steps = train.total_steps(rows) if train.steps is None else train.steps * depth
        return Work(steps, steps * train.batch_size)

    def needs(self, source: ModelShape, target: ModelShape, *, rows: int, tokens: int) -> MethodNeeds:
        """Return the needs of a training, of which the default is that of the whole target.

        Args:
            source: shape of the larger model.
            target: shape of the model that trains.
            rows: training rows.
            tokens: tokens of all training rows.
        """
        return MethodNeeds(trained=target.parameters)

    def foreign_code(self) -> dict[str, str]:
        """Return hashes of the code of components among its settings that are not built in."""
        return {}

    def foreign_packages(self) -> dict[str, str]:
        """Return versions of the installed packages of those components."""
        return {}

    def run(self, context: MethodContext) -> MethodReport:
        """Train `context.target` in place.

        Raises:
            SemalignError: the models, the rows or the settings do not fit the method.
        """
        raise NotImplementedError


def adapter_parameters(adapters: LoraLayer, shape: ModelShape) -> int:
    """Return the numbers of the adapters in one layer."""
    modules = adapters.modules or shape.linear_features  # none named: all of them
    return adapters.rank * sum(shape.linear_features.get(name, 0) for name in modules)


def check_adapters(adapters: LoraLayer, target: ModelShape) -> None:
    """Check that the target has the modules that adapters name.

    Raises:
        SemalignError: it does not.
    """
    if unmatched := sorted({*adapters.modules} - {*target.linear_features}):
        raise SemalignError(
            f"the target's layers have no linear module named {', '.join(unmatched)}: method.trainable.modules can "
            f"name {', '.join(sorted(target.linear_features))}"
        )
