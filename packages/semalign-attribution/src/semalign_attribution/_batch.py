"""Batches as transformers takes them: input_ids, attention_mask, and labels with −100 where nothing is supervised."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from semalign_geometry.base import SemalignError
from torch import Tensor

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each (b, n), padded on the right."""

IGNORE = -100
"""Label of a token that is not supervised."""


@dataclass(frozen=True, eq=False)
class Supervised:
    """The supervised positions of a batch: position t is supervised when token t + 1 is part of the answer."""

    mask: Bool[Tensor, "b n"]
    """True at the positions whose output predicts an answer token."""
    labels: Int[Tensor, " s"]
    """The answer tokens, in the order of `mask`."""
    counts: Int[Tensor, " b"]
    """Supervised positions of each example."""

    @classmethod
    def of(cls, batch: Batch) -> "Supervised":
        """Read the positions of a batch that `supervised` has checked before; nothing is checked again."""
        following = batch["labels"][:, 1:]
        mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
        mask[:, :-1] = (following != IGNORE) & (batch["attention_mask"][:, 1:] != 0)
        return cls(mask, following[mask[:, :-1]], mask.sum(1))

    def to(self, device: torch.device | str) -> "Supervised":
        """The same positions on a device."""
        return Supervised(self.mask.to(device), self.labels.to(device), self.counts.to(device))

    def example_means(self, values: Tensor) -> Tensor:
        """Mean of one value per supervised position within each example: (s,) → (b,), in the dtype of the values."""
        counts = self.counts.to(values.device)
        example = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
        sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, example, values)
        return sums / counts


def supervised(batch: Batch) -> Supervised:
    """Find the supervised positions of a batch.

    Raises:
        SemalignError: a key is missing, shapes differ, the padding is not on the right, or an example has no answer
            token.
    """
    missing = [key for key in ("input_ids", "attention_mask", "labels") if key not in batch]
    if missing:
        raise SemalignError(f"the batch lacks {', '.join(missing)}: it needs input_ids, attention_mask and labels")
    shapes = {key: tuple(batch[key].shape) for key in ("input_ids", "attention_mask", "labels")}
    if len(set(shapes.values())) > 1 or batch["labels"].dim() != 2:
        raise SemalignError(f"input_ids, attention_mask and labels must have one shape (b, n), got {shapes}")
    if not bool(batch["attention_mask"][:, :1].all()):
        raise SemalignError('the batch is padded on the left: set tokenizer.padding_side = "right"')
    real = batch["attention_mask"] != 0
    if bool((real[:, 1:] > real[:, :-1]).any()):
        raise SemalignError("attention_mask has a hole: padding must follow the tokens of an example")
    positions = Supervised.of(batch)
    if not bool((positions.counts > 0).all()):
        raise SemalignError(
            f"example {int((positions.counts == 0).nonzero()[0, 0])} of the batch has no answer token: "
            f"labels are {IGNORE} everywhere after the first token"
        )
    return positions
