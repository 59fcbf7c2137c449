"""Time and peak memory of a part of this process."""

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch
from semalign_harness.util.resources import forget_peak_memory, peak_memory


class Meter:
    """Measures the blocks that a side marks; also names device and dtype of the side."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.seconds = 0.0
        self.units = 1.0
        """What `seconds` are divided by to compare sides that do different amounts of work."""
        self.bytes = 0

    @contextlib.contextmanager
    def both(self) -> Iterator[None]:
        """Time and memory of the same block."""
        with self.memory(), self.time():
            yield

    @contextlib.contextmanager
    def time(self) -> Iterator[None]:
        """Wall time of the block, added up."""
        self._synchronise()
        started = time.perf_counter()
        yield
        self._synchronise()
        self.seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Peak memory inside the block above the level before it: of the device for CUDA, else resident."""
        forget_peak_memory(self.device)
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if cuda else psutil.Process().memory_info().rss
        yield
        self.bytes = max(0, peak_memory(self.device) - before)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
