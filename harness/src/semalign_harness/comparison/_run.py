"""Run methods on the same rows, with the same budget and evaluation; finished runs are kept."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from semalign_geometry.base import SemalignError, replace_file

from ..experiment import Experiment
from ..grid.folder import MATRIX, Standing, check_folder
from ..grid.matrix import Cell, Matrix
from ..grid.submit import Target, submit_matrix
from ..methods import BASELINES, find_methods, settings_of
from ..models.settings import ModelConfig
from ..results.comparison import Comparison, ComparisonConfig, MethodResult
from ..results.evaluation import Evaluated
from ..results.files import COMPARISON
from ..results.run import RunResult
from ..util.console import Console
from ..util.settings import merged, parse_overrides
from ._compared import measured_differently
from ._evaluations import check_evaluation, evaluated
from ._metrics import Run, describe_metrics, items_of, metrics_of_method
from .tables import comparison_csv, comparison_markdown

_FIRST = "semalign"
"""The method whose name stands for the runs of those with the same settings."""
RUNS = "runs"
_CLOSE = 0.01
"""Relative difference of rounding between two measurements of one model."""

Untrained = dict[str, Evaluated | None]
"""Evaluations of the source and of the target before training, by their folder."""


def compare(
    config: ComparisonConfig,
    folder: Path,
    *,
    jobs: int = 1,
    trackers: Sequence[str] = (),
    console: Console | None = None,
) -> Comparison:
    """Run every method with every seed, evaluate the trained models, and write `comparison.json`, `.md` and `.csv`.

    An interrupted comparison resumes in its folder, which also takes further methods and seeds; finished runs are
    kept. A run that fails stops no other. The tables hold the methods and seeds of this call.

    Args:
        config: the methods, the experiment and the seeds.
        folder: place of the run folders and the tables.
        jobs: runs at a time.
        trackers: names of trackers that receive every step of every run.
        console: shows progress; None shows nothing.

    Raises:
        SemalignError: a setting is wrong, the folder holds runs of another experiment, or every method failed.
    """
    console, folder = console or Console(quiet=True), folder.resolve()
    target = Target(at_once=jobs, trackers=tuple(trackers))
    cells = _cells(config)
    same = _same(cells, config)
    own = [cell for (name, _), cell in cells.items() if name not in same]
    over = {"method": list(config.methods), "train.seed": list(config.seeds)}
    matrix = Matrix(name=config.experiment.name, over=over, cells=own)
    _check_folder(folder, config)
    check_folder(folder / RUNS, matrix)
    # Before the runs: a benchmark that is not available costs no training.
    untrained = {
        name: evaluated(model, folder / name, config.experiment, config.benchmarks, console)
        for name, model in _untrained_models(config.experiment).items()
    }
    standings = submit_matrix(matrix, folder / RUNS, target, console=console)
    found = {standing.cell.name: standing for standing in standings}
    runs = {
        name: [_run(found[cells[name, seed].name], folder, config, console) for seed in config.seeds]
        for name in config.methods
        if name not in same
    }
    comparison = _summary(config, runs, same, untrained)
    comparison.write(folder / COMPARISON)
    replace_file(folder / "comparison.md", comparison_markdown(comparison))
    replace_file(folder / "comparison.csv", comparison_csv(comparison))
    return comparison


def _check_folder(folder: Path, config: ComparisonConfig) -> None:
    """Refuse a folder with other files than those of a comparison, whose runs may not have begun.

    Raises:
        SemalignError: it has.
    """
    if folder.is_file():
        raise SemalignError(f"{folder} is a file: choose another folder with --out")
    if not folder.is_dir() or (folder / COMPARISON).is_file() or (folder / RUNS / MATRIX).is_file():
        return
    models = _untrained_models(config.experiment)
    if any(place.name not in (RUNS, *models) for place in folder.iterdir()):
        raise SemalignError(f"{folder} is not empty, and holds no comparison: choose another folder with --out")
    for name, model in models.items():
        check_evaluation(model, folder / name, config.experiment, config.benchmarks)


def _untrained_models(experiment: Experiment) -> dict[str, ModelConfig]:
    """The source and the target, by the folder of their evaluation."""
    return {"evaluation-source": experiment.source, "evaluation-target": experiment.target}


def _cells(config: ComparisonConfig) -> dict[tuple[str, int], Cell]:
    """The experiments by method and seed."""
    find_methods(",".join(config.methods))
    trees = {name: _settings(name, own) for name, own in config.methods.items()}
    return {
        (name, seed): _cell(config.experiment, name, tree, seed)
        for name, tree in trees.items()
        for seed in config.seeds
    }


def _settings(name: str, own: Sequence[str]) -> dict[str, Any]:
    overrides = parse_overrides(own)
    for section in ("train", "pairing"):
        if isinstance(overrides.get(section), dict) and "seed" in overrides[section]:
            raise SemalignError(
                f"override {name}:{section}.seed: methods share their seeds: leave it out, and use --seeds"
            )
    if "name" in overrides:
        raise SemalignError(f"override {name}:name: runs are named by their method: leave it out")
    settings = settings_of(name)
    tree: dict[str, Any] = merged(dict(settings), overrides)
    if (kind := tree["method"]["kind"]) != settings["method"]["kind"]:
        raise SemalignError(
            f"override {name}:method.kind makes it the method {kind}: name that among --methods instead"
        )
    return tree


def _cell(experiment: Experiment, name: str, tree: Mapping[str, Any], seed: int) -> Cell:
    """The experiment of one method and seed; the seed draws a random pairing too."""
    whole = merged(experiment.model_dump(mode="json"), tree)
    whole = merged(whole, {"name": name, "train": {"seed": seed}})
    if whole["pairing"]["kind"] == "random":
        whole = merged(whole, {"pairing": {"seed": seed}})
    found = Experiment.parse(whole, origin=f"method {name}")
    if changed := measured_differently(experiment, found):
        raise SemalignError(
            f"method {name} has {', '.join(changed)} of its own: metrics compare only on the same models and rows, so "
            "set it for all methods"
        )
    return Cell(name=f"{name}_seed-{seed}", values={"method": name, "train.seed": seed}, experiment=found)


def _same(cells: Mapping[tuple[str, int], Cell], config: ComparisonConfig) -> dict[str, str]:
    """Methods with the settings of another one, whose runs they share."""
    seen: dict[str, str] = {}
    same = {}
    for name in sorted(config.methods, key=lambda name: name != _FIRST):
        settings = cells[name, config.seeds[0]].experiment.model_dump_json(exclude={"name"})
        if (first := seen.setdefault(settings, name)) != name:
            same[name] = first
    return same


def _run(standing: Standing, folder: Path, config: ComparisonConfig, console: Console) -> Run | str:
    """A finished run with its evaluation, or the reason why there is none."""
    if standing.result is None:
        return f"{standing.cell.name}: {standing.note or standing.state}"
    rows = standing.result.after.by_row
    if not all(map(math.isfinite, (*rows.kl, *rows.nll))):
        return f"{standing.cell.name}: its KL or NLL is not finite on some rows"
    place, experiment = folder / RUNS / standing.cell.name, standing.cell.experiment
    model = ModelConfig(path=str(place / "model"), dtype=experiment.target.dtype)
    return Run(standing.result, evaluated(model, place / "evaluation", experiment, config.benchmarks, console))


def _summary(
    config: ComparisonConfig, runs: Mapping[str, Sequence[Run | str]], same: Mapping[str, str], untrained: Untrained
) -> Comparison:
    finished = {name: [run for run in of if isinstance(run, Run)] for name, of in runs.items()}
    missing = {name: tuple(run for run in of if isinstance(run, str)) for name, of in runs.items()}
    whole = {name: of for name, of in finished.items() if not missing[name]}
    if not whole:
        reasons = "; ".join(reason for of in missing.values() for reason in of)
        raise SemalignError(f"no method has finished all its runs: {reasons}")
    first = next(iter(whole.values()))[0].result
    for name, of in whole.items():
        for run in of:
            _check_measured_alike(name, run.result, first)
            _check_asked_alike(name, run, untrained)
    source, before = (
        items_of(measured, evaluation)
        for measured, evaluation in zip((first.source, first.before), untrained.values(), strict=True)
    )
    metrics = describe_metrics(source, before, whole, _rivals(config, same))
    methods = {}
    for name in config.methods:
        of_name = same.get(name, name)
        if of_name not in whole:
            methods[name] = MethodResult(metrics={}, missing=missing[of_name], same_as=same.get(name))
            continue
        found = metrics_of_method(of_name, whole, metrics, source, before)
        costs = _costs([run.result for run in whole[of_name]])
        methods[name] = MethodResult(metrics=found, same_as=same.get(name), **costs)
    return Comparison(config=config, metrics=metrics, methods=methods)


def _costs(results: Sequence[RunResult]) -> dict[str, Any]:
    trainings = [result.training for result in results]
    peaks = [result.training_peak_bytes for result in results]
    return {
        "trained_parameters": round(fmean(training.trained_parameters for training in trainings)),
        "steps": round(fmean(training.steps for training in trainings)),
        "supervised_tokens": round(fmean(training.supervised_tokens for training in trainings)),
        "train_rows": round(fmean(result.train_rows for result in results)),
        "training_seconds": fmean(training.seconds for training in trainings),
        "source_seconds": fmean(result.supervision_seconds for result in results),
        "peak_bytes": max(result.peak_bytes for result in results),
        "training_peak_bytes": None if None in peaks else max(peak for peak in peaks if peak is not None),
        "stored_bytes": round(fmean(result.supervision_bytes for result in results)),
    }


def _rivals(config: ComparisonConfig, same: Mapping[str, str]) -> Sequence[str]:
    """Methods to test the others against, under the names that ran."""
    baselines = [name for name in config.methods if name.partition(".")[0] in BASELINES]
    asked = baselines if config.against is None else [config.against]
    return list(dict.fromkeys(same.get(name, name) for name in asked))


def _check_measured_alike(name: str, run: RunResult, first: RunResult) -> None:
    """Refuse runs on different rows or models, as when a file changed between two calls.

    Raises:
        SemalignError: they are.
    """
    if run.after.by_row.tokens != first.before.by_row.tokens:
        raise SemalignError(
            f"a run of {name} was measured on other held-out rows than the first one: the rows have changed since, so "
            "choose another folder with --out"
        )
    for role, ours, theirs in (
        ("source", run.source, first.source),
        ("target before the transfer", run.before, first.before),
    ):
        pairs = ((ours.kl, theirs.kl), (ours.answer_nll, theirs.answer_nll))
        if not all(math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE / 10) for one, other in pairs):
            raise SemalignError(
                f"a run of {name} found other metrics of the {role} than the first one: the rows or the models have "
                "changed since, so choose another folder with --out"
            )


def _check_asked_alike(name: str, run: Run, untrained: Untrained) -> None:
    """Refuse evaluations on different documents or in different forms.

    Raises:
        SemalignError: they are.
    """
    for other in untrained.values():
        if other is None or run.evaluation is None:
            continue
        for task in other.items:
            one, two = (each.result.benchmarks[task] for each in (run.evaluation, other))
            if (one.protocol, one.documents_sha256) != (two.protocol, two.documents_sha256):
                raise SemalignError(
                    f"{task} was put differently to a run of {name} and in {other.folder}: the benchmark has changed "
                    "since, so choose another folder with --out"
                )
