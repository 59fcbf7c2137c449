"""Dataclasses of tensors in one line."""

from dataclasses import fields
from typing import Any


def short_repr(self: Any) -> str:
    """Show a dataclass with its tensors by dtype and shape, and long collections by their size.

    Head(weight=<float32 151936×1536>, bias=None, scale=1.0, softcap=None). Assigned to `__repr__` in a dataclass.
    """
    shown = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self))
    return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: object) -> str:
    from torch import Tensor  # not for contracts, which hold none

    if isinstance(value, Tensor):
        return f"<{' '.join([str(value.dtype).removeprefix('torch.'), '×'.join(map(str, value.shape))]).strip()}>"
    if isinstance(value, (tuple, list, dict, set, frozenset)) and len(value) > 8:
        return f"<{len(value)} items>"
    return f"<{type(value).__name__}>" if callable(value) else repr(value)
