"""The processes that share a job: one, unless a launcher such as `torchrun` started several."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from semalign_geometry.base import SemalignError
from torch import Tensor

from ._errors import RaisedElsewhere

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of torch.distributed's default group.

    With one process every method is the identity. All processes of a job must see one file system. `LOCAL_RANK`
    and `LOCAL_WORLD_SIZE` say which of them share a machine; where a launcher sets neither, each counts as alone.
    """

    rank: int
    """This process, counted from 0."""
    size: int
    """Processes of the job."""
    local_rank: int
    """This process among those of its machine."""
    local_size: int
    """Processes of the job on this machine."""

    @classmethod
    def current(cls) -> "Ranks":
        """The processes as they are now; one when the default group has not been initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, 0, 1)
        rank, size = dist.get_rank(), dist.get_world_size()
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            dist.barrier()

    def all_reduce_sum(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over the processes, to the same bits on all; the tensors have one dtype."""
        if self.size == 1 or not values:
            return list(values)
        flat = torch.cat([value.reshape(-1) for value in values]).to(self._device())
        dist.all_reduce(flat)
        parts = flat.to(values[0].device).split([value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def shard(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This process's items, one of each round; all processes have equally many rounds.

        False marks an item that another process has too, for a round in which fewer items than processes are left:
        layers that are sharded over the processes must run on all of them at once.
        """
        return _shard(items, self.rank, self.size)

    def shard_locally(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Like `shard`, among the processes of this machine; each machine has all items."""
        return _shard(items, self.local_rank, self.local_size)

    def broadcast_from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on the first process, and return its result on every process.

        Raises:
            SemalignError: `make` raised it on the first process; `RaisedElsewhere` on the other processes.
        """
        if self.size == 1:
            return make()
        made: list[T] = []
        failure: SemalignError | None = None
        if self.is_first:
            try:
                made.append(make())
            except SemalignError as error:
                failure = error
        sent: list[Any] = [made, None if failure is None else str(failure)]
        dist.broadcast_object_list(sent, device=self._device())
        if failure is not None:
            raise failure
        results, message = sent
        if message is not None:
            raise RaisedElsewhere(message)
        result: T = results[0]
        return result

    def in_turn(self, make: Callable[[], T]) -> T:
        """Call `make` on the first process, then on all others, which find the caches of the first filled.

        Raises:
            SemalignError: `make` raised it on the first process; `RaisedElsewhere` on the others then.
        """
        made: list[T] = []
        self.broadcast_from_first(lambda: made.append(make()))
        return made[0] if made else make()

    def all_gather(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    @staticmethod
    def _device() -> torch.device:
        """Device of the tensors that the group's backend takes."""
        on_cuda = "nccl" in dist.get_backend()
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _shard(items: Sequence[T], rank: int, size: int) -> Iterator[tuple[T, bool]]:
    for start in range(0, len(items), size):
        mine = start + rank
        yield (items[mine], True) if mine < len(items) else (items[0], False)
