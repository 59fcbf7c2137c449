"""A dry run refuses what the run refuses, in the same words, writes nothing, and says what it cannot check."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.models.opening import awaited
from semalign_harness.models.settings import ModelConfig
from semalign_harness.run.run_folder import claimed
from semalign_harness.util.cache import cache_folder


def everything(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def foreign_folder(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine", encoding="utf-8")
    return []


def other_experiment(folder: Path) -> list[str]:
    load_experiment("tiny").write(folder / "run" / "experiment.json")
    return []


def broken_rows(folder: Path) -> list[str]:
    (folder / "rows.jsonl").write_text("{not json}", encoding="utf-8")
    return [f"data.train.path={folder / 'rows.jsonl'}"]


def unusable_rows(folder: Path) -> list[str]:
    (folder / "rows.jsonl").write_text(json.dumps({"question": "1"}), encoding="utf-8")
    return [f"data.train.path={folder / 'rows.jsonl'}"]


Wrong = Callable[[Path], list[str]]
WRONG: dict[str, Wrong] = {
    "no data file": lambda folder: [f"data.train.path={folder / 'none.jsonl'}"],
    "no held-out file": lambda folder: [f"data.held_out.path={folder / 'none.jsonl'}"],
    "no target": lambda folder: [f"target.path={folder / 'none'}"],
    "no model": lambda folder: [f"source.path={folder}"],
    "no gguf": lambda folder: [f"source.path={folder / 'none.gguf'}"],
    "rows that are not JSON": broken_rows,
    "rows without a prompt": unusable_rows,
    "too few rows": lambda folder: ["data.train_rows=1000"],
    "rows that are too long": lambda folder: ["data.max_length=3"],
    "a layer too many": lambda folder: ["method.layers=[9]"],
    "a pairing of another depth": lambda folder: ["pairing.kind=manual", "pairing.layers=[1, 2]"],
    "an adapter without a module": lambda folder: ["method.trainable={kind: lora, modules: [none]}"],
    "a target in float16": lambda folder: ["target.dtype=float16"],
    "a folder with other files": foreign_folder,
    "a folder with another experiment": other_experiment,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_run_refuses_a_dry_run_refuses(
    wrong: str, tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", "tiny", *overrides, *WRONG[wrong](tmp_path), "--out", str(tmp_path / "run")]
    before = everything(tmp_path)
    assert main([*given, "--dry-run"]) == 2
    dry = capsys.readouterr()
    assert dry.out == "" and everything(tmp_path) == before
    assert main([*given, "--quiet"]) == 2
    assert capsys.readouterr().err == dry.err


def test_a_folder_in_use_and_a_run_of_other_rows_are_refused(
    tmp_path: Path,
    overrides: list[str],
    rows_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(rows_file.read_bytes())
    overrides = [*overrides, f"data.train.path={rows}"]
    dry = ["run", "tiny", *overrides, "--out", str(tmp_path / "run"), "--dry-run"]
    with claimed(tmp_path / "run", load_experiment("tiny", overrides=overrides)):
        assert main(dry) == 2
    assert "another process runs in" in capsys.readouterr().err

    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("semalign_harness.run.pipeline.source_stores", interrupted)
        assert main(dry[:-1]) == 130
    before = everything(tmp_path)
    assert main(dry) == 0
    rows.write_bytes(b"".join(reversed(rows_file.read_bytes().splitlines(keepends=True))))
    capsys.readouterr()
    assert main(dry) == 2
    message = capsys.readouterr().err
    assert f"the file {rows} changed from " in message
    rows.write_bytes(rows_file.read_bytes())
    assert [name for name, _ in everything(tmp_path)] == [name for name, _ in before]


def test_what_is_elsewhere_is_named_and_the_rest_is_checked(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    gguf = tmp_path / "source.gguf"
    gguf.write_bytes(b"weights")
    models = ["source.path=generated:tiny-source", f"target.path={gguf}"]
    held_out = ["data.held_out={path: some/data}", "device=cuda:77"]
    call = ["run", "tiny", *overrides, *models, "--dry-run", "--out", str(tmp_path / "run")]
    before = everything(tmp_path)
    assert main([*call, *held_out]) == 0
    out = capsys.readouterr().out
    for line in (
        "the source generated:tiny-source, which is generated on its first use",
        f"the target {gguf}, which is converted on its first use",
        "the held-out rows of some/data, which come from the hub",
        "the device: device 'cuda:77' cannot be used here",
    ):
        assert f"# not checked: {line}" in out
    assert main([*call, "source.path=nobody/nothing"]) == 0
    assert "the source nobody/nothing, which is not here, and the hub cannot be reached" in capsys.readouterr().out
    assert main([*call, f"data.train.path={tmp_path / 'none.jsonl'}"]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_the_hub_is_asked_for_names_that_are_not_in_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def info(self: object, path: str, **more: object) -> object:
        asked.append(path)
        if path.endswith("nothing"):
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        return path

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    found = [awaited(ModelConfig(path=path)) for path in ("some/nothing", "some/thing", "Qwen/Qwen2.5-0.5B")]
    assert found == [None, "comes from the hub", "comes from the hub"]
    assert "some/nothing" in asked and "some/thing" in asked


def test_models_that_are_made_already_are_checked(pair: tuple[Path, Path]) -> None:
    made = [ModelConfig(path="generated:tiny-source"), ModelConfig(path=str(pair[0])), ModelConfig(path="/none")]
    assert [awaited(each) for each in made] == ["is generated on its first use", None, None]
    assert not cache_folder().exists()


def test_a_dry_run_of_a_matrix_names_the_cells_that_would_be_refused(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from semalign_harness.run import dry_run

    read, calls = dry_run.read_inputs, []
    monkeypatch.setattr(dry_run, "read_inputs", lambda *given: calls.append(0) or read(*given))
    call = ["submit", "tiny", *overrides, "--over", "method.layers=[[9],[1],[2]]", "--over", "train.seed=0,1"]
    before = everything(tmp_path)
    assert main([*call, "--out", str(tmp_path / "matrix"), "--dry-run"]) == 2
    out = capsys.readouterr().out
    assert out.count("refused: layers are (9,), expected ascending numbers from 1 to 3") == 2
    assert out.count("not run") == 4 and everything(tmp_path) == before
    assert len(calls) == 3, "once for the cells that read the same, and once for each that is refused"
