"""What a source left behind is kept, and used by every experiment that asks for the same."""

import os
import shutil
import time
from pathlib import Path

import pytest
from filelock import FileLock
from semalign_align import supervise
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.methods import _semalign
from semalign_harness.results.files import BEFORE
from semalign_harness.results.source_phase import SourcePhase
from semalign_harness.run import phase_cache, source_phase
from semalign_harness.run.inputs import read_inputs
from semalign_harness.run.phase_cache import phase_key
from semalign_harness.run.phase_store import entries, in_use, phase_folder, prune
from semalign_harness.util.console import Console
from semalign_harness.util.resources import pick_device


def run(folder: Path, overrides: list[str], *more: str) -> int:
    return main(["run", "tiny", *overrides, *more, "--out", str(folder)])


def key(overrides: list[str], *more: str) -> str:
    experiment = load_experiment("tiny", overrides=[*overrides, *more])
    return phase_key(experiment, read_inputs(experiment, Console(quiet=True)), pick_device("cpu"))


def test_training_settings_share_the_supervision(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "one", overrides) == 0
    monkeypatch.setattr(source_phase, "_make", None)  # the source does not run again
    capsys.readouterr()
    more = ["train.learning_rate=0.01", "train.steps=1", "name=other", "method.objective.kind=cosine"]
    assert run(tmp_path / "two", overrides, *more) == 0
    said = capsys.readouterr().err
    assert "measure target before" not in said and "measure target after" in said
    for name in (*source_phase.RECORDS, BEFORE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(entries()) == 1
    capsys.readouterr()
    assert main(["store", "list"]) == 0
    printed = capsys.readouterr().out
    assert entries()[0].folder.name in printed and "source → target" in printed


@pytest.mark.parametrize(
    "more",
    [
        "data.train_rows=15",
        "data.held_out_rows=7",
        "data.seed=1",
        "data.attribution_rows=3",
        "scorer.kind=ablation",
        "pairing.kind=uniform",
        "transport.frame=dual",
        "supervision.temperature=2",
        "supervision.dtype=int8",
        "source.dtype=bfloat16",
        "target.dtype=bfloat16",
        "measure.answer_rows=1",
    ],
)
def test_what_decides_the_content_decides_the_key(more: str, overrides: list[str]) -> None:
    assert key(overrides, more) != key(overrides)


def test_the_key_follows_the_models_and_not_their_paths(
    overrides: list[str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(pair[0], tmp_path / "copy")
    assert key(overrides, f"source.path={copy}") == key(overrides)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert key(overrides, f"source.path={copy}") != key(overrides)


@pytest.mark.parametrize("version", ["GENERATION", "READING"])
def test_the_key_follows_how_exact_answers_are_written_and_read(
    version: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(overrides)
    monkeypatch.setattr(phase_cache, version, 99)
    assert key(overrides) != before


def test_prune_deletes_what_is_not_used(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "old", overrides, "--quiet") == 0
    (old,) = entries()
    assert run(tmp_path / "new", overrides, "data.seed=1", "--quiet") == 0
    before = time.time() - 40 * 86_400
    os.utime(old.folder, (before, before))
    capsys.readouterr()
    assert main(["store", "prune"]) == 0
    assert "deleted 1 of 2" in capsys.readouterr().out and not old.folder.exists()
    assert run(tmp_path / "again", overrides, "data.seed=1", "--quiet") == 0
    (used,) = entries()
    with FileLock(used.folder.with_name(f".{used.folder.name}.lock")):
        assert prune(unused_days=0.0) == [], "a process is at it"
    assert main(["store", "prune", "--unused-for", "0"]) == 0
    capsys.readouterr()
    assert main(["store", "list"]) == 0
    assert "no supervision is kept" in capsys.readouterr().out


def test_what_a_run_uses_is_not_pruned(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[int] = []

    def prune_meanwhile(*arguments: object, **more: object) -> object:
        pruned.append(len(prune(unused_days=0.0)))
        return train(*arguments, **more)  # type: ignore[arg-type]

    train = _semalign._train
    monkeypatch.setattr(_semalign, "_train", prune_meanwhile)
    assert run(tmp_path / "run", overrides, "--quiet") == 0
    assert pruned == [0] and len(entries()) == 1
    assert len(prune(unused_days=0.0)) == 1


def test_a_full_cache_may_be_read_only(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "one", overrides, "--quiet") == 0

    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("semalign_harness.run.phase_store.FileLock.acquire", refuse)
    with pytest.raises(PermissionError), phase_folder("0" * 64, Console(quiet=True)):
        pass
    with phase_folder(SourcePhase.read(tmp_path / "one" / "supervision.json").key, Console(quiet=True)) as place:
        assert (place / "phase.json").is_file()
        with in_use(place):
            pass


def test_a_moved_cache_is_named_where_it_is(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "one", overrides, "--quiet") == 0
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "moved"))
    monkeypatch.setattr(source_phase, "_make", None)
    assert run(tmp_path / "two", overrides, "--quiet", "name=two") == 0
    assert Path(SourcePhase.read(tmp_path / "two" / "supervision.json").folder).parent.parent == tmp_path / "moved"


def test_what_was_made_counts_as_room(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*overrides, "batch_size=1", "supervision.shard_bytes=1"]
    with monkeypatch.context() as patch:
        patch.setattr(source_phase, "measured", interrupted)
        assert run(tmp_path / "run", settings) == 130
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=30_000)  # less than the whole takes
        patch.setattr(source_phase.shutil, "disk_usage", lambda place: usage)
        assert run(tmp_path / "run", settings, "--quiet") == 0


def interrupted(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_a_disk_that_is_too_small_is_refused_before_the_source_runs(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(source_phase.shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(source_phase, "supervise", None)
    assert run(tmp_path / "run", overrides) == 2
    message = capsys.readouterr().err
    assert "supervision takes" in message and "semalign store prune" in message
    assert not (tmp_path / "run").exists() and entries() == []


def test_the_size_told_is_the_size_taken(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", overrides) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if "supervision takes" in line)
    folder = Path(SourcePhase.read(tmp_path / "run" / "supervision.json").folder)
    taken = sum(file.stat().st_size for file in folder.glob("*/*.safetensors")) / 1e6
    assert float(told.split("takes ")[1].split(" MB")[0]) == pytest.approx(taken, abs=0.05)


def test_an_interrupted_supervision_goes_on(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*overrides, "batch_size=1", "supervision.shard_bytes=1"]

    def stopping(source: object, rows: object, *arguments: object, **more: object) -> object:
        def few() -> object:
            for number, batch in enumerate(rows):  # type: ignore[arg-type, var-annotated]
                if number == 9:
                    raise KeyboardInterrupt
                yield batch

        return supervise(source, few(), *arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(source_phase, "supervise", stopping)
        assert run(tmp_path / "run", settings) == 130
    (unfinished,) = entries()
    assert unfinished.phase is None and (unfinished.folder / "supervision.partial").is_dir()
    before = {file.name: file.stat().st_ino for file in (unfinished.folder / "supervision.partial").glob("shard-*")}
    assert len(before) == 9
    assert run(tmp_path / "run", settings, "--quiet") == 0
    after = {file.name: file.stat().st_ino for file in (unfinished.folder / "supervision").glob("shard-*")}
    assert len(after) == 16 and before.items() <= after.items(), "whole shards are used"


def test_supervision_outlives_a_memory_that_is_full(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: object, rows: object, pairing: object, transport: object, folder: Path, **more: object) -> object:
        if folder.name == source_phase.TRAIN:
            raise MemoryError
        return supervise(source, rows, pairing, transport, folder, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(source_phase, "supervise", full)
        assert run(tmp_path / "run", overrides) == 2
    assert "the memory is full" in capsys.readouterr().err
    (unfinished,) = entries()
    made = (unfinished.folder / source_phase.HELD_OUT / "manifest.json").stat().st_ino
    assert run(tmp_path / "run", overrides, "--quiet") == 0
    assert (unfinished.folder / source_phase.HELD_OUT / "manifest.json").stat().st_ino == made
