"""Identity of code that users write: an edited component is another one, whatever its settings and version."""

import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path
from typing import Any

_IMPORT = re.compile(rb"^[ \t]*(?:from[ \t]+(\w+)|import[ \t]+([\w., \t]+))", re.MULTILINE)
_CONSTANTS = (int, float, complex, str, bytes, bool, type(None))


def code_sha256(component: Any, *modules: str) -> str:
    """Hash of the text that a component is written in.

    Covered are all source and extension files of its package, or the file of its module; and, as far as they are no
    installed packages, the modules and packages beside it that they import, and so on. A component that was written in
    a notebook, a console or the script that runs is read by its compiled code instead: its methods, what they call of
    the same place, and what they read there: numbers, texts, lists, tuples, dicts, sets and partial functions of them.
    Such a hash also depends on the version of Python.

    Not covered are other installed packages; other objects that code of a notebook, console or script reads there, such
    as tensors and instances of classes; and what code reads when it runs, such as files and environment variables.

    Args:
        component: a class or function; or another object, which is read by `modules` alone.
        modules: names of further modules whose text belongs to it, such as the one that its entry point names.
    """
    names, lines = [*modules], list[str]()
    if isinstance(component, type | types.FunctionType):
        names.append(component.__module__)
        if _place(component.__module__) is None:
            walk = _Walk(component.__module__)
            lines = list(walk.lines(component))
            names += [name for name in sorted(walk.others) if _is_beside_the_script(name)]
    digest = hashlib.sha256("\n".join(lines).encode())
    for file, content in sorted(_files(names).items()):
        digest.update(f"{file} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(names: list[str]) -> dict[str, bytes]:
    """Contents of the files of modules, and of what they import from beside them, by their path from there."""
    found: dict[str, bytes] = {}
    waiting, seen = [name.partition(".")[0] for name in names], set[str]()
    while waiting:
        top = waiting.pop()
        place = _place(top)
        if top in seen or place is None:
            continue
        seen.add(top)
        suffixes = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)
        files = [place] if place.is_file() else [file for file in place.rglob("*") if file.name.endswith(suffixes)]
        beside = place.parent
        is_installed = any(beside.glob("*.dist-info"))
        for file in files:
            content = found[file.relative_to(beside).as_posix()] = file.read_bytes()
            if not is_installed and file.suffix == ".py":
                waiting += [name for name in _imports(content) if (near := _place(name)) and near.parent == beside]
    return found


def _place(name: str) -> Path | None:
    """The file of a top-level module, or the folder of a package; None where it has neither."""
    top = name.partition(".")[0]
    try:
        spec = None if top == "__main__" else importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    place = Path(folders[0]) if folders else Path(spec.origin or "")
    return place if place.exists() and place.name else None


def _imports(text: bytes) -> set[str]:
    """Top-level names that a module imports, inside of functions too; and those that only look like it, in a text."""
    names = [name for _from, listed in _IMPORT.findall(text) for name in (_from, *listed.split(b","))]
    return {name.split(b".")[0].split(b" as ")[0].strip().decode() for name in names} - {"", *sys.stdlib_module_names}


def _is_beside_the_script(name: str) -> bool:
    """Whether a module lies in the folder of the script that runs, or in the current folder without a script."""
    folder = Path(getattr(sys.modules["__main__"], "__file__", None) or "x").absolute().parent
    place = _place(name)
    return place is not None and place.absolute().parent == folder and not any(folder.glob("*.dist-info"))


class _Walk:
    """Walk over the code of a class or function, and over all that it reads and calls in its own module."""

    def __init__(self, module: str) -> None:
        self.others: set[str] = set()
        """Modules that were met besides."""
        self._module, self._seen = module, set[int]()

    def lines(self, thing: Any) -> Iterator[str]:
        """Lines that are others where the code is another."""
        if isinstance(thing, _CONSTANTS):
            yield repr(thing)
        elif isinstance(thing, tuple | list):
            yield f"{len(thing)} parts"
            for part in thing:
                yield from self.lines(part)
        elif isinstance(thing, dict):
            yield from self.lines([*thing, *thing.values()])
        elif isinstance(thing, set | frozenset):
            yield from sorted("\n".join(self.lines(part)) for part in thing)
        elif isinstance(thing, functools.partial):
            yield from self.lines((thing.func, thing.args, thing.keywords))
        elif isinstance(thing, types.BuiltinFunctionType):
            yield thing.__qualname__
        elif isinstance(thing, types.ModuleType):
            self.others.add(thing.__name__)
        elif isinstance(thing, property):
            yield from self.lines((thing.fget, thing.fset))
        elif isinstance(thing, staticmethod | classmethod):
            yield from self.lines(thing.__func__)
        elif isinstance(thing, functools.cached_property):
            yield from self.lines(thing.func)
        elif isinstance(thing, type) or callable(thing):
            code = inspect.unwrap(thing)
            if isinstance(code, type | types.FunctionType) and id(code) not in self._seen:
                self._seen.add(id(code))
                if code.__module__ != self._module:
                    self.others.add(code.__module__)
                else:
                    yield from self._class(code) if isinstance(code, type) else self._function(code)

    def _class(self, code: type) -> Iterator[str]:
        yield f"class {code.__qualname__}"
        for name, value in vars(code).items():
            inner = [] if name.startswith("__pydantic") or name == "__firstlineno__" else list(self.lines(value))
            yield from [name, *inner] if inner else []
        yield from self.lines(code.__bases__)

    def _function(self, code: types.FunctionType) -> Iterator[str]:
        yield f"def {code.__qualname__}"
        yield from _instructions(code.__code__)
        yield from self.lines((code.__defaults__ or (), tuple((code.__kwdefaults__ or {}).values())))
        read = inspect.getclosurevars(code)
        for name, value in sorted({**read.globals, **read.nonlocals}.items()):
            yield name
            yield from self.lines(value)


def _instructions(code: types.CodeType) -> Iterator[str]:
    """Operations, names and constants, without places in a file."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)
        else:
            yield str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
