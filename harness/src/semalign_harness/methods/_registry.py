"""The methods by name: those of the harness, and those that installed packages bring."""

from typing import Any

from semalign_geometry import Kinds, Settings

from ._hidden import Hidden
from ._method import Method
from ._output import Kd, Sft
from ._semalign import SemAlign
from .baselines.laten import LaTen
from .baselines.seeking import Seeking

KNOWN_METHODS = Kinds(
    "semalign.methods", "method", (SemAlign, Sft, Kd, Hidden, Seeking, LaTen), needs=("run", "stored")
)
"""The methods that a kind stands for, those of installed packages included."""


def known_kinds() -> dict[str, type[Settings]]:
    """The classes of all methods, those of installed packages included.

    Raises:
        SemalignError: a package brings something else, or a kind that is taken.
    """
    return KNOWN_METHODS.all()


def parse_method(value: Any) -> Settings:
    """A method from the mapping that YAML or JSON gives; `semalign` where no kind is named.

    Raises:
        SemalignError: there is no such method, or a setting of it is unknown or wrong.
    """
    return KNOWN_METHODS.parse(value, default="semalign")


def as_method(value: Settings) -> Method:
    """The method that an experiment holds, as what it is."""
    assert isinstance(value, Method)
    return value
