"""The optimiser of the trainable parameters, with a state that can be kept and restored."""

from collections.abc import Iterable, Mapping

import torch
from semalign_geometry.base import SemalignError
from torch import Tensor, nn

from ._muon import Muon
from ._settings import TrainSettings


class Optimiser:
    """AdamW, or Muon for matrices and AdamW for the rest, over parameters in a fixed order.

    Laws: `adamw` moves every parameter as torch's AdamW does; from a kept state both resume to the same bits.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: TrainSettings,
        *,
        products: torch.dtype | None = None,
        matrices: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """Take the parameters.

        Args:
            parameters: all that train; their places name them in the state.
            config: optimiser, weight decay and betas.
            products: dtype of Muon's products; None takes that of the parameters.
            matrices: parameters that Muon may move, of which it takes those with two dimensions; None for all. Leave
                out embeddings and heads: their rows are entries, of which a batch sees few.

        Raises:
            SemalignError: there are no parameters.
        """
        self._parameters = parameters = list(parameters)
        if not parameters:
            raise SemalignError("there are no parameters to train")
        self.moves = 0
        """Steps that were begun since this optimiser was made."""
        allowed = set(map(id, parameters if matrices is None else matrices)) if config.optimiser == "muon" else set()
        by_muon = [each for each in parameters if id(each) in allowed and each.ndim == 2]
        moved = set(map(id, by_muon))
        by_adamw = [each for each in parameters if id(each) not in moved]
        self._parts: list[torch.optim.Optimizer] = []
        if by_muon:
            self._parts.append(Muon(by_muon, weight_decay=config.weight_decay, dtype=products))
        if by_adamw:
            self._parts.append(torch.optim.AdamW(by_adamw, betas=config.betas, weight_decay=config.weight_decay))

    def step(self, rate: float) -> None:
        """Move every parameter by its gradient, at a learning rate."""
        self.moves += 1
        for part in self._parts:
            part.param_groups[0]["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and the optimiser's state of each, by their place."""
        tensors = {}
        for place, parameter in enumerate(self._parameters):
            tensors[f"parameter.{place}"] = parameter.detach()
            for part in self._parts:
                tensors |= {f"{name}.{place}": value for name, value in part.state.get(parameter, {}).items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        owner = {parameter: part for part in self._parts for parameter in part.param_groups[0]["params"]}
        for name, value in tensors.items():
            kind, _, place = name.rpartition(".")
            parameter = self._parameters[int(place)]
            if kind == "parameter":
                parameter.copy_(value)
            else:
                # AdamW keeps its step count on the CPU wherever the parameter lives.
                owner[parameter].state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
