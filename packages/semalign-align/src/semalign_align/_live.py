"""Supervision that is computed on demand, and never kept."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised
from semalign_geometry import Head, OutputHead, Transport, VocabularyClasses
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers import PreTrainedModel

from ._codec import decode
from ._examples import Examples, Rows
from ._settings import SupervisionSettings
from ._source import SupervisingSource
from ._spans import AnyBatch
from ._supervision import SupervisedBatch, output_head


class LiveSupervision:
    """A source that stays in memory and supervises batch by batch, with the values of a `Supervision`.

    It needs no disk, but both models at once, and runs the source again for every batch of every pass.
    """

    def __init__(
        self,
        source: PreTrainedModel | DecoderView,
        batches: Iterable[AnyBatch],
        pairing: LayerPairing,
        transport: Transport,
        *,
        settings: SupervisionSettings | None = None,
        entries: Int[Tensor, " v"] | None = None,
        classes: VocabularyClasses | None = None,
        key: str = "",
    ) -> None:
        """Take the examples; the source has not run yet.

        Args:
            source: the source model or its view, which must not change.
            batches: right-padded batches with supervised answers; `PairedBatch` where the tokenizers differ.
            pairing: the source layer of each target layer.
            transport: from the source's width to the target's.
            settings: what is supervised; values are rounded as a store rounds them.
            entries: vocabulary ids that both models share with equal ids; None for the source's whole head.
            classes: classes of the two vocabularies, with `PairedBatch` alone.
            key: cache key of the source and the batches, such as a hash of both; training with checkpoints needs it.

        Raises:
            SemalignError: no examples, a pairing for another depth, a transport for another width, or rows of two
                tokenizers without classes or the other way round.
        """
        self._source = SupervisingSource(
            source, pairing, transport, settings or SupervisionSettings(), entries, classes
        )
        self._head = self._source.head
        found = [Rows.of(batch, paired=classes is not None) for batch in batches]
        rows = [each for each in found if each is not None]
        if not rows:
            raise SemalignError("there are no examples to supervise: the batches are empty")
        kept = {name: torch.cat([each.kept[name] for each in rows]) for name in rows[0].kept}
        self._examples = Examples([kept.__getitem__], paired=classes is not None)
        self.lengths: Int[Tensor, " e"] = self._examples.lengths
        """Tokens of each example as the target reads it."""
        self.counts: Int[Tensor, " e"] = self._examples.counts
        """Spans of each example; its answer tokens with one tokenizer."""
        self.answer_counts: Int[Tensor, " e"] = self._examples.answer_counts
        """Answer tokens of each example as the target reads it."""
        self.entries: Int[Tensor, " v"] = self._source.entries
        """Ids of the target's vocabulary that the output distribution is over."""
        self.classes = classes
        """Classes of the two vocabularies that the output distribution is over; None with one tokenizer."""
        self.manifest = self._source.manifest(
            key=key,
            examples=len(self._examples),
            tokens=int(self.lengths.sum()),
            supervised_tokens=sum(each.answer_tokens for each in rows),
            spans=int(self.counts.sum()),
        )
        """Settings, pairing and sizes; without files, and without a measured error of rounding."""

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples as the target reads them."""
        return self._examples.largest_id

    def __len__(self) -> int:
        return len(self._examples)

    def output_head(self, head: Head) -> OutputHead:
        """The target's head over what `output` is over; see `SupervisionSource.output_head`."""
        return output_head(head, self.entries, self.classes)

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples as the target reads them; see `SupervisionSource.tokens`."""
        return {key: value.to(device) for key, value in self._examples.tokens(indices).items()}

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision, for which the source runs; see `SupervisionSource.collate`."""
        device, source, examples = torch.device(device), self._source, self._examples
        tokens = examples.tokens(indices)  # checks the indices
        read_by_source = examples.source_tokens(indices) or tokens
        span_tokens = examples.read("span_source", indices) if examples.paired else None
        wanted = [] if layer is None else [source.pairing.source_of(layer)]
        part, _ = source.read(read_by_source, Supervised.of(read_by_source), wanted, span_tokens=span_tokens)
        part = {name: value.to(device) for name, value in part.items()}
        self._head = self._head.to(device)
        return decode(part.__getitem__, examples, indices, manifest=self.manifest, layer=layer, head=self._head)
