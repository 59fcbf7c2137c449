"""Run methods side by side: same rows, same budget, same evaluation; what is done is not done again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semalign_geometry import SemalignError, replace_file

from ..console import Console
from ..evaluation import Evaluated, EvaluationConfig, evaluate, read_evaluation
from ..experiment import Experiment, ModelConfig
from ..matrix import Cell, Matrix, Standing
from ..methods import BASELINES, known_methods
from ..pipeline import RunResult
from ..run_folder import RESULT
from ..settings import merged, parse_overrides
from ..submit import Target, submit_matrix
from ._contracts import Benchmarks, Comparison, ComparisonConfig, MethodFigures
from ._figures import Run, describe_metrics, figures_of, metrics_of
from ._table import comparison_csv, comparison_markdown

REFERENCE = "semalign"
"""The method whose wall time the others get, where times are equal."""
RUNS = "runs"


def compare(config: ComparisonConfig, folder: Path, *, jobs: int = 1, console: Console | None = None) -> Comparison:
    """Run every method with every seed, evaluate what came out, and write `comparison.json`, `.md` and `.csv`.

    The folder goes on where it was interrupted, and takes further methods and seeds; finished runs are kept.

    Args:
        config: what to compare.
        folder: where the run folders and the tables are.
        jobs: runs at a time.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: a setting is wrong, or the folder holds runs of another experiment.
    """
    console = console or Console(quiet=True)
    trees = {name: _settings(name, own) for name, own in config.methods.items()}
    cells = {
        (name, seed): _cell(config.experiment, name, tree, seed)
        for name, tree in trees.items()
        for seed in config.seeds
    }
    same = _same(cells, config)
    kept = {key: cell for key, cell in cells.items() if key[0] not in same}
    found: dict[str, Standing] = {}
    for some in _rounds(kept, config):
        if config.equal == "time":
            some = {key: _timed(cell, folder, config) for key, cell in some.items()}
        matrix = _matrix(config, list(some.values()))
        for standing in submit_matrix(matrix, folder / RUNS, Target(at_once=jobs), console=console, extend=True):
            found[standing.cell.name] = standing
    runs = {
        name: [_run(found[cells[name, seed].name], folder, config.benchmarks, console) for seed in config.seeds]
        for name in config.methods
        if name not in same
    }
    comparison = _summary(config, runs, found, same, folder, console)
    comparison.write(folder / "comparison.json")
    replace_file(folder / "comparison.md", comparison_markdown(comparison))
    replace_file(folder / "comparison.csv", comparison_csv(comparison))
    return comparison


def _settings(name: str, own: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = merged(dict(known_methods()[name]), parse_overrides(own))
    return tree


def _cell(experiment: Experiment, name: str, tree: Mapping[str, Any], seed: int) -> Cell:
    """The experiment of one method and seed; a random pairing is drawn by the same seed."""
    whole = merged(experiment.model_dump(mode="json"), tree)
    whole = merged(whole, {"name": name, "train": {"seed": seed}})
    if whole["pairing"]["kind"] == "random":
        whole = merged(whole, {"pairing": {"seed": seed}})
    found = Experiment.parse(whole, origin=f"method {name}")
    return Cell(name=f"{name}_seed-{seed}", values={"method": name, "train.seed": seed}, experiment=found)


def _same(cells: Mapping[tuple[str, int], Cell], config: ComparisonConfig) -> dict[str, str]:
    """Methods whose settings are those of an earlier one."""
    seen: dict[str, str] = {}
    same = {}
    for name in config.methods:
        settings = cells[name, config.seeds[0]].experiment.model_dump_json(exclude={"name"})
        if (first := seen.setdefault(settings, name)) != name:
            same[name] = first
    return same


def _rounds(cells: dict[tuple[str, int], Cell], config: ComparisonConfig) -> list[dict[tuple[str, int], Cell]]:
    """All at once; with equal times the reference first."""
    if config.equal == "tokens":
        return [cells]
    if REFERENCE not in config.methods:
        raise SemalignError(f"equal times are those of {REFERENCE}: name it among --methods too")
    first = {key: cell for key, cell in cells.items() if key[0] == REFERENCE}
    return [first, {key: cell for key, cell in cells.items() if key not in first}]


def _timed(cell: Cell, folder: Path, config: ComparisonConfig) -> Cell:
    """A method without stages trains as long as the reference of its seed did."""
    method = cell.experiment.method
    if "seconds" not in type(method).model_fields:
        return cell
    place = folder / RUNS / f"{REFERENCE}_seed-{cell.values['train.seed']}" / RESULT
    if not place.is_file():
        raise SemalignError(f"{place} is missing: {REFERENCE} failed, whose time the others would get")
    reference = RunResult.read(place)
    seconds = reference.training.seconds + (0.0 if method.stored else reference.supervision_seconds)  # type: ignore[attr-defined]
    experiment = cell.experiment.model_copy(update={"method": method.model_copy(update={"seconds": seconds})})
    return cell.model_copy(update={"experiment": experiment})


def _matrix(config: ComparisonConfig, cells: list[Cell]) -> Matrix:
    over = {"method": list(config.methods), "train.seed": list(config.seeds)}
    return Matrix(name=config.experiment.name, over=over, cells=cells)


def _run(standing: Standing, folder: Path, benchmarks: Benchmarks | None, console: Console) -> Run | str:
    """A finished run with its evaluation; else why there is none."""
    if standing.result is None:
        return f"{standing.cell.name}: {standing.note or standing.state}"
    place = folder / RUNS / standing.cell.name
    model = ModelConfig(path=str(place / "model"), dtype=standing.cell.experiment.target.dtype)
    return Run(standing.result, _evaluated(model, place / "evaluation", standing.cell.experiment, benchmarks, console))


def _evaluated(
    model: ModelConfig, place: Path, experiment: Experiment, benchmarks: Benchmarks | None, console: Console
) -> Evaluated | None:
    if benchmarks is None:
        return None
    config = EvaluationConfig(
        model=model,
        tasks=benchmarks.tasks,
        data=benchmarks.data,
        limit=benchmarks.limit,
        chat=benchmarks.chat,
        gold=False,
        device=experiment.device,
    )
    if not (place / RESULT).is_file() or read_evaluation(place).result.config != config:
        console.note(f"evaluate {model.path} on {', '.join(benchmarks.tasks)}")
        evaluate(config, place, console=console)
    return read_evaluation(place)


def _summary(
    config: ComparisonConfig,
    runs: Mapping[str, Sequence[Run | str]],
    found: Mapping[str, Standing],
    same: Mapping[str, str],
    folder: Path,
    console: Console,
) -> Comparison:
    whole = {name: [run for run in of if isinstance(run, Run)] for name, of in runs.items()}
    whole = {name: of for name, of in whole.items() if len(of) == len(config.seeds)}
    if not whole:
        reasons = "; ".join(str(run) for of in runs.values() for run in of if isinstance(run, str))
        raise SemalignError(f"no method has finished all its runs: {reasons}")
    any_result = next(iter(whole.values()))[0].result
    experiment = config.experiment
    reference = {
        role: metrics_of(
            measured, _evaluated(model, folder / f"evaluation-{role}", experiment, config.benchmarks, console)
        )
        for role, measured, model in (
            ("source", any_result.source, experiment.source),
            ("target", any_result.before, experiment.target),
        )
    }
    source, before = reference["source"], reference["target"]
    metrics = describe_metrics(source, before, whole, BASELINES)
    methods = {}
    for name in config.methods:
        of = whole.get(same.get(name, name))
        if of is None:
            methods[name] = MethodFigures(figures={}, missing=tuple(run for run in runs[name] if isinstance(run, str)))
            continue
        results = [run.result for run in of]

        def average(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        methods[name] = MethodFigures(
            figures=figures_of(same.get(name, name), whole, metrics, source, before),
            same_as=same.get(name),
            trained_parameters=results[0].training.trained_parameters,
            steps=round(average([r.training.steps for r in results])),
            supervised_tokens=round(average([r.training.supervised_tokens for r in results])),
            training_seconds=average([r.training.seconds for r in results]),
            source_seconds=average([r.supervision_seconds for r in results]),
            peak_bytes=max(r.peak_bytes for r in results),
            stored_bytes=results[0].supervision_bytes,
        )
    return Comparison(config=config, metrics=metrics, methods=methods)


def overrides_of_methods(given: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Overrides of all methods, and those written `METHOD:key.key=value` by method.

    Raises:
        SemalignError: a method is named that is not compared.
    """
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    for text in given:
        head, colon, rest = text.partition(":")
        if not colon or "=" in head:
            shared.append(text)
            continue
        if head not in own:
            raise SemalignError(f"override {text!r} is for {head!r}, which is not compared: name it among --methods")
        own[head] = (*own[head], rest)
    return shared, own
