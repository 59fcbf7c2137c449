"""Artifacts and files: whole or absent, and damage is seen."""

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import BasisManifest, SemanticBasis, Transport, TransportManifest
from semalign_geometry.base import (
    MANIFEST,
    ArtifactManifest,
    SemalignError,
    check_replaceable,
    new_folder,
    read_artifact,
    read_manifest,
    replace_file,
    save_tensors,
    sha256_of,
    write_artifact,
)
from torch import Tensor
from torch.testing import assert_close

from .strategies import matrices, normal

TENSORS = "tensors.safetensors"


def manifest() -> BasisManifest:
    return SemanticBasis.from_head(normal(0, 5, 2)).manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@given(matrices(4, 3), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.booleans())
def test_write_and_read(matrix: Tensor, dtype: torch.dtype, transpose: bool) -> None:
    tensors = {"a": (matrix.T if transpose else matrix).to(dtype), "b": torch.arange(3)}
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "deeper" / "artifact"
        written = write_artifact(folder, manifest(), tensors)
        read, loaded = read_artifact(folder, BasisManifest)
        assert written.files == {TENSORS: sha256_of(folder / TENSORS)}
        assert sorted(contents(folder)) == [MANIFEST, TENSORS]
    assert read == written
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_an_artifact_replaces_the_one_before(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", manifest(), {"old": torch.zeros(2)})
    write_artifact(tmp_path / "a", manifest(), {"new": torch.ones(2)})
    assert list(read_artifact(tmp_path / "a", BasisManifest)[1]) == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("made", ["folder", "file"])
def test_saving_over_what_is_no_artifact_is_refused(made: str, tmp_path: Path) -> None:
    place = tmp_path / "results"
    if made == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("three years")
    else:
        place.write_text("three years")
    before = contents(tmp_path)
    expected = "results holds other files: choose a new folder" if made == "folder" else "results is a file: choose a"
    for call in (Transport.identity(4).save, check_replaceable):
        with pytest.raises(SemalignError, match=expected):
            call(place)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_nothing_an_empty_folder_and_an_artifact_are_replaceable(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    check_replaceable(tmp_path)
    Transport.identity(4).save(tmp_path / "t")
    check_replaceable(str(tmp_path / "t"))


def test_a_new_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(SemalignError, match="is a file: choose a new folder"), new_folder(tmp_path / "file"):
        raise AssertionError("there is nothing to fill")
    assert contents(tmp_path) == {"file": b"old"}


@given(st.data())
def test_one_flipped_bit_is_seen(data: st.DataObject) -> None:
    with TemporaryDirectory() as parent:
        Transport.identity(3).save(Path(parent) / "t")
        file = Path(parent) / "t" / TENSORS
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        with pytest.raises(SemalignError, match="damaged"):
            Transport.load(Path(parent) / "t")


@given(st.data())
def test_truncated_files_are_seen(data: st.DataObject) -> None:
    with TemporaryDirectory() as parent:
        Transport.identity(3).save(Path(parent) / "t")
        file = Path(parent) / "t" / data.draw(st.sampled_from([TENSORS, MANIFEST]))
        content = file.read_bytes().rstrip()
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(SemalignError, match="damaged|cannot be read as JSON"):
            Transport.load(Path(parent) / "t")


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="manifest.json does not exist"):
        Transport.load(tmp_path / "nowhere")
    Transport.identity(3).save(tmp_path / "t")
    (tmp_path / "t" / TENSORS).unlink()
    with pytest.raises(SemalignError, match=f"{TENSORS} is missing though manifest.json lists it"):
        read_manifest(tmp_path / "t", TransportManifest)


def test_a_folder_in_the_place_of_a_file_is_no_file(tmp_path: Path) -> None:
    Transport.identity(3).save(tmp_path / "t")
    (tmp_path / "t" / TENSORS).unlink()
    (tmp_path / "t" / TENSORS).mkdir()
    with pytest.raises(SemalignError, match=f"{TENSORS} is missing"):
        Transport.load(tmp_path / "t")


def test_tensors_of_every_listed_file_are_read(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for number, file in enumerate(files):
        save_tensors(file, {file.stem: torch.full((2,), float(number))})
    (tmp_path / "unlisted.safetensors").write_bytes(b"not read")
    listed = ArtifactManifest(files={file.name: sha256_of(file) for file in files})
    listed.write(tmp_path / MANIFEST)
    read, tensors = read_artifact(tmp_path, ArtifactManifest)
    assert read == listed
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [0.0, 0.0], "b": [1.0, 1.0]}


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="x.safetensors could not be written: "):
        save_tensors(tmp_path / "missing" / "x.safetensors", {"x": torch.zeros(1)})


@given(st.binary(max_size=100))
def test_hashes_are_sha256(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_bytes(content)
        assert sha256_of(file) == sha256_of(str(file)) == hashlib.sha256(content).hexdigest()


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "basis", manifest(), {})
    with pytest.raises(SemalignError, match="manifest.json"):
        Transport.load(tmp_path / "basis")


@pytest.mark.parametrize("exists", [False, True])
def test_a_failing_write_changes_nothing(exists: bool, tmp_path: Path) -> None:
    if exists:
        Transport.identity(3).save(tmp_path / "t")
    before = contents(tmp_path)
    # Overlapping tensors cannot be written as safetensors: the write fails in the middle.
    shared = torch.zeros(4)
    with pytest.raises((RuntimeError, OSError)):
        write_artifact(tmp_path / "t", manifest(), {"a": shared[:3], "b": shared[1:]})
    assert contents(tmp_path) == before
    assert (tmp_path / "t").exists() == exists


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_in_new_folder_leaves_nothing(error: type[BaseException], exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
        (path / "old").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(error), new_folder(path) as temporary:
        (temporary / "new").write_text("half")
        assert path.exists() == exists
        assert {name: content for name, content in contents(tmp_path).items() if name in before} == before
        raise error
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == int(exists)


def test_a_new_folder_is_made_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "large" / "there").mkdir(parents=True)
    (tmp_path / "large" / "there" / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "large" / "there")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [entry.name for entry in (tmp_path / "large" / "there").iterdir()] == ["new"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["large", "link"]


@pytest.mark.parametrize("exists", [False, True])
def test_new_folder_appears_at_the_end_and_replaces_whole(exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "much" / "deeper" / "folder"
    if exists:
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    with new_folder(path) as temporary:
        assert temporary.parent == path.parent, "a rename to another file system is a copy"
        (temporary / "new").write_text("new")
    assert contents(tmp_path) == {"much/deeper/folder/new": b"new"}
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failing_replace_file_keeps_the_old_one(
    step: str, error: type[BaseException], exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise error("no space")

    path = tmp_path / "file"
    if exists:
        path.write_text("old")
    monkeypatch.setattr(step, failing)
    with pytest.raises(error, match="no space"):
        replace_file(path, "new")
    assert contents(tmp_path) == ({"file": b"old"} if exists else {})


def test_a_file_is_whole_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = tmp_path / "file", list[str]()
    sync, replace = os.fsync, os.replace

    def seen_sync(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == len("content")
        steps.append("sync")
        sync(descriptor)

    def seen_replace(temporary: str, final: Path) -> None:
        assert Path(temporary).parent == final.parent, "a rename to another file system is a copy"
        steps.append("replace")
        replace(temporary, final)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(os, "replace", seen_replace)
    replace_file(path, "content")
    assert steps == ["sync", "replace"]


@given(st.text())
def test_replace_file_writes_utf8(text: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "much" / "deeper" / "file"
        for content in ("before", text):
            assert replace_file(path, content) == path
        assert path.read_bytes().decode() == text
        assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_files_and_folders_get_ordinary_permissions(mask: int, tmp_path: Path) -> None:
    def folder(path: Path) -> None:
        with new_folder(path):
            pass

    makers: list[tuple[Callable[[Path], object], Callable[[Path], object]]] = [
        (lambda path: replace_file(path, ""), Path.touch),
        (folder, Path.mkdir),
    ]
    before = os.umask(mask)
    try:
        for number, (mine, plain) in enumerate(makers):
            mine(tmp_path / f"mine{number}")
            plain(tmp_path / f"plain{number}")
    finally:
        assert os.umask(before) == mask, "the mask is left as it was"
    for number in range(len(makers)):
        modes = [stat.S_IMODE((tmp_path / f"{name}{number}").stat().st_mode) for name in ("mine", "plain")]
        assert modes[0] == modes[1]
