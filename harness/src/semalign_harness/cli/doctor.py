"""`semalign doctor`: check a pair of models before a run."""

import argparse
from pathlib import Path

from semalign_geometry.base import SemalignError

from ..util.console import Console
from ._options import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", help="the larger model: hub id, model folder or .gguf file")
    parser.add_argument("target", help="the smaller model, likewise")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings of the run to check")
    parser.add_argument("--data", metavar="FILE", help="file of training rows, or hub id of a data set, to check too")
    parser.add_argument("--deep", action="store_true", help="load both models, and compare their layers on some rows")
    parser.add_argument("--out", metavar="FILE", help="heat map of --deep (default: layers.svg)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.epilog = "Exit code: 0 without errors, 1 if a run would be refused, 2 for input that cannot be read."


def run(options: argparse.Namespace) -> int:
    """Print the findings."""
    if options.out is not None and not options.deep:
        raise SemalignError("--out is the heat map of --deep: give --deep too, or leave --out out")
    from ..doctor import read_settings

    experiment, has_rows = read_settings(options.source, options.target, options.data, options.overrides)
    quiet_libraries()
    from ..doctor import diagnose, diagnosis_text
    from ..report.plots import write_heat_map

    console = Console()
    diagnosis = diagnose(experiment, has_rows=has_rows, deep=options.deep, console=console)
    print(diagnosis.model_dump_json(indent=2) if options.json else diagnosis_text(diagnosis))
    if diagnosis.similarity:
        heat_map = write_heat_map(diagnosis.similarity, diagnosis.pairing, Path(options.out or "layers.svg"))
        console.note(f"heat map: {heat_map}, source × target layers, the pairing as dots")
    return 0 if diagnosis.is_usable else 1
