"""Measure the libraries beside their peers: `python harness/bench --help`."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case import BenchError
from catalogue import ROWS, Request
from report import document, lacking, table
from runner import Measurements, Settings, measure

PATIENCE = 60.0
"""Seconds after which a case is not repeated again, unless a number of repeats is asked for."""
EPILOG = """examples:
  python harness/bench --list
  python harness/bench --rows basis,kl --repeats 5
  python harness/bench --rows attribution,frontier,transfer --source source.gguf --target target.gguf --data rows.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line names; 0, 1 when a side failed or results differ, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        request, names = _request(options), _names(options.rows)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for name in names:
            print(f"{name:12} {ROWS[name].__doc__}")
        return 0
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        there = options.out.exists()
        options.out.open("a").close()
        if not there:
            options.out.unlink()
    except OSError as error:
        print(f"--out {options.out} cannot be written to: {error.strerror}", file=sys.stderr)
        return 2
    measured: list[Measurements] = []
    left_out: list[dict[str, str]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="semalign-bench-", ignore_cleanup_errors=True) as workspace:
        repeats = options.repeats or (3 if request.full else 1)
        seconds = PATIENCE if options.repeats is None else math.inf
        settings = Settings(options.device, options.dtype, repeats, seconds, Path(workspace))
        for case in (case for name in names for case in ROWS[name](request)):
            reason = lacking(case)
            if case.gib > options.memory:
                reason = f"takes about {case.gib:.0f} GiB, --memory allows {options.memory:g}"
            if reason:
                left_out.append({"row": case.row, "size": case.size, "reason": reason})
                continue
            try:
                measured.append(measure(case, settings, _tell))
            except BenchError as error:
                failures.append(str(error))
                _tell(f"FAILED: {error}")
    result = document(settings, options.scale, measured, left_out, failures)
    print(table(result), flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to measure, separated by commas")
    parser.add_argument("--list", action="store_true", help="list the rows, and measure nothing")
    parser.add_argument("--repeats", type=int, help="interleaved repeats (3, less after a minute; 1 at scale small)")
    parser.add_argument("--scale", choices=("small", "full"), default="full", help="small is a smoke of everything")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a side may take (8)")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON file of every repeat (bench.json)")
    parser.add_argument("--source", help="source of the rows of models: folder or .gguf file")
    parser.add_argument("--target", help="their target")
    parser.add_argument("--data", help="their rows, a .jsonl or .jsonl.gz file")
    parser.add_argument("--rows-used", type=int, help="rows of --data (enough for two steps of each layer)")
    parser.add_argument("--max-length", type=int, default=512, help="longest row of --data, in tokens (512)")
    return parser


def _names(rows: str) -> list[str]:
    """Names of the rows.

    Raises:
        BenchError: one is not known.
    """
    names = [name.strip() for name in rows.split(",") if name.strip()]
    for name in names:
        if name not in ROWS:
            raise BenchError(f"unknown row {name!r}: known are {', '.join(ROWS)}")
    return names


def _request(options: argparse.Namespace) -> Request:
    """What the rows depend on.

    Raises:
        BenchError: a real pair is named in part only, or does not exist; or less than one repeat is asked for.
    """
    if options.repeats is not None and options.repeats < 1:
        raise BenchError(f"--repeats is {options.repeats}, expected at least 1")
    named = {key: getattr(options, key) for key in ("source", "target", "data")}
    pair: dict[str, Any] | None = None
    if any(named.values()):
        for key, value in named.items():
            if not value:
                raise BenchError(f"--{key} is missing: a real pair needs --source, --target and --data")
            if not Path(value).exists():
                raise BenchError(f"--{key}: {value} does not exist")
        pair = {key: str(Path(value).resolve()) for key, value in named.items()}
        pair |= {"length": options.max_length, "rows": options.rows_used}
    return Request(options.scale == "full", options.device, pair)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
