"""Everything of a model and of the process that a library call must leave as it was."""

from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Hooks, replaced forwards, modes, gradients, weights and the global random state, comparable with ==."""
    return {
        "modules": {
            name: (
                dict(module._forward_hooks),
                dict(module._forward_pre_hooks),
                dict(module._forward_hooks_with_kwargs),
                dict(module._forward_pre_hooks_with_kwargs),
                dict(module._backward_hooks),
                dict(module._backward_pre_hooks),
                module.__dict__.get("forward"),
                sorted(module.__dict__),
                module.training,
            )
            for name, module in model.named_modules()
        },
        "parameters": {
            name: (
                parameter.requires_grad,
                id(parameter),
                parameter.detach().float().nan_to_num(nan=7.0).tolist(),
                None if parameter.grad is None else parameter.grad.tolist(),
            )
            for name, parameter in model.named_parameters()
        },
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
    }


def unsettle(model: nn.Module) -> None:
    """A mixed state: training with one part in evaluation, some parameters frozen, one gradient kept."""
    model.train()
    list(model.modules())[-1].eval()
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
