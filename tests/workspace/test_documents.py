"""The documents name what exists: files, commands with their settings, sessions of nox."""

import argparse
import ast
import re
import shlex
from collections.abc import Iterator, Sequence

import pytest
from semalign_harness import Experiment, load_experiment
from semalign_harness.cli._options import named_experiment
from semalign_harness.cli.main import COMMANDS, EXAMPLES, main
from semalign_harness.comparison import overrides_of_methods
from semalign_harness.evaluation import EvaluationConfig
from semalign_harness.grid.matrix import read_matrix
from semalign_harness.loading import pair_names
from semalign_harness.methods import find_methods, settings_of
from semalign_harness.util.settings import merged, parse_overrides

from ..components import bring
from .projects import PROJECTS, ROOT, Project
from .test_contributing import GROUPS

DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *(project.folder / "README.md" for project in PROJECTS),
    *sorted((ROOT / "harness/docs").glob("*.md")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
SOURCES = {project.module: project.source for project in PROJECTS}

each_document = pytest.mark.parametrize("document", TEXTS)


@each_document
def test_links_lead_somewhere(document: str) -> None:
    for target, place in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXTS[document]):
        if "://" not in target:
            path = (ROOT / document).parent / target if target else ROOT / document
            assert path.exists(), target
            assert not place or place in places(path.read_text(encoding="utf-8")), f"{target}#{place}"


def places(text: str) -> set[str]:
    """What a link into a Markdown text calls its headings."""
    titles = re.findall(r"^#+ (.+)", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-").lower() for title in titles}


@pytest.mark.parametrize("project", PROJECTS[:-1], ids=lambda project: project.name)
def test_a_library_says_how_to_install_and_extend_it(project: Project) -> None:
    text = (project.folder / "README.md").read_text(encoding="utf-8")
    needed = [each for each in PROJECTS if each.name in {project.name, *project.requirements}]
    assert f"\npip install {' '.join(f'./{each.folder.relative_to(ROOT)}' for each in needed)}\n" in text
    assert "](../../CONTRIBUTING.md#" in text


@each_document
def test_named_files_are_there(document: str) -> None:
    pattern = r"(?<![\w/.-])(?:\./)?((?:packages|harness|tests|\.ci|semalign_\w+)/[\w./-]+|[A-Z]+\.(?:md|cff))\b"
    for name in re.findall(pattern, TEXTS[document]):
        first, _, rest = name.partition("/")
        path = SOURCES[first] / rest if first in SOURCES else ROOT / name
        assert path.exists(), name


def commands() -> list[str]:
    """Every command line of the help and of fenced blocks, without the remark to its right."""
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.M | re.S)
    blocks = [block for text in TEXTS.values() for language, block in fence.findall(text) if not language]
    joined = [re.sub(r"\\\n *", "", block) for block in [*blocks, EXAMPLES]]
    lines = [line.strip().removeprefix("$ ") for block in joined for line in block.splitlines()]
    named = [line for line in lines if line.startswith("semalign ")]
    return sorted({line.partition("  ")[0] for line in named})


class Parsed(Exception):
    """Ends a command once its arguments are parsed."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_intermixed_args

    def parse_only(self: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        raise Parsed(parse(self, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_only)
    with pytest.raises(Parsed) as parsed:
        main(shlex.split(line)[1:])
    bring(monkeypatch, GROUPS)
    check_settings(parsed.value.options)


def check_settings(options: argparse.Namespace) -> None:
    """The settings that a command names are known, and fit."""
    if hasattr(options, "model"):
        EvaluationConfig.parse(parse_overrides(["model.path=model", *options.overrides]))
        return
    base, task, overrides, own = "tiny", None, getattr(options, "overrides", []), {}
    if hasattr(options, "experiment"):
        base, task, overrides = named_experiment(options, "a command")
    if hasattr(options, "methods"):
        overrides, own = overrides_of_methods(overrides, find_methods(options.methods))
    if base not in pair_names():
        assert base.endswith(".yaml"), base
        base = "tiny"
    if getattr(options, "over", []):
        read_matrix(base, task, over=options.over, overrides=overrides)
    tree = load_experiment(base, task, overrides=overrides).model_dump(mode="json")
    for name, settings in own.items():
        Experiment.parse(merged(merged(tree, settings_of(name)), parse_overrides(settings)))


@each_document
def test_commands_named_in_a_sentence_exist(document: str) -> None:
    for command in re.findall(r"`semalign ([^` ]+)", TEXTS[document]):
        assert command in COMMANDS


def sessions() -> Iterator[tuple[str, list[str]]]:
    """Name and tags of each session in noxfile.py."""
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "nox.session":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in decorator.keywords}
                yield given.get("name", getattr(node, "name", "")), given.get("tags", [])


@each_document
def test_named_sessions_exist(document: str) -> None:
    tags = {tag for _, tags in sessions() for tag in tags}
    known = {"-s": {name for name, _ in sessions()}, "-t": tags}
    for option, named in re.findall(r"nox (-[st]) +\"?(\w+)", TEXTS[document]):
        assert named in known[option], f"nox {option} {named}"


def test_the_readme_names_every_session() -> None:
    section = TEXTS["README.md"].partition("\n## Development\n")[2].partition("\n## ")[0]
    for name, _ in sessions():
        assert f"`{name}`" in section, name


def test_every_public_package_has_an_api_page() -> None:
    text = (ROOT / ".ci/docs.py").read_text(encoding="utf-8")
    texts = {path.parent.name: path.read_text("utf-8") for path in SOURCES["semalign_harness"].glob("*/__init__.py")}
    parts = [name for name, text in texts.items() if "__all__" in text]
    for name in [*SOURCES, *(f"semalign_harness.{part}" for part in parts)]:
        assert f'"{name}",' in text, name


def test_there_are_commands_and_sessions() -> None:
    assert len(commands()) > 20 and len(list(sessions())) > 5
