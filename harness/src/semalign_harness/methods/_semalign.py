"""SemAlign: frontier training, layer by layer, on what the source left behind."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from semalign_align import RaisedElsewhere, Ranks
from semalign_attribution import DecoderView, LayerScores
from semalign_geometry import SemalignError, Settings, replace_file
from semalign_train import (
    AnySupervision,
    DivergedError,
    FrontierTrainer,
    StageRecord,
    StepRecord,
    TransferConfig,
    TransferReport,
)

from ..models.loading import LoadedModel
from ..run.plan import Clock
from ..util.text import duration
from ._method import MethodContext, MethodReport

TELL_EVERY = 60.0
"""Seconds between two notes of the remaining time."""


class SemAlign(Settings):
    """Frontier training with the experiment's `train` settings."""

    stored: ClassVar[bool] = True
    kind: Literal["semalign"] = "semalign"
    """Chooses this method in a configuration."""
    critical_layer_only: bool = False
    """Whether only the first target layer that is paired with the best-scored source layer, or a deeper one, trains,
    as in v1; it gets the steps of all."""

    def run(self, context: MethodContext) -> MethodReport:
        """Run every stage, or go on with an interrupted run."""
        trainer_config = context.experiment.train
        if self.critical_layer_only:
            layer = _critical_layer(context.folder, context.stores.train)
            depth, examples = DecoderView(context.target.model).depth, len(context.stores.train)
            steps = sum(trainer_config.stage_steps(depth, examples))
            trainer_config = trainer_config.model_copy(update={"layers": (layer,), "steps": steps})
        report = _train(context, trainer_config)
        return MethodReport(
            method=self.kind,
            trained_parameters=sum(stage.trainable_parameters for stage in report.stages),
            steps=sum(stage.steps for stage in report.stages),
            supervised_tokens=report.supervised_tokens,
            seconds=report.seconds,
            transfer=report,
        )


def _critical_layer(folder: Path, store: AnySupervision) -> int:
    scores = LayerScores.read(folder / "attribution.json").mean
    critical = max(range(len(scores)), key=scores.__getitem__) + 1
    layers = store.manifest.pairing.source_layers
    return next((number for number, layer in enumerate(layers, 1) if layer >= critical), len(layers))


def _train(context: MethodContext, config: TransferConfig) -> TransferReport:
    ranks, folder, console, stores = Ranks.current(), context.folder, context.console, context.stores
    with contextlib.ExitStack() as stack:
        place = tempfile.TemporaryDirectory
        scratch = ranks.from_first(lambda: stack.enter_context(place(dir=folder, prefix=".scratch-")))
        trainer = FrontierTrainer(
            context.target.model,
            stores.train,
            config,
            scratch=Path(scratch),
            held_out=stores.held_out,
            checkpoints=folder / "checkpoints",
        )
        bar = stack.enter_context(console.bar("train", sum(trainer.stage_steps)))
        plan, told = context.plan, console.seconds
        clock = Clock(plan, trainer.layers) if plan and len(plan.training) == len(trainer.layers) else None

        def record(entry: StepRecord | StageRecord) -> None:
            nonlocal told
            if isinstance(entry, StageRecord):
                context.metrics.add_stage(entry)
                for fact in _incidents(entry):
                    console.note(f"layer {entry.layer}: {fact}")
                left = clock.after(entry.layer, entry.seconds) if clock else None
                if left is not None and console.seconds - told >= TELL_EVERY:
                    told = console.seconds
                    console.note(f"layer {entry.layer} of {trainer.view.depth}: about {duration(left)} left")
                return
            bar.skip(context.metrics.add(entry))
            losses = ", ".join(f"{name} {value:.3f}" for name, value in entry.losses.items())
            bar.advance(f"layer {entry.layer}: {losses}")

        if ranks.is_first:
            trainer.callback = record
        try:
            report = trainer.fit()
        except DivergedError as error:
            if not ranks.is_first:
                raise RaisedElsewhere(str(error)) from error
            kept = _keep_batch(folder, error, context.target, stores.train)
            raise SemalignError(f"{error}; the batch is in {kept}") from error
    if ranks.is_first:
        report.write(folder / "transfer.json")
    return report


def _incidents(stage: StageRecord) -> Iterator[str]:
    if stage.skipped:
        yield f"{stage.skipped} of {stage.steps} steps skipped, their gradients were not finite"
    if stage.rolled_back and stage.held_out:
        yield f"undone, the held-out loss rose from {stage.held_out[0]:.4g} to {stage.held_out[1]:.4g}"


def _keep_batch(folder: Path, error: DivergedError, target: LoadedModel, store: AnySupervision) -> Path:
    """Write the step at which training diverged and the rows of its batch, to look at."""
    rows = {index: store.tokens([index])["input_ids"][0].tolist() for index in error.record.examples}
    batch = [{"example": i, "text": target.tokenizer.decode(ids), "input_ids": ids} for i, ids in rows.items()]
    found = {"step": error.record.model_dump(mode="json"), "batch": batch}
    return replace_file(folder / "diverged.json", json.dumps(found, indent=2, ensure_ascii=False))
