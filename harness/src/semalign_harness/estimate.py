"""What a run needs of memory, disk and downloads, told before anything is fetched.

The shape of a model comes from a local folder's config.json or from the catalogue of published facts; its weights are
never read. Every figure is a bound or says what it leaves out.
"""

import functools
import importlib.resources
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from semalign_align import FinalHidden, SupervisionSettings, store_bytes
from semalign_attribution import DecoderView
from semalign_geometry import Contract, SemalignError, Settings
from semalign_train import KEPT_STATES, FullLayer, LoraLayer, TransferConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .experiment import Experiment, ModelConfig

UNKNOWN = "unknown: not in the catalogue"
GPUS = (8, 12, 16, 24, 40, 48, 80, 141)
"""Memory of accelerators, in units of 10⁹ bytes."""
CPU_BYTES = 2 * 10**9
"""What a run may need and still be a matter for any CPU."""
USABLE = 0.9
"""Share of an accelerator's memory that an estimate may fill: kernels and the allocator take the rest."""
WIDTHS, INTERMEDIATES, STATES = 20, 3, 4
"""Values that autograd keeps of each token in each layer, in widths (of the stream, or of all heads where more),
intermediate sizes and states: no more than these, measured with frozen weights on Llama, Qwen 2 and 3, GPT-NeoX, Gemma
3, Mamba 1 and 2 and Falcon Mamba."""


class Heads(NamedTuple):
    """The attention of a layer, the widest where layers differ; all 0 in a model without attention."""

    queries: int
    """Heads of queries."""
    keys: int
    """Heads of keys and values, fewer where queries share them."""
    width: int
    """Width of a head."""


class ModelShape(Settings):
    """The numbers of a model that memory and disk depend on."""

    parameters: int
    """Numbers in the checkpoint, a tied matrix once."""
    layers: int
    """L."""
    width: int
    """d, of the residual stream."""
    heads_width: int
    """Width of all attention heads together; 0 without attention."""
    state: int = 0
    """Numbers that a state space of Mamba models computes of each token; 0 in other models."""
    intermediate: int
    """Width inside the feed-forward part."""
    vocabulary: int
    """Rows of the head."""
    tied: bool
    """Whether head and embeddings are one matrix."""
    positions: int | None
    """Longest input in tokens; None when the architecture sets no limit."""
    dtype: str
    """dtype of the checkpoint."""
    layer_parameters: int
    """Numbers in the largest layer."""
    linear_features: dict[str, int]
    """Input and output features together of the linear modules of the largest layer, by their name."""


class CatalogueEntry(Settings):
    """Published facts of a model."""

    architecture: dict[str, Any]
    """Keys of its config.json that set its shape."""
    licence: str
    """Licence of its weights."""
    gated: bool = False
    """Whether the hub asks to accept the licence first."""


class ModelNeeds(Settings):
    """One model of an experiment whose shape is known."""

    shape: ModelShape
    """Its shape."""
    dtype: str
    """dtype of its weights in memory."""
    weight_bytes: int
    """Its weights in memory."""
    download_bytes: int
    """Its weights as they come from the hub; 0 for what is local or generated."""
    licence: str | None
    """Licence of its weights; None when it is unknown."""
    gated: bool
    """Whether the hub asks to accept the licence first."""

    @property
    def head_bytes(self) -> int:
        """Its head in memory."""
        return self.shape.vocabulary * self.shape.width * _bytes(self.dtype)


class Totals(Settings):
    """What a run needs, in bytes."""

    source_phase: int
    """Memory while the source is attributed and supervises: weights, the target's head (the whole target with the
    similarity scorer), and what autograd keeps of `batch_size` of the longest rows, of `attribution_rows` where fewer.
    The last is an upper bound of attribution, which takes one row at a time; supervision, which runs `batch_size` rows
    forward without autograd, is not counted apart."""
    training_state: int
    """Weights, moments and gradients of what trains together, in float32: the largest frontier layer, or all that a
    method without stages trains."""
    target_phase: int
    """Memory while the target trains (weights, training state, activations of one micro-batch of the longest rows, the
    source's head, or the whole source with `live`, `hidden` and `laten`), or while it is compared with its saved copy,
    whichever is more."""
    memory: int
    """The larger of both phases; the source is gone when training starts."""
    supervision: int
    """At most, on disk, of the training rows: every token of rows of the greatest length supervised, every target layer
    with a source layer of its own."""
    held_out: int
    """At most, on disk, the same of the held-out rows, in float32 and with exact outputs."""
    scratch: int
    """At most, on disk until the run ends: the replayed inputs of the frontier layer, and the checkpoints."""
    saved: int
    """The trained target, on disk."""
    download: int
    """Both models from the hub; data sets are not counted."""


class Needs(Contract):
    """What an experiment needs, as far as it can be told offline."""

    source: ModelNeeds | None
    """The larger model; None when its shape is unknown."""
    target: ModelNeeds | None
    """The smaller model; None when its shape is unknown."""
    totals: Totals | None
    """What a run needs; None when a shape is unknown."""


@functools.cache
def catalogue() -> dict[str, CatalogueEntry]:
    """The catalogue that comes with the harness, by hub id."""
    text = (importlib.resources.files("semalign_harness") / "catalogue.yaml").read_text("utf-8")
    return {path: CatalogueEntry.parse(entry, origin=path) for path, entry in yaml.safe_load(text).items()}


def find_shape(model: ModelConfig) -> ModelShape | None:
    """The shape of a model, without its weights; None when it is neither a local folder nor in the catalogue.

    Raises:
        SemalignError: the folder holds no configuration of a decoder-only language model.
    """
    path = Path(model.path).expanduser()
    if not path.is_dir():
        return _catalogued(_published(model.path)[0])
    try:
        return shape_of(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except SemalignError:
        raise
    except Exception as error:  # loaders have no common base class of errors
        reason = " ".join(str(error).split())[:200]
        raise SemalignError(f"the configuration of {model.path!r} cannot be read: {reason}") from error


@functools.cache
def _catalogued(path: str) -> ModelShape | None:
    entry = catalogue().get(path)
    return None if entry is None else shape_of(AutoConfig.for_model(**entry.architecture))


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The shape of the model that a configuration describes, built without memory for its weights.

    Raises:
        SemalignError: it describes no decoder-only language model, or none that transformers can build.
    """
    text = config.get_text_config(decoder=True)
    view = empty_view(text)
    largest = max(view.layers, key=_size)
    features: dict[str, int] = {}
    for name, module in largest.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            short = name.rsplit(".", 1)[-1]
            features[short] = features.get(short, 0) + sum(module.weight.shape)
    dtype = text.dtype or torch.float32
    heads = heads_of(text)
    return ModelShape(
        parameters=_size(view.model),
        layers=view.depth,
        width=view.width,
        heads_width=heads.queries * heads.width,
        state=state_of(text),
        intermediate=widest(text, "intermediate_size") or 4 * view.width,
        vocabulary=len(view.head.weight),
        tied=view.model.get_input_embeddings().weight is view.model.get_output_embeddings().weight,
        positions=getattr(text, "max_position_embeddings", None),
        dtype=str(dtype).removeprefix("torch."),
        layer_parameters=_size(largest),
        linear_features=features,
    )


def empty_view(text: PreTrainedConfig) -> DecoderView:
    """View the model that a configuration describes, built without memory for its weights.

    Raises:
        SemalignError: it is no decoder-only causal language model, or cannot be built.
    """
    try:
        with torch.device("meta"):
            return DecoderView(AutoModelForCausalLM.from_config(text, trust_remote_code=False))
    except SemalignError:
        raise
    except Exception as error:  # transformers has no common base class of errors
        reason = " ".join(str(error).split())[:200]
        raise SemalignError(f"no {text.model_type} model can be built from its configuration: {reason}") from error


def widest(config: PreTrainedConfig, name: str) -> int:
    """A size of a configuration, the largest where layers have their own; 0 where there is none."""
    layers = config.per_layer_config if config.is_heterogeneous else [config]
    values = [getattr(layer, name, None) for layer in layers]
    return max((max(value, default=0) if isinstance(value, Sequence) else value or 0 for value in values), default=0)


def heads_of(config: PreTrainedConfig) -> Heads:
    """The attention that the configuration of a language model describes."""
    queries = widest(config, "num_attention_heads")
    if queries == 0:
        return Heads(0, 0, 0)
    width = widest(config, "head_dim") or widest(config, "hidden_size") // queries
    return Heads(queries, widest(config, "num_key_value_heads") or queries, width)


def state_of(config: PreTrainedConfig) -> int:
    """Numbers that the state space of one layer computes of each token; 0 where the configuration names none."""
    return int(getattr(config, "expand", 0) * config.hidden_size) * widest(config, "state_size")


def row_bytes(config: PreTrainedConfig, tokens: int, *, all_logits: bool) -> int:
    """Memory of one row of a batch that generates or scores, in float32.

    Args:
        config: of the language model.
        tokens: length of the row.
        all_logits: whether the logits of all positions are kept, as continuations need them.
    """
    heads = heads_of(config)
    # Keys and values of every layer; activations of one layer; logits and two copies.
    each: int = 2 * config.num_hidden_layers * heads.keys * heads.width
    each += 16 * config.hidden_size + STATES * state_of(config)
    each += 3 * config.vocab_size if all_logits else 0
    return 4 * tokens * each


def estimate(
    experiment: Experiment, *, source_shape: ModelShape | None = None, target_shape: ModelShape | None = None
) -> Needs:
    """What an experiment needs.

    Args:
        experiment: what would run.
        source_shape: shape of the source, where it is known; None looks for it.
        target_shape: shape of the target, likewise.

    Raises:
        SemalignError: a local model cannot be read.
    """
    source = _model_needs(experiment.source, source_shape)
    target = _model_needs(experiment.target, target_shape)
    totals = None if source is None or target is None else _totals(experiment, source, target)
    return Needs(source=source, target=target, totals=totals)


def _totals(experiment: Experiment, source: ModelNeeds, target: ModelNeeds) -> Totals:
    data, train = experiment.data, experiment.train
    # More than attribution takes, which goes row by row; supervision runs batch_size rows without autograd.
    attributed = min(experiment.batch_size, data.attribution_rows) * data.max_length
    kept = target.weight_bytes if experiment.scorer.kind == "similarity" else target.head_bytes
    kind = getattr(experiment.method, "kind", None)
    source_phase = source.weight_bytes + kept + _activations(source, attributed)
    if kind == "seeking":  # scores every weight of the source's layers, with the target beside it
        source_phase += target.weight_bytes + 4 * source.shape.layers * source.shape.layer_parameters
    trained = min(train.micro_batch_size, train.batch_size) * data.max_length
    training_state = _training_state(experiment, source.shape, target.shape)
    beside = source.weight_bytes if experiment.live or kind in ("hidden", "laten") else source.head_bytes
    training = target.weight_bytes + training_state + beside + _training_activations(target, trained, train)
    target_phase = max(training, 2 * target.weight_bytes + beside)
    return Totals(
        source_phase=source_phase,
        training_state=training_state,
        target_phase=target_phase,
        memory=max(source_phase, target_phase),
        supervision=0 if experiment.live else _supervision(experiment, source, target),
        held_out=_held_out(experiment, source, target),
        scratch=_scratch(experiment, target),
        saved=target.weight_bytes,
        download=source.download_bytes + target.download_bytes,
    )


def accelerator(memory: int) -> str:
    """The smallest usual accelerator that a run of so many bytes fits."""
    if memory <= CPU_BYTES:
        return "none"
    fitting = [size for size in GPUS if memory <= USABLE * size * 10**9]
    return f"one of {fitting[0]} GB" if fitting else f"more than one of {GPUS[-1]} GB"


def describe(experiment: Experiment) -> list[str]:
    """The estimate of an experiment as lines of text."""
    needs = estimate(experiment)
    lines = [
        _model_line("source", experiment.source, needs.source),
        _model_line("target", experiment.target, needs.target),
    ]
    totals = needs.totals
    if totals is None:
        return [*lines, "memory, disk and downloads: unknown, since a model is"]
    return [
        *lines,
        f"for rows of data.max_length={experiment.data.max_length} tokens, all of them supervised:",
        f"memory: about {gb(totals.source_phase)} with the source, {gb(totals.target_phase)} with the target, "
        f"{gb(totals.training_state)} of it training state",
        f"accelerator: {accelerator(totals.memory)}",
        f"disk: at most {gb(totals.supervision + totals.held_out)} of supervision, {gb(totals.scratch)} until the "
        f"run ends, and {gb(totals.saved)} for the trained target",
        f"downloads: {gb(totals.download)} of weights, besides the data set",
    ]


def presets_table(experiments: Iterable[Experiment]) -> str:
    """Experiments with the sizes of their models and what they need, one a line."""
    rows = [("preset", "source → target", "parameters", "download", "memory", "accelerator", "licence")]
    for experiment in experiments:
        needs = estimate(experiment)
        models, totals = (needs.source, needs.target), needs.totals
        names = (config.path.rsplit("/", 1)[-1] for config in (experiment.source, experiment.target))
        licences = dict.fromkeys(UNKNOWN if model is None else _licence(model) for model in models)
        rows.append(
            (
                experiment.name,
                " → ".join(names),
                " → ".join("?" if model is None else _count(model.shape.parameters) for model in models),
                "?" if totals is None else gb(totals.download),
                "?" if totals is None else gb(totals.memory),
                "?" if totals is None else accelerator(totals.memory),
                ", ".join(licences),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _model_needs(model: ModelConfig, shape: ModelShape | None) -> ModelNeeds | None:
    shape = shape or find_shape(model)
    if shape is None:
        return None
    published, file_size = _published(model.path)
    entry = catalogue().get(published)
    dtype = shape.dtype if model.dtype == "auto" else model.dtype
    fetched = entry is not None and not model.path.startswith("generated:")
    return ModelNeeds(
        shape=shape,
        dtype=dtype,
        weight_bytes=_weight_bytes(shape, dtype, in_4bit=model.load_in_4bit),
        download_bytes=(file_size or checkpoint_bytes(shape)) if fetched else 0,
        licence=None if entry is None else entry.licence,
        gated=entry is not None and entry.gated,
    )


def checkpoint_bytes(shape: ModelShape) -> int:
    """Weights as they are published."""
    return shape.parameters * _bytes(shape.dtype)


def _published(path: str) -> tuple[str, int | None]:
    """The key of a model in the catalogue, and the size of the file where one stands for the checkpoint."""
    from .known_models import known_path  # which reads this catalogue

    known = known_path(path)
    if known is None:
        return path, None
    return known.weights, known.file.size if known.file else None


def _weight_bytes(shape: ModelShape, dtype: str, *, in_4bit: bool) -> int:
    """With 4 bits: every layer in half a byte a number and a float32 scale for 64 numbers, the rest in the dtype."""
    layers = shape.layers * shape.layer_parameters if in_4bit else 0
    return (shape.parameters - layers) * _bytes(dtype) + layers * 9 // 16


def _activations(model: ModelNeeds, tokens: int) -> int:
    """What autograd keeps of all layers, attention computed without its n × n matrices; the loss not included."""
    shape = model.shape
    values = WIDTHS * max(shape.width, shape.heads_width) + INTERMEDIATES * shape.intermediate + STATES * shape.state
    return tokens * shape.layers * values * _bytes(model.dtype)


def _training_activations(model: ModelNeeds, tokens: int, train: TransferConfig) -> int:
    """In the stage of layer 1; recomputed layers keep their inputs, and two layers are whole at a time."""
    if not train.recompute_suffix:
        return _activations(model, tokens)
    inputs = tokens * model.shape.layers * model.shape.width * _bytes(model.dtype)
    return inputs + 2 * _activations(model, tokens) // model.shape.layers


def _training_state(experiment: Experiment, source: ModelShape, target: ModelShape) -> int:
    """Of each trained number in float32: itself, two moments, its gradient of each term, and their sum.

    `hidden` trains a projection for each target layer too, `laten` a hypernetwork for each of four kinds of neurons.
    Muon keeps one moment, and needs at most six copies of the largest matrix, which is a third of a layer or less.
    """
    weights, moments = experiment.train.weights, 2 if experiment.train.optimiser == "adamw" else 3
    terms = sum(weight > 0 for weight in (weights.geometry, weights.output, weights.answer, weights.label))
    trained, kind = _trained(experiment, target), getattr(experiment.method, "kind", None)
    if kind == "hidden":
        trained += target.layers * source.width * target.width
    if kind == "laten":
        trained = 4 * source.width * (source.width + target.width)
    return 4 * trained * (1 + moments + terms + 1)


def _trained(experiment: Experiment, shape: ModelShape) -> int:
    """Numbers that train together: in the largest stage, or in all layers where a method trains them at once."""
    trainable, layers, whole = experiment.train.trainable, 1, shape.layer_parameters
    joint = getattr(experiment.method, "trainable", None)
    if isinstance(joint, (FullLayer, LoraLayer)):
        trainable, layers, whole = joint, shape.layers, shape.parameters
    if isinstance(trainable, FullLayer):
        return whole
    modules = trainable.modules or shape.linear_features  # none named: all of them
    return layers * trainable.rank * sum(shape.linear_features.get(name, 0) for name in modules)


def _supervision(experiment: Experiment, source: ModelNeeds, target: ModelNeeds) -> int:
    data = experiment.data
    return _store(experiment.supervision, data.train_rows, experiment, source, target)


def _held_out(experiment: Experiment, source: ModelNeeds, target: ModelNeeds) -> int:
    exact = experiment.supervision.model_copy(update={"output": FinalHidden(), "dtype": "float32"})
    return _store(exact, experiment.data.held_out_rows, experiment, source, target)


def _scratch(experiment: Experiment, target: ModelNeeds) -> int:
    """The inputs of the frontier layer, the weights of every stage, and one state more than are kept."""
    data, shape = experiment.data, target.shape
    replayed = data.max_length * data.train_rows * shape.width
    stages = shape.layers * shape.layer_parameters
    train = experiment.train
    are_kept = train.checkpoint_steps is not None or train.checkpoint_minutes is not None
    states = 3 * _trained(experiment, shape) * (KEPT_STATES + 1) if are_kept else 0
    return (replayed + stages) * _bytes(target.dtype) + 4 * states


def _store(
    settings: SupervisionSettings, rows: int, experiment: Experiment, source: ModelNeeds, target: ModelNeeds
) -> int:
    """Rows of the greatest length, all supervised, every source layer paired that can be."""
    tokens = rows * experiment.data.max_length
    return store_bytes(
        settings,
        examples=rows,
        tokens=tokens,
        supervised_tokens=tokens,
        layers=min(source.shape.layers, target.shape.layers),
        width=(source if experiment.transport.frame == "none" else target).shape.width,
        source_width=source.shape.width,
        head_bytes=source.head_bytes,
        entries=source.shape.vocabulary,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _model_line(role: str, config: ModelConfig, model: ModelNeeds | None) -> str:
    if model is None:
        gguf = config.path.endswith(".gguf")
        return f"{role} {config.path}: {'unknown: a .gguf file is read when it is converted' if gguf else UNKNOWN}"
    shape = model.shape
    positions = "" if shape.positions is None else f", at most {shape.positions} tokens"
    return (
        f"{role} {config.path}: {_count(shape.parameters)} parameters, {shape.layers} layers of width {shape.width}, "
        f"{'tied' if shape.tied else 'own'} head of {shape.vocabulary} entries{positions}; "
        f"{gb(model.weight_bytes)} in {model.dtype}; licence {_licence(model)}"
    )


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if parameters >= 0.9995 * unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters / 1000:.0f}k"


def _licence(model: ModelNeeds) -> str:
    return "unknown" if model.licence is None else model.licence + (" (gated)" if model.gated else "")


def gb(count: int) -> str:
    """Bytes in units of 10⁹, or of 10⁶ where that is too coarse."""
    if count == 0:
        return "none"
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
