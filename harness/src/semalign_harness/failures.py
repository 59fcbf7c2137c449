"""Failures of code that is not ours, as one sentence that names what it was given: a row, a model."""

import textwrap


def reason(error: BaseException) -> str:
    """The class and the beginning of the message of an error, on one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …").removesuffix(": ")
