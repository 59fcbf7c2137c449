"""The methods by name: those of the harness, and those that installed packages bring."""

from typing import Any, cast

from semalign_geometry.base import Kinds, Settings

from ._alm import Alm
from ._gold import Gold
from ._hidden import Hidden
from ._kd import Kd
from ._laten import LaTen
from ._method import Method
from ._seeking import Seeking
from ._semalign import SemAlign
from ._sft import Sft

KNOWN_METHODS = Kinds(
    "semalign.methods",
    "method",
    (SemAlign, Sft, Kd, Hidden, Gold, Alm, Seeking, LaTen),
    needs=("check", "needs", "run", "stored", "work"),
)
"""The methods that a kind stands for, those of installed packages included."""


def known_kinds() -> dict[str, type[Settings]]:
    """Return the classes of all methods, those of installed packages included.

    Raises:
        SemalignError: a package brings something else, or a kind that is taken.
    """
    return KNOWN_METHODS.all()


def parse_method(value: Any) -> Method:
    """Read a method from a mapping of YAML or JSON; `semalign` where no kind is named.

    Raises:
        SemalignError: there is no such method, or a setting of it is unknown or wrong.
    """
    return cast(Method, KNOWN_METHODS.parse(value, default="semalign"))
