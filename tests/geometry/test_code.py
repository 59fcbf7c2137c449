"""The hash of a component's code: another one after every edit that may matter, the same one after none."""

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from semalign_geometry import FRAMES, KNOWN_FRAMES
from semalign_geometry.base import Components, code_sha256

NAMES = ("written", "helping", "other", "grouped")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    importlib.invalidate_caches()


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_an_edited_module_is_another_code(here: Path) -> None:
    write(here / "written.py", "FACTOR = 1\nclass Thing:\n    def run(self): return FACTOR\n")
    thing = load("written").Thing
    before = code_sha256(thing)
    assert before == code_sha256(thing)
    write(here / "written.py", "FACTOR = 2\nclass Thing:\n    def run(self): return FACTOR\n")
    assert code_sha256(thing) != before


@pytest.mark.parametrize(
    "line", ["import helping", "import sys, helping as h", "from helping import x", "from helping.deep import x"]
)
@pytest.mark.parametrize("place", ["helping.py", "helping/deep.py"])
def test_what_a_module_imports_from_beside_it_counts(line: str, place: str, here: Path) -> None:
    write(here / "written.py", f"class Thing:\n    def run(self):\n        {line}\n")
    write(here / place, "x = 1\n")
    write(here / "other.py", "x = 1\n")
    thing = load("written").Thing
    before = code_sha256(thing)
    write(here / "other.py", "x = 2\n")
    assert code_sha256(thing) == before, "nothing imports it"
    write(here / place, "x = 2\n")
    assert code_sha256(thing) != before


def test_all_files_of_a_package_count(here: Path) -> None:
    write(here / "grouped" / "__init__.py", "")
    write(here / "grouped" / "things.py", "class Thing: ...\n")
    write(here / "grouped" / "inner" / "more.py", "x = 1\n")
    thing = load("grouped.things").Thing
    before = code_sha256(thing)
    (here / "grouped" / "__pycache__").mkdir(exist_ok=True)
    (here / "grouped" / "__pycache__" / "more.pyc").write_bytes(b"3")
    assert code_sha256(thing) == before
    write(here / "grouped" / "inner" / "more.py", "x = 2\n")
    assert code_sha256(thing) != before


def test_neighbours_of_installed_packages_do_not_count(here: Path) -> None:
    (here / "written-1.0.dist-info").mkdir()
    write(here / "written.py", "import helping\nclass Thing: ...\n")
    write(here / "helping.py", "x = 1\n")
    thing = load("written").Thing
    before = code_sha256(thing)
    write(here / "helping.py", "x = 2\n")
    assert code_sha256(thing) == before


def script(body: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of `Thing` in a script."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(here / "script.py"), raising=False)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(body), str(here / "script.py"), "exec"), names)
    return code_sha256(names["Thing"])


THING = """
    import functools
    import helping
    SCALE = 2
    UNUSED = 1
    RATES = {"alpha": [1, 2]}
    WORDS = {"one", "two"}
    LARGEST = functools.partial(max, 5, key=abs)
    def double(x): return SCALE * x + RATES["alpha"] + LARGEST(x) + len(WORDS)
    def logged(function):
        @functools.wraps(function)
        def inner(*given): return function(*given)
        return inner
    class Thing:
        rate = 0.5
        @property
        def name(self): return "thing"
        @staticmethod
        @logged
        def total(step, more=3, some={1, 2}): return double(step) + helping.x + len({"a", "b"})
    print(end="")
"""


def test_a_class_of_a_script_is_read_by_its_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "helping.py", "x = 1\n")
    same = ["UNUSED = 2", "UNUSED = 1\n\n    # a remark"]
    edits = ["SCALE = 3", "SCALE + x", "more=4", "rate = 0.6", '"thong"']
    places = ["UNUSED = 1", "UNUSED = 1", "SCALE = 2", "SCALE * x", "more=3", "rate = 0.5", '"thing"']
    edits += ["[1, 3]", '{"beta":', '"three"}', "(max, 6", "(min, 5", "key=len", "{1, 3}"]
    places += ["[1, 2]", '{"alpha":', '"two"}', "(max, 5", "(max, 5", "key=abs", "{1, 2}"]
    first, *hashes = (
        script(THING.replace(old, new), here, monkeypatch)
        for old, new in zip(["", *places], ["", *same, *edits], strict=True)
    )
    assert hashes[:2] == [first, first]
    assert len({first, *hashes}) == 1 + len(edits)
    write(here / "helping.py", "x = 2\n")
    assert script(THING, here, monkeypatch) != first


def test_a_component_that_comes_along_has_no_code() -> None:
    assert KNOWN_FRAMES.code(FRAMES["dual"]) == {}


def test_components_are_found_by_their_sort_and_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "written.py", "class Thing:\n    name = 'it'\nTHING = Thing()\n")
    things: Components[Any] = Components("g", "thing", {}, expected="", fits=bool, name_of=lambda given: given.name)
    module = load("written")
    (key,) = things.code(module.Thing)
    assert key == "thing it"
    assert things.code(module.Thing, name="own") == {"thing own": code_sha256(module.Thing)}
