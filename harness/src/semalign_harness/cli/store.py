"""`semalign store`: the supervision that is kept for further runs."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semalign_geometry.base import SemalignError

from ..util.tables import aligned
from ..util.text import gb

if TYPE_CHECKING:
    from ..run.phase_store import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("action", choices=("list", "prune"), help="print what is kept, or delete what is not used")
    parser.add_argument(
        "--unused-for", type=float, metavar="DAYS", help="prune what was unused for so long (default: 30; 0 for all)"
    )


def run(options: argparse.Namespace) -> int:
    """Print or delete supervision."""
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


def entries_table(found: Sequence["Entry"]) -> str:
    """Return the cached supervision, one entry a line."""
    rows = [("key", "source → target", "rows", "tokens", "size", "last used")]
    for entry in found:
        phase = entry.phase
        names, counts = "unfinished", ("", "")
        if phase is not None:
            names = f"{Path(phase.source).name} → {Path(phase.target).name}"
            counts = (str(phase.train_rows), str(phase.supervised_tokens))
        size, age = gb(entry.size), f"{entry.unused_days:.1f} days ago"
        rows.append((entry.folder.name, names, *counts, size, age))
    return aligned(rows)
