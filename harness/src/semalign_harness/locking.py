"""Folders of the cache that several processes may want to make at once."""

from pathlib import Path

from filelock import FileLock


def lock_of(folder: Path) -> FileLock:
    """The lock of whoever makes or deletes a folder; its empty hidden file beside the folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))
