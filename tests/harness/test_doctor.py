"""Trouble with a pair is named before a run, with the remedy, and without reading any weights that are not needed."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from semalign_attribution import DecoderView, LayerPairing, supervised
from semalign_geometry import (
    FidelityReport,
    LayerFidelity,
    PairedResiduals,
    SemanticBasis,
    fit_transport,
    measure_fidelity,
)
from semalign_geometry.base import SemalignError
from semalign_harness import build_tokenizer, load_experiment, load_model, run_experiment
from semalign_harness.cli.main import main
from semalign_harness.data.encoding import TextEncoder
from semalign_harness.data.rows import batches, encode_rows, load_rows, read_rows, split_rows
from semalign_harness.data.settings import RowsConfig
from semalign_harness.doctor import Diagnosis, Finding, diagnosis_text
from semalign_harness.doctor import _deep as deep
from semalign_harness.doctor import _heads as heads
from semalign_harness.doctor import _machine as machine
from semalign_harness.experiment import Experiment
from semalign_harness.generation import Way
from semalign_harness.models.opening import open_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.report.plots import draw_similarity, standalone
from semalign_harness.run.checks import Pair
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.models import ARCHITECTURES, tiny_model

from ..components import bring
from .external.semalign_example import BETWEEN

Doctor = Callable[..., Diagnosis]
SETTINGS = ("data.train_rows=16", "data.held_out_rows=8", "data.max_length=64")
"""Enough for the sixty rows."""


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr("semalign_harness.run.inputs.load_model", refuse)
    monkeypatch.setattr("semalign_harness.models.loading.load_model", refuse)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """The command, whose JSON is read back and whose exit code is checked against what it says."""

    def run(source: Path | str, target: Path | str, *more: str | Path) -> Diagnosis:
        code = main(["doctor", str(source), str(target), "--json", *map(str, more)])
        printed = capsys.readouterr().out
        diagnosis = Diagnosis.parse(json.loads(printed))
        assert json.loads(diagnosis.model_dump_json()) == json.loads(printed)
        assert code == (0 if diagnosis.is_usable else 1)
        return diagnosis

    return run


@pytest.fixture
def other(pair: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """A copy of the target that a test may spoil."""
    yield Path(shutil.copytree(pair[1], tmp_path / "other"))


def of(diagnosis: Diagnosis, check: str) -> Finding:
    """The gravest finding of a check."""
    order = ("ok", "warning", "error")
    return max((f for f in diagnosis.findings if f.check == check), key=lambda finding: order.index(finding.level))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def resave(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def test_a_good_pair_has_no_findings(
    pair: tuple[Path, Path], rows_file: Path, doctor: Doctor, no_weights: None
) -> None:
    diagnosis = doctor(*pair, "--data", rows_file, *SETTINGS)
    assert {finding.level for finding in diagnosis.findings} == {"ok"}
    checks = [finding.check for finding in diagnosis.findings]
    assert checks == [
        *("source", "target", "embeddings", "logits", "attention", "depth", "width", "dtype", "tokenizers"),
        *("special tokens", "chat template", "rows", "source head", "target head", "memory", "disk"),
    ]
    assert "310 entries shared" in of(diagnosis, "tokenizers").message
    assert "10 rows of the source's head and 10 of the target's are padding" in of(diagnosis, "tokenizers").message
    assert of(diagnosis, "rows").message.startswith("16 training rows (")
    assert of(diagnosis, "attention").message.startswith("source 4 heads grouped on 2 of keys and values, target 4")
    assert (diagnosis.fidelity, diagnosis.similarity, diagnosis.pairing) == ((), (), None)


def test_what_the_doctor_accepts_runs(
    pair: tuple[Path, Path], rows_file: Path, overrides: list[str], doctor: Doctor, tmp_path: Path
) -> None:
    settings = [each for each in overrides if not each.startswith(("source.", "data.train.path"))]
    assert doctor(*pair, "--data", rows_file, *settings).is_usable
    run_experiment(load_experiment("tiny", overrides=overrides), tmp_path / "run")


def test_heads_may_be_padded_differently(pair: tuple[Path, Path], tmp_path: Path, doctor: Doctor) -> None:
    tiny_model("llama", seed=3, depth=3, width=24, vocabulary=352).save_pretrained(tmp_path / "wide")
    build_tokenizer().save_pretrained(tmp_path / "wide")
    found = of(doctor(pair[0], tmp_path / "wide"), "tokenizers")
    assert found.level == "ok" and "10 rows of the source's head and 42 of the target's are padding" in found.message


def test_fillers_of_padded_rows_are_no_entries(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    resave(other, lambda tokenizer: tokenizer.add_tokens([f"[PAD{i}]" for i in range(310, 320)]))
    found = of(doctor(pair[0], other), "tokenizers")
    assert found.level == "ok" and "0 only in the target; 10 rows" in found.message


def test_with_other_ids_each_model_reads_rows_by_its_own(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    def swap(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        for first, second in (("▁apples", "▁answer"), ("▁bags", "▁bells"), ("▁cups", "▁coins")):
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(other / "tokenizer.json", swap)
    found = of(doctor(pair[0], other), "tokenizers")
    assert found.level == "ok" and "304 entries have equal bytes, all fall into 306 classes" in found.message


def test_entries_of_one_side_matter_only_when_rows_use_them(
    pair: tuple[Path, Path], other: Path, rows_file: Path, doctor: Doctor, tmp_path: Path
) -> None:
    resave(other, lambda tokenizer: tokenizer.add_tokens(["gherkins"]))
    blind = of(doctor(pair[0], other), "tokenizers")
    assert blind.level == "warning" and "('gherkins' of the target)" in blind.message and "--data" in str(blind.remedy)
    seen = doctor(pair[0], other, "--data", rows_file, *SETTINGS)
    assert of(seen, "tokenizers").level == "ok" and of(seen, "rows").level == "ok"

    names = ["apples"] * 8 + ["gherkins"] * 22  # more than the texts that both tokenizers are tried on
    rows = [{"prompt": f"{i} How many {name} now ?", "completion": "The answer is 7"} for i, name in enumerate(names)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    used = of(doctor(pair[0], other, "--data", tmp_path / "rows.jsonl", *SETTINGS), "rows")
    assert used.level == "error" and "22 are different texts to both models" in used.message
    source = Path(shutil.copytree(pair[0], tmp_path / "knows too"))
    resave(source, lambda tokenizer: tokenizer.add_tokens(["gherkins"]))
    edit(other / "config.json", lambda data: data.update(vocab_size=310))
    used = of(doctor(source, other, "--data", tmp_path / "rows.jsonl", *SETTINGS), "rows")
    assert used.level == "error" and used.message.endswith(f"but {other} has embeddings for 310 entries only")


def test_targets_that_are_quantised_are_refused(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    edit(other / "config.json", lambda data: data.update(quantization_config={"quant_method": "awq", "bits": 4}))
    found = of(doctor(pair[0], other), "target")
    assert found.level == "error" and "is stored quantised (awq), and the target trains" in found.message


def test_adapters_that_were_not_merged_are_refused(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 24)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = of(doctor(pair[0], other), "target checkpoint")
    assert found.level == "error" and "(model.layers.0.self_attn.q_proj.lora_A.weight)" in found.message
    assert str(found.remedy).startswith("merge it into the weights with peft's merge_and_unload()")


def test_folders_with_code_are_refused(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    (other / "own.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    edit(other / "config.json", lambda data: data.update(model_type="own", auto_map={"AutoConfig": "own.Own"}))
    found = of(doctor(pair[0], other), "target")
    assert found.level == "error" and "needs Python code that comes with it, which is never run here" in found.message


def lower(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = Lowercase()


def test_rows_that_are_split_differently(
    pair: tuple[Path, Path], tmp_path: Path, rows_file: Path, doctor: Doctor
) -> None:
    source = Path(shutil.copytree(pair[0], tmp_path / "lower"))
    resave(source, lower)
    found = of(doctor(source, pair[1], "--data", rows_file, *SETTINGS), "tokenizers")
    assert found.level == "error" and "its Lowercase changes the text" in found.message


def test_texts_that_are_split_differently(
    pair: tuple[Path, Path], other: Path, rows_file: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    resave(other, lower)
    assert of(doctor(pair[0], other), "tokenizers").level == "ok", "the tiny tokenizer knows no word of the probes"
    found = of(doctor(pair[0], other, "--data", rows_file, *SETTINGS), "tokenizers")
    assert found.level == "warning" and "differently" in found.message, "what the target decodes hides it"
    monkeypatch.setattr("semalign_harness.run.checks.PROBES", ["Ada has 7 apples ."])
    found = of(doctor(pair[0], other), "tokenizers")
    assert found.level == "warning" and "split 'Ada has 7 apples .' differently" in found.message


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"eos_token": None}, "warning", "no end of sequence"),
        ({"eos_token": "<pad>"}, "warning", "EOS differ"),
        ({"bos_token": "<unk>"}, "ok", "rows do not begin with BOS"),
        ({"bos_token": "<unk>", "eos_token": "<pad>"}, "warning", "EOS differ"),
        ({"pad_token": "<eos>"}, "ok", "masked"),
    ],
)
def test_special_tokens(
    pair: tuple[Path, Path], other: Path, doctor: Doctor, change: dict[str, str | None], level: str, words: str
) -> None:
    edit(other / "tokenizer_config.json", lambda data: data.update(change))
    found = of(doctor(pair[0], other), "special tokens")
    assert found.level == level and words in found.message


def test_beginnings_matter_where_rows_have_one(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    def begin(tokenizer: Any) -> None:
        ids = [("<unk>", tokenizer.convert_tokens_to_ids("<unk>"))]
        tokenizer.bos_token, tokenizer.chat_template = "<unk>", None
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=ids)

    resave(other, begin)
    found = of(doctor(pair[0], other), "special tokens")
    assert found.level == "warning" and found.message.startswith("BOS differ")
    resave(other, lambda tokenizer: setattr(tokenizer, "chat_template", PLAIN))
    assert of(doctor(pair[0], other), "special tokens").level == "ok", "the template writes what rows begin with"


PLAIN = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


@pytest.mark.parametrize(
    ("ours", "theirs", "level", "words"),
    [
        (None, None, "ok", "neither model has one"),
        (None, PLAIN, "warning", "only the target has one"),
        (PLAIN, None, "warning", "only the source has one"),
        (PLAIN, PLAIN, "ok", "the same in both"),
        (PLAIN, PLAIN.replace("' '", '" "'), "ok", "not the same text"),
        (PLAIN, PLAIN.replace("' '", "'!'"), "warning", "differently"),
        ("{{ raise_exception('never') }}", PLAIN, "warning", "the source's template refuses"),
        (PLAIN, "{{ raise_exception('never') }}", "warning", "the chat template refuses"),
    ],
)
def test_chat_templates(
    pair: tuple[Path, Path], other: Path, tmp_path: Path, doctor: Doctor, ours: str, theirs: str, level: str, words: str
) -> None:
    source = Path(shutil.copytree(pair[0], tmp_path / "templated source"))
    for folder, template in ((source, ours), (other, theirs)):
        resave(folder, lambda tokenizer, template=template: setattr(tokenizer, "chat_template", template))
    found = of(doctor(source, other), "chat template")
    assert found.level == level and words in found.message


def test_a_target_that_is_larger_than_its_source(pair: tuple[Path, Path], doctor: Doctor, rows_file: Path) -> None:
    source, target = pair
    diagnosis = doctor(target, source)
    assert of(diagnosis, "sizes").remedy == f"semalign doctor {source} {target}"
    depth = of(diagnosis, "depth")
    assert depth.level == "warning" and "3 → 4 layers" in depth.message
    assert str(depth.remedy).startswith("'method.layers=[2,3,4]'")
    assert doctor(target, source, "method.layers=[2,3,4]").is_usable


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method.layers=[7]"], "(7,), expected ascending numbers from 1 to 3"),
        (["pairing.kind=manual", "pairing.layers=[1,2]"], "names 2 source layers for 3 target layers"),
        (["pairing.kind=manual", "pairing.layers=[1,2,5]"], "target layer 3 has source layer 5, expected 1 to 4"),
        (["method.objective.kind=cosine", "transport.frame=none"], "the source has 40 and the target 24"),
    ],
)
def test_settings_that_do_not_fit_the_pair_are_errors(
    settings: list[str], words: str, pair: tuple[Path, Path], doctor: Doctor
) -> None:
    found = of(doctor(*pair, *settings), "settings")
    assert found.level == "error" and words in found.message


def test_an_objective_that_is_not_used_may_be_any(pair: tuple[Path, Path], doctor: Doctor) -> None:
    more = ("method.objective.kind=cosine", "transport.frame=none", "method.weights.geometry=0")
    assert doctor(*pair, *more).is_usable


def test_float16_targets_are_refused(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    found = of(doctor(*pair, "target.dtype=float16"), "dtype")
    assert found.level == "error" and found.remedy == "target.dtype=bfloat16"
    assert of(doctor(*pair, "target.dtype=bfloat16"), "dtype").level == "ok"
    edit(other / "config.json", lambda data: data.update(dtype="float16"))
    found = of(doctor(pair[0], other), "dtype")
    assert found.level in ("warning", "error") and found.remedy == "target.dtype=bfloat16"
    assert of(doctor(pair[0], other, "target.dtype=bfloat16"), "dtype").level == "ok"


@pytest.mark.parametrize(
    ("settings", "level", "remedy"),
    [
        (("data.max_length=44",), "ok", None),
        (("data.max_length=40",), "warning", "data.max_length="),
        (("data.max_length=8",), "error", "raise data.max_length"),
        (("data.max_length=64", "data.train_rows=200"), "error", "lower data.train_rows"),
    ],
)
def test_rows_are_measured(
    pair: tuple[Path, Path],
    rows_file: Path,
    doctor: Doctor,
    settings: tuple[str, ...],
    level: str,
    remedy: str | None,
) -> None:
    given = (*pair, "--data", rows_file, "data.train_rows=20", "data.held_out_rows=8", *settings)
    found = of(doctor(*given), "rows")
    assert found.level == level and str(found.remedy).startswith(str(remedy))
    if level == "warning":
        assert of(doctor(*given, str(found.remedy)), "rows").level == "ok"


def test_rows_are_held_against_positions(pair: tuple[Path, Path], other: Path, rows_file: Path, doctor: Doctor) -> None:
    assert of(doctor(*pair, "data.max_length=512"), "rows").remedy == "data.max_length=128"
    edit(other / "config.json", lambda data: data.update(max_position_embeddings=41))
    few = ("data.train_rows=30", "data.held_out_rows=8", "data.max_length=64")
    found = of(doctor(pair[0], other, "--data", rows_file, *few), "rows")
    assert found.level == "error" and found.remedy == "data.max_length=41"
    cured = of(doctor(pair[0], other, "--data", rows_file, *few, "data.max_length=41"), "rows")
    assert cured.level == "warning" and cured.remedy == "shorter rows, or models that read longer ones"


def test_prompts_leave_room_for_what_is_generated(pair: tuple[Path, Path], rows_file: Path, doctor: Doctor) -> None:
    asked = ("--data", rows_file, *SETTINGS, "measure.answer_rows=4", "measure.max_new_tokens=120")
    found = of(doctor(*pair, *asked), "rows")
    assert found.level == "error" and "reads at most 128" in found.message
    assert of(doctor(*pair, *asked, str(found.remedy)), "rows").level == "ok"


def test_keys_that_the_template_never_reads_are_told(pair: tuple[Path, Path], tmp_path: Path, doctor: Doctor) -> None:
    turns = [{"role": "user", "content": "How many ?", "name": "Ada"}, {"role": "assistant", "content": "7"}]
    rows = [{"messages": [{**turns[0], "content": f"How many {i} ?"}, turns[1]]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = of(doctor(*pair, "--data", tmp_path / "rows.jsonl", *SETTINGS), "rows")
    assert found.level == "warning"
    assert found.message == "the chat template never reads name (24 rows), left out of prompts and answers"


def test_fields_of_the_rows_are_settings(pair: tuple[Path, Path], tmp_path: Path, doctor: Doctor) -> None:
    rows = [{"question": f"How many {i} ?", "reply": f"The answer is {i}"} for i in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    named = ("data.train.prompt=question", "data.train.completion=reply", *SETTINGS)
    for given in (("--data", file), (f"data.train.path={file}",)):
        assert "16 training rows" in of(doctor(*pair, *given, *named), "rows").message
    found = of(doctor(*pair, "--data", file, *SETTINGS), "rows")
    assert found.level == "error" and "data.train.prompt" in str(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_read_without_its_weights(
    architecture: str, tmp_path: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, depth, width in (("source", 4, 40), ("target", 2, 24)):
        tiny_model(architecture, seed=depth, depth=depth, width=width, vocabulary=320).save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    read: list[str] = []

    class Recorder:
        def __init__(self, file: Path, framework: str) -> None:
            self.opened = safe_open(file, framework)

        def __enter__(self) -> Any:
            file = self.opened.__enter__()

            def get_tensor(name: str) -> torch.Tensor:
                read.append(name)
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor

            return SimpleNamespace(keys=file.keys, get_slice=file.get_slice, get_tensor=get_tensor)

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

    monkeypatch.setattr(heads, "safe_open", Recorder)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    diagnosis = doctor(tmp_path / "source", tmp_path / "target", "data.max_length=64")
    assert diagnosis.is_usable and len(read) == 2, "one tensor of each model"
    assert "rank 40 of 40" in of(diagnosis, "source head").message
    assert "rank 24 of 24" in of(diagnosis, "target head").message
    assert ("soft-cap 3" in of(diagnosis, "logits").message) == architecture.startswith("gemma")
    assert ("grouped" in of(diagnosis, "attention").message) == (architecture not in ("gpt2", "pythia", "opt"))


def test_the_condition_number_is_that_of_the_basis(pair: tuple[Path, Path], doctor: Doctor) -> None:
    weight = AutoModelForCausalLM.from_pretrained(pair[1]).get_output_embeddings().weight.detach()
    exact = SemanticBasis.from_head(weight, entries=torch.arange(310)).manifest.condition
    assert f"condition number of WᵀW about {exact:.1e} over 310 entries" in of(doctor(*pair), "target head").message


def test_some_rows_of_a_head_tell_its_rank(
    pair: tuple[Path, Path], other: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "FEW", 1)
    found = of(doctor(*pair), "target head")
    assert found.level == "ok" and "rank 24 of 24" in found.message and "over 104 of 310 entries" in found.message

    def thin_out(weight: torch.Tensor) -> None:
        weight[:, 23] = weight[:, 22]
        weight[1::3, 23] *= 2  # only rows that a third of them does not hold tell the last two columns apart

    rewrite_head(other, thin_out)
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "ok" and "rank 24 of 24" in found.message and "over 310 entries" in found.message


def rewrite_head(folder: Path, change: Callable[[torch.Tensor], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_of_lower_rank_is_told(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    rewrite_head(other, lambda weight: weight[:, 20:].zero_())
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "warning" and "rank 20 of 24" in found.message and "transport.frame=none" in str(found.remedy)


def test_a_head_with_nearly_dependent_columns_is_told(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    def bring_close(weight: torch.Tensor) -> None:
        weight[:, 23] = weight[:, 22] + 1e-5 * weight[:, 23]

    rewrite_head(other, bring_close)
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "warning" and "rank 24 of 24" in found.message
    assert "rounding changes a transport by one part in" in found.message
    assert "transport.frame=cosine" in str(found.remedy)


def test_damaged_checkpoints_are_told(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    rewrite_head(other, lambda weight: weight[5].fill_(float("nan")))
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "error" and "not finite" in found.message
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "error" and "cannot be read" in found.message and str(other) in str(found.remedy)


def test_heads_in_shards(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    whole = of(doctor(*pair), "target head").message
    model = AutoModelForCausalLM.from_pretrained(other)
    (other / "model.safetensors").unlink()
    model.save_pretrained(other, max_shard_size="30KB")
    assert len(list(other.glob("model-*.safetensors"))) > 2
    assert of(doctor(pair[0], other), "target head").message == whole
    next(other.glob("model-*.safetensors")).unlink()
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "error" and "is missing" in found.message


def test_heads_that_cannot_be_read_alone_are_noted(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    tensors = load_file(other / "model.safetensors")
    save_file({f"text.{name}": tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    assert "rank 24 of 24" in of(doctor(pair[0], other), "target head").message, "other prefixes are known"
    save_file({"quantised": torch.zeros(3)}, other / "model.safetensors")
    found = of(doctor(pair[0], other), "target head")
    assert found.level == "ok" and "not measured: the checkpoint has no tensor lm_head.weight" in found.message
    (other / "model.safetensors").unlink()
    assert (
        "not measured: the checkpoint is not in safetensors files" in of(doctor(pair[0], other), "target head").message
    )


def test_heads_of_hub_models_are_read_when_they_are_here(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_model(ModelConfig(path=str(pair[0])))
    hub = replace(found, place="somebody/source", commit="5e")
    experiment = load_experiment("tiny")
    pair_of = Pair.of(experiment, hub, found)
    here = {"model.safetensors": pair[0] / "model.safetensors"}

    def cached(place: str, name: str, *, revision: str, local_files_only: bool) -> str:
        assert (place, revision, local_files_only) == ("somebody/source", "5e", True), "nothing is downloaded"
        if name not in here:
            raise OSError(f"{name} is not here")
        return str(here[name])

    monkeypatch.setattr(heads, "cached_file", cached)
    assert "rank 40 of 40" in heads.check_head("source", hub, pair_of).message
    here.clear()
    told = "not measured: the checkpoint is not downloaded yet"
    assert heads.check_head("source", hub, pair_of).message == told


@pytest.mark.parametrize(
    ("free", "whole", "level"), [(10**6, 10**12, "warning"), (10**6, 10**5, "error"), (10**12, 10**12, "ok")]
)
def test_memory(
    pair: tuple[Path, Path], doctor: Doctor, monkeypatch: pytest.MonkeyPatch, free: int, whole: int, level: str
) -> None:
    monkeypatch.setattr(machine, "_memory_of", lambda device: (free, whole))
    assert of(doctor(*pair), "memory").level == level


@pytest.mark.parametrize("setting", ["batch_size=1024", "train.batch_size=1024"])
def test_the_remedy_for_memory_is_enough(
    pair: tuple[Path, Path], doctor: Doctor, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    settings = ("data.max_length=128", "data.attribution_rows=1024", setting)
    if setting.startswith("train"):
        settings += ("train.micro_batch_size=1024",)
    monkeypatch.setattr(machine, "_memory_of", lambda device: (10**8, 10**12))
    found = of(doctor(*pair, *settings), "memory")
    assert found.level == "warning" and str(found.remedy).endswith("batch_size=1")
    assert of(doctor(*pair, *settings, str(found.remedy)), "memory").level == "ok"


def test_memory_is_for_the_longest_row_of_a_run(pair: tuple[Path, Path], rows_file: Path, doctor: Doctor) -> None:
    seen = encode_rows(load_rows(RowsConfig(path=str(rows_file))), load_model(ModelConfig(path=str(pair[1]))).tokenizer)
    all_rows = ("data.train_rows=52", "data.held_out_rows=8", "data.max_length=64")
    found = of(doctor(*pair, "--data", rows_file, *all_rows), "memory")
    assert f"for rows of {max(map(len, seen))} tokens" in found.message


def test_disk(pair: tuple[Path, Path], doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    enough = of(doctor(*pair), "disk")
    assert enough.level == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    found = of(doctor(*pair), "disk")
    assert found.level == "warning" and "SEMALIGN_CACHE" in str(found.remedy)
    assert "none of supervision" not in found.message
    live = of(doctor(*pair, "live=true"), "disk").message
    assert live.partition(" of supervision")[0] != found.message.partition(" of supervision")[0]


def test_a_row_is_named_as_a_run_names_it(pair: tuple[Path, Path], tmp_path: Path, doctor: Doctor) -> None:
    rows = [{"prompt": f"question {i}", "completion": "" if i == 7 else "yes"} for i in range(1, 10)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = of(doctor(*pair, "--data", file, *SETTINGS), "rows")
    told = f"row 7 of {file} has no answer or prompt: its field 'completion' is empty"
    assert (found.level, found.message) == ("error", told)


@pytest.mark.parametrize("family", ["mamba", "gemma4_text"])
def test_pairs_of_other_families_are_usable(
    family: str, tmp_path: Path, rows_file: Path, doctor: Doctor, builder: ModuleType
) -> None:
    builder.build(family, tmp_path / "model")
    diagnosis = doctor(tmp_path / "model", tmp_path / "model", "--data", rows_file, *SETTINGS)
    words = {"mamba": "source no heads, target no heads", "gemma4_text": "source 4 heads grouped on 2 of keys"}
    assert words[family] in of(diagnosis, "attention").message


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel, T5ForConditionalGeneration])
def test_models_of_another_kind_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, doctor: Doctor, kind: Any, no_weights: None
) -> None:
    config = (
        T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        if kind is T5ForConditionalGeneration
        else BertConfig(
            vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )
    kind(config).save_pretrained(tmp_path / "encoder")
    build_tokenizer().save_pretrained(tmp_path / "encoder")
    diagnosis = doctor(tmp_path / "encoder", pair[1])
    assert [finding.check for finding in diagnosis.findings] == ["source"]
    assert "decoder-only" in str(diagnosis.findings[0])
    assert "semalign models list" in str(diagnosis.findings[0].remedy)
    both = doctor(tmp_path / "encoder", tmp_path / "encoder")
    assert [finding.level for finding in both.findings] == ["error", "error"]


def test_what_is_missing_is_bad_input(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = map(str, pair)
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([str(tmp_path / "none"), target], "none does not exist"),
        ([source, str(tmp_path / "none.gguf")], "none.gguf does not exist"),
        ([source, str(tmp_path / "empty")], "holds no config.json"),
        ([source, target, "--data", str(tmp_path / "none.jsonl")], "none.jsonl does not exist"),
        ([source, target, "--deep"], "give --data FILE"),
        ([source, target, "--out", str(tmp_path / "layers.svg")], "give --deep too"),
        ([source, target, "train.pases=2"], "did you mean 'passes'"),
        ([source, target, "device=cuda:77"], "cuda:77"),
        ([source, target, "device=meta"], "device 'meta' cannot be used here"),
    ):
        assert main(["doctor", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and words in printed.err and printed.err.count("\n") == 1


def test_the_conversion_of_a_file_is_told(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("semalign_harness.models.gguf._convert", lambda path, folder: shutil.copytree(pair[0], folder))
    (tmp_path / "source.gguf").write_bytes(b"GGUF")
    for told in (1, 0):
        assert main(["doctor", str(tmp_path / "source.gguf"), str(pair[1]), "--json"]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("source.gguf is converted into") == printed.err.count("\n") == told
        assert json.loads(printed.out)["findings"]


def test_a_broken_folder_is_an_error_of_the_pair(pair: tuple[Path, Path], other: Path, doctor: Doctor) -> None:
    (other / "config.json").write_text("{", encoding="utf-8")
    assert of(doctor(pair[0], other), "target").level == "error"


def test_findings_are_printed_as_a_table(
    pair: tuple[Path, Path], rows_file: Path, capsys: pytest.CaptureFixture[str], no_weights: None
) -> None:
    assert main(["doctor", *map(str, pair), "--data", str(rows_file), "target.dtype=float16", *SETTINGS[:2]]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == "" and lines[-1] == "a run would be refused: 1 error, no warnings"
    assert all(line == line.rstrip() for line in lines)
    column = lines[0].index("LlamaForCausalLM")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines[:-2])
    remedies = [line.strip() for line in lines if line.strip().startswith("→")]
    assert remedies == ["→ target.dtype=bfloat16"]
    assert [line.split()[0] for line in lines[:-2] if line[0] != " "][:3] == ["ok", "ok", "ok"]


def test_trouble_has_a_remedy() -> None:
    for level, remedy in (("ok", "none needed"), ("warning", None), ("error", None)):
        with pytest.raises(SemalignError, match="remedy"):
            Finding.parse({"check": "depth", "level": level, "message": "found", "remedy": remedy})


def test_a_diagnosis_is_a_contract(pair: tuple[Path, Path], doctor: Doctor, tmp_path: Path) -> None:
    diagnosis = doctor(*pair)
    assert Diagnosis.read(diagnosis.write(tmp_path / "diagnosis.json")) == diagnosis
    with pytest.raises(SemalignError, match="format version 9"):
        Diagnosis.parse({**json.loads(diagnosis.model_dump_json()), "version": 9})


def test_layers_are_compared_in_depth(
    pair: tuple[Path, Path], rows_file: Path, doctor: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "layers.svg"
    diagnosis = doctor(*pair, "--data", rows_file, *SETTINGS, "--deep", "--out", picture)
    assert of(diagnosis, "weights").level == "ok"
    first = picture.read_text(encoding="utf-8")
    assert first == heat_map(diagnosis)
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    assert ">source layer</text>" in first and ">CKA</text>" in first
    assert diagnosis == doctor(*pair, "--data", rows_file, *SETTINGS, "--deep", "--out", picture).model_copy(
        update={"findings": diagnosis.findings}
    )
    assert picture.read_text(encoding="utf-8") == first, "the same values give the same file"

    assert [report.frame for report in diagnosis.fidelity] == ["cosine", "dual", "parseval"]
    assert (len(diagnosis.similarity), len(diagnosis.similarity[0])) == (3, 4)
    for report in diagnosis.fidelity:
        assert [layer.target_layer for layer in report.layers] == [1, 2, 3]
        for layer in report.layers:
            exact = diagnosis.similarity[layer.target_layer - 1][layer.source_layer - 1]
            assert layer.cka_direct == pytest.approx(exact, abs=1e-5)
        recomposed = [layer.recomposition_cosine for layer in report.layers]
        assert (min(recomposed) > 0.9999) == (report.frame != "cosine")
    assert "linear CKA of paired layers" in diagnosis_text(diagnosis)
    (tmp_path / "kept.svg").hardlink_to(picture)
    manual = ("pairing.kind=manual", "pairing.layers=[2, 2, 4]", "transport.fold_gain=false")
    told = doctor(*pair, "--data", rows_file, *SETTINGS, "--deep", "--out", picture, *manual)
    assert [layer.source_layer for layer in told.fidelity[0].layers] == [2, 2, 4]
    assert not told.fidelity[0].fold_gain
    assert picture.read_text(encoding="utf-8") == heat_map(told) != first, "with the pairing that is set"
    assert (tmp_path / "kept.svg").read_text(encoding="utf-8") == first, "a new file takes the place of the old one"


def test_a_heat_map_without_a_name_is_layers_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diagnose(experiment: Experiment, *, deep: bool, **_: Any) -> Diagnosis:
        assert deep
        pairing = LayerPairing(policy="uniform", source_depth=1, source_layers=(1,))
        common = {"source": "source", "target": "target", "device": "cpu"}
        finding = Finding(check="depth", level="ok", message="one layer each")
        return Diagnosis(**common, findings=(finding,), similarity=((0.5,),), pairing=pairing)

    monkeypatch.setattr("semalign_harness.doctor.diagnose", diagnose)
    monkeypatch.chdir(tmp_path)
    for more, written in (([], {"layers.svg"}), (["--out", "mine.svg"], {"layers.svg", "mine.svg"})):
        assert main(["doctor", "source", "target", "--deep", *more]) == 0
        assert {file.name for file in tmp_path.iterdir()} == written


def heat_map(diagnosis: Diagnosis) -> str:
    """Draw the layers with the pairing that the fidelity was measured by."""
    assert diagnosis.pairing is not None
    paired = tuple(layer.source_layer for layer in diagnosis.fidelity[0].layers)
    assert diagnosis.pairing.source_layers == paired
    return standalone(draw_similarity(diagnosis.similarity, diagnosis.pairing))


def test_the_fidelity_is_that_of_a_run(
    pair: tuple[Path, Path], rows_file: Path, overrides: list[str], doctor: Doctor, tmp_path: Path
) -> None:
    """The reports come from the same transport: exact frames in the source's own space are the identity by law."""
    settings = ("data.train_rows=16", "data.held_out_rows=8", "pairing.kind=uniform")
    ours = doctor(*pair, "--data", rows_file, *settings, "--deep", "--out", tmp_path / "layers.svg").fidelity[2]
    loaded = [load_model(ModelConfig(path=str(folder))) for folder in pair]
    bases = [SemanticBasis.from_model(each.model, entries=torch.arange(310)) for each in loaded]
    within = fit_transport(bases[0], bases[0], frame="parseval", fold_gain=True)
    views = [DecoderView(each.model) for each in loaded]
    more = [f"target.path={pair[1]}", f"data.train.path={rows_file}", "data.held_out=null", *settings[:2]]
    data = load_experiment("tiny", overrides=more).data
    split = split_rows(data, read_rows(data), TextEncoder(loaded[1].tokenizer))
    rows = batches(split.train[:8], 1)
    masks = [supervised(batch).mask for batch in rows]
    with torch.no_grad():
        traces = [[view.trace(batch, keep=range(1, view.depth + 1)) for batch in rows] for view in views]
    source, target = (
        {
            layer: torch.cat([trace.residual(layer)[mask] for trace, mask in zip(side, masks, strict=True)])
            for layer in range(1, view.depth + 1)
        }
        for side, view in zip(traces, views, strict=True)
    )
    pairs = [
        PairedResiduals(k, layer.source_layer, target[k], source[layer.source_layer])
        for k, layer in enumerate(ours.layers, 1)
    ]
    theirs = measure_fidelity(
        pairs, transport=fit_transport(*bases, frame="parseval", fold_gain=True), within_source=within
    )
    assert theirs.tokens == ours.tokens
    for mine, yours in zip(ours.layers, theirs.layers, strict=True):
        assert mine.model_dump() == pytest.approx(yours.model_dump(), abs=1e-5)


def test_a_frame_of_another_package_is_compared_too(
    pair: tuple[Path, Path], rows_file: Path, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(monkeypatch, {"semalign.frames": [("between", BETWEEN)]})
    for frame, more in (("between", ["between"]), ("none", [])):
        settings = (*SETTINGS, f"transport.frame={frame}", "--deep", "--out", tmp_path / "layers.svg")
        found = doctor(*pair, "--data", rows_file, *settings).fidelity
        assert [report.frame for report in found] == ["cosine", "dual", "parseval", *more]


def test_a_window_that_was_not_checked_is_told(
    pair: tuple[Path, Path], rows_file: Path, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--data", rows_file, *SETTINGS, "--deep", "--out", tmp_path / "layers.svg")
    assert "target window" not in [finding.check for finding in doctor(*pair, *more).findings]
    told = "LlamaForCausalLM was checked on rows of 64 tokens, and not past its sliding_window of 5000"
    monkeypatch.setattr(DecoderView, "verify", lambda view: told)
    found = of(doctor(*pair, *more), "target window")
    assert found.level == "warning" and found.message == told


def test_weights_that_cannot_be_used_are_an_error(
    pair: tuple[Path, Path], other: Path, rows_file: Path, doctor: Doctor, tmp_path: Path
) -> None:
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert doctor(pair[0], other, "--data", rows_file, *SETTINGS).is_usable, "only the head is read"
    diagnosis = doctor(pair[0], other, "--data", rows_file, *SETTINGS, "--deep", "--out", tmp_path / "layers.svg")
    found = of(diagnosis, "target weights")
    assert found.level == "error" and "not finite in model.layers.1.self_attn.q_proj.weight" in found.message
    assert diagnosis.fidelity == () and not (tmp_path / "layers.svg").exists()


@pytest.mark.parametrize(("rows", "level"), [(0, "warning"), (4, "error")])
def test_a_model_that_cannot_generate_is_an_error_where_it_has_to(
    rows: int,
    level: str,
    pair: tuple[Path, Path],
    rows_file: Path,
    doctor: Doctor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = (
        "--data",
        rows_file,
        *SETTINGS,
        f"measure.answer_rows={rows}",
        "measure.max_new_tokens=4",
        "--deep",
        "--out",
        tmp_path / "layers.svg",
    )
    assert of(doctor(*pair, *more), "target generation").message.endswith("in batches")

    def refuse(model: object) -> Way:
        raise SemalignError("LlamaForCausalLM cannot generate: set measure.answer_rows=0")

    monkeypatch.setattr(deep, "check_generation", refuse)
    found = of(doctor(*pair, *more), "target generation")
    assert (found.level, found.message) == (level, "LlamaForCausalLM cannot generate")
    assert found.remedy == "measure.answer_rows=0"

    monkeypatch.setattr(deep, "check_generation", lambda model: Way.ALONE)
    assert "one row at a time" in of(doctor(*pair, *more), "target generation").message


@pytest.mark.parametrize(
    ("direct", "kept", "better", "level", "remedy"),
    [
        (0.8, 0.78, 0.8, "ok", None),
        (0.8, 0.5, 0.75, "warning", "transport.frame=dual"),
        (0.8, 0.5, 0.5, "warning", "transport.frame=none"),
    ],
)
def test_a_frame_that_loses_the_geometry_is_told(
    direct: float, kept: float, better: float, level: str, remedy: str | None
) -> None:
    def report(frame: str, cka: float) -> FidelityReport:
        layer = LayerFidelity(
            target_layer=1, source_layer=1, recomposition_cosine=1.0, cka_transported=cka, cka_direct=direct
        )
        return FidelityReport(frame=frame, fold_gain=True, tokens=9, layers=(layer,))

    found = deep._verdict(load_experiment("tiny"), [report("parseval", kept), report("dual", better)], 2)
    assert found.level == level and (remedy is None or str(found.remedy).startswith(remedy))
