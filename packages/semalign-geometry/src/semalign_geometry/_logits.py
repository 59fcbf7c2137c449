"""Logits of an output head chunk by chunk, and the way back from them to the hidden states.

Shape suffixes: N tokens, W a chunk of entries or classes, E entries behind a chunk of classes, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ._class_head import ClassHead, OutputHead, class_logits
from ._head import Head


def chunks(chunk: int, *heads: OutputHead) -> list[slice]:
    """Slices of the entries or classes of heads with equal numbers of them.

    Each holds `chunk` rows of each head at most, but one class at least.
    """
    count = heads[0].count
    starts = [head.starts for head in heads if isinstance(head, ClassHead)]
    if not starts:
        return [slice(start, start + chunk) for start in range(0, count, chunk)]
    rows = torch.arange(count + 1) + torch.stack(starts).sum(0)
    found, start = [], 0
    while start < count:
        stop = max(start + 1, int(torch.searchsorted(rows, rows[start] + chunk, right=True)) - 1)
        found.append(slice(start, stop))
        start = stop
    return found


@dataclass(frozen=True, eq=False)
class LogitChunk:
    """Logits of a chunk of a head, and what their gradient needs."""

    logits: Float[Tensor, "n w"]
    """Divided by the temperature; the reader may overwrite them."""
    pull: Callable[[Float[Tensor, "n w"]], Float[Tensor, "n d"]]
    """From weights to Σ_w weights · ∂(temperature · logits_w) / ∂hidden: a gradient of the logits, pulled back."""


def read_chunk(
    head: OutputHead,
    hidden: Float[Tensor, "n d"],
    rows: slice,
    *,
    temperature: float,
    dtype: torch.dtype,
    gradient: bool = False,
) -> LogitChunk:
    """Make the logits of some entries or classes, in `dtype`; `pull` may be called where `gradient` is true."""
    if isinstance(head, ClassHead):
        return _read_classes(head, hidden, rows, temperature, dtype, gradient)
    logits_NW = head.logits(hidden, rows).to(dtype)
    slope_NW = softcap_slope(head, logits_NW) if gradient else None
    logits_NW /= temperature

    def pull(weights_NW: Tensor) -> Tensor:
        return weighted_rows(head.weight[rows], head.scale, weights_NW if slope_NW is None else weights_NW * slope_NW)

    return LogitChunk(logits_NW, pull)


def _read_classes(
    head: ClassHead, hidden: Tensor, rows: slice, temperature: float, dtype: torch.dtype, gradient: bool
) -> LogitChunk:
    """Logits of classes; a member's share of its class is its conditional probability, exp(its logit − the class')."""
    members, others = head.members(rows)
    logits_NE = members.logits(hidden).to(dtype)
    slope_NE = softcap_slope(members, logits_NE) if gradient else None
    logits_NE /= temperature
    logits_NW = class_logits(logits_NE, others)
    classes = logits_NW.shape[1]
    shares_NE = None
    if gradient and len(others):
        floor_NW = logits_NW.clamp_min(torch.finfo(dtype).min)  # a class may be −inf
        shares_NE = logits_NE
        shares_NE[:, :classes] -= floor_NW
        shares_NE[:, classes:] -= floor_NW[:, others]
        shares_NE.exp_()
        if slope_NE is not None:
            shares_NE *= slope_NE
    elif slope_NE is not None:
        shares_NE = slope_NE

    def pull(weights_NW: Tensor) -> Tensor:
        weights_NE = torch.cat([weights_NW, weights_NW[:, others]], 1) if len(others) else weights_NW
        return weighted_rows(members.weight, members.scale, weights_NE if shares_NE is None else weights_NE * shares_NE)

    return LogitChunk(logits_NW, pull)


def softcap_slope(head: Head, logits_NW: Tensor) -> Tensor | None:
    """Derivative of the soft-cap at these logits; None for a head without one."""
    return None if head.softcap is None else 1 - (logits_NW / head.softcap).square()


def weighted_rows(weight_WD: Tensor, scale: float, weights_NW: Tensor) -> Float[Tensor, "n d"]:
    """Σ_w weights · scale · W_w: pulls a gradient of the product with W back to the hidden states."""
    with torch.autocast(weights_NW.device.type, enabled=False):
        return scale * (weights_NW.to(weight_WD.dtype) @ weight_WD).to(weights_NW.dtype)
