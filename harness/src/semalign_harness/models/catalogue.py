"""Models by name: their published facts, and where the cache keeps them.

A checkpoint goes by the last part of its hub id in small letters, a single file by a name of its own.
An experiment names one as `source.path=catalogue:NAME`.
"""

import functools
import importlib.resources
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from semalign_geometry.base import SemalignError, Settings

PREFIX = "catalogue:"


class CatalogueEntry(Settings):
    """Published facts of a checkpoint."""

    architecture: dict[str, Any]
    """Keys of its config.json that set its shape."""
    licence: str
    """Licence of its weights."""
    gated: bool = False
    """Whether the hub requires accepting the licence first."""
    revision: str | None = None
    """Commit that is fetched; None for the newest."""


class KnownFile(Settings):
    """A file that stands for a whole model."""

    name: str
    """Its name upstream."""
    size: int = Field(ge=1)
    """Its bytes."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of the upstream release."""


class KnownModel(Settings):
    """A model by name."""

    name: str
    """Its name here."""
    weights: str
    """Hub id of the checkpoint in the catalogue whose shape and licence it has."""
    upstream: str
    """Repository on the hub."""
    revision: str | None = None
    """Commit that is fetched; None for the newest."""
    file: KnownFile | None = None
    """The one file of the model; None for safetensors, configuration and tokenizer."""

    def folder(self, cache: Path) -> Path:
        """Return its folder in the cache, which exists only when the model is whole."""
        return cache / "models" / self.name

    def place(self, cache: Path) -> Path:
        """Return the value for `ModelConfig.path`: its folder in the cache, or its file there."""
        return self.folder(cache) / self.file.name if self.file else self.folder(cache)

    def pulled(self, cache: Path) -> Path:
        """Return its place, where the cache has it.

        Raises:
            SemalignError: the cache lacks it.
        """
        if not self.folder(cache).is_dir():
            raise SemalignError(f"{self.name} is not here yet: semalign models pull {self.name}")
        return self.place(cache)


@functools.cache
def _tree() -> dict[str, Any]:
    text = (importlib.resources.files(__package__) / "catalogue.yaml").read_text("utf-8")
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree


@functools.cache
def catalogue() -> dict[str, CatalogueEntry]:
    """Return the checkpoints of the catalogue by hub id."""
    entries = _tree()["checkpoints"].items()
    return {path: CatalogueEntry.parse(entry, origin=path) for path, entry in entries}


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """Return the models by their names, single files first."""
    trees = {name: {"name": name, **tree} for name, tree in _tree()["files"].items()}
    for path, entry in catalogue().items():
        if not path.startswith("generated:"):
            name = path.rsplit("/", 1)[-1].lower()
            trees[name] = {"name": name, "weights": path, "upstream": path, "revision": entry.revision}
    return {name: KnownModel.parse(tree, origin=name) for name, tree in trees.items()}


def find_known(name: str) -> KnownModel:
    """Find a model by its name, in capitals or not, with `catalogue:` before it or not, or by its hub id.

    Raises:
        SemalignError: it is unknown.
    """
    wanted = name.removeprefix(PREFIX).lower()
    models = known_models()
    for model in models.values():
        if wanted == model.name or (wanted == model.upstream.lower() and model.file is None):
            return model
    short = wanted.rsplit("/", 1)[-1]
    near = [known for known in models if short and known.startswith(short)]
    near = near or get_close_matches(short, models, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SemalignError(f"unknown model {name!r}: {hint}semalign models list shows those known")


def known_path(path: str) -> KnownModel | None:
    """Return the model that a path of an experiment names with `catalogue:`, or None.

    Raises:
        SemalignError: it names an unknown one.
    """
    return find_known(path) if path.startswith(PREFIX) else None
