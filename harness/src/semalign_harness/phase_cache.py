"""What sources left behind, kept in the cache folder for every experiment that asks for the same."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from semalign_geometry import Contract, SemalignError

from .console import Console
from .experiment import Experiment
from .inputs import Inputs
from .measure import Measurement
from .models import cache_folder

PHASE = "phase.json"
_FORMAT = 1
"""Raised when the same settings give other content."""


class SourcePhase(Contract):
    """What a source left behind; the file is written last, so that what it describes is whole."""

    key: str
    """Hash of all that decides the content."""
    folder: str
    """Where it lies."""
    source: str
    """Path or hub id of the source."""
    target: str
    """Path or hub id of the target whose width and depth it fits."""
    train_rows: int
    """Supervised training rows."""
    held_out_rows: int
    """Supervised held-out rows."""
    supervised_tokens: int
    """Supervised tokens of the training rows."""
    residual_error: float
    """Relative error of rounding the residuals of the training rows."""
    measurement: Measurement
    """The source on the held-out rows."""


@dataclass(frozen=True)
class Entry:
    """One place of the cache."""

    folder: Path
    phase: SourcePhase | None
    """None when it is unfinished, or damaged."""
    size: int
    """Bytes on disk."""
    unused_days: float
    """Days since it was last used."""


def phase_key(experiment: Experiment, inputs: Inputs, device: torch.device) -> str:
    """Hash of all that decides what the source leaves behind; training settings are not among it."""
    rows = [[e.prompt_ids, e.answer_ids, e.answer] for e in (*inputs.split.train, *inputs.split.held_out)]
    parts = {
        "format": _FORMAT,
        "settings": experiment.model_dump(
            mode="json", include={"scorer", "pairing", "transport", "supervision", "measure", "batch_size"}
        ),
        "attribution_rows": experiment.data.attribution_rows,
        "train_rows": len(inputs.split.train),
        "rows": rows,
        "models": [inputs.source_id, inputs.target_id],
        "dtypes": [str(opened.dtype(device)) for opened in (inputs.source, inputs.target)],
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def phase_folder(key: str, console: Console) -> Iterator[Path]:
    """The place of a key in the cache, for this process alone; waits for another one that is filling it."""
    parent = _cache()
    parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(parent / key[:16])
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.note("waiting for another process that makes the same supervision")
        lock.acquire()
    try:
        yield parent / key[:16]
    finally:
        lock.release()


def touch(folder: Path) -> None:
    """Note that a place of the cache was used."""
    os.utime(folder)


def entries() -> list[Entry]:
    """The places of the cache, the longest unused first."""
    found = []
    for folder in _cache().iterdir() if _cache().is_dir() else []:
        if not folder.is_dir():
            continue
        try:
            phase = SourcePhase.read(folder / PHASE)
        except SemalignError:
            phase = None
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found.append(Entry(folder, phase, size, (time.time() - folder.stat().st_mtime) / 86_400))
    return sorted(found, key=lambda entry: -entry.unused_days)


def prune(*, unused_days: float) -> list[Entry]:
    """Delete what was not used for some days; what a process is filling stays. Returns what was deleted."""
    gone = []
    for entry in entries():
        if entry.unused_days < unused_days:
            continue
        try:
            with _lock(entry.folder).acquire(timeout=0):
                shutil.rmtree(entry.folder)
        except Timeout:
            continue
        gone.append(entry)
    return gone


def _cache() -> Path:
    return cache_folder() / "supervision"


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"))
