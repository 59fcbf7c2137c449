"""Thoughts before an answer."""

import re

_END = re.compile(r"</think(?:ing)?>|\[/THINK\]")
_BEGIN = re.compile(r"\s*(?:<think(?:ing)?>|\[THINK\])")


def after_thoughts(text: str) -> str:
    """The text after the last `</think>` (`</thinking>`, `[/THINK]`).

    Text that begins with `<think>` and never closes it was cut off while the model thought: it holds no answer, and
    the result is empty. Where the prompt itself opens `<think>`, such text has no mark and is taken as it is.
    """
    ends = list(_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return "" if _BEGIN.match(rest) else rest
