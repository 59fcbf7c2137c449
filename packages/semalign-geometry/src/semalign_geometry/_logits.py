"""Logits of an output head chunk by chunk, and the way back from them to the hidden states.

Shape suffixes: N tokens, W a chunk of entries or classes, E entries behind a chunk of classes, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ._class_head import ClassHead, OutputHead, class_logits
from ._head import Head, accumulation_dtype


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
    """From weights to Σ_w weights · ∂(temperature · logits_w) / ∂hidden."""


class LogitReader:
    """Reads the logits of a head for some hidden states, one chunk of entries or classes after the other."""

    def __init__(
        self,
        head: OutputHead,
        hidden: Float[Tensor, "n d"],
        *,
        temperature: float,
        dtype: torch.dtype,
        gradient: bool = False,
    ) -> None:
        """Of logits in `dtype`; where `gradient` is true, chunks can be pulled back."""
        self._head, self._hidden, self._temperature, self._dtype = head, hidden, temperature, dtype
        self._gradient = gradient
        self._rows = hidden.new_empty(0)
        """Rows of the weights behind a chunk of classes; one buffer, as new memory costs more than the copy."""

    def __call__(self, rows: slice) -> LogitChunk:
        """Make the logits of a chunk; its `pull` serves until the next chunk is made."""
        if isinstance(self._head, ClassHead):
            return self._classes(self._head, rows)
        head = self._head
        logits_NW = head.logits(self._hidden, rows).to(self._dtype)
        slope_NW = self._slope(head, logits_NW)
        self._temper(logits_NW)

        def pull(weights_NW: Tensor) -> Tensor:
            weights_NW = weights_NW if slope_NW is None else weights_NW * slope_NW
            return weighted_rows(head.weight[rows], head.scale, weights_NW)

        return LogitChunk(logits_NW, pull)

    def _classes(self, classes: ClassHead, rows: slice) -> LogitChunk:
        """Logits of classes. A member's share of its class is its probability given the class, the exponential of the
        difference of their logits."""
        ids, others = classes.members(rows)
        weight_ED = self._picked(classes.head.weight, ids)
        logits_EN = self._products(classes.head, weight_ED, ids).to(self._dtype)
        slope_EN = self._slope(classes.head, logits_EN)
        self._temper(logits_EN)
        logits_CN = class_logits(logits_EN, others)
        logits_NC = logits_CN.T.contiguous()  # a copy: the reader may overwrite it
        shares_EN = slope_EN
        if self._gradient and len(others):
            floor_CN = logits_CN.clamp_min(torch.finfo(self._dtype).min)  # a class may be −inf
            logits_EN[: len(floor_CN)] -= floor_CN
            logits_EN[len(floor_CN) :] -= floor_CN[others]
            shares_EN = logits_EN.exp_() if slope_EN is None else logits_EN.exp_().mul_(slope_EN)

        def pull(weights_NC: Tensor) -> Tensor:
            weights_EN = weights_NC.T
            if len(others):
                weights_CN = weights_EN.contiguous()
                weights_EN = torch.cat([weights_CN, weights_CN[others]])
            weights_EN = weights_EN if shares_EN is None else weights_EN * shares_EN
            return weighted_rows(weight_ED, classes.head.scale, weights_EN.T)

        return LogitChunk(logits_NC, pull)

    def _temper(self, logits: Tensor) -> None:
        if self._temperature != 1:
            logits /= self._temperature

    def _slope(self, head: Head, logits: Tensor) -> Tensor | None:
        return softcap_slope(head, logits) if self._gradient else None

    def _products(self, head: Head, weight_ED: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast(weight_ED.device.type, enabled=False):
            product_EN = weight_ED @ self._hidden.to(weight_ED.dtype).T
        return head.process(
            product_EN.to(accumulation_dtype(weight_ED)), None if head.bias is None else head.bias[ids, None]
        )

    def _picked(self, weight: Tensor, ids: Tensor) -> Tensor:
        if len(self._rows) < len(ids):
            self._rows = weight.new_empty(len(ids), weight.shape[1])
        return torch.index_select(weight.detach(), 0, ids, out=self._rows[: len(ids)])


def softcap_slope(head: Head, logits_NW: Tensor) -> Tensor | None:
    """Derivative of the soft-cap at these logits; None for a head without one."""
    return None if head.softcap is None else 1 - (logits_NW / head.softcap).square()


def weighted_rows(weight_WD: Tensor, scale: float, weights_NW: Tensor) -> Float[Tensor, "n d"]:
    """Σ_w weights · scale · W_w: pulls a gradient of the product with W back to the hidden states."""
    with torch.autocast(weights_NW.device.type, enabled=False):
        return scale * (weights_NW.to(weight_WD.dtype) @ weight_WD).to(weights_NW.dtype)
