"""Check the weights of a pair: similarity of the layers, and the part of it that each frame keeps."""

import gc
from collections.abc import Sequence

import torch
from semalign_attribution import DecoderView, LayerPairing, LayerScores, Manual, Random, Uniform, pair_layers
from semalign_geometry import FRAMES, FidelityReport, PairedResiduals, SemanticBasis
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..data.encoding import Example, Role
from ..data.rows import Split, batches
from ..experiment import Experiment
from ..generation import Way, check_generation
from ..models.loading import LoadedModel
from ..results.similarity import Matrix
from ..run.checks import Finding, Pair, error, ok, warning
from ..run.fidelity import fit_and_measure
from ..run.inputs import load
from ..run.similarity import Contributions, similarity_matrix
from ..run.source_phase import contributions
from ..run.written_answers import written_parts
from ..util.console import Console
from ..util.failures import naming
from ._diagnosis import Diagnosis

ROWS = 8
"""Rows that the layers are compared on."""
LOST = 0.1
"""Loss of mean CKA from which on another frame is advised."""


def check_layers(diagnosis: Diagnosis, pair: Pair, split: Split, device: torch.device, console: Console) -> Diagnosis:
    """Load one model after the other, compare their layers on the first rows, and add the outcome to a diagnosis."""
    examples = split.train[:ROWS]
    sides: dict[str, tuple[Contributions, SemanticBasis]] = {}
    found = [ok("weights", "both models load, are finite and causal, and their logits are understood")]
    for role, opened in reversed(pair.both):
        ids = pair.shared.source_ids if role == "source" else pair.shared.target_ids
        try:
            loaded = load(console, role, opened, device)
            with naming(f"the rows cannot go through {opened.settings.path}"):
                sides[role] = _side(role, loaded, ids, examples, console)
        except SemalignError as failure:
            broken = error(f"{role} weights", str(failure), f"another {role}, or its checkpoint fetched again")
            return diagnosis.model_copy(update={"findings": (*diagnosis.findings, broken)})
        if loaded.unchecked is not None:
            remedy = f"device=cuda, or another {role} where rows are longer than that"
            found.append(warning(f"{role} window", loaded.unchecked, remedy))
        found.append(_generation(role, loaded, pair.experiment))
        del loaded
        gc.collect()
    (of_target, target_basis), (of_source, source_basis) = sides["target"], sides["source"]
    with console.step("compare the layers"):
        similarity = similarity_matrix(of_target, of_source)
    pairing = _pairing(pair.experiment, similarity)
    pairs = [
        PairedResiduals(layer, source_layer, of_target[layer], of_source[source_layer])
        for layer, source_layer in enumerate(pairing.source_layers, 1)
    ]
    own, fold_gain = pair.experiment.transport.frame, pair.experiment.transport.fold_gain
    reports = tuple(
        fit_and_measure(pairs, source_basis, target_basis, frame, fold_gain=fold_gain, console=console)[1]
        for frame in dict.fromkeys((*FRAMES, *([] if own == "none" else [own])))
    )
    findings = (*diagnosis.findings, *found, _verdict(pair.experiment, reports, len(examples)))
    weighed = {"findings": findings, "fidelity": reports, "similarity": similarity, "pairing": pairing}
    return diagnosis.model_copy(update=weighed)


def _side(
    role: Role, loaded: LoadedModel, ids: Tensor, examples: Sequence[Example], console: Console
) -> tuple[Contributions, SemanticBasis]:
    """Return a model's contributions where spans of the answers start and its basis."""
    with console.step(f"read the {role}'s layers and head"):
        view = DecoderView(loaded.model)
        found = contributions(view, batches(examples, 1), range(1, view.depth + 1), role=role)
        basis = SemanticBasis.from_model(loaded.model, entries=ids)
    return found, basis


def _generation(role: str, loaded: LoadedModel, experiment: Experiment) -> Finding:
    """Check that a model generates right, which only some experiments need."""
    check = f"{role} generation"
    try:
        way = check_generation(loaded.model)
    except SemalignError as failure:
        needed = experiment.measure.answer_rows > 0 or role in written_parts(experiment.data)
        reason, _, remedy = str(failure).partition(": set ")
        return (error if needed else warning)(check, reason, remedy)
    if way is Way.ALONE:
        remedy = "fewer measure.answer_rows, or another model"
        return warning(check, f"its cache allows no batches: it generates {way.value}, which takes longer", remedy)
    return ok(check, f"its tokens with a cache are those without, {way.value}")


def _pairing(experiment: Experiment, similarity: Matrix) -> LayerPairing:
    """Pair by the policy of the experiment where it needs no scores, else by similarity."""
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
