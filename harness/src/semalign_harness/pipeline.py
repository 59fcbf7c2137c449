"""One experiment from models and rows to a run folder: attribute, pair, transport, supervise, train, measure, save."""

import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
    sha256_of,
)
from semalign_train import FrontierTrainer, StageRecord, StepRecord, TransferReport
from torch import Tensor
from transformers import AutoModelForCausalLM

from .console import Console
from .data import Example, Split, batches, read_rows, split_rows
from .experiment import Experiment
from .measure import Measurement, answer_accuracy, measure
from .models import LoadedModel, OpenedModel, check_tokenizers, load_model, open_model
from .resources import peak_memory, pick_device
from .saving import save_model

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

    with console.step("read rows, tokenizers and configurations"):
        pools = read_rows(experiment.data)
        opened_target = open_model(experiment.target, progress=console.ticker("pre-train the target"))
        opened_source = open_model(experiment.source, progress=console.ticker("pre-train the source"))
        split = split_rows(experiment.data, pools, opened_target.tokenizer)
        texts = [str(opened_target.tokenizer.decode(list(e.prompt_ids + e.answer_ids))) for e in split.train[:8]]
        shared = check_tokenizers(opened_source, opened_target, texts)
        _check_rows(split, shared, experiment, opened_source, opened_target)
        experiment.train.stages(opened_target.config.num_hidden_layers)
    _note_rows(console, split, experiment)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        experiment.write(folder / "experiment.json")
        _environment(experiment, device).write(folder / "environment.json")
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".scratch-"))
        geometry, scorer = _read_target(experiment, console, opened_target, device, split, shared)
        stores = _run_source(
            experiment, folder, scratch, console, opened_source, device, split, shared, geometry, scorer
        )
        del geometry, scorer
        target = _load(console, "target", opened_target, device)
        FrontierTrainer(target.model, stores.train, experiment.train)  # a target that does not fit fails here
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        before = _measured(experiment, console, "target before", target, stores.held_out, split)
        transfer = _train(experiment, folder, console, target, stores.train, scratch)
        with console.step("save the target, reload it, compare logits"):
            reloaded = save_and_reload(target, folder / "model")
        after = _measured(experiment, console, "target after", reloaded, stores.held_out, split)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    result = RunResult(
        name=experiment.name,
        source=stores.source,
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


def _read_target(
    experiment: Experiment,
    console: Console,
    opened: OpenedModel,
    device: torch.device,
    split: Split,
    shared: SharedVocabulary,
) -> tuple[TargetGeometry, Scorer]:
    target = _load(console, "target", opened, device)
    view = DecoderView(target.model)
    with console.step("read the target's geometry"):
        basis = None
        if experiment.transport.frame != "none":
            basis = SemanticBasis.from_model(target.model, entries=shared.target_ids)
        rows = _attribution_rows(experiment, split)
        geometry = TargetGeometry(view.depth, basis, _residuals(view, rows, range(1, view.depth + 1)))
    scorer: Scorer = Similarity(target.model) if experiment.scorer.kind == "similarity" else experiment.scorer
    return geometry, scorer


def _run_source(
    experiment: Experiment,
    folder: Path,
    scratch: Path,
    console: Console,
    opened: OpenedModel,
    device: torch.device,
    split: Split,
    shared: SharedVocabulary,
    geometry: TargetGeometry,
    scorer: Scorer,
) -> SourceStores:
    """Everything that needs the source, which is gone from memory afterwards."""
    source = _load(console, "source", opened, device)
    pairing, transport = _plan(experiment, folder, console, source, split, shared, geometry, scorer)

    def store(place: Path, label: str, rows: Sequence[Example], settings: SupervisionSettings) -> Supervision:
        progress = console.progress(f"supervise {label} rows", batches(rows, experiment.batch_size))
        return supervise(
            source.model, progress, pairing, transport, place, settings=settings, entries=shared.source_ids
        )

    exact = experiment.supervision.model_copy(update={"output": FinalHidden(), "dtype": "float32"})
    train = store(folder / "supervision", "training", split.train, experiment.supervision)
    held_out = store(scratch / "held_out", "held-out", split.held_out, exact)
    return SourceStores(train, held_out, _measured(experiment, console, "source", source, held_out, split))


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
