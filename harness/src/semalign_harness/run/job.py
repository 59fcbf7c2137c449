"""One run, as each of its steps needs it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from semalign_align import Ranks

from ..data.encoding import Role
from ..experiment import Experiment
from ..models.loading import LoadedModel
from ..util.console import Console
from .inputs import Inputs, load


@dataclass(frozen=True, eq=False)
class Job:
    """One run: its experiment, its inputs, and the places that it writes to."""

    experiment: Experiment
    folder: Path
    """The run folder."""
    console: Console
    """Display of progress; quiet on all processes but the first."""
    device: torch.device
    """Device of the models."""
    ranks: Ranks
    """Processes that share the run."""
    inputs: Inputs
    """Rows and opened models, with settled dtypes."""

    @property
    def generates(self) -> bool:
        """Whether both models generate answers to measure."""
        return self.experiment.measure.answer_rows > 0

    def load(self, role: Role, *, label: str | None = None, generates: bool = False) -> LoadedModel:
        """Load the weights of a model; `generates` as in `load_model`."""
        opened = self.inputs.source if role == "source" else self.inputs.target
        return load(self.console, label or role, opened, self.device, generates=generates)
