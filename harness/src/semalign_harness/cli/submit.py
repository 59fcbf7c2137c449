"""`semalign submit`: a matrix of experiments, on this machine or as Slurm jobs."""

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
    experiment_arguments(parser, settings="settings of all cells")
    over_argument(parser)
    parser.add_argument("--executor", default="local", help="local (default), slurm, or submitit-local to try slurm's")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: 1 here, 256 on Slurm)")
    parser.add_argument(
        "--slurm", action="extend", nargs="+", default=[], metavar="key=value", help="partition=… gpus_per_node=… …"
    )
    parser.add_argument("--wait", action="store_true", help="wait for the jobs")
    parser.add_argument("--dry-run", action="store_true", help="check the cells, print their states, run nothing")
    track_argument(parser)
    output_arguments(parser, "folder of the matrix, which resumes there (default: runs/NAME-matrix)")


def run(options: argparse.Namespace) -> int:
    """Run or submit the cells that are not finished, and print the table."""
    from ..grid.matrix import read_matrix
    from ..run.tracking import find_trackers
    from ..util.settings import parse_overrides

    check_alone("submit")
    base, task, overrides = named_experiment(options, "submit")
    slurm, trackers = parse_overrides(options.slurm), find_trackers(options.track)
    matrix = read_matrix(base, task, over=options.over, configs=options.config, overrides=overrides)
    folder = folder_of(options, f"{matrix.name}-matrix")
    console = console_of(options)
    from ..grid.folder import matrix_table, write_table
    from ..grid.submit import Target, look_ahead, submit_matrix

    target = Target(options.executor, options.jobs, slurm, trackers)
    if options.dry_run:
        found = look_ahead(matrix, folder)
        print(matrix_table(found))
        return 2 if any(each.state == "refused" for each in found) else 0
    found = submit_matrix(matrix, folder, target, wait=options.wait, console=console)
    print(matrix_table(found))
    print(f"table: {write_table(folder, found).resolve()}")
    if any(each.state == "running" for each in found):
        print("the same command prints what has finished; it submits no job that still runs")
    return 2 if any(each.state == "failed" for each in found) else 0
