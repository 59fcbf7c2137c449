"""Inputs of an experiment, read and checked before any weights are."""

from dataclasses import dataclass, replace

import torch
from semalign_geometry import SharedVocabulary

from ..data.encoding import TextEncoder
from ..data.rows import Split, read_rows, split_rows
from ..experiment import Experiment
from ..generation import Way
from ..models.loading import LoadedModel, load_model
from ..models.opening import OpenedModel, check_pulled, identity, open_model, prepare
from ..util.console import Console
from .checks import Pair, check_pair, check_rows, encoder_of, raise_first

NOTED = ("rows", "date")
"""Checks whose findings a run notes also where they are ok."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of an experiment, read and checked; no weights yet."""

    source: OpenedModel
    """The larger model."""
    target: OpenedModel
    """The smaller model."""
    encoder: TextEncoder
    """Turns texts into ids; by the target's tokenizer and template, for both models."""
    split: Split
    """Rows for training and held-out rows."""
    shared: SharedVocabulary
    """Vocabulary entries of both models."""
    source_id: str
    """Fingerprint of the source."""
    target_id: str
    """Fingerprint of the target."""


def read_inputs(experiment: Experiment, console: Console) -> Inputs:
    """Read and check the rows, the tokenizers and the configurations of both models; note the findings of the checks.

    Raises:
        SemalignError: they cannot be used, or do not fit together.
    """
    with console.step("read rows"):
        for model in (experiment.source, experiment.target):
            check_pulled(model)
        pools = read_rows(experiment.data)
    for role, model in (("target", experiment.target), ("source", experiment.source)):
        prepare(model, progress=console.ticker(f"pre-train the {role}"), note=console.note)
    with console.step("read tokenizers and configurations"):
        target, source = open_model(experiment.target), open_model(experiment.source)
        pair = Pair(experiment, source, target, encoder_of(experiment, target))
        findings = raise_first(check_pair(pair))
        split = split_rows(experiment.data, pools, pair.encoder)
        findings += raise_first(check_rows(replace(pair, split=split)))
    for finding in findings:
        if finding.level == "warning" or finding.check in NOTED:
            console.note(str(finding))
    return Inputs(source, target, pair.encoder, split, pair.shared, identity(source), identity(target))


def load(
    console: Console, label: str, opened: OpenedModel, device: torch.device, *, generates: bool = False
) -> LoadedModel:
    """Load a model's weights, and note how it computes; `generates` as in `load_model`."""
    with console.step(f"load the {label}"):
        loaded = load_model(opened, device=device, generates=generates)
    console.note(f"the {label} computes in {str(loaded.model.dtype).removeprefix('torch.')} on {device}")
    note_unused(console, label, loaded)
    if loaded.way is Way.ALONE:
        console.note(f"the {label} generates {Way.ALONE.value}: its cache allows no batches")
    return loaded


def note_unused(console: Console, label: str, loaded: LoadedModel) -> None:
    """Name the tensors of a checkpoint that its language model does without."""
    if loaded.unused:
        console.note(
            f"{len(loaded.unused)} tensors of the {label}'s checkpoint are no part of its language model and are "
            f"ignored, such as {loaded.unused[0]}"
        )
