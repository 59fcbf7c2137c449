"""Sizes of a model, read from its configuration: memory and disk depend on them.

Those of the catalogue are kept in `shapes.json`, so that tables need no torch. `python -m
semalign_harness.models.shape` computes that file again.
"""

import functools
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import TypeAdapter
from semalign_geometry.base import Settings

from ..util.failures import naming
from .catalogue import CatalogueEntry, catalogue, known_path
from .settings import ModelConfig

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from torch import nn
    from transformers import PreTrainedConfig

WIDTHS, INTERMEDIATES, STATES = 20, 3, 4
"""Upper bounds of the values that autograd keeps of each token in each layer, in widths (of the stream, or of all heads
where more), intermediate sizes and states. They were measured with frozen weights on Llama, Qwen 2 and 3, GPT-NeoX,
Gemma 3, Mamba 1 and 2 and Falcon Mamba."""


SMALL = 1_000_000
"""Parameters from which on a model may gain from several threads."""


class Heads(NamedTuple):
    """The attention of a layer, the widest where layers differ; all 0 in a model without attention."""

    queries: int
    """Heads of queries."""
    keys: int
    """Heads of keys and values, fewer where queries share them."""
    width: int
    """Width of a head."""


class ModelShape(Settings):
    """Sizes of a model."""

    parameters: int
    """Numbers in the checkpoint, a tied matrix once."""
    layers: int
    """Number of layers."""
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


def find_shape(model: ModelConfig) -> ModelShape | None:
    """Return the shape of a model without reading its weights; None for neither a local folder nor a catalogue name.

    Raises:
        SemalignError: the folder holds no configuration of a decoder-only language model.
    """
    path = Path(model.path).expanduser()
    if not path.is_dir():
        return _catalogued().get(published_model(model.path)[0])
    from transformers import AutoConfig

    with naming(f"the configuration of {model.path!r} cannot be read"):
        return shape_of(AutoConfig.from_pretrained(path, trust_remote_code=False))


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHAPES = TypeAdapter(dict[str, ModelShape])
"""Content of `shapes.json`: shapes by hub id."""


def is_small(model: ModelConfig) -> bool:
    """Return whether a model is generated, or in a folder and has fewer parameters than `SMALL`."""
    if model.path.startswith("generated:"):
        return True
    try:
        shape = find_shape(model) if Path(model.path).expanduser().is_dir() else None
    except Exception:  # raised again, in words, where the model is opened
        return False
    return shape is not None and shape.parameters < SMALL


@functools.cache
def _catalogued() -> dict[str, ModelShape]:
    return SHAPES.validate_json((importlib.resources.files(__package__) / "shapes.json").read_bytes())


def shape_of_entry(entry: CatalogueEntry) -> ModelShape:
    """Return the shape of the model that an entry of the catalogue describes."""
    from transformers import AutoConfig

    return shape_of(AutoConfig.for_model(**entry.architecture))


def shape_of(config: "PreTrainedConfig") -> ModelShape:
    """Return the shape of the model that a configuration describes; fails as `empty_view`."""
    text = config.get_text_config(decoder=True)
    return shape_of_view(empty_view(text), text)


def shape_of_view(view: "DecoderView", text: "PreTrainedConfig") -> ModelShape:
    """Return the shape of a model that `empty_view` built from its configuration."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    largest = max(view.layers, key=_size)
    features: dict[str, int] = {}
    for name, module in largest.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            short = name.rsplit(".", 1)[-1]
            features[short] = features.get(short, 0) + sum(module.weight.shape)
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
        dtype=str(text.dtype or "float32").removeprefix("torch."),
        layer_parameters=_size(largest),
        linear_features=features,
    )


def empty_view(text: "PreTrainedConfig") -> "DecoderView":
    """Build the model that a configuration describes, without memory for its weights.

    Raises:
        SemalignError: it is no decoder-only causal language model, or cannot be built.
    """
    import torch
    from semalign_attribution import DecoderView
    from transformers import AutoModelForCausalLM

    with naming(f"no {text.model_type} model can be built from its configuration"), torch.device("meta"):
        return DecoderView(AutoModelForCausalLM.from_config(text, trust_remote_code=False))


def widest(config: "PreTrainedConfig", name: str) -> int:
    """Return a size of a configuration, the largest where layers have their own; 0 where there is none."""
    layers = config.per_layer_config if config.is_heterogeneous else [config]
    values = [getattr(layer, name, None) for layer in layers]
    return max((max(value, default=0) if isinstance(value, Sequence) else value or 0 for value in values), default=0)


def heads_of(config: "PreTrainedConfig") -> Heads:
    """Return the attention that the configuration of a language model describes."""
    queries = widest(config, "num_attention_heads")
    if queries == 0:
        return Heads(0, 0, 0)
    width = widest(config, "head_dim") or widest(config, "hidden_size") // queries
    return Heads(queries, widest(config, "num_key_value_heads") or queries, width)


def state_of(config: "PreTrainedConfig") -> int:
    """Count the numbers that the state space of one layer computes of each token; 0 without one."""
    return int(getattr(config, "expand", 0) * config.hidden_size) * widest(config, "state_size")


def row_bytes(config: "PreTrainedConfig", tokens: int, *, all_logits: bool) -> int:
    """Estimate the memory of one row of a batch that generates or scores, in float32.

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


def checkpoint_bytes(shape: ModelShape) -> int:
    """Return the size of the weights as they are published."""
    return shape.parameters * bytes_of(shape.dtype)


def _size(module: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def published_model(path: str) -> tuple[str, int | None]:
    """Return the key of a model in the catalogue, and the size of the file where one stands for the checkpoint."""
    known = known_path(path)
    if known is None:
        return path, None
    return known.weights, known.file.size if known.file else None


def bytes_of(dtype: str) -> int:
    """Return the bytes of a number of a dtype."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    import torch

    size: int = getattr(torch, dtype).itemsize
    return size


if __name__ == "__main__":
    shapes = {path: shape_of_entry(entry) for path, entry in catalogue().items()}
    Path(__file__).with_name("shapes.json").write_bytes(SHAPES.dump_json(shapes, indent=1) + b"\n")
