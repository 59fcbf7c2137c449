"""Models are checked before they are used; what cannot be used is named with the remedy."""

import importlib.util
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from semalign_geometry import SemalignError
from semalign_harness import build_tokenizer, load_model
from semalign_harness.experiment import ModelConfig
from semalign_harness.models import check_tokenizers, open_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM


def test_a_folder_is_loaded_in_the_asked_dtype(pair: tuple[Path, Path]) -> None:
    assert load_model(ModelConfig(path=str(pair[0]))).model.dtype == torch.float32
    assert load_model(ModelConfig(path=str(pair[0]), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_missing_models_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(SemalignError, match="does not exist"):
            load_model(ModelConfig(path=str(path)))
    with pytest.raises(SemalignError, match="config.json"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(SemalignError, match="generated:tiny-source"):
        load_model(ModelConfig(path="generated:huge"))


def test_a_broken_gguf_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(SemalignError, match="cannot be read as a GGUF model"):
        load_model(ModelConfig(path=str(tmp_path / "model.gguf")))
    assert [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == []


def test_no_bar_of_a_library_is_drawn_while_a_file_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*_: object, **__: object) -> None:
        print("Converting ...: 1%", file=sys.stderr)
        raise ValueError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", draw)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(SemalignError, match="cannot be read as a GGUF model: ValueError: enough"):
        load_model(ModelConfig(path=str(tmp_path / "model.gguf")))
    assert capsys.readouterr().err == ""


def test_processes_that_lack_the_same_model_make_it_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))
    made = []

    def build(role: str, folder: Path, **_: object) -> Path:
        if not folder.exists():
            time.sleep(0.3)
            shutil.copytree(pair[0], folder)
            made.append(role)
        return folder

    monkeypatch.setattr("semalign_harness.models.build_tiny_model", build)
    with ThreadPoolExecutor(4) as pool:  # locks exclude threads as they exclude processes
        opened = list(pool.map(open_model, [ModelConfig(path="generated:tiny-source")] * 4))
    assert made == ["source"]
    assert len({each.place for each in opened}) == 1


def test_values_that_are_not_finite_are_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    build_tokenizer().save_pretrained(tmp_path / "damaged")
    with pytest.raises(SemalignError, match=r"not finite in model.layers.1.self_attn.q_proj.weight"):
        load_model(ModelConfig(path=str(tmp_path / "damaged")))


def test_encoders_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    for kind in (BertForMaskedLM, BertLMHeadModel):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        build_tokenizer().save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(SemalignError, match="decoder-only"):
            load_model(ModelConfig(path=str(tmp_path / kind.__name__)))


def test_tokenizers_must_agree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = (open_model(ModelConfig(path=str(folder))) for folder in pair)
    shared = check_tokenizers(source, target, ["How many apples now ?"])
    assert len(shared) == len(build_tokenizer()) and shared.same_ids

    # A tokenizer that begins every text with a special token splits texts no differently.
    begins = replace(target, tokenizer=build_tokenizer())
    begins.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begins.tokenizer.convert_tokens_to_ids("<bos>"))]
    )
    assert begins.tokenizer("apples")["input_ids"] != target.tokenizer("apples")["input_ids"]
    check_tokenizers(source, begins, ["How many apples now ?"])

    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["apples"], vocabulary["answer"] = vocabulary["answer"], vocabulary["apples"]
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SemalignError, match="the tokenizers differ: .* one family"):
        check_tokenizers(source, open_model(ModelConfig(path=str(other))), [])


def test_a_model_in_4_bits_computes_about_the_same(pair: tuple[Path, Path]) -> None:
    whole, small = (load_model(ModelConfig(path=str(pair[0]), load_in_4bit=four)).model for four in (False, True))
    kinds = {type(module).__name__ for module in small.model.layers.modules()}
    assert "Linear4bit" in kinds and "Linear" not in kinds
    assert torch.equal(small.lm_head.weight, whole.lm_head.weight)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        ours, theirs = (model(ids).logits.flatten() for model in (small, whole))
    assert 0.5 < float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) < 1


def test_4_bits_need_their_extra(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name))
    with pytest.raises(SemalignError, match=r'pip install "semalign-harness\[4bit\]"'):
        load_model(ModelConfig(path=str(pair[0]), load_in_4bit=True))
