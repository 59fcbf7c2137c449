"""Rows of start-up: a whole command in a fresh interpreter, beside the import of torch alone."""

import subprocess
import sys
import tempfile

from meter import Meter


def startup_ours(meter: Meter, *, command: str) -> None:
    """Run a command of `semalign` in an empty folder; its exit code is not checked, as mistakes are measured too."""
    _run(meter, "-m", "semalign_harness", *command.split())


def startup_import(meter: Meter, *, command: str) -> None:
    """Import every public name of a package."""
    _run(meter, "-c", f"from {command} import *")


def startup_peer(meter: Meter, *, command: str) -> None:
    """Import torch."""
    _run(meter, "-c", "import torch")


def _run(meter: Meter, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as folder, meter.time():
        subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)
