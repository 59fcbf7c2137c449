"""All checks, in the order in which a person asks."""

from collections.abc import Sequence

from semalign_geometry import SemalignError

from ..experiment import Experiment
from ..models.opening import check_pulled
from ..run.inputs import check_settings, encoder_of
from ..util.console import Console
from ..util.resources import pick_device
from ..util.settings import merged, parse_overrides
from ._architecture import check_architecture
from ._deep import check_layers
from ._findings import Diagnosis, Finding
from ._heads import check_adapters, check_head
from ._machine import check_machine
from ._pair import Candidate, Pair, draw_sample, open_candidate
from ._tokens import (
    check_chat_template,
    check_entries,
    check_rows,
    check_special_tokens,
    check_template_options,
    tokenizer_ids,
)

_NO_DATA = "generated:arithmetic"
"""Stands where an experiment needs rows; never read."""


def read_settings(source: str, target: str, data: str | None, overrides: Sequence[str]) -> tuple[Experiment, bool]:
    """The experiment that would run, and whether rows are given.

    Args:
        source: path of the source.
        target: path of the target.
        data: path of the rows, if any.
        overrides: `key.key=value`, as `semalign run` takes them.

    Raises:
        SemalignError: an override is not of that form, or an unknown or wrong setting.
    """
    above = parse_overrides(overrides)
    tree = {"name": "doctor", "source": {"path": source}, "target": {"path": target}}
    if data is not None:
        tree["data"] = {"train": {"path": data}}
    tree = merged(tree, above)
    experiment = Experiment.parse(merged({"data": {"train": {"path": _NO_DATA}}}, tree), origin="doctor")
    has_rows = "path" in merged({"data": {"train": {}}}, tree)["data"]["train"]
    return experiment, has_rows


def diagnose(
    experiment: Experiment, *, has_rows: bool, deep: bool = False, console: Console | None = None
) -> Diagnosis:
    """Look for what would trouble a run; weights are loaded only for a deep diagnosis.

    A model as a GGUF file that was never used before is converted first, and the console is told.

    Args:
        experiment: what would run.
        has_rows: whether its rows are looked at.
        deep: whether both models are loaded, one after the other, and their layers compared.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: a model or the rows do not exist, rows are needed, or settings do not fit the pair.
    """
    if deep and not has_rows:
        raise SemalignError("--deep compares layers on rows: give --data FILE")
    console = console or Console(quiet=True)
    device = pick_device(experiment.device)
    for model in (experiment.source, experiment.target):
        check_pulled(model)
    source = open_candidate("source", experiment.source, device, note=console.note)
    target = open_candidate("target", experiment.target, device, note=console.note)

    def diagnosis(findings: Sequence[Finding]) -> Diagnosis:
        return Diagnosis(
            source=experiment.source.path,
            target=experiment.target.path,
            device=str(device),
            findings=tuple(findings),
        )

    if not isinstance(source, Candidate) or not isinstance(target, Candidate):
        return diagnosis([each for each in (source, target) if isinstance(each, Finding)])
    check_settings(experiment, source.shape, target.shape)
    encoder = encoder_of(experiment, target.opened)
    sample = draw_sample(experiment.data, encoder) if has_rows else None
    pair = Pair(experiment, device, source, target, encoder, sample)
    entries, shared = check_entries(pair)
    findings = [
        *check_architecture(pair),
        *entries,
        check_special_tokens(pair),
        check_chat_template(pair),
        *check_template_options(pair),
        *check_rows(pair, shared),
        *check_adapters(source),
        *check_adapters(target),
        check_head(source, tokenizer_ids(source) if shared is None else shared.source_ids),
        check_head(target, tokenizer_ids(target) if shared is None else shared.target_ids),
        *check_machine(pair),
    ]
    if not deep or not diagnosis(findings).is_usable:
        return diagnosis(findings)
    assert shared is not None
    depths = check_layers(pair, shared, console)
    findings += depths.findings
    found = {"fidelity": depths.fidelity, "similarity": depths.similarity, "pairing": depths.pairing}
    return diagnosis(findings).model_copy(update=found)
