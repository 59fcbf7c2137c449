"""Muon in float32, for the generated models: torch's own multiplies in bfloat16, which some processors emulate."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic aX + b(XXᵀ)X + c(XXᵀ)²X."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Moves matrices by their orthogonalised Nesterov momentum; `lr` of its group is set by the caller.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, weight_decay: float) -> None:
        """Take the matrices that move.

        Args:
            matrices: parameters of two dimensions.
            weight_decay: decoupled weight decay.
        """
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                alike[matrix.shape].append(matrix)
            for (rows, columns), matrices in alike.items():
                updates = orthogonalised(torch.stack([self._update(matrix) for matrix in matrices]))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(group["lr"] * math.sqrt(max(1.0, rows / columns)) * update)

    def _update(self, matrix: nn.Parameter) -> Tensor:
        assert matrix.grad is not None
        momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def orthogonalised(matrices: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
    """About U Vᵀ of each X = U S Vᵀ, by Newton–Schulz iterations: singular values end between about 0.7 and 1.2.

    Law: Q X R gives Q (·) R for orthogonal Q and R; a positive scale of X changes nothing.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
