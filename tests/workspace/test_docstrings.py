"""Docstrings begin with a verb or a noun phrase."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .projects import PROJECTS, Project


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone as a statement: of modules, classes, functions and fields."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_no_docstring_begins_with_what_or_how(project: Project) -> None:
    files = sorted(project.source.rglob("*.py"))
    found = [(file, line, text) for file in files for line, text in docstrings(file)]
    assert found, f"{project.name} has no docstrings"
    wrong = [
        f"{file.relative_to(project.source)}:{line}: {text.strip().splitlines()[0]}"
        for file, line, text in found
        if text.split()[:1] and text.split()[0] in ("What", "How")
    ]
    assert not wrong, "begin with a verb or a noun phrase:\n" + "\n".join(wrong)
