"""The training loop of both trainers: optimiser steps with guards, and with states from which it resumes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from semalign_align import Ranks, SupervisionSource
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from torch import Tensor, nn

from ._batches import rate_factor
from ._checkpoint import Checkpoints
from ._optimiser import Optimiser
from ._records import StepRecord
from ._settings import TrainSettings

_RANDOM, _RANDOM_OF_DEVICE = "random.cpu", "random.device"


class DivergedError(SemalignError):
    """Too many gradients were not finite, or the weights are not at the end; every process raises it."""

    def __init__(self, record: StepRecord, problem: str) -> None:
        """Name the last step.

        Args:
            record: the step.
            problem: a clause that says which values are not finite.
        """
        layer = f"layer {record.layer}, " if record.layer else ""
        super().__init__(
            f"{layer}step {record.step}: {problem} (losses {record.losses}); if they rose before, lower "
            "learning_rate, else load the target in another dtype"
        )
        self.record = record
        """The step, with the examples of its batch."""


@dataclass(frozen=True, eq=False)
class Run:
    """One call of a trainer's `fit`: the parts that all its steps share."""

    view: DecoderView
    """The target."""
    supervision: SupervisionSource
    """Supervision of the training rows."""
    config: TrainSettings
    """Settings."""
    ranks: Ranks
    """The processes that train together."""
    callback: Callable[[StepRecord], None]
    """Called after every step."""
    checkpoints: Checkpoints | None
    """Finished stages and states; None keeps none."""
    autocast: bool
    """Whether products are in bfloat16."""


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of the loss over an optimisation batch."""

    losses: dict[str, float]
    """Mean of each term."""
    norms: dict[str, float]
    """Norm of each term's gradient, where it was computed."""


Gradients = Callable[[list[int]], Terms]
"""Leaves the gradient of the loss over some examples in the parameters, and returns the terms."""


class Loop:
    """The steps of one stage, or of a joint training.

    Laws: a loop that is interrupted at any moment and repeated from a kept state ends at the bits of an undisturbed
    one (on a CPU), random numbers included. The global random state is the same before and after.
    """

    def __init__(self, run: Run, parameters: Sequence[nn.Parameter], *, layer: int = 0) -> None:
        """Make the optimiser.

        Args:
            run: the training that this is a part of.
            parameters: all that train.
            layer: the frontier layer; 0 where all layers train at once.
        """
        self._run, self._parameters, self._layer = run, parameters, layer
        products = torch.bfloat16 if run.autocast else None
        self._optimiser = Optimiser(parameters, run.config, products=products, matrices=run.view.layers.parameters())
        self._random: tuple[int, dict[str, Tensor]] = 0, {}
        self.earlier = 0.0
        """Seconds of the steps before an interruption."""

    def train(self, batches: Sequence[list[int]], gradients: Gradients) -> list[StepRecord]:
        """Do all steps that are left.

        Args:
            batches: examples of every step, those before an interruption included.
            gradients: called for every step.

        Returns:
            All steps, those before an interruption included.

        Raises:
            DivergedError: more gradients were not finite than `guards.max_skipped` allows, the last one is not, or the
                weights are not finite at the end.
        """
        device = self._run.view.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            records = self._restored()
            restored, self.earlier = len(records), sum(record.seconds for record in records)
            self._random = restored, self._random_state()
            try:
                for number, indices in enumerate(batches[restored:], restored + 1):
                    records.append(self._step(number, len(batches), indices, gradients))
                    self._random = number, self._random_state()
                    self._run.callback(records[-1])
                    self._check(records)
                    self._keep(records)
            except KeyboardInterrupt:
                self._keep_last(records, restored)
                raise
        self._check(records)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            raise DivergedError(records[-1], "the weights are not finite after the last step")
        return records

    def _step(self, number: int, steps: int, indices: list[int], gradients: Gradients) -> StepRecord:
        run, begun = self._run, time.perf_counter()
        terms = gradients(indices)
        limit = math.inf if run.config.clip is None else run.config.clip
        norm = float(nn.utils.clip_grad_norm_(self._parameters, limit))
        rate = run.config.rate * rate_factor(number, steps, run.config)
        if math.isfinite(norm):
            self._optimiser.step(rate)
        self._optimiser.zero_grad()
        seconds = time.perf_counter() - begun
        tokens = int(run.supervision.lengths[indices].sum())
        return StepRecord(
            layer=self._layer,
            step=number,
            steps=steps,
            losses=terms.losses,
            gradient_norms=terms.norms,
            gradient_norm=norm,
            skipped=not math.isfinite(norm),
            learning_rate=rate,
            supervised_tokens=int(run.supervision.answer_counts[indices].sum()),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            examples=tuple(indices),
        )

    def _check(self, records: Sequence[StepRecord]) -> None:
        last, skipped = records[-1], sum(record.skipped for record in records)
        if skipped > self._run.config.guards.max_skipped or (last.skipped and last.step == last.steps):
            times = "" if skipped == 1 else f" for the {skipped}. time"
            raise DivergedError(last, f"the gradient is not finite{times}")

    def _keep(self, records: Sequence[StepRecord]) -> None:
        """Save the state where it is due; a stage that ends is saved as a stage instead."""
        ended = records[-1].step == records[-1].steps
        if self._run.checkpoints is not None and not (ended and self._layer):
            self._run.checkpoints.keep(records, self._tensors, ended=ended)

    def _keep_last(self, records: Sequence[StepRecord], restored: int) -> None:
        """Save the state of an interrupted training, unless a step is half done."""
        moved = sum(not record.skipped for record in records[restored:])
        whole = self._optimiser.moves == moved and self._random[0] == len(records)
        if self._run.checkpoints is not None and whole:
            self._run.checkpoints.keep_last(records, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """The state after the last whole step; with the random state, as adapters may have dropout."""
        return self._optimiser.tensors() | self._random[1]

    def _random_state(self) -> dict[str, Tensor]:
        state, device = {_RANDOM: torch.get_rng_state()}, self._run.view.device
        if device.type == "cuda":
            state[_RANDOM_OF_DEVICE] = torch.cuda.get_rng_state(device)
        return state

    def _restored(self) -> list[StepRecord]:
        """The steps before an interruption, with their weights, moments and random state loaded."""
        state = None if self._run.checkpoints is None else self._run.checkpoints.state(self._layer)
        if state is None:
            return []
        torch.set_rng_state(state.tensors.pop(_RANDOM))
        if _RANDOM_OF_DEVICE in state.tensors:
            torch.cuda.set_rng_state(state.tensors.pop(_RANDOM_OF_DEVICE), self._run.view.device)
        self._optimiser.load(state.tensors)
        return list(state.records)
