"""Devices and processes of this machine, and the memory that a run takes."""

import contextlib
import ctypes
import functools
import gc
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from semalign_align import Ranks
from semalign_geometry.base import SemalignError

CHOOSE_THREADS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
"""Variables by which a user or a launcher chooses the number of threads."""


def pick_device(name: str) -> torch.device:
    """Return the device of a name, or the accelerator of this machine for `auto`."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a meta device holds no values
    except (RuntimeError, AssertionError) as error:
        raise SemalignError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def join(name: str) -> tuple[Ranks, torch.device]:
    """Connect the processes of this job; return them and the device of this one."""
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # One process may work for long while the others wait.
        state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
        device = device if device.type == "cpu" else torch.device(state.device)
    return Ranks.current(), device


@contextlib.contextmanager
def one_thread(note: Callable[[str], None]) -> Iterator[None]:
    """Compute on one thread in the block, unless a variable chooses a number; note it.

    After each product the threads of a process wait for each other: a small model gains nothing from them, and loses
    most of its time where other work keeps a processor busy.
    """
    before = torch.get_num_threads()
    if before == 1 or CHOOSE_THREADS & os.environ.keys():
        yield
        return
    note("computing on one thread, as models this small gain nothing from more (OMP_NUM_THREADS=N chooses a number)")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def leave() -> None:
    """Disconnect from the processes of `join`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_initialized():
        dist.destroy_process_group()


def forget_peak_memory(device: torch.device) -> None:
    """Reset the peak of this process to the memory in use, on CUDA and on Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory counts no more
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: of the device for CUDA, else of this process alone."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # On Linux, ru_maxrss begins at the peak of the process that started this one.
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def bfloat16_is_fast() -> bool:
    """Return whether this processor multiplies bfloat16 matrices at least as fast as float32 ones.

    Processors without such instructions emulate them, a hundred times slower. The instructions of
    x86 processors are known. Others are timed, which other work on the machine can disturb.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if known.get("architecture") == "x86_64":
        return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return _product_seconds(torch.bfloat16) <= _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds)
