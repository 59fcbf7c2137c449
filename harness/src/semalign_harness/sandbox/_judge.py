"""Verdicts: one probe of the machine, then one bare interpreter for each program."""

import ast
import builtins
import functools
import os
import shutil
import signal
import subprocess
import symtable
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field
from semalign_geometry.base import Contract, SemalignError, Settings

from ._confine import LIBRARIES
from ._peer import look_up
from ._values import Codec

Reason = Literal["passed", "failed", "timeout", "memory", "output", "exited", "crashed", "broken", "refused"]
"""Reason of a verdict."""
Namespaces = Literal["bubblewrap", "user", "root", "none"]

FOLDER = Path(__file__).resolve().parent
INSIDE = Path("/sandbox")
"""Where this folder lies inside bubblewrap."""
GRACE = 5.0
"""Seconds beyond the wall time before a supervisor that does not report is killed."""
REPORT_LIMIT = 1 << 20
DETAIL = 300
"""Longest detail, in characters."""


class Program(NamedTuple):
    """A program to judge, and what judges it."""

    code: str
    """The whole module, written by a model: never trusted."""
    tests: str
    """Trusted statements that raise unless the program is right; they run after `code`.

    For HumanEval `test` and `check(<entry point>)`; for MBPP `test_setup_code` and the lines of
    `test_list`.
    """
    entry_point: str | None = None
    """The function under test; None takes every name that the tests use and do not define."""
    prompt: str = ""
    """Trusted beginning of `code`: what it binds and the tests use besides the entry point (the
    encoder in HumanEval/38, a constant, an import) is taken from here, so that the program cannot
    redefine it."""


class Limits(Settings):
    """Limits of one program."""

    cpu_seconds: int = Field(10, ge=1)
    """Seconds of CPU time, of the program and of its tests each."""
    idle_seconds: float = Field(10.0, gt=0)
    """Seconds in which neither of them uses the CPU: sleep, and waiting for what never comes."""
    wall_seconds: float = Field(180.0, gt=0)
    """Seconds until the verdict: a last resort, so that a busy machine changes no verdict."""
    memory_bytes: int = Field(1 << 30, ge=1 << 27)
    """Address space of the program and of its tests each, in bytes."""
    output_bytes: int = Field(1 << 26, ge=0)
    """Most that the program may print, in bytes; all of it is thrown away."""
    reply_bytes: int = Field(8 << 20, ge=1 << 10)
    """Longest encoded return value, in bytes."""


class Verdict(Settings):
    """Result of one program."""

    passed: bool
    """Whether every test ran and none raised."""
    reason: Reason
    """`passed`; `failed` a test, or raised; ran into the limit of time (`timeout`), `memory` or
    `output`; `exited` or `crashed` before the tests were through; `broken`: its process sent no
    answer; `refused`: the tests cannot run here."""
    detail: str
    """One line for people."""
    seconds: float
    """Wall time, start of the processes included."""


class Level(Contract):
    """The layers around a program on this machine."""

    namespaces: Namespaces
    """No network, no other process in sight, all mounts read-only: through `bubblewrap`, which
    also hides all files but Python's, through a `user` namespace, with the caller's own privileges
    (`root`), or not (`none`)."""
    landlock: int
    """Version of the kernel's Landlock (nothing writable, standard library readable, no TCP from
    4, no signals to other processes from 6); 0 without."""
    seccomp: bool
    """System calls cut to a list without sockets, processes, signals and changes of files."""
    limits: list[str]
    """Resource limits that the machine enforces, by their names in `resource` without RLIMIT_."""
    strong: bool
    """Whether Landlock and seccomp are both in force: enough for code that means harm."""


@functools.cache
def probe() -> Level:
    """Return the layers that this machine allows, each tried once per process.

    Raises:
        SemalignError: a bare interpreter does not start.
    """
    found = _spawn([], {"probe": True}, b"", 60.0)
    if wrapper := _bubblewrap():
        try:
            inside = _spawn(wrapper, {"probe": True}, b"", 60.0)
        except SemalignError:  # installed, and not allowed to work here
            inside = {}
        if all(inside.get(layer) == found[layer] for layer in ("landlock", "seccomp", "limits")):
            found["namespaces"] = "bubblewrap"
    return Level(**found, strong=found["landlock"] > 0 and found["seccomp"])


def judge(
    programs: Iterable[Program], *, limits: Limits | None = None, workers: int | None = None, allow_weak: bool = False
) -> list[Verdict]:
    """Run each program against its tests in processes of its own; return verdicts in order.

    The program lives in one confined process, the tests in another that calls it with plain
    values, and the verdict comes from the second: nothing that the program prints, patches or
    returns can speak for it.

    Args:
        programs: what to judge.
        limits: what each may use; None for the defaults.
        workers: how many at a time; None for one per CPU of this process.
        allow_weak: whether to run where `Level.strong` is False, such as on macOS.

    Raises:
        SemalignError: the sandbox is weak and `allow_weak` is not set, or a layer failed.
    """
    level = probe()
    if not level.strong and not allow_weak:
        missing = [name for name, there in (("Landlock", level.landlock), ("seccomp", level.seccomp)) if not there]
        raise SemalignError(
            f"the sandbox is weak on this machine, it lacks {' and '.join(missing)}: run on Linux 5.13 or newer, "
            "or set allow_weak=True if you trust the code not to mean harm"
        )
    limits = limits or Limits()
    jobs = [_job(program, limits) for program in programs]
    layers = level.model_dump(include={"namespaces", "landlock", "seccomp", "limits"})
    wrapper = _bubblewrap() if level.namespaces == "bubblewrap" else []
    settings = {
        "probe": False,
        "parent": None if wrapper else os.getpid(),
        "layers": {**layers, "namespaces": "none"} if wrapper else layers,
        **limits.model_dump(exclude={"reply_bytes"}),
    }
    executor = ThreadPoolExecutor(workers or _cpus(), thread_name_prefix="sandbox")
    try:
        return list(executor.map(functools.partial(_run, wrapper, settings), jobs))
    finally:
        executor.shutdown(cancel_futures=True)


def _job(program: Program, limits: Limits) -> bytes | Verdict:
    """Return the referee's input, or a verdict at once where the tests cannot run."""
    try:
        names = names_under_test(program)
    except SyntaxError as error:
        return Verdict(passed=False, reason="refused", detail=_line(f"the tests do not parse: {error}"), seconds=0.0)
    tests = _parse(program.tests)[0]
    job = (program.code, program.prompt, program.tests, *names, _mentioned(tests), _assert_lines(tests))
    return Codec().encode((*job, limits.reply_bytes))


def _run(wrapper: list[str], settings: dict[str, Any], job: bytes | Verdict) -> Verdict:
    if isinstance(job, Verdict):
        return job
    start = time.perf_counter()
    seconds = settings["wall_seconds"] + GRACE
    passed, reason, detail = _spawn(wrapper, settings, len(job).to_bytes(8, "big") + job, seconds)
    if reason == "sandbox":
        raise SemalignError(f"the sandbox could not be set up ({_line(detail)}): nothing was run")
    assert reason in get_args(Reason) and (reason == "passed") == passed, reason
    return Verdict(passed=passed, reason=reason, detail=_line(detail), seconds=time.perf_counter() - start)


class Names(NamedTuple):
    """Names that tests use and do not bind."""

    program: list[str]
    """Bound by the program."""
    prompt: list[str]
    """Bound by the trusted prompt."""
    standard: dict[str, str]
    """Python's own, whatever the program makes of them; each with its path."""


def _parse(text: str) -> tuple[ast.Module, symtable.SymbolTable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sloppy escapes in strings
        return ast.parse(text), symtable.symtable(text, "tests.py", "exec")


def _assert_lines(tests: ast.Module) -> frozenset[int]:
    """Return numbers of the lines in which assertions stand."""
    found = [node for node in ast.walk(tests) if isinstance(node, ast.Assert)]
    return frozenset(n for node in found for n in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _mentioned(tests: ast.Module) -> frozenset[str]:
    """Return names, attributes and imports in the tests, without exceptions that they raise."""
    found: set[str] = set()
    errors = [node.exc for node in ast.walk(tests) if isinstance(node, ast.Raise)]
    raised = {id(error.func if isinstance(error, ast.Call) else error) for error in errors}
    for node in ast.walk(tests):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if id(node) not in raised:
                found.add(name)
            case ast.alias(name=path):
                found.update(path.split("."))
    return frozenset(found)


def names_under_test(program: Program) -> Names:
    """Return names that the tests use and do not bind, by where their values come from.

    The tests and the prompt alone decide. A name of Python's (built-in, a standard module, or one
    that a standard module is known for, such as `Counter`) is the program's only if it is the
    entry point, or if the tests use no other: MBPP 126 tests a function called `sum`.

    Raises:
        SyntaxError: the tests do not parse.
    """
    tree, table = _parse(program.tests)
    prompt, names_of_prompt = _parse(program.prompt)
    symbols, bound = _symbols(table), _star_imports(tree)
    bound |= {name for name, symbol in symbols if _binds(symbol) or symbol.is_parameter()}
    calls = [node.func.id for node in _inside_out(tree) if isinstance(node, ast.Call) and type(node.func) is ast.Name]
    defined = _star_imports(prompt) | {each.get_name() for each in names_of_prompt.get_symbols() if _binds(each)}
    entry = {program.entry_point} if program.entry_point else set()
    free = {name for name, symbol in symbols if symbol.is_referenced()} - bound
    unknown = {name for name in free if not hasattr(builtins, name)} | (free & defined) | entry
    standard = {name: path for name in unknown - entry - defined if (path := _standard_path(name, tree, calls))}
    names = unknown - set(standard)
    if not names:  # the name under test is one of Python's
        names = {name for name in standard if name in calls} or set(calls) - bound
        names = {min(names, key=calls.index)} if names else names
        standard = {name: path for name, path in standard.items() if name not in names}
    trusted = (names & defined) - entry
    return Names(sorted(names - trusted), sorted(trusted), standard)


def _symbols(table: symtable.SymbolTable) -> list[tuple[str, symtable.Symbol]]:
    """Return the names of all scopes of a module."""
    own = [(symbol.get_name(), symbol) for symbol in table.get_symbols()]
    return own + [pair for child in table.get_children() for pair in _symbols(child)]


def _binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported()


def _inside_out(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield from _inside_out(child)
    yield node


def _star_imports(module: ast.Module) -> set[str]:
    """Return names that `from … import *` takes from standard modules."""
    found: set[str] = set()
    for node in ast.walk(module):
        match node:
            case ast.ImportFrom(module=str(path), level=0, names=[ast.alias(name="*")]):
                if path.partition(".")[0] in sys.stdlib_module_names:
                    space = vars(look_up(f"{path}:"))
                    found.update(space.get("__all__") or (name for name in space if not name.startswith("_")))
    return found


KNOWN_FOR = {
    "collections": "Counter OrderedDict defaultdict deque namedtuple ChainMap",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "partial reduce",
    "io": "BytesIO StringIO",
    "math": "inf isclose nan pi sqrt",
    "pathlib": "Path",
    "types": "SimpleNamespace",
    "typing": "Any Dict List NamedTuple Optional Set Tuple Union",
}
"""Names that programs import from standard modules more often than they define them."""


def _standard_path(name: str, tests: ast.Module, calls: list[str]) -> str | None:
    """Return the path of the standard object that a free name means; None if none fits its use.

    `datetime` is the class where it is called or `strptime` is read from it, else the module.
    """
    found = [f"{name}:"] if name in sys.stdlib_module_names and name not in calls else []
    found += [f"{module}:{name}" for module, names in KNOWN_FOR.items() if name in names.split()]
    attributes = [node for node in ast.walk(tests) if isinstance(node, ast.Attribute)]
    read = [node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == name]
    return next((path for path in found if all(hasattr(look_up(path), each) for each in read)), None)


def _bubblewrap() -> list[str]:
    """Return the command to start a program that sees only Python; empty without bubblewrap."""
    program = shutil.which("bwrap") if sys.platform == "linux" else None
    if program is None:
        return []
    base, library = os.path.realpath(sys.executable), sysconfig.get_path("stdlib")
    shown = [base, library, sysconfig.get_path("platstdlib"), os.path.join(sys.base_exec_prefix, "lib"), *LIBRARIES]
    command = [program, "--unshare-all", "--die-with-parent", "--dev", "/dev", "--chdir", "/"]
    for path in sorted({path for path in shown if os.path.exists(path)}, key=len):
        command += ["--ro-bind", path, path]
    for packages in ("site-packages", "dist-packages"):
        if os.path.isdir(os.path.join(library, packages)):
            command += ["--tmpfs", os.path.join(library, packages)]
    return [*command, "--ro-bind", str(FOLDER), str(INSIDE), "--remount-ro", "/", "--"]


def _spawn(wrapper: list[str], settings: dict[str, Any], job: bytes, seconds: float) -> Any:
    """Start a bare interpreter in a session of its own, and return what it reports."""
    python, folder = (os.path.realpath(sys.executable), INSIDE) if wrapper else (sys.executable, FOLDER)
    command = [*wrapper, python, "-P", "-s", "-S", "-X", "utf8", str(folder / "_child.py")]
    command.append(Codec().encode(settings).hex())
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # One order of sets, so that the verdict is the same each time. One heap for all threads,
        # so that they need no address space of their own for it.
        env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"},
        cwd="/",
        start_new_session=True,
    )
    try:
        report, complaint = process.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, "timeout", f"no report after {seconds:g} seconds"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if len(report) < 8 or len(report) > REPORT_LIMIT:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or [f"status {process.returncode}"]
        raise SemalignError(
            f"the sandbox's interpreter {sys.executable} gave no report ({last[0]}): it must run with `python -S` "
            "as this user"
        )
    return Codec().decode(report[8:])


def _line(text: str) -> str:
    """Return printable text on one line."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    shown = " ".join(shown.split())
    return shown if len(shown) <= DETAIL else shown[: DETAIL - 1] + "…"


def _cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
