"""Inputs of an experiment, read and checked before any weights are."""

import datetime
from dataclasses import dataclass

import torch
from semalign_geometry import SharedVocabulary, VocabularyClasses

from ..data.encoding import TextEncoder
from ..data.paired import PairedEncoder
from ..data.rows import Split, read_rows
from ..experiment import Experiment
from ..generation import Way
from ..models.loading import LoadedModel, load_model
from ..models.opening import OpenedModel, check_pulled, identity, open_model, prepare
from ..util.console import Console
from .checks import Pair, check_pair, check_rows, raise_first

NOTED = ("rows", "date", "spans")
"""Checks whose findings a run notes also where they are ok."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of an experiment, read and checked; no weights yet."""

    source: OpenedModel
    """The larger model."""
    target: OpenedModel
    """The smaller model."""
    encoder: TextEncoder
    """Turns texts into ids, by the target's tokenizer and template."""
    paired: PairedEncoder | None
    """Turns rows into the ids of both models; None where the target's serve both."""
    split: Split
    """Rows for training and held-out rows."""
    shared: SharedVocabulary
    """Vocabulary entries of both models, by their bytes where the tokenizers differ."""
    classes: VocabularyClasses | None
    """Prefix classes of both vocabularies; None where one tokenizer serves both models."""
    source_id: str
    """Fingerprint of the source."""
    target_id: str
    """Fingerprint of the target."""

    @property
    def told_date(self) -> datetime.date | None:
        """Today's date in a chat template; None where none that is used reads the clock."""
        source = None if self.paired is None else self.paired.source.told_date
        return self.encoder.told_date or source


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
        pair, failure = Pair.of(experiment, source, target).reading(pools)
        findings = raise_first(check_pair(pair))
        if failure is not None:
            raise failure
        findings += raise_first(check_rows(pair))
        assert pair.split is not None
    for finding in findings:
        if finding.level == "warning" or finding.check in NOTED or (pair.apart and finding.check == "tokenizers"):
            console.note(str(finding))
    return Inputs(
        source=source,
        target=target,
        encoder=pair.encoder,
        paired=pair.paired,
        split=pair.split,
        shared=pair.shared,
        classes=pair.classes,
        source_id=identity(source),
        target_id=identity(target),
    )


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
