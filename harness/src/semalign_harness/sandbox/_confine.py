"""Layers that take rights from a process for good, on Linux; resource limits everywhere.

A function raises `Refused` where the kernel or its configuration does not allow the layer.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Sequence

from ._typing import Any

LINUX = sys.platform == "linux"

# <linux/sched.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
# <sys/mount.h>, <linux/mount.h>, <fcntl.h>
MS_REC, MS_PRIVATE = 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
# <linux/prctl.h>, <linux/capability.h>, <linux/seccomp.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITY_VERSION_3 = 0x20080522
SECCOMP_MODE_FILTER = 2
RET_ALLOW, RET_ERRNO, RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
# <linux/landlock.h>: the file rights of each version of the interface, the newest last
LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_CREATE_RULESET_VERSION = 1, 1
FILE_RIGHTS = (13, 14, 15, 15, 16)
READ_FILE, READ_DIR = 1 << 2, 1 << 3
NET_RIGHTS, SCOPES = 0b11, 0b11

# Numbers that are the same on every architecture.
SYS_MOUNT_SETATTR, SYS_LANDLOCK = 442, (444, 445, 446)

# Calls without a way out of the process: read, write, map, wait, ask for the time.
# fmt: off
ALLOWED_X86_64 = (
    0, 1, 19, 20, 17, 3,  # read write readv writev pread64 close
    5, 262, 332, 8, 217, 257, 267, 269, 439,  # fstat newfstatat statx lseek getdents64 openat readlinkat faccessat*
    32, 292, 293, 271, 270,  # dup dup3 pipe2 ppoll pselect6
    9, 11, 10, 25, 28, 12,  # mmap munmap mprotect mremap madvise brk
    202, 273, 334, 24, 204,  # futex set_robust_list rseq sched_yield sched_getaffinity
    39, 186, 110, 102, 107, 104, 108,  # getpid gettid getppid getuid geteuid getgid getegid
    228, 229, 230, 35, 96, 100, 98,  # clock_gettime clock_getres *nanosleep gettimeofday times getrusage
    318, 63, 99, 79,  # getrandom uname sysinfo getcwd
    13, 14, 15, 131, 60, 231, 219,  # rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack exit exit_group restart
    2, 4, 6, 21, 89, 7, 23, 22, 33, 201, 158, 78, 97,  # open stat lstat access readlink poll select pipe dup2 time ...
)
ALLOWED_AARCH64 = (  # the same, in the same order; the last line has no counterpart
    63, 64, 65, 66, 67, 57,
    80, 79, 291, 62, 61, 56, 78, 48, 439,
    23, 24, 59, 73, 72,
    222, 215, 226, 216, 233, 214,
    98, 99, 293, 124, 123,
    172, 178, 173, 174, 175, 176, 177,
    113, 114, 115, 101, 169, 153, 165,
    278, 160, 179, 17,
    134, 135, 139, 132, 93, 94, 128,
)
# fmt: on
# AUDIT_ARCH_* of <linux/audit.h>, the list, and the numbers of fcntl, ioctl, prlimit, clone and
# clone3, which pass only with some arguments.
MACHINES = {
    "x86_64": (0xC000003E, ALLOWED_X86_64, (72, 16, 302, 56, 435)),
    "aarch64": (0xC00000B7, ALLOWED_AARCH64, (25, 29, 261, 220, 435)),
}
# Descriptor flags, and the request of isatty. F_SETOWN would let a process signal others.
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD F_GETFD F_SETFD F_GETFL F_DUPFD_CLOEXEC
IOCTL_REQUESTS = (0x5401, 0x5450, 0x5451)  # TCGETS FIONCLEX FIOCLEX
# Flags of a thread of the C library, which shares all. Any other clone is a process.
THREAD_FLAGS = (0x003D0F00, 0x007D0F00)  # glibc; musl says CLONE_DETACHED too

SIGKILL, EPERM, ENOSYS = 9, 1, 38
MOST_THREADS = 64
LIMITED = ("CPU", "AS", "DATA", "FSIZE", "NOFILE", "NPROC", "CORE")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache")
"""Shared libraries and data of the system that the standard library needs."""


class Refused(Exception):
    """A layer that should be in force is not."""


def _call(what: str, function: str, *arguments: Any) -> int:
    """Call a function of the C library; `what` names the layer if it fails."""
    result: int = getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments)
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces(kind: str) -> None:
    """Leave the network, the IPC objects and the writable view of the file system behind.

    Args:
        kind: `user` makes a user namespace first, `root` needs privileges, `none` does nothing.
    """
    if kind == "none":
        return
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS | (CLONE_NEWUSER if kind == "user" else 0)
    _call("unshare", "unshare", flags)
    if kind == "user":
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError as error:
            raise Refused(f"user namespace: {error.strerror}") from None
    _call("private mounts", "mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _call("read-only mounts", "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32)


def enter_pid_namespace(kind: str) -> None:
    """Let the next child be the first process of a namespace, where it can name no other."""
    if kind != "none":
        _call("process namespace", "unshare", CLONE_NEWPID)


def die_with_parent() -> None:
    """Get SIGKILL when the parent ends."""
    if LINUX:
        _call("PDEATHSIG", "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def drop_privileges() -> None:
    """Give up every capability, for good, and be invisible to other processes of the same user."""
    if not LINUX:
        return
    _call("no_new_privs", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("capset", "capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    _call("dumpable", "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    die_with_parent()  # again: a change of credentials clears it


def set_limits(names: Sequence[str], *, cpu_seconds: int, memory_bytes: int, threads: int = 0) -> None:
    """Set the resource limits of these names, soft and hard.

    Args:
        names: of the limits, in `resource` without RLIMIT_.
        cpu_seconds: of this process.
        memory_bytes: address space of this process.
        threads: most threads and processes of this user; 0 where only this limit stops new ones.
    """
    values = {"CPU": cpu_seconds, "AS": memory_bytes, "DATA": memory_bytes, "NOFILE": 64, "NPROC": threads}
    for name in names:
        kind, value = getattr(resource, f"RLIMIT_{name}"), values.get(name, 0)
        hard = resource.getrlimit(kind)[1]
        # The soft limit of the CPU is a signal that can be ignored, the hard one kills.
        wanted = (value, value + 1) if name == "CPU" else (value, value)
        if hard != resource.RLIM_INFINITY:
            wanted = (min(wanted[0], hard), min(wanted[1], hard))
        try:
            resource.setrlimit(kind, wanted)
        except (OSError, ValueError) as error:
            raise Refused(f"limit {name}: {error}") from None


def readable_paths() -> list[str]:
    """Return the folders and files of the standard library and of shared libraries."""
    own = [path for path in sys.path if os.path.isabs(path)]
    found = [os.path.join(sys.base_exec_prefix, "lib"), *own, *LIBRARIES, "/etc/localtime"]
    return [path for path in dict.fromkeys(map(os.path.realpath, found)) if path != "/" and os.path.exists(path)]


def _grants(path: str) -> list[tuple[str, int]]:
    """Return paths to grant for a folder or file, with their rights, without installed packages.

    The kernel knows no exception from a rule. So a library folder with packages is granted child
    by child, and only its names can be listed, which imports need.
    """
    if not os.path.isdir(path):
        return [(path, READ_FILE)]
    if not _holds_packages(path):
        return [(path, READ_FILE | READ_DIR)]
    found = [(path, READ_DIR)]
    with os.scandir(path) as children:
        for child in children:
            if not child.is_symlink() and not child.name.endswith("-packages"):
                found += _grants(child.path)
    return found


def _holds_packages(path: str) -> bool:
    with os.scandir(path) as children:
        names = [child.name for child in children if child.is_dir(follow_symlinks=False)]
    return any(
        name.endswith("-packages") or (name.startswith("python") and _holds_packages(os.path.join(path, name)))
        for name in names
    )


def landlock_version() -> int:
    """Return the version of the kernel's Landlock interface; 0 without."""
    try:
        version = (None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
        return _call("Landlock", "syscall", SYS_LANDLOCK[0], *version) if LINUX else 0
    except Refused:
        return 0


def landlock_ruleset(version: int, paths: Sequence[str]) -> int:
    """Return a descriptor of rules: only `paths` readable, no writes, TCP or signals to others."""
    files = (1 << FILE_RIGHTS[min(version, len(FILE_RIGHTS)) - 1]) - 1
    rights = (ctypes.c_uint64 * 3)(files, NET_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    ruleset = _call("Landlock", "syscall", SYS_LANDLOCK[0], rights, ctypes.c_size_t(size), 0)
    for path, allowed in dict.fromkeys(grant for each in paths for grant in _grants(each)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = allowed.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        added = (SYS_LANDLOCK[1], ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        _call(f"Landlock rule for {path}", "syscall", *added)
        os.close(descriptor)
    return ruleset


def landlock(ruleset: int) -> None:
    """Put these rules in force for this process, for good."""
    _call("Landlock", "syscall", SYS_LANDLOCK[2], ruleset, 0)
    os.close(ruleset)


def seccomp_program() -> bytes:
    """Return the filter: calls of the list pass, others fail, another architecture's kill."""
    if os.uname().machine not in MACHINES:
        raise Refused(f"seccomp: no list of system calls for {os.uname().machine}")
    audited, allowed, (fcntl, ioctl, prlimit, clone, clone3) = MACHINES[os.uname().machine]
    load, equal, back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little")

    def argument(call: int, index: int, values: Sequence[int]) -> list[bytes]:
        checks = [step(equal, value, no=1) + step(back, RET_ALLOW) for value in values]
        body = [step(load, 16 + 8 * index), *checks, step(back, RET_ERRNO | EPERM)]
        return [step(equal, call, no=sum(map(len, body)) // 8), *body]

    program = [step(load, 4), step(equal, audited, yes=1), step(back, RET_KILL), step(load, 0)]
    for call in allowed:
        program += [step(equal, call, no=1), step(back, RET_ALLOW)]
    program += argument(fcntl, 1, FCNTL_COMMANDS)
    program += argument(ioctl, 1, IOCTL_REQUESTS)
    program += argument(prlimit, 0, (0,))
    program += argument(clone, 0, THREAD_FLAGS)
    # The C library falls back to clone, whose flags are visible, only without clone3.
    program += [step(equal, clone3, no=1), step(back, RET_ERRNO | ENOSYS), step(back, RET_ERRNO | EPERM)]
    return b"".join(program)


def seccomp() -> None:
    """Allow only the system calls of `seccomp_program`, for good."""
    program = seccomp_program()
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    pointer = ctypes.byref(Program(len(program) // 8, ctypes.addressof(code)))
    _call("seccomp", "prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


DENIED = (
    "ctypes.", "fcntl.", "ftplib.", "http.", "imaplib.", "nntplib.", "os.chflags", "os.chmod", "os.chown",
    "os.exec", "os.fork", "os.kill", "os.link", "os.lockf", "os.mkdir", "os.posix_spawn", "os.remove",
    "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile", "os.symlink", "os.system",
    "os.truncate", "os.utime", "poplib.", "pty.", "resource.", "shutil.", "signal.", "smtplib.", "socket.",
    "subprocess.", "syslog.", "tempfile.", "urllib.", "webbrowser.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def audit(paths: Sequence[str]) -> None:
    """Refuse Python's own ways to other processes, the network and files.

    Of `paths`, installed packages stay closed: a program may look for a benchmark's answers there.
    """
    # The hook's names are bound here: a program can rebind those of this module and of Python.
    realpath, fspath, is_a, number, octets = os.path.realpath, os.fspath, isinstance, int, bytes
    writing, denied, refusal, reason = WRITING, DENIED, PermissionError, EPERM
    files, folders = frozenset(paths), tuple(path + "/" for path in paths)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not is_a(arguments[0], number):
            path = realpath(fspath(arguments[0]))
            path = path.decode(errors="replace") if is_a(path, octets) else path
            known = path in files or (path.startswith(folders) and "-packages/" not in path)
            if arguments[2] & writing or not known:
                raise refusal(reason, "the sandbox does not open this file", path)
        elif event.startswith(denied):
            raise refusal(reason, f"the sandbox does not allow {event}")

    sys.addaudithook(hook)


def confine(settings: dict[str, Any], *, ruleset: int) -> None:
    """Apply every layer to this process, for good.

    Args:
        settings: `layers` as `available` found them, `cpu_seconds`, `memory_bytes`.
        ruleset: descriptor of `landlock_ruleset`, if the layers have Landlock.
    """
    layers = settings["layers"]
    cpu_seconds, memory_bytes = settings["cpu_seconds"], settings["memory_bytes"]
    threads = MOST_THREADS if layers["seccomp"] else 0
    set_limits(layers["limits"], cpu_seconds=cpu_seconds, memory_bytes=memory_bytes, threads=threads)
    drop_privileges()
    if layers["landlock"]:
        landlock(ruleset)
    if layers["seccomp"]:
        seccomp()


def available() -> dict[str, Any]:
    """Return the layers that this machine allows, each tried in a process of its own."""
    version = landlock_version()

    def namespaces(kind: str) -> None:
        enter_namespaces(kind)
        enter_pid_namespace(kind)
        _works(lambda: None)  # a child starts

    def rules() -> None:
        drop_privileges()
        landlock(landlock_ruleset(version, readable_paths()))

    def filtered() -> None:
        drop_privileges()
        seccomp()

    def limit(name: str) -> None:
        set_limits([name], cpu_seconds=1, memory_bytes=1 << 30)

    return {
        "namespaces": next((kind for kind in ("user", "root") if _works(namespaces, kind)), "none"),
        "landlock": version if version and _works(rules) else 0,
        "seccomp": _works(filtered),
        "limits": [name for name in LIMITED if _works(limit, name)],
    }


def _works(attempt: Callable[..., None], *arguments: Any) -> bool:
    """Return whether an attempt succeeds, in a child."""
    child = os.fork()
    if child == 0:
        try:
            attempt(*arguments)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
