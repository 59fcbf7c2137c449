"""Muon, with products in a precision of choice: torch's own are in bfloat16, which some processors emulate."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from semalign_geometry.base import SemalignError
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic aX + b(XXᵀ)X + c(XXᵀ)²X."""
ITERATIONS = 5
ADAMW_LENGTH = 0.2
"""Root mean square of AdamW's updates, in units of its rate. Source: Liu et al. (2025), arXiv 2502.16982."""
TOGETHER = 2**21
"""Numbers that are orthogonalised together at the most, unless one matrix has more: small ones save calls, large ones
would cost memory."""


class Muon(torch.optim.Optimizer):
    """Moves matrices by their orthogonalised Nesterov momentum (0.95), as far as AdamW would at the same rate; `lr` of
    its group is set by the caller.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; length of a step: Liu et al. (2025).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        weight_decay: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take the matrices that move.

        Args:
            matrices: parameters of two dimensions.
            weight_decay: decoupled weight decay.
            dtype: of the products; None takes that of the matrices.

        Raises:
            SemalignError: a parameter of other than two dimensions.
        """
        matrices = list(matrices)
        for matrix in matrices:
            if matrix.ndim != 2:
                raise SemalignError(f"Muon moves matrices, got a parameter of shape {tuple(matrix.shape)}")
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient; small matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                factor = ADAMW_LENGTH * math.sqrt(max(shape))
                size = max(1, TOGETHER // shape.numel())
                for start in range(0, len(matrices), size):
                    some = matrices[start : start + size]
                    directions = torch.stack([self._direction(matrix) for matrix in some])
                    updates = orthogonalised(directions.to(self._dtype or directions.dtype))
                    for matrix, update in zip(some, updates, strict=True):
                        matrix.mul_(1 - group["lr"] * group["weight_decay"])
                        matrix.sub_(group["lr"] * factor * update)

    def _direction(self, matrix: nn.Parameter) -> Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
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
