"""Shallow-to-deep frontier training: in stage k only layer k trains."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from semalign_align import (
    AnswerNLL,
    LabelCosine,
    Objective,
    OutputKL,
    Ranks,
    SpanLikelihood,
    Step,
    SupervisionSource,
    count_of,
    position_mask,
    total_of,
)
from semalign_attribution import DecoderView, undisturbed, view_of
from semalign_geometry.base import SemalignError, checked
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._batches import micro_batches, optimisation_batches
from ._checkpoint import Checkpoints, fingerprint
from ._checks import check_divergence, check_held_out, check_keys, check_layers, check_target, existing, vocabulary_of
from ._loop import DivergedError, Loop, Run, Terms
from ._prefix import PrefixCache
from ._records import StageRecord, StepRecord, TransferReport
from ._settings import KNOWN_OBJECTIVES, FrontierConfig
from ._sharding import ShardedLayers
from ._trainable import frontier

LOGGER = logging.getLogger(__name__)

Callback = Callable[[StepRecord | StageRecord], None]
"""Called with every step and every stage."""


class FrontierTrainer:
    """Train a target on its supervision, layer by layer.

    Laws: in stage k every tensor outside layer k stays bit-identical (the final norm too, unless it trains along).
    Where torch.distributed has several processes, each computes the gradient of its share of every optimisation batch,
    and the weights are those of one process, rounding aside; all are given the same arguments.
    Source: v2, method 2.6.
    """

    @checked
    def __init__(
        self,
        target: PreTrainedModel | DecoderView,
        supervision: SupervisionSource,
        config: FrontierConfig | None = None,
        *,
        objective: Objective | None = None,
        scratch: str | Path | None = None,
        held_out: SupervisionSource | None = None,
        checkpoints: str | Path | None = None,
        callback: Callback | None = None,
    ) -> None:
        """Check that target, store and settings fit together; nothing is computed yet.

        Args:
            target: the model that trains, changed in place by `fit`.
            supervision: supervision of the training rows, stored or live.
            config: settings.
            objective: an own layer objective instead of `config.objective`.
            scratch: an existing folder for the memory-mapped prefix inputs, which the processes of a machine share;
                None keeps them in memory.
            held_out: rows that `config.rollback` measures, supervised with the same pairing.
            checkpoints: a folder for finished stages and states within a stage; an interrupted training that is
                repeated with the same folder, target, store and settings resumes there, to the same weights. Ctrl-C
                leaves a last state, where that is quick.
            callback: called with every step and stage that this process runs.

        Raises:
            SemalignError: target, supervision, held-out rows, settings and checkpoints do not fit together.
        """
        self.view = view_of(target)
        """The target."""
        self.supervision = supervision
        """Its supervision."""
        self.config = config or FrontierConfig()
        """Settings."""
        self.callback = callback or (lambda record: None)
        """Called with every step and stage that this process runs."""
        self._scratch, self._ranks = existing(scratch), Ranks.current()
        self._guarded = held_out if self.config.rollback is not None else None
        self._stores = {"training": supervision} | ({} if self._guarded is None else {"held-out": self._guarded})
        self._objective: Any = objective or self.config.objective
        self._check(held_out)
        self.layers = self.config.stages(self.view.depth)
        """The layers that get a stage, shallow to deep."""
        self._terms = self._weighted_terms()
        self._shared_head = supervision.output_head(self.view.head)
        if checkpoints is not None:
            self._check_identity(objective)
        self._checkpoint_folder = None if checkpoints is None else Path(checkpoints)
        self._checkpoints: Checkpoints | None = None  # made by `fit`, for the target as it is then
        self._autocast = self.config.autocast == "bfloat16" or self.view.head.weight.dtype == torch.bfloat16

    def _check(self, held_out: SupervisionSource | None) -> None:
        """Target, supervision and held-out rows fit together."""
        check_layers(self.view, self.supervision.manifest)
        check_target(self.view, self._stores)
        if self.config.weights.output > 0:
            check_divergence(self.config.divergence, self._stores)
        if self.config.rollback is not None and held_out is None:
            raise SemalignError("rollback needs held-out rows: pass held_out, or set rollback to null")
        if held_out is not None:
            check_held_out(self.supervision, held_out)

    def _check_identity(self, objective: Objective | None) -> None:
        """Checkpoints can identify the training."""
        check_keys(self._stores)
        if objective is not None and not isinstance(objective, BaseModel):
            raise SemalignError(
                f"checkpoints with an own objective need its settings: derive {type(objective).__name__} from "
                "semalign_geometry.base.Settings"
            )

    def _weighted_terms(self) -> list[tuple[float, Objective]]:
        """Terms of the loss with their weights, those of weight 0 left out."""
        weights = self.config.weights
        terms: list[tuple[float, Objective]] = [
            (weights.geometry, self._objective),
            (weights.output, OutputKL(divergence=self.config.divergence)),
            (weights.output * weights.span * (self.supervision.classes is not None), SpanLikelihood()),
            (weights.answer, AnswerNLL()),
            (weights.label, LabelCosine()),
        ]
        terms = [(weight, term) for weight, term in terms if weight > 0]
        names = [term.name for _, term in terms]
        if len(set(names)) < len(names):
            raise SemalignError(f"two terms of the loss have one name ({', '.join(names)}): rename the own objective")
        silent = [term.name for _, term in terms if count_of(term, self.supervision.counts) == 0]
        if silent:
            problem = f"no training example has enough supervised tokens for {' or '.join(silent)}"
            if len(silent) == len(terms):
                raise SemalignError(f"{problem}: supervise more tokens, or set the weight of another term above 0")
            LOGGER.warning("%s, which has no effect", problem)
        return terms

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Optimiser steps of each stage, in the order of `layers`."""
        return self.config.stage_steps(self.view.depth, len(self.supervision))

    def fit(self) -> TransferReport:
        """Run every stage, shallow to deep; the target is changed in place.

        Raises:
            DivergedError: more gradients were not finite than `config.guards` allows, or the weights are not after a
                stage.
            SemalignError: the checkpoints are those of another training.
            ComponentError: an own objective did not return a number.

        After any other error under `config.shard_frozen` each process keeps its share of the target alone.
        """
        if self._checkpoint_folder is not None:
            training = self._ranks.broadcast_from_first(self._fingerprint)
            self._checkpoints = Checkpoints(
                self._checkpoint_folder,
                training,
                self._ranks,
                self.config,
                code=self._ranks.broadcast_from_first(self._code),
            )
        stages = []
        with (
            undisturbed(self.view.model),
            self.view.compiled() if self.config.compile else nullcontext(),
            self._sharded() as shards,
        ):
            prefix = PrefixCache(
                self.view,
                self.supervision,
                folder=self._scratch,
                batch_size=self.config.micro_batch_size,
                ranks=self._ranks,
                autocast=self.config.autocast == "bfloat16",
            )
            order = optimisation_batches(self.config, len(self.supervision))  # shared by the stages
            for layer, steps in zip(self.layers, self.stage_steps, strict=True):
                started, batches = time.perf_counter(), list(itertools.islice(order, steps))
                # Stage by stage when resumed, too: the same bits.
                prefix.advance(layer - 1, itertools.chain(*batches))
                if shards is not None:
                    shards.gather(layer)
                stages.append(self._resumed(layer) or self._stage(layer, prefix, batches, started))
                if shards is not None:
                    shards.shard(layer)
        return TransferReport(
            config=self.config,
            stages=tuple(stages),
            supervised_tokens=sum(stage.supervised_tokens for stage in stages),
            seconds=sum(stage.seconds for stage in stages),
        )

    @contextmanager
    def _sharded(self) -> Iterator[ShardedLayers | None]:
        """The layers, sharded where the settings say so; whole again at the end and when training diverged."""
        if not (self.config.shard_frozen and self._ranks.size > 1):
            yield None
            return
        shards = ShardedLayers(self.view, self._ranks)
        try:
            yield shards
        except DivergedError:
            shards.gather_all()
            raise
        shards.gather_all()

    def _resumed(self, layer: int) -> StageRecord | None:
        """Record of a stage that was finished before, its weights loaded; None when it must be run."""
        finished = None if self._checkpoints is None else self._checkpoints.stage(layer)
        if finished is None:
            return None
        record, tensors = finished
        state = self._stage_tensors(layer)
        for name, value in tensors.items():
            state[name].copy_(value)
        return record

    def _stage_tensors(self, layer: int) -> dict[str, Tensor]:
        """The weights that the stage of a layer may change."""
        tensors = {f"layer.{name}": value.detach() for name, value in self.view.layer(layer).named_parameters()}
        if self._trains_norm(layer):
            tensors |= {f"norm.{name}": value.detach() for name, value in self.view.final_norm.named_parameters()}
        return tensors

    def _fingerprint(self) -> str:
        """Hash of all that decides the trained weights."""
        config = self.config
        terms = [
            f"{weight} {type(term).__qualname__} {term.model_dump_json() if isinstance(term, BaseModel) else term.name}"
            for weight, term in self._terms
        ]
        return fingerprint(
            config.decisive(),
            *(store.manifest.model_dump_json() for store in self._stores.values()),
            *terms,
            *(" ".join(package) for package in KNOWN_OBJECTIVES.packages(config.objective.kind).items()),
            self.view.model.config.to_json_string(),
            tensors=vocabulary_of(self.supervision)
            | dict(self.view.model.named_parameters())
            | dict(self.view.model.named_buffers()),
        )

    def _code(self) -> dict[str, str]:
        """Hash of the code of a layer objective that is not built in."""
        return KNOWN_OBJECTIVES.code(type(self._objective), name=self._objective.name)

    def _stage(self, layer: int, prefix: PrefixCache, batches: list[list[int]], started: float) -> StageRecord:
        before = self._held_out_loss(layer)
        kept = {name: value.clone() for name, value in self._stage_tensors(layer).items()} if before is not None else {}
        loop, records, trainable = self._train(layer, prefix, batches)
        self._warn_of_drowning(layer, records)
        after = self._held_out_loss(layer)
        held_out = None if before is None or after is None else (before, after)
        worse = held_out is not None and not held_out[1] <= held_out[0] * (1 + (self.config.rollback or 0))
        if worse:
            for name, value in self._stage_tensors(layer).items():
                value.copy_(kept[name])
        record = StageRecord(
            layer=layer,
            source_layer=self.supervision.manifest.pairing.source_of(layer),
            steps=len(records),
            trainable_parameters=trainable,
            first_losses=records[0].losses,
            last_losses=records[-1].losses,
            skipped=sum(record.skipped for record in records),
            held_out=held_out,
            rolled_back=worse,
            supervised_tokens=sum(record.supervised_tokens for record in records),
            seconds=loop.earlier + time.perf_counter() - started,
        )
        if self._checkpoints is not None:
            self._checkpoints.save_stage(record, self._stage_tensors(layer))
        LOGGER.info("layer %d: %d steps, losses %s → %s", layer, len(records), record.first_losses, record.last_losses)
        self.callback(record)
        return record

    def _train(self, layer: int, prefix: PrefixCache, batches: list[list[int]]) -> tuple[Loop, list[StepRecord], int]:
        """Do the steps of a stage; also the number of parameters that trained."""
        run = Run(
            view=self.view,
            supervision=self.supervision,
            config=self.config,
            ranks=self._ranks,
            callback=self.callback,
            checkpoints=self._checkpoints,
            autocast=self._autocast,
        )
        norm, seed = self._trains_norm(layer), self.config.seed
        with frontier(self.view, layer, self.config.trainable, final_norm=norm, seed=seed) as parameters:
            loop = Loop(run, parameters, layer=layer)
            records = loop.train(batches, lambda indices: self._gradients(layer, indices, prefix, parameters))
            return loop, records, sum(parameter.numel() for parameter in parameters)

    def _warn_of_drowning(self, layer: int, records: list[StepRecord]) -> None:
        finite = [record.gradient_norms for record in records if not record.skipped]
        names = {name for norms in finite for name in norms} - {SpanLikelihood().name}  # of few spans
        means = {name: sum(norms.get(name, 0.0) for norms in finite) / len(finite) for name in sorted(names)}
        if len(means) < 2:
            return
        strong, weak = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        if means[strong] > self.config.guards.drowned * means[weak]:
            LOGGER.warning(
                "layer %d: the gradient of %s is %.3g times that of %s, which has next to no effect: change weights",
                layer,
                strong,
                means[strong] / means[weak] if means[weak] else math.inf,
                weak,
            )

    @torch.no_grad()
    def _held_out_loss(self, layer: int) -> float | None:
        """Weighted mean of the terms over the held-out rows; None when nothing is guarded."""
        store = self._guarded
        if store is None:
            return None
        sums = torch.zeros(len(self._terms), dtype=torch.float64)
        size = self.config.micro_batch_size
        chunks = [list(range(start, min(start + size, len(store)))) for start in range(0, len(store), size)]
        for indices, mine in self._ranks.shard(chunks):
            step = self._forward(layer, indices, store, hidden=None, start=1)
            sums += mine * torch.tensor([float(total_of(term, step)) for _, term in self._terms], dtype=torch.float64)
        (sums,) = self._ranks.all_reduce_sum([sums])
        units = [max(1, count_of(term, store.counts)) for _, term in self._terms]
        weights = [weight for weight, _ in self._terms]
        return float(
            sum(weight * total / unit for weight, total, unit in zip(weights, sums.tolist(), units, strict=True))
        )

    def _trains_norm(self, layer: int) -> bool:
        return self.config.train_final_norm and layer == self.view.depth

    def _gradients(
        self, layer: int, indices: Sequence[int], prefix: PrefixCache, parameters: Sequence[nn.Parameter]
    ) -> Terms:
        """Leave the gradient of the weighted loss over an optimisation batch in the parameters."""
        counts = self.supervision.counts[list(indices)]
        units = {term.name: count_of(term, counts) for _, term in self._terms}
        active = [(weight, term) for weight, term in self._terms if units[term.name] > 0]
        losses = torch.zeros(len(active), dtype=torch.float64)
        gradients = [[torch.zeros_like(parameter) for parameter in parameters] for _ in active]
        for micro, mine in self._ranks.shard(micro_batches(self.config, self.supervision, indices, self._ranks)):
            with torch.enable_grad():
                step = self._forward(layer, micro, self.supervision, hidden=prefix.inputs(micro), start=layer)
            for place, (weight, term) in enumerate(active):
                mean = mine * total_of(term, step) / units[term.name]
                losses[place] += float(mean.detach())
                parts = torch.autograd.grad(
                    weight * mean, parameters, retain_graph=place + 1 < len(active), materialize_grads=True
                )
                for total, part in zip(gradients[place], parts, strict=True):
                    total += part
        (losses,) = self._ranks.all_reduce_sum([losses])
        gradients = [self._ranks.all_reduce_sum(parts) for parts in gradients]
        for number, parameter in enumerate(parameters):
            of_terms = [parts[number] for parts in gradients]
            parameter.grad = torch.stack(of_terms).sum(0) if of_terms else torch.zeros_like(parameter)
        names = [term.name for _, term in active]
        norms = [float(nn.utils.get_total_norm(parts)) for parts in gradients]
        return Terms(dict(zip(names, losses.tolist(), strict=True)), dict(zip(names, norms, strict=True)))

    def _forward(
        self, layer: int, indices: list[int], store: SupervisionSource, *, hidden: Tensor | None, start: int
    ) -> Step:
        """Run layers `start` (on `hidden`, where given) to k, and those above only if a term needs the output."""
        view = self.view
        data = store.collate(indices, layer=layer, device=view.device)
        needs_output = any(term.needs_output for _, term in self._terms)
        with torch.autocast(view.device.type, torch.bfloat16, enabled=self._autocast):
            trace = view.trace(
                data.batch,
                start=start,
                hidden=hidden,
                keep=[layer],
                positions=data.positions.mask,
                stop=None if needs_output else layer,
                recompute_from=layer + 1 if self.config.recompute and torch.is_grad_enabled() else None,
            )
        mask_BM = position_mask(data.counts)
        residual_SD = data.at_spans(trace.residual(layer))
        residual_BMD = residual_SD.new_zeros(*mask_BM.shape, residual_SD.shape[-1])
        residual_BMD[mask_BM] = residual_SD
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
            temperature=store.manifest.settings.temperature,
            spans=data.spans,
        )
