"""One experiment from models and rows to a run folder: attribute, pair, transport, supervise, train, measure, save."""

import contextlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from semalign_align import FinalHidden, Supervision, SupervisionSettings, supervise
from semalign_attribution import (
    Batch,
    DecoderView,
    LayerPairing,
    Scorer,
    Similarity,
    attribute_layers,
    pair_layers,
    supervised,
    undisturbed,
)
from semalign_geometry import (
    Contract,
    PairedResiduals,
    SemalignError,
    SemanticBasis,
    SharedVocabulary,
    Transport,
    fit_transport,
    measure_fidelity,
    new_folder,
    replace_file,
    sha256_of,
)
from semalign_train import DivergedError, FrontierTrainer, StageRecord, StepRecord, TransferReport
from torch import Tensor
from transformers import AutoModelForCausalLM

from .console import Console
from .data import Example, Split, batches, read_rows, split_rows
from .experiment import Experiment
from .measure import Measurement, answer_accuracy, measure
from .models import LoadedModel, OpenedModel, check_tokenizers, identity, load_model, open_model
from .resources import peak_memory, pick_device
from .run_folder import EXPERIMENT, METRICS, RESULT, claimed, cut_metrics
from .saving import save_model

SOURCE, BEFORE = "source.json", "before.json"
PACKAGES = ("semalign-harness", "torch", "transformers", "peft", "datasets", "safetensors", "pydantic")


class Environment(Contract):
    """What a run ran on."""

    packages: dict[str, str]
    """Versions."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and processor."""
    device: str
    """Device of the models."""
    threads: int
    """CPU threads that torch used."""
    data_sha256: dict[str, str]
    """Hash of each local data file, by the path that the experiment names."""
    models: dict[str, str]
    """Hash of each model's files, or its commit on the hub, by the path that the experiment names."""


class RunResult(Contract):
    """What a run measured."""

    name: str
    """Name of the experiment."""
    source: Measurement
    """The source on the held-out rows."""
    before: Measurement
    """The target before the transfer."""
    after: Measurement
    """The target after the transfer, reloaded from the run folder."""
    transfer: TransferReport
    """Stages and settings of the training."""
    supervision_bytes: int
    """Size of the training supervision on disk."""
    train_rows: int
    """Rows that were trained on."""
    seconds: float
    """Wall time of the process that finished the run, the building or conversion of models included."""
    peak_bytes: int
    """Peak memory of the process; on a CUDA device, that device's peak."""


def run_experiment(experiment: Experiment, folder: Path, *, console: Console | None = None) -> RunResult:
    """Run an experiment into a folder, or go on with an interrupted run of it there.

    Inputs are checked before anything is written; each file in the folder is whole or absent. A run that is killed at
    any moment and repeated ends, on a CPU, with the weights of an undisturbed one. A finished run is not repeated.

    Args:
        experiment: what to run.
        folder: the run folder: new, empty, or of this experiment.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: the input cannot be used, the folder holds something else, training diverged, or the saved target
            does not compute what the trained one did.
        OSError: the disk is full or not writable.
    """
    console = console or Console(quiet=True)
    device = pick_device(experiment.device)
    with claimed(folder, experiment) as resumed:
        if (folder / RESULT).is_file():
            console.note(f"the run in {folder} is finished already")
            _tidy(folder)
            return RunResult.read(folder / RESULT)
        if resumed:
            console.note(f"going on with the interrupted run in {folder}")
        try:
            inputs = _read_inputs(experiment, console)
            _note_rows(console, inputs.split, experiment)
            _keep_record(experiment, inputs, folder, device, resumed=resumed)
            stores = _stores(experiment, folder, console, inputs, device)
            target = _load(console, "target", inputs.target, device)
            # A target that does not fit fails here.
            FrontierTrainer(target.model, stores.train, experiment.train, held_out=stores.held_out)
        except Exception:
            if not resumed:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        before = _before(experiment, folder, console, target, stores.held_out, inputs.split)
        transfer = _train(experiment, folder, console, target, stores)
        with console.step("save the target, reload it, compare logits"):
            reloaded = save_and_reload(target, folder / "model")
        after = _measured(experiment, console, "target after", reloaded, stores.held_out, inputs.split)
        result = RunResult(
            name=experiment.name,
            source=stores.source,
            before=before,
            after=after,
            transfer=transfer,
            supervision_bytes=sum(file.stat().st_size for file in (folder / "supervision").iterdir()),
            train_rows=len(inputs.split.train),
            seconds=console.seconds,
            peak_bytes=peak_memory(device),
        )
        result.write(folder / RESULT)
        _tidy(folder)
    return result


def _tidy(folder: Path) -> None:
    """Drop what only an unfinished run needs."""
    for name in ("checkpoints", "held_out"):
        shutil.rmtree(folder / name, ignore_errors=True)


def save_and_reload(trained: LoadedModel, folder: Path) -> LoadedModel:
    """Save a model with its tokenizer, load it again, and compare the logits of both.

    Raises:
        SemalignError: the logits differ; nothing is left at `folder`.
        OSError: the disk is full.
    """
    ids = torch.arange(min(32, len(trained.tokenizer)), device=trained.model.device)[None]
    with new_folder(folder) as temporary:
        save_model(trained.model, trained.tokenizer, temporary)
        reloaded = AutoModelForCausalLM.from_pretrained(temporary, dtype=trained.model.dtype).eval()
        reloaded.to(trained.model.device)
        with torch.no_grad(), undisturbed(trained.model):
            difference = (trained.model(ids).logits - reloaded(ids).logits).abs().max()
        if not float(difference) == 0:
            raise SemalignError(
                "the saved target computes other logits than the trained one (largest difference "
                f"{float(difference):.3g}): its architecture does not survive save_pretrained, nothing was kept"
            )
    return LoadedModel(reloaded, trained.tokenizer, str(folder))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an experiment names, read and checked; no weights yet."""

    source: OpenedModel
    target: OpenedModel
    split: Split
    shared: SharedVocabulary


def _read_inputs(experiment: Experiment, console: Console) -> Inputs:
    with console.step("read rows, tokenizers and configurations"):
        pools = read_rows(experiment.data)
        target = open_model(experiment.target, progress=console.ticker("pre-train the target"))
        source = open_model(experiment.source, progress=console.ticker("pre-train the source"))
        split = split_rows(experiment.data, pools, target.tokenizer)
        texts = [str(target.tokenizer.decode(list(e.prompt_ids + e.answer_ids))) for e in split.train[:8]]
        shared = check_tokenizers(source, target, texts)
        _check_rows(split, shared, experiment, source, target)
        experiment.train.stages(target.config.num_hidden_layers)
    return Inputs(source, target, split, shared)


def _check_rows(
    split: Split, shared: SharedVocabulary, experiment: Experiment, source: OpenedModel, target: OpenedModel
) -> None:
    known = set(shared.target_ids.tolist())
    rows = (*split.train, *split.held_out)
    for example in rows:
        unknown = set(example.prompt_ids + example.answer_ids) - known
        if unknown:
            raise SemalignError(
                f"the rows use token id {min(unknown)}, which only the target knows: choose models that share a "
                "tokenizer"
            )
    longest = max(len(example) for example in rows)
    generated = split.held_out[: experiment.measure.answer_rows]
    with_answer = max((len(e.prompt_ids) + experiment.measure.max_new_tokens for e in generated), default=0)
    for opened in (source, target):
        limit = opened.positions
        if limit is not None and longest > limit:
            raise SemalignError(
                f"a row has {longest} tokens, {opened.settings.path} reads at most {limit}: set "
                f"data.max_length={limit}, which leaves longer rows out"
            )
        if limit is not None and with_answer > limit:
            raise SemalignError(
                f"a prompt with measure.max_new_tokens={experiment.measure.max_new_tokens} may reach {with_answer} "
                f"tokens, {opened.settings.path} reads at most {limit}: lower measure.max_new_tokens"
            )


def _note_rows(console: Console, split: Split, experiment: Experiment) -> None:
    tokens = sum(len(example) for example in split.train)
    answers = sum(len(example.answer_ids) for example in split.train)
    console.note(
        f"{len(split.train)} training rows ({tokens} tokens, {answers} supervised), {len(split.held_out)} "
        "held-out rows; "
        f"the longest has {split.longest} tokens"
    )
    if split.too_long:
        console.note(f"{split.too_long} rows longer than data.max_length={experiment.data.max_length} were left out")


def _keep_record(experiment: Experiment, inputs: Inputs, folder: Path, device: torch.device, *, resumed: bool) -> None:
    """Write what the run depends on, or check that it has not changed since the run began."""
    places = [experiment.data.train.path] + ([experiment.data.held_out.path] if experiment.data.held_out else [])
    environment = Environment(
        packages={name: version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(device),
        threads=torch.get_num_threads(),
        data_sha256={place: sha256_of(place) for place in places if Path(place).is_file()},
        models={opened.settings.path: identity(opened) for opened in (inputs.source, inputs.target)},
    )
    if not resumed:
        environment.write(folder / "environment.json")
        experiment.write(folder / EXPERIMENT)  # last: a folder that holds it can be resumed
        return
    began = Environment.read(folder / "environment.json")
    now, then = (each.data_sha256 | each.models for each in (environment, began))
    changed = [place for place in now if now[place] != then.get(place)]
    if changed:
        raise SemalignError(f"{changed[0]} has changed since the run in {folder} began: choose another folder")


@dataclass(frozen=True, eq=False)
class TargetGeometry:
    """What the source's phase must know of the target, whose weights are gone by then."""

    depth: int
    basis: SemanticBasis | None
    """None when nothing is transported."""
    residuals: dict[int, Tensor]
    """Contributions of each layer at the supervised positions of the attribution rows."""


@dataclass(frozen=True, eq=False)
class SourceStores:
    """What the source leaves behind."""

    train: Supervision
    held_out: Supervision
    source: Measurement


def _load(console: Console, label: str, opened: OpenedModel, device: torch.device) -> LoadedModel:
    with console.step(f"load the {label}"):
        loaded = load_model(opened, device=device)
    console.note(f"the {label} computes in {str(loaded.model.dtype).removeprefix('torch.')} on {device}")
    return loaded


def _attribution_rows(experiment: Experiment, split: Split) -> list[Batch]:
    """One row at a time: the backward pass keeps every layer's activations."""
    return batches(split.train[: experiment.data.attribution_rows], 1)


def _stores(
    experiment: Experiment, folder: Path, console: Console, inputs: Inputs, device: torch.device
) -> SourceStores:
    """What the source leaves behind: of an earlier process where it is whole, else made now."""
    if (folder / SOURCE).is_file():
        try:
            with console.step("check the supervision"):
                return SourceStores(
                    Supervision.open(folder / "supervision"),
                    Supervision.open(folder / "held_out"),
                    Measurement.read(folder / SOURCE),
                )
        except SemalignError as error:
            console.note(f"{error}: made again")
    geometry, scorer = _read_target(experiment, console, inputs, device)
    return _run_source(experiment, folder, console, inputs, device, geometry, scorer)


def _before(
    experiment: Experiment, folder: Path, console: Console, target: LoadedModel, held_out: Supervision, split: Split
) -> Measurement:
    """The target's figures before the transfer, measured once."""
    if (folder / BEFORE).is_file():
        return Measurement.read(folder / BEFORE)
    before = _measured(experiment, console, "target before", target, held_out, split)
    before.write(folder / BEFORE)
    return before


def _read_target(
    experiment: Experiment, console: Console, inputs: Inputs, device: torch.device
) -> tuple[TargetGeometry, Scorer]:
    target = _load(console, "target", inputs.target, device)
    view = DecoderView(target.model)
    with console.step("read the target's geometry"):
        basis = None
        if experiment.transport.frame != "none":
            basis = SemanticBasis.from_model(target.model, entries=inputs.shared.target_ids)
        rows = _attribution_rows(experiment, inputs.split)
        geometry = TargetGeometry(view.depth, basis, _residuals(view, rows, range(1, view.depth + 1)))
    scorer: Scorer = Similarity(target.model) if experiment.scorer.kind == "similarity" else experiment.scorer
    return geometry, scorer


def _run_source(
    experiment: Experiment,
    folder: Path,
    console: Console,
    inputs: Inputs,
    device: torch.device,
    geometry: TargetGeometry,
    scorer: Scorer,
) -> SourceStores:
    """Everything that needs the source, which is gone from memory afterwards."""
    source = _load(console, "source", inputs.source, device)
    split, shared = inputs.split, inputs.shared
    pairing, transport = _plan(experiment, folder, console, source, split, shared, geometry, scorer)

    def store(place: Path, label: str, rows: Sequence[Example], settings: SupervisionSettings) -> Supervision:
        progress = console.progress(f"supervise {label} rows", batches(rows, experiment.batch_size))
        return supervise(
            source.model, progress, pairing, transport, place, settings=settings, entries=shared.source_ids
        )

    exact = experiment.supervision.model_copy(update={"output": FinalHidden(), "dtype": "float32"})
    train = store(folder / "supervision", "training", split.train, experiment.supervision)
    held_out = store(folder / "held_out", "held-out", split.held_out, exact)
    measured = _measured(experiment, console, "source", source, held_out, split)
    measured.write(folder / SOURCE)  # last: with it, the source is not needed again
    return SourceStores(train, held_out, measured)


def _plan(
    experiment: Experiment,
    folder: Path,
    console: Console,
    source: LoadedModel,
    split: Split,
    shared: SharedVocabulary,
    geometry: TargetGeometry,
    scorer: Scorer,
) -> tuple[LayerPairing, Transport]:
    """Attribute, pair, fit the transport, and report its fidelity; the results are files of the run folder."""
    view = DecoderView(source.model)
    rows = _attribution_rows(experiment, split)
    scores = attribute_layers(view, console.progress("attribute source layers", rows), scorer=scorer)
    scores.write(folder / "attribution.json")
    pairing = pair_layers(scores, geometry.depth, policy=experiment.pairing)
    pairing.write(folder / "pairing.json")
    console.note("pairing (source layer of each target layer): " + " ".join(map(str, pairing.source_layers)))

    frame, fold_gain = experiment.transport.frame, experiment.transport.fold_gain
    with console.step(f"fit the transport ({frame})"):
        if geometry.basis is None:
            transport = within_source = Transport.identity(view.width)
        else:
            basis = SemanticBasis.from_model(source.model, entries=shared.source_ids)
            transport = fit_transport(basis, geometry.basis, frame=frame, fold_gain=fold_gain)
            within_source = fit_transport(basis, basis, frame=frame, fold_gain=fold_gain)
        of_source = _residuals(view, rows, sorted(set(pairing.source_layers)))
        pairs = (
            PairedResiduals(layer, source_layer, geometry.residuals[layer], of_source[source_layer])
            for layer, source_layer in enumerate(pairing.source_layers, 1)
        )
        fidelity = measure_fidelity(pairs, transport=transport, within_source=within_source)
    fidelity.write(folder / "fidelity.json")
    console.note(f"mean CKA of paired contributions after transport: {fidelity.mean_cka_transported:.3f}")
    return pairing, transport


@torch.no_grad()
def _residuals(view: DecoderView, rows: Sequence[Batch], layers: Sequence[int]) -> dict[int, Tensor]:
    """Contributions of layers at the supervised positions of all rows."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with undisturbed(view.model):
        for batch in rows:
            mask = supervised(batch).mask.to(view.device)
            trace = view.trace(batch, keep=layers)
            for layer in layers:
                parts[layer].append(trace.residual(layer)[mask])
    return {layer: torch.cat(held) for layer, held in parts.items()}


def _measured(
    experiment: Experiment, console: Console, label: str, loaded: LoadedModel, held_out: Supervision, split: Split
) -> Measurement:
    with console.step(f"measure {label}"):
        found = measure(DecoderView(loaded.model), held_out, batch_size=experiment.batch_size)
        wanted = split.held_out[: experiment.measure.answer_rows]
        if not wanted:
            return found
        accuracy = answer_accuracy(
            loaded, wanted, max_new_tokens=experiment.measure.max_new_tokens, batch_size=4 * experiment.batch_size
        )
        return found.model_copy(update={"accuracy": accuracy, "answer_rows": len(wanted)})


def _train(
    experiment: Experiment, folder: Path, console: Console, target: LoadedModel, stores: SourceStores
) -> TransferReport:
    with contextlib.ExitStack() as stack:
        trainer = FrontierTrainer(
            target.model,
            stores.train,
            experiment.train,
            scratch=Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-"))),
            held_out=stores.held_out,
            checkpoints=folder / "checkpoints",
        )
        bar = stack.enter_context(console.bar("train", sum(trainer.stage_steps)))
        metrics: TextIO | None = None

        def record(entry: StepRecord | StageRecord) -> None:
            nonlocal metrics
            if isinstance(entry, StageRecord):
                for fact in _incidents(entry):
                    console.note(f"layer {entry.layer}: {fact}")
                return
            if metrics is None:
                bar.skip(cut_metrics(folder, entry))
                metrics = stack.enter_context((folder / METRICS).open("a", encoding="utf-8"))
            metrics.write(entry.model_dump_json() + "\n")
            metrics.flush()
            losses = ", ".join(f"{name} {value:.3f}" for name, value in entry.losses.items())
            bar.advance(f"layer {entry.layer}: {losses}")

        trainer.callback = record
        try:
            report = trainer.fit()
        except DivergedError as error:
            place = _keep_batch(folder, error, target, stores.train)
            raise SemalignError(f"{error}; the batch is in {place}") from error
    report.write(folder / "transfer.json")
    return report


def _incidents(stage: StageRecord) -> Iterator[str]:
    if stage.skipped:
        yield f"{stage.skipped} of {stage.steps} steps skipped, their gradients were not finite"
    if stage.rolled_back and stage.held_out:
        yield f"undone, the held-out loss rose from {stage.held_out[0]:.4g} to {stage.held_out[1]:.4g}"


def _keep_batch(folder: Path, error: DivergedError, target: LoadedModel, store: Supervision) -> Path:
    """Write the step at which training diverged and the rows of its batch, to look at."""
    rows = {index: store.tokens([index])["input_ids"][0].tolist() for index in error.record.examples}
    batch = [{"example": i, "text": target.tokenizer.decode(ids), "input_ids": ids} for i, ids in rows.items()]
    found = {"step": error.record.model_dump(mode="json"), "batch": batch}
    return replace_file(folder / "diverged.json", json.dumps(found, indent=2, ensure_ascii=False))
