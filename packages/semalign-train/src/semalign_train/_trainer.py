"""Shallow-to-deep frontier training: in stage k only layer k trains."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from semalign_align import AnswerNLL, Objective, OutputKL, Step, Supervision, position_mask
from semalign_attribution import DecoderView, undisturbed, view_of
from semalign_geometry import SemalignError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._prefix import PrefixCache
from ._settings import StageRecord, StepRecord, TransferConfig, TransferReport
from ._trainable import frontier

Callback = Callable[[StepRecord | StageRecord], None]
"""Told of every step and every stage."""


class FrontierTrainer:
    """Train a target on a supervision store, layer by layer.

    Law: in stage k every tensor outside layer k stays bit-identical (the final norm too, unless it is asked for).
    Source: v2, method 2.6.
    """

    def __init__(
        self,
        target: PreTrainedModel | DecoderView,
        supervision: Supervision,
        config: TransferConfig | None = None,
        *,
        objective: Objective | None = None,
        scratch: Path | None = None,
        callback: Callback | None = None,
    ) -> None:
        """Check that target, store and settings fit together; nothing is computed yet.

        Args:
            target: the model that trains, changed in place by `fit`.
            supervision: what it is trained to match.
            config: settings.
            objective: an own layer objective instead of `config.objective`.
            scratch: an existing folder for the memory-mapped prefix inputs; None keeps them in memory.
            callback: told of every step and stage.

        Raises:
            SemalignError: the store was made for another depth, width or vocabulary, the target is float16, a layer
            does not exist, or every term has weight 0.
        """
        self.view = view_of(target)
        self.supervision = supervision
        self.config = config or TransferConfig()
        self.callback = callback or (lambda record: None)
        self._scratch = scratch
        manifest = supervision.manifest
        if manifest.pairing.target_depth != self.view.depth:
            raise SemalignError(
                f"the supervision is for a target of {manifest.pairing.target_depth} layers, this one has "
                f"{self.view.depth}"
            )
        if any(parameter.dtype == torch.float16 for parameter in self.view.model.parameters()):
            raise SemalignError(
                "the target's weights are float16, whose small gradients vanish without loss scaling: "
                "load it in bfloat16 or float32"
            )
        transported = manifest.transport.frame != "none"
        if transported and manifest.transport.target_width != self.view.width:
            raise SemalignError(
                f"the supervision is for width {manifest.transport.target_width}, the target's is {self.view.width}"
            )
        if int(supervision.entries.max()) >= len(self.view.head.weight):
            raise SemalignError(
                f"the supervision is over vocabulary ids up to {int(supervision.entries.max())}, the target's head has "
                f"{len(self.view.head.weight)} rows: supervise with entries=… of the shared vocabulary"
            )
        self.layers = self.config.stages(self.view.depth)
        weights = self.config.weights
        terms: list[tuple[float, Objective]] = [
            (weights.geometry, objective or self.config.objective),
            (weights.output, OutputKL()),
            (weights.answer, AnswerNLL()),
        ]
        self._terms = [(weight, term) for weight, term in terms if weight > 0]
        self._shared_head = self.view.head.select(supervision.entries)
        self._autocast = self.config.autocast == "bfloat16" or self.view.head.weight.dtype == torch.bfloat16

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Optimiser steps of each stage, in the order of `layers`; passes are shared equally by the stages."""
        steps = self.config.steps
        if steps is None:
            rows = self.config.passes * len(self.supervision)
            steps = math.ceil(rows / (self.config.batch_size * len(self.layers)))
        return steps if isinstance(steps, tuple) else (steps,) * len(self.layers)

    def fit(self) -> TransferReport:
        """Run every stage, shallow to deep; the target is changed in place.

        Raises:
            SemalignError: a loss is not finite.
        """
        started = time.perf_counter()
        stages = []
        with undisturbed(self.view.model):
            prefix = PrefixCache(
                self.view, self.supervision, folder=self._scratch, batch_size=self.config.micro_batch_size
            )
            batches = self._batches()
            for layer, steps in zip(self.layers, self.stage_steps, strict=True):
                stages.append(self._stage(layer, steps, prefix, batches))
                self.callback(stages[-1])
        return TransferReport(
            config=self.config,
            stages=tuple(stages),
            supervised_tokens=sum(stage.supervised_tokens for stage in stages),
            seconds=time.perf_counter() - started,
        )

    def _stage(self, layer: int, steps: int, prefix: PrefixCache, batches: Iterator[list[int]]) -> StageRecord:
        started = time.perf_counter()
        prefix.advance(layer - 1)
        last = layer == self.view.depth
        config = self.config
        records: list[StepRecord] = []
        with frontier(
            self.view, layer, config.trainable, final_norm=config.train_final_norm and last, seed=config.seed
        ) as parameters:
            optimiser = torch.optim.AdamW(
                parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
            )
            for number in range(1, steps + 1):
                begun = time.perf_counter()
                indices = next(batches)
                losses, norms = self._gradients(layer, indices, prefix, parameters)
                limit = float("inf") if config.clip is None else config.clip
                norm = float(nn.utils.clip_grad_norm_(parameters, limit))
                if not math.isfinite(norm):
                    raise SemalignError(
                        f"layer {layer}, step {number}: the gradient is not finite (losses {losses}); "
                        "lower train.learning_rate"
                    )
                rate = config.learning_rate * rate_factor(number, steps, config)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.step()
                optimiser.zero_grad()
                seconds = time.perf_counter() - begun
                tokens = int(self.supervision.lengths[indices].sum())
                records.append(
                    StepRecord(
                        layer=layer,
                        step=number,
                        steps=steps,
                        losses=losses,
                        gradient_norms=norms,
                        gradient_norm=norm,
                        learning_rate=rate,
                        supervised_tokens=int(self.supervision.counts[indices].sum()),
                        tokens=tokens,
                        seconds=seconds,
                        tokens_per_second=tokens / seconds,
                    )
                )
                self.callback(records[-1])
            if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
                raise SemalignError(
                    f"layer {layer}, step {steps}: the weights are not finite after the last step; lower "
                    "train.learning_rate"
                )
            trained = sum(parameter.numel() for parameter in parameters)
        return StageRecord(
            layer=layer,
            source_layer=self.supervision.manifest.pairing.source_of(layer),
            steps=steps,
            trainable_parameters=trained,
            first_losses=records[0].losses,
            last_losses=records[-1].losses,
            supervised_tokens=sum(record.supervised_tokens for record in records),
            seconds=time.perf_counter() - started,
        )

    def _batches(self) -> Iterator[list[int]]:
        """Examples of each optimiser step, pass after pass in random order; stages go on where the one before
        stopped."""
        generator = torch.Generator().manual_seed(self.config.seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < self.config.batch_size:
                waiting += torch.randperm(len(self.supervision), generator=generator).tolist()
            yield waiting[: self.config.batch_size]
            waiting = waiting[self.config.batch_size :]

    def _gradients(
        self, layer: int, indices: Sequence[int], prefix: PrefixCache, parameters: Sequence[nn.Parameter]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Leave the gradient of the weighted loss over an optimisation batch in `parameters`; means and norms of the
        terms."""
        counts = self.supervision.counts[list(indices)]
        units = {term.name: term.count(counts) for _, term in self._terms}
        active = [(weight, term) for weight, term in self._terms if units[term.name] > 0]
        losses = {term.name: 0.0 for _, term in active}
        gradients: dict[str, list[Tensor]] = {}
        for micro in self._micro_batches(indices):
            step = self._forward(layer, micro, prefix)
            for place, (weight, term) in enumerate(active):
                mean = term.total(step) / units[term.name]
                losses[term.name] += float(mean.detach())
                parts = torch.autograd.grad(
                    weight * mean, parameters, retain_graph=place + 1 < len(active), materialize_grads=True
                )
                held = gradients.get(term.name)
                gradients[term.name] = (
                    list(parts) if held is None else [a + b for a, b in zip(held, parts, strict=True)]
                )
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.stack([parts[number] for parts in gradients.values()]).sum(0) if gradients else None
        norms = {name: float(nn.utils.get_total_norm(parts)) for name, parts in gradients.items()}
        return losses, norms

    def _micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Examples of alike length together, to pad little."""
        order = sorted(indices, key=lambda index: int(self.supervision.lengths[index]))
        size = self.config.micro_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _forward(self, layer: int, indices: list[int], prefix: PrefixCache) -> Step:
        """Run layer k on its cached inputs, and what lies above it only if a term needs the output."""
        view = self.view
        data = self.supervision.collate(indices, layer=layer, device=view.device)
        needs_output = any(term.needs_output for _, term in self._terms)
        with torch.enable_grad(), torch.autocast(view.device.type, torch.bfloat16, enabled=self._autocast):
            trace = view.trace(
                data.batch,
                start=layer,
                hidden=prefix.inputs(indices),
                keep=[layer],
                stop=None if needs_output else layer,
            )
        counts = data.positions.counts
        mask_BM = position_mask(counts)
        residual_PD = trace.residual(layer)[data.positions.mask]
        residual_BMD = residual_PD.new_zeros(*mask_BM.shape, residual_PD.shape[-1])
        residual_BMD[mask_BM] = residual_PD
        assert data.reference is not None
        return Step(
            residual=residual_BMD,
            reference=data.reference,
            mask=mask_BM,
            hidden=None if trace.final is None else trace.final[data.positions.mask],
            labels=data.positions.labels,
            output=data.output,
            head=view.head,
            shared_head=self._shared_head,
            temperature=self.supervision.manifest.settings.temperature,
        )


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
