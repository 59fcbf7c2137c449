"""The rooms of the harness: each imports only rooms below it, imports inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .projects import ROOT

SOURCE = ROOT / "harness/src/semalign_harness"
FLOORS = (
    ("cli",),
    ("report",),
    ("comparison",),
    ("evaluation",),
    ("grid",),
    ("doctor",),
    ("run",),
    ("results",),
    ("loading",),
    ("experiment",),
    ("methods",),
    ("models",),
    ("benchmarks",),
    ("data",),
    ("generation", "reading", "sandbox", "statistics"),
    ("util",),
)
"""Rooms from the roof down; rooms of one floor do not import each other."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FACES = {"__init__", "__main__"}
"""Modules above all rooms: the public names of the package, and `python -m`."""


def modules() -> dict[str, Path]:
    """Every module by its dotted name inside the package."""
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(name: str, text: str) -> Iterator[str]:
    """Modules of the package that a module imports anywhere, by their dotted names."""
    known, parents = modules(), name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("semalign_harness.")]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("semalign_harness")):
            given = (node.module or "").split(".") if node.module else []
            base = parents[: len(parents) - node.level + 1] + given if node.level else given[1:]
            found = [
                [*base, alias.name] if ".".join([*base, alias.name]) in _places(known) else base for alias in node.names
            ]
        else:
            continue
        for parts in found:
            dotted = ".".join(parts)
            yield f"{dotted}.__init__" if f"{dotted}.__init__" in known else dotted


def _places(known: dict[str, Path]) -> set[str]:
    return {name.removesuffix(".__init__") for name in known}


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    room = name.split(".")[0]
    if room in FACES:
        return
    for found in imports(name, modules()[name].read_text(encoding="utf-8")):
        below = found.split(".")[0]
        assert below not in FACES, f"{name} imports the face of the package"
        assert below == room or FLOOR[room] < FLOOR[below], f"{name} imports {found}, which is not below {room}"


def test_modules_form_no_circle() -> None:
    graph = {name: set(imports(name, path.read_text(encoding="utf-8"))) for name, path in modules().items()}
    while free := {name for name, below in graph.items() if not below & graph.keys()}:
        graph = {name: below for name, below in graph.items() if name not in free}
    assert not graph, f"circle among {sorted(graph)}"
