"""The cache folder, and sizes of folders."""

import contextlib
import os
from pathlib import Path

import platformdirs


def bytes_in(folder: Path) -> int:
    """Return the size of the files in a folder; a file that vanishes meanwhile does not count."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size


def cache_folder() -> Path:
    """Return the folder of cached models: $SEMALIGN_CACHE, else the user's cache folder."""
    return Path(os.environ.get("SEMALIGN_CACHE") or platformdirs.user_cache_dir("semalign"))
