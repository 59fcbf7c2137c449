"""Shallow-to-deep frontier training: in stage k only layer k trains."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from semalign_align import (
    AnswerNLL,
    LabelCosine,
    LiveSupervision,
    Objective,
    OutputKL,
    Ranks,
    Step,
    SupervisionManifest,
    TopK,
    count_of,
    position_mask,
    total_of,
)
from semalign_attribution import DecoderView, undisturbed, view_of
from semalign_geometry import SemalignError, checked
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._batches import AnySupervision, micro_batches, optimisation_batches, rate_factor
from ._checkpoint import Checkpoints, fingerprint
from ._optimiser import Optimiser
from ._prefix import PrefixCache
from ._settings import KNOWN_OBJECTIVES, StageRecord, StepRecord, TransferConfig, TransferReport
from ._sharding import ShardedLayers
from ._trainable import frontier

LOGGER = logging.getLogger(__name__)

Callback = Callable[[StepRecord | StageRecord], None]
"""Told of every step and every stage."""


class DivergedError(SemalignError):
    """Too many gradients were not finite, or the weights are not when a stage ends; every process raises it."""

    def __init__(self, record: StepRecord, what: str) -> None:
        """Name the last step.

        Args:
            record: the step.
            what: what is not finite.
        """
        super().__init__(
            f"layer {record.layer}, step {record.step}: {what} (losses {record.losses}); if they rose before, lower "
            "train.learning_rate, else load the target in another dtype"
        )
        self.record = record
        """The step, with the examples of its batch."""


class FrontierTrainer:
    """Train a target on its supervision, layer by layer.

    Laws: in stage k every tensor outside layer k stays bit-identical (the final norm too, unless it is asked for).
    Where torch.distributed has several processes, each computes the gradient of its share of every optimisation batch,
    and the weights are those of one process, rounding aside; all are given the same arguments.
    Source: v2, method 2.6.
    """

    @checked
    def __init__(
        self,
        target: PreTrainedModel | DecoderView,
        supervision: AnySupervision,
        config: TransferConfig | None = None,
        *,
        objective: Objective | None = None,
        scratch: str | Path | None = None,
        held_out: AnySupervision | None = None,
        checkpoints: str | Path | None = None,
        callback: Callback | None = None,
    ) -> None:
        """Check that target, store and settings fit together; nothing is computed yet.

        Args:
            target: the model that trains, changed in place by `fit`.
            supervision: what it is trained to match, stored or live.
            config: settings.
            objective: an own layer objective instead of `config.objective`.
            scratch: an existing folder for the memory-mapped prefix inputs, which the processes of a machine share;
                None keeps them in memory.
            held_out: rows that `config.guards.rollback` measures, supervised with the same pairing.
            checkpoints: a folder for finished stages and states within a stage; an interrupted training that is
                repeated with the same folder, target, store and settings resumes there, to the same weights.
            callback: called with every step and stage that this process runs.

        Ctrl-C during `fit` leaves a last state among the checkpoints, where that is quick.

        Raises:
            SemalignError: the store was made for another depth, width or vocabulary, the target is float16, a layer
                or the scratch folder does not exist, every term has weight 0 or too few supervised tokens, `held_out`
                was supervised in another way, a divergence needs top entries that a store lacks, or checkpoints are
                asked for with live supervision without a key or an objective whose settings are not known.
        """
        self.view = view_of(target)
        """The target."""
        self.supervision = supervision
        """What it is trained to match."""
        self.config = config or TransferConfig()
        """Settings."""
        self.callback = callback or (lambda record: None)
        """Told of every step and stage that this process runs."""
        self._scratch = None if scratch is None else Path(scratch)
        if self._scratch is not None and not self._scratch.is_dir():
            raise SemalignError(f"the scratch folder {scratch} does not exist: make it, or leave it out")
        self._ranks = Ranks.current()
        manifest = supervision.manifest
        if manifest.pairing.target_depth != self.view.depth:
            raise SemalignError(
                f"the supervision is for a target of {manifest.pairing.target_depth} layers, this one has "
                f"{self.view.depth}: supervise again with a pairing for {self.view.depth}"
            )
        if any(parameter.dtype == torch.float16 for parameter in self.view.model.parameters()):
            raise SemalignError(
                "the target's weights are float16, whose small gradients vanish without loss scaling: "
                "load it in bfloat16 or float32"
            )
        transported = manifest.transport.frame != "none"
        if transported and manifest.transport.target_width != self.view.width:
            raise SemalignError(
                f"the supervision is for width {manifest.transport.target_width}, the target's is {self.view.width}: "
                "supervise again with a transport to it"
            )
        self._guarded = held_out if self.config.guards.rollback is not None else None
        self._stores = {"training": supervision} | ({} if self._guarded is None else {"held-out": self._guarded})
        if int(supervision.entries.max()) >= len(self.view.head.weight):
            raise SemalignError(
                f"the supervision is over vocabulary ids up to {int(supervision.entries.max())}, the target's head has "
                f"{len(self.view.head.weight)} rows: supervise with entries=… of the shared vocabulary"
            )
        embeddings = self.view.model.get_input_embeddings().weight
        assert isinstance(embeddings, Tensor)
        for rows, store in self._stores.items():
            largest = store.largest_id  # reads every token
            if largest >= len(embeddings):
                raise SemalignError(
                    f"the {rows} rows hold token id {largest}, the target embeds {len(embeddings)}: leave out the rows "
                    "with tokens that it does not know"
                )
        self.layers = self.config.stages(self.view.depth)
        """The layers that get a stage, shallow to deep."""
        weights = self.config.weights
        self._objective: Any = objective or self.config.objective
        terms: list[tuple[float, Objective]] = [
            (weights.geometry, self._objective),
            (weights.output, OutputKL(divergence=self.config.divergence)),
            (weights.answer, AnswerNLL()),
            (weights.label, LabelCosine()),
        ]
        self._terms = [(weight, term) for weight, term in terms if weight > 0]
        names = [term.name for _, term in self._terms]
        if len(set(names)) < len(names):
            raise SemalignError(
                f"two terms of the loss have one name ({', '.join(names)}): give the own objective another"
            )
        silent = [term.name for _, term in self._terms if count_of(term, supervision.counts) == 0]
        if silent:
            told = f"no training example has enough supervised tokens for {' or '.join(silent)}"
            if len(silent) == len(self._terms):
                raise SemalignError(f"{told}: supervise more tokens, or give another term of the loss a weight")
            LOGGER.warning("%s, which has no say", told)
        self._shared_head = self.view.head.select(supervision.entries)
        if self.config.divergence != "forward" and weights.output > 0:
            for rows, store in self._stores.items():
                if not isinstance(store.manifest.settings.output, TopK):
                    raise SemalignError(
                        f"the {self.config.divergence} divergence needs supervision by top entries, the {rows} rows "
                        "have final hidden states: supervise them with output=TopK(), or set divergence=forward"
                    )
        if self.config.guards.rollback is not None and held_out is None:
            raise SemalignError("train.guards.rollback needs held-out rows: give held_out, or set it to null")
        if held_out is not None:
            mine, theirs = supervision.manifest, held_out.manifest
            if _alike(mine) != _alike(theirs) or not torch.equal(supervision.entries, held_out.entries):
                raise SemalignError(
                    "the held-out rows are supervised with another pairing, transport, residual, temperature or "
                    "vocabulary than the training rows: supervise both alike"
                )
        for rows, store in self._stores.items():
            if checkpoints is not None and isinstance(store, LiveSupervision) and not store.manifest.key:
                raise SemalignError(
                    f"checkpoints with live supervision of the {rows} rows need its key, which tells the source and "
                    "the rows: give key=…"
                )
        if checkpoints is not None and objective is not None and not isinstance(objective, BaseModel):
            raise SemalignError(
                f"checkpoints with an own objective need its settings: derive {type(objective).__name__} from "
                "semalign_geometry.Settings"
            )
        self._checkpoint_folder = None if checkpoints is None else Path(checkpoints)
        self._checkpoints: Checkpoints | None = None  # made by `fit`, for the target as it is then
        self._autocast = self.config.autocast == "bfloat16" or self.view.head.weight.dtype == torch.bfloat16

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
            training = self._ranks.from_first(self._fingerprint)
            self._checkpoints = Checkpoints(
                self._checkpoint_folder, training, self._ranks, self.config, code=self._ranks.from_first(self._code)
            )
        stages = []
        with undisturbed(self.view.model), self.view.compiled() if self.config.compile else nullcontext():
            sharded = self.config.shard_frozen and self._ranks.size > 1
            shards = ShardedLayers(self.view, self._ranks) if sharded else None
            prefix = PrefixCache(
                self.view,
                self.supervision,
                folder=self._scratch,
                batch_size=self.config.micro_batch_size,
                ranks=self._ranks,
                autocast=self.config.autocast == "bfloat16",
            )
            order = optimisation_batches(self.config, len(self.supervision))  # stages resume where one stopped
            try:
                for layer, steps in zip(self.layers, self.stage_steps, strict=True):
                    started, batches = time.perf_counter(), list(itertools.islice(order, steps))
                    # Stage by stage when resumed, too: the same bits.
                    prefix.advance(layer - 1, itertools.chain(*batches))
                    if shards is not None:
                        shards.gather(layer)
                    stages.append(self._resumed(layer) or self._stage(layer, prefix, batches, started))
                    if shards is not None:
                        shards.shard(layer)
            except DivergedError:
                if shards is not None:
                    shards.gather_all()
                raise
            if shards is not None:
                shards.gather_all()
        return TransferReport(
            config=self.config,
            stages=tuple(stages),
            supervised_tokens=sum(stage.supervised_tokens for stage in stages),
            seconds=sum(stage.seconds for stage in stages),
        )

    def _resumed(self, layer: int) -> StageRecord | None:
        """The record of a stage that was finished before, its weights loaded; None when it must be run."""
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
        watching = self.config.guards.model_copy(update={"drowned": 2.0})  # only warns
        config = self.config.model_copy(update={"guards": watching})
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
            tensors=dict(self.view.model.named_parameters()) | dict(self.view.model.named_buffers()),
        )

    def _code(self) -> dict[str, str]:
        """Hash of the code of a layer objective that does not come along."""
        return KNOWN_OBJECTIVES.code(type(self._objective), name=self._objective.name)

    def _stage(self, layer: int, prefix: PrefixCache, batches: list[list[int]], started: float) -> StageRecord:
        config, steps = self.config, len(batches)
        before = self._held_out_loss(layer)
        kept = {name: value.clone() for name, value in self._stage_tensors(layer).items()} if before is not None else {}
        with frontier(
            self.view, layer, config.trainable, final_norm=self._trains_norm(layer), seed=config.seed
        ) as parameters:
            optimiser = Optimiser(parameters, config, products=torch.bfloat16 if self._autocast else None)
            records = self._restored(layer, optimiser)
            earlier, restored = sum(record.seconds for record in records), len(records)
            try:
                for number in range(restored + 1, steps + 1):
                    records.append(self._step(layer, number, steps, batches[number - 1], prefix, parameters, optimiser))
                    self.callback(records[-1])
                    self._check_skipped(records)
                    if self._checkpoints is not None and number < steps:
                        self._checkpoints.keep(records, optimiser.tensors)
            except KeyboardInterrupt:
                moved = sum(not record.skipped for record in records[restored:])
                if self._checkpoints is not None and optimiser.moves == moved and len(records) < steps:
                    self._checkpoints.keep_last(records, optimiser.tensors())  # no step was half done
                raise
            if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
                raise DivergedError(records[-1], "the weights are not finite after the last step")
            trained = sum(parameter.numel() for parameter in parameters)
        self._warn_of_drowning(layer, records)
        after = self._held_out_loss(layer)
        held_out = None if before is None or after is None else (before, after)
        worse = held_out is not None and not held_out[1] <= held_out[0] * (1 + (config.guards.rollback or 0))
        if worse:
            for name, value in self._stage_tensors(layer).items():
                value.copy_(kept[name])
        record = StageRecord(
            layer=layer,
            source_layer=self.supervision.manifest.pairing.source_of(layer),
            steps=steps,
            trainable_parameters=trained,
            first_losses=records[0].losses,
            last_losses=records[-1].losses,
            skipped=sum(record.skipped for record in records),
            held_out=held_out,
            rolled_back=worse,
            supervised_tokens=sum(record.supervised_tokens for record in records),
            seconds=earlier + time.perf_counter() - started,
        )
        if self._checkpoints is not None:
            self._checkpoints.save_stage(record, self._stage_tensors(layer))
        LOGGER.info("layer %d: %d steps, losses %s → %s", layer, steps, record.first_losses, record.last_losses)
        self.callback(record)
        return record

    def _step(
        self,
        layer: int,
        number: int,
        steps: int,
        indices: list[int],
        prefix: PrefixCache,
        parameters: list[nn.Parameter],
        optimiser: Optimiser,
    ) -> StepRecord:
        begun = time.perf_counter()
        losses, norms = self._gradients(layer, indices, prefix, parameters)
        limit = float("inf") if self.config.clip is None else self.config.clip
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        rate = self.config.learning_rate * rate_factor(number, steps, self.config)
        if math.isfinite(norm):
            optimiser.step(rate)
        optimiser.zero_grad()
        seconds = time.perf_counter() - begun
        tokens = int(self.supervision.lengths[indices].sum())
        return StepRecord(
            layer=layer,
            step=number,
            steps=steps,
            losses=losses,
            gradient_norms=norms,
            gradient_norm=norm,
            skipped=not math.isfinite(norm),
            learning_rate=rate,
            supervised_tokens=int(self.supervision.counts[indices].sum()),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            examples=tuple(indices),
        )

    def _restored(self, layer: int, optimiser: Optimiser) -> list[StepRecord]:
        """The steps of a stage that an interrupted training did, with their weights and moments loaded."""
        state = None if self._checkpoints is None else self._checkpoints.state(layer)
        if state is None:
            return []
        optimiser.load(state.tensors)
        return list(state.records)

    def _check_skipped(self, records: list[StepRecord]) -> None:
        last, skipped = records[-1], sum(record.skipped for record in records)
        if skipped > self.config.guards.max_skipped or (last.skipped and last.step == last.steps):
            times = "" if skipped == 1 else f" for the {skipped}. time in this stage"
            raise DivergedError(last, f"the gradient is not finite{times}")

    def _warn_of_drowning(self, layer: int, records: list[StepRecord]) -> None:
        finite = [record.gradient_norms for record in records if not record.skipped]
        names = {name for norms in finite for name in norms}
        means = {name: sum(norms.get(name, 0.0) for norms in finite) / len(finite) for name in sorted(names)}
        if len(means) < 2:
            return
        strong, weak = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        if means[strong] > self.config.guards.drowned * means[weak]:
            LOGGER.warning(
                "layer %d: the gradient of %s is %.3g times that of %s, which has no say: change train.weights",
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
        for indices, mine in self._ranks.deal(chunks):
            step = self._forward(layer, indices, store, hidden=None, start=1)
            sums += mine * torch.tensor([float(total_of(term, step)) for _, term in self._terms], dtype=torch.float64)
        (sums,) = self._ranks.add([sums])
        units = [max(1, count_of(term, store.counts)) for _, term in self._terms]
        weights = [weight for weight, _ in self._terms]
        return float(
            sum(weight * total / unit for weight, total, unit in zip(weights, sums.tolist(), units, strict=True))
        )

    def _trains_norm(self, layer: int) -> bool:
        return self.config.train_final_norm and layer == self.view.depth

    def _gradients(
        self, layer: int, indices: Sequence[int], prefix: PrefixCache, parameters: Sequence[nn.Parameter]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Leave the gradient of the weighted loss over an optimisation batch in `parameters`; means and norms of the
        terms."""
        counts = self.supervision.counts[list(indices)]
        units = {term.name: count_of(term, counts) for _, term in self._terms}
        active = [(weight, term) for weight, term in self._terms if units[term.name] > 0]
        losses = torch.zeros(len(active), dtype=torch.float64)
        gradients = [[torch.zeros_like(parameter) for parameter in parameters] for _ in active]
        for micro, mine in self._ranks.deal(micro_batches(self.config, self.supervision, indices, self._ranks)):
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
        (losses,) = self._ranks.add([losses])
        gradients = [self._ranks.add(parts) for parts in gradients]
        for number, parameter in enumerate(parameters):
            of_terms = [parts[number] for parts in gradients]
            parameter.grad = torch.stack(of_terms).sum(0) if of_terms else torch.zeros_like(parameter)
        names = [term.name for _, term in active]
        norms = [float(nn.utils.get_total_norm(parts)) for parts in gradients]
        return dict(zip(names, losses.tolist(), strict=True)), dict(zip(names, norms, strict=True))

    def _forward(
        self, layer: int, indices: list[int], store: AnySupervision, *, hidden: Tensor | None, start: int
    ) -> Step:
        """Run layers `start` (on `hidden`, where given) to k, and what lies above only if a term needs the output."""
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
                recompute_from=layer + 1 if self.config.recompute_suffix and torch.is_grad_enabled() else None,
            )
        counts = data.positions.counts
        mask_BM = position_mask(counts)
        residual_PD = trace.residual(layer)
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
            temperature=store.manifest.settings.temperature,
        )


def _alike(manifest: SupervisionManifest) -> tuple[object, ...]:
    """What training and held-out rows must have in common; a transport is the same wherever it was read from."""
    transport = manifest.transport.model_copy(update={"files": {}})
    return manifest.pairing, transport, manifest.settings.residual, manifest.settings.temperature
