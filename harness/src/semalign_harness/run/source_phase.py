"""The source's part of a run: attribute, pair, fit the transport, supervise; made once for all runs that share it."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from semalign_align import (
    AnyBatch,
    FinalHidden,
    LiveSupervision,
    Supervision,
    SupervisionSettings,
    SupervisionSource,
    store_bytes,
    supervise,
)
from semalign_attribution import (
    Batch,
    DecoderView,
    LayerPairing,
    Scorer,
    Similarity,
    attribute_layers,
    pair_layers,
    undisturbed,
)
from semalign_geometry import FRAMES, PairedResiduals, SemanticBasis, Transport, measure_fidelity
from semalign_geometry.base import MANIFEST, SemalignError, replace_file
from torch import Tensor

from ..data.encoding import Example, Role
from ..data.rows import batches
from ..data.sides import side_of, span_count, span_starts
from ..experiment import SimilarityScorer
from ..models.loading import LoadedModel
from ..results.fidelity import RunFidelity
from ..results.source_phase import PHASE, SourcePhase
from ..util.cache import bytes_in
from ..util.console import Console
from ..util.failures import naming
from ..util.text import gb
from .fidelity import fit_and_measure
from .job import Job
from .measure import measured
from .phase_store import in_use, phase_folder

RECORDS = ("attribution.json", "pairing.json", "fidelity.json")
"""Small results of the source's part, which a run folder keeps a copy of."""
TRAIN, HELD_OUT = "supervision", "held_out"
"""Names of the stores."""
Wanted = dict[str, tuple[Sequence[Example], SupervisionSettings]]
"""Rows and settings of each store."""


@dataclass(frozen=True, eq=False)
class TargetGeometry:
    """Layers of the target, for the source's part, which does without the target's weights."""

    depth: int
    basis: SemanticBasis | None
    """None when nothing is transported."""
    residuals: dict[int, Tensor]
    """Contributions of each layer at the span starts of the attribution rows."""


@dataclass(frozen=True, eq=False)
class SourceStores:
    """The source's supervision."""

    phase: SourcePhase
    train: SupervisionSource
    held_out: Supervision


@contextlib.contextmanager
def source_stores(job: Job, key: str) -> Iterator[SourceStores]:
    """Open the source's supervision: from the cache where it is whole, else made now by all processes of the job; the
    run folder gets the records.

    Meanwhile `prune` leaves it alone. With `live`, the source stays in memory.

    Args:
        job: the run.
        key: cache key of the supervision.

    Raises:
        SemalignError: the input cannot be used, or the disk is too small for it. OSError: the disk is full.
    """
    ranks, live = job.ranks, job.experiment.live
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as locked:
            place = ranks.broadcast_from_first(lambda: locked.enter_context(phase_folder(key, job.console)))
            source = None
            if not ranks.broadcast_from_first(lambda: _is_whole(place, job.console, live=live)):
                try:
                    source = _make(job, place, key)
                except SemalignError:
                    if ranks.is_first and not any(place.glob(f"{HELD_OUT}*")):  # supervision is hours of work
                        shutil.rmtree(place, ignore_errors=True)
                    raise
            if ranks.is_first:
                stack.enter_context(in_use(place))
                for name in RECORDS:
                    replace_file(job.folder / name, (place / name).read_text(encoding="utf-8"))
        phase = SourcePhase.read(place / PHASE).model_copy(update={"folder": str(place)})
        if ranks.is_first:
            phase.write(job.folder / "supervision.json")
        train: SupervisionSource
        if live:
            train = _live(job, place, source or job.load("source"), phase.key)
        else:
            del source
            train = Supervision.open(place / TRAIN)
        yield SourceStores(phase, train, Supervision.open(place / HELD_OUT))


def _is_whole(place: Path, console: Console, *, live: bool) -> bool:
    if not (place / PHASE).is_file():
        return False
    try:
        with console.step(f"check the supervision kept in {place}"):
            SourcePhase.read(place / PHASE)
            for name in RECORDS:
                json.loads((place / name).read_text(encoding="utf-8"))
            for name in (HELD_OUT,) if live else (TRAIN, HELD_OUT):
                Supervision.open(place / name)
    except (SemalignError, OSError, ValueError) as error:
        console.note(f"{error}: made again")
        (place / PHASE).unlink()
        for name in (TRAIN, HELD_OUT):
            if not (place / name / MANIFEST).is_file():  # a folder that nobody else's files are in
                shutil.rmtree(place / name, ignore_errors=True)
        return False
    return True


def _make(job: Job, place: Path, key: str) -> LoadedModel:
    """Fill a place of the cache; return the source."""
    experiment, ranks, split, began = job.experiment, job.ranks, job.inputs.split, job.console.seconds
    loaded: list[LoadedModel] = []

    def plan() -> tuple[LayerPairing, Transport]:
        with naming(f"the rows cannot go through the target {experiment.target.path}"):
            geometry, scorer = _read_target(job)
        place.mkdir(parents=True, exist_ok=True)
        loaded.append(job.load("source", generates=job.generates))
        with naming(f"the layers of {experiment.source.path} cannot be paired with the target's"):
            return _plan(job, place, loaded[0], geometry, scorer)

    pairing, transport = ranks.broadcast_from_first(plan)
    source = loaded[0] if loaded else job.load("source", generates=job.generates)
    exact = experiment.supervision.model_copy(update={"output": FinalHidden(), "dtype": "float32"})
    wanted: Wanted = {HELD_OUT: (split.held_out, exact)}
    if not experiment.live:
        wanted[TRAIN] = (split.train, experiment.supervision)
    ranks.broadcast_from_first(lambda: _check_disk(job, place, source, wanted, pairing, transport))
    stores = {}
    for name, (rows, settings) in wanted.items():
        progress = job.console.progress(f"supervise {len(rows)} rows", batches(rows, experiment.batch_size))
        with naming(f"the source {experiment.source.path} cannot supervise the rows"):
            stores[name] = supervise(
                source.model,
                progress,
                pairing,
                transport,
                place / name,
                settings=settings,
                **_vocabulary(job),
                resume_key=key,
            )
    seconds = job.console.seconds - began
    phase = SourcePhase(
        key=key,
        folder=str(place),
        source=experiment.source.path,
        target=experiment.target.path,
        train_rows=len(split.train),
        held_out_rows=len(split.held_out),
        supervised_tokens=sum(len(row.answer_ids) for row in split.train),
        residual_error=stores[TRAIN].manifest.residual_error if TRAIN in stores else 0.0,
        measurement=measured(job, "source", source, stores[HELD_OUT], is_source=True).metrics,
        seconds=seconds,
    )
    if ranks.is_first:
        phase.write(place / PHASE)  # last: with it, the source is not needed again
    ranks.barrier()
    return source


def _live(job: Job, place: Path, source: LoadedModel, key: str) -> LiveSupervision:
    job.console.note("the source stays in memory and supervises every batch")
    return LiveSupervision(
        source.model,
        batches(job.inputs.split.train, job.experiment.batch_size),
        LayerPairing.read(place / "pairing.json"),
        Transport.load(place / "transport"),
        settings=job.experiment.supervision,
        **_vocabulary(job),
        key=key,
    )


def _vocabulary(job: Job) -> dict[str, Any]:
    """Return what the source's output is over: entries of both models, or classes of their entries."""
    inputs = job.inputs
    return {"entries": inputs.shared.source_ids} if inputs.classes is None else {"classes": inputs.classes}


def _check_disk(
    job: Job, place: Path, source: LoadedModel, wanted: Wanted, pairing: LayerPairing, transport: Transport
) -> None:
    """Refuse a disk that is too small for the supervision.

    Raises:
        SemalignError: it is.
    """
    head, inputs = DecoderView(source.model).head.weight, job.inputs
    entries = len(inputs.shared.source_ids)
    rows_of_head = entries if inputs.classes is None else len(head)
    needed = sum(
        store_bytes(
            settings,
            examples=len(rows),
            tokens=sum(len(row) for row in rows),
            supervised_tokens=sum(len(row.answer_ids) for row in rows),
            layers=len(pairing.paired_layers),
            width=len(transport.matrix),
            source_width=head.shape[1],
            head_bytes=rows_of_head * head.shape[1] * head.element_size(),
            entries=entries if inputs.classes is None else inputs.classes.count,
            source_tokens=sum(len(row.on("source")) for row in rows),
            spans=None if inputs.classes is None else sum(map(span_count, rows)),
            classes=inputs.classes,
        )
        for rows, settings in wanted.values()
    )
    free = shutil.disk_usage(place).free + bytes_in(place)  # files of an interrupted call are part of it
    job.console.note(f"supervision takes {gb(needed)} on disk, {gb(free)} are free")
    if needed > free:
        raise SemalignError(
            f"supervision takes {gb(needed)}, {place} has {gb(free)} free: set SEMALIGN_CACHE to another disk, delete "
            "old supervision with `semalign store prune`, set supervision.dtype=int8 or a smaller "
            "supervision.output.k, or live=true, which keeps none"
        )


def _attribution_rows(job: Job) -> list[AnyBatch]:
    """Return one row at a time: the backward pass keeps every layer's activations."""
    return batches(job.inputs.split.train[: job.experiment.data.attribution_rows], 1)


def _read_target(job: Job) -> tuple[TargetGeometry, Scorer]:
    # A target that cannot generate must fail before the source's work.
    target = job.load("target", generates=job.generates)
    view, basis = DecoderView(target.model), None
    if job.experiment.transport.frame != "none":
        with job.console.step("the target's semantic basis"):
            basis = SemanticBasis.from_model(target.model, entries=job.inputs.shared.target_ids)
    rows = job.console.progress("read the target's layers", _attribution_rows(job))
    geometry = TargetGeometry(view.depth, basis, contributions(view, rows, range(1, view.depth + 1)))
    chosen = job.experiment.scorer
    return geometry, Similarity(target.model) if isinstance(chosen, SimilarityScorer) else chosen


def _plan(
    job: Job, folder: Path, source: LoadedModel, geometry: TargetGeometry, scorer: Scorer
) -> tuple[LayerPairing, Transport]:
    """Attribute, pair, fit the transport, and report its fidelity; the results are files of the folder."""
    view, rows, console = DecoderView(source.model), _attribution_rows(job), job.console
    own = [side_of(batch, "source") for batch in rows]
    scores = attribute_layers(view, console.progress("attribute source layers", own), scorer=scorer)
    scores.write(folder / "attribution.json")
    pairing = pair_layers(scores, geometry.depth, policy=job.experiment.pairing)
    pairing.write(folder / "pairing.json")
    console.note("pairing (source layer of each target layer): " + " ".join(map(str, pairing.source_layers)))

    read = console.progress("read the source's layers", rows)
    of_source = contributions(view, read, sorted(set(pairing.source_layers)), role="source")
    pairs = [
        PairedResiduals(layer, source_layer, geometry.residuals[layer], of_source[source_layer])
        for layer, source_layer in enumerate(pairing.source_layers, 1)
    ]
    transport, fidelity = _transport(job, source, geometry, pairs)
    fidelity.write(folder / "fidelity.json")
    # On the CPU: other processes have other devices.
    transport = Transport(transport.matrix.cpu(), transport.manifest).save(folder / "transport")
    console.note(f"mean CKA of paired contributions after transport: {fidelity.mean_cka_transported:.3f}")
    return pairing, transport


def _transport(
    job: Job, source: LoadedModel, geometry: TargetGeometry, pairs: Sequence[PairedResiduals]
) -> tuple[Transport, RunFidelity]:
    """Fit the transport by the experiment's frame, and measure its fidelity beside that of other frames."""
    wanted, console = job.experiment.transport, job.console
    if geometry.basis is None:
        with console.step("fidelity without a transport"):
            identity = Transport.identity(DecoderView(source.model).width)
            report = measure_fidelity(pairs, transport=identity, within_source=identity)
        return identity, RunFidelity(**dict(report))
    with console.step("the source's semantic basis"):
        basis = SemanticBasis.from_model(source.model, entries=job.inputs.shared.source_ids)
    fitted = {
        frame: fit_and_measure(pairs, basis, geometry.basis, frame, fold_gain=wanted.fold_gain, console=console)
        for frame in dict.fromkeys((wanted.frame, *FRAMES))
    }
    transport, report = fitted.pop(wanted.frame)
    return transport, RunFidelity(**dict(report), others=tuple(other for _, other in fitted.values()))


def contributions(
    view: DecoderView, rows: Iterable[AnyBatch], layers: Sequence[int], *, role: Role = "target"
) -> dict[int, Float[Tensor, "s d"]]:
    """Return residual contributions of layers at the span starts of all rows, each layer's with the rows' spans end to
    end; with one tokenizer every answer token is a span.

    Args:
        view: the model.
        rows: batches of one tokenizer, or of two.
        layers: of the model, counted from 1.
        role: the side of the rows that the model reads.
    """
    return contributions_at(view, ((side_of(batch, role), span_starts(batch, role)) for batch in rows), layers)


@torch.no_grad()
def contributions_at(
    view: DecoderView, rows: Iterable[tuple[Batch, Bool[Tensor, "b n"]]], layers: Sequence[int]
) -> dict[int, Float[Tensor, "p d"]]:
    """Return residual contributions of layers at positions of batches, end to end."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with undisturbed(view.model):
        for batch, positions in rows:
            trace = view.trace(batch, keep=layers, positions=positions)
            for layer in layers:
                parts[layer].append(trace.residual(layer))
    return {layer: torch.cat(held) for layer, held in parts.items()}
