"""Check every family of causal language models that transformers builds, and write `harness/FAMILIES.md`."""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

from family_checks import check_family, quiet
from family_table import document, line
from tiny_families import families

FILE = Path(__file__).parents[1] / "FAMILIES.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the families that the command line names, or all; 0, 1 when a figure is wrong, 2 for an unknown name."""
    parser = argparse.ArgumentParser(prog="families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="check these alone, and write no file")
    names = parser.parse_args(arguments).names
    unknown = [name for name in names if name not in families()]
    if unknown:
        print(f"unknown family {unknown[0]!r}: known are {', '.join(families())}", file=sys.stderr)
        return 2
    found = {}
    for name, result in checked(names or families()):
        found[name] = result
        print(line(name, result), flush=True)
    if not names:
        versions = {name: version(name) for name in ("torch", "transformers")}
        FILE.write_text(document(found, versions), encoding="utf-8")
    return int(any("WRONG" in said or "TRACEBACK" in said for result in found.values() for said in result.values()))


def checked(names: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Result of `check_family` for each name, by a second process; a family that ends it costs only itself."""
    rest = list(names)
    while rest:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=quiet) as second:
            try:
                while rest:
                    yield rest[0], second.submit(check_family, rest[0]).result()
                    rest.pop(0)
            except BrokenProcessPool:
                yield rest.pop(0), {"refused": "TRACEBACK the process was killed"}


if __name__ == "__main__":
    sys.exit(main())
