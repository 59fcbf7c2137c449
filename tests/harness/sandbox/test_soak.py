"""Nothing stays behind: no process, no file, no descriptor, no socket, however many programs ran."""

import gc
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from semalign_harness.sandbox import Limits, Program, judge, probe
from semalign_harness.sandbox._values import Codec

from .benchmarks import PROGRAMS
from .hostile import ANSWER, TESTS

ROUNDS = int(os.environ.get("SEMALIGN_SOAK", "100"))
LIMITS = Limits(wall_seconds=20, cpu_seconds=2, memory_bytes=1 << 28)
FORBIDDEN = (Path("/tmp/semalign-soak"), Path("/dev/shm/semalign-soak"))
"""What the programs try to leave; other processes have files of their own in these folders."""
MIX = [
    *PROGRAMS.values(),
    *(
        Program(code + ANSWER, TESTS)
        for code in (
            "import os\nos._exit(0)",
            "import os\nos.closerange(0, 100)",
            "x = bytearray(10**12)",
            "import faulthandler\nfaulthandler._read_null()",
            "import os\nos.fork()",
            "while True: print('x' * 10**4)",
            *(f"open({str(path)!r}, 'w')" for path in FORBIDDEN),
        )
    ),
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Process(NamedTuple):
    stat: str
    child: bool
    """Of this process."""
    interpreter: bool
    """Of a sandbox of this process, whatever its parent is."""


def processes() -> list[Process]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            parent = stat.rpartition(")")[2].split()[1]
            ours = Codec().encode(os.getpid()).hex().encode()
            interpreter = b"sandbox/_child.py" in command and ours in command
            found.append(Process(stat, parent == str(os.getpid()), interpreter))
    return found


def children() -> list[str]:
    """Children of this process, zombies included, and every interpreter of its sandboxes."""
    return [process.stat for process in processes() if process.child or process.interpreter]


def traces() -> dict[str, object]:
    gc.collect()
    sockets = [line for line in Path("/proc/self/net/unix").read_text().splitlines() if "semalign" in line]
    return {
        "children": children(),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "temporary files": os.listdir(tempfile.gettempdir()),
        "files of the programs": [path for path in FORBIDDEN if path.exists()],
        "sockets": sockets,
        "mounts": Path("/proc/self/mounts").read_text(),
    }


@pytest.mark.skipif(probe().namespaces == "bubblewrap", reason="the command does not name the parent")
def test_interpreters_are_found_that_are_no_children() -> None:
    slow = Program("import time\ntime.sleep(1)" + ANSWER, TESTS)
    thread = threading.Thread(target=judge, args=([slow],), kwargs={"limits": LIMITS, "allow_weak": True})
    thread.start()
    found = False
    while thread.is_alive() and not found:
        found = any(process.interpreter and not process.child for process in processes())
    thread.join()
    assert found


@pytest.mark.skipif(not probe().strong, reason="needs Landlock and seccomp")
def test_many_programs_leave_nothing_behind() -> None:
    judge(MIX[:2], limits=LIMITS)
    before = traces()
    programs = [MIX[index % len(MIX)] for index in range(ROUNDS)]
    verdicts = judge(programs, limits=LIMITS, workers=2)
    assert sum(v.passed for v in verdicts) == sum(index % len(MIX) < len(PROGRAMS) for index in range(ROUNDS))
    assert traces() == before


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    judge(MIX[:2], limits=LIMITS, allow_weak=True)
    before = traces()
    slow = Program("import time\ntime.sleep(0.5)" + ANSWER, TESTS)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            judge([slow] * 200, limits=LIMITS, workers=2, allow_weak=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert time.monotonic() - start < 30  # 200 of them take 50 seconds
    assert traces() == before
