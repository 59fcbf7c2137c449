"""Everything that a run depends on besides its experiment, and checks that it stays as it was."""

import dataclasses
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from semalign_align import Ranks
from semalign_geometry.base import SemalignError, sha256_of

from ..data.row_files import files_at
from ..experiment import Experiment
from ..methods import KNOWN_METHODS
from ..results.files import ENVIRONMENT, EXPERIMENT
from ..results.run import Environment
from ..util.console import Console
from .checks import check_dtype, raise_first
from .inputs import Inputs
from .phase_cache import foreign_code, foreign_packages, phase_key

_CHANGES = {
    "packages": ("the package {name}", "pip install {name}=={then}"),
    "code": ("the code of the {name}", ""),
    "python": ("Python", ""),
    "device": ("the device", "device={then}"),
    "dtypes": ("the dtype of the {name}", "{name}.dtype={then}"),
    "threads": ("the number of CPU threads", "OMP_NUM_THREADS={then}"),
    "processes": ("the number of processes", ""),
    "data_sha256": ("the file {name}", ""),
    "models": ("the {name}", ""),
}
"""Label of a changed field, and the setting that undoes the change."""


PACKAGES = (
    "semalign-harness",
    "semalign-train",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "pydantic",
)


def code_of(experiment: Experiment) -> dict[str, str]:
    """Return hashes of the code of the components that are not built in, by their sort and name."""
    return {
        **foreign_code(experiment),
        **KNOWN_METHODS.code(type(experiment.method)),
        **experiment.method.foreign_code(),
    }


def check_code(folder: Path, experiment: Experiment) -> None:
    """Refuse a folder with a run of an experiment, finished or not, whose components had another code then.

    Raises:
        SemalignError: it holds one.
    """
    if not (folder / EXPERIMENT).is_file() or not (folder / ENVIRONMENT).is_file():
        return
    then, now = Environment.read(folder / ENVIRONMENT).code, code_of(experiment)
    for name in then | now:
        if then.get(name) != now.get(name):
            raise SemalignError(
                f"the code of the {name} changed since the run in {folder} began: restore it, or choose another folder "
                "with --out"
            )


def settled(inputs: Inputs, device: torch.device, began: Environment | None) -> Inputs:
    """Return the inputs in the dtypes that the run began with, else in those that the first process finds for them.

    Raises:
        SemalignError: the target would train in float16.
    """

    def dtypes() -> list[str]:
        if began is not None and began.device == str(device):
            return list(began.dtypes)
        return _dtypes(inputs, device)

    found = _in_dtypes(inputs, Ranks.current().broadcast_from_first(dtypes))
    raise_first([check_dtype(found.source, found.target)])
    return found


def environment_of(experiment: Experiment, inputs: Inputs, device: torch.device) -> Environment:
    """Return everything that a run depends on besides its experiment."""
    rows = [experiment.data.train, experiment.data.held_out]
    files = [file for row in rows if row is not None for file in files_at(Path(row.path).expanduser())]
    return Environment(
        packages={
            **{name: version(name) for name in PACKAGES},
            **foreign_packages(experiment),
            **KNOWN_METHODS.packages(experiment.method.kind),
            **experiment.method.foreign_packages(),
        },
        code=code_of(experiment),
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(device),
        dtypes=_dtypes(inputs, device),
        threads=torch.get_num_threads(),
        processes=Ranks.current().size,
        data_sha256={str(file): sha256_of(file) for file in files},
        models=[inputs.source_id, inputs.target_id],
        supervision_key=phase_key(experiment, inputs, device),
        date=None if inputs.told_date is None else str(inputs.told_date),
    )


def _dtypes(inputs: Inputs, device: torch.device) -> list[str]:
    return [str(each.dtype(device)).removeprefix("torch.") for each in (inputs.source, inputs.target)]


def _in_dtypes(inputs: Inputs, dtypes: Sequence[str]) -> Inputs:
    """Return the inputs with fixed dtypes: the choice of `auto` depends on how busy a processor is."""
    source, target = (
        dataclasses.replace(opened, settings=opened.settings.model_copy(update={"dtype": dtype}))
        for opened, dtype in zip((inputs.source, inputs.target), dtypes, strict=True)
    )
    return dataclasses.replace(inputs, source=source, target=target)


def check_unchanged(now: Environment, began: Environment, folder: Path, console: Console) -> None:
    """Refuse to resume a run that would get other supervision; note other changes, which may change the last bits.

    Raises:
        SemalignError: the rows, the models, the device, the dtypes, the threads or the packages have changed.
    """
    changes = _changes(began, now)
    if now.supervision_key != began.supervision_key:
        raise SemalignError(
            f"{', and '.join(changes) or 'the rows changed'}, since the run in {folder} began: restore what it was, or "
            "choose another folder with --out"
        )
    if changes:
        console.note(f"{', and '.join(changes)}, since the run began: the last bits of the weights may differ")


def _changes(began: Environment, now: Environment) -> list[str]:
    """Return each change from one environment to another, with both values and the setting that undoes it."""
    found = []
    for field in Environment.model_fields:
        if field == "supervision_key":
            continue
        label, remedy = _CHANGES.get(field, (field, ""))
        before, after = _entries(getattr(began, field)), _entries(getattr(now, field))
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                then, here = (str(each.get(name, "absent"))[:60] for each in (before, after))
                restored = f" ({remedy.format(name=name, then=then)} restores it)" if remedy else ""
                found.append(f"{label.format(name=name)} changed from {then} to {here}{restored}")
    return found


def _entries(value: Any) -> dict[str, Any]:
    """Return the parts of a field: of a dictionary, of a pair of source and target, or the whole."""
    if isinstance(value, dict):
        return value
    return dict(zip(("source", "target"), value, strict=True)) if isinstance(value, list) else {"": value}
