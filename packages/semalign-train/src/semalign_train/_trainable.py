"""The trainable part of a stage: one layer in float32, or a low-rank adapter on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, LoraModel
from semalign_attribution import DecoderView
from semalign_geometry import SemalignError
from torch import nn

from ._settings import FullLayer, LoraLayer


@contextmanager
def frontier(
    view: DecoderView, layer: int, trainable: FullLayer | LoraLayer, *, final_norm: bool
) -> Iterator[list[nn.Parameter]]:
    """The parameters that train in a stage, in float32; cast back, or merged, when the block ends without an exception.

    All other parameters are expected to be frozen already.
    """
    module = view.layer(layer)
    if isinstance(trainable, FullLayer):
        parameters = list(module.parameters())
    else:
        adapted = [name for name, _ in module.named_modules() if name.rsplit(".", 1)[-1] in trainable.modules]
        unmatched = set(trainable.modules) - {name.rsplit(".", 1)[-1] for name in adapted}
        if unmatched:
            linear = sorted({name for name, part in module.named_modules() if getattr(part, "weight", None) is not None})
            raise SemalignError(
                f"layer {layer} has no module named {', '.join(sorted(unmatched))}: train.trainable.modules can name "
                f"{', '.join(linear)}"
            )
        config = LoraConfig(r=trainable.rank, lora_alpha=trainable.alpha, target_modules=adapted, lora_dropout=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(layer)
            adapter = LoraModel(module, config, "frontier")
        parameters = [parameter for name, parameter in module.named_parameters() if "lora_" in name]
    if final_norm:
        parameters += list(view.final_norm.parameters())
    dtypes = [parameter.dtype for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
            parameter.grad = None
        if isinstance(trainable, LoraLayer):
            adapter.merge_and_unload()
