"""Weights, loaded and checked."""

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from torch import nn

from ..generation import Way, check_generation
from ..util.failures import reason
from .opening import MERGE, OpenedModel, loading_errors, open_model
from .settings import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = re.compile(r"lora_|base_layer|modules_to_save|adapter|ia3_|oft_|vera_|hada_|lokr_")


BESIDE = re.compile(r"vision|visual|image|audio|speech|sound|talker|projector|^mm_|^mtp|nextn|v_head|value_head|medusa")
"""Names of modules that stand beside the language model."""


COMPUTED = {"inv_freq", "original_inv_freq", "masked_bias", "position_ids"}
"""Names of buffers that models of earlier versions kept in their checkpoints."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model, checked, with its tokenizer."""

    model: "PreTrainedModel"
    """The model, on its device, in the dtype that it computes in."""
    tokenizer: "PreTrainedTokenizerBase"
    """Its tokenizer."""
    folder: str
    """Hub id or folder that transformers loads it from."""
    unused: tuple[str, ...] = ()
    """Tensors of its checkpoint that are no part of the language model, such as those that read images."""
    way: Way | None = None
    """Way of generation; None where that was not checked, and it must not generate."""
    unchecked: str | None = None
    """Sentence on the windows of its attention that were not checked; None where all were."""


def load_model(
    source: OpenedModel | ModelConfig, *, device: torch.device | str = "cpu", generates: bool = False
) -> LoadedModel:
    """Load a model's weights, and check that it is a finite, causal, decoder-only language model.

    Args:
        source: the model.
        device: device of its weights.
        generates: whether it will generate, which is then checked too.

    Raises:
        SemalignError: nothing is found there, it is an encoder, its weights are damaged, it could not be saved, or it
            shall generate and does not do so right.
    """
    from transformers import AutoModelForCausalLM

    opened = source if isinstance(source, OpenedModel) else open_model(source)
    settings = opened.settings
    in_4bit = settings.load_in_4bit or opened.quantised == "bitsandbytes"
    with loading_errors(settings, opened.place):
        dtype = opened.dtype(torch.device(device))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            opened.place,
            revision=opened.commit,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **(_in_4bit(dtype) if settings.load_in_4bit else {}),
            **({"device_map": {"": torch.device(device)}} if in_4bit else {}),
        )
        model, loading = loaded  # a pair, which the type of from_pretrained does not say
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        raise SemalignError(
            f"the checkpoint {settings.path} lacks {absent[0]}, or has it in another shape: fetch it again"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SemalignError(f"{settings.path} comes with an adapter: {MERGE}")
    unused = unused_tensors(model, loading["unexpected_keys"], settings.path)
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1 and not torch.isfinite(parameter).all():
            raise SemalignError(
                f"{settings.path} holds values that are not finite in {name}: fetch the checkpoint again"
            )
    _make_savable(model, settings.path)
    if in_4bit:  # which is there already, and cannot be moved
        _without_odd_packing(model)
    else:
        model.to(device)
    unchecked = DecoderView(model).verify()
    way = check_generation(model) if generates else None
    return LoadedModel(model, opened.tokenizer, opened.place, unused, way, unchecked)


def unused_tensors(model: "PreTrainedModel", surplus: Iterable[str], path: str) -> tuple[str, ...]:
    """Find the tensors of a checkpoint that are no part of the language model.

    Buffers are computed again, and are left out. Towers for images and sound, predictors of several tokens and value
    heads stand beside the language model. Anything else, such as an adapter that was not merged, a bias, a norm or a
    layer more, would change what it computes.

    Args:
        model: the language model.
        surplus: names in the checkpoint that the model has no place for, without those that transformers ignores.
        path: the checkpoint, for the message.

    Raises:
        SemalignError: there is something else.
    """
    buffers = {name for name, _ in model.named_buffers()}
    buffers |= {name.removeprefix(f"{model.base_model_prefix}.") for name in buffers}
    modules = {name for name, _ in model.named_modules()}
    beside: list[str] = []
    odd: list[str] = []
    for name in sorted(surplus):
        parts = name.split(".")
        if name in buffers or parts[-1] in COMPUTED:
            continue
        inside = next((i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in modules), 0)
        (beside if BESIDE.search(parts[inside]) or _predicts_more(model, parts) else odd).append(name)
    if odd:
        adapted = any(ADAPTER.search(name) for name in odd)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        remedy = MERGE if adapted else f"mend its config.json, which makes a model of {layers} layers without them"
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise SemalignError(
            f"the checkpoint {path} holds {len(odd)} tensors that its model has no place for "
            f"({', '.join(odd[:3])}{more}): {remedy}"
        )
    return tuple(beside)


def _predicts_more(model: "PreTrainedModel", parts: list[str]) -> bool:
    """Return whether a tensor belongs to a layer behind the last one, for further tokens (DeepSeek, GLM)."""
    config = model.config.get_text_config(decoder=True)
    first, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    places = [int(part) for before, part in pairwise(parts) if before == "layers" and part.isdecimal()]
    return bool(places) and first <= places[0] < first + more


def _in_4bit(dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of from_pretrained for linear layers in 4 bits.

    Raises:
        SemalignError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SemalignError('load_in_4bit needs bitsandbytes: pip install "semalign-harness[4bit]"')
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": quantisation}


def _without_odd_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing layers for processors with bfloat16 products where that fails: it packs their
    outputs in parts of 32."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        if layer.out_features % 32:
            layer.support_avx512bf16_for_cpu = False


def _make_savable(model: "PreTrainedModel", path: str) -> None:
    """Make the model savable: transformers refuses contradictory generation settings, but only when it saves."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True  # what settings of sampling, such as a temperature, ask for
        try:
            settings.validate(strict=True)
        except ValueError as error:
            raise SemalignError(
                f"{path} has generation settings that transformers refuses to save ({reason(error)}): mend its "
                "generation_config.json"
            ) from error
