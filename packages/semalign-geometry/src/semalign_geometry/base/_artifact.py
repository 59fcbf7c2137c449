"""Artifacts: a folder with `manifest.json` (a contract) beside safetensors files, complete or absent, hashed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from ._contracts import Contract
from ._errors import SemalignError
from ._files import check_no_file, new_folder

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
"""Name of the contract in an artifact's folder."""


class ArtifactManifest(Contract):
    """Manifest of an artifact: its tensor files and their hashes."""

    files: dict[str, str] = {}
    """sha256 (hex) of each tensor file in the folder, by file name."""


ManifestT = TypeVar("ManifestT", bound=ArtifactManifest)


def write_artifact(folder: str | Path, manifest: ManifestT, tensors: "Mapping[str, Tensor]") -> ManifestT:
    """Write manifest and tensors as one folder, whole or not at all.

    Args:
        folder: the artifact's folder; an artifact that is there is replaced.
        manifest: its contract; `files` is filled in here.
        tensors: saved in `tensors.safetensors`.

    Returns:
        The manifest as written, hashes included.

    Raises:
        SemalignError: the folder holds something else.
    """
    check_replaceable(folder)
    with new_folder(Path(folder)) as temporary:
        file = temporary / "tensors.safetensors"
        save_tensors(file, tensors)
        written = manifest.model_copy(update={"files": {file.name: sha256_of(file)}})
        written.write(temporary / MANIFEST)
    return written


def check_replaceable(folder: str | Path) -> None:
    """Check that writing an artifact to a folder would replace an artifact, or nothing.

    Raises:
        SemalignError: a file is there, or a folder with files but no manifest.
    """
    folder = Path(folder)
    check_no_file(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise SemalignError(f"{folder} holds other files: choose a new folder")


def read_artifact(folder: str | Path, manifest_type: type[ManifestT]) -> "tuple[ManifestT, dict[str, Tensor]]":
    """Read an artifact after checking the hashes of its files.

    Raises:
        SemalignError: the folder or a file is missing, or a file's content is not what the manifest says.
    """
    from safetensors.torch import load_file  # with torch, which manifests do without

    manifest = read_manifest(folder, manifest_type)
    tensors: dict[str, Tensor] = {}
    for name in manifest.files:
        tensors |= load_file(Path(folder) / name)
    return manifest, tensors


def read_manifest(folder: str | Path, manifest_type: type[ManifestT]) -> ManifestT:
    """Read an artifact's manifest and check that each of its files is present and unchanged.

    Raises:
        SemalignError: as `read_artifact`.
    """
    folder = Path(folder)
    manifest = manifest_type.read(folder / MANIFEST)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise SemalignError(f"{file} is missing though {MANIFEST} lists it: make the artifact again")
        if sha256_of(file) != expected:
            raise SemalignError(f"{file} is damaged (its sha256 is not the manifest's): make the artifact again")
    return manifest


def save_tensors(file: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Save tensors as safetensors; a full disk is reported as the OSError that it is."""
    from safetensors.torch import save_file  # with torch, which manifests do without

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from error


def sha256_of(file: str | Path) -> str:
    """sha256 of a file's content, in hex."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
