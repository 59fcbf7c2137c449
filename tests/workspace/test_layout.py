"""Files that every project carries, and the names it exports."""

import ast
import importlib
import inspect

import pytest

from .projects import PROJECTS, ROOT, Project

each_project = pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)


def test_versions_are_equal() -> None:
    assert len({project.table["version"] for project in PROJECTS}) == 1


@each_project
def test_project_files_are_present(project: Project) -> None:
    assert (project.folder / "README.md").is_file()
    assert (project.source / "py.typed").is_file()
    assert (project.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@each_project
def test_public_names_are_sorted_and_documented(project: Project) -> None:
    module = importlib.import_module(project.module)
    assert module.__doc__, f"{project.module} has no docstring"
    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            # A dataclass without a docstring gets its signature as one.
            if not doc or doc.startswith(f"{name}("):
                pytest.fail(f"{project.module}.{name} has no docstring")


@each_project
def test_no_loader_may_run_code_of_a_model(project: Project) -> None:
    for file in sorted(project.source.rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            of = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            if of.startswith("Auto") and call.func.attr in ("from_pretrained", "from_config"):
                trusts = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
                wrong = not (trusts and isinstance(trusts[0], ast.Constant) and trusts[0].value is False)
                assert not wrong, f"{file.name}:{call.lineno}: {of}.{call.func.attr} lacks trust_remote_code=False"
