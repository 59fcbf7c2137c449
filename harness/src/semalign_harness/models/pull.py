"""Models of the catalogue, kept in the cache: fetched from the hub, or added from a local file."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars
from semalign_geometry.base import SemalignError, new_folder, sha256_of

from ..util.cache import cache_folder
from ..util.console import Console
from ..util.failures import naming
from ..util.locking import lock_of, wait_for
from ..util.tables import aligned
from ..util.text import gb
from .catalogue import KnownModel, catalogue, known_models
from .settings import ModelConfig
from .shape import checkpoint_bytes, find_shape

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
"""Files of a checkpoint: weights, configuration, tokenizer, licence."""


def pull(model: KnownModel, *, console: Console | None = None) -> Path:
    """Fetch a model from the hub into the cache, unless it is there.

    A download that was interrupted resumes. A single file counts only with the sha256 of the catalogue.

    Args:
        model: the model.
        console: where to report; None reports nothing.

    Returns:
        The value for `ModelConfig.path`: a folder, or a file.

    Raises:
        SemalignError: the hub does not provide it, or its hash is wrong.
    """
    console = console or Console(quiet=True)
    folder = model.folder(cache_folder())
    partial = folder.with_name(f".{folder.name}.partial")
    with _alone(folder, console):
        if not folder.is_dir():
            partial.mkdir(parents=True, exist_ok=True)
            patterns = [model.file.name] if model.file else [*WANTED]
            if console.is_quiet:
                disable_progress_bars()
            with console.step(f"pull {model.name}"), _asking(model):
                huggingface_hub.snapshot_download(
                    model.upstream,
                    revision=model.revision,
                    local_dir=partial,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*"],
                )
            _check_fetched(model, partial)
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # the notes of the hub's client
            partial.rename(folder)
    return model.pulled(cache_folder())


def add(file: Path, *, console: Console | None = None) -> Path:
    """Keep a local file of the catalogue in the cache, as a hard link where the disk allows it.

    Args:
        file: the file, with the size and the sha256 that the catalogue names.
        console: where to report; None reports nothing.

    Returns:
        The value for `ModelConfig.path`: the file in the cache.

    Raises:
        SemalignError: there is no such file, or the catalogue has none with its size and sha256.
    """
    if not file.is_file():
        raise SemalignError(f"{file} is no file: give the path of a model file of semalign models list")
    size = file.stat().st_size
    near = [
        model
        for model in known_models().values()
        if model.file and (model.file.size == size or model.file.name.lower() == file.name.lower())
    ]
    if not near:
        raise SemalignError(
            f"{file} has the name or the size of no file in the catalogue: let the experiment name its path itself"
        )
    found = sha256_of(file)
    for model in near:
        assert model.file is not None
        if model.file.sha256 == found:
            folder = model.folder(cache_folder())
            with _alone(folder, console or Console(quiet=True)):
                if not folder.is_dir():
                    with new_folder(folder) as filled:
                        _link_or_copy(file.resolve(), filled / model.file.name)
            return model.pulled(cache_folder())
    assert near[0].file is not None
    raise SemalignError(
        f"{file} has {size} bytes and the sha256 {found}, {near[0].name} has {near[0].file.size} and "
        f"{near[0].file.sha256}: fetch it again from {near[0].upstream} at {near[0].revision}"
    )


def models_table(models: Sequence[KnownModel]) -> str:
    """Return a table of models: size, licence, owner, and whether the cache has them; at most 80 characters wide."""
    rows = [("name", "size", "licence", "upstream", "here")]
    for model in models:
        entry, shape = catalogue()[model.weights], find_shape(ModelConfig(path=model.weights))
        assert shape is not None  # it is in the catalogue
        size = model.file.size if model.file else checkpoint_bytes(shape)
        folder = model.folder(cache_folder())
        here = "yes" if folder.is_dir() else "part" if folder.with_name(f".{folder.name}.partial").is_dir() else "no"
        owner = model.upstream.partition("/")[0]
        rows.append((model.name, gb(size), entry.licence + "*" * entry.gated, owner, here))
    return f"{aligned(rows)}\n* gated: the hub requires accepting the licence first"


def _check_fetched(model: KnownModel, partial: Path) -> None:
    """Check that the whole model was fetched; a single file with a wrong hash is deleted."""
    if model.file is None:
        index = partial / "model.safetensors.index.json"
        shards = (
            json.loads(index.read_text("utf-8"))["weight_map"].values() if index.is_file() else ["model.safetensors"]
        )
        missing = [name for name in ("config.json", *sorted({*shards})) if not (partial / name).is_file()]
        if missing:
            raise SemalignError(
                f"{missing[0]} of {model.upstream} was not fetched: repeat the command, or let the experiment name "
                f"{model.weights} itself"
            )
        return
    file = partial / model.file.name
    found = sha256_of(file) if file.is_file() else "of no file"
    if found != model.file.sha256:
        shutil.rmtree(partial)
        raise SemalignError(
            f"{file.name} has the sha256 {found}, the catalogue has {model.file.sha256}: it is deleted, pull it again"
        )


def _link_or_copy(file: Path, place: Path) -> None:
    with contextlib.suppress(OSError):  # another disk, or one without links
        os.link(file, place)
        return
    shutil.copyfile(file, place)


@contextmanager
def _asking(model: KnownModel) -> Iterator[None]:
    """Turn any failure of the hub's client into one sentence."""
    with naming(f"the hub does not provide {model.upstream}, repeat the command to resume"):
        try:
            yield
        except GatedRepoError as error:
            raise SemalignError(
                f"{model.upstream} requires accepting its licence: do so on its page on the hub, log in with "
                "`hf auth login`, and repeat the command"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            at = f" at {model.revision}" if model.revision else ""
            raise SemalignError(f"the hub has no {model.upstream}{at}, or needs a login: hf auth login") from error


@contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """Keep other processes from the same model, and wait for one that makes it."""
    lock = lock_of(folder)
    wait_for(lock, console, f"pulls {folder.name}")
    try:
        yield
    finally:
        lock.release()
