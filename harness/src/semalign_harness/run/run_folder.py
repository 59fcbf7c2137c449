"""The run folder: its experiment, the files of an interrupted run, and one process at a time."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from semalign_geometry.base import SemalignError, replace_file
from semalign_train import StepRecord

from ..experiment import Experiment
from ..results.files import ENVIRONMENT, EXPERIMENT, METRICS, REPORT, RESULT

_LOCK = ".lock"


_BEING_WRITTEN = re.compile(r"\.(?:scratch-|model\.|\w+\.jsonl?\.)")
"""Names of files that a killed run was writing."""


def pick_folder(parent: Path, experiment: Experiment) -> Path:
    """Return `parent/NAME`, or the first of `parent/NAME-2`, … that is free or holds an unfinished run of it."""
    folder, number = parent / experiment.name, 1
    while folder.exists() and not _is_interrupted(folder, experiment):
        number += 1
        folder = parent / f"{experiment.name}-{number}"
    return folder


@contextmanager
def claimed(folder: Path, experiment: Experiment) -> Iterator[bool]:
    """Lock the folder for this process alone; yield whether it holds a run of the experiment.

    Raises:
        SemalignError: the folder holds something else, or another process runs in it.
    """
    check_folder(folder, experiment)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SemalignError(f"another process runs in {folder}: wait for it, or choose another folder") from None
    try:
        resumed = (folder / EXPERIMENT).is_file()
        for place in folder.iterdir():
            if _BEING_WRITTEN.match(place.name):
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        yield resumed
    finally:
        # An unfinished run keeps its lock file: without it, two processes could hold two locks of one name.
        if folder.is_dir() and ((folder / RESULT).is_file() or _is_unbegun(folder)):
            (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def is_claimed(folder: Path) -> bool:
    """Return whether a process runs in a run folder."""
    if not (folder / _LOCK).is_file():
        return False
    try:
        with FileLock(folder / _LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to write to
        return False


def empty(folder: Path) -> None:
    """Delete everything in a run folder but its lock."""
    for place in folder.iterdir():
        if place.name != _LOCK:
            shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return the steps in the metrics, as far as they are whole."""
    file, found = folder / METRICS, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut off while it was written
    return found


def cut_metrics(folder: Path, before: StepRecord) -> int:
    """Cut the metrics back to the steps before a given one, which a resumed stage runs again; return their number."""
    found = steps_of(folder)
    here, file = (before.layer, before.step), folder / METRICS
    kept = next((n for n, step in enumerate(found) if (step["layer"], step["step"]) >= here), len(found))
    lines = file.read_text(encoding="utf-8").splitlines()[:kept] if kept else []
    replace_file(file, "".join(line + "\n" for line in lines))
    return kept


def _is_interrupted(folder: Path, experiment: Experiment) -> bool:
    if not folder.is_dir() or ((folder / RESULT).is_file() and (folder / REPORT).is_file()):
        return False
    try:
        begun = (folder / EXPERIMENT).is_file()
        if begun and decisive(Experiment.read(folder / EXPERIMENT)) != decisive(experiment):
            return False
        with FileLock(folder / _LOCK).acquire(timeout=0):
            return begun or _is_unbegun(folder)
    except (Timeout, SemalignError, OSError):
        return False


def decisive(experiment: Experiment) -> Experiment:
    """Return an experiment without the settings that its result does not depend on."""
    return experiment.model_copy(update={"train": experiment.train.without_checkpoints()})


def check_folder(folder: Path, experiment: Experiment) -> None:
    """Refuse a folder that holds anything but runs of this experiment; nothing is written.

    Raises:
        SemalignError: it does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SemalignError(f"{folder} is a file: choose another folder with --out")
    if (folder / EXPERIMENT).is_file():
        changes = differences(decisive(Experiment.read(folder / EXPERIMENT)), decisive(experiment))
        if changes:
            raise SemalignError(
                f"{folder} holds another experiment ({'; '.join(changes[:5])}): choose another folder with --out"
            )
    elif not _is_unbegun(folder):
        raise SemalignError(f"{folder} is not empty: choose another folder with --out")


def _is_unbegun(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only files of a run that was killed while it read its inputs."""
    names = [place.name for place in folder.iterdir()]
    return all(name in (_LOCK, ENVIRONMENT) or _BEING_WRITTEN.match(name) for name in names)


def differences(there: Experiment, here: Experiment) -> list[str]:
    """Return the differences of two experiments, setting by setting."""
    ours, theirs = (dict(leaves(each.model_dump(mode="json"))) for each in (here, there))
    keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    return [f"{key} is {theirs.get(key)} there, {ours.get(key)} here" for key in keys]


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested settings, each with its dotted place."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{place}.{key}" if place else key)
    else:
        yield place, tree
