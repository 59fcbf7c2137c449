"""An interrupted supervision resumes after its last whole shard."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import Supervision, supervise
from semalign_attribution import view_of
from semalign_geometry.base import SemalignError, sha256_of

from ..models import collate
from .chain import EXACT, EXAMPLES, TOP, pair, source_model, target_model, transport_between

SOURCE = source_model()
TRANSPORT = transport_between(SOURCE, target_model())
BATCHES = [collate([example]) for example in EXAMPLES]


class Killed(BaseException):
    """Stands for the end of the process."""


def call(folder: Path, *, kill_at: int | None = None, key: str | None = "key", **more: Any) -> Supervision | None:
    """The supervision of the examples one by one, killed before one of them is given out."""

    def batches() -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(BATCHES):
            if number == kill_at:
                raise Killed
            yield batch

    wanted = (more.pop("settings", TOP)).model_copy(update={"shard_bytes": more.pop("shard_bytes", 1)})
    try:
        return supervise(SOURCE, batches(), pair(), TRANSPORT, folder, settings=wanted, resume_key=key, **more)
    except Killed:
        return None


def content(store: Supervision | None) -> dict[str, str]:
    assert store is not None
    return {file.name: sha256_of(file) for file in sorted(store.folder.iterdir()) if file.name != "manifest.json"}


@pytest.mark.parametrize("wanted", [TOP, EXACT], ids=["top_k", "final_hidden"])
@settings(max_examples=8)
@given(kills=st.lists(st.integers(0, len(BATCHES) - 1), max_size=3), size=st.sampled_from([1, 2_000, 10**9]))
def test_killed_and_repeated_gives_the_same_files(
    wanted: Any, kills: list[int], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    whole = call(folder / "whole", key=None, settings=wanted, shard_bytes=size)
    for kill_at in kills:
        assert call(folder / "store", kill_at=kill_at, settings=wanted, shard_bytes=size) is None
    found = call(folder / "store", settings=wanted, shard_bytes=size)
    assert found is not None and whole is not None
    assert found.manifest.model_copy(update={"key": ""}) == whole.manifest
    assert content(found) == content(whole)
    assert sorted(place.name for place in folder.iterdir()) == ["store", "whole"]


def runs_after(folder: Path, **more: Any) -> int:
    """Runs of the source that a call needs to come to its end."""
    runs: list[int] = []
    handle = view_of(SOURCE).layer(1).register_forward_pre_hook(lambda *arguments: runs.append(1))
    try:
        assert call(folder, **more) is not None
    finally:
        handle.remove()
    return len(runs)


def test_whole_shards_are_not_computed_again(tmp_path: Path) -> None:
    assert call(tmp_path / "store", kill_at=5) is None
    assert runs_after(tmp_path / "store") == len(BATCHES) - 5


def test_a_finished_store_is_not_computed_again(tmp_path: Path) -> None:
    assert call(tmp_path / "store") is not None
    assert runs_after(tmp_path / "store") == 0
    assert runs_after(tmp_path / "store", key="other") == len(BATCHES)
    shard = tmp_path / "store" / "shard-000-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert runs_after(tmp_path / "store", key="other") == len(BATCHES)


@pytest.mark.parametrize("last", ["rmtree", "rename"])
def test_a_kill_in_the_last_moment_costs_no_run(last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tmp_path / "store", key="other") is not None

    def kill(*given: Any, **more: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((shutil, "rmtree") if last == "rmtree" else (Path, "rename")), kill)
        assert call(tmp_path / "store") is None
    assert runs_after(tmp_path / "store") == 0
    names = {file.name for file in (tmp_path / "store").iterdir()}
    assert not [name for name in names if name.startswith("progress")]


def test_a_kill_while_the_earlier_store_goes_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tmp_path / "store", key="other") is not None
    rmtree = shutil.rmtree

    def kill(folder: Path, **more: Any) -> None:
        if folder.exists():
            (folder / "manifest.json").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        assert call(tmp_path / "store") is None
    assert runs_after(tmp_path / "store") == 0
    rmtree(tmp_path / "store")
    assert call(tmp_path / "store") is not None
    assert [place.name for place in tmp_path.iterdir()] == ["store"]


def test_a_store_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def watched(file: Path) -> str:
        hashed.append(file)
        return sha256_of(file)

    for module in ("align._supervise", "geometry.base._artifact"):
        monkeypatch.setattr(f"semalign_{module}.sha256_of", watched)
    store = call(tmp_path / "store")
    assert store is not None and len(hashed) == len(store.manifest.files)
    hashed.clear()
    assert call(tmp_path / "store") is not None
    assert sorted(hashed) == sorted(tmp_path / "store" / name for name in store.manifest.files)


@pytest.mark.parametrize("key", ["key", None])
def test_a_folder_of_other_files_is_refused_before_the_source_runs(key: str | None, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(SemalignError, match="holds other files: choose a new folder"):
        call(tmp_path, key=key, kill_at=0)
    assert [place.name for place in tmp_path.iterdir()] == ["thesis.txt"]


def test_half_written_files_do_not_stay(tmp_path: Path) -> None:
    assert call(tmp_path / "store", kill_at=5) is None
    (tmp_path / "store.partial" / ".progress-000.json.abcd").write_text("{", encoding="utf-8")
    store = call(tmp_path / "store")
    assert store is not None and not [file for file in store.folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("change", ["key", "settings", "shard", "progress"])
def test_what_does_not_fit_is_made_anew(change: str, tmp_path: Path) -> None:
    assert call(tmp_path / "store", kill_at=5) is None
    partial = tmp_path / "store.partial"
    more: dict[str, Any] = {}
    if change == "key":
        more["key"] = "other"
    elif change == "settings":
        more["settings"] = TOP.model_copy(update={"temperature": 2.0})
    elif change == "shard":
        file = partial / "shard-000-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (partial / "progress-000.json").write_text("{", encoding="utf-8")
    assert runs_after(tmp_path / "store", **more) == len(BATCHES)


def test_without_a_key_nothing_is_left(tmp_path: Path) -> None:
    assert call(tmp_path / "store", kill_at=5, key=None) is None
    assert not list(tmp_path.iterdir())
