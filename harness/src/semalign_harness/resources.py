"""What a run took of the machine."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device for CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
