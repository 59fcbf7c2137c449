"""How residuals are rounded for the store."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

SCALE = ".scale"
"""Ends the name of the tensor with the scale of each token."""


def stored_residual(vectors: Float[Tensor, "p d"], dtype: str) -> dict[str, Tensor]:
    """Vectors as they are stored, by the suffix of the tensor's name.

    `int8`: x ≈ scale · q with q from −127 to 127 and scale = max|x| / 127 for each token, so that no component is off
    by more than half a scale.
    """
    if dtype != "int8":
        return {"": vectors.to(getattr(torch, dtype))}
    scale_P1 = vectors.float().abs().amax(1, keepdim=True) / 127
    quantised = (vectors.float() / scale_P1.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return {"": quantised.to(torch.int8), SCALE: scale_P1}


def restored_residual(stored: Mapping[str, Tensor]) -> Float[Tensor, "p d"]:
    """Undo `stored_residual`: int8 becomes float32, other dtypes stay."""
    return stored[""].float() * stored[SCALE] if SCALE in stored else stored[""]
