"""`semalign report`: one page about runs or comparisons."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder, with evaluations of its models; several run folders; or folders of comparisons",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="HTML file (default: report.html, in the folder if there is only one)"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write each plot into DIR as an SVG file")


def run(options: argparse.Namespace) -> int:
    """Write the page."""
    from ..report import write_report

    file = write_report(options.folders, options.out, plots=options.plots)
    print(f"report: {file.resolve()} and {file.with_suffix('.md').name}")
    return 0
