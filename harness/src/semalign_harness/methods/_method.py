"""What a method of transfer is given, what it gives back, and what it looks like."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from semalign_geometry import Contract
from semalign_train import TransferReport

if TYPE_CHECKING:
    from ..experiment import Experiment
    from ..models.loading import LoadedModel
    from ..run.inputs import Inputs
    from ..run.plan import Plan
    from ..run.source_phase import SourceStores
    from ..run.tracking import Metrics
    from ..util.console import Console


LayerUse = Literal["none", "paired", "transported"]
"""What a method takes of the source's layers: nothing; which of them belongs to each target layer; or also what they
add to the stream, transported to the target's width."""


@dataclass(frozen=True, eq=False)
class MethodContext:
    """Everything that a method may use; of it, it changes the target alone."""

    experiment: "Experiment"
    """All settings; the method's own are the method itself."""
    inputs: "Inputs"
    """Rows, shared vocabulary, and both models before their weights are read."""
    target: "LoadedModel"
    """The model that trains, changed in place."""
    stores: "SourceStores"
    """What the source left behind for the training and for the held-out rows."""
    plan: "Plan | None"
    """The work of frontier training on these rows; None for other methods."""
    folder: Path
    """The run folder, for what an interrupted run needs."""
    console: "Console"
    """Where progress is shown."""
    device: torch.device
    """Device of the models."""
    metrics: "Metrics"
    """What the first process tells of every step."""

    def load_source(self) -> "LoadedModel":
        """The source's weights, anew; whoever calls this lets go of them."""
        from ..run.inputs import load

        return load(self.console, "source", self.inputs.source, self.device)


class MethodReport(Contract):
    """What a method did."""

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


@runtime_checkable
class Method(Protocol):
    """A way to move knowledge from the source into the target; its settings are its fields (a pydantic model).

    A `LayerUse` named `layer_use` may stand beside `stored`; see `layer_use_of` for methods without it.
    """

    @property
    def kind(self) -> str:
        """What an experiment calls it."""
        ...

    @property
    def stored(self) -> bool:
        """Whether it trains on what the source left behind, so that this belongs to its cost."""
        ...

    def run(self, context: MethodContext) -> MethodReport:
        """Train `context.target` in place.

        Raises:
            SemalignError: the models, the rows or the settings do not fit the method.
        """
        ...


def layer_use_of(method: Method) -> LayerUse:
    """What a method takes of the source's layers; one without `layer_use` takes all of it where it is `stored`, else
    nothing."""
    use: LayerUse = getattr(method, "layer_use", "transported" if method.stored else "none")
    return use
