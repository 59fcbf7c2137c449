"""The five projects as their `pyproject.toml` and sources declare them."""

import ast
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Project:
    folder: Path

    @cached_property
    def table(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]

    @property
    def name(self) -> str:
        return self.table["name"]

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.module

    @cached_property
    def requirements(self) -> dict[str, Requirement]:
        """Every requirement by distribution name, extras included."""
        lines = [*self.table["dependencies"]]
        for extra in self.table.get("optional-dependencies", {}).values():
            lines += extra
        return {canonicalize_name(r.name): r for r in map(Requirement, lines)}

    @cached_property
    def imports(self) -> dict[str, str]:
        """Every absolutely imported top-level module, with one place that imports it."""
        places = {}
        for path in sorted(self.source.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                for name in names:
                    places.setdefault(name.partition(".")[0], f"{path.relative_to(ROOT)}:{node.lineno}")
        return places


# From left to right: a project imports only what stands before it.
PROJECTS = [
    Project(ROOT / "packages/semalign-geometry"),
    Project(ROOT / "packages/semalign-attribution"),
    Project(ROOT / "packages/semalign-align"),
    Project(ROOT / "packages/semalign-train"),
    Project(ROOT / "harness"),
]
