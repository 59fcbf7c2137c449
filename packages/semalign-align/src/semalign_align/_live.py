"""Supervision that is computed when it is asked for, and never kept."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, supervised
from semalign_geometry import TopEntries, Transport
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ._residuals import SCALE, restored_residual
from ._settings import SupervisionManifest, SupervisionSettings, TopK
from ._source import SupervisingSource, residual_key
from ._store import FinalStates, OutputTarget, SupervisedBatch, padded


class LiveSupervision:
    """A source that stays in memory and supervises batch by batch; in place of a `Supervision`, with the same values.

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
            key: what tells the source and the batches from any other, such as a hash of both; training with
                checkpoints needs it.

        Raises:
            SemalignError: no examples, a pairing for another depth, or a transport for another width.
        """
        settings = settings or SupervisionSettings()
        self._source = SupervisingSource(source, pairing, transport, settings, entries)
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
        self._head = head = self._source.head
        self.manifest = SupervisionManifest(
            files={},
            key=key,
            settings=settings,
            pairing=pairing,
            transport=transport.manifest,
            examples=len(counts),
            tokens=int(self.lengths.sum()),
            supervised_tokens=sum(counts),
            residual_error=0.0,
            entries=len(head.weight),
            head_scale=head.scale,
            head_softcap=head.softcap,
            shards=(),
        )
        """What is supervised, and how; without files, and with no error of rounding measured."""

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return max(int(ids.max()) for ids in self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples, padded on the right.

        Raises:
            SemalignError: an example does not exist.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise SemalignError(f"example {index} does not exist: there are examples 0 to {len(self) - 1}")
        batch = padded([self._ids[index] for index in indices], [self._labels[index] for index in indices])
        return {key: value.to(device) for key, value in batch.items()}

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision; runs the source.

        Args:
            indices: examples, counted from 0.
            layer: target layer whose residual supervision is wanted, counted from 1; None for none.
            device: where the tensors go.

        Raises:
            SemalignError: an example or a layer does not exist, or the source computes values that are not finite.
        """
        source = self._source
        wanted = [] if layer is None else [s for s in source.spans if s[1] == source.pairing.source_of(layer)]
        batch = self.tokens(indices, device=device)
        positions = supervised(batch)
        part, _ = source.read(batch, positions, wanted)
        part = {name: value.to(device) for name, value in part.items()}
        reference = None
        for span in wanted:
            key = residual_key(span)
            stored = {suffix: part[key + suffix] for suffix in ("", SCALE) if key + suffix in part}
            vectors = restored_residual(stored).split(positions.counts.tolist())
            reference = pad_sequence(list(vectors), batch_first=True)
        return SupervisedBatch(batch, positions, reference, self._output(part, torch.device(device)))

    def _output(self, part: dict[str, Tensor], device: torch.device) -> OutputTarget:
        if isinstance(self._source.settings.output, TopK):
            return TopEntries(part["top_ids"], part["top_log_probs"], part["tail"])
        self._head = self._head.to(device)
        return FinalStates(part["final"], self._head)
