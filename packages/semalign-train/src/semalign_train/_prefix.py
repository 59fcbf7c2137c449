"""The inputs of the frontier layer for the whole training set, computed once and advanced layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from semalign_align import LiveSupervision, Ranks, Supervision
from semalign_attribution import DecoderView
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class PrefixCache:
    """h_p of every token of the training set, after the frozen layers 1 … p; layers up to p never run again.

    Because each layer is causal and only real tokens are kept, the stream does not depend on how examples were padded.
    The processes of a machine share one file, and the work of advancing it; without a file each holds all streams.
    """

    def __init__(
        self,
        view: DecoderView,
        supervision: Supervision | LiveSupervision,
        *,
        folder: Path | None,
        batch_size: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Start before layer 1, with nothing computed.

        Args:
            view: the target.
            supervision: the store that holds the training tokens.
            folder: where the streams are kept in a memory-mapped file; None keeps them in memory.
            batch_size: examples in a forward run of `advance`.
            ranks: the processes that train together; None takes those of torch.distributed.
        """
        self._view = view
        self._supervision = supervision
        self._batch_size = batch_size
        self._ranks = ranks = ranks or Ranks.current()
        self._file = None if folder is None else folder / f"prefix-{ranks.rank - ranks.local_rank}.bin"
        self._starts = torch.cat([torch.zeros(1, dtype=torch.long), supervision.lengths.cumsum(0)]).tolist()
        self._streams: Float[Tensor, "tokens d"] | None = None
        self.position = 0
        """p, the last layer whose output is held; 0 when nothing is (the model computes its own embeddings)."""

    def inputs(self, indices: Sequence[int]) -> Float[Tensor, "b n d"] | None:
        """The streams of some examples, padded on the right, on the target's device; None at position 0."""
        if self.position == 0:
            return None
        assert self._streams is not None
        parts = [self._streams[self._starts[index] : self._starts[index + 1]] for index in indices]
        return pad_sequence(parts, batch_first=True).to(self._view.device)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run the layers from the present position to `layer` once over all examples, in place."""
        if layer <= self.position:
            return
        order = torch.argsort(self._supervision.lengths).tolist()  # alike lengths together: little padding
        chunks = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        for indices, mine in self._ranks.deal_locally(chunks) if self._file else ((chunk, True) for chunk in chunks):
            batch = self._supervision.tokens(indices, device=self._view.device)
            trace = self._view.trace(
                batch, start=self.position + 1, hidden=self.inputs(indices), stop=layer, keep=[layer]
            )
            if self._streams is None:
                self._streams = self._allocate(trace.outputs[layer])
            if mine:
                self._store(indices, trace.outputs[layer])
        self._ranks.wait()
        self.position = layer

    def _allocate(self, like: Tensor) -> Float[Tensor, "tokens d"]:
        """Room for all streams; all processes come here together."""
        shape = (self._starts[-1], like.shape[-1])
        if self._file is None:
            return torch.empty(shape, dtype=like.dtype)
        size = shape[0] * shape[1]
        if self._ranks.local_rank == 0:
            _reserve(self._file, size * like.element_size())
        self._ranks.wait()
        flat = torch.from_file(str(self._file), shared=True, size=size, dtype=like.dtype)
        self._ranks.wait()
        if self._ranks.local_rank == 0:
            self._file.unlink()  # the mapping keeps the content until it goes
        return flat.view(shape)

    def _store(self, indices: Sequence[int], streams_BND: Tensor) -> None:
        assert self._streams is not None
        for row, index in zip(streams_BND, indices, strict=True):
            start, end = self._starts[index], self._starts[index + 1]
            self._streams[start:end] = row[: end - start].to(self._streams.device)


def _reserve(file: Path, size: int) -> None:
    """Write `size` bytes, so that a full disk is an OSError here and not a fault when the mapped file is touched."""
    block = bytes(2**20)
    with file.open("wb") as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
