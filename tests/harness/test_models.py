"""Models are checked before they are used; what cannot be used is named with the remedy."""

import importlib.util
import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from semalign_geometry.base import SemalignError
from semalign_harness import build_tokenizer, load_experiment, load_model
from semalign_harness.models.loading import unused_tensors
from semalign_harness.models.opening import check_tokenizers, open_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.models.shape import is_small
from semalign_harness.run.inputs import load, read_inputs
from semalign_harness.run.pipeline import save_and_reload
from semalign_harness.util.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from tests.models import tiny_model


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
    with pytest.raises(SemalignError, match="cannot be read as a GGUF model, .*: ValueError: enough"):
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

    monkeypatch.setattr("semalign_harness.models.opening.build_tiny_model", build)
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
    vocabulary["▁apples"], vocabulary["▁answer"] = vocabulary["▁answer"], vocabulary["▁apples"]
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SemalignError, match="the tokenizers differ: 2 of 310 shared entries have .* one family"):
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


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the target that a test may change."""
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def add_tensors(folder: Path, *names: str) -> None:
    """Write tensors into a checkpoint beside its own."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(24) for name in names}, folder / "model.safetensors", {"format": "pt"})


def set_keys(file: Path, **keys: object) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | keys), encoding="utf-8")


LORA = ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            LORA,
            rf"holds 2 tensors that its model has no place for \({', '.join(map(re.escape, LORA))}\): merge it into",
        ),
        (
            ["model.layers.0.mlp.up_proj.bias"],
            r"holds 1 tensors .* \(model.layers.0.mlp.up_proj.bias\): mend its config",
        ),
        (["model.norm.bias"], "of 3 layers without them"),
        (["lm_head.bias"], "no place for"),
        (["model.embed_layernorm.weight"], "no place for"),
        ([f"model.layers.{n}.input_layernorm.weight" for n in range(3, 8)], r"5.input_layernorm.weight and 2 more\)"),
    ],
)
def test_tensors_that_would_change_the_model_are_refused(names: list[str], told: str, copy: Path) -> None:
    add_tensors(copy, *names)
    with pytest.raises(SemalignError, match=told):
        load_model(ModelConfig(path=str(copy)))


def test_tensors_beside_the_language_model_are_named(
    copy: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    beside = ["model.mtp.layers.0.norm.weight", "v_head.summary.weight", "vision_tower.layers.0.norm.weight"]
    add_tensors(copy, *beside, "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.attn.masked_bias")
    opened = open_model(ModelConfig(path=str(copy)))
    console = Console(quiet=True)
    monkeypatch.setattr(console, "note", notes.append)
    assert load(console, "target", opened, torch.device("cpu")).unused == tuple(beside)
    told = "3 tensors of the target's checkpoint are no part of its language model and are ignored, such as model.mtp."
    assert notes[-1].startswith(told)
    assert load_model(ModelConfig(path=str(pair[1]))).unused == ()

    deeper = "model.layers.3.eh_proj.weight"
    add_tensors(copy, deeper)
    with pytest.raises(SemalignError, match=re.escape(f"({deeper})")):
        load_model(ModelConfig(path=str(copy)))
    set_keys(copy / "config.json", num_nextn_predict_layers=1)  # as DeepSeek's and GLM's checkpoints have it
    assert deeper in load_model(ModelConfig(path=str(copy))).unused


@pytest.mark.parametrize(("name", "computed"), [("h.0.attn.bias", True), ("h.0.attn.q_attn.bias", False)])
def test_only_buffers_that_a_model_computes_are_passed_over(name: str, computed: bool) -> None:
    """GPT-2's first checkpoints hold the causal masks of its attention as biases."""
    model = tiny_model("gpt2", seed=0, depth=2, vocabulary=320)
    model.transformer.h[0].attn.register_buffer("bias", torch.ones(1), persistent=False)
    if computed:
        assert unused_tensors(model, [name, f"transformer.{name}"], "gpt2") == ()
    else:
        with pytest.raises(SemalignError, match="no place for"):
            unused_tensors(model, [name], "gpt2")


def test_an_adapter_is_refused_before_its_weights_are_read(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    for whole in (True, False):
        with pytest.raises(SemalignError, match="copy is or holds an adapter: merge it into the weights with peft"):
            open_model(ModelConfig(path=str(copy)))
        if whole:
            (copy / "config.json").unlink()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_quantised_target_is_refused_by_its_configuration(method: str, copy: Path, overrides: list[str]) -> None:
    set_keys(copy / "config.json", quantization_config={"quant_method": method, "bits": 4})
    experiment = load_experiment("tiny", overrides=[*overrides, f"target.path={copy}"])
    with pytest.raises(SemalignError, match=rf"copy is stored quantised \({method}\), and the target trains: choose"):
        read_inputs(experiment, Console(quiet=True))


def test_a_source_that_is_stored_in_4_bits_is_loaded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    small = load_model(ModelConfig(path=str(pair[0]), load_in_4bit=True))
    small.model.save_pretrained(tmp_path / "small")
    small.tokenizer.save_pretrained(tmp_path / "small")
    again = load_model(ModelConfig(path=str(tmp_path / "small")))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, small.model(ids).logits)


SPY = "import pathlib\n\npathlib.Path({ran!r}).touch()\n"


@pytest.mark.parametrize("part", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_never_runs_and_nobody_is_asked(
    part: str, known: bool, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(prompt: str = "") -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    (copy / "own.py").write_text(SPY.format(ran=str(tmp_path / "ran")), encoding="utf-8")
    if part == "AutoTokenizer":
        file = copy / "tokenizer_config.json"
        set_keys(file, auto_map={part: ["own.Own", None]}, **({} if known else {"tokenizer_class": "Own"}))
        if not known:
            (copy / "tokenizer.json").unlink()
    else:
        kind = {"model_type": "llama"} if known else {"model_type": "own", "architectures": ["OwnForCausalLM"]}
        set_keys(copy / "config.json", auto_map={part: "own.Own"}, **kind)
    if known:
        assert load_model(ModelConfig(path=str(copy))).model.config.model_type == "llama"
    else:
        with pytest.raises(SemalignError) as refusal:
            load_model(ModelConfig(path=str(copy)))
        assert "\n" not in str(refusal.value)
        assert part != "AutoConfig" or "needs Python code that comes with it, which is never run here" in str(
            refusal.value
        )
    assert not (tmp_path / "ran").exists() and not (tmp_path / "asked").exists()


def test_values_that_overflow_are_not_blamed_on_training(pair: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(path=str(pair[1])))
    loaded.model.lm_head.weight.data.fill_(3e38)
    with pytest.raises(SemalignError, match="all its weights are finite, so it overflows in float32; nothing was kept"):
        save_and_reload(loaded, tmp_path / "model")


def test_generated_models_and_folders_of_small_ones_are_small(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    found = [is_small(ModelConfig(path=str(path))) for path in ("generated:tiny-source", *pair, tmp_path, "a/b.gguf")]
    assert found == [True, True, True, False, False]


def test_a_folder_without_a_tokenizer_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(pair[0] / "config.json", tmp_path)
    with pytest.raises(SemalignError, match="holds no tokenizer: add its files to the folder, such as tokenizer.json"):
        open_model(ModelConfig(path=str(tmp_path)))
