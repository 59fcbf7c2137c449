"""The inputs of the frontier layer for the examples that a stage needs, each advanced from where it stands."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from semalign_align import Ranks, SupervisionSource
from semalign_attribution import DecoderView
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class PrefixCache:
    """h_p of every token of an example, after the frozen layers 1 … p; layers up to p never run again on it.

    An example is advanced when a stage needs it, and never further: few passes cost less than a forward run.
    Law: the streams equal those of a forward run, whichever examples were advanced when, as long as the layers that
    they have been through stay as they were. Because each layer is causal and only real tokens are kept, the stream
    does not depend on how examples were padded. The processes of a machine share one file, and the work of advancing
    it; without a file each holds all streams.
    """

    def __init__(
        self,
        view: DecoderView,
        supervision: SupervisionSource,
        *,
        folder: Path | None,
        batch_size: int,
        ranks: Ranks | None = None,
        autocast: bool = False,
    ) -> None:
        """Start before layer 1, with nothing computed.

        Args:
            view: the target.
            supervision: the store that holds the training tokens.
            folder: where the streams are kept in a memory-mapped file; None keeps them in memory.
            batch_size: examples in a forward run of `advance`.
            ranks: the processes that train together; None takes those of torch.distributed.
            autocast: whether a float32 target's products are in bfloat16.
        """
        self._view = view
        self._supervision = supervision
        self._batch_size = batch_size
        self._autocast = autocast
        self._ranks = ranks = ranks or Ranks.current()
        self._file = None if folder is None else folder / f"prefix-{ranks.rank - ranks.local_rank}.bin"
        self._starts = torch.cat([torch.zeros(1, dtype=torch.long), supervision.lengths.cumsum(0)]).tolist()
        self._streams: Float[Tensor, "tokens d"] | None = None
        self.positions = [0] * len(supervision)
        """p of each example, the last layer whose output is held; 0 when nothing is (the model embeds its tokens)."""

    def inputs(self, indices: Sequence[int]) -> Float[Tensor, "b n d"] | None:
        """The streams of some examples that stand at one position, padded on the right, on the target's device; None
        at position 0."""
        (position,) = {self.positions[index] for index in indices}
        if position == 0:
            return None
        assert self._streams is not None
        parts = [self._streams[self._starts[index] : self._starts[index + 1]] for index in indices]
        return pad_sequence(parts, batch_first=True).to(self._view.device)

    @torch.no_grad()
    def advance(self, layer: int, indices: Iterable[int] | None = None) -> None:
        """Run the layers up to `layer` that some examples, or all, have not been through, in place.

        Where it fails, examples that it had begun with stand before layer 1 again.
        """
        behind: dict[int, list[int]] = defaultdict(list)
        for index in range(len(self.positions)) if indices is None else sorted(set(indices)):
            if self.positions[index] < layer:
                behind[self.positions[index]].append(index)
        for position, some in sorted(behind.items()):
            reached = 0
            try:
                self._run(position + 1, layer, some)
                reached = layer
            finally:
                for index in some:
                    self.positions[index] = reached

    def _run(self, start: int, stop: int, examples: list[int]) -> None:
        """Run some layers over examples that stand before them."""
        size = self._batch_size
        order = sorted(examples, key=lambda index: int(self._supervision.lengths[index]))  # little padding
        chunks = [order[place : place + size] for place in range(0, len(order), size)]
        for indices, mine in self._ranks.shard_locally(chunks) if self._file else ((chunk, True) for chunk in chunks):
            batch = self._supervision.tokens(indices, device=self._view.device)
            with torch.autocast(self._view.device.type, torch.bfloat16, enabled=self._autocast):
                trace = self._view.trace(batch, start=start, hidden=self.inputs(indices), stop=stop, keep=[stop])
            if self._streams is None:
                self._streams = self._allocate(trace.outputs[stop])
            if mine:
                self._store(indices, trace.outputs[stop])
        self._ranks.barrier()

    def _allocate(self, like: Tensor) -> Float[Tensor, "tokens d"]:
        """Room for all streams; all processes come here together."""
        shape = (self._starts[-1], like.shape[-1])
        if self._file is None:
            return torch.empty(shape, dtype=like.dtype)
        size = shape[0] * shape[1]
        if self._ranks.local_rank == 0:
            _reserve(self._file, size * like.element_size())
        self._ranks.barrier()
        flat = torch.from_file(str(self._file), shared=True, size=size, dtype=like.dtype)
        self._ranks.barrier()
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
