"""The trainable part of a stage: one layer in float32, or a low-rank adapter on it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from torch import nn
from transformers.pytorch_utils import Conv1D

from ._settings import FullLayer, LoraLayer


@contextmanager
def frontier(
    view: DecoderView, layer: int, trainable: FullLayer | LoraLayer, *, final_norm: bool, seed: int = 0
) -> Iterator[list[nn.Parameter]]:
    """The parameters that train in a stage, in float32; cast back, or merged, when the block ends, on every path.

    All other parameters are expected to be frozen already.
    """
    also = list(view.final_norm.parameters()) if final_norm else []
    with trained(view.layer(layer), trainable, also=also, seed=seed * 100_003 + layer, name=f"layer {layer}") as found:
        yield found


@contextmanager
def trained(
    module: nn.Module,
    trainable: FullLayer | LoraLayer,
    *,
    also: Sequence[nn.Parameter] = (),
    seed: int = 0,
    name: str = "the model",
    lora: Mapping[str, Any] | None = None,
) -> Iterator[list[nn.Parameter]]:
    """The parameters of a module that train, in float32; cast back, or merged, when the block ends, on every path.

    Args:
        module: a layer, or several in a ModuleList; its parameters are expected to be frozen.
        trainable: all its parameters, or adapters on its linear modules.
        also: parameters elsewhere that train along.
        seed: of the adapters' start.
        name: what messages call the module.
        lora: further arguments of peft's LoraConfig, such as `lora_dropout`.

    Raises:
        SemalignError: the module has no linear module of a name in `trainable.modules`.
    """
    adapter = None if isinstance(trainable, FullLayer) else _adapted(module, trainable, seed, name, lora or {})
    named = module.named_parameters()
    parameters = [parameter for name, parameter in named if adapter is None or "lora_" in name]
    parameters += also
    dtypes = [parameter.dtype for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
            parameter.requires_grad_(True)
        yield parameters
    finally:
        if adapter is not None:
            adapter.merge_and_unload()  # while the adapter is float32: one rounding
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
            parameter.grad = None


def _adapted(module: nn.Module, trainable: LoraLayer, seed: int, name: str, lora: Mapping[str, Any]) -> Any:
    """Put adapters on the linear modules; returns peft's model around the module."""
    from peft import LoraConfig, LoraModel  # seconds to import, which only adapters are worth

    linear = {name: part for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    unmatched = sorted(set(trainable.modules) - set(known))
    if unmatched or not trainable.modules:
        raise SemalignError(
            f"{name} has no linear module named {', '.join(unmatched) or 'nothing'}: "
            f"adapters can name {', '.join(known)}"
        )
    adapted = [name for name in linear if name.rsplit(".", 1)[-1] in trainable.modules]
    config = LoraConfig(
        r=trainable.rank,
        lora_alpha=trainable.alpha,
        target_modules=adapted,
        fan_in_fan_out=isinstance(linear[adapted[0]], Conv1D),
        init_lora_weights=True if trainable.start == "zero" else trainable.start,
        **lora,
    )
    # Adapters are drawn on the CPU; torch.manual_seed would reset every other device as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LoraModel(module, config, "frontier")
