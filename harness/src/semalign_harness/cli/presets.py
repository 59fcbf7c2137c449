"""`semalign presets`: the built-in pairs of models and tasks."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "semalign run PAIR TASK runs a task of a pair; a pair alone runs its first task."


def run(options: argparse.Namespace) -> int:
    """Print the pairs with what they need, and the tasks."""
    from ..loading import describe_tasks, load_experiment, pair_names
    from ..run.estimate import presets_table

    print(presets_table(load_experiment(name) for name in pair_names()))
    print(f"\n{describe_tasks()}")
    return 0
