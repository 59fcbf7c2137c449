"""Places of the cache of supervision: locked, marked as used, listed and deleted."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from semalign_geometry.base import SemalignError

from ..results.source_phase import PHASE, SourcePhase
from ..util.cache import bytes_in, cache_folder
from ..util.console import Console
from ..util.locking import lock_of, wait_for

_USERS = "users"


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
