"""`semalign store`: the supervision that is kept for further runs."""

import argparse
import math

from semalign_geometry.base import SemalignError

from ..util.text import gb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("action", choices=("list", "prune"), help="print what is kept, or delete what is not used")
    parser.add_argument(
        "--unused-for", type=float, metavar="DAYS", help="prune what was unused for so long (default: 30; 0 for all)"
    )


def run(options: argparse.Namespace) -> int:
    """Print or delete supervision."""
    from ..report.result_tables import entries_table
    from ..run.phase_store import entries, prune

    if options.action == "list":
        if options.unused_for is not None:
            raise SemalignError("--unused-for is for prune: leave it out of list")
        found = entries()
        print(entries_table(found) if found else "no supervision is kept")
        return 0
    days = 30.0 if options.unused_for is None else options.unused_for
    if not (math.isfinite(days) and days >= 0):
        raise SemalignError(f"--unused-for {days:g}: expected a number of days, 0 or more; 0 deletes all")
    gone = prune(unused_days=days)
    print(f"deleted {len(gone)} of {len(gone) + len(entries())}, {gb(sum(entry.size for entry in gone))}")
    return 0
