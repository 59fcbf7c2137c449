"""What only the weights tell: how alike the layers are, and what each frame keeps of it."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

from semalign_attribution import (
    DecoderView,
    LayerPairing,
    LayerScores,
    Manual,
    Random,
    Uniform,
    pair_layers,
)
from semalign_geometry import (
    FRAMES,
    FidelityReport,
    PairedResiduals,
    SemalignError,
    SemanticBasis,
    SharedVocabulary,
)
from torch import Tensor

from ..data.encoding import Example
from ..data.rows import batches
from ..experiment import Experiment
from ..generation import Way, check_generation
from ..models.loading import LoadedModel
from ..run.fidelity import fit_and_measure
from ..run.inputs import load
from ..run.similarity import Contributions, similarity_matrix
from ..run.source_phase import contributions
from ..run.written_answers import written_parts
from ..util.console import Console
from ..util.failures import naming
from ._findings import Finding, error, ok, warning
from ._pair import Candidate, Pair

ROWS = 8
"""Rows that the layers are compared on."""
LOST = 0.1
"""Loss of mean CKA from which on another frame is advised."""


@dataclass(frozen=True, eq=False)
class Depths:
    """What the weights told."""

    findings: list[Finding]
    fidelity: tuple[FidelityReport, ...] = ()
    similarity: tuple[tuple[float, ...], ...] = ()
    pairing: LayerPairing | None = None


def check_layers(pair: Pair, shared: SharedVocabulary, console: Console) -> Depths:
    """Load one model after the other, and compare their layers on the first rows that are short enough."""
    assert pair.sample is not None
    examples = [e for e in pair.sample.examples if len(e) <= pair.experiment.data.max_length][:ROWS]
    if not examples:
        return Depths([])  # the rows are an error of their own
    sides: list[tuple[Contributions, SemanticBasis]] = []
    texts: list[Finding] = []
    for candidate, ids in ((pair.target, shared.target_ids), (pair.source, shared.source_ids)):
        try:
            loaded = load(console, candidate.role, candidate.opened, pair.device)
            with naming(f"the rows cannot go through {candidate.path}"):
                sides.append(_side(candidate, loaded, ids, examples, console))
        except SemalignError as failure:
            remedy = f"another {candidate.role}, or its checkpoint fetched again"
            return Depths([error(f"{candidate.role} weights", str(failure), remedy)])
        texts.append(_generation(candidate, loaded, pair.experiment))
        del loaded
        gc.collect()
    (of_target, target_basis), (of_source, source_basis) = sides
    with console.step("compare the layers"):
        rows = similarity_matrix(of_target, of_source)
    pairing = _pairing(pair.experiment, rows)
    pairs = [
        PairedResiduals(layer, source_layer, of_target[layer], of_source[source_layer])
        for layer, source_layer in enumerate(pairing.source_layers, 1)
    ]
    own, fold_gain = pair.experiment.transport.frame, pair.experiment.transport.fold_gain
    reports = [
        fit_and_measure(pairs, source_basis, target_basis, frame, fold_gain=fold_gain, console=console)[1]
        for frame in dict.fromkeys((*FRAMES, *([] if own == "none" else [own])))
    ]
    weights = ok("weights", "both models load, are finite and causal, and their logits are understood")
    verdict = _verdict(pair.experiment, reports, len(examples))
    return Depths([weights, *texts, verdict], tuple(reports), rows, pairing)


def _side(
    candidate: Candidate, loaded: LoadedModel, ids: Tensor, examples: Sequence[Example], console: Console
) -> tuple[Contributions, SemanticBasis]:
    """A model's contributions at the supervised positions and its basis."""
    with console.step(f"read the {candidate.role}'s layers and head"):
        view = DecoderView(loaded.model)
        found = contributions(view, batches(examples, 1), range(1, view.depth + 1))
        basis = SemanticBasis.from_model(loaded.model, entries=ids)
    return found, basis


def _generation(candidate: Candidate, loaded: LoadedModel, experiment: Experiment) -> Finding:
    """Whether a model generates right, which only some experiments need."""
    check = f"{candidate.role} generation"
    try:
        way = check_generation(loaded.model)
    except SemalignError as failure:
        needed = experiment.measure.answer_rows > 0 or candidate.role in written_parts(experiment.data)
        reason, _, remedy = str(failure).partition(": set ")
        return (error if needed else warning)(check, reason, remedy)
    if way is Way.ALONE:
        remedy = "fewer measure.answer_rows, or another model"
        return warning(check, f"its cache allows no batches: it generates {way.value}, which takes longer", remedy)
    return ok(check, f"its tokens with a cache are those without, {way.value}")


def _pairing(experiment: Experiment, similarity: tuple[tuple[float, ...], ...]) -> LayerPairing:
    """By the experiment's policy where it needs no scores, else by similarity: attribution takes a backward run."""
    own = experiment.pairing
    columns = [sum(column) / len(similarity) for column in zip(*similarity, strict=True)]
    nothing = (0.0,) * len(columns)
    scores = LayerScores(
        scorer="similarity",
        examples=ROWS,
        mean=tuple(columns),
        standard_error=nothing,
        stability=1.0,
        top_frequency=nothing,
        similarity=similarity,
    )
    policy = own if isinstance(own, Manual | Random | Uniform) else "similarity"
    return pair_layers(scores, len(similarity), policy=policy)


def _verdict(experiment: Experiment, reports: Sequence[FidelityReport], rows: int) -> Finding:
    direct = sum(layer.cka_direct for layer in reports[0].layers) / len(reports[0].layers)
    means = {report.frame: report.mean_cka_transported for report in reports}
    shown = f"mean CKA of paired layers {direct:.2f} without transport, " + ", ".join(
        f"{mean:.2f} by {frame}" for frame, mean in means.items()
    )
    message = f"{shown}, on {reports[0].tokens} tokens of {rows} rows"
    kept = means.get(experiment.transport.frame, direct)
    best = max(means, key=lambda frame: means[frame])
    if means[best] - kept > LOST:
        return warning("fidelity", message, f"transport.frame={best}")
    if direct - kept > LOST:
        return warning("fidelity", message, "transport.frame=none, which matches geometry in the source's own space")
    return ok("fidelity", message)
