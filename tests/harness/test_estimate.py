"""What a run needs, told offline: shapes are the published ones, bounds hold, and what is unknown is called so."""

import typing
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, build_tiny_model, load_experiment, run_experiment
from semalign_harness.cli.main import main
from semalign_harness.loading import pair_names, task_names
from semalign_harness.models.catalogue import catalogue
from semalign_harness.models.settings import ModelConfig
from semalign_harness.models.shape import (
    INTERMEDIATES,
    STATES,
    WIDTHS,
    find_shape,
    heads_of,
    row_bytes,
    shape_of,
    shape_of_entry,
    widest,
)
from semalign_harness.models.tiny import Role
from semalign_harness.results.source_phase import SourcePhase
from semalign_harness.run.estimate import Needs, Totals, accelerator, describe, estimate
from semalign_harness.run.written_answers import written_parts
from semalign_train import LoraLayer
from semalign_train._trainable import frontier
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

PUBLISHED = {
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "codellama/CodeLlama-13b-Python-hf": 13_015_864_320,
    "WizardLMTeam/WizardCoder-Python-13B-V1.0": 13_015_864_320 + 2 * 5120,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-410m": 405_334_016,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-270m-it": 268_098_176,
}
"""Parameters of the checkpoints as the hub counts them, a tied head once."""

PAPER = {
    "mmlu": (1000, 5, 3e-4, 32),
    "gsm8k": (1000, 5, 3e-4, 64),
    "humaneval": (1000, 3, 3e-5, 48),
    "mbpp": (300, 5, 3e-4, 128),
}
"""Training rows, epochs, learning rate, alignment rows (v1, experimental settings)."""
LARGE = [name for name in pair_names() if name.endswith("-13b-7b")]


def totals_of(experiment: Experiment) -> Totals:
    totals = estimate(experiment).totals
    assert totals is not None
    return totals


@pytest.mark.parametrize("task", task_names())
@pytest.mark.parametrize("name", pair_names())
def test_every_task_of_every_pair_can_be_planned(
    name: str, task: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if name.startswith("tiny") and task != "arithmetic":
        pytest.skip("its models know words of the arithmetic task only")
    experiment = load_experiment(name, task)
    needs = estimate(experiment)
    assert needs.source is not None and needs.target is not None, "pairs name models of the catalogue"
    assert needs.source.shape.parameters > needs.target.shape.parameters
    figures = totals_of(experiment).model_dump()
    downloads = figures.pop("download")
    assert all(figure > 0 for figure in figures.values()) and downloads >= 0
    for model in (needs.source, needs.target):
        assert model.shape.positions is None or experiment.data.max_length <= model.shape.positions
    assert Needs.read(needs.write(tmp_path / "needs.json")) == needs

    assert main(["run", name, task, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    file = tmp_path / "again.yaml"
    file.write_text(printed.out, encoding="utf-8")
    assert load_experiment(file) == experiment, "what a dry run prints is an experiment's file"
    comments = [line for line in printed.out.splitlines() if line.startswith("# ")]
    plan = [line for line in comments if line.startswith("# plan: ")]
    assert len(plan) == 1 + len(written_parts(experiment.data))
    told = [*plan, *(f"# {line}" for line in describe(experiment))]
    assert comments[: len(told)] == told
    unchecked = "".join(comments[len(told) :])
    assert unchecked.count("# not checked: ") == len(comments) - len(told), "of models and rows that are elsewhere"
    assert experiment.source.path in unchecked and experiment.target.path in unchecked


def test_a_dry_run_needs_no_device() -> None:
    assert main(["run", "tiny", "device=cuda:7", "--dry-run"]) == 0


def test_pairs_are_listed_with_what_they_need_and_tasks_with_their_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    pairs, tasks = (table.splitlines() for table in capsys.readouterr().out.split("\n\n"))
    assert [line.split()[0] for line in pairs] == ["pair", *pair_names()]
    assert [line.split()[0] for line in tasks] == ["task", *task_names()]
    assert tasks[-1].split()[:3] == ["mmlu", "1,000", "1,024"]
    row = next(line for line in pairs if line.startswith("llama-2-13b-7b"))
    for words in ("Llama-2-13b-chat-hf → Llama-2-7b-chat-hf", "13B → 6.74B", "39.5 GB", "one of 80 GB", "(gated)"):
        assert words in row


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("name", LARGE)
def test_pairs_of_the_paper_have_its_settings(name: str, task: str) -> None:
    experiment = load_experiment(name, task)
    rows, epochs, rate, aligned = PAPER[task]
    data, train, method = experiment.data, experiment.train, experiment.method
    assert (data.train_rows, train.passes, train.learning_rate, data.attribution_rows) == (rows, epochs, rate, aligned)
    assert train.batch_size == 64 and isinstance(method.trainable, LoraLayer) and method.trainable.rank == 16
    assert sorted(method.trainable.modules) == ["down_proj", "o_proj", "up_proj", "v_proj"]
    assert {experiment.source.dtype, experiment.target.dtype} == {"bfloat16"} and experiment.device == "auto"
    assert accelerator(totals_of(experiment).memory) == "one of 80 GB"


def test_the_catalogue_has_the_published_sizes() -> None:
    assert {path for path in catalogue() if not path.startswith("generated:")} == set(PUBLISHED)
    for path, parameters in PUBLISHED.items():
        shape = find_shape(ModelConfig(path=path))
        assert shape is not None and shape.parameters == parameters, path


def test_the_shapes_that_are_kept_are_those_of_the_catalogue() -> None:
    for path, entry in catalogue().items():
        kept = find_shape(ModelConfig(path=path))
        assert kept == shape_of_entry(entry), f"{path}: run python -m semalign_harness.models.shape"


@pytest.mark.parametrize("role", typing.get_args(Role))
def test_the_catalogue_has_the_generated_models(role: Role, tmp_path: Path) -> None:
    built = find_shape(ModelConfig(path=str(build_tiny_model(role, tmp_path / role, steps=1))))
    assert built is not None and built == find_shape(ModelConfig(path=f"generated:tiny-{role}"))


def test_a_folder_is_read_by_its_configuration_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    (tmp_path / "config.json").write_bytes((pair[0] / "config.json").read_bytes())
    shape = find_shape(ModelConfig(path=str(tmp_path)))
    assert shape is not None
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.width, shape.vocabulary) == (4, 40, len(model.get_output_embeddings().weight))
    assert shape.layer_parameters == sum(parameter.numel() for parameter in DecoderView(model).layer(1).parameters())
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SemalignError, match=r"configuration of .* cannot be read"):
        find_shape(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["nobody/no-model", "target.gguf"])
def test_an_unknown_model_is_called_unknown(
    path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("target.gguf").write_bytes(b"")
    assert main(["run", "tiny", f"target.path={path}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    reason = "not in the catalogue" if path == "nobody/no-model" else "a .gguf file is read when it is converted"
    assert f"# target {path}: unknown: {reason}" in printed and "# source generated:tiny-source: 696k" in printed
    assert yaml.safe_load(printed)["target"]["path"] == path
    needs = estimate(load_experiment("tiny", overrides=[f"target.path={path}"]))
    assert needs.source is not None and needs.target is None and needs.totals is None


@pytest.mark.parametrize("more", [[], ["transport.frame=none", "supervision.output.kind=final_hidden"]])
def test_a_run_stays_within_its_estimate(tmp_path: Path, overrides: list[str], more: list[str]) -> None:
    experiment = load_experiment("tiny", overrides=[*overrides, "data.max_length=48", *more])
    needs, totals = estimate(experiment), totals_of(experiment)
    result = run_experiment(experiment, tmp_path / "run")
    place = Path(SourcePhase.read(tmp_path / "run" / "supervision.json").folder)
    tensors = sum(file.stat().st_size for file in place.glob("supervision/*.safetensors"))
    assert tensors < result.supervision_bytes and tensors <= totals.supervision
    assert sum(file.stat().st_size for file in place.glob("held_out/*.safetensors")) <= totals.held_out
    weights = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert weights == pytest.approx(totals.saved, rel=0.1), "the file has a header besides the weights"
    assert needs.target is not None
    assert {stage.trainable_parameters for stage in result.training.transfer.stages} == {
        needs.target.shape.layer_parameters
    }


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_adapter_has_the_estimated_size(family: str) -> None:
    view = DecoderView(small(family, torch.float32))
    names = ("down_proj", "q_proj") if family == "llama" else ("dense", "dense_4h_to_h")
    features = shape_of(view.model.config).linear_features
    with frontier(view, 1, LoraLayer(rank=3, modules=names), final_norm=False) as parameters:
        assert sum(p.numel() for p in parameters) == 3 * sum(features[name] for name in names)


def small(family: str, dtype: torch.dtype, *, depth: int = 2, head: int = 16) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": depth, "num_attention_heads": 4}
    more = {} if family == "gpt_neox" else {"num_key_value_heads": 4, "head_dim": head}
    config = AutoConfig.for_model(family, vocab_size=130, **sizes, **more)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def kept_values(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Values that autograd keeps of each token, weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=embedded, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()) / model.dtype.itemsize / ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("llama", 16),
        ("qwen2", 16),
        ("qwen3", 16),
        ("qwen3", 32),
        ("gpt_neox", 16),
        ("gemma3_text", 16),
        ("gemma3_text", 32),
    ],
)
def test_activations_are_bounded(family: str, head: int, dtype: torch.dtype) -> None:
    ids = torch.arange(128).reshape(2, 64)
    shallow, deep = (kept_values(small(family, dtype, depth=depth, head=head), ids) for depth in (2, 4))
    bound = WIDTHS * max(64, 4 * head) + INTERMEDIATES * 96
    assert 0.25 * bound < (deep - shallow) / 2 <= bound


@settings(max_examples=30)
@given(st.integers(1, 1000), st.integers(2, 1000), st.integers(1, 16), st.integers(2, 4))
def test_more_data_needs_more(rows: int, length: int, batch: int, times: int) -> None:
    def needs(rows: int, length: int, batch: int) -> Totals:
        return totals_of(
            load_experiment(
                "tiny",
                overrides=[f"data.train_rows={rows}", f"data.max_length={length}", f"batch_size={batch}"],
            )
        )

    one = needs(rows, length, batch)
    source = estimate(load_experiment("tiny")).source
    assert source is not None
    entries = 8 * source.shape.vocabulary  # the ids of the shared entries, once
    assert needs(rows * times, length, batch).supervision - entries == times * (one.supervision - entries)
    longer = needs(rows, length * times, batch).supervision
    assert longer - entries - 8 * rows == times * (one.supervision - entries - 8 * rows)
    assert needs(rows, length, batch * times).source_phase > one.source_phase
    assert needs(rows, length, batch * times).target_phase == one.target_phase


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_models_without_attention_have_a_shape_too(family: str, builder: ModuleType) -> None:
    """They were refused here as no transformers, though they transfer and generate as the others do."""
    config = builder.tiny_config(family)
    shape = shape_of(config)
    assert heads_of(config) == (0, 0, 0) and shape.heads_width == 0 and shape.state == 2 * 32 * 8
    assert row_bytes(config, 10, all_logits=False) == 4 * 10 * (16 * 32 + STATES * shape.state)


@pytest.mark.parametrize(("family", "state"), [("mamba", 16), ("mamba", 64), ("mamba2", 16), ("falcon_mamba", 16)])
def test_activations_without_attention_are_bounded(family: str, state: int) -> None:
    ids, kept = torch.arange(128).reshape(2, 64), []
    more = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 64} if family == "mamba2" else {}
    for depth in (2, 4):
        config = AutoConfig.for_model(
            family, vocab_size=130, hidden_size=64, num_hidden_layers=depth, state_size=state, **more
        )
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        kept.append(kept_values(model, ids))
    shape = shape_of(config)
    bound = WIDTHS * shape.width + INTERMEDIATES * shape.intermediate + STATES * shape.state
    assert shape.state == 2 * 64 * state and 0.25 * bound < (kept[1] - kept[0]) / 2 <= bound


def test_heads_that_differ_by_layer_count_with_the_largest(builder: ModuleType) -> None:
    config = builder.tiny_config("gemma4_text")
    assert {layer.head_dim for layer in config.per_layer_config} == {8, 512}
    assert heads_of(config) == (4, 2, 512) and shape_of(config).heads_width == 4 * 512
    assert row_bytes(config, 10, all_logits=True) == 4 * 10 * (2 * 4 * 2 * 512 + 16 * 32 + 3 * config.vocab_size)


def test_heads_that_a_configuration_leaves_out_are_those_of_the_queries() -> None:
    assert heads_of(GPT2Config(n_embd=48, n_head=3)) == (3, 3, 16)
    assert heads_of(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)) == (4, 2, 16)


def test_sizes_that_every_layer_has_of_its_own_count_with_the_largest() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "sliding_window": 8}
    config = AutoConfig.for_model(
        "gemma3n_text",
        hidden_size=32,
        num_hidden_layers=4,
        num_kv_shared_layers=0,
        intermediate_size=[48, 48, 64, 48],
        activation_sparsity_pattern=[0.0] * 4,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        **sizes,
    )
    assert shape_of(config).intermediate == 64
    assert (widest(config, "intermediate_size"), widest(config, "head_dim"), widest(config, "none")) == (64, 8, 0)


def test_a_configuration_that_makes_no_model_is_one_sentence() -> None:
    config = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, vocab_size=64, hidden_act="own")
    with pytest.raises(SemalignError, match="^no llama model can be built from its configuration: "):
        shape_of(config)


def test_settings_change_what_a_run_needs() -> None:
    def needs(*overrides: str) -> Totals:
        return totals_of(load_experiment("llama-2-13b-7b", "gsm8k", overrides=overrides))

    base = needs()
    weights = 6_738_415_616 * 2
    assert base.saved == weights and base.download == weights + 13_015_864_320 * 2
    tokens = 1000 * 512
    assert base.supervision == tokens * (32 * 4096 * 2 + 64 * 8 + 4 + 8) + 1000 * 8 + 32_000 * 8
    assert needs("supervision.dtype=int8").supervision == base.supervision - tokens * 32 * (4096 - 4)
    untransported = needs("transport.frame=none").supervision
    assert untransported == base.supervision + tokens * 32 * (5120 - 4096) * 2, "at the source's width"
    without = needs("train.checkpoint_minutes=null").scratch
    assert without == (tokens * 4096 + 32 * 202_383_360) * 2
    assert base.scratch == needs("train.checkpoint_steps=5", "train.checkpoint_minutes=null").scratch
    states = base.scratch - without
    assert states == 3 * 3 * 4 * 16 * (2 * (4096 + 11008) + 2 * (4096 + 4096)), "the last two and the one being written"
    adapter = 16 * (2 * (4096 + 11008) + 2 * (4096 + 4096))
    assert base.training_state == adapter * 4 * (1 + 2 + 2 + 1), "weights, moments, gradients of two terms, their sum"
    assert needs("target.dtype=float32").saved == 2 * weights
    assert (
        needs("method.trainable.kind=full", "method.trainable={kind: full}").training_state > 50 * base.training_state
    )
    kinds = {"method.kind=kd": 32 * adapter, "method={kind: kd, trainable: {kind: full}}": weights // 2}
    for joint, trained in kinds.items():
        assert needs(joint).training_state == trained * 4 * (1 + 2 + 2), "the gradient of a micro-batch, and the sum"
        assert needs(joint, "train.checkpoint_minutes=null").scratch == 0, "nothing is replayed"
        assert needs(joint, "train.recompute=true").target_phase < needs(joint).target_phase
    hidden, kd, seeking = (needs(f"method.kind={kind}") for kind in ("hidden", "kd", "seeking"))
    source = 13_015_864_320 * 2
    factor = 4 * (1 + 2 + 2)
    assert hidden.training_state == kd.training_state + 32 * 5120 * 4096 * factor, "a projection for each layer"
    stays = source - 32_000 * 5120 * 2
    assert hidden.target_phase - hidden.training_state == kd.target_phase - kd.training_state + stays
    laten = needs("method.kind=laten")
    assert laten.training_state == 4 * 5120 * (5120 + 4096) * factor, "four hypernetworks"
    assert laten.target_phase - laten.training_state == kd.target_phase - kd.training_state + stays
    assert seeking.training_state > 0
    assert seeking.source_phase > kd.source_phase + weights + 4 * 0.9 * source // 2, "a score for each of its weights"
    assert needs("method.weights.geometry=0").training_state == adapter * 4 * (1 + 2 + 1 + 1)
    assert needs("supervision.dtype=float32").supervision > 1.9 * base.supervision
    with_target = needs("scorer.kind=similarity", "pairing.kind=similarity").source_phase
    assert with_target == base.source_phase + weights - 32_000 * 4096 * 2
    reloaded = needs("train.micro_batch_size=1", "data.max_length=2").target_phase
    assert reloaded == 2 * weights + 32_000 * 5120 * 2, "the saved copy stands beside the trained target and the head"
    assert needs("train.recompute=true", "train.micro_batch_size=64").memory < needs("train.micro_batch_size=64").memory
    assert needs("train.micro_batch_size=64").memory > needs("train.micro_batch_size=8").memory > base.memory - 1


@pytest.mark.parametrize(
    ("memory", "named"),
    [
        (2.0e9, "none"),
        (2.1e9, "one of 8 GB"),
        (7.2e9, "one of 8 GB"),
        (7.3e9, "one of 12 GB"),
        (72.0e9, "one of 80 GB"),
        (72.1e9, "one of 141 GB"),
        (126.9e9, "one of 141 GB"),
        (127.0e9, "more than one of 141 GB"),
    ],
)
def test_the_smallest_accelerator_that_keeps_a_tenth_free_is_named(memory: float, named: str) -> None:
    assert accelerator(int(memory)) == named
