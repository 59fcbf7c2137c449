"""Failures of code that is not ours, as one sentence that names what it was given: a row, a model."""

import errno
import logging
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from semalign_geometry.base import SemalignError

_LOG = logging.getLogger(__name__)
_TOOLS = {"torch", "numpy", "pydantic", "safetensors", "jaxtyping", "beartype", *sys.stdlib_module_names}
"""Packages whose errors are those of their caller."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn a failure of foreign code inside the block into a `SemalignError` that begins with `what`.

    Foreign is a failure that no code of the five packages is the last caller of: of a model or its files, a template, a
    tokenizer, an installed plug-in. Our own mistakes keep their class and their traceback, `AssertionError` among them,
    and a full disk stays an `OSError`. `--verbose` shows the traceback of what was turned into a sentence.

    Args:
        what: names the row or the model, and what could not be done with it.

    Raises:
        SemalignError: foreign code failed, or the memory is full.
    """
    try:
        yield
    except SemalignError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        if is_full_memory(error):
            _LOG.debug(what, exc_info=True)
            raise SemalignError(f"{what}: {memory_message(error)}") from error
        if not _is_foreign(error):
            raise
        _LOG.debug(what, exc_info=True)
        raise SemalignError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The class and the first sentence of the message of an error, on one line."""
    message = " ".join(str(error).split()).partition(". ")[0]
    return textwrap.shorten(f"{type(error).__name__}: {message}", 240, placeholder=" …").removesuffix(":")


def is_full_memory(error: Exception) -> bool:
    """Whether an error says that the memory of this machine or of a device is full."""
    # torch has a class for CUDA alone.
    told = isinstance(error, RuntimeError) and re.search(r"(out of|not enough|can't allocate) memory", str(error))
    return bool(told) or isinstance(error, MemoryError | torch.OutOfMemoryError)


def memory_message(error: Exception) -> str:
    """What helps where the memory is full."""
    return (
        f"the memory is full ({reason(error)}): lower batch_size and, in a run, train.micro_batch_size, or choose a "
        "device with more of it"
    )


def _is_foreign(error: Exception) -> bool:
    """By the innermost frame that is of no tool."""
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _TOOLS:
            return not package.startswith("semalign_")
    return True
