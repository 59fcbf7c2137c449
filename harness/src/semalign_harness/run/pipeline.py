"""One experiment from models and rows to a run folder: attribute, pair, transport, supervise, train, measure, save."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from semalign_align import Ranks, Supervision
from semalign_attribution import DecoderView, undisturbed
from semalign_geometry.base import ComponentError, SemalignError, new_folder
from semalign_train import kept_until
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..experiment import Experiment
from ..models.loading import LoadedModel
from ..models.saving import save_model
from ..models.shape import is_small
from ..results.files import BEFORE, ENTRIES, ENVIRONMENT, EXPERIMENT, RESULT, SIMILARITY
from ..results.measurement import Measurement
from ..results.run import Environment, RunResult
from ..results.similarity import LayerSimilarity, Matrix
from ..util.cache import bytes_in
from ..util.console import Console
from ..util.failures import naming
from ..util.resources import forget_peak_memory, join, one_thread, peak_memory
from .entries import entry_changes, entry_names, keep_probabilities, kept_probabilities
from .environment import check_code, check_unchanged, environment_of, settled
from .inputs import read_inputs
from .job import Job
from .measure import Measured, measured
from .plan import describe_plan
from .run_folder import claimed, empty
from .similarity import compare_layers
from .source_phase import SourceStores, source_stores
from .tracking import Metrics, find_trackers, tracked
from .training import train
from .written_answers import with_written_answers


class _Layers(NamedTuple):
    """Similarity of the target's layers with the source's."""

    tokens: int
    matrix: Matrix


def run_experiment(
    experiment: Experiment, folder: Path, *, console: Console | None = None, trackers: Sequence[str] = ()
) -> RunResult:
    """Run an experiment into a folder, or resume an interrupted run of it there.

    Inputs are checked before anything is written; each file in the folder is whole or absent. A run that is killed at
    any moment and repeated ends, on a CPU, with the weights of an undisturbed one. A finished run is not repeated.
    Started by a launcher such as `torchrun`, all processes run it together and get the result; the first one writes.

    Args:
        experiment: what to run.
        folder: the run folder: new, empty, or of this experiment.
        console: display of progress; None shows nothing.
        trackers: names of trackers that get every step; the result does not depend on them.

    Raises:
        SemalignError: the input cannot be used, the folder holds something else, a tracker does not start, training
            diverged, or the saved target does not compute the same as the trained one.
        OSError: the disk is full or not writable.
        KeyboardInterrupt: Ctrl-C; its text names the place where the same call resumes.
    """
    ranks, device = join(experiment.device)
    console = console if console is not None and ranks.is_first else Console(quiet=True)
    trackers = ranks.broadcast_from_first(lambda: find_trackers(trackers))
    with contextlib.ExitStack() as stack, _saying_where_it_resumes(folder):
        if is_small(experiment.source) and is_small(experiment.target):
            stack.enter_context(one_thread(console.note))
        resumed = ranks.broadcast_from_first(lambda: stack.enter_context(claimed(folder, experiment)))
        ranks.broadcast_from_first(lambda: check_code(folder, experiment))
        if ranks.broadcast_from_first(lambda: (folder / RESULT).is_file()):
            console.note(f"the run in {folder} is finished already")
            result = RunResult.read(folder / RESULT)
        else:
            if resumed:
                console.note(f"resuming the interrupted run in {folder}")
            result = _run(experiment, folder, console, device, ranks, trackers, resumed=resumed)
        if ranks.is_first:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # which only an unfinished run needs
        ranks.barrier()
    return result


def _run(
    experiment: Experiment,
    folder: Path,
    console: Console,
    device: torch.device,
    ranks: Ranks,
    trackers: Sequence[str],
    *,
    resumed: bool,
) -> RunResult:
    with contextlib.ExitStack() as stack:
        with _emptying(folder, Exception, unless=resumed or not ranks.is_first):
            job, key = _begin(experiment, folder, console, device, ranks, resumed=resumed)
            metrics = _metrics(stack, job, trackers)
            for line in describe_plan(job):
                console.note(line)
            stores = stack.enter_context(source_stores(job, key))
            supervision_bytes = bytes_in(stores.train.folder) if isinstance(stores.train, Supervision) else 0
            target = job.load("target", generates=job.generates)
        before, layers_before = _before(job, target, stores), _layers(job, target, stores.held_out)
        peak = peak_memory(device)
        forget_peak_memory(device)
        # The code of a component must change, and a run of another code begins in an empty folder.
        with _emptying(folder, ComponentError, unless=resumed or not ranks.is_first):
            with naming(f"the target {experiment.target.path} cannot be trained"):
                training = train(job, target, stores, metrics)
        training_peak = peak_memory(device)
        trained = _saved(job, target)
        after = measured(job, "target after", trained, stores.held_out)
        layers_after = _layers(job, trained, stores.held_out)
        stored = experiment.method.stored
        entries = entry_changes(
            before.probabilities,
            after.probabilities,
            entry_names(job.inputs),
            spans=int(stores.held_out.counts.sum()),
        )
        result = RunResult(
            name=experiment.name,
            source=stores.phase.measurement,
            before=before.metrics,
            after=after.metrics,
            training=training,
            supervision_bytes=supervision_bytes if stored else 0,
            supervision_seconds=stores.phase.seconds if stored else 0.0,
            train_rows=len(job.inputs.split.train),
            seconds=console.seconds,
            peak_bytes=max(ranks.all_gather(max(peak, peak_memory(device)))),
            training_peak_bytes=None if resumed else max(ranks.all_gather(training_peak)),
        )
        if ranks.is_first:
            _similarity(stores, layers_before, layers_after).write(folder / SIMILARITY)
            entries.write(folder / ENTRIES)
            result.write(folder / RESULT)
            metrics.add_result(result.model_dump(exclude={"training": {"transfer"}}))
    return result


@contextlib.contextmanager
def _saying_where_it_resumes(folder: Path) -> Iterator[None]:
    """Let a `KeyboardInterrupt` name the place where the same run resumes."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        trained = kept_until(folder / "checkpoints")
        if (folder / RESULT).is_file():
            place = "with the finished run"
        elif trained is not None:
            place = f"the training {trained}"
        elif (folder / "supervision.json").is_file():
            place = "at the first step of the training"
        else:
            place = "before the training, where finished answers and supervision are kept"
        raise KeyboardInterrupt(place) from interrupt


@contextlib.contextmanager
def _emptying(folder: Path, error: type[Exception], *, unless: bool) -> Iterator[None]:
    """Empty the run folder on an error, unless the run has begun before."""
    try:
        yield
    except error:
        if not unless:
            empty(folder)
        raise


def _begin(
    experiment: Experiment, folder: Path, console: Console, device: torch.device, ranks: Ranks, *, resumed: bool
) -> tuple[Job, str]:
    """Read the inputs, and write down everything that the run depends on, or check it; return the cache key, too.

    Raises:
        SemalignError: the inputs cannot be used, or have changed.
    """
    began = ranks.broadcast_from_first(lambda: Environment.read(folder / ENVIRONMENT) if resumed else None)
    inputs = settled(ranks.in_turn(lambda: read_inputs(experiment, console)), device, began)
    job = with_written_answers(Job(experiment, folder, console, device, ranks, inputs))

    def note() -> str:
        environment = environment_of(experiment, job.inputs, device)
        if began is not None:
            check_unchanged(environment, began, folder, console)
        else:
            environment.write(folder / ENVIRONMENT)
            experiment.write(folder / EXPERIMENT)  # last: a folder that holds it can be resumed
        return environment.supervision_key

    return job, ranks.broadcast_from_first(note)


def _metrics(stack: contextlib.ExitStack, job: Job, trackers: Sequence[str]) -> Metrics:
    """Return the metrics, which have trackers on the first process."""
    found: list[Metrics] = []
    job.ranks.broadcast_from_first(lambda: found.append(stack.enter_context(tracked(job, trackers))))
    return found[0] if found else Metrics(job.folder)


def _before(job: Job, target: LoadedModel, stores: SourceStores) -> Measured:
    """Measure the target before the transfer, once for all runs that use the same supervision."""
    shared = Path(stores.phase.folder) / BEFORE
    distributions = shared.with_suffix(".safetensors")

    def known() -> Measured | None:
        found = [file for file in (job.folder / BEFORE, shared) if file.is_file()]
        probabilities = kept_probabilities(distributions)
        return Measured(Measurement.read(found[0]), probabilities) if found and probabilities is not None else None

    before = job.ranks.broadcast_from_first(known)
    if before is None:
        before = measured(job, "target before", target, stores.held_out)
        if job.ranks.is_first:
            with contextlib.suppress(OSError):  # a cache that only others may write to
                keep_probabilities(distributions, before.probabilities)
                before.metrics.write(shared)
    if job.ranks.is_first:
        before.metrics.write(job.folder / BEFORE)
    return before


def _layers(job: Job, loaded: LoadedModel, held_out: Supervision) -> _Layers:
    """Compare the target's layers with the stored ones of the source."""
    named = naming(f"the layers of {loaded.folder} cannot be compared with the source's")
    with job.console.step("compare the layers with the source's"), named:
        return _Layers(*compare_layers(DecoderView(loaded.model), held_out))


def _similarity(stores: SourceStores, before: _Layers, after: _Layers) -> LayerSimilarity:
    return LayerSimilarity(
        source_layers=tuple(sorted(set(stores.held_out.manifest.pairing.source_layers))),
        tokens=after.tokens,
        before=before.matrix,
        after=after.matrix,
    )


def _saved(job: Job, target: LoadedModel) -> LoadedModel:
    """Save the target on the first process; return it as it was loaded again there."""
    saved: list[LoadedModel] = []
    named = naming("the trained target cannot be saved and loaded again")
    with job.console.step("save the target, reload it, compare logits"), named:
        job.ranks.broadcast_from_first(lambda: saved.append(save_and_reload(target, job.folder / "model")))
    return saved[0] if saved else target  # the same, as the first process has checked


def save_and_reload(trained: LoadedModel, folder: Path) -> LoadedModel:
    """Save a model with its tokenizer, load it again, and compare the logits of both.

    Raises:
        SemalignError: the logits differ, or are not finite; nothing is left at `folder`.
        OSError: the disk is full.
    """
    ids = torch.arange(min(32, len(trained.tokenizer)), device=trained.model.device)[None]
    with new_folder(folder) as temporary:
        save_model(trained.model, trained.tokenizer, temporary)
        reloaded = AutoModelForCausalLM.from_pretrained(
            temporary, dtype=trained.model.dtype, trust_remote_code=False
        ).eval()
        reloaded.to(trained.model.device)
        with torch.no_grad(), undisturbed(trained.model):
            logits = trained.model(ids).logits
            difference = (logits - reloaded(ids).logits).abs().max()
        if not torch.isfinite(logits).all():
            raise SemalignError(f"the trained target computes logits that are not finite: {_origin(trained.model)}")
        if not float(difference) == 0:
            raise SemalignError(
                "the saved target computes other logits than the trained one (largest difference "
                f"{float(difference):.3g}): its architecture does not survive save_pretrained, nothing was kept"
            )
    return LoadedModel(reloaded, trained.tokenizer, str(folder), way=trained.way)


def _origin(model: PreTrainedModel) -> str:
    """Name the cause of logits that are not finite, weights or overflow, with the remedy."""
    broken = [name for name, each in model.named_parameters() if not torch.isfinite(each).all()]
    if broken:
        return f"{broken[0]} is not finite after training; nothing was kept, lower the learning rate"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"all its weights are finite, so it overflows in {dtype}; nothing was kept, set target.dtype to another"
