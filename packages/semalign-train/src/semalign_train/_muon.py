"""Muon, with products in a precision of choice: torch's own are in bfloat16, which some processors emulate."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
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
    """Moves matrices by their orthogonalised Nesterov momentum (0.95); `lr` of its group is set by the caller.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; length `adamw`: Liu et al. (2025).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        weight_decay: float,
        length: Literal["spectral", "adamw"] = "spectral",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take the matrices that move.

        Args:
            matrices: parameters of two dimensions.
            weight_decay: decoupled weight decay.
            length: of an update: spectral norm √max(1, rows/columns) times the rate, or the root mean square that
                AdamW's updates have at the same rate.
            dtype: of the products; None takes that of the matrices.
        """
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self._length, self._dtype = length, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix; small matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                size = max(1, TOGETHER // shape.numel())
                for start in range(0, len(matrices), size):
                    some = matrices[start : start + size]
                    directions = torch.stack([self._direction(matrix) for matrix in some])
                    updates = orthogonalised(directions.to(self._dtype or directions.dtype))
                    for matrix, update in zip(some, updates, strict=True):
                        matrix.mul_(1 - group["lr"] * group["weight_decay"])
                        matrix.sub_(group["lr"] * self._factor(*shape) * update)

    def _direction(self, matrix: nn.Parameter) -> Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)

    def _factor(self, rows: int, columns: int) -> float:
        if self._length == "adamw":
            return ADAMW_LENGTH * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))


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
