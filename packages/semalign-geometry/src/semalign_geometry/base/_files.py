"""Files and folders that are whole or absent: written under a temporary name, then renamed.

A single file is synced to the disk before it gets its name; the files of a folder are not.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._errors import SemalignError


def replace_file(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path` atomically; an existing file stays as it was until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name `path` only when the block ends without an exception.

    A folder that exists at `path`, or where a link at `path` leads, is replaced at that moment, never before.

    Raises:
        SemalignError: `path` is a file.
    """
    check_no_file(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if path.exists():
            old = temporary.with_name(temporary.name + ".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_no_file(path: Path) -> None:
    """Raise SemalignError where `path` is a file."""
    if path.is_file():
        raise SemalignError(f"{path} is a file: choose a new folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
