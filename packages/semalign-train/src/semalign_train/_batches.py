"""Order of the examples, split of an optimisation batch, and learning rate of each step."""

import math
from collections.abc import Iterator, Sequence

import torch
from semalign_align import Ranks, SupervisionSource

from ._settings import TrainSettings


def optimisation_batches(config: TrainSettings, examples: int) -> Iterator[list[int]]:
    """Examples of each optimiser step, pass after pass in random order, without end."""
    generator = torch.Generator().manual_seed(config.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < config.batch_size:
            waiting += torch.randperm(examples, generator=generator).tolist()
        yield waiting[: config.batch_size]
        waiting = waiting[config.batch_size :]


def micro_batches(
    config: TrainSettings, store: SupervisionSource, indices: Sequence[int], ranks: Ranks
) -> list[list[int]]:
    """Micro-batches of examples of similar length, to pad little; small enough that every process gets some."""
    order = sorted(indices, key=lambda index: int(store.lengths[index]))
    size = min(config.micro_batch_size, math.ceil(len(order) / ranks.size))
    return [order[start : start + size] for start in range(0, len(order), size)]


def rate_factor(step: int, steps: int, config: TrainSettings) -> float:
    """Share of the peak learning rate at a step, counted from 1; no step has a rate of 0.

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
