"""The processes that share a job: one, unless a launcher such as `torchrun` started several."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from semalign_geometry.base import SemalignError
from torch import Tensor

T = TypeVar("T")


class RaisedElsewhere(SemalignError):
    """An error of the first process, on another one: the first tells of it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of torch.distributed's default group.

    With one process every method is the identity. All processes of a job must see one file system. Which of them share
    a machine is what `LOCAL_RANK` and `LOCAL_WORLD_SIZE` say; where a launcher sets neither, each counts as alone.
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

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def add(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the processes, the same bits on all; the tensors have one dtype."""
        if self.size == 1 or not values:
            return list(values)
        flat = torch.cat([value.reshape(-1) for value in values]).to(self._device())
        dist.all_reduce(flat)
        parts = flat.to(values[0].device).split([value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def deal(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This process's items, one of each round; all processes have as many rounds.

        False marks an item that another process has too, for a round in which fewer items than processes are left:
        layers that are sharded over the processes must run on all of them at once.
        """
        return _dealt(items, self.rank, self.size)

    def shard_locally(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Like `deal`, among the processes of this machine; each machine has all items."""
        return _dealt(items, self.local_rank, self.local_size)

    def broadcast_from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every process.

        Raises:
            SemalignError: it was raised there; `RaisedElsewhere` on the other processes.
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
        """What each process makes for itself, the first before the others, which find what it left in caches.

        Raises:
            SemalignError: it was raised on the first process; `RaisedElsewhere` on the others then.
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
        """Where the group's backend takes tensors."""
        on_cuda = "nccl" in dist.get_backend()
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _dealt(items: Sequence[T], rank: int, size: int) -> Iterator[tuple[T, bool]]:
    for start in range(0, len(items), size):
        mine = start + rank
        yield (items[mine], True) if mine < len(items) else (items[0], False)
