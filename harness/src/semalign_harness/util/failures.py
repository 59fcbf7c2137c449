"""Failures of foreign code as one sentence that names its input: a row, a model."""

import errno
import logging
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from semalign_geometry.base import SemalignError

_LOG = logging.getLogger(__name__)
_TOOLS = {"torch", "numpy", "pydantic", "safetensors", "jaxtyping", "beartype", *sys.stdlib_module_names}
"""Packages whose errors are those of their caller."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn a failure of foreign code, or a full memory, into a `SemalignError` on `what`.

    A failure is foreign if its innermost frame, tools aside, is of none of the five packages: of a
    model or its files, a template, a tokenizer, an installed plug-in. Our own mistakes keep their
    class and their traceback, and a full disk stays an `OSError`. `--verbose` shows the traceback
    of a foreign failure.

    Args:
        what: the row or the model, and the work that failed.
    """
    try:
        yield
    except SemalignError:
        raise
    except Exception as error:
        if is_full_memory(error):
            message = memory_message(error)
        elif _is_foreign(error) and not (isinstance(error, OSError) and error.errno in _FULL):
            message = reason(error)
        else:
            raise
        _LOG.debug(what, exc_info=True)
        raise SemalignError(f"{what}: {message}") from error


def reason(error: BaseException) -> str:
    """Return the class and the first sentence of the message of an error, on one line."""
    message = " ".join(str(error).split()).partition(". ")[0]
    return textwrap.shorten(f"{type(error).__name__}: {message}", 240, placeholder=" …").removesuffix(":")


def is_full_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of this machine or of a device is full."""
    # torch has a class for CUDA alone, and words for all.
    worded = isinstance(error, RuntimeError) and re.search(r"(out of|not enough|can't allocate) memory", str(error))
    return bool(worded) or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def memory_message(error: Exception) -> str:
    """Return advice for a full memory."""
    return (
        f"the memory is full ({reason(error)}): lower batch_size and, in a run, train.micro_batch_size, or choose a "
        "device with more of it"
    )


def _is_foreign(error: Exception) -> bool:
    """Return whether the innermost frame that is of no tool is of none of the five packages."""
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _TOOLS:
            return not package.startswith("semalign_")
    return True
