"""Run methods side by side: same rows, same budget, same evaluation; what is done is not done again."""

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from semalign_geometry import SemalignError, replace_file

from ..benchmarks import find_benchmark
from ..evaluation import Evaluated, EvaluationConfig, evaluate, protocol_of, read_evaluation
from ..experiment import Experiment
from ..grid.matrix import MATRIX, Cell, Matrix, Standing, check_folder, measured_differently
from ..grid.submit import Target, submit_matrix
from ..methods import BASELINES, as_method, find_methods, settings_of
from ..models.settings import ModelConfig
from ..results.comparison import Benchmarks, Comparison, ComparisonConfig, MethodFigures
from ..results.files import EVALUATION
from ..results.run import RunResult
from ..util.console import Console
from ..util.settings import merged, parse_overrides
from ._figures import Run, describe_metrics, figures_of, metrics_of
from ._table import comparison_csv, comparison_markdown

REFERENCE = "semalign"
"""The method whose wall time the others get, where times are equal."""
RUNS, COMPARISON = "runs", "comparison.json"
ALIKE = 0.01
"""Share by which two runs may differ in the figures of a model that they did not train: rounding, nothing else."""

Cells = dict[tuple[str, int], Cell]
"""By method and seed."""


def compare(
    config: ComparisonConfig,
    folder: Path,
    *,
    jobs: int = 1,
    trackers: Sequence[str] = (),
    console: Console | None = None,
) -> Comparison:
    """Run every method with every seed, evaluate what came out, and write `comparison.json`, `.md` and `.csv`.

    The folder goes on where it was interrupted, and takes further methods and seeds; finished runs are kept. A run that
    fails stops no other. The tables are those of the methods and seeds that were asked for last.

    Args:
        config: what to compare.
        folder: where the run folders and the tables are.
        jobs: runs at a time.
        trackers: names of trackers that are told of every step of every run.
        console: where progress is shown; None shows nothing.

    Raises:
        SemalignError: a setting is wrong, the folder holds runs of another experiment, or every method failed.
    """
    console, folder = console or Console(quiet=True), folder.resolve()
    target = Target(at_once=jobs, trackers=tuple(trackers))
    cells = _cells(config)
    same = _same(cells, config)
    first, second = _rounds({key: cell for key, cell in cells.items() if key[0] not in same}, config)
    _check_folder(folder, config)
    check_folder(folder / RUNS, _matrix(config, list(first.values())), extend=True)
    _check_timed(folder / RUNS, second)
    untrained = _untrained(config, folder, console)  # before the runs: benchmarks that cannot be had cost no training
    found: dict[str, Standing] = {}

    def run(some: Sequence[Cell]) -> None:
        if some:
            matrix = _matrix(config, some)
            for standing in submit_matrix(matrix, folder / RUNS, target, console=console, extend=True):
                found[standing.cell.name] = standing

    run(list(first.values()))
    timed = [_timed(cell, found) for cell in second.values()]
    run([each for each in timed if isinstance(each, Cell)])
    found |= {each.cell.name: each for each in timed if isinstance(each, Standing)}
    runs = {
        name: [_run(found[cells[name, seed].name], folder, config.benchmarks, console) for seed in config.seeds]
        for name in config.methods
        if name not in same
    }
    comparison = _summary(config, runs, same, untrained)
    comparison.write(folder / COMPARISON)
    replace_file(folder / "comparison.md", comparison_markdown(comparison))
    replace_file(folder / "comparison.csv", comparison_csv(comparison))
    return comparison


def _check_folder(folder: Path, config: ComparisonConfig) -> None:
    """Refuse a folder that holds anything but a comparison, or what one leaves that was interrupted before its runs.

    Raises:
        SemalignError: it does.
    """
    if folder.is_file():
        raise SemalignError(f"{folder} is a file: choose another folder with --out")
    if not folder.is_dir() or (folder / COMPARISON).is_file() or (folder / RUNS / MATRIX).is_file():
        return
    models = _untrained_models(config.experiment)
    if any(place.name not in (RUNS, *models) for place in folder.iterdir()):
        raise SemalignError(f"{folder} is not empty, and holds no comparison: choose another folder with --out")
    for name, model in models.items():
        if config.benchmarks is None or not (folder / name / EVALUATION).is_file():
            continue
        if not _is_alike(read_evaluation(folder / name), _evaluation(model, config.experiment, config.benchmarks)):
            raise SemalignError(f"{folder / name} is not of this comparison: choose another folder with --out")


def _cells(config: ComparisonConfig) -> Cells:
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
                f"override {name}:{section}.seed: methods have the same seeds: leave it out for --seeds"
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
    """The experiment of one method and seed; a random pairing is drawn by the same seed."""
    whole = merged(experiment.model_dump(mode="json"), tree)
    whole = merged(whole, {"name": name, "train": {"seed": seed}})
    if whole["pairing"]["kind"] == "random":
        whole = merged(whole, {"pairing": {"seed": seed}})
    found = Experiment.parse(whole, origin=f"method {name}")
    if changed := measured_differently(experiment, found):
        raise SemalignError(
            f"method {name} has {', '.join(changed)} of its own: figures compare on the same models and rows alone, so "
            "set it for all methods"
        )
    return Cell(name=f"{name}_seed-{seed}", values={"method": name, "train.seed": seed}, experiment=found)


def _same(cells: Cells, config: ComparisonConfig) -> dict[str, str]:
    """Methods whose settings are those of an earlier one; the reference counts as the first."""
    seen: dict[str, str] = {}
    same = {}
    for name in sorted(config.methods, key=lambda name: name != REFERENCE):
        settings = cells[name, config.seeds[0]].experiment.model_dump_json(exclude={"name"})
        if (first := seen.setdefault(settings, name)) != name:
            same[name] = first
    return same


def _rounds(cells: Cells, config: ComparisonConfig) -> tuple[Cells, Cells]:
    """What runs at once, and what waits for the wall time of the reference."""
    if config.equal == "tokens":
        return cells, {}
    if REFERENCE not in config.methods:
        raise SemalignError(f"equal times are those of {REFERENCE}: name it among --methods too")
    waiting = {}
    for key, cell in cells.items():
        method = cell.experiment.method
        if getattr(method, "seconds", None) is not None:
            raise SemalignError(f"method.seconds of {key[0]} is set, and --equal time sets it: leave one of them out")
        if "seconds" in type(method).model_fields and key[0] != REFERENCE:
            waiting[key] = cell
    return {key: cell for key, cell in cells.items() if key not in waiting}, waiting


def _check_timed(folder: Path, waiting: Cells) -> None:
    """Refuse a folder in which methods that wait for a wall time have begun without one.

    Raises:
        SemalignError: it is one.
    """
    if not waiting or not (folder / MATRIX).is_file():
        return
    begun = {cell.name: cell for cell in Matrix.read(folder / MATRIX).cells if (folder / cell.name).exists()}
    for cell in waiting.values():
        if cell.name in begun and getattr(begun[cell.name].experiment.method, "seconds", None) is None:
            raise SemalignError(f"{folder.parent} holds runs with equal tokens: choose another folder with --out")


def _timed(cell: Cell, found: Mapping[str, Standing]) -> Cell | Standing:
    """A method without stages trains as long as the reference of its seed did; not at all where that failed."""
    method = cell.experiment.method
    reference = found[f"{REFERENCE}_seed-{cell.values['train.seed']}"]
    if reference.result is None:
        return Standing(cell, "not run", f"it gets the wall time of {reference.cell.name}, which has not finished")
    stored = as_method(method).stored
    seconds = reference.result.training.seconds + (0.0 if stored else reference.result.supervision_seconds)
    experiment = cell.experiment.model_copy(update={"method": method.model_copy(update={"seconds": seconds})})
    return cell.model_copy(update={"experiment": experiment})


def _matrix(config: ComparisonConfig, cells: Sequence[Cell]) -> Matrix:
    over = {"method": list(config.methods), "train.seed": list(config.seeds)}
    return Matrix(name=config.experiment.name, over=over, cells=list(cells))


def _run(standing: Standing, folder: Path, benchmarks: Benchmarks | None, console: Console) -> Run | str:
    """A finished run with its evaluation; else why there is none."""
    if standing.result is None:
        return f"{standing.cell.name}: {standing.note or standing.state}"
    rows = standing.result.after.by_row
    if not all(map(math.isfinite, (*rows.kl, *rows.nll))):
        return f"{standing.cell.name}: its KL or NLL is not finite on some rows"
    place = folder / RUNS / standing.cell.name
    model = ModelConfig(path=str(place / "model"), dtype=standing.cell.experiment.target.dtype)
    return Run(standing.result, _evaluated(model, place / "evaluation", standing.cell.experiment, benchmarks, console))


def _untrained(config: ComparisonConfig, folder: Path, console: Console) -> tuple[Evaluated | None, Evaluated | None]:
    """The source's evaluation and the target's."""
    experiment = config.experiment
    source, target = (
        _evaluated(model, folder / name, experiment, config.benchmarks, console)
        for name, model in _untrained_models(experiment).items()
    )
    return source, target


def _untrained_models(experiment: Experiment) -> dict[str, ModelConfig]:
    """By the folder of their evaluation."""
    return {"evaluation-source": experiment.source, "evaluation-target": experiment.target}


def _evaluated(
    model: ModelConfig, place: Path, experiment: Experiment, benchmarks: Benchmarks | None, console: Console
) -> Evaluated | None:
    """One model's answers to the benchmarks that were asked for; a folder may hold further ones."""
    if benchmarks is None:
        return None
    config = _evaluation(model, experiment, benchmarks)
    there = read_evaluation(place) if (place / EVALUATION).is_file() else None
    if there is None or not _is_answered(there, config):
        if there is not None and (there.result.config.gold or there.result.config.source is not None):
            raise SemalignError(
                f"{place} holds an evaluation that a comparison does not make (with gold answers or a source): move it "
                "elsewhere, or choose another folder with --out"
            )
        console.note(f"evaluate {model.path} on {', '.join(benchmarks.tasks)}")
        if there is not None and not _is_alike(there, config):
            shutil.rmtree(place)  # of other documents or another form; the answers themselves are kept in the cache
        evaluate(config, place, console=console)
        if torch.cuda.is_available():  # give the memory back: runs are processes of their own
            gc.collect()
            torch.cuda.empty_cache()
    found = read_evaluation(place)
    return found._replace(items={name: found.items[name] for name in benchmarks.tasks})


def _evaluation(model: ModelConfig, experiment: Experiment, benchmarks: Benchmarks) -> EvaluationConfig:
    return EvaluationConfig(
        model=model,
        tasks=benchmarks.tasks,
        data=benchmarks.data,
        limit=benchmarks.limit,
        chat=benchmarks.chat,
        allow_weak_sandbox=benchmarks.allow_weak_sandbox,
        chat_template=experiment.chat_template,
        date=experiment.date,
        gold=False,
        device=experiment.device,
    )


def _is_answered(found: Evaluated, config: EvaluationConfig) -> bool:
    if not (_is_alike(found, config) and set(config.tasks) <= set(found.items)):
        return False
    chat, options = found.result.chat, config.chat_template
    for name in config.tasks:
        there = found.result.benchmarks[name].protocol
        date = None if there.date is None else config.date  # whether the model's template reads the clock stays
        if there != protocol_of(find_benchmark(name), chat=chat, options=options, date=date):
            return False
    return True


def _is_alike(found: Evaluated, config: EvaluationConfig) -> bool:
    """Whether the documents are put in the same way; what else was measured of them does no harm."""
    return found.result.config.model_copy(update={"tasks": config.tasks, "gold": False, "source": None}) == config


def _summary(
    config: ComparisonConfig,
    runs: Mapping[str, Sequence[Run | str]],
    same: Mapping[str, str],
    untrained: tuple[Evaluated | None, Evaluated | None],
) -> Comparison:
    finished = {name: [run for run in of if isinstance(run, Run)] for name, of in runs.items()}
    whole = {name: of for name, of in finished.items() if len(of) == len(config.seeds)}
    if not whole:
        reasons = "; ".join(run for of in runs.values() for run in of if isinstance(run, str))
        raise SemalignError(f"no method has finished all its runs: {reasons}")
    any_run = next(iter(whole.values()))[0]
    for name, of in whole.items():
        for run in of:
            _check_alike(name, run, any_run.result, untrained)
    source = metrics_of(any_run.result.source, untrained[0])
    before = metrics_of(any_run.result.before, untrained[1])
    metrics = describe_metrics(source, before, whole, _rivals(config, same))
    methods = {}
    for name in config.methods:
        first = same.get(name, name)
        if first not in whole:
            reasons_of = tuple(run for run in runs[first] if isinstance(run, str))
            methods[name] = MethodFigures(figures={}, missing=reasons_of, same_as=same.get(name))
            continue
        results = [run.result for run in whole[first]]
        trainings = [result.training for result in results]
        methods[name] = MethodFigures(
            figures=figures_of(first, whole, metrics, source, before),
            same_as=same.get(name),
            trained_parameters=round(fmean(training.trained_parameters for training in trainings)),
            steps=round(fmean(training.steps for training in trainings)),
            supervised_tokens=round(fmean(training.supervised_tokens for training in trainings)),
            train_rows=round(fmean(result.train_rows for result in results)),
            training_seconds=fmean(training.seconds for training in trainings),
            source_seconds=fmean(result.supervision_seconds for result in results),
            peak_bytes=max(result.peak_bytes for result in results),
            training_peak_bytes=_largest([result.training_peak_bytes for result in results]),
            stored_bytes=round(fmean(result.supervision_bytes for result in results)),
        )
    return Comparison(config=config, metrics=metrics, methods=methods)


def _largest(peaks: Sequence[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if len(known) == len(peaks) else None


def _rivals(config: ComparisonConfig, same: Mapping[str, str]) -> Sequence[str]:
    """Whom the others are tested against, under the names that ran."""
    baselines = [name for name in config.methods if name.partition(".")[0] in BASELINES]
    asked = baselines if config.against is None else [config.against]
    return list(dict.fromkeys(same.get(name, name) for name in asked))


def _check_alike(name: str, run: Run, first: RunResult, untrained: tuple[Evaluated | None, Evaluated | None]) -> None:
    """Refuse runs whose items are not the same, as when a file of rows changed between two calls.

    Raises:
        SemalignError: they are not.
    """
    if run.result.after.by_row.tokens != first.before.by_row.tokens:
        raise SemalignError(
            f"a run of {name} was measured on other held-out rows than the first one: the rows have changed since, so "
            "choose another folder with --out"
        )
    for role, ours, theirs in (
        ("source", run.result.source, first.source),
        ("target before the transfer", run.result.before, first.before),
    ):
        pairs = ((ours.kl, theirs.kl), (ours.answer_nll, theirs.answer_nll))
        if not all(math.isclose(one, other, rel_tol=ALIKE, abs_tol=ALIKE / 10) for one, other in pairs):
            raise SemalignError(
                f"a run of {name} found other figures of the {role} than the first one: the rows or the models have "
                "changed since, so choose another folder with --out"
            )
    for other in untrained:
        if other is None or run.evaluation is None:
            continue
        for task in other.items:
            one, two = (each.result.benchmarks[task] for each in (run.evaluation, other))
            if (one.protocol, one.documents_sha256) != (two.protocol, two.documents_sha256):
                raise SemalignError(
                    f"{task} was put differently to a run of {name} and in {other.folder}: the benchmark has changed "
                    "since, so choose another folder with --out"
                )


def overrides_of_methods(given: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Overrides of all methods, and those written `METHOD:key.key=value` by method.

    Raises:
        SemalignError: a method is named that is not compared; a word is no override.
    """
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    if stray := [text for text in given if "=" not in text and ":" not in text]:
        raise SemalignError(
            f"{stray[0]!r} is not an override, such as train.batch_size=8: methods are joined by commas, as in "
            f"--methods {','.join([*names, stray[0]])}"
        )
    for text in given:
        head, colon, rest = text.partition(":")
        if not colon or "=" in head:
            shared.append(text)
            continue
        if head not in own:
            raise SemalignError(f"override {text!r} is for {head!r}, which is not compared: name it among --methods")
        own[head] = (*own[head], rest)
    return shared, own
