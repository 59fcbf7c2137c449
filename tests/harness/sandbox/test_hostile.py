"""Programs that mean harm are contained, do not pass, and the next program is judged as if nothing had been."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from semalign_harness.sandbox import Limits, Program, judge, probe

from .hostile import ANSWER, HOSTILE, MISLED, TESTS

LIMITS = Limits(cpu_seconds=2, memory_bytes=1 << 28)
SECRET = "the secret stays as it is"

pytestmark = pytest.mark.skipif(not probe().strong, reason="needs Landlock and seccomp")


class Bystanders:
    """What hostile programs are after: a secret file, a folder, a server that counts its visitors."""

    def __init__(self, folder: Path) -> None:
        self.secret = folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        self.folder = folder / "folder"
        self.folder.mkdir(mode=0o777)
        self.visits = 0
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "socket"))
        self.unix.listen()
        self.path = folder / "socket"
        self.before = self.state()

    def state(self) -> tuple[object, ...]:
        secret = self.secret.stat()
        return (
            self.secret.read_text(),
            secret.st_mode,
            secret.st_mtime,
            sorted(path.name for path in self.folder.iterdir()),
            sorted(path.name for path in self.folder.parent.iterdir()),
            [
                Path(path).exists()
                for path in ("/tmp/semalign-hostile", "/dev/shm/semalign-hostile", "/semalign-hostile")
            ],
            Path("semalign-hostile").exists(),
        )

    def visited(self) -> bool:
        for server in (self.tcp, self.udp, self.unix):
            server.setblocking(False)
            try:
                server.recv(1) if server is self.udp else server.accept()
            except BlockingIOError:
                continue
            return True
        return False

    def close(self) -> None:
        for server in (self.tcp, self.udp, self.unix):
            server.close()


@pytest.fixture
def bystanders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bystanders]:
    monkeypatch.setenv("SEMALIGN_SECRET", SECRET)
    found = Bystanders(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_contained(name: str, bystanders: Bystanders) -> None:
    hostile = HOSTILE[name]
    code = hostile.code.replace("@SECRET@", str(bystanders.secret)).replace("@FOLDER@/socket", str(bystanders.path))
    code = code.replace("@FOLDER@", str(bystanders.folder)).replace("@PORT@", str(bystanders.port))
    code = code.replace("@PID@", str(os.getpid()))
    threads = threading.active_count()
    limits = LIMITS.model_copy(update={"wall_seconds": 2.0 if "timeout" in hostile.reasons else 20.0})
    verdict, after = judge([Program(code, TESTS), Program(ANSWER, TESTS)], limits=limits, workers=2)
    assert not verdict.passed
    assert verdict.reason in hostile.reasons.split(), verdict
    assert re.search(hostile.detail, verdict.detail), verdict
    assert verdict.detail.isprintable()
    assert after.passed, after
    assert bystanders.state() == bystanders.before
    assert not bystanders.visited()
    assert threading.active_count() == threads


def test_without_an_attack_the_program_passes() -> None:
    assert judge([Program(ANSWER, TESTS)], limits=LIMITS)[0].passed


def test_no_program_speaks_for_itself() -> None:
    verdicts = judge([Program(case.code, case.tests) for case in MISLED.values()], limits=LIMITS, workers=2)
    odd = {
        name: verdict
        for (name, case), verdict in zip(MISLED.items(), verdicts, strict=True)
        if verdict.reason not in case.reasons.split() or not re.search(case.detail, verdict.detail)
    }
    assert odd == {}
