"""Judging programs from the harness: probe the machine once, then one bare interpreter for each program."""

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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field
from semalign_geometry.base import Contract, SemalignError, Settings

from ._peer import look_up
from ._values import Codec

Reason = Literal["passed", "failed", "timeout", "memory", "output", "exited", "crashed", "broken", "refused"]
"""Why a verdict is what it is."""
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
    """Trusted: statements that raise unless the program is right, such as asserts; they run after `code`.

    For HumanEval `test` and `check(<entry point>)`; for MBPP `test_setup_code` and the lines of `test_list`.
    """
    entry_point: str | None = None
    """The function under test; None takes every name that the tests use and do not define."""
    prompt: str = ""
    """Trusted beginning of `code`: what it binds and the tests use besides the entry point (the encoder in
    HumanEval/38, a constant, an import) is taken from here, so that the program cannot redefine it."""


class Limits(Settings):
    """What one program may use."""

    cpu_seconds: int = Field(10, ge=1)
    """Seconds of CPU time, of the program and of its tests each."""
    idle_seconds: float = Field(10.0, gt=0)
    """Seconds in which neither of them uses the CPU: sleep, and waiting for what never comes."""
    wall_seconds: float = Field(180.0, gt=0)
    """Seconds until the verdict, a last resort: far more than the others, so that a busy machine changes no verdict."""
    memory_bytes: int = Field(1 << 30, ge=1 << 27)
    """Address space of the program and of its tests each, in bytes."""
    output_bytes: int = Field(1 << 26, ge=0)
    """What the program may print, in bytes; all of it is thrown away."""
    reply_bytes: int = Field(8 << 20, ge=1 << 10)
    """Longest encoded return value, in bytes."""


class Verdict(Settings):
    """How one program did."""

    passed: bool
    """Whether every test ran and none raised."""
    reason: Reason
    """`passed`; `failed` a test, or raised; ran into the limit of time (`timeout`), `memory` or `output`; `exited` or
    `crashed` before the tests were through; `broken`: its process sent what is no answer; `refused`: the tests cannot
    run here."""
    detail: str
    """One line for people."""
    seconds: float
    """Wall time, start of the processes included."""


class Level(Contract):
    """The layers around a program on this machine."""

    namespaces: Namespaces
    """No network, no other process in sight, all mounts read-only: through `bubblewrap`, which also hides all files but
    Python's, through a `user` namespace, with the caller's own privileges (`root`), or not (`none`)."""
    landlock: int
    """Version of the kernel's Landlock (nothing writable, standard library readable, no TCP from 4, no signals to other
    processes from 6); 0 without."""
    seccomp: bool
    """System calls cut to a list without sockets, processes, signals and changes of files."""
    limits: list[str]
    """Resource limits that the machine enforces, by their names in `resource` without RLIMIT_."""
    strong: bool
    """Whether Landlock and seccomp are both in force: enough for code that means harm."""


@functools.cache
def probe() -> Level:
    """The layers that this machine allows, each tried once per process.

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
    """Run each program against its tests, apart from this process and from one another; verdicts in the same order.

    The program lives in one confined process, the tests in another that calls it with plain values, and the verdict
    comes from the second: what the program prints, patches or returns cannot speak for it.

    Args:
        programs: what to judge.
        limits: what each may use; None for the defaults.
        workers: how many at a time; None for one per CPU of this process.
        allow_weak: whether to run where the kernel confines less than `Level.strong` says, such as on macOS.

    Raises:
        SemalignError: this machine's sandbox is weak and `allow_weak` is not set, or a layer could not be applied.
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
    """What the referee reads; a verdict at once where the tests cannot run."""
    try:
        names = names_under_test(program)
    except SyntaxError as error:
        return Verdict(passed=False, reason="refused", detail=_line(f"the tests do not parse: {error}"), seconds=0.0)
    tests = _parse(program.tests)
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
    """Names of the standard library, which are Python's own whatever the program makes of them; each with its path."""


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sloppy escapes in strings
        return ast.parse(text)


def _assert_lines(tests: ast.Module) -> frozenset[int]:
    """Numbers of the lines in which assertions stand."""
    found = [node for node in ast.walk(tests) if isinstance(node, ast.Assert)]
    return frozenset(n for node in found for n in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _mentioned(tests: ast.Module) -> frozenset[str]:
    """Names and attributes in the tests, those that they import included, but for the exceptions that they raise."""
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
    """Names that the tests use and do not bind, by where their values come from.

    Decided by the tests and the prompt alone. A name of Python's (built-in, a standard module, or one that a
    standard module is known for, such as `Counter`) is the program's only if it is the entry point, or if the tests use
    no other: MBPP 126 tests a function called `sum`.

    Raises:
        SyntaxError: the tests do not parse.
    """
    uses, defined = _Uses(_parse(program.tests)), _top_level(program.prompt)
    entry = {program.entry_point} if program.entry_point else set()
    free = uses.read - uses.bound
    unknown = {name for name in free if not hasattr(builtins, name)} | (free & defined) | entry
    standard = {name: path for name in unknown - entry - defined if (path := _standard_path(name, uses))}
    names = unknown - set(standard)
    if not names:  # the name under test is one of Python's
        names = {name for name in standard if name in uses.called} or uses.called - uses.bound
        names = {min(names, key=uses.order.index)} if names else names
        standard = {name: path for name, path in standard.items() if name not in names}
    trusted = (names & defined) - entry
    return Names(sorted(names - trusted), sorted(trusted), standard)


class _Uses:
    """The names in a module: `read`, `bound`, `called`, the called ones from inside out and in their `order`, and the
    `attributes` that are read from each."""

    def __init__(self, tests: ast.Module) -> None:
        self.read: set[str] = set()
        self.bound: set[str] = set()
        self.called: set[str] = set()
        self.order: list[str] = []
        self.attributes: dict[str, set[str]] = {}
        self._visit(tests)

    def _visit(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            self._visit(child)
        match node:
            case ast.Name(ctx=ast.Load()):
                self.read.add(node.id)
            case ast.Name():
                self.bound.add(node.id)
            case ast.arg():
                self.bound.add(node.arg)
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                self.bound.add(node.name)
            case ast.ImportFrom(module=str(module), level=0, names=[ast.alias(name="*")]):
                self.bound.update(_public(module))
            case ast.alias():
                self.bound.add((node.asname or node.name).partition(".")[0])
            case ast.ExceptHandler(name=str(name)):
                self.bound.add(name)
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                self.bound.add(name)
            case ast.Call(func=ast.Name(id=name)):
                self.called.add(name)
                self.order.append(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                self.attributes.setdefault(name, set()).add(attribute)


def _top_level(module: str) -> set[str]:
    """Names that a module binds outside of its functions, classes and comprehensions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        symbols = symtable.symtable(module, "prompt.py", "exec").get_symbols()
    found = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    for node in ast.walk(_parse(module)):
        match node:
            case ast.ImportFrom(module=str(path), level=0, names=[ast.alias(name="*")]):
                found |= _public(path)
    return found


def _public(module: str) -> set[str]:
    """Names that `from … import *` takes from a standard module; none from another."""
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return set()
    found = look_up(f"{module}:")
    return set(getattr(found, "__all__", None) or (name for name in vars(found) if not name.startswith("_")))


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


def _standard_path(name: str, uses: _Uses) -> str | None:
    """The path of what a free name means in the standard library; None if it means nothing that fits its use.

    `datetime` is the class where it is called or `strptime` is read from it, else the module.
    """
    modules = [name] if name in sys.stdlib_module_names else []
    found = [f"{module}:" for module in modules if name not in uses.called]
    found += [f"{module}:{name}" for module, names in KNOWN_FOR.items() if name in names.split()]
    wanted = uses.attributes.get(name, set())
    return next((path for path in found if all(hasattr(look_up(path), each) for each in wanted)), None)


def _bubblewrap() -> list[str]:
    """The command that starts a program where nothing but Python is to see; empty without bubblewrap."""
    program = shutil.which("bwrap") if sys.platform == "linux" else None
    if program is None:
        return []
    base, library = os.path.realpath(sys.executable), sysconfig.get_path("stdlib")
    shown = [base, library, sysconfig.get_path("platstdlib"), os.path.join(sys.base_exec_prefix, "lib")]
    shown += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
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
        # The same verdict each time, also for programs that rely on the order of a set; threads share one heap, so that
        # they need no address space of their own for it.
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
    """Printable text on one line."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    shown = " ".join(shown.split())
    return shown if len(shown) <= DETAIL else shown[: DETAIL - 1] + "…"


def _cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
