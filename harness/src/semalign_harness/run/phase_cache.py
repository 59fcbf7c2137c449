"""Cache of supervision, for every experiment that needs the same."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from semalign_geometry import KNOWN_FRAMES
from semalign_geometry.base import SemalignError

from ..data.encoding import Example
from ..experiment import KNOWN_PAIRINGS, KNOWN_SCORERS, Experiment
from ..generation import GENERATION
from ..reading import READING
from ..results.source_phase import PHASE, SourcePhase
from ..util.cache import bytes_in, cache_folder
from ..util.console import Console
from ..util.locking import lock_of, wait_for
from .inputs import Inputs

PACKAGES = ("torch", "transformers", "semalign-geometry", "semalign-attribution", "semalign-align", "semalign-harness")
"""Packages whose versions belong to a cache key."""


_USERS = "users"


_FORMAT = 5
"""Raised when the same settings give other content within one version of the packages."""


@dataclass(frozen=True)
class Entry:
    """One place of the cache."""

    folder: Path
    phase: SourcePhase | None
    """None when it is unfinished, or damaged."""
    size: int
    """Bytes on disk."""
    unused_days: float
    """Days since its last use."""


def phase_key(experiment: Experiment, inputs: Inputs, device: torch.device) -> str:
    """Return the cache key of the supervision: a hash of everything that decides it; training settings do not."""
    rows = [_ids_of(example) for example in (*inputs.split.train, *inputs.split.held_out)]
    parts = {
        "format": [_FORMAT, GENERATION, READING],
        "settings": experiment.model_dump(
            mode="json", include={"scorer", "pairing", "transport", "supervision", "live", "measure", "batch_size"}
        ),
        "attribution_rows": experiment.data.attribution_rows,
        "train_rows": len(inputs.split.train),
        "rows": rows,
        "models": [inputs.source_id, inputs.target_id, experiment.source.load_in_4bit],
        "dtypes": [str(opened.dtype(device)) for opened in (inputs.source, inputs.target)],
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "packages": {name: version(name) for name in PACKAGES}
        | foreign_packages(experiment)
        | foreign_code(experiment),
    }
    if inputs.classes is not None:
        parts["classes"] = [each.tolist() for each in (inputs.classes.source, inputs.classes.target)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _ids_of(example: Example) -> list[Any]:
    """Return all that decides the supervision of a row: ids and answer, and the source's ids where it has its own."""
    side = example.source
    apart = (
        [] if side is None else [side.prompt_ids, side.answer_ids, side.spans.source, side.spans.target, side.framed]
    )
    return [example.prompt_ids, example.answer_ids, example.answer, *apart]


def foreign_packages(experiment: Experiment) -> dict[str, str]:
    """Return versions of the installed packages of the scorer, the pairing and the frame."""
    return (
        KNOWN_SCORERS.packages(experiment.scorer.kind)
        | KNOWN_PAIRINGS.packages(experiment.pairing.kind)
        | KNOWN_FRAMES.packages(*{experiment.transport.frame} - {"none"})
    )


def foreign_code(experiment: Experiment) -> dict[str, str]:
    """Return hashes of the code of the scorer, the pairing and the frame, as far as they are not built in."""
    frame = experiment.transport.frame
    return {
        **KNOWN_SCORERS.code(type(experiment.scorer)),
        **KNOWN_PAIRINGS.code(type(experiment.pairing)),
        **({} if frame == "none" else KNOWN_FRAMES.code(KNOWN_FRAMES.find(frame))),
    }


@contextmanager
def phase_folder(key: str, console: Console) -> Iterator[Path]:
    """Lock the place of a key in the cache for this process alone; wait for another process that is filling it.

    A finished place that cannot be written to, such as a colleague's, is used without a lock.
    """
    place = _cache() / key[:16]
    lock = lock_of(place)
    try:
        wait_for(lock, console, "makes the same supervision")
    except OSError:
        if not (place / PHASE).is_file():
            raise
    try:
        yield place
    finally:
        lock.release()


@contextmanager
def in_use(place: Path) -> Iterator[None]:
    """Keep `prune` away from a place of the cache, and mark it as used."""
    try:
        (place / _USERS).mkdir(exist_ok=True)
        user = FileLock(place / _USERS / f"{uuid.uuid4().hex}.lock")
        user.acquire(timeout=0)
        os.utime(place)
    except OSError:  # not ours to write to, and so not to prune
        yield
        return
    try:
        yield
    finally:
        Path(user.lock_file).unlink(missing_ok=True)
        user.release()


def entries() -> list[Entry]:
    """Return the places of the cache, the longest unused first."""
    found = []
    for folder in _cache().iterdir() if _cache().is_dir() else []:
        if not folder.is_dir():
            continue
        try:
            phase = SourcePhase.read(folder / PHASE)
        except SemalignError:
            phase = None
        found.append(Entry(folder, phase, bytes_in(folder), _unused_days(folder)))
    return sorted(found, key=lambda entry: -entry.unused_days)


def prune(*, unused_days: float) -> list[Entry]:
    """Delete the places that were not used for some days, and return them; those that a process is filling stay."""
    gone = []
    for entry in entries():
        if entry.unused_days < unused_days:
            continue
        try:
            with lock_of(entry.folder).acquire(timeout=0):
                if _unused_days(entry.folder) < unused_days or _has_users(entry.folder):
                    continue
                shutil.rmtree(entry.folder)
        except (Timeout, FileNotFoundError):  # a process is filling it, or has deleted it
            continue
        gone.append(entry)
    return gone


def _unused_days(folder: Path) -> float:
    return (time.time() - folder.stat().st_mtime) / 86_400


def _has_users(folder: Path) -> bool:
    for file in (folder / _USERS).glob("*.lock"):
        try:
            with FileLock(file).acquire(timeout=0):
                pass
        except Timeout:
            return True
    return False


def _cache() -> Path:
    return cache_folder() / "supervision"
