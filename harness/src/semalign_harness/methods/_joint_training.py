"""Training of all layers at once, on the batches and with the schedule of frontier training."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from semalign_align import Ranks, SupervisedBatch
from semalign_attribution import DecoderView, Trace
from semalign_geometry import SemalignError
from semalign_train import (
    Checkpoints,
    Optimiser,
    StepRecord,
    TransferConfig,
    fingerprint,
    micro_batches,
    optimisation_batches,
    rate_factor,
)
from torch import Tensor, nn

from ._joint import JointMethod
from ._method import MethodContext, MethodReport

Losses = Callable[[Trace, SupervisedBatch], dict[str, Tensor]]
"""The terms of the loss, each with its weight, summed over the supervised tokens of a micro-batch."""
MOMENTS = 1000
"""Parts of a given wall time in which the learning rate changes."""
_RANDOM, _RANDOM_OF_DEVICE = "random.cpu", "random.device"


def train_jointly(
    context: MethodContext,
    method: JointMethod,
    view: DecoderView,
    parameters: Sequence[nn.Parameter],
    losses: Losses,
    *,
    config: TransferConfig,
    keep: Collection[int] = (),
    spent: float = 0.0,
) -> MethodReport:
    """Minimise the mean of a loss over the supervised tokens of each optimisation batch, all layers at once.

    Batches, learning rate, clipping and guards are those of frontier training, so that methods see the same tokens in
    the same order. Several processes share every batch. An interrupted training resumes from the last state that was
    kept by `config.checkpoint_steps`, by `config.checkpoint_minutes` or when it was interrupted, on a CPU to the same
    bits; without any it starts again.

    Args:
        context: of the method.
        method: for its wall time and its name.
        view: the target.
        parameters: what trains.
        losses: the terms of the loss.
        config: settings of the training.
        keep: layers whose streams the loss looks at.
        spent: seconds that the method took before; they count as training's.

    Raises:
        SemalignError: more gradients were not finite than `config.guards` allows, the last one or the weights are not
            finite at the end, or the folder holds the states of another training.
    """
    return _JointTrainer(context, method, view, list(parameters), losses, config, keep, spent).run()


class _JointTrainer:
    def __init__(
        self,
        context: MethodContext,
        method: JointMethod,
        view: DecoderView,
        parameters: list[nn.Parameter],
        losses: Losses,
        config: TransferConfig,
        keep: Collection[int],
        spent: float,
    ) -> None:
        self._context, self._method, self._view, self._config = context, method, view, config
        self._parameters, self._losses, self._keep_layers = parameters, losses, keep
        self._spent = spent
        self._store, self._ranks = context.stores.train, Ranks.current()
        self._steps = sum(config.stage_steps(view.depth, len(self._store)))
        # The view was made before the weights that train became float32.
        self._autocast = config.autocast == "bfloat16" or view.head.weight.dtype == torch.bfloat16
        self._recompute_from = 1 if config.recompute_suffix else None
        products = torch.bfloat16 if self._autocast else None
        self._optimiser = Optimiser(parameters, config, products=products, matrices=view.layers.parameters())

    def run(self) -> MethodReport:
        device = self._view.device
        compiled = self._view.compiled() if self._config.compile else nullcontext()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), compiled:
            training = self._ranks.from_first(self._fingerprint)
            checkpoints = Checkpoints(self._context.folder / "checkpoints", training, self._ranks, self._config)
            records = self._restored(checkpoints)
            restored, self._random_after = len(records), (len(records), self._random_state())
            try:
                return self._run(checkpoints, records)
            except KeyboardInterrupt:
                moved = sum(not record.skipped for record in records[restored:])
                if self._optimiser.moves == moved and self._random_after[0] == len(records):
                    checkpoints.keep_last(records, self._tensors())  # no step was half done
                raise

    def _run(self, checkpoints: Checkpoints, records: list[StepRecord]) -> MethodReport:
        started = time.perf_counter() - sum(record.seconds for record in records)
        batches = optimisation_batches(self._config, len(self._store))
        for _ in records:
            next(batches)
        with self._context.console.bar("train", self._steps) as bar:
            for number in itertools.count(len(records) + 1):
                place, of = self._place(number, started)
                if place > of:
                    break
                rate = self._config.learning_rate * rate_factor(place, of, self._config)
                records.append(self._step(number, next(batches), rate))
                self._random_after = len(records), self._random_state()
                self._check_skipped(records)
                if self._ranks.is_first:
                    bar.skip(self._context.metrics.add(records[-1]))
                bar.advance(", ".join(f"{name} {value:.3f}" for name, value in records[-1].losses.items()))
                ended = self._method.seconds is None and number == self._steps
                checkpoints.keep(records, self._tensors, ended=ended)
        self._check_end(records)
        return MethodReport(
            method=self._method.kind,
            trained_parameters=sum(parameter.numel() for parameter in self._parameters),
            steps=len(records),
            supervised_tokens=sum(record.supervised_tokens for record in records),
            seconds=self._spent + time.perf_counter() - started,
        )

    def _place(self, number: int, started: float) -> tuple[int, int]:
        """A step among all of them; where the wall time is given, the moment in what is left of it."""
        allowed = self._method.seconds
        if allowed is None:
            return number, self._steps
        left = max(allowed - self._spent, 1e-9)
        gone = self._ranks.from_first(lambda: (time.perf_counter() - started) / left)
        return math.floor(gone * MOMENTS) + 1, MOMENTS

    def _step(self, number: int, indices: list[int], rate: float) -> StepRecord:
        begun = time.perf_counter()
        losses, count = self._gradients(indices)
        norm = float(
            nn.utils.clip_grad_norm_(self._parameters, math.inf if self._config.clip is None else self._config.clip)
        )
        if math.isfinite(norm):
            self._optimiser.step(rate)
        self._optimiser.zero_grad()
        tokens, seconds = int(self._store.lengths[indices].sum()), time.perf_counter() - begun
        return StepRecord(
            layer=0,
            step=number,
            steps=self._steps,
            losses=losses,
            gradient_norms={},
            gradient_norm=norm,
            skipped=not math.isfinite(norm),
            learning_rate=rate,
            supervised_tokens=count,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            examples=tuple(indices),
        )

    def _gradients(self, indices: list[int]) -> tuple[dict[str, float], int]:
        """Leave the gradient of the mean loss over an optimisation batch in the parameters; the terms, and the tokens
        that they are means over."""
        count = max(1, int(self._store.counts[indices].sum()))
        terms: dict[str, float] = {}
        for micro, mine in self._ranks.deal(micro_batches(self._config, self._store, indices, self._ranks)):
            data = self._store.collate(micro, device=self._view.device)
            with torch.enable_grad(), torch.autocast(self._view.device.type, torch.bfloat16, enabled=self._autocast):
                trace = self._view.trace(data.batch, keep=self._keep_layers, recompute_from=self._recompute_from)
                found = {name: mine * value / count for name, value in self._losses(trace, data).items()}
                torch.stack([value.float() for value in found.values()]).sum().backward()
            terms = {name: terms.get(name, 0.0) + float(value.detach()) for name, value in found.items()}
        values = self._ranks.add([torch.tensor(list(terms.values()), dtype=torch.float64)])[0]
        gradients = self._ranks.add([_gradient(parameter) for parameter in self._parameters])
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return dict(zip(terms, values.tolist(), strict=True)), count

    def _check_skipped(self, records: Sequence[StepRecord]) -> None:
        skipped = sum(record.skipped for record in records)
        if skipped > self._config.guards.max_skipped:
            step = records[-1].step
            raise SemalignError(f"step {step}: the gradient is not finite for the {skipped}. time; {self._remedy}")

    def _check_end(self, records: Sequence[StepRecord]) -> None:
        skipped = bool(records) and records[-1].skipped
        if skipped or not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            what = "the last gradient is" if skipped else "the weights are"
            raise SemalignError(f"step {len(records)}: {what} not finite when training ends; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return (
            f"if losses rose before, lower method.learning_rate, which is {self._config.learning_rate:g}, else set "
            "target.dtype to another"
        )

    def _fingerprint(self) -> str:
        """Hash of all that decides the trained weights."""
        return fingerprint(
            self._config.decisive(),
            self._method.model_dump_json(),
            self._store.manifest.model_dump_json(),
            self._view.model.config.to_json_string(),
            tensors={f"{place}": parameter for place, parameter in enumerate(self._parameters)}
            | dict(self._view.model.named_parameters())
            | dict(self._view.model.named_buffers()),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """The state after the last whole step; with the random state, as adapters may have dropout."""
        return self._optimiser.tensors() | self._random_after[1]

    def _random_state(self) -> dict[str, Tensor]:
        state = {_RANDOM: torch.get_rng_state()}
        if self._view.device.type == "cuda":
            state[_RANDOM_OF_DEVICE] = torch.cuda.get_rng_state(self._view.device)
        return state

    def _restored(self, checkpoints: Checkpoints) -> list[StepRecord]:
        """The steps of an interrupted training, with their weights, moments and random state loaded."""
        state = checkpoints.state(0)
        if state is None:
            return []
        torch.set_rng_state(state.tensors.pop(_RANDOM))
        if _RANDOM_OF_DEVICE in state.tensors:
            torch.cuda.set_rng_state(state.tensors.pop(_RANDOM_OF_DEVICE), self._view.device)
        self._optimiser.load(state.tensors)
        return list(state.records)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
