"""`semalign sweep`: settings of one experiment, ranked."""

import argparse

from ._options import (
    check_alone,
    console_of,
    experiment_arguments,
    folder_of,
    named_experiment,
    output_arguments,
    over_argument,
    track_argument,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    experiment_arguments(parser, settings="settings of all trials")
    over_argument(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    track_argument(parser)
    output_arguments(parser, "folder of the sweep, which resumes there (default: runs/NAME-sweep)")
    parser.epilog = "Trials are measured on further rows of the training split, on which no run is measured."


def run(options: argparse.Namespace) -> int:
    """Run the trials, and print them with the best first."""
    from ..comparison.sweep import sweep_config
    from ..run.tracking import find_trackers

    check_alone("sweep")
    base, task, overrides = named_experiment(options, "sweep")
    config = sweep_config(base, task, over=options.over, configs=options.config, overrides=overrides)
    folder, trackers = folder_of(options, f"{config.experiment.name}-sweep"), find_trackers(options.track)
    console = console_of(options)
    from ..comparison import compare
    from ..comparison.sweep import sweep_table

    found = compare(config, folder, jobs=options.jobs, trackers=trackers, console=console)
    print(sweep_table(found))
    print(f"sweep folder: {folder.resolve()}")
    return 2 if any(each.missing for each in found.methods.values()) else 0
