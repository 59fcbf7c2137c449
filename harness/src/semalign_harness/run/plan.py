"""What a run of frontier training is going to do and how long it will take, told before it starts and corrected by what
it took so far.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from semalign_align import TopK
from semalign_geometry import Contract
from semalign_train import TransferConfig

from ..data.rows import Split
from ..experiment import Experiment
from ..models.shape import ModelShape
from ..util.text import duration, gb
from .estimate import estimate
from .inputs import Inputs

REACHED = 0.5
"""Share of the speed of bare matrix products that a forward or backward run is expected to reach."""


PROBE_SECONDS = 0.2
"""How long the speed of matrix products is tried."""


class Plan(Contract):
    """The work of frontier training, in floating-point operations of one process."""

    stages: int
    """Layers that train."""
    steps: int
    """Optimiser steps of all stages."""
    tokens: int
    """Tokens that training passes over, repeats included."""
    supervised_tokens: int
    """Those with supervision."""
    source: float
    """Attribution, supervision and measurement of the source; 0 when its supervision is kept already."""
    training: tuple[float, ...]
    """Each stage."""
    measuring: float
    """The target before and after."""
    flops: float
    """Operations a second that were expected."""

    @property
    def seconds(self) -> float:
        """The whole run, loading aside."""
        return (self.source + sum(self.training) + self.measuring) / self.flops


def make_plan(
    experiment: Experiment,
    split: Split,
    *,
    source: ModelShape,
    target: ModelShape,
    processes: int,
    supervised: bool,
    speed: float,
) -> Plan:
    """Count the work of an experiment that trains by frontier training.

    Args:
        experiment: what will run.
        split: its rows.
        source: shape of the larger model.
        target: shape of the model that trains.
        processes: how many share the work.
        supervised: whether the supervision is kept already.
        speed: operations a second of a process in bare matrix products, as `matrix_speed` finds it.
    """
    train, held_out = split.train, split.held_out
    tokens, answers = sum(map(len, train)), sum(len(row.answer_ids) for row in train)
    held_tokens, held_answers = sum(map(len, held_out)), sum(len(row.answer_ids) for row in held_out)
    attributed = sum(map(len, train[: experiment.data.attribution_rows]))

    supervising = 0.0
    if not supervised:
        heads = isinstance(experiment.supervision.output, TopK) * answers + 2 * held_answers
        rows = held_tokens + (0 if experiment.live else tokens)
        supervising = _layers(source, source.layers) * (2 * attributed + rows) + _head(source) * heads
    measuring = 2 * (_layers(target, target.layers) * held_tokens + (_head(target) + _head(source)) * held_answers)

    config = experiment.train
    layers = config.stages(target.layers)
    steps = config.stage_steps(target.layers, len(train))
    share = [config.batch_size * count / len(train) for count in steps]  # passes of each stage
    training = tuple(
        passes * (_step(target, layer, config) + experiment.live * _layers(source, source.layers)) * tokens
        + passes * _outputs(source, target, experiment) * answers
        + _layers(target, layer - before) * tokens * min(1.0, sum(share[place:]))  # of the rows that are needed again
        for place, (layer, before, passes) in enumerate(zip(layers, (1, *layers[:-1]), share, strict=True))
    )
    seen = sum(share)
    return Plan(
        stages=len(layers),
        steps=sum(steps),
        tokens=round(tokens * seen),
        supervised_tokens=round(answers * seen),
        source=supervising / processes,
        training=tuple(work / processes for work in training),
        measuring=measuring / processes,
        flops=REACHED * speed,
    )


def matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in matrix products, the median over the probe: what else runs counts."""
    size = 512 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    float((left @ right)[0, 0])  # the first one loads kernels
    speeds: list[float] = []
    began = time.perf_counter()
    while not speeds or time.perf_counter() - began < PROBE_SECONDS:
        started = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        speeds.append(2 * size**3 / (time.perf_counter() - started))
    return statistics.median(speeds)


def describe_plan(plan: Plan, experiment: Experiment, inputs: Inputs) -> list[str]:
    """The plan as lines of text."""
    data = experiment.data.model_copy(update={"max_length": max(map(len, inputs.split.train))})
    models = {"source": inputs.source.settings, "target": inputs.target.settings}  # with the dtypes that were found
    totals = estimate(
        experiment.model_copy(update={"data": data, **models}),
        source_shape=inputs.source.shape,
        target_shape=inputs.target.shape,
    ).totals
    assert totals is not None
    parts = {"source": plan.source, "training": sum(plan.training), "measuring": plan.measuring}
    times = ", ".join(f"{name} {duration(work / plan.flops)}" for name, work in parts.items() if work)
    return [
        f"plan: {plan.stages} stages, {plan.steps} steps, {plan.tokens} tokens ({plan.supervised_tokens} supervised)",
        f"plan: at most {gb(totals.memory)} of memory for weights, moments and activations; on disk at most "
        f"{gb(totals.supervision + totals.held_out)} of supervision, and {gb(totals.scratch)} until the end",
        f"plan: about {duration(plan.seconds)} ({times}), loading aside",
    ]


class Clock:
    """The remaining time of a run, by what its stages took."""

    def __init__(self, plan: Plan, layers: Sequence[int]) -> None:
        """Before the first stage; `layers` are the stages of the plan."""
        self._plan, self._layers = plan, list(layers)
        self._done = self._seconds = 0.0

    def after(self, layer: int, seconds: float) -> float:
        """Seconds that remain after the stage of a layer, which took so many."""
        place = self._layers.index(layer)
        self._done += self._plan.training[place]
        self._seconds += seconds
        remaining = sum(self._plan.training[place + 1 :]) + self._plan.measuring / 2
        return remaining * self._seconds / self._done


def _layers(shape: ModelShape, count: int) -> float:
    """Of a token's forward run through some layers, the products of queries and keys left out."""
    return 2.0 * shape.layer_parameters * count


def _head(shape: ModelShape) -> float:
    return 2.0 * shape.vocabulary * shape.width


def _step(shape: ModelShape, layer: int, config: TransferConfig) -> float:
    """Of a token in a training step: forward, and the gradients of activations above the frontier and of weights."""
    weights = config.weights
    above = shape.layers - layer if weights.needs_output else 0
    return _layers(shape, 2 + above * (3 if config.recompute_suffix else 2))


def _outputs(source: ModelShape, target: ModelShape, experiment: Experiment) -> float:
    """Of a supervised token in a training step: logits, and the gradient that is summed with them."""
    weights, stored = experiment.train.weights, isinstance(experiment.supervision.output, TopK)
    output = 2 * _head(target) if stored else 3 * _head(target) + _head(source)
    return bool(weights.output) * output + (bool(weights.answer) + bool(weights.label)) * 2 * _head(target)
