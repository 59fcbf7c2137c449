"""The examples of extending.md are the package that the tests of the harness install and run."""

import ast
import re

import pytest
import yaml
from semalign_harness import Experiment, load_experiment
from semalign_harness.util.settings import merged

from ..components import bring
from ..harness.external import semalign_example
from .projects import ROOT

TEXT = (ROOT / "harness/docs/extending.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "tests/harness/external"
GROUPS = {
    "semalign.scorers": [("relative_size", semalign_example.RelativeSize)],
    "semalign.pairings": [("deepest", semalign_example.Deepest)],
    "semalign.frames": [("between", semalign_example.BETWEEN)],
    "semalign.objectives": [("huber", semalign_example.Huber)],
    "semalign.methods": [("gains", semalign_example.Gains)],
    "semalign.tasks": [("parity", semalign_example.PARITY)],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.M | re.S)


def test_the_example_package_is_shown_whole() -> None:
    source = (EXAMPLE / "semalign_example.py").read_text(encoding="utf-8")
    python = "\n".join(blocks("python"))
    definitions = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign)
    ]
    assert len(definitions) == 10
    for node in definitions:
        assert f"{ast.get_source_segment(source, node)}\n" in python
    assert blocks("toml") == [(EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")]


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_laid_over_an_experiment(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, GROUPS)
    tiny = load_experiment("tiny").model_dump(mode="json")
    tree = merged(tiny, yaml.safe_load(block))
    written = Experiment.parse(tree, origin="extending.md").model_dump(mode="json")
    assert merged(written, yaml.safe_load(block)) == written != tiny


def test_every_group_is_named() -> None:
    table = next(line for line in TEXT.split("\n\n") if line.startswith("| sort"))
    for group in GROUPS:
        assert f"`{group}`" in table and f'[project.entry-points."{group}"]' in TEXT
    for file in re.findall(r"`semalign_(\w+)/([\w./]+)` \|$", table, flags=re.M):
        package, place = file
        folder = ROOT / ("harness" if package == "harness" else f"packages/semalign-{package}")
        assert (folder / f"src/semalign_{package}" / place).exists(), file
