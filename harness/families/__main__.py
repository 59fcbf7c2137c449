"""Check every family of causal language models that transformers builds, and write `harness/FAMILIES.md`."""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import child
from build import families
from report import document, line

PRELOADED = ["semalign_harness.pipeline", "transformers.models.llama.modeling_llama"]
"""Slow to import; none of them computes anything by being imported."""
PATIENCE = 600.0
"""Seconds after which a family is given up."""
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
    for name in names or families():
        found[name] = check_apart(name)
        print(line(name, found[name]), flush=True)
    if not names:
        versions = {name: version(name) for name in ("torch", "transformers")}
        FILE.write_text(document(found, versions), encoding="utf-8")
    return int(any("WRONG" in said or "TRACEBACK" in said for result in found.values() for said in result.values()))


def check_apart(family: str) -> Mapping[str, str]:
    """Result of `check.check_family` in a process of its own, so that one that is killed ends no other."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = context.Process(target=child.main, args=(family, str(answer)))
        process.start()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        if not answer.is_file():
            return {"refused": f"TRACEBACK the process ended with exit status {process.exitcode}"}
        result: dict[str, str] = json.loads(answer.read_text(encoding="utf-8"))
        return result


if __name__ == "__main__":
    sys.exit(main())
