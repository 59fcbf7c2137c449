"""`semalign compare-evaluations`: two evaluations item by item, or several over their seeds."""

import argparse
import sys
from pathlib import Path

from semalign_geometry.base import SemalignError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("first", type=Path, help="folder of an evaluation")
    parser.add_argument("second", type=Path, help="folder of another evaluation of the same documents")
    parser.add_argument("more", type=Path, nargs="*", help="further evaluations: all are then those of training seeds")
    parser.add_argument("--source", type=Path, metavar="DIR", help="evaluation of the source, for the gap recovered")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the bootstrap (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Print the differences, or the mean and spread over the seeds."""
    from ..evaluation import over_seeds, pair, pair_table, read_evaluation, seeds_table

    if options.more and (options.source is not None or options.seed is not None):
        raise SemalignError("--source and --seed are for two evaluations, before and after: leave them out")
    evaluations = [read_evaluation(folder) for folder in (options.first, options.second, *options.more)]
    if options.more:
        print(seeds_table(over_seeds(evaluations)))
    else:
        source = read_evaluation(options.source) if options.source else None
        print(pair_table(pair(*evaluations, source=source, seed=options.seed or 0)))
    if len(dtypes := {found.result.dtype for found in evaluations}) > 1:
        print(
            f"semalign: they computed in {' and '.join(sorted(dtypes))}, which alone changes answers", file=sys.stderr
        )
    return 0
