"""The command, from a pair of models to a run folder; and every bad input: one sentence, exit code 2, nothing left."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from semalign_align import Supervision
from semalign_attribution import LayerPairing, LayerScores
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, LoadedModel, RunResult, load_model
from semalign_harness.cli.main import main
from semalign_harness.generation import Way
from semalign_harness.models.settings import ModelConfig
from semalign_harness.results.fidelity import RunFidelity
from semalign_harness.results.source_phase import SourcePhase
from semalign_harness.run import job, pipeline
from semalign_harness.run.pipeline import save_and_reload
from semalign_harness.util.console import Console
from semalign_train import StepRecord, TransferReport
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import tiny_model


def run(tmp_path: Path, overrides: list[str], *more: str) -> int:
    return main(["run", "tiny", *overrides, *more, "--out", str(tmp_path / "run")])


def test_a_run_fills_its_folder(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, overrides) == 0
    folder = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "target after" in printed and "KL to the source" in printed and str(folder) in printed
    for contract, name in (
        (Experiment, "experiment.json"),
        (LayerScores, "attribution.json"),
        (LayerPairing, "pairing.json"),
        (RunFidelity, "fidelity.json"),
        (TransferReport, "transfer.json"),
    ):
        contract.read(folder / name)
    phase = SourcePhase.read(folder / "supervision.json")
    assert len(Supervision.open(Path(phase.folder) / "supervision")) == phase.train_rows == 16
    steps = [StepRecord.model_validate_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(step.layer, step.step) for step in steps] == [(layer, step) for layer in (1, 2, 3) for step in (1, 2)]
    assert {"relation", "output"} == set(steps[0].losses) == set(steps[0].gradient_norms)
    trained = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = AutoModelForCausalLM.from_pretrained(overrides[1].partition("=")[2])
    changed = [n for n, p in trained.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])]
    assert changed and all(name.startswith("model.layers.") for name in changed)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "scratch files are gone"


@pytest.mark.parametrize("method", ["laten", "seeking"])
def test_methods_refuse_models_without_their_modules_before_any_work(
    method: str, tmp_path: Path, overrides: list[str], builder: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.build("mamba", tmp_path / "model")
    assert run(tmp_path, overrides, f"source.path={tmp_path / 'model'}", f"method.kind={method}") == 2
    printed = capsys.readouterr().err
    told = {
        "laten": "the source's layers have no linear module named gate_proj, up_proj, down_proj, v_proj, o_proj, which",
        "seeking": "the layers of source and target have no linear modules named alike, which",
    }
    assert f"{told[method]} method.kind={method} needs: choose" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["mamba", "gemma4_text"])
def test_other_families_can_run(family: str, tmp_path: Path, overrides: list[str], builder: ModuleType) -> None:
    """Without attention, or with heads that differ by layer."""
    builder.build(family, tmp_path / "model")
    models = [f"source.path={tmp_path / 'model'}", f"target.path={tmp_path / 'model'}"]
    assert run(tmp_path, overrides, *models, "--dry-run") == 0


def test_a_target_that_cannot_generate_is_refused_before_the_source_works(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = []
    real = job.load

    def noted(console: Console, label: str, *which: Any, **settings: Any) -> LoadedModel:
        labels.append(label)
        return real(console, label, *which, **settings)

    def refuse(model: object) -> Way:
        raise SemalignError("LlamaForCausalLM cannot generate")

    monkeypatch.setattr(job, "load", noted)
    monkeypatch.setattr("semalign_harness.models.loading.check_generation", refuse)
    assert run(tmp_path, overrides) == 2
    assert labels == ["target"] and "LlamaForCausalLM cannot generate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(tmp_path, overrides, "measure.answer_rows=0") == 0, "which generates nothing"


def test_the_peak_of_the_training_forgets_what_was_before(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = [9 * 10**9]
    monkeypatch.setattr("semalign_harness.run.pipeline.peak_memory", lambda device: peaks[-1])
    monkeypatch.setattr("semalign_harness.run.pipeline.forget_peak_memory", lambda device: peaks.append(10**9))
    assert run(tmp_path, overrides) == 0
    result = RunResult.read(tmp_path / "run" / "result.json")
    assert (result.peak_bytes, result.training_peak_bytes) == (9 * 10**9, 10**9)


def test_the_same_experiment_gives_the_same_target(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache" / name))  # nothing is shared
        assert main(["run", "tiny", *overrides, "--quiet", "--out", str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "more",
    [
        ["scorer.kind=ablation", "pairing.kind=nearest_critical", "transport.frame=cosine"],
        ["scorer.kind=similarity", "pairing.kind=similarity", "transport.frame=dual", "method.objective.kind=fisher"],
        ["transport.frame=none", "supervision.output.kind=final_hidden"],
        ["method.trainable.kind=lora", "method.trainable.rank=2", "method.objective.kind=cosine"],
        ["source.load_in_4bit=true", "live=true", "train.checkpoint_steps=1"],
        ["source.dtype=bfloat16", "target.dtype=bfloat16", "method.weights.output=0"],
        ["pairing.kind=manual", "pairing.layers=[1, 1, 4]", "method.layers=[2]", "method.weights.answer=1"],
        ["train.optimiser=muon", "method.train_final_norm=true", "train.weight_decay=0.1"],
    ],
)
def test_every_choice_runs(more: list[str], tmp_path: Path, overrides: list[str]) -> None:
    assert run(tmp_path, [*overrides, "measure.answer_rows=0", *more], "--quiet") == 0


def test_models_of_the_hub_are_known_by_their_commit(
    tmp_path: Path, overrides: list[str], pair: tuple[Path, Path]
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, folder in zip(("source", "target"), pair, strict=True):
        kept = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(folder, kept / "snapshots" / commit)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(commit, encoding="utf-8")
    settings = [*overrides, "source.path=someone/source", "target.path=someone/target"]
    command = [sys.executable, "-m", "semalign_harness", "run", "tiny", *settings, "--out", str(tmp_path / "run")]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert found["models"] == [f"hub:someone/{name}@{commit}" for name in ("source", "target")]


def test_a_deeper_target_shares_source_layers(tmp_path: Path, overrides: list[str], pair: tuple[Path, Path]) -> None:
    swapped = [f"source.path={pair[1]}", f"target.path={pair[0]}"]
    assert run(tmp_path, [*overrides, *swapped], "--quiet") == 0
    assert LayerPairing.read(tmp_path / "run" / "pairing.json").target_depth == 4


def test_a_dry_run_names_an_unknown_tracker(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, overrides, "--dry-run", "--track", "foo") == 2
    captured = capsys.readouterr()
    assert "foo" in captured.err and not captured.out


def test_dry_run_runs_nothing(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, overrides, "--dry-run") == 0
    assert "train by semalign (6 steps, 3 passes)" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert run(tmp_path, overrides, "method.kind=kd", "--dry-run") == 0
    assert "train by kd (6 steps, 3 passes)" in capsys.readouterr().out


def test_a_dry_run_tells_which_answers_are_written_first(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    by = ["data.train_rows=16", "data.held_out_rows=8", "data.writing.max_new_tokens=24", "data.answers=target"]
    assert run(tmp_path, overrides, *by, "--dry-run") == 0
    assert "# plan: first the target writes answers to 16 training rows, of at most 24" in capsys.readouterr().out
    assert run(tmp_path, overrides, *by, "data.held_out_answers=target", "--dry-run") == 0
    assert "the target writes answers to 16 training rows and 8 held-out rows, of" in capsys.readouterr().out
    assert run(tmp_path, overrides, *by, "data.held_out_answers=source", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.index("source writes answers to 8 held-out") < printed.index("target writes answers to 16 training")
    assert run(tmp_path, overrides, "--dry-run") == 0
    assert "writes answers" not in capsys.readouterr().out


def refused(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert run(tmp_path, [*overrides, *more]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("semalign: ")]
    assert len(lines) == 1 and captured.out == "" and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists(), "nothing is left behind"
    return lines[0]


def test_bad_rows_are_one_sentence(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    data = f"data.train.path={file}"
    # Rows are read first: nobody waits for a model to be fetched or converted to hear of a wrong path.
    assert "rows.jsonl does not exist" in refused(tmp_path, overrides, capsys, data, f"source.path={tmp_path}/away")
    (tmp_path / "none").mkdir()
    assert "no rows that can be read" in refused(tmp_path, overrides, capsys, f"data.train.path={tmp_path / 'none'}")
    file.write_text("", encoding="utf-8")
    assert "holds no rows" in refused(tmp_path, overrides, capsys, data)
    file.write_text('{"prompt": "a", "completion": ""}\n' * 60, encoding="utf-8")
    assert "no answer" in refused(tmp_path, overrides, capsys, data)
    assert "data.max_length=4" in refused(tmp_path, overrides, capsys, "data.max_length=4")


def test_bad_settings_are_one_sentence(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'learning_rate'" in refused(tmp_path, overrides, capsys, "train.lerning_rate=1")
    assert "expected ascending numbers" in refused(tmp_path, overrides, capsys, "method.layers=[9]")
    assert "every weight of the loss is 0" in refused(
        tmp_path, overrides, capsys, "method.weights.output=0", "method.weights.geometry=0"
    )
    exact = "supervision.output.kind=final_hidden"
    assert "needs supervision by top entries" in refused(
        tmp_path, overrides, capsys, "method.divergence=reverse", exact
    )
    assert "has no value on held-out rows" in refused(
        tmp_path, overrides, capsys, "method.divergence=reverse", "method.rollback=0.1"
    )
    assert "critical_layer_only may leave out" in refused(
        tmp_path, overrides, capsys, "method.critical_layer_only=true", "method.train_final_norm=true"
    )
    assert "cannot be in 4 bits" in refused(tmp_path, overrides, capsys, "target.load_in_4bit=true")
    assert "device 'cuba'" in refused(tmp_path, overrides, capsys, "device=cuba")
    assert main(["run", "nonsense"]) == 2
    assert "neither a pair" in capsys.readouterr().err
    assert main(["run"]) == 2
    assert "tiny" in capsys.readouterr().err


def test_settings_that_do_not_fit_the_pair_are_told_before_weights_are_read(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semalign_harness.run.inputs.load_model", None)
    assert "names 2 source layers for 3" in refused(
        tmp_path, overrides, capsys, "pairing.kind=manual", "pairing.layers=[1, 2]"
    )
    assert "compares vectors of one width, the source has" in refused(
        tmp_path, overrides, capsys, "method.objective.kind=fisher", "transport.frame=none"
    )
    adapters = "{kind: lora, modules: [fc1]}"
    assert "named fc1: method.trainable.modules can name down_proj, gate_proj" in refused(
        tmp_path, overrides, capsys, f"method.trainable={adapters}"
    )
    assert "named fc1: method.trainable.modules can name down_proj, gate_proj" in refused(
        tmp_path, overrides, capsys, f"method={{kind: kd, trainable: {adapters}}}"
    )
    assert "target.dtype=bfloat16" in refused(tmp_path, overrides, capsys, "target.dtype=float16")


def test_bad_models_are_one_sentence(
    tmp_path: Path, overrides: list[str], pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(tmp_path, overrides, capsys, f"source.path={tmp_path}/none")
    other = tmp_path / "other"
    shutil.copytree(pair[0], other)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["model"]["vocab"] = {t: (i + 7) % len(data["model"]["vocab"]) for t, i in data["model"]["vocab"].items()}
    data["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(data), encoding="utf-8")
    assert "do not give the text back" in refused(tmp_path, overrides, capsys, f"source.path={other}")


def test_models_that_cannot_be_trained_are_refused_before_weights_are_read(
    tmp_path: Path,
    overrides: list[str],
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("semalign_harness.run.inputs.load_model", None)
    for role, folder in zip(("source", "target"), pair, strict=True):
        shutil.copytree(folder, tmp_path / role)
    file = tmp_path / "target" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}), encoding="utf-8")
    told = refused(tmp_path, overrides, capsys, f"target.path={tmp_path / 'target'}")
    assert "target is stored quantised (fp8), and the target trains: choose its checkpoint in bfloat16" in told

    rows = tmp_path / "rows.jsonl"
    texts = [f"{i} How many gherkins now ?" for i in range(60)]
    rows.write_text("".join(json.dumps({"prompt": t, "completion": "The answer is 7"}) + "\n" for t in texts))
    file.write_text(json.dumps({**config, "vocab_size": 310}), encoding="utf-8")
    for role in ("source", "target"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / role)
        tokenizer.add_tokens(["gherkins"])
        tokenizer.save_pretrained(tmp_path / role)
    both = [f"{role}.path={tmp_path / role}" for role in ("source", "target")]
    told = refused(tmp_path, overrides, capsys, *both, f"data.train.path={rows}")
    assert f"the rows use 'gherkins', entry 310 of the target's tokenizer, but {tmp_path / 'target'} has emb" in told
    assert "embeddings for 310 entries only: choose the tokenizer that it was trained with" in told


def test_a_taken_folder_is_refused(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious", encoding="utf-8")
    assert run(tmp_path, overrides) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_folder_of_the_users_stays(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    for wrong in ("data.train.path=nowhere.jsonl", "method.layers=[9]"):
        assert run(tmp_path, [*overrides, wrong]) == 2
        assert not list((tmp_path / "run").iterdir()), "it is empty again"


@pytest.mark.parametrize("command", ["run tiny", "compare tiny", "evaluate m", "report r", "doctor a b"])
def test_an_empty_out_is_one_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--out", ""]) == 2
    assert capsys.readouterr().err == "semalign: --out is empty: name a place, or leave it out\n"


@pytest.mark.parametrize("days", ["-5", "nan", "inf"])
def test_days_that_are_none_prune_nothing(
    days: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("semalign_harness.run.phase_store.prune", lambda **_: pytest.fail("pruned"))
    assert main(["store", "prune", "--unused-for", days]) == 2
    assert f"--unused-for {days}: expected a number of days, 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (".", "models-Llama-3.2-1B"),
        ("./", "models-Llama-3.2-1B"),
        ("../Llama-3.2-1B", "models-Llama-3.2-1B"),
        ("meta-llama/Llama-3.2-1B", "meta-llama-Llama-3.2-1B"),
        ("runs/tiny/model", "tiny-model"),
        ("target-1.5.GGUF", "target-1.5"),
        ("/target", "target"),
    ],
)
def test_evaluations_are_named_by_their_model(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models" / "Llama-3.2-1B"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    folders: list[Path] = []
    monkeypatch.setattr("semalign_harness.evaluation.evaluate", lambda config, folder, console: folders.append(folder))
    assert main(["evaluate", model, "--tasks", "gsm8k"]) == 0
    assert folders == [Path("evaluations") / name]


def test_a_dry_run_counts_the_passes_of_whole_steps(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["train.steps=null", "train.passes=1", "train.batch_size=3", "--dry-run"]
    assert run(tmp_path, overrides, *more) == 0
    assert "(6 steps, 1.12 passes)" in capsys.readouterr().out, "6 steps with 3 of 16 rows"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence(
    number: int,
    tmp_path: Path,
    overrides: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(number, os.strerror(number), "shard-000-00000.safetensors")

    monkeypatch.setattr("semalign_align._supervise.save_tensors", full)
    assert run(tmp_path, overrides) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_one_sentence(
    reason: int,
    tmp_path: Path,
    overrides: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError(reason, os.strerror(reason), str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run(tmp_path, overrides) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'run'} cannot be written to" in told and "--out" in told and "SEMALIGN_CACHE" in told


def test_a_model_that_does_not_survive_saving_is_an_error(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(ModelConfig(path=str(pair[1])))
    other = tiny_model("llama", seed=9, depth=3, width=24, vocabulary=320)
    monkeypatch.setattr(pipeline.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: other)
    with pytest.raises(SemalignError, match="computes other logits"):
        save_and_reload(loaded, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_named_as_such(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    loaded = load_model(ModelConfig(path=str(pair[1])))
    next(loaded.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(SemalignError, match="not finite after training; nothing was kept, lower the learning rate"):
        save_and_reload(loaded, tmp_path / "model")
    assert not (tmp_path / "model").exists()
