"""Supervision of training examples: one protocol, whether it is stored or computed on demand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from semalign_attribution import Batch, Supervised
from semalign_geometry import ClassHead, Head, OutputHead, TopEntries, VocabularyClasses
from torch import Tensor

from ._settings import SupervisionManifest
from ._spans import BatchSpans


@dataclass(frozen=True, eq=False)
class FinalStates:
    """The source's output distribution as its final hidden states and its head."""

    hidden: Float[Tensor, "s d"]
    """Input of the source's head at the start of each span."""
    head: OutputHead
    """The source's head over the shared entries, or over the classes of two vocabularies."""


OutputTarget = TopEntries | FinalStates
"""The source's output distribution at the start of each span."""


@dataclass(frozen=True, eq=False)
class SupervisedBatch:
    """Some examples with the supervision of one target layer.

    With one tokenizer every answer token is a span.
    """

    batch: Batch
    """input_ids, attention_mask and labels as the target reads them, (b, n)."""
    positions: Supervised
    """The positions of `batch` that predict its p answer tokens."""
    reference: Float[Tensor, "b m t"] | None
    """y_k at the start of each span of each sequence, padded to the most spans; None without a layer."""
    output: OutputTarget
    """The source's output distribution at the starts of the s spans of all sequences."""
    spans: BatchSpans | None = None
    """Spans of two tokenizers; None with one."""
    source: Batch | None = None
    """The examples as the source reads them; None where it reads `batch`."""

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """Spans of each sequence."""
        return self.positions.counts if self.spans is None else self.spans.counts

    def at_spans(self, values: Shaped[Tensor, "p *d"]) -> Shaped[Tensor, "s *d"]:
        """Pick the rows of the first token of each span, of values at all answer tokens."""
        return values if self.spans is None else values[self.spans.starts]


@runtime_checkable
class SupervisionSource(Protocol):
    """Supervision of training examples, stored (`Supervision`) or computed on demand (`LiveSupervision`)."""

    @property
    def manifest(self) -> SupervisionManifest:
        """Settings, pairing, transport and sizes."""
        ...

    @property
    def lengths(self) -> Int[Tensor, " e"]:
        """Tokens of each example as the target reads it."""
        ...

    @property
    def counts(self) -> Int[Tensor, " e"]:
        """Spans of each example; its answer tokens with one tokenizer."""
        ...

    @property
    def answer_counts(self) -> Int[Tensor, " e"]:
        """Answer tokens of each example as the target reads it."""
        ...

    @property
    def entries(self) -> Int[Tensor, " v"]:
        """Ids of the target's vocabulary that the output distribution is over."""
        ...

    @property
    def classes(self) -> VocabularyClasses | None:
        """Classes of the two vocabularies that the output distribution is over; None with one tokenizer."""
        ...

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples as the target reads them."""
        ...

    def output_head(self, head: Head) -> OutputHead:
        """The target's head over the entries or classes that the output distribution is over.

        Args:
            head: the target's head over its whole vocabulary.
        """
        ...

    def __len__(self) -> int: ...

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples as the target reads them, padded on the right.

        Args:
            indices: examples, counted from 0.
            device: where the tensors go.

        Raises:
            SemalignError: an example does not exist.
        """
        ...

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision.

        Args:
            indices: examples, counted from 0.
            layer: target layer of the residual supervision, counted from 1; None for the output alone.
            device: where the tensors go.

        Raises:
            SemalignError: an example or a layer does not exist, or a live source computes values that are not finite.
        """
        ...


def position_mask(counts: Int[Tensor, " b"]) -> Bool[Tensor, "b m"]:
    """True at the real places of a padded (b, m, …) tensor of spans.

    Example:
        >>> import torch
        >>> position_mask(torch.tensor([1, 2])).tolist()
        [[True, False], [True, True]]
    """
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def output_head(head: Head, entries: Int[Tensor, " v"], classes: VocabularyClasses | None) -> OutputHead:
    """The target's head over these entries, or over classes where there are some."""
    return head.select(entries) if classes is None else ClassHead.of(head, classes.target, classes.count)


def target_entries(classes: VocabularyClasses) -> Int[Tensor, " v"]:
    """Ids of the target's vocabulary that are in a class."""
    return (classes.target >= 0).nonzero()[:, 0].cpu()
