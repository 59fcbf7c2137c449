"""Models of the catalogue: what is kept is upstream's or is not there, and a pull that was cut off resumes."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError
from semalign_geometry.base import SemalignError
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.models.catalogue import KnownFile, KnownModel, catalogue, find_known, known_models
from semalign_harness.models.opening import open_model
from semalign_harness.models.pull import add, models_table, pull
from semalign_harness.models.settings import ModelConfig
from semalign_harness.run.estimate import estimate
from semalign_harness.util.cache import cache_folder
from semalign_harness.util.console import Console

CONTENT = bytes(range(256)) * 40
"""Bytes of the fake model."""


def fake_model() -> KnownModel:
    file = KnownFile(name="Fake.gguf", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    weights = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return KnownModel(name="fake-q4", weights=weights, upstream="somebody/Fake-GGUF", revision="a" * 40, file=file)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """The one model that is known."""
    model = fake_model()
    for place in ("catalogue", "pull"):
        monkeypatch.setattr(f"semalign_harness.models.{place}.known_models", lambda: {model.name: model})
    return model


def left(model: KnownModel) -> set[str]:
    folder = cache_folder() / "models"
    return {path.name for path in folder.iterdir()} - {f".{model.name}.lock"} if folder.exists() else set()


def test_every_checkpoint_of_the_catalogue_is_known_by_one_name() -> None:
    models = known_models()
    checkpoints = [model for model in models.values() if model.file is None]
    assert [model.weights for model in checkpoints] == [
        path for path in catalogue() if not path.startswith("generated:")
    ]
    for name, model in models.items():
        assert name == model.name == name.lower() and "/" not in name and find_known(name.upper()) is model
        assert model.revision is None or len(bytes.fromhex(model.revision)) == 20
        assert model.weights in catalogue()
        if model.file is None:
            assert find_known(model.weights) is model and model.upstream == model.weights


Hub = Callable[[dict[str, bytes]], list[Any]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with one repository of these files. Returns the repositories and commits that are asked of it."""

    def serve(files: dict[str, bytes]) -> list[Any]:
        asked: list[Any] = []

        def snapshot_download(
            repo: str, *, revision: str | None, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]
        ) -> None:
            asked.append((repo, revision))
            (local_dir / ".cache").mkdir(exist_ok=True)
            for name, content in files.items():
                if any(fnmatch(name, each) for each in allow_patterns):
                    if not any(fnmatch(name, each) for each in ignore_patterns):
                        (local_dir / name).write_bytes(content)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return serve


def test_a_checkpoint_comes_from_the_hub(hub: Hub, pair: tuple[Path, Path]) -> None:
    kept = {path.name: path.read_bytes() for path in pair[1].iterdir()}
    kept["LICENSE.txt"] = b"Take it."
    others = {"pytorch_model.bin": b"0", "README.md": b"1", "onnx/config.json": b"2", "original/params.json": b"3"}
    asked = hub(kept | others)
    model = find_known("HuggingFaceTB/SmolLM2-135M-Instruct")
    settings = ModelConfig(path="catalogue:smollm2-135m-instruct")
    with pytest.raises(SemalignError, match="not here yet: semalign models pull smollm2-135m-instruct"):
        open_model(settings)
    folder = pull(model)
    assert folder == cache_folder() / "models" / "smollm2-135m-instruct" == pull(model)
    assert asked == [(model.upstream, "12fd25f77366fa6b3b4b768ec3050bf629380bac")]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert open_model(settings).place == str(folder)
    with pytest.raises(SemalignError, match="leave revision=main out"):
        open_model(settings.model_copy(update={"revision": "main"}))


def test_the_commands_show_pull_and_find_a_model(
    fake: KnownModel, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = hub({"Fake.gguf": CONTENT, "config.json": b"0"})
    assert main(["models", "where", "fake-q4"]) == 2
    assert capsys.readouterr().err == "semalign: fake-q4 is not here yet: semalign models pull fake-q4\n"
    assert main(["models", "list"]) == 0
    head, row, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "size", "licence", "upstream", "here"]
    assert row.split() == ["fake-q4", "0.0", "MB", "Apache-2.0", "somebody", "no"]
    assert main(["models", "pull", "fake-q4"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == cache_folder() / "models" / "fake-q4" / "Fake.gguf" and path.read_bytes() == CONTENT
    assert {file.name for file in path.parent.iterdir()} == {"Fake.gguf"} and left(fake) == {"fake-q4"}
    assert main(["models", "where", "Fake-Q4"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "yes"
    assert pull(fake) == path and asked == [("somebody/Fake-GGUF", "a" * 40)], "what is here is not asked for"


def test_a_file_of_the_hub_with_another_hash_is_deleted(hub: Hub) -> None:
    model = fake_model()
    for files, found in (({"Fake.gguf": CONTENT[::-1]}, "[0-9a-f]{64}"), ({}, "of no file")):
        hub(files)
        with pytest.raises(
            SemalignError, match=rf"^Fake.gguf has the sha256 {found}, the catalogue has .*pull it again$"
        ):
            pull(model)
        assert left(model) == set()
    hub({"Fake.gguf": CONTENT})
    assert pull(model).read_bytes() == CONTENT


@pytest.mark.parametrize("missing", ["model-2.safetensors", "config.json", "model-1.safetensors"])
def test_a_checkpoint_counts_only_when_it_is_whole(hub: Hub, missing: str) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "config.json": b"{}"}
    files["model.safetensors.index.json"] = index
    model = find_known("pythia-410m")
    hub({name: content for name, content in files.items() if name != missing})
    with pytest.raises(
        SemalignError, match=f"^{missing} of EleutherAI/pythia-410m was not fetched: repeat the command"
    ):
        pull(model)
    assert not model.folder(cache_folder()).exists()
    assert models_table([model]).splitlines()[1].endswith("part")
    hub({missing: files[missing]})
    assert {path.name for path in pull(model).iterdir()} == {*files}, "what was fetched before is kept"


def test_checkpoints_without_safetensors_are_left_to_transformers(hub: Hub) -> None:
    hub({"pytorch_model.bin": b"0", "config.json": b"0"})
    with pytest.raises(SemalignError, match="let the experiment name EleutherAI/pythia-410m itself"):
        pull(find_known("pythia-410m"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "requires accepting its licence"),
        (RevisionNotFoundError, "has no .* at "),
        (
            LocalEntryNotFoundError,
            "does not provide .*, repeat the command to resume: LocalEntryNotFoundError: offline",
        ),
        (ConnectionError, "does not provide .*, repeat the command to resume: ConnectionError: no route to host"),
    ],
)
def test_a_failure_of_the_hub_is_one_sentence(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "offline" if error is LocalEntryNotFoundError else "no route to host"
    more = {"response": SimpleNamespace(headers={}, request=None)} if error.__name__.endswith("epoError") else {}
    more |= {"response": SimpleNamespace(headers={}, request=None)} if error is RevisionNotFoundError else {}
    script = "def refuse(*arguments, **given): raise error(said, **more)"
    space = {"__name__": "huggingface_hub.fake", "error": error, "said": said, "more": more}
    exec(script, space)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", space["refuse"])
    with pytest.raises(SemalignError, match=message) as caught:
        pull(find_known("llama-3.2-1b-instruct"))
    assert "\n" not in str(caught.value)


def test_two_pulls_at_once_fetch_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = fake_model(), hub({"Fake.gguf": CONTENT})
    holding, go_on, waits = (threading.Event() for _ in range(3))
    download = huggingface_hub.snapshot_download

    def held(*arguments: Any, **more: Any) -> None:
        holding.set()
        assert go_on.wait(60)
        download(*arguments, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", held)
    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(pull(model)))
    first.start()
    assert holding.wait(60)

    class Told(Console):
        def note(self, text: str) -> None:
            assert text == "waiting for another process that pulls fake-q4"
            waits.set()

    second = threading.Thread(target=lambda: found.append(pull(model, console=Told())))
    second.start()
    assert waits.wait(60)
    go_on.set()
    first.join()
    second.join()
    assert found == [model.place(cache_folder())] * 2 and found[0].read_bytes() == CONTENT and len(asked) == 1


@pytest.mark.parametrize("linked", [True, False])
def test_a_local_file_of_the_catalogue_is_kept(
    linked: bool, fake: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*places: object) -> None:
        raise OSError("another disk")

    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "downloaded.gguf"  # under any name
    file.write_bytes(CONTENT)
    for _ in range(2):
        assert main(["models", "add", str(file)]) == 0
        kept = Path(capsys.readouterr().out.strip())
        assert kept == fake.place(cache_folder()) and kept.read_bytes() == CONTENT and left(fake) == {"fake-q4"}
        assert os.path.samefile(kept, file) is linked
    assert pull(fake) == kept, "which asks no hub"


def test_a_local_file_that_is_another_is_refused(fake: KnownModel, tmp_path: Path) -> None:
    wrong, short, odd = (tmp_path / name for name in ("wrong.gguf", "fake.GGUF", "odd.gguf"))
    wrong.write_bytes(CONTENT[::-1])
    short.write_bytes(CONTENT[:-1])
    odd.write_bytes(b"GGUF")
    for file in (wrong, short):
        words = f"{file.name} has {file.stat().st_size} bytes and the sha256 [0-9a-f]+, fake-q4 has {len(CONTENT)} and"
        with pytest.raises(SemalignError, match=f"{words} .*: fetch it again from somebody/Fake-GGUF at aaa"):
            add(file)
    with pytest.raises(SemalignError, match="has the name or the size of no file in the catalogue: let the experiment"):
        add(odd)
    with pytest.raises(SemalignError, match="none is no file: give the path of a model file"):
        add(tmp_path / "none")
    assert left(fake) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["where", "qwen2.5-coder-0.5b-instruct-q4"], "did you mean qwen2.5-coder-0.5b-instruct-q4_k_m?"),
        (["pull", "smolm2-360m-instruct"], "did you mean smollm2-360m-instruct?"),
        (["pull", "Qwen/Qwen3-0.6"], "did you mean qwen3-0.6b?"),
        (["pull", "xyz"], "unknown model 'xyz': semalign models list shows those known"),
        (["pull"], "pull needs the name of a model"),
        (["add"], "add needs the path of a file"),
        (["list", "qwen3-8b"], "leave qwen3-8b out"),
    ],
)
def test_what_cannot_be_done_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_preset_of_files_is_that_of_checkpoints() -> None:
    files, checkpoints = (load_experiment(name) for name in ("qwen2.5-coder-gguf", "qwen2.5-coder"))
    same = {"name": "", "source": checkpoints.source, "target": checkpoints.target}
    assert files.model_copy(update=same) == checkpoints.model_copy(update=same)
    needs, others = estimate(files), estimate(checkpoints)
    assert needs.totals is not None and others.totals is not None
    assert needs.totals.download == 1_117_320_768 + 491_400_064
    assert needs.totals.model_copy(update={"download": 0}) == others.totals.model_copy(update={"download": 0})
    assert needs.source is not None and needs.source.licence == "Apache-2.0"


def test_a_model_that_is_not_here_is_told_before_the_rows_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("semalign_harness.run.inputs.read_rows", None)
    for role in ("source", "target"):
        assert main(["run", "tiny", f"{role}.path=catalogue:pythia-410m", "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert said == "semalign: pythia-410m is not here yet: semalign models pull pythia-410m\n"
    assert main(["doctor", "generated:tiny-source", "catalogue:pythia-410m"]) == 2
    assert "semalign models pull pythia-410m" in capsys.readouterr().err
    assert not any(cache_folder().glob("tiny-*")), "nothing is made before"


def test_a_pulled_file_is_known_by_its_hash(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fake_model()
    monkeypatch.setattr("semalign_harness.models.catalogue.known_models", lambda: {model.name: model})
    monkeypatch.setattr("semalign_harness.models.gguf._convert", lambda path, folder: shutil.copytree(pair[0], folder))
    path, settings = model.place(cache_folder()), ModelConfig(path="catalogue:fake-q4")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(
        SemalignError, match=r"has changed since it was pulled: rm -r .* && semalign models pull fake-q4"
    ):
        open_model(settings)
    path.write_bytes(CONTENT)
    notes: list[str] = []
    place = open_model(settings, note=notes.append).place
    assert len(notes) == 1 and Path(place).name.endswith(hashlib.sha256(CONTENT).hexdigest()[:16])
    monkeypatch.setattr("semalign_harness.models.opening.sha256_of", None)
    assert open_model(settings, note=notes.append).place == place and len(notes) == 1


def test_an_unknown_name_in_an_experiment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "source.path=catalogue:smollm2-135m-q4", "--dry-run"]) == 2
    assert "did you mean smollm2-135m-instruct" in capsys.readouterr().err
