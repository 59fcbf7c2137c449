"""The training of a run: the method's context, the records of its steps, and the batch at which it diverged."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from semalign_align import RaisedElsewhere
from semalign_geometry.base import ComponentError, SemalignError, brief, replace_file
from semalign_train import DivergedError, StageRecord, StepRecord

from ..methods import MethodContext, MethodReport
from ..models.loading import LoadedModel
from .job import Job
from .source_phase import SourceStores
from .tracking import Metrics

Record = StepRecord | StageRecord


def train(job: Job, target: LoadedModel, stores: SourceStores, metrics: Metrics) -> MethodReport:
    """Train the target in place by the method of the experiment.

    Raises:
        SemalignError: the method cannot be used, or its training diverged.
        ComponentError: the method did not return a report.
    """
    experiment, split, method = job.experiment, job.inputs.split, job.experiment.method
    depth = job.inputs.target.shape.layers
    with _recorded(job, metrics, method.work(experiment.train, depth, len(split.train)).steps) as record:
        context = MethodContext(
            target=target.model,
            tokenizer=target.tokenizer,
            source_tokenizer=job.inputs.source.tokenizer,
            supervision=stores.train,
            held_out=stores.held_out,
            rows=split.train,
            attribution_rows=split.train[: experiment.data.attribution_rows],
            batch_size=experiment.batch_size,
            train=experiment.train,
            folder=job.folder,
            load_source=lambda: job.load("source").model,
            progress=job.console,
            callback=record,
        )
        try:
            report: object = method.run(context)
        except DivergedError as error:
            if not job.ranks.is_first:
                raise RaisedElsewhere(str(error)) from error
            kept = _keep_batch(job.folder, error, context)
            raise SemalignError(f"{error}; the batch is in {kept}") from error
    if not isinstance(report, MethodReport):
        raise ComponentError(f"the method {method.kind} returned {brief(report)} from run: expected a MethodReport")
    return report


@contextlib.contextmanager
def _recorded(job: Job, metrics: Metrics, steps: int) -> Iterator[Callable[[Record], None]]:
    """Show and keep the records of the first process; those of the others are ignored."""
    if not job.ranks.is_first:
        yield lambda entry: None
        return
    with job.console.bar("train", steps) as bar:

        def record(entry: Record) -> None:
            if isinstance(entry, StageRecord):
                metrics.add_stage(entry)
                for incident in _incidents(entry):
                    job.console.note(f"layer {entry.layer}: {incident}")
                return
            bar.skip(metrics.add(entry))
            losses = ", ".join(f"{name} {value:.3f}" for name, value in entry.losses.items())
            bar.advance(f"layer {entry.layer}: {losses}" if entry.layer else losses)

        yield record


def _incidents(stage: StageRecord) -> Iterator[str]:
    if stage.skipped:
        yield f"{stage.skipped} of {stage.steps} steps skipped, their gradients were not finite"
    if stage.rolled_back and stage.held_out:
        yield f"undone, the held-out loss rose from {stage.held_out[0]:.4g} to {stage.held_out[1]:.4g}"


def _keep_batch(folder: Path, error: DivergedError, context: MethodContext) -> Path:
    """Write the step at which training diverged, with the rows of its batch."""
    rows = {index: context.supervision.tokens([index])["input_ids"][0].tolist() for index in error.record.examples}
    batch = [{"example": i, "text": context.tokenizer.decode(ids), "input_ids": ids} for i, ids in rows.items()]
    found = {"step": error.record.model_dump(mode="json"), "batch": batch}
    return replace_file(folder / "diverged.json", json.dumps(found, indent=2, ensure_ascii=False))
