"""Content of the folders of a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError
from semalign_attribution import LayerPairing, LayerScores
from semalign_geometry.base import Contract, SemalignError
from semalign_train import StageRecord, StepRecord

from ..experiment import Experiment
from ..results.comparison import Comparison
from ..results.entries import EntryChanges
from ..results.evaluation import Evaluated, evaluation_file, read_evaluation
from ..results.fidelity import RunFidelity
from ..results.files import (
    COMPARISON,
    ENTRIES,
    ENVIRONMENT,
    EVALUATION_FOLDERS,
    EXPERIMENT,
    METRICS,
    RESULT,
    SIMILARITY,
)
from ..results.run import Environment, RunResult
from ..results.similarity import LayerSimilarity

EXPECTED = "give the folder of a finished run, comparison or evaluation"

ContractT = TypeVar("ContractT", bound=Contract)
ROLES = tuple(EVALUATION_FOLDERS)
"""Models of a run: source, target before, target after."""
Evaluations = dict[str, Evaluated]
"""Evaluations by the role of their model."""


@dataclass(frozen=True)
class ReportedRun:
    """Content of a run folder."""

    folder: Path
    experiment: Experiment
    environment: Environment | None
    result: RunResult
    scores: LayerScores | None
    """None also for a method without pairing."""
    pairing: LayerPairing | None
    """None also for a method without pairing."""
    fidelity: RunFidelity | None
    """None also for a method without transport."""
    similarity: LayerSimilarity | None
    entries: EntryChanges | None
    """None also for a run of earlier versions."""
    steps: tuple[StepRecord, ...]
    model_bytes: int
    """Size of the trained target on disk."""
    evaluations: Evaluations = field(default_factory=dict)

    @property
    def stages(self) -> tuple[StageRecord, ...]:
        """Stages of frontier training."""
        transfer = self.result.training.transfer
        return () if transfer is None else transfer.stages


@dataclass(frozen=True)
class ReportedComparison:
    """Content of the folder of a comparison."""

    folder: Path
    comparison: Comparison
    shown: str | None
    """Method whose answers are shown as examples."""
    evaluations: Evaluations
    environment: Environment | None
    """Environment of the first run of that method."""


def read_folders(folders: Sequence[Path]) -> list[ReportedRun] | list[ReportedComparison]:
    """Read runs with the evaluations of their models, or comparisons.

    Raises:
        SemalignError: a folder holds nothing of the kind or something unfinished, or the folders do not go together.
    """
    kinds = {folder: _kind(folder) for folder in folders}
    if "comparison" in kinds.values():
        if others := [str(folder) for folder, kind in kinds.items() if kind != "comparison"]:
            raise SemalignError(f"comparisons are reported without runs and evaluations: leave out {', '.join(others)}")
        return [_read_comparison(folder) for folder in kinds]
    runs = [_read_run(folder) for folder in folders if kinds[folder] == "run"]
    evaluations = [folder for folder in folders if kinds[folder] == "evaluation"]
    if evaluations and len(runs) != 1:
        raise SemalignError(
            f"{evaluations[0]} holds an evaluation, which is reported with the one run that it belongs to: give that "
            "run's folder too, or use `semalign compare-evaluations`"
        )
    for folder in evaluations:
        _add_evaluation(runs[0], folder)
    return runs


def distinct(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return a different name for each folder: its own, else the folder's, else its path."""
    for found in (names, [folder.name for folder in folders], [str(folder) for folder in folders]):
        if len(set(found)) == len(found):
            return list(found)
    return [f"{number}: {folder}" for number, folder in enumerate(folders, 1)]


def _kind(folder: Path) -> Literal["run", "comparison", "evaluation"]:
    if not folder.is_dir():
        raise SemalignError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: {EXPECTED}")
    if (folder / COMPARISON).is_file():
        return "comparison"
    if (folder / EXPERIMENT).is_file():
        if not (folder / RESULT).is_file():
            raise SemalignError(f"the run in {folder} is unfinished: repeat its command, which resumes it")
        return "run"
    if evaluation_file(folder).is_file():
        return "evaluation"
    raise SemalignError(f"{folder} holds neither {EXPERIMENT} nor {COMPARISON}: {EXPECTED}")


def _read_run(folder: Path) -> ReportedRun:
    model = folder / "model"
    experiment = Experiment.read(folder / EXPERIMENT)
    use = experiment.method.layer_use
    return ReportedRun(
        folder=folder,
        experiment=experiment,
        environment=_optional(Environment, folder / ENVIRONMENT),
        result=RunResult.read(folder / RESULT),
        scores=None if use == "none" else _optional(LayerScores, folder / "attribution.json"),
        pairing=None if use == "none" else _optional(LayerPairing, folder / "pairing.json"),
        fidelity=_optional(RunFidelity, folder / "fidelity.json") if use == "transported" else None,
        similarity=_optional(LayerSimilarity, folder / SIMILARITY),
        entries=_optional(EntryChanges, folder / ENTRIES),
        steps=_steps(folder / METRICS),
        model_bytes=sum(file.stat().st_size for file in model.iterdir()) if model.is_dir() else 0,
        evaluations=_evaluations({role: folder / name for role, name in EVALUATION_FOLDERS.items()}),
    )


def _read_comparison(folder: Path) -> ReportedComparison:
    comparison = Comparison.read(folder / COMPARISON)
    finished = [name for name, found in comparison.methods.items() if found.metrics and found.same_as is None]
    shown = "semalign" if "semalign" in finished else next(iter(finished), None)
    run = folder / "runs" / f"{shown}_seed-{comparison.config.seeds[0]}"
    places = {role: (run if role == "target after" else folder) / name for role, name in EVALUATION_FOLDERS.items()}
    found = {} if comparison.config.benchmarks is None else _evaluations(places)
    return ReportedComparison(
        folder=folder,
        comparison=comparison,
        shown=shown,
        evaluations=found if len(found) == len(ROLES) else {},
        environment=_optional(Environment, run / ENVIRONMENT),
    )


def _evaluations(places: dict[str, Path]) -> Evaluations:
    return {role: read_evaluation(place) for role, place in places.items() if evaluation_file(place).is_file()}


def _optional(contract: type[ContractT], file: Path) -> ContractT | None:
    return contract.read(file) if file.is_file() else None


def _steps(file: Path) -> tuple[StepRecord, ...]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        return tuple(StepRecord.model_validate_json(line) for line in lines)
    except ValidationError as error:
        raise SemalignError(f"{file} holds a line that is no step: {error.errors()[0]['msg']}") from None


def _add_evaluation(run: ReportedRun, folder: Path) -> None:
    """Find the model of an evaluation among those of the run, and add it there.

    Raises:
        SemalignError: it evaluates none of the run's models.
    """
    found = read_evaluation(folder)
    known = [] if run.environment is None else run.environment.models
    if found.result.model_sha256 in known:
        role = ROLES[known.index(found.result.model_sha256)]
    elif Path(found.result.config.model.path).resolve() == (run.folder / "model").resolve():
        role = "target after"
    else:
        raise SemalignError(
            f"{folder} evaluates {found.result.config.model.path}, which is none of the models of {run.folder}: "
            "evaluate its source, its target, or the model in it"
        )
    other = run.evaluations.get(role)
    if other is not None and other.folder.resolve() != folder.resolve():
        raise SemalignError(f"{other.folder} and {folder} evaluate the same model ({role}): give one of them")
    run.evaluations[role] = found
