"""Run one command: parse its arguments, and turn every failure into a sentence and an exit code."""

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from semalign_align import RaisedElsewhere
from semalign_geometry.base import SemalignError

from ..util.cache import cache_folder
from ..util.console import interruptible, logged
from ..util.failures import is_full_memory, memory_message
from ._typed import typed

_RESUMED = ("run", "submit", "compare", "sweep", "evaluate")
"""Commands that resume where they were interrupted."""


def execute(command: str, given: Sequence[str], description: str) -> int:
    """Run a command with its arguments; returns the exit code."""
    module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
    # A parser for each command, as argparse does not intermix the options and overrides of subcommands.
    parser = argparse.ArgumentParser(prog=f"semalign {command}", description=description)
    module.add_arguments(parser)
    options = parser.parse_intermixed_args(given[1:])
    try:
        with interruptible(), logged(verbose=getattr(options, "verbose", False)):
            if (out := getattr(options, "out", None)) is not None:
                options.out = _place(out)
            code: int = module.run(options)
            sys.stdout.flush()
            return code
    except RaisedElsewhere:
        return 2  # the first process prints the reason
    except SemalignError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 0
    except OSError as error:
        return _fail(_disk_message(error))
    except KeyboardInterrupt as interrupt:
        place = str(interrupt) if command == "run" else ""
        print(f"semalign: interrupted{_resumption(command, given, place)}", file=sys.stderr)
        return 130
    except Exception as error:
        if is_full_memory(error):
            return _fail(memory_message(error))
        traceback.print_exc()
        print("semalign: this is a bug: please report the lines above, and the command", file=sys.stderr)
        return 3
    finally:
        _leave()


def _leave() -> None:
    """Disconnect from the other processes of the job, where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ..util.resources import leave  # with torch

        leave()


def _place(out: str) -> Path:
    if not out:
        raise SemalignError("--out is empty: name a place, or leave it out")
    return Path(out)


def _resumption(command: str, given: Sequence[str], place: str) -> str:
    """Sentence that names the command which resumes, and the place; empty for a command without one."""
    pulls = command == "models" and "pull" in given
    if not pulls and command not in _RESUMED:
        return ""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1  # by a command that is not known here
    return f"; the same command resumes {place}".rstrip() + ("" if launched else f": {typed(given)}")


def _disk_message(error: OSError) -> str:
    full = (errno.ENOSPC, errno.EDQUOT)
    if error.errno in full or any(os.strerror(number) in str(error) for number in full):
        return (
            f"the disk is full ({error}): free some space, or choose another place with --out, and for the cache of "
            "models with the environment variable SEMALIGN_CACHE"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        of_cache = Path(str(error.filename)).is_relative_to(cache_folder())
        out = "" if of_cache else "--out, and for the cache of models and supervision with "
        return (
            f"{error.filename} cannot be written to ({error.strerror}): choose another place with {out}the environment "
            "variable SEMALIGN_CACHE"
        )
    if error.filename is None:
        return str(error)
    return (
        f"{error.filename} can be neither read nor written ({error.strerror}): check the path, or choose another place"
    )


def _fail(message: str) -> int:
    print(f"semalign: {message}", file=sys.stderr)
    return 2
