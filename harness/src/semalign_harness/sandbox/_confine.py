"""What a process on Linux can take away from itself without privileges, through ctypes; resource limits everywhere."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:  # typing would take a quarter of the time that a program takes
    Any = object

LINUX = sys.platform == "linux"

# <linux/sched.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
# <sys/mount.h>, <linux/mount.h>, <fcntl.h>
MS_REC, MS_PRIVATE = 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
# <linux/prctl.h>, <linux/capability.h>, <linux/seccomp.h>, <linux/audit.h>
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


class Machine:
    """An architecture as seccomp sees it.

    Args:
        audit: AUDIT_ARCH_*.
        allowed: numbers of the calls without a way out of the process: read, write, map, wait, ask for the time.
        fcntl, ioctl, prlimit, clone, clone3: numbers of the calls that pass with some arguments only.
    """

    def __init__(
        self, audit: int, allowed: tuple[int, ...], *, fcntl: int, ioctl: int, prlimit: int, clone: int, clone3: int
    ) -> None:
        self.audit, self.allowed = audit, allowed
        self.fcntl, self.ioctl, self.prlimit, self.clone, self.clone3 = fcntl, ioctl, prlimit, clone, clone3


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
X86_64 = Machine(0xC000003E, ALLOWED_X86_64, fcntl=72, ioctl=16, prlimit=302, clone=56, clone3=435)
AARCH64 = Machine(0xC00000B7, ALLOWED_AARCH64, fcntl=25, ioctl=29, prlimit=261, clone=220, clone3=435)
MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}
# Descriptor flags (no owner, no signals: F_SETOWN would let a process signal others), and what isatty asks.
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD F_GETFD F_SETFD F_GETFL F_DUPFD_CLOEXEC
# How the C library starts a thread: all is shared, and it ends with the process. Any other clone is a process.
THREAD_FLAGS = (0x003D0F00, 0x007D0F00)  # glibc; musl says CLONE_DETACHED too
IOCTL_REQUESTS = (0x5401, 0x5450, 0x5451)  # TCGETS FIONCLEX FIOCLEX

SIGKILL, EPERM, ENOSYS = 9, 1, 38
MOST_THREADS = 64
LIMITED = ("CPU", "AS", "DATA", "FSIZE", "NOFILE", "NPROC", "CORE")


class Refused(Exception):
    """A layer that should be in force is not."""


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise Refused(f"{what}: {os.strerror(number)}")
    return result


# Namespaces


def enter_namespaces(kind: str) -> None:
    """Leave the network, the IPC objects and the writable view of the file system behind.

    Args:
        kind: `user` makes a user namespace first, `root` relies on the caller's privileges, `none` does nothing.

    Raises:
        Refused: the kernel or its configuration does not allow it.
    """
    if kind == "none":
        return
    libc, uid, gid = _libc(), os.getuid(), os.getgid()
    flags = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS | (CLONE_NEWUSER if kind == "user" else 0)
    _check(libc.unshare(flags), "unshare")
    if kind == "user":
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError as error:
            raise Refused(f"user namespace: {error.strerror}") from None
    _check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32), "read-only mounts")


def enter_pid_namespace(kind: str) -> None:
    """Let the next child be the first process of a namespace of its own, where it can name no other.

    Raises:
        Refused: the kernel or its configuration does not allow it.
    """
    if kind != "none":
        _check(_libc().unshare(CLONE_NEWPID), "process namespace")


# Privileges, limits


def die_with_parent() -> None:
    """Get SIGKILL when the parent ends."""
    if LINUX:
        _check(_libc().prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "PDEATHSIG")


def drop_privileges() -> None:
    """Give up every capability, for good, and be invisible to other processes of the same user."""
    if not LINUX:
        return
    libc = _libc()
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(libc.capset(header, nothing), "capset")
    _check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    die_with_parent()  # again: a change of credentials clears it


def set_limits(names: Sequence[str], *, cpu_seconds: int, memory_bytes: int, threads: int = 0) -> None:
    """Set the resource limits of these names, soft and hard.

    Args:
        names: of the limits, in `resource` without RLIMIT_.
        cpu_seconds: of this process.
        memory_bytes: address space of this process.
        threads: most threads and processes of this user; 0 where nothing but this limit keeps from new processes.
    """
    values = {"CPU": cpu_seconds, "AS": memory_bytes, "DATA": memory_bytes, "NOFILE": 64, "NPROC": threads}
    for name in names:
        kind, value = getattr(resource, f"RLIMIT_{name}"), values.get(name, 0)
        hard = resource.getrlimit(kind)[1]
        # One second between the soft limit of the CPU, a signal that can be ignored, and the hard one, which kills.
        wanted = (value, value + 1) if name == "CPU" else (value, value)
        if hard != resource.RLIM_INFINITY:
            wanted = (min(wanted[0], hard), min(wanted[1], hard))
        try:
            resource.setrlimit(kind, wanted)
        except (OSError, ValueError) as error:
            raise Refused(f"limit {name}: {error}") from None


# Landlock


def readable_paths() -> list[str]:
    """Folders and files to import the standard library from, with the system's shared libraries."""
    own = [path for path in sys.path if os.path.isabs(path)]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"]
    found = [os.path.join(sys.base_exec_prefix, "lib"), *own, *system, "/etc/ld.so.cache", "/etc/localtime"]
    return [path for path in dict.fromkeys(map(os.path.realpath, found)) if path != "/" and os.path.exists(path)]


def _grants(path: str) -> list[tuple[str, int]]:
    """Paths to grant for a folder or file, each with its rights: installed packages inside it stay closed.

    The kernel knows no exception from a rule, so that a library folder with packages is granted child by child; only
    its names are to list, which imports need.
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
    """Version of the kernel's Landlock interface; 0 without."""
    if not LINUX:
        return 0
    version = _libc().syscall(SYS_LANDLOCK[0], None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, int(version))


def landlock_ruleset(version: int, paths: Sequence[str]) -> int:
    """Rules, as a descriptor: nothing writable, only `paths` readable, no TCP, no signals to other processes.

    Args:
        version: of `landlock_version`.
        paths: files and folders to read.

    Raises:
        Refused: the kernel does not do it.
    """
    libc = _libc()
    files = (1 << FILE_RIGHTS[min(version, len(FILE_RIGHTS)) - 1]) - 1
    rights = (ctypes.c_uint64 * 3)(files, NET_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    ruleset = _check(libc.syscall(SYS_LANDLOCK[0], rights, ctypes.c_size_t(size), 0), "Landlock")
    for path, allowed in dict.fromkeys(grant for each in paths for grant in _grants(each)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = allowed.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        _check(libc.syscall(SYS_LANDLOCK[1], ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0), f"Landlock rule for {path}")
        os.close(descriptor)
    return ruleset


def landlock(ruleset: int) -> None:
    """Put these rules in force for this process, for good.

    Raises:
        Refused: the kernel does not do it.
    """
    _check(_libc().syscall(SYS_LANDLOCK[2], ruleset, 0), "Landlock")
    os.close(ruleset)


# seccomp


def seccomp_program() -> bytes:
    """The filter: calls of the list pass, all others fail with EPERM; another architecture's calls kill.

    Raises:
        Refused: no list for this machine.
    """
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        raise Refused(f"seccomp: no list of system calls for {os.uname().machine}")
    load, equal, back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little")

    def argument(call: int, index: int, values: Sequence[int]) -> list[bytes]:
        checks = [step(equal, value, no=1) + step(back, RET_ALLOW) for value in values]
        body = [step(load, 16 + 8 * index), *checks, step(back, RET_ERRNO | EPERM)]
        return [step(equal, call, no=sum(map(len, body)) // 8), *body]

    program = [step(load, 4), step(equal, machine.audit, yes=1), step(back, RET_KILL), step(load, 0)]
    for call in machine.allowed:
        program += [step(equal, call, no=1), step(back, RET_ALLOW)]
    program += argument(machine.fcntl, 1, FCNTL_COMMANDS)
    program += argument(machine.ioctl, 1, IOCTL_REQUESTS)
    program += argument(machine.prlimit, 0, (0,))
    program += argument(machine.clone, 0, THREAD_FLAGS)
    # The C library falls back to clone, whose flags can be seen here, only when clone3 does not exist.
    program += [step(equal, machine.clone3, no=1), step(back, RET_ERRNO | ENOSYS), step(back, RET_ERRNO | EPERM)]
    return b"".join(program)


def seccomp() -> None:
    """Allow only the system calls of `seccomp_program`, for good.

    Raises:
        Refused: no list for this machine, or the kernel does not do it.
    """
    program = seccomp_program()
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    pointer = ctypes.byref(Program(len(program) // 8, ctypes.addressof(code)))
    _check(_libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0), "seccomp")


# The portable last line

DENIED = (
    "ctypes.", "fcntl.", "ftplib.", "http.", "imaplib.", "nntplib.", "os.chflags", "os.chmod", "os.chown",
    "os.exec", "os.fork", "os.kill", "os.link", "os.lockf", "os.mkdir", "os.posix_spawn", "os.remove",
    "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile", "os.symlink", "os.system",
    "os.truncate", "os.utime", "poplib.", "pty.", "resource.", "shutil.", "signal.", "smtplib.", "socket.",
    "subprocess.", "syslog.", "tempfile.", "urllib.", "webbrowser.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def audit(paths: Sequence[str]) -> None:
    """Refuse Python's own ways to other processes, the network and files, also where the kernel would allow them.

    Of `paths`, installed packages stay closed: a program may look for a benchmark's answers there.
    """
    # All that the hook uses is bound here: a program can rebind the names of this module and of Python.
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


# All of it


def confine(settings: dict[str, Any], *, ruleset: int) -> None:
    """Apply every layer to this process, for good.

    Args:
        settings: `layers` as `available` found them, `cpu_seconds`, `memory_bytes`.
        ruleset: descriptor of `landlock_ruleset`, if the layers have Landlock.

    Raises:
        Refused: one of them could not be applied.
    """
    layers = settings["layers"]
    set_limits(
        layers["limits"],
        cpu_seconds=settings["cpu_seconds"],
        memory_bytes=settings["memory_bytes"],
        threads=MOST_THREADS if layers["seccomp"] else 0,
    )
    drop_privileges()
    if layers["landlock"]:
        landlock(ruleset)
    if layers["seccomp"]:
        seccomp()


def available() -> dict[str, Any]:
    """The layers that this machine allows, each tried in a process of its own."""
    version = landlock_version()
    return {
        "namespaces": next((kind for kind in ("user", "root") if _works(_try_namespaces, kind)), "none"),
        "landlock": version if version and _works(_try_landlock, version) else 0,
        "seccomp": _works(_try_seccomp),
        "limits": [name for name in LIMITED if _works(_try_limit, name)],
    }


def _try_namespaces(kind: str) -> None:
    enter_namespaces(kind)
    enter_pid_namespace(kind)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _try_landlock(version: int) -> None:
    drop_privileges()
    landlock(landlock_ruleset(version, readable_paths()))


def _try_seccomp() -> None:
    drop_privileges()
    seccomp()


def _try_limit(name: str) -> None:
    set_limits([name], cpu_seconds=1, memory_bytes=1 << 30)


def _works(attempt: Callable[..., None], *arguments: Any) -> bool:
    """Whether an attempt succeeds, in a child."""
    child = os.fork()
    if child == 0:
        try:
            attempt(*arguments)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
