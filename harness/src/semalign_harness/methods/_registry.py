"""The methods by name: those of the harness, and those that installed packages bring."""

from importlib.metadata import entry_points
from typing import Any

from semalign_geometry import SemalignError, Settings

from ._hidden import Hidden
from ._laten import LaTen
from ._method import Method
from ._output import Kd, Sft
from ._seeking import Seeking
from ._semalign import SemAlign

GROUP = "semalign.methods"
"""Entry points of this group name classes of methods: pydantic settings with a `kind`, that fulfil `Method`."""
KINDS: dict[str, type[Settings]] = {
    "semalign": SemAlign,
    "sft": Sft,
    "kd": Kd,
    "hidden": Hidden,
    "seeking": Seeking,
    "laten": LaTen,
}
"""The classes of methods that come along, by their kind."""


def known_kinds() -> dict[str, type[Settings]]:
    """The classes of all methods, those of installed packages included.

    Raises:
        SemalignError: a package brings something else, or a kind that is taken.
    """
    found = dict(KINDS)
    for entry in entry_points(group=GROUP):
        given: Any = entry.load()
        whose = f"the method {entry.name} of {entry.dist.name if entry.dist else 'an installed package'}"
        if not (isinstance(given, type) and issubclass(given, Settings) and hasattr(given, "run")):
            raise SemalignError(f"{whose} is no class of settings with a method `run`: uninstall it, or mend it")
        if entry.name in found:
            raise SemalignError(f"{whose} has the name of another method: give its entry point another name")
        found[entry.name] = given
    return found


def parse_method(value: Any) -> Settings:
    """A method from the mapping that YAML or JSON gives; `semalign` where no kind is named.

    Raises:
        SemalignError: there is no such method, or a setting of it is unknown or wrong.
    """
    if isinstance(value, Settings):
        return value
    if not isinstance(value, dict):
        raise SemalignError(f"method is {value!r}: expected settings such as method.kind=sft")
    kinds = known_kinds()
    kind = value.get("kind", "semalign")
    if kind not in kinds:
        raise SemalignError(f"unknown method {kind!r}: choose one of {', '.join(kinds)}")
    return kinds[kind].parse({**value, "kind": kind}, origin="method")


def as_method(value: Settings) -> Method:
    """The method that an experiment holds, as what it is."""
    assert isinstance(value, Method)
    return value
