"""One experiment from models and rows to a run folder: attribute, pair, transport, supervise, train, measure, save."""

import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from semalign_align import FinalHidden, Supervision, supervise
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
    FidelityReport,
    PairedResiduals,
    SemalignError,
    SemanticBasis,
    SharedVocabulary,
    Transport,
    fit_transport,
    measure_fidelity,
    new_folder,
    sha256_of,
)
from semalign_train import FrontierTrainer, StageRecord, StepRecord, TransferReport
from torch import Tensor
from transformers import AutoModelForCausalLM

from .console import Console
from .data import Split, batches, split_rows
from .experiment import Experiment
from .measure import Measurement, answer_accuracy, measure
from .models import LoadedModel, check_tokenizers, load_model, save_model
from .resources import peak_memory

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
    """Wall time of the whole run, the building or conversion of models included."""
    peak_bytes: int
    """Peak memory of the process; on a CUDA device, that device's peak."""


def run_experiment(experiment: Experiment, folder: Path, *, console: Console | None = None) -> RunResult:
    """Run an experiment into a new folder.

    Inputs are checked before the folder is made; each file in it is whole or absent.

    Args:
        experiment: what to run.
        folder: the run folder; must not hold anything yet.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: the input cannot be used, or the saved target does not compute what the trained one did.
        OSError: the disk is full or not writable.
    """
    console = console or Console(quiet=True)
    device = pick_device(experiment.device)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SemalignError(f"{folder} is not empty: choose another folder with --out")

    with console.step("load models and rows"):
        target = load_model(experiment.target, device=device)
        split = split_rows(experiment.data, target.tokenizer)
        source = load_model(experiment.source, device=device)
        texts = [str(target.tokenizer.decode(list(e.prompt_ids + e.answer_ids))) for e in split.train[:8]]
        shared = check_tokenizers(source, target, texts)
        _check_ids(split, shared)
    _note_rows(console, split, experiment)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        experiment.write(folder / "experiment.json")
        _environment(experiment, device).write(folder / "environment.json")
        pairing, transport = _plan(experiment, folder, console, source, target, split, shared)
        train_store = _supervise(experiment, folder / "supervision", console, source, split, pairing, transport, shared)
        FrontierTrainer(target.model, train_store, experiment.train)  # settings that do not fit fail here
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
        exact = experiment.model_copy(
            update={
                "supervision": experiment.supervision.model_copy(update={"output": FinalHidden(), "dtype": "float32"})
            }
        )
        held_out = _supervise(
            exact, Path(scratch) / "held_out", console, source, split, pairing, transport, shared, held_out=True
        )
        of_source = _measured(experiment, console, "source", source, held_out, split)
        del source  # its memory is free before training starts
        before = _measured(experiment, console, "target before", target, held_out, split)
        transfer = _train(experiment, folder, console, target, train_store, Path(scratch))
        with console.step("save the target, reload it, compare logits"):
            reloaded = save_and_reload(target, folder / "model")
        after = _measured(experiment, console, "target after", reloaded, held_out, split)

    result = RunResult(
        name=experiment.name,
        source=of_source,
        before=before,
        after=after,
        transfer=transfer,
        supervision_bytes=sum(file.stat().st_size for file in (folder / "supervision").iterdir()),
        train_rows=len(split.train),
        seconds=console.seconds,
        peak_bytes=peak_memory(device),
    )
    result.write(folder / "result.json")
    return result


def pick_device(name: str) -> torch.device:
    """The device that `auto` or a name stands for.

    Raises:
        SemalignError: this machine has no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SemalignError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def save_and_reload(trained: LoadedModel, folder: Path) -> LoadedModel:
    """Save a model with its tokenizer, load it again, and compare the logits of both.

    Raises:
        SemalignError: the logits differ; nothing is left at `folder`.
        OSError: the disk is full.
    """
    ids = torch.arange(min(32, len(trained.tokenizer)), device=trained.model.device)[None]
    with new_folder(folder) as temporary:
        save_model(trained.model, temporary)
        trained.tokenizer.save_pretrained(temporary)
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


def _check_ids(split: Split, shared: SharedVocabulary) -> None:
    known = set(shared.target_ids.tolist())
    for example in (*split.train, *split.held_out):
        unknown = set(example.prompt_ids + example.answer_ids) - known
        if unknown:
            raise SemalignError(
                f"the rows use token id {min(unknown)}, which only the target knows: choose models that share a "
                "tokenizer"
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


def _environment(experiment: Experiment, device: torch.device) -> Environment:
    places = [experiment.data.train.path] + ([experiment.data.held_out.path] if experiment.data.held_out else [])
    return Environment(
        packages={name: version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(device),
        threads=torch.get_num_threads(),
        data_sha256={place: sha256_of(place) for place in places if Path(place).is_file()},
    )


def _plan(
    experiment: Experiment,
    folder: Path,
    console: Console,
    source: LoadedModel,
    target: LoadedModel,
    split: Split,
    shared: SharedVocabulary,
) -> tuple[LayerPairing, Transport]:
    """Attribute, pair, fit the transport, and report its fidelity; the results are files of the run folder."""
    source_view, target_view = DecoderView(source.model), DecoderView(target.model)
    rows = batches(split.train[: experiment.data.attribution_rows], experiment.batch_size)
    scorer: Scorer = Similarity(target.model) if experiment.scorer.kind == "similarity" else experiment.scorer
    scores = attribute_layers(source_view, console.progress("attribute source layers", rows), scorer=scorer)
    scores.write(folder / "attribution.json")
    pairing = pair_layers(scores, target_view.depth, policy=experiment.pairing)
    pairing.write(folder / "pairing.json")
    console.note("pairing (source layer of each target layer): " + " ".join(map(str, pairing.source_layers)))

    frame, fold_gain = experiment.transport.frame, experiment.transport.fold_gain
    with console.step(f"fit the transport ({frame})"):
        if frame == "none":
            transport = within_source = Transport.identity(source_view.width)
        else:
            source_basis = SemanticBasis.from_model(source.model, entries=shared.source_ids)
            target_basis = SemanticBasis.from_model(target.model, entries=shared.target_ids)
            transport = fit_transport(source_basis, target_basis, frame=frame, fold_gain=fold_gain)
            within_source = fit_transport(source_basis, source_basis, frame=frame, fold_gain=fold_gain)
        fidelity = _fidelity(source_view, target_view, rows, pairing, transport, within_source)
    fidelity.write(folder / "fidelity.json")
    console.note(f"mean CKA of paired contributions after transport: {fidelity.mean_cka_transported:.3f}")
    return pairing, transport


@torch.no_grad()
def _fidelity(
    source: DecoderView,
    target: DecoderView,
    rows: Sequence[Batch],
    pairing: LayerPairing,
    transport: Transport,
    within_source: Transport,
) -> FidelityReport:
    def residuals(view: DecoderView, layers: Sequence[int]) -> dict[int, Tensor]:
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        with undisturbed(view.model):
            for batch in rows:
                mask = supervised(batch).mask.to(view.device)
                trace = view.trace(batch, keep=layers)
                for layer in layers:
                    parts[layer].append(trace.residual(layer)[mask].cpu())
        return {layer: torch.cat(held) for layer, held in parts.items()}

    of_source = residuals(source, sorted(set(pairing.source_layers)))
    of_target = residuals(target, range(1, target.depth + 1))
    pairs = (
        PairedResiduals(target_layer, source_layer, of_target[target_layer], of_source[source_layer])
        for target_layer, source_layer in enumerate(pairing.source_layers, 1)
    )
    return measure_fidelity(pairs, transport=transport, within_source=within_source)


def _supervise(
    experiment: Experiment,
    folder: Path,
    console: Console,
    source: LoadedModel,
    split: Split,
    pairing: LayerPairing,
    transport: Transport,
    shared: SharedVocabulary,
    *,
    held_out: bool = False,
) -> Supervision:
    rows = batches(split.held_out if held_out else split.train, experiment.batch_size)
    label = f"supervise {'held-out' if held_out else 'training'} rows"
    return supervise(
        source.model,
        console.progress(label, rows),
        pairing,
        transport,
        folder,
        settings=experiment.supervision,
        entries=shared.source_ids,
    )


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
    experiment: Experiment,
    folder: Path,
    console: Console,
    target: LoadedModel,
    store: Supervision,
    scratch: Path,
) -> TransferReport:
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        trainer = FrontierTrainer(target.model, store, experiment.train, scratch=scratch)
        with console.bar("train", sum(trainer.stage_steps)) as bar:

            def record(entry: StepRecord | StageRecord) -> None:
                if isinstance(entry, StepRecord):
                    metrics.write(entry.model_dump_json() + "\n")
                    metrics.flush()
                    losses = ", ".join(f"{name} {value:.3f}" for name, value in entry.losses.items())
                    bar.advance(f"layer {entry.layer}: {losses}")

            trainer.callback = record
            report = trainer.fit()
    report.write(folder / "transfer.json")
    return report
