"""Time and peak memory of a part of this process."""

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Meter:
    """Measures the blocks that a side marks; also tells the side its device and dtype."""

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
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            self.bytes = torch.cuda.max_memory_allocated(self.device) - before
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be reused unseen
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")  # Linux: the peak starts again from the present level
        before = psutil.Process().memory_info().rss
        yield
        self.bytes = max(0, _peak() - before)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _peak() -> int:
    """Peak resident set in bytes, since the reset where there is one."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
