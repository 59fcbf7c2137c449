"""What an installed package brings through entry points, without a package."""

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest


class Entry(EntryPoint):
    """An entry point of the distribution `extras`; an error is raised when it is loaded."""

    def __init__(self, name: str, group: str, thing: Any, version: str | None, module: str = "extras") -> None:
        super().__init__(name, f"{module}:thing", group)
        dist = None if version is None else SimpleNamespace(name="extras", version=version)
        vars(self).update(thing=thing, dist=dist)

    def load(self) -> Any:
        if isinstance(vars(self)["thing"], Exception):
            raise vars(self)["thing"]
        return vars(self)["thing"]


def bring(
    monkeypatch: pytest.MonkeyPatch,
    things: Mapping[str, Sequence[tuple[str, Any]]],
    *,
    version: str | None = "1.5",
    module: str = "extras",
) -> list[str]:
    """Entry points by their groups, with their names; returns the groups that are asked for, as they are."""
    asked: list[str] = []

    def entry_points(*, group: str) -> list[Entry]:
        asked.append(group)
        return [Entry(name, group, thing, version, module) for name, thing in things.get(group, [])]

    monkeypatch.setattr("semalign_geometry.base._components.entry_points", entry_points)
    return asked
