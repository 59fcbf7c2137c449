"""The command line as it was typed."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def typed(arguments: Sequence[str]) -> str:
    """Return a command line that starts the same command from the same folder, also where it is not on the PATH."""
    program = Path(sys.argv[0])
    package = __name__.partition(".")[0]
    if program.parts[-2:] == (package, "__main__.py"):
        return shlex.join([Path(sys.executable).name, "-m", package, *arguments])
    if program.name != "semalign" or not program.is_file():  # called by another program
        return shlex.join(["semalign", *arguments])
    found = shutil.which("semalign")
    if found is not None and program.samefile(found):
        return shlex.join(["semalign", *arguments])
    inside = program.absolute().is_relative_to(Path.cwd())
    return shlex.join([os.path.relpath(program) if inside else str(program.absolute()), *arguments])
