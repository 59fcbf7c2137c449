"""One experiment from models and rows to a run folder: attribute, pair, transport, supervise, train, measure, save."""

import contextlib
import dataclasses
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from semalign_align import Ranks, Supervision
from semalign_attribution import DecoderView, undisturbed
from semalign_geometry import ComponentError, SemalignError, brief, new_folder, sha256_of
from semalign_train import KNOWN_OBJECTIVES, FrontierTrainer, kept_until
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..data.row_files import files_at
from ..data.rows import Split
from ..experiment import Experiment
from ..methods import KNOWN_METHODS, JointMethod, Method, MethodContext, MethodReport, as_method
from ..models.loading import LoadedModel
from ..models.saving import save_model
from ..results.files import BEFORE, ENVIRONMENT, EXPERIMENT, RESULT, SIMILARITY
from ..results.measurement import Measurement
from ..results.run import Environment, RunResult
from ..results.similarity import LayerSimilarity, Matrix
from ..util.cache import bytes_in
from ..util.console import Console
from ..util.failures import naming
from ..util.resources import forget_peak_memory, join, peak_memory
from .inputs import Inputs, load, read_inputs
from .measure import measured
from .phase_cache import foreign_code, foreign_packages, is_kept, phase_key
from .plan import Plan, describe_plan, make_plan, matrix_speed
from .run_folder import claimed, empty
from .similarity import compare_layers
from .source_phase import SourceStores, source_stores
from .tracking import Metrics, find_trackers, tracked
from .written_answers import with_written_answers

_CHANGES = {
    "packages": ("the package {name}", "pip install {name}=={then}"),
    "code": ("the code of the {name}", ""),
    "python": ("Python", ""),
    "device": ("the device", "device={then}"),
    "dtypes": ("the dtype of the {name}", "{name}.dtype={then}"),
    "threads": ("the number of CPU threads", "OMP_NUM_THREADS={then}"),
    "processes": ("the number of processes", ""),
    "data_sha256": ("the file {name}", ""),
    "models": ("the {name}", ""),
}
"""How a change of a field is told, and the setting that undoes it."""


PACKAGES = (
    "semalign-harness",
    "semalign-train",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "pydantic",
)


def run_experiment(
    experiment: Experiment, folder: Path, *, console: Console | None = None, trackers: Sequence[str] = ()
) -> RunResult:
    """Run an experiment into a folder, or go on with an interrupted run of it there.

    Inputs are checked before anything is written; each file in the folder is whole or absent. A run that is killed at
    any moment and repeated ends, on a CPU, with the weights of an undisturbed one. A finished run is not repeated.
    Started by a launcher such as `torchrun`, all processes run it together and get the result; the first one writes.

    Args:
        experiment: what to run.
        folder: the run folder: new, empty, or of this experiment.
        console: where progress is shown; None shows nothing.
        trackers: names of trackers that are told of every step; the result does not depend on them.

    Raises:
        SemalignError: the input cannot be used, the folder holds something else, a tracker does not start, training
            diverged, or the saved target does not compute what the trained one did.
        OSError: the disk is full or not writable.
        KeyboardInterrupt: Ctrl-C; its text says where the same call resumes.
    """
    ranks, device = join(experiment.device)
    console = console if console is not None and ranks.is_first else Console(quiet=True)
    trackers = ranks.from_first(lambda: find_trackers(trackers))
    with contextlib.ExitStack() as stack, _saying_where_it_resumes(folder):
        resumed = ranks.from_first(lambda: stack.enter_context(claimed(folder, experiment)))
        ranks.from_first(lambda: check_code(folder, experiment))
        if ranks.from_first(lambda: (folder / RESULT).is_file()):
            console.note(f"the run in {folder} is finished already")
            if ranks.is_first:
                _tidy(folder)
            return RunResult.read(folder / RESULT)
        if resumed:
            console.note(f"going on with the interrupted run in {folder}")
        try:
            inputs, environment = _begin(experiment, folder, console, device, resumed=resumed)
            metrics = _metrics(stack, experiment, folder, trackers, console)
            method = as_method(experiment.method)
            plan: Plan | None = None
            if method.kind == "semalign":
                plan = make_plan(
                    experiment,
                    inputs.split,
                    source=inputs.source.shape,
                    target=inputs.target.shape,
                    processes=ranks.size,
                    supervised=is_kept(environment.supervision_key),
                    speed=matrix_speed(device, inputs.target.dtype(device)),
                )
                for line in describe_plan(plan, experiment, inputs):
                    console.note(line)
            elif isinstance(method, JointMethod) and (unused := method.unused(experiment.train)):
                console.note(f"{method.kind} trains all layers at once, without {', '.join(unused)}")
            stores = stack.enter_context(
                source_stores(experiment, folder, console, inputs, device, environment.supervision_key)
            )
            supervision_bytes = bytes_in(stores.train.folder) if isinstance(stores.train, Supervision) else 0
            generates = experiment.measure.answer_rows > 0
            target = load(console, "target", inputs.target, device, generates=generates)
            # A target that does not fit fails here.
            with naming(f"the target {experiment.target.path} cannot be trained"):
                FrontierTrainer(target.model, stores.train, experiment.train, held_out=stores.held_out)
        except Exception:
            if not resumed and ranks.is_first:
                empty(folder)
            raise
        before = _before(experiment, folder, console, target, stores, inputs.split)
        _, layers_before = _layers(target, stores.held_out, console)
        context = MethodContext(experiment, inputs, target, stores, plan, folder, console, device, metrics)
        peak = peak_memory(device)
        forget_peak_memory(device)
        try:
            with naming(f"the target {experiment.target.path} cannot be trained"):
                training = _report_of(method, method.run(context))
        except ComponentError:
            if not resumed and ranks.is_first:
                empty(folder)  # its code must change, and a run of another code begins in an empty folder
            raise
        training_peak = peak_memory(device)
        saved: list[LoadedModel] = []
        named = naming("the trained target cannot be saved and loaded again")
        with console.step("save the target, reload it, compare logits"), named:
            ranks.from_first(lambda: saved.append(save_and_reload(target, folder / "model")))
        reloaded = saved[0] if saved else target  # which computes the same, as the first process has seen
        after = measured(experiment, console, "target after", reloaded, stores.held_out, inputs.split)
        tokens, layers_after = _layers(reloaded, stores.held_out, console)
        similarity = LayerSimilarity(
            source_layers=tuple(sorted(set(stores.held_out.manifest.pairing.source_layers))),
            tokens=tokens,
            before=layers_before,
            after=layers_after,
        )
        result = RunResult(
            name=experiment.name,
            source=stores.phase.measurement,
            before=before,
            after=after,
            training=training,
            supervision_bytes=supervision_bytes if method.stored else 0,
            supervision_seconds=stores.phase.seconds if method.stored else 0.0,
            train_rows=len(inputs.split.train),
            seconds=console.seconds,
            peak_bytes=max(ranks.from_all(max(peak, peak_memory(device)))),
            training_peak_bytes=None if resumed else max(ranks.from_all(training_peak)),
        )
        if ranks.is_first:
            similarity.write(folder / SIMILARITY)
            result.write(folder / RESULT)
            metrics.add_result(result.model_dump(exclude={"training": {"transfer"}}))
            _tidy(folder)
        ranks.wait()
    return result


@contextlib.contextmanager
def _saying_where_it_resumes(folder: Path) -> Iterator[None]:
    """Let a `KeyboardInterrupt` say where the same run resumes."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        trained = kept_until(folder / "checkpoints")
        if (folder / RESULT).is_file():
            place = "with the report of the finished run"
        elif trained is not None:
            place = f"the training {trained}"
        elif (folder / "supervision.json").is_file():
            place = "at the first step of the training"
        else:
            place = "before the training, where finished answers and supervision are kept"
        raise KeyboardInterrupt(place) from interrupt


def _begin(
    experiment: Experiment, folder: Path, console: Console, device: torch.device, *, resumed: bool
) -> tuple[Inputs, Environment]:
    """Read the inputs, and note what the run depends on, or check it against what was noted.

    Raises:
        SemalignError: the inputs cannot be used, or have changed.
    """
    ranks = Ranks.current()
    began = ranks.from_first(lambda: Environment.read(folder / ENVIRONMENT) if resumed else None)
    inputs = settled(ranks.in_turn(lambda: read_inputs(experiment, console)), device, began)
    inputs = with_written_answers(experiment, inputs, device, console)

    def note() -> Environment:
        environment = environment_of(experiment, inputs, device)
        if began is not None:
            check_unchanged(environment, began, folder, console)
        else:
            environment.write(folder / ENVIRONMENT)
            experiment.write(folder / EXPERIMENT)  # last: a folder that holds it can be resumed
        return environment

    return inputs, ranks.from_first(note)


def _report_of(method: Method, report: object) -> MethodReport:
    """What a method returned.

    Raises:
        ComponentError: it is no report.
    """
    if not isinstance(report, MethodReport):
        raise ComponentError(f"the method {method.kind} returned {brief(report)} from run: expected a MethodReport")
    return report


def _metrics(
    stack: contextlib.ExitStack, experiment: Experiment, folder: Path, trackers: Sequence[str], console: Console
) -> Metrics:
    """The metrics, which have trackers on the first process."""
    found: list[Metrics] = []
    Ranks.current().from_first(
        lambda: found.append(stack.enter_context(tracked(folder, experiment, trackers, console)))
    )
    return found[0] if found else Metrics(folder)


def _tidy(folder: Path) -> None:
    """Drop what only an unfinished run needs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


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
    """Say whether weights or only what is computed with them is not finite, with the remedy."""
    broken = [name for name, each in model.named_parameters() if not torch.isfinite(each).all()]
    if broken:
        return f"{broken[0]} is not finite after training; nothing was kept, lower the learning rate"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"all its weights are finite, so it overflows in {dtype}; nothing was kept, set target.dtype to another"


def code_of(experiment: Experiment) -> dict[str, str]:
    """Hashes of the code of the components that do not come along, by their sort and name."""
    return {
        **foreign_code(experiment),
        **KNOWN_OBJECTIVES.code(type(experiment.train.objective)),
        **KNOWN_METHODS.code(type(experiment.method)),
    }


def check_code(folder: Path, experiment: Experiment) -> None:
    """Refuse a folder with a run of an experiment, finished or not, whose components had another code then.

    Raises:
        SemalignError: it holds one.
    """
    if not (folder / EXPERIMENT).is_file() or not (folder / ENVIRONMENT).is_file():
        return
    then, now = Environment.read(folder / ENVIRONMENT).code, code_of(experiment)
    for name in then | now:
        if then.get(name) != now.get(name):
            raise SemalignError(
                f"the code of the {name} changed since the run in {folder} began: restore it, or choose another folder "
                "with --out"
            )


def settled(inputs: Inputs, device: torch.device, began: Environment | None) -> Inputs:
    """The inputs in the dtypes that the run began with, else in those that the first process finds for them.

    Raises:
        SemalignError: the target would train in float16.
    """

    def dtypes() -> list[str]:
        if began is not None and began.device == str(device):
            return list(began.dtypes)
        return _dtypes(inputs, device)

    found = _in_dtypes(inputs, Ranks.current().from_first(dtypes))
    if found.target.settings.dtype == "float16":
        raise SemalignError(
            "the target's weights are float16, whose small gradients vanish without loss scaling: set "
            "target.dtype=bfloat16"
        )
    return found


def environment_of(experiment: Experiment, inputs: Inputs, device: torch.device) -> Environment:
    """All that a run depends on besides its experiment."""
    rows = [experiment.data.train, experiment.data.held_out]
    files = [file for row in rows if row is not None for file in files_at(Path(row.path).expanduser())]
    return Environment(
        packages={
            **{name: version(name) for name in PACKAGES},
            **foreign_packages(experiment),
            **KNOWN_OBJECTIVES.packages(experiment.train.objective.kind),
            **KNOWN_METHODS.packages(as_method(experiment.method).kind),
        },
        code=code_of(experiment),
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(device),
        dtypes=_dtypes(inputs, device),
        threads=torch.get_num_threads(),
        processes=Ranks.current().size,
        data_sha256={str(file): sha256_of(file) for file in files},
        models=[inputs.source_id, inputs.target_id],
        supervision_key=phase_key(experiment, inputs, device),
        date=None if inputs.encoder.told_date is None else str(inputs.encoder.told_date),
    )


def _dtypes(inputs: Inputs, device: torch.device) -> list[str]:
    return [str(each.dtype(device)).removeprefix("torch.") for each in (inputs.source, inputs.target)]


def _in_dtypes(inputs: Inputs, dtypes: Sequence[str]) -> Inputs:
    """The inputs with dtypes that are settled: what `auto` finds by trying depends on how busy a processor is."""
    source, target = (
        dataclasses.replace(opened, settings=opened.settings.model_copy(update={"dtype": dtype}))
        for opened, dtype in zip((inputs.source, inputs.target), dtypes, strict=True)
    )
    return dataclasses.replace(inputs, source=source, target=target)


def check_unchanged(now: Environment, began: Environment, folder: Path, console: Console) -> None:
    """Refuse to resume a run that would get other supervision; say what else may change the last bits.

    Raises:
        SemalignError: the rows, the models, the device, the dtypes, the threads or the packages have changed.
    """
    changes = _changes(began, now)
    if now.supervision_key != began.supervision_key:
        raise SemalignError(
            f"{', and '.join(changes) or 'the rows changed'}, since the run in {folder} began: restore what it was, or "
            "choose another folder with --out"
        )
    if changes:
        console.note(f"{', and '.join(changes)}, since the run began: the last bits of the weights may differ")


def _changes(began: Environment, now: Environment) -> list[str]:
    """Each change from one environment to another, with both values, and the setting that undoes it where one does."""
    found = []
    for field in Environment.model_fields:
        if field == "supervision_key":
            continue
        label, remedy = _CHANGES.get(field, (field, ""))
        before, after = _entries(getattr(began, field)), _entries(getattr(now, field))
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                then, here = (str(each.get(name, "absent"))[:60] for each in (before, after))
                restored = f" ({remedy.format(name=name, then=then)} restores it)" if remedy else ""
                found.append(f"{label.format(name=name)} changed from {then} to {here}{restored}")
    return found


def _entries(value: Any) -> dict[str, Any]:
    """The parts of a field: of a dictionary, of a pair of source and target, or the whole."""
    if isinstance(value, dict):
        return value
    return dict(zip(("source", "target"), value, strict=True)) if isinstance(value, list) else {"": value}


def _layers(loaded: LoadedModel, held_out: Supervision, console: Console) -> tuple[int, Matrix]:
    """The target's layers against those that the source left behind."""
    named = naming(f"the layers of {loaded.folder} cannot be compared with the source's")
    with console.step("compare the layers with the source's"), named:
        return compare_layers(DecoderView(loaded.model), held_out)


def _before(
    experiment: Experiment, folder: Path, console: Console, target: LoadedModel, stores: SourceStores, split: Split
) -> Measurement:
    """The target's figures before the transfer, measured once for all runs that use the same supervision."""
    ranks, shared = Ranks.current(), Path(stores.phase.folder) / BEFORE

    def known() -> Measurement | None:
        found = [file for file in (folder / BEFORE, shared) if file.is_file()]
        return Measurement.read(found[0]) if found else None

    before = ranks.from_first(known)
    if before is None:
        before = measured(experiment, console, "target before", target, stores.held_out, split)
        if ranks.is_first:
            with contextlib.suppress(OSError):  # a cache that only others may write to
                before.write(shared)
    if ranks.is_first:
        before.write(folder / BEFORE)
    return before
