"""The checks of a run without the run: nothing is written, fetched, built or converted, and no weights are loaded."""

from pathlib import Path

import torch
from semalign_geometry.base import SemalignError

from ..data.rows import comes_from_hub, load_rows
from ..experiment import Experiment
from ..models.opening import awaited, open_model
from ..results.files import ENVIRONMENT, EXPERIMENT, RESULT
from ..results.run import Environment
from ..util.console import Console
from ..util.resources import pick_device
from .checks import check_settings, raise_first
from .environment import check_code, check_unchanged, environment_of, settled
from .inputs import Inputs, read_inputs
from .run_folder import check_folder, is_claimed
from .written_answers import written_parts

_APART = {"name", "device", "train", "method", "scorer", "pairing", "transport", "supervision", "live", "batch_size"}
"""Settings that the models and the rows do not depend on."""


class DryRun:
    """Checks of one run or of several, which read shared models and rows only once."""

    def __init__(self) -> None:
        """Start without anything read."""
        self._read: dict[str, tuple[Inputs | None, list[str]]] = {}

    def check(self, experiment: Experiment, folder: Path) -> list[str]:
        """Check a run as `run_experiment` does before it loads weights; return the parts that it could not check.

        Raises:
            SemalignError: it would be refused.
        """
        check_folder(folder, experiment)
        if is_claimed(folder):
            raise SemalignError(f"another process runs in {folder}: wait for it, or choose another folder")
        check_code(folder, experiment)
        if (folder / RESULT).is_file():
            return []
        inputs, notes = self._inputs(experiment)
        try:
            device = pick_device(experiment.device)
        except SemalignError as error:
            return [*notes, f"the device: {error}"]
        if inputs is None:
            return notes
        apart = inputs.classes is not None
        raise_first(check_settings(experiment, inputs.source.shape, inputs.target.shape, apart=apart))
        self._check_start(experiment, inputs, folder, device)
        return notes

    def _inputs(self, experiment: Experiment) -> tuple[Inputs | None, list[str]]:
        """Return the inputs, where all of them are here, and the names of the others."""
        key = experiment.model_dump_json(exclude=_APART)
        if key not in self._read:
            self._read[key] = _read(experiment)
        return self._read[key]

    @staticmethod
    def _check_start(experiment: Experiment, inputs: Inputs, folder: Path, device: torch.device) -> None:
        began = Environment.read(folder / ENVIRONMENT) if (folder / EXPERIMENT).is_file() else None
        inputs = settled(inputs, device, began)
        if began is not None and not written_parts(experiment.data):
            check_unchanged(environment_of(experiment, inputs, device), began, folder, Console(quiet=True))


def _read(experiment: Experiment) -> tuple[Inputs | None, list[str]]:
    """Read the inputs as for a run where all of them are here; return the names of those that are not."""
    models = {"source": experiment.source, "target": experiment.target}
    data = experiment.data
    rows = {"training": data.train} | ({} if data.held_out is None else {"held-out": data.held_out})
    missing = {role: why for role, model in models.items() if (why := awaited(model)) is not None}
    away = [part for part, origin in rows.items() if comes_from_hub(origin)]
    if not missing and not away:
        return read_inputs(experiment, Console(quiet=True)), []
    for part, origin in rows.items():
        if part not in away:
            load_rows(origin)
    for role, model in models.items():
        if role not in missing:
            open_model(model)
    notes = [f"the {role} {models[role].path}, which {why}" for role, why in missing.items()]
    return None, [*notes, *(f"the {part} rows of {rows[part].path}, which come from the hub" for part in away)]
