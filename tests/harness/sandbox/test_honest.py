"""Unusual but honest programs pass, and a busy machine changes no verdict."""

import os
import subprocess
import sys
import time

import pytest
from semalign_harness.sandbox import Limits, Program, Verdict, judge, probe

from .honest import HONEST

WEAK = not probe().strong


def judged(*programs: Program, limits: Limits | None = None) -> list[Verdict]:
    return judge(programs, limits=limits, workers=2, allow_weak=WEAK)


def test_honest_programs_pass() -> None:
    assert len(HONEST) >= 100
    verdicts = judged(*HONEST.values())
    assert {name: v.detail for name, v in zip(HONEST, verdicts, strict=True) if not v.passed} == {}


REFUSED = {
    "an object that says it equals a number": Program(
        "class V:\n    def __eq__(self, other): return other == 5\ndef f(): return V()", "assert f() == 5"
    ),
    "arithmetic of an object and a number of the tests": Program(
        "class V:\n    def __init__(self, x): self.x = x\n    def __mul__(self, k): return V(self.x * k)",
        "assert (V(2) * 3).x == 6",
    ),
    "membership that is not iteration": Program(
        "class V:\n    def __contains__(self, x): return 0 <= x < 9", "assert 5 in V()"
    ),
    "a context manager that swallows an error of the tests": Program(
        "class V:\n    def __enter__(self): pass\n    def __exit__(self, *error): return True",
        "with V():\n    raise ValueError",
    ),
    "a class of the tests derived from the program's": Program(
        "class V:\n    def f(self): return self.g()",
        "class W(V):\n    def g(self): return 1\nassert W().f() == 1",
    ),
    "an assertion of the tests that the program catches": Program(
        "def f(g):\n    try: g()\n    except AssertionError: return 'caught'",
        "def g(): assert False\nassert f(g) == 'caught'",
    ),
}
"""Honest programs that do not pass, since what they do would let a dishonest one decide its own verdict."""


def test_honest_programs_that_cannot_be_trusted() -> None:
    for program in REFUSED.values():
        exec(compile(program.code + "\n" + program.tests, "plain.py", "exec"), {})
    assert [v.reason for v in judged(*REFUSED.values())].count("passed") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the CPU clock of other processes")
def test_a_busy_machine_changes_no_verdict() -> None:
    """Each program needs more than half of its CPU time, beside one busy loop for each CPU and more."""
    work = "import time\ndef f(seconds):\n    while time.process_time() < seconds: pass\n    return 1"
    loops = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        limits = Limits(cpu_seconds=1, idle_seconds=2.0)
        right, slow = judged(Program(work, "assert f(0.6) == 1"), Program(work, "assert f(9) == 1"), limits=limits)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert right.passed, right
    assert (slow.reason, slow.detail[:4]) == ("timeout", "used"), slow


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not count waits for a CPU")
def test_short_work_between_naps_is_sleep_all_the_same() -> None:
    nap = "import time\ndef f():\n    while True:\n        end = time.process_time() + 0.003\n"
    nap += "        while time.process_time() < end: pass\n        time.sleep(0.1)"
    (verdict,) = judged(Program(nap, "f()"), limits=Limits(idle_seconds=0.8, wall_seconds=20))
    assert verdict.reason == "timeout" and verdict.detail.startswith("slept for 1 second"), verdict


def test_sleep_is_counted_apart() -> None:
    limits = Limits(idle_seconds=0.8)
    start = time.monotonic()
    short, long = judged(
        Program("import time\ndef f(): time.sleep(0.3)", "f()"),
        Program("import threading\ndef f(): threading.Event().wait()", "f()"),
        limits=limits,
    )
    assert short.passed and long.reason == "timeout" and long.detail.startswith("slept for 1 second")
    assert time.monotonic() - start < 30
