"""Several processes that work together through torch.distributed's gloo, on one machine."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(work: Callable[..., None], folder: Path, *arguments: Any, size: int = 2) -> list[int]:
    """Run `work(folder, *arguments)` in as many processes, which form one group; returns their exit codes.

    When one has failed, the others get ten seconds to notice, as a launcher gives them; then they are stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.time_ns()}"
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_enter, args=(rank, size, meeting, work, folder, *arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        while process.is_alive() and not any(other.exitcode for other in processes):
            process.join(0.1)
    for process in processes:
        process.join(10 if any(other.exitcode for other in processes) else None)
        if process.is_alive():
            process.kill()
            process.join()
    meeting.unlink(missing_ok=True)
    return [int(process.exitcode or 0) for process in processes]


def _enter(rank: int, size: int, meeting: Path, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}  # as torchrun says it
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        work(folder, *arguments)
    finally:
        dist.destroy_process_group()
