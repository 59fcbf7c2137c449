"""Each layer of the kernel alone, tried with raw system calls that no Python hook sees."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from semalign_harness import sandbox
from semalign_harness.sandbox import probe

FOLDER = Path(sandbox.__file__).parent
LEVEL = probe()

PREAMBLE = """
import ctypes, errno, json, os, sys
sys.path.insert(0, sys.argv[1])
package = type(sys)("sandbox")
package.__path__ = [sys.argv[1]]
sys.modules["sandbox"] = package
from sandbox import _confine as confine
libc = ctypes.CDLL(None, use_errno=True)
target, folder = sys.argv[2:4]

def call(name, *arguments):
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "done"

def attempt(work):
    try:
        work()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

found = {}
"""


def run(script: str, *arguments: object) -> dict[str, Any]:
    """What a bare interpreter finds out about itself."""
    command = [sys.executable, "-S", "-c", PREAMBLE + script + "\nos.write(1, json.dumps(found).encode())"]
    done = subprocess.run([*command, str(FOLDER), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "secret", tmp_path


FILE_ATTEMPTS = """
found["read"] = attempt(lambda: os.close(os.open(target, os.O_RDONLY)))
found["write"] = attempt(lambda: os.open(target, os.O_WRONLY))
found["create"] = attempt(lambda: os.open(folder + "/new", os.O_CREAT | os.O_WRONLY))
found["truncate"] = attempt(lambda: os.truncate(target, 0))
found["remove"] = attempt(lambda: os.remove(target))
found["rename"] = attempt(lambda: os.rename(target, target + "2"))
found["mkdir"] = attempt(lambda: os.mkdir(folder + "/d"))
found["symlink"] = attempt(lambda: os.symlink(target, folder + "/l"))
found["list"] = attempt(lambda: os.listdir(folder))
found["chmod"] = attempt(lambda: os.chmod(target, 0o777))
found["utime"] = attempt(lambda: os.utime(target, (1, 1)))
found["proc"] = attempt(lambda: os.open(f"/proc/{os.getppid()}/status", os.O_RDONLY))
import calendar
"""
CHANGES = ["write", "create", "truncate", "remove", "rename", "mkdir", "symlink", "chmod", "utime"]


def test_without_a_layer_everything_works(files: tuple[Path, Path]) -> None:
    found = run(FILE_ATTEMPTS, *files)
    assert [found[name] for name in ("read", "write", "create", "truncate", "list", "proc")] == ["done"] * 6


@pytest.mark.skipif(LEVEL.landlock == 0, reason="needs Landlock")
def test_landlock_leaves_the_standard_library_to_read_and_nothing_to_write(files: tuple[Path, Path]) -> None:
    script = """
confine.drop_privileges()
confine.landlock(confine.landlock_ruleset(confine.landlock_version(), confine.readable_paths()))
found["own parent"] = attempt(lambda: os.kill(os.getppid(), 0))
import socket
server = socket.socket()
found["bind"] = attempt(lambda: server.bind(("127.0.0.1", 0)))
packages = os.path.dirname(os.__file__) + "/site-packages"
inside = [packages + "/" + name for name in os.listdir(packages)] if os.path.isdir(packages) else []
found["packages"] = [attempt(lambda: os.close(os.open(path, os.O_RDONLY))) for path in inside if os.path.isfile(path)]
"""
    found = run(script + FILE_ATTEMPTS, *files)
    assert set(found.pop("packages")) <= {"EACCES"}
    denied = {name for name, outcome in found.items() if outcome in ("EACCES", "EPERM", "EXDEV")}
    expected = {"read", "list", "proc", *CHANGES} - {"chmod", "utime"}  # the two that Landlock does not cover
    expected -= {"truncate"} if LEVEL.landlock < 3 else set()
    expected |= {"bind"} if LEVEL.landlock >= 4 else set()
    expected |= {"own parent"} if LEVEL.landlock >= 6 else set()
    assert denied == expected
    assert files[0].exists() and sorted(path.name for path in files[1].iterdir()) == ["secret"]


@pytest.mark.skipif(LEVEL.namespaces == "none", reason="needs namespaces")
def test_namespaces_leave_no_network_and_no_way_to_write(files: tuple[Path, Path]) -> None:
    script = f"""
confine.enter_namespaces({LEVEL.namespaces!r})
confine.enter_pid_namespace({LEVEL.namespaces!r})
import socket
found["interfaces"] = sorted(name for _, name in socket.if_nameindex())
found["connect"] = attempt(lambda: socket.create_connection(("127.0.0.1", 9)))
readable, writable = os.pipe()
if os.fork() == 0:
    found["pid"], found["parent"] = os.getpid(), attempt(lambda: os.kill({os.getpid()}, 0))
    os.write(writable, json.dumps([os.getpid(), found["parent"]]).encode())
    os._exit(0)
os.wait()
found["child"] = json.loads(os.read(readable, 100))
"""
    found = run(script + FILE_ATTEMPTS, *files)
    assert found["interfaces"] == ["lo"] and found["connect"] == "ENETUNREACH"
    assert found["child"] == [1, "ESRCH"]
    assert {found[name] for name in CHANGES} == {"EROFS"}


@pytest.mark.skipif(not LEVEL.seccomp, reason="needs seccomp")
def test_seccomp_leaves_no_call_that_reaches_out(files: tuple[Path, Path]) -> None:
    parent = os.getpid()
    script = f"""
import fcntl, resource, signal, socket
confine.drop_privileges()
kept = socket.socketpair()
confine.seccomp()
for name, arguments in dict(
    fork=(), vfork=(), kill=({parent}, 0), killpg=({parent}, 0), socket=(2, 1, 0), socketpair=(1, 1, 0, None),
    ptrace=(16, {parent}, 0, 0), unshare=(0x10000000,), setns=(0, 0), mount=(None, None, None, 0, None),
    chmod=(target.encode(), 0o777), unlink=(target.encode(),), rename=(target.encode(), b"x"), mkdir=(b"d", 0),
    truncate=(target.encode(), 0), chdir=(b"/",), chroot=(b"/",), setuid=(0,), setsid=(), prctl=(4, 1, 0, 0, 0),
    memfd_create=(b"x", 0), eventfd=(0, 0), personality=(0,), process_vm_readv=({parent}, None, 0, None, 0, 0),
    inotify_init=(), timerfd_create=(0, 0), shmget=(0, 4096, 0o1600), mlockall=(1,), ftruncate=(0, 0), flock=(0, 2),
    shutdown=(kept[0].fileno(), 0), execve=(b"/bin/sh", None, None), setpriority=(0, 0, 0), alarm=(1,),
).items():
    found[name] = call(name, *arguments)
numbers = dict(io_uring_setup=425, pidfd_open=434, pidfd_send_signal=424, process_madvise=440, landlock=444, bpf=BPF)
for name, number in numbers.items():
    found[name] = call("syscall", number, {parent}, 0, 0, 0)
found["clone3"] = call("syscall", 435, None, 0)
clone = CLONE
found["clone as fork"] = call("syscall", clone, 17, 0, 0, 0, 0)
found["clone as vfork"] = call("syscall", clone, 0x4111, 0, 0, 0, 0)
found["clone with a namespace"] = call("syscall", clone, 0x103D0F00, 0, 0, 0, 0)
found["own"] = attempt(lambda: fcntl.fcntl(1, fcntl.F_SETOWN, {parent}))
found["signal me"] = attempt(lambda: fcntl.fcntl(1, fcntl.F_SETFL, os.O_ASYNC))
found["ioctl"] = attempt(lambda: fcntl.ioctl(1, 0x8901, b"0000"))
found["limit other"] = attempt(lambda: resource.prlimit({parent}, resource.RLIMIT_CPU))
fine = dict(own_limit=lambda: resource.prlimit(0, resource.RLIMIT_CPU), pipe=os.pipe, flags=lambda: fcntl.fcntl(1, 3))
import threading
fine |= dict(thread=lambda: threading.Thread(target=int).start())
fine |= dict(random=lambda: os.urandom(9), open=lambda: open(json.__file__).close(), tty=lambda: os.isatty(1))
found["fine"] = {{name: attempt(work) for name, work in fine.items()}}
""".replace("BPF", {"x86_64": "321"}.get(platform.machine(), "280"))
    script = script.replace("CLONE", {"x86_64": "56"}.get(platform.machine(), "220"))
    found = run(script, *files)
    assert set(found.pop("fine").values()) == {"done"}
    assert found.pop("clone3") == "ENOSYS"
    assert {name: outcome for name, outcome in found.items() if outcome != "EPERM"} == {}
    assert files[0].read_text() == "secret"


@pytest.mark.skipif(platform.machine() != "x86_64" or not LEVEL.seccomp, reason="x86-64 has a second set of calls")
def test_seccomp_refuses_the_calls_of_the_x32_interface() -> None:
    found = run(
        "confine.drop_privileges()\nconfine.seccomp()\nfound['getpid'] = call('syscall', 0x40000000 | 39)", "", ""
    )
    assert found["getpid"] in ("EPERM", "ENOSYS")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_privileges_are_gone_for_good() -> None:
    script = """
confine.drop_privileges()
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
found["capabilities"] = [status[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")]
found["no new"] = status["NoNewPrivs"]
found["dumpable"] = libc.prctl(3, 0, 0, 0, 0)
"""
    found = run(script, "", "")
    assert {int(value, 16) for value in found["capabilities"]} == {0}
    assert (found["no new"], found["dumpable"]) == ("1", 0)


def test_limits_are_hard(files: tuple[Path, Path]) -> None:
    script = f"""
import resource
confine.set_limits({LEVEL.limits!r}, cpu_seconds=3, memory_bytes=1 << 28, threads=9)
found["limits"] = {{name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in {LEVEL.limits!r}}}
try:
    bytearray(1 << 29)
except MemoryError:
    found["memory"] = "refused"
found["write"] = attempt(lambda: os.write(os.open(target, os.O_WRONLY), b"more"))
"""
    found = run(script, *files)
    assert {"CPU", "FSIZE", "NOFILE", "NPROC", "CORE"} <= set(found["limits"])
    assert found["limits"]["CPU"] == [3, 4]
    assert [found["limits"][name] for name in ("FSIZE", "NPROC", "CORE")] == [[0, 0], [9, 9], [0, 0]]
    assert "AS" not in LEVEL.limits or found["memory"] == "refused"
    assert found["write"] == "EFBIG"


def test_the_last_line_denies_by_name_where_no_layer_does(files: tuple[Path, Path]) -> None:
    script = """
def refused(work):
    try:
        work()
    except PermissionError as error:
        return str(error)
    return "done"

import glob, socket, subprocess
confine.audit([os.path.dirname(os.__file__)])
found["write"] = refused(lambda: open(target, "w"))
found["read"] = refused(lambda: open(target))
found["up"] = refused(lambda: open(os.path.dirname(os.__file__) + "/../../../../../../.." + target))
found["packages"] = refused(lambda: open(os.path.dirname(os.__file__) + "/site-packages/README.txt"))
found["library write"] = refused(lambda: open(os.__file__, "a"))
found["socket"] = refused(lambda: socket.socket())
found["shell"] = refused(lambda: os.system("true"))
found["process"] = refused(lambda: subprocess.run(["true"]))
found["kill"] = refused(lambda: os.kill(os.getppid(), 0))
found["remove"] = refused(lambda: os.remove(target))
found["ctypes"] = refused(lambda: ctypes.CDLL(None))
fine = refused(lambda: __import__("calendar")), refused(lambda: open(os.__file__).close())
found["fine"] = fine
"""
    found = run(script, *files)
    assert found.pop("fine") == ["done", "done"]
    assert all("the sandbox does not" in outcome for outcome in found.values()), found
    assert files[0].read_text() == "secret"
