"""Examples in shards: the tokens that each model reads, and what is kept of each answer, by example."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from semalign_attribution import IGNORE, Batch, Supervised, supervised
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._spans import AnyBatch, PairedBatch, sums_within

ShardTensors = Callable[[str], Any]
"""Returns a tensor of a shard by its name, all its examples end to end; it may lie in a file until it is sliced."""

SIZES = {name: "lengths" for name in ("input_ids", "labels")} | {
    name: "source_lengths" for name in ("source_ids", "source_labels")
}
"""Name of the sizes of tensors that do not have one row for each span."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch that was checked."""

    source: Batch
    """The rows as the source reads them."""
    positions: Supervised
    """The positions of `source` that predict its answer tokens."""
    answer_tokens: int
    """Answer tokens that the target reads."""
    kept: Mapping[str, Tensor]
    """The tensors of the rows' tokens and spans, end to end, as a store keeps them."""

    @property
    def span_tokens(self) -> Int[Tensor, " s"] | None:
        """Source tokens of each span; None with one tokenizer."""
        return self.kept.get("span_source")

    @classmethod
    def of(cls, batch: AnyBatch, *, paired: bool) -> "Rows | None":
        """Check a batch; None for one without rows.

        Args:
            batch: rows.
            paired: whether source and target have different tokenizers.

        Raises:
            SemalignError: rows of the other kind, rows that `supervised` refuses, or spans of other answers.
        """
        if isinstance(batch, PairedBatch) != paired:
            raise SemalignError(
                "rows of one tokenizer take no classes: pass each batch as PairedBatch, or leave classes out"
                if paired
                else "the rows have two tokenizers: pass the classes of both vocabularies (align_classes) as classes"
            )
        sides = (batch.source, batch.target) if isinstance(batch, PairedBatch) else (batch, batch)
        if not any(len(next(iter(side.values()), ())) for side in sides):
            return None
        positions = supervised(sides[0])
        if not isinstance(batch, PairedBatch):
            kept = _tokens(batch) | {"counts": positions.counts.to("cpu", torch.int32)}
            return cls(batch, positions, len(positions.labels), kept)
        answers = supervised(batch.target)
        _check_spans(batch, positions, answers)
        source_ids, source_labels, source_lengths = _tokens(batch.source).values()
        kept = _tokens(batch.target) | {
            "counts": _integers(len(spans.source) for spans in batch.spans),
            "source_ids": source_ids,
            "source_labels": source_labels,
            "source_lengths": source_lengths,
            "span_source": _integers(count for spans in batch.spans for count in spans.source),
            "span_target": _integers(count for spans in batch.spans for count in spans.target),
        }
        return cls(batch.source, positions, len(answers.labels), kept)


class Examples:
    """Examples of one or several shards, in their order."""

    def __init__(self, shards: Sequence[ShardTensors], *, paired: bool) -> None:
        """Read the sizes.

        Args:
            shards: one or more.
            paired: whether source and target have different tokenizers.
        """
        self.paired = paired
        self._shards = shards
        self._sizes: dict[str, list[int]] = {}
        self._starts: dict[str, list[int]] = {}  # of each example within its shard
        for name in ("lengths", "counts", *(["source_lengths"] if paired else [])):
            parts = [shard(name)[:].long() for shard in shards]
            self._sizes[name] = torch.cat(parts).tolist()
            self._starts[name] = torch.cat([part.cumsum(0) - part for part in parts]).tolist()
        self._shard_of = [number for number, shard in enumerate(shards) for _ in shard("lengths")[:]]
        self.lengths: Int[Tensor, " e"] = torch.tensor(self._sizes["lengths"])
        """Tokens of each example as the target reads it."""
        self.counts: Int[Tensor, " e"] = torch.tensor(self._sizes["counts"])
        """Spans of each example; its answer tokens with one tokenizer."""
        self.answer_counts: Int[Tensor, " e"] = self._answer_counts()
        """Answer tokens of each example as the target reads it."""

    def __len__(self) -> int:
        return len(self._shard_of)

    @property
    def largest_id(self) -> int:
        """The largest id of all tokens that the target reads."""
        return max(int(shard("input_ids")[:].max()) for shard in self._shards)

    def read(self, name: str, indices: Sequence[int]) -> Tensor:
        """One tensor of some examples, end to end."""
        return torch.cat(self._parts(name, indices))

    def tokens(self, indices: Sequence[int]) -> Batch:
        """Some examples as the target reads them.

        Raises:
            SemalignError: an example does not exist.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise SemalignError(f"example {index} does not exist: there are examples 0 to {len(self) - 1}")
        return _padded(self._parts("input_ids", indices), self._parts("labels", indices))

    def source_tokens(self, indices: Sequence[int]) -> Batch | None:
        """Some examples as the source reads them; None with one tokenizer."""
        if not self.paired:
            return None
        return _padded(self._parts("source_ids", indices), self._parts("source_labels", indices))

    def _answer_counts(self) -> Int[Tensor, " e"]:
        if not self.paired:
            return self.counts
        tokens = torch.cat([shard("span_target")[:].long() for shard in self._shards])
        return sums_within(tokens, self.counts)

    def _parts(self, name: str, indices: Sequence[int]) -> list[Tensor]:
        kind = SIZES.get(name, "counts")
        sizes, starts = self._sizes[kind], self._starts[kind]
        return [
            self._shards[self._shard_of[index]](name)[starts[index] : starts[index] + sizes[index]] for index in indices
        ]


def _tokens(batch: Batch) -> dict[str, Tensor]:
    """The real tokens of a batch, end to end, and how many each row has."""
    real_BN = batch["attention_mask"] != 0
    return {
        "input_ids": batch["input_ids"][real_BN].to("cpu", torch.int32),
        "labels": batch["labels"][real_BN].to("cpu", torch.int32),
        "lengths": real_BN.sum(1).to("cpu", torch.int32),
    }


def _check_spans(batch: PairedBatch, source: Supervised, target: Supervised) -> None:
    """Raise SemalignError unless there are spans for each row, which cover its answer tokens on both sides."""
    rows = (len(source.counts), len(target.counts), len(batch.spans))
    if len(set(rows)) > 1:
        raise SemalignError(
            f"a batch has {rows[0]} rows on the source's side, {rows[1]} on the target's and spans of {rows[2]}: "
            "pass each row on both sides"
        )
    for row, spans in enumerate(batch.spans):
        for side, counts, found in (("source", source, spans.source), ("target", target, spans.target)):
            if sum(found) != int(counts.counts[row]):
                raise SemalignError(
                    f"row {row} of a batch has {int(counts.counts[row])} answer tokens on the {side}'s side, its spans "
                    f"cover {sum(found)}: make them with align_spans from the same tokens"
                )


def _padded(ids: Sequence[Tensor], labels: Sequence[Tensor]) -> Batch:
    """A batch of examples, padded on the right."""
    lengths = torch.tensor([len(part) for part in ids])
    return {
        "input_ids": pad_sequence([part.long() for part in ids], batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": pad_sequence([part.long() for part in labels], batch_first=True, padding_value=IGNORE),
    }


def _integers(values: Iterable[int]) -> Int[Tensor, " n"]:
    return torch.tensor(list(values), dtype=torch.int32)
