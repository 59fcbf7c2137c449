"""Locks of folders in the cache that several processes may want to make at once."""

from pathlib import Path

from filelock import FileLock, Timeout

from .console import Console


def lock_of(folder: Path) -> FileLock:
    """Return the lock to make or delete a folder; its file beside the folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def wait_for(lock: FileLock, console: Console, work: str) -> None:
    """Take a lock; note the work of another process that has it, and wait."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.note(f"waiting for another process that {work}")
        lock.acquire()
