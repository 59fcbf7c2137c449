"""What lies in the folders that a report is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import ValidationError
from semalign_attribution import LayerPairing, LayerScores
from semalign_geometry.base import Contract, SemalignError
from semalign_train import StageRecord, StepRecord

from ..experiment import Experiment
from ..results.fidelity import RunFidelity
from ..results.files import ENVIRONMENT, EXPERIMENT, METRICS, RESULT, SIMILARITY
from ..results.run import Environment, RunResult
from ..results.similarity import LayerSimilarity

if TYPE_CHECKING:  # these load lm-eval
    from ..comparison import Comparison
    from ..evaluation import Evaluated

COMPARISON, EVALUATION = "comparison.json", "evaluation"
EXPECTED = "give the folder of a finished run, comparison or evaluation"

ContractT = TypeVar("ContractT", bound=Contract)
Role = Literal["source", "target before", "target after"]
ROLES: tuple[Role, ...] = ("source", "target before", "target after")
BESIDE: dict[Role, str] = {
    "source": "evaluation-source",
    "target before": "evaluation-target",
    "target after": EVALUATION,
}
"""Where a run folder has evaluations of its models, if they were made there."""
Evaluations = dict[Role, "Evaluated"]


@dataclass(frozen=True)
class ReportedRun:
    """A run folder, read."""

    folder: Path
    experiment: Experiment
    environment: Environment | None
    result: RunResult
    scores: LayerScores | None
    """None where the method uses no pairing, too."""
    pairing: LayerPairing | None
    """Likewise."""
    fidelity: RunFidelity | None
    """None where the method transports nothing, too."""
    similarity: LayerSimilarity | None
    steps: tuple[StepRecord, ...]
    model_bytes: int
    """Size of the trained target on disk."""
    evaluations: Evaluations = field(default_factory=dict)

    @property
    def stages(self) -> tuple[StageRecord, ...]:
        """The stages of frontier training."""
        transfer = self.result.training.transfer
        return () if transfer is None else transfer.stages


@dataclass(frozen=True)
class ReportedComparison:
    """The folder of a comparison, read."""

    folder: Path
    comparison: "Comparison"
    shown: str | None
    """The method whose answers are shown as examples."""
    evaluations: Evaluations
    environment: Environment | None
    """What the first run that is there ran on."""


def read_folders(folders: Sequence[Path]) -> list[ReportedRun] | list[ReportedComparison]:
    """One or more runs, with the evaluations that belong to them; or one or more comparisons.

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


def _kind(folder: Path) -> Literal["run", "comparison", "evaluation"]:
    if not folder.is_dir():
        raise SemalignError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: {EXPECTED}")
    if (folder / COMPARISON).is_file():
        return "comparison"
    if (folder / EXPERIMENT).is_file():
        if not (folder / RESULT).is_file():
            raise SemalignError(f"the run in {folder} is unfinished: repeat its command, which goes on there")
        return "run"
    if (folder / RESULT).is_file():
        return "evaluation"
    raise SemalignError(f"{folder} holds neither {EXPERIMENT} nor {COMPARISON}: {EXPECTED}")


def _read_run(folder: Path) -> ReportedRun:
    evaluations: Evaluations = {
        role: _evaluated(folder / name) for role, name in BESIDE.items() if (folder / name / RESULT).is_file()
    }
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
        steps=_steps(folder / METRICS),
        model_bytes=sum(file.stat().st_size for file in model.iterdir()) if model.is_dir() else 0,
        evaluations=evaluations,
    )


def _optional(contract: type[ContractT], file: Path) -> ContractT | None:
    return contract.read(file) if file.is_file() else None


def _steps(file: Path) -> tuple[StepRecord, ...]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        return tuple(StepRecord.model_validate_json(line) for line in lines)
    except ValidationError as error:
        raise SemalignError(f"{file} holds a line that is no step: {error.errors()[0]['msg']}") from None


def _add_evaluation(run: ReportedRun, folder: Path) -> None:
    """Find whose evaluation it is, and put it there.

    Raises:
        SemalignError: it is of none of the run's models.
    """
    found = _evaluated(folder)
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


def _read_comparison(folder: Path) -> ReportedComparison:
    from ..comparison import Comparison

    comparison = Comparison.read(folder / COMPARISON)
    finished = [name for name, found in comparison.methods.items() if found.figures and found.same_as is None]
    shown = "semalign" if "semalign" in finished else next(iter(finished), None)
    seed = comparison.config.seeds[0]
    places: dict[Role, Path] = {
        "source": folder / "evaluation-source",
        "target before": folder / "evaluation-target",
        "target after": folder / "runs" / f"{shown}_seed-{seed}" / EVALUATION,
    }
    wanted = comparison.config.benchmarks is not None and all((place / RESULT).is_file() for place in places.values())
    return ReportedComparison(
        folder=folder,
        comparison=comparison,
        shown=shown,
        evaluations={role: _evaluated(place) for role, place in places.items()} if wanted else {},
        environment=_optional(Environment, folder / "runs" / f"{shown}_seed-{seed}" / ENVIRONMENT),
    )


def _evaluated(folder: Path) -> "Evaluated":
    from ..evaluation import read_evaluation

    return read_evaluation(folder)
