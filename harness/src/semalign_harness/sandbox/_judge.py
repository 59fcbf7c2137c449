"""Judging programs from the harness: probe the machine once, then one bare interpreter for each program."""

import ast
import builtins
import functools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field
from semalign_geometry import Contract, SemalignError, Settings

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
    """Trusted beginning of `code`: functions that it defines and the tests call besides the entry point (the encoder in
    HumanEval/38) are taken from here, so that the program cannot redefine them."""


class Limits(Settings):
    """What one program may use."""

    wall_seconds: float = Field(20.0, gt=0)
    """Seconds until the verdict: more than the CPU time, so that a busy machine changes no verdict."""
    cpu_seconds: int = Field(10, ge=1)
    """Seconds of CPU time, of the program and of its tests each."""
    memory_bytes: int = Field(1 << 30, ge=1 << 27)
    """Address space of the program and of its tests each, in bytes."""
    output_bytes: int = Field(1 << 20, ge=0)
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
        **limits.model_dump(include={"wall_seconds", "cpu_seconds", "memory_bytes", "output_bytes"}),
    }
    executor = ThreadPoolExecutor(workers or _cpus(), thread_name_prefix="sandbox")
    try:
        return list(executor.map(functools.partial(_run, wrapper, settings), jobs))
    finally:
        executor.shutdown(cancel_futures=True)


def _job(program: Program, limits: Limits) -> bytes | Verdict:
    """What the referee reads; a verdict at once where the tests cannot run."""
    try:
        names, trusted = names_under_test(program)
    except SyntaxError as error:
        return Verdict(passed=False, reason="refused", detail=_line(f"the tests do not parse: {error}"), seconds=0.0)
    job = (program.code, program.prompt, program.tests, names, trusted, limits.reply_bytes)
    return Codec().encode(job)


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


def names_under_test(program: Program) -> tuple[list[str], list[str]]:
    """Names that the tests take from the program, and those of them that the trusted prompt gives.

    Decided by the tests alone: names they read and do not bind, built-in ones only if they are the entry point, or if
    the tests call nothing else (MBPP 126 tests a function called `sum`).

    Raises:
        SyntaxError: the tests do not parse.
    """
    read, bound, called = set(), set(), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sloppy escapes in strings
        tests, prompt = ast.parse(program.tests), ast.parse(program.prompt)
    for node in ast.walk(tests):
        match node:
            case ast.Name(ctx=ast.Load()):
                read.add(node.id)
            case ast.Name():
                bound.add(node.id)
            case ast.arg():
                bound.add(node.arg)
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                bound.add(node.name)
            case ast.alias():
                bound.add((node.asname or node.name).partition(".")[0])
            case ast.ExceptHandler(name=str(name)):
                bound.add(name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
    names = {name for name in read - bound if not hasattr(builtins, name)}
    names |= {program.entry_point} if program.entry_point else set()
    names = names or called - bound
    defined = {node.name for node in prompt.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return sorted(names), sorted((names & defined) - {program.entry_point})


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
        env={"PYTHONHASHSEED": "0"},  # the same verdict each time, also for programs that rely on the order of a set
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
