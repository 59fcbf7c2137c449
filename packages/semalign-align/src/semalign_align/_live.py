"""Supervision that is computed on demand, and never kept."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised, supervised
from semalign_geometry import Transport
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers import PreTrainedModel

from ._codec import decode
from ._settings import SupervisionSettings
from ._source import SupervisingSource
from ._supervision import SupervisedBatch, check_examples, padded


class LiveSupervision:
    """A source that stays in memory and supervises batch by batch, with the values of a `Supervision`.

    It needs no disk, but both models at once, and runs the source again for every batch of every pass.
    """

    def __init__(
        self,
        source: PreTrainedModel | DecoderView,
        batches: Iterable[Batch],
        pairing: LayerPairing,
        transport: Transport,
        *,
        settings: SupervisionSettings | None = None,
        entries: Int[Tensor, " v"] | None = None,
        key: str = "",
    ) -> None:
        """Take the examples; the source has not run yet.

        Args:
            source: the source model or its view, which must not change.
            batches: right-padded batches with supervised answers.
            pairing: the source layer of each target layer.
            transport: from the source's width to the target's.
            settings: what is supervised; values are rounded as a store rounds them.
            entries: vocabulary ids that both models share with equal ids; None for the source's whole head.
            key: cache key of the source and the batches, such as a hash of both; training with checkpoints needs it.

        Raises:
            SemalignError: no examples, a pairing for another depth, or a transport for another width.
        """
        self._source = SupervisingSource(source, pairing, transport, settings or SupervisionSettings(), entries)
        self._head = self._source.head
        self._ids: list[Tensor] = []
        self._labels: list[Tensor] = []
        counts: list[int] = []
        for batch in batches:
            if not len(next(iter(batch.values()), ())):
                continue
            counts += supervised(batch).counts.tolist()
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                self._ids.append(ids[mask != 0].cpu())
                self._labels.append(labels[mask != 0].cpu())
        if not counts:
            raise SemalignError("there are no examples to supervise: the batches are empty")
        self.lengths: Int[Tensor, " e"] = torch.tensor([len(ids) for ids in self._ids])
        """Tokens of each example."""
        self.counts: Int[Tensor, " e"] = torch.tensor(counts)
        """Supervised tokens of each example."""
        self.entries: Int[Tensor, " v"] = self._source.entries
        """Vocabulary ids that the output distribution is over."""
        self.manifest = self._source.manifest(
            key=key, examples=len(counts), tokens=int(self.lengths.sum()), supervised_tokens=sum(counts)
        )
        """Settings, pairing and sizes; without files, and without a measured error of rounding."""

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return max(int(ids.max()) for ids in self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples, padded on the right; see `SupervisionSource.tokens`."""
        check_examples(indices, len(self))
        batch = padded([self._ids[index] for index in indices], [self._labels[index] for index in indices])
        return {key: value.to(device) for key, value in batch.items()}

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision, for which the source runs; see `SupervisionSource.collate`."""
        device, source = torch.device(device), self._source
        tokens = self.tokens(indices)
        wanted = [] if layer is None else [source.pairing.source_of(layer)]
        part, _ = source.read(tokens, Supervised.of(tokens), wanted)
        part = {name: value.to(device) for name, value in part.items()}
        self._head = self._head.to(device)
        return decode(part.__getitem__, tokens, manifest=self.manifest, layer=layer, head=self._head)
