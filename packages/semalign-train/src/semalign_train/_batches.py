"""The order of the examples, how an optimisation batch is split, and the learning rate of each step."""

import math
from collections.abc import Iterator, Sequence

import torch
from semalign_align import LiveSupervision, Ranks, Supervision

from ._settings import TransferConfig

AnySupervision = Supervision | LiveSupervision
"""What a target can be trained on: stored supervision, or that of a source in memory."""


def optimisation_batches(config: TransferConfig, examples: int) -> Iterator[list[int]]:
    """Examples of each optimiser step, pass after pass in random order, without end."""
    generator = torch.Generator().manual_seed(config.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < config.batch_size:
            waiting += torch.randperm(examples, generator=generator).tolist()
        yield waiting[: config.batch_size]
        waiting = waiting[config.batch_size :]


def micro_batches(
    config: TransferConfig, store: AnySupervision, indices: Sequence[int], ranks: Ranks
) -> list[list[int]]:
    """Examples of alike length together, to pad little; small enough that every process gets some."""
    order = sorted(indices, key=lambda index: int(store.lengths[index]))
    size = min(config.micro_batch_size, math.ceil(len(order) / ranks.size))
    return [order[start : start + size] for start in range(0, len(order), size)]


def rate_factor(step: int, steps: int, config: TransferConfig) -> float:
    """Share of the peak learning rate at a step of a stage, both counted from 1; every step moves.

    It rises linearly over the warm-up, is 1 at the step after it, and falls so that it would be 0 after the last step.
    """
    warmup = round(config.warmup * steps)
    if step <= warmup:
        return step / (warmup + 1)
    remaining = (steps - step + 1) / (steps - warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return remaining
        case "cosine":
            return (1 - math.cos(math.pi * remaining)) / 2
