"""`semalign compare`: several methods on one experiment."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from semalign_geometry.base import SemalignError

from ..methods import describe_methods
from ._options import (
    benchmark_arguments,
    check_alone,
    console_of,
    experiment_arguments,
    folder_of,
    given_benchmarks,
    named_experiment,
    output_arguments,
    read_experiment,
    track_argument,
)

if TYPE_CHECKING:
    from ..experiment import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    experiment_arguments(parser, settings="settings of all methods, or of one as METHOD:key.key=value")
    parser.add_argument(
        "--methods",
        default="all",
        metavar="NAMES",
        help="methods, with commas (default: all below); METHOD.NAME is a method with settings of its own",
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="method to test the others against (default: each metric's best baseline)"
    )
    parser.add_argument(
        "--seeds", metavar="N,N", help="seeds of training and of random pairings (default: the experiment's train.seed)"
    )
    benchmark_arguments(parser, tasks="default: none", limit="", sandbox="see semalign evaluate --help")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    track_argument(parser)
    output_arguments(
        parser,
        "folder of the comparison, which resumes there and takes further methods and seeds (default: "
        "runs/NAME-comparison)",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"methods, and their settings:\n\n{describe_methods()}"


def run(options: argparse.Namespace) -> int:
    """Run the methods, and print the table."""
    from ..comparison import overrides_of_methods
    from ..loading import task_names
    from ..methods import find_methods
    from ..results.comparison import Benchmarks, ComparisonConfig
    from ..run.tracking import find_trackers

    check_alone("compare")
    _, task, overrides = named_experiment(options, "compare")
    names = find_methods(options.methods)
    if options.against is not None and options.against not in names:
        raise SemalignError(f"--against {options.against}: name it among --methods too")
    stray = [] if task is None or task in task_names() else [task]  # perhaps a method without its comma
    shared, own = overrides_of_methods([*stray, *overrides], names)
    experiment = read_experiment(options, "compare", overrides=shared)
    given = given_benchmarks(options)
    if given and "tasks" not in given:
        raise SemalignError(
            "--data, --limit, --max-new-tokens, --chat, --plain and --allow-weak-sandbox are for benchmarks: name some "
            "with --tasks"
        )
    config = ComparisonConfig(
        experiment=experiment,
        methods=own,
        seeds=_seeds(options.seeds, experiment, shared),
        against=options.against,
        benchmarks=Benchmarks.parse(given, origin="benchmarks") if given else None,
    )
    folder, trackers = folder_of(options, f"{experiment.name}-comparison"), find_trackers(options.track)
    console = console_of(options)
    from ..comparison import compare, comparison_markdown
    from ..report.published import published_table

    found = compare(config, folder, jobs=options.jobs, trackers=trackers, console=console)
    print(comparison_markdown(found))
    for table in published_table(found):
        print(table)
    print(f"comparison folder: {folder.resolve()}")
    return 2 if any(each.missing for each in found.methods.values()) else 0


def _seeds(given: str | None, experiment: "Experiment", overrides: Sequence[str]) -> tuple[int, ...]:
    if given is None:
        return (experiment.train.seed,)
    if any(text.startswith("train.seed=") for text in overrides):
        raise SemalignError("--seeds and train.seed are the same setting: leave one of them out")
    try:
        seeds = tuple(int(seed) for seed in given.split(","))
    except ValueError:
        raise SemalignError(f"--seeds {given}: expected whole numbers with commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise SemalignError(f"--seeds {given} names a seed twice: leave one out")
    return seeds
