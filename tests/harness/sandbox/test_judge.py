"""Right programs pass, broken ones fail, and the tests alone decide how both are run."""

import ast
import gzip
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from semalign_geometry.base import SemalignError
from semalign_harness.sandbox import Level, Limits, Program, Verdict, _judge, judge, probe
from semalign_harness.sandbox._judge import names_under_test

from .benchmarks import PROGRAMS, humaneval
from .mutants import parse, swapped, wrong_returns

LIMITS = Limits(memory_bytes=1 << 28)
WEAK = not probe().strong
"""Run anyway: these programs mean no harm."""


def judged(*programs: Program, limits: Limits = LIMITS) -> list[Verdict]:
    return judge(programs, limits=limits, workers=2, allow_weak=WEAK)


def function_under_test(program: Program) -> str:
    """The entry point, or the last function of the program that the tests use."""
    names = {program.entry_point} if program.entry_point else set(names_under_test(program).program)
    found = [node.name for node in parse(program.code).body if isinstance(node, ast.FunctionDef)]
    return [name for name in found if name in names][-1]


def test_right_programs_pass() -> None:
    verdicts = judged(*PROGRAMS.values())
    assert {name: v.detail for name, v in zip(PROGRAMS, verdicts, strict=True) if not v.passed} == {}
    assert {v.reason for v in verdicts} == {"passed"}


def test_broken_programs_fail() -> None:
    mutants = [
        (name, program._replace(code=code))
        for name, program in PROGRAMS.items()
        for code in wrong_returns(program.code, function_under_test(program))
    ]
    verdicts = judged(*(program for _, program in mutants))
    assert [name for (name, _), v in zip(mutants, verdicts, strict=True) if v.passed] == []
    assert {v.reason for v in verdicts} == {"failed"}


def test_programs_without_their_function_fail() -> None:
    for verdict in judged(*(program._replace(code="pass") for program in PROGRAMS.values())):
        assert not verdict.passed and verdict.reason == "failed"


def test_a_mutant_differs_and_a_site_is_changed_once() -> None:
    assert list(swapped("def f(x):\n    return x + 1 < 3", 9)) == [
        "def f(x):\n    return x - 1 < 3",
        "def f(x):\n    return x + 2 < 3",
        "def f(x):\n    return x + 1 >= 3",
        "def f(x):\n    return x + 1 < 4",
    ]


def test_verdicts_come_in_the_order_of_the_programs() -> None:
    slow = Program("import time\ntime.sleep(0.5)\ndef f(): return 1", "assert f() == 1")
    wrong = Program("def f(): return 2", "assert f() == 1")
    assert [v.passed for v in judged(slow, wrong, slow, wrong)] == [True, False, True, False]
    assert judge([], allow_weak=WEAK) == []


@pytest.mark.parametrize(
    ("program", "reason", "detail"),
    [
        (Program("def f(): return 2", "x = 1\nassert f() == x"), "failed", "AssertionError at assert f() == x"),
        (
            Program("def f(): return 1 / 0", "assert f() == 1"),
            "failed",
            "ZeroDivisionError: division by zero at assert",
        ),
        (Program("def f(:", "assert f() == 1"), "failed", "SyntaxError: "),
        (Program("import nothing", "assert f() == 1"), "failed", "ModuleNotFoundError: No module named 'nothing'"),
        (Program("def g(): return 1", "assert f() == 1"), "failed", "NameError: name 'f' is not defined"),
        (Program("def f(): return 1", "assert f( == 1"), "refused", "the tests do not parse"),
        (
            Program("def f(g): return g()", "import sys\nassert f(sys._getframe()) == 1"),
            "refused",
            "the tests pass a value of type frame",
        ),
        (
            Program("class A: pass", "class B(A): pass\nassert B()"),
            "refused",
            "the tests derive a class from a class of the program",
        ),
        (Program("f = 3", "assert f() == 3"), "failed", "TypeError: 'int' object is not callable"),
        (Program("f = 3", "assert f == 3"), "passed", ""),
        (Program("def f(): return open", "assert f() == open"), "failed", "AssertionError"),
        (Program("def f(): return 1", "assert f() == 1\nwhile True: pass"), "timeout", "no verdict after 1 second"),
        (Program("def f(): return 1", "assert f() == 1\nimport os\nos._exit(0)"), "exited", "the tests' process ended"),
    ],
)
def test_the_detail_says_why(program: Program, reason: str, detail: str) -> None:
    (verdict,) = judged(
        program, limits=LIMITS.model_copy(update={"wall_seconds": 1.0 if reason == "timeout" else 20.0})
    )
    assert (verdict.reason, verdict.passed) == (reason, reason == "passed")
    assert verdict.detail.startswith(detail), verdict


def test_an_exit_that_the_tests_catch_is_no_pass() -> None:
    tests = "try:\n    f()\nexcept BaseException:\n    pass"
    ends = [
        Program(f"import os, sys\ndef f(): {how}", tests)
        for how in ("os._exit(0)", "sys.exit(0)", "os.write(4, b'x' * 9)")
    ]
    assert [v.reason for v in judged(*ends)] == ["exited", "exited", "broken"]


def test_a_helper_of_the_prompt_is_not_the_programs_to_redefine() -> None:
    prompt = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    '''Undo double.'''\n"
    cheat = "    return x\n\n\ndef double(x):\n    return x\n"
    program = humaneval(prompt, cheat, "half", "assert candidate(double(3)) == 3")
    trusting, careful = judged(program._replace(prompt=""), program)
    assert trusting.passed and not careful.passed


@pytest.mark.parametrize(
    ("prompt", "cheat", "tests"),
    [
        ("EPS = 1e-6\n", "EPS = 1e9\n", "assert abs(f(1) - 5.0) < EPS"),
        ("from math import floor\n", "floor = lambda x: 1\n", "assert f(5.5) == floor(5.5)"),
        ("from math import *\n", "floor = lambda x: 1\n", "assert f(5.5) == floor(5.5)"),
        (
            "try:\n    import math as m\nfinally:\n    pass\n",
            "class m: floor = lambda x: 1\n",
            "assert f(5.5) == m.floor(5.5)",
        ),
    ],
)
def test_what_the_prompt_binds_is_not_the_programs_to_redefine(prompt: str, cheat: str, tests: str) -> None:
    code = f"{prompt}{cheat}def f(x): return 1"
    (verdict,) = judged(Program(code, tests, "f", prompt + "def f(x):\n    pass\n"))
    assert verdict.reason == "failed"


@pytest.mark.parametrize(
    ("tests", "entry_point", "names"),
    [
        ("assert f(1) == 2", None, ["f"]),
        ("assert sum(1, 2) == 3", None, ["sum"]),
        ("assert sum(f(1)) == 3", None, ["f"]),
        ("assert set(f(1)) == set((1,))", None, ["f"]),
        ("import math\nassert math.fabs(f(1)) == 3", None, ["f"]),
        ("from math import pi as p\nassert f(p)", None, ["f"]),
        ("assert f(1) == sys.maxsize", None, ["f"]),
        ("assert sys(1) == f(1)", None, ["f", "sys"]),
        ("assert isclose(f(1), math.pi)", None, ["f"]),
        ("assert isclose(1, 2)", None, ["isclose"]),
        ("assert datetime(2020, 1, 1) == f(datetime.strptime('', ''))", None, ["f"]),
        ("assert queue.push(1) == f(1)", None, ["f", "queue"]),
        ("assert set(sum(1, 2)) == {3}", None, ["sum"]),
        ("assert math.fabs(round(1.5)) == 2", None, ["round"]),
        ("match f(1):\n    case [x, *y]: assert x", None, ["f"]),
        ("root = Node(1)\nassert f(root)", None, ["Node", "f"]),
        ("def check(candidate):\n    assert candidate(1)\ncheck(f)", "f", ["f"]),
        ("def check(candidate):\n    assert candidate(len('a'))\ncheck(abs)", "abs", ["abs"]),
        ("try:\n    f()\nexcept ValueError as e:\n    print(e)", None, ["f"]),
        ("class A: pass\nassert f(A)", None, ["f"]),
    ],
)
def test_the_names_that_tests_take_from_a_program(tests: str, entry_point: str | None, names: list[str]) -> None:
    assert names_under_test(Program("", tests, entry_point)).program == names


def test_a_redefined_builtin_does_not_reach_the_tests() -> None:
    code = "import builtins\ndef abs(x): return 0\nbuiltins.abs = builtins.all = lambda x: 0\ndef f(x): return 5.0"
    tests = "def check(candidate):\n    assert abs(candidate(1) - 1.0) < 1e-6\ncheck(f)"
    assert judged(Program(code, tests, "f"))[0].reason == "failed"


def test_objects_of_a_program_are_equal_only_to_its_own() -> None:
    """A program can return one object twice, so a comparison of two of its own is up to it in any case."""
    code = "class A:\n    def __eq__(self, other): return True\n    __hash__ = None\na = A()\n"
    code += "def f(): return a\ndef g(): return A()"
    own = [
        Program(code, tests) for tests in ("assert f() == f() and f() is f()", "assert f() == g() and f() is not g()")
    ]
    other = [Program(code, f"assert {tests}") for tests in ("f() == 1", "1 == f()", "f() == [1]", "f() == len")]
    assert [v.passed for v in judged(*own, *other)] == [True] * 2 + [False] * 4


def test_sloppy_escapes_in_tests_are_not_an_error() -> None:
    program = Program("def f(): return r'\\d'", r"assert f() == '\d'", "f", prompt=r"x = '\w'")
    assert judged(program)[0].passed


def test_the_same_seed_of_hashes_each_time() -> None:
    code = "def f(): return list({str(i) for i in range(50)})"
    probe_one = Program(code, "assert f() == 1\n")
    order = subprocess.run(
        [sys.executable, "-c", code + "\nprint(f())"], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    )
    assert not judged(probe_one)[0].passed
    assert judged(Program(code, f"assert f() == {order.stdout}"))[0].passed


def test_a_weak_sandbox_needs_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Level(namespaces="none", landlock=0, seccomp=False, limits=probe().limits, strong=False)
    monkeypatch.setattr(_judge, "probe", lambda: weak)
    right = PROGRAMS["list"]
    with pytest.raises(SemalignError, match=r"it lacks Landlock and seccomp: .* allow_weak=True"):
        judge([right])
    bad = Program("def f(x): return open('/etc/passwd').read()", "assert f(1)")
    passed, refused = judge([right, bad], allow_weak=True)
    assert passed.passed and refused.reason == "failed" and "PermissionError" in refused.detail


@pytest.mark.skipif(probe().namespaces not in ("user", "root"), reason="needs namespaces of our own")
def test_a_program_is_the_only_process_that_it_knows() -> None:
    assert judged(Program("import os\ndef f(): return os.getpid(), os.getppid()", "assert f() == (1, 0)"))[0].passed


def test_a_layer_that_cannot_be_applied_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    false = probe().model_copy(update={"limits": ["NONSENSE"], "strong": True})
    monkeypatch.setattr(_judge, "probe", lambda: false)
    with pytest.raises(SemalignError, match="could not be set up.*nothing was run"):
        judge([PROGRAMS["list"]])


def test_an_interpreter_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SemalignError, match="/bin/false gave no report"):
        judge([PROGRAMS["list"]], allow_weak=True)


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    probe.cache_clear()
    yield
    probe.cache_clear()


def test_a_bubblewrap_that_does_not_work_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_probe: None
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe().namespaces != "bubblewrap"
    assert judged(PROGRAMS["list"])[0].passed


@pytest.mark.skipif(probe().namespaces != "bubblewrap", reason="needs bubblewrap")
def test_bubblewrap_hides_all_files_but_pythons() -> None:
    code = "import os\ndef f(path): return os.path.exists(path)"
    checks = [f"assert not f({path!r})" for path in ("/etc/passwd", "/proc/1", "/tmp", __file__)]
    library = str(Path(os.__file__).parent)
    checks += [f"assert f({library!r})", f"assert not f({library + '/site-packages/pip'!r})"]
    assert judged(Program(code, "\n".join(checks)))[0].passed


def test_a_hanging_supervisor_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_judge, "GRACE", -1.5)
    slow = Program("import time\ntime.sleep(9)", "assert f() == 1")
    start = time.monotonic()
    (verdict,) = judged(slow, limits=LIMITS.model_copy(update={"wall_seconds": 3.0}))
    assert verdict.reason == "timeout" and time.monotonic() - start < 9


def test_the_level_survives_the_disk(tmp_path: Path) -> None:
    level = probe()
    assert Level.read(level.write(tmp_path / "level.json")) == level
    assert level.strong == (level.landlock > 0 and level.seccomp)


def test_limits_are_checked() -> None:
    with pytest.raises(SemalignError, match="wall_seconds"):
        Limits.parse({"wall_seconds": 0})


# The references themselves


def references() -> dict[str, Program]:
    folder = Path(os.environ["SEMALIGN_DATA"])

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in gzip.open(folder / name, "rt", encoding="utf-8")]

    programs = {
        row["task_id"]: Program(
            row["prompt"] + row["canonical_solution"],
            f"{row['test']}\ncheck({row['entry_point']})",
            row["entry_point"],
            row["prompt"],
        )
        for row in rows("humaneval/test.jsonl.gz")
    }
    for part in ("prompt", "test", "validation", "train"):
        for row in rows(f"mbpp/{part}.jsonl.gz"):
            tests = "\n".join([row["test_setup_code"], *row["test_list"]])
            programs[f"MBPP/{row['task_id']}"] = Program(row["code"], tests)
    return programs


@pytest.mark.real
def test_every_reference_passes() -> None:
    found = references()
    assert len(found) == 164 + 974
    verdicts = judge(found.values(), limits=Limits(wall_seconds=60))
    assert [name for name, v in zip(found, verdicts, strict=True) if not v.passed] == []


@pytest.mark.real
def test_every_reference_with_a_wrong_return_fails() -> None:
    mutants = [
        (name, program._replace(code=code))
        for name, program in references().items()
        for code in wrong_returns(program.code, function_under_test(program))
    ]
    verdicts = judge((program for _, program in mutants), limits=Limits(wall_seconds=60))
    assert [name for (name, _), v in zip(mutants, verdicts, strict=True) if v.passed] == []


@pytest.mark.real
def test_most_references_with_a_swapped_operator_fail() -> None:
    mutants = [p._replace(code=code) for p in references().values() for code in swapped(p.code, 2)]
    verdicts = judge(mutants, limits=Limits(wall_seconds=10, cpu_seconds=2))
    reasons = Counter(v.reason for v in verdicts)
    assert len(mutants) > 1500 and reasons["passed"] < 0.2 * len(mutants), reasons
