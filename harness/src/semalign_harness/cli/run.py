"""`semalign run`: one experiment in one run folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ._options import (
    console_of,
    experiment_arguments,
    output_arguments,
    quiet_libraries,
    read_experiment,
    track_argument,
)

if TYPE_CHECKING:
    from ..experiment import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    experiment_arguments(parser)
    track_argument(parser)
    output_arguments(parser, "run folder; an interrupted run resumes there (default: runs/NAME, numbered if taken)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the run, print the resolved experiment and the plan, run nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Run the experiment, print its result, and write its report."""
    from ..run.run_folder import check_folder, pick_folder
    from ..run.tracking import find_trackers

    experiment = read_experiment(options, "run")
    find_trackers(options.track)  # a dry run refuses an unknown one too
    if options.out is not None:
        check_folder(options.out, experiment)
    if options.dry_run:
        quiet_libraries()
        print(_plan(experiment, options.out or pick_folder(Path("runs"), experiment)))
        return 0
    console = console_of(options)
    from ..report import report_run
    from ..report.result_tables import result_table
    from ..run.pipeline import run_experiment
    from ..util.resources import join

    ranks, _ = join(experiment.device)
    folder = ranks.broadcast_from_first(lambda: options.out or pick_folder(Path("runs"), experiment))
    result = run_experiment(experiment, folder, console=console, trackers=options.track)
    if ranks.is_first:
        report_run(folder, console)
        print(result_table(result))
        print(f"run folder: {folder.resolve()}")
    return 0


def _plan(experiment: "Experiment", folder: Path) -> str:
    """The experiment as YAML, with the plan as comments."""
    import yaml

    from ..run.dry_run import DryRun
    from ..run.estimate import describe
    from ..run.written_answers import describe_writing

    # Checked first: an input that cannot be used is an error before anything is printed.
    unchecked = [f"not checked: {note}" for note in DryRun().check(experiment, folder)]
    data = experiment.data
    plan = (
        f"plan: attribute on {data.attribution_rows} rows, supervise {data.train_rows} rows, {_training(experiment)}, "
        f"measure on {data.held_out_rows} rows, into {folder}"
    )
    lines = [*describe_writing(data), plan, *describe(experiment), *unchecked]
    tree = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return "\n".join([tree, *(f"# {line}" for line in lines)])


def _training(experiment: "Experiment") -> str:
    """Return the method and the amount of training: in whole steps where the depth of the target is known."""
    from ..models.shape import find_shape

    train, rows, shape = experiment.train, experiment.data.train_rows, find_shape(experiment.target)
    amount = f"{train.passes:.3g} passes" if train.steps is None else f"{train.steps} steps for each layer"
    if shape is not None:
        steps, examples = experiment.method.work(train, shape.layers, rows)
        amount = f"{steps} steps, {examples / rows:.3g} passes"
    return f"train by {experiment.method.kind} ({amount})"
