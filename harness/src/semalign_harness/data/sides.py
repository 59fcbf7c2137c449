"""The two sides of a row, for models with different tokenizers: as the source reads it, and as the target does."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from semalign_align import AnyBatch, PairedBatch
from semalign_attribution import Batch, supervised
from torch import Tensor

from .encoding import Example, Role
from .rows import batches

ROLES: tuple[Role, ...] = ("source", "target")


def side_of(batch: AnyBatch, role: Role) -> Batch:
    """Return a batch as one of the models reads it; with one tokenizer, both read the same."""
    if not isinstance(batch, PairedBatch):
        return batch
    return batch.source if role == "source" else batch.target


def span_starts(batch: AnyBatch, role: Role) -> Bool[Tensor, "b n"]:
    """Return True at the positions of one side that predict the first token of a span.

    With one tokenizer every answer token is a span. On both sides the spans have one order.

    Raises:
        SemalignError: the batch is none that models read, or an example has no answer token.
    """
    mask = supervised(side_of(batch, role)).mask
    if not isinstance(batch, PairedBatch):
        return mask
    lengths = torch.tensor([length for spans in batch.spans for length in getattr(spans, role)])
    starts = torch.zeros_like(mask)
    rows, places = mask.nonzero(as_tuple=True)
    first = lengths.cumsum(0) - lengths
    starts[rows[first], places[first]] = True
    return starts


def span_count(example: Example) -> int:
    """Return the number of supervised spans of a row's answer."""
    side = example.source
    return len(example.answer_ids) if side is None else len(side.spans.target[side.compared])


def one_sided(example: Example, role: Role) -> Example:
    """Return a row as one of the models reads it, without the other side."""
    side = example.source
    if side is None:
        return example
    if role == "target":
        return replace(example, source=None)
    return Example(side.prompt_ids, side.answer_ids, example.answer)


def batches_of(examples: Sequence[Example], batch_size: int, role: Role) -> list[Batch]:
    """Make batches of rows as one of the models reads them, in order of its length."""
    return [side_of(batch, role) for batch in batches([one_sided(example, role) for example in examples], batch_size)]
