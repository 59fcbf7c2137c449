"""The process that starts player and referee, watches the clock and the output, ends both and reports."""

import os
import select
import time
from collections.abc import Callable

from ._confine import (
    LINUX,
    MOST_THREADS,
    SIGKILL,
    Refused,
    audit,
    available,
    confine,
    die_with_parent,
    enter_namespaces,
    enter_pid_namespace,
    landlock_ruleset,
    readable_paths,
)
from ._player import play
from ._referee import GONE, UNREADY, referee
from ._values import Codec, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn
else:  # typing would take a quarter of the time that a program takes
    Any = NoReturn = object

VERDICT_LIMIT = 1 << 16
SIGXCPU, SILENT = 24, "silent"
FIRST_FREE = 64
"""Above every descriptor that this process has open."""
INTERVAL = 0.05
"""Seconds between looks at the processes."""
WINDOW = 0.5
"""Seconds over which CPU time is compared with the clock: on a busy machine each process runs a little in them."""
IDLE = 0.01
"""A smaller share of the CPU counts as sleep."""
CPU_CLOCK = 2
"""The clock of a process by its number counts user and system time, for all its threads."""
LAST_WORDS = 1.0
"""Seconds that a program whose pipe has closed is given to end by itself, so that its status is known."""

Report = tuple[bool, str, str]
"""Passed, reason, detail."""


def main(settings: dict[str, Any]) -> None:
    """Probe the machine, or judge the program whose job comes over standard input; reports on standard output."""
    codec = Codec()
    if settings["probe"]:
        send(1, codec.encode(available()))
        return
    die_with_parent()
    if settings["parent"] not in (None, os.getppid()):
        return
    try:
        report = _judge(settings)
    except Refused as error:
        report = (False, UNREADY, str(error))
    send(1, codec.encode(report))


def _judge(settings: dict[str, Any]) -> Report:
    layers = settings["layers"]
    requests, replies, verdict, output = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    paths = readable_paths()
    rules = [landlock_ruleset(layers["landlock"], paths)] if layers["landlock"] else []
    enter_namespaces(layers["namespaces"])
    os.chdir("/")

    def judging() -> None:
        try:
            confine(settings, ruleset=6)
        except Exception as error:
            send(5, Codec().encode((False, UNREADY, f"{type(error).__name__}: {error}")))
            return
        referee(0, 3, 4, 5)

    def playing() -> None:
        confine(settings, ruleset=5)
        audit(paths)
        play(3, 4)

    # Neither process has the job in its memory when it starts: only the referee holds the pipe that it comes from.
    judge = _start([0, nothing, nothing, requests[1], replies[0], verdict[1], *rules], judging)
    enter_pid_namespace(layers["namespaces"])
    player = _start([nothing, output[1], output[1], requests[0], replies[1], *rules], playing)
    for descriptor in (0, nothing, *requests, *replies, verdict[1], output[1], *rules):
        os.close(descriptor)
    running = {player, judge}
    try:
        report = _watch(settings, verdict[0], output[0], [player, judge])
        suspect = {GONE: player, SILENT: judge}.get(report[1])
        if suspect is not None:
            ended = _wait(suspect, LAST_WORDS)
            if ended is not None:
                running.remove(suspect)
            report = (False, *_last_words(ended, settings, report[2]))
    finally:
        for process in running:
            os.kill(process, SIGKILL)
            os.waitpid(process, 0)
    return report


def _start(descriptors: list[int], work: Callable[[], None]) -> int:
    """Fork a process that has these descriptors as its 0, 1, 2, … and no others, and works."""
    process = os.fork()
    if process:
        return process
    try:
        die_with_parent()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, FIRST_FREE + number)
        for number in range(len(descriptors)):
            os.dup2(FIRST_FREE + number, number)
        os.closerange(len(descriptors), 1 << 16)
        work()
    finally:
        os._exit(1)


def _watch(settings: dict[str, Any], verdict: int, output: int, watched: list[int]) -> Report:
    """Wait for the verdict, or until one limit is reached.

    The kernel limits the CPU time of each process. This limits the time in which neither of them uses any: sleep, which
    is no work that a busy machine could slow down.
    """
    start = last = time.monotonic()
    rest = Rest(watched)
    printed, pipes = 0, [verdict, output]
    while True:
        ready = select.select(pipes, [], [], INTERVAL)[0]
        now = time.monotonic()
        if verdict in ready:
            message = receive(verdict, VERDICT_LIMIT)
            if message is None:
                return False, SILENT, "the tests' process ended without a verdict"
            passed, reason, detail = Codec().decode(message)
            return passed, reason, detail
        if output in ready:
            chunk = os.read(output, 1 << 16)
            printed += len(chunk)
            if not chunk:
                pipes.remove(output)
            if printed > settings["output_bytes"]:
                return False, "output", f"printed more than {settings['output_bytes']} bytes"
        if now - start > settings["wall_seconds"]:
            return False, "timeout", f"no verdict after {settings['wall_seconds']:g} seconds"
        if now - last < INTERVAL:
            continue
        if (threads := max(map(_threads, watched))) > MOST_THREADS:
            return False, "memory", f"runs {threads} threads, more than {MOST_THREADS}"
        if now - last > WINDOW:
            rest.look()
            last = now
        if rest.seconds > settings["idle_seconds"]:
            return False, "timeout", f"slept for {rest.seconds:.0f} seconds"


class Rest:
    """How long processes have slept: neither used a CPU nor waited for one.

    Where the system does not say how long they waited for a CPU, a look counts as sleep if they used next to none
    since the last one.

    Args:
        processes: their numbers.
    """

    def __init__(self, processes: list[int]) -> None:
        self.processes, self.seconds = processes, 0.0
        self.delays: dict[str, float] = {}
        """Seconds that each thread waited for a CPU, also of threads that have ended."""
        self.used: dict[int, float] = {}
        self.start = self.last = time.monotonic()
        self.before = self._busy()

    def look(self) -> None:
        """Count up to now."""
        now, busy = time.monotonic(), self._busy()
        if self.delays:
            self.seconds = now - self.start - busy
        elif busy - self.before < IDLE * (now - self.last):
            self.seconds += now - self.last
        self.last, self.before = now, busy

    def _busy(self) -> float:
        """Seconds of use and of waiting for it; the wall time where the system says neither."""
        if not LINUX:
            return time.monotonic()
        for process in self.processes:
            try:
                self.used[process] = time.clock_gettime((~process << 3) | CPU_CLOCK)
                folder = f"/proc/{process}/task"
                for thread in os.listdir(folder):
                    with open(f"{folder}/{thread}/schedstat", "rb") as file:
                        run, delay, _ = map(int, file.read().split())
                    if run:  # a kernel that does not count says nothing but zeros
                        self.delays[thread] = delay / 1e9
            except (OSError, ValueError):  # it has ended, or the system does not say
                pass
        return sum(self.used.values()) + sum(self.delays.values())


def _threads(process: int) -> int:
    """How many threads a process has; 0 where the system does not say."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[17])
    except OSError:
        return 0


def _wait(process: int, seconds: float) -> tuple[int, float] | None:
    """Status and CPU seconds of a child once it has ended; None if it goes on."""
    deadline = time.monotonic() + seconds
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            return status, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def _last_words(ended: tuple[int, float] | None, settings: dict[str, Any], detail: str) -> tuple[str, str]:
    """Reason and detail of a process that closed its pipe."""
    if ended is None:
        return "exited", f"{detail}, but goes on"
    status, seconds = ended
    if os.WIFEXITED(status):
        return "exited", f"{detail}, with status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    if number == SIGXCPU or (number == SIGKILL and seconds >= settings["cpu_seconds"]):
        return "timeout", f"used {seconds:.0f} seconds of CPU time"
    if number == SIGKILL:
        return "memory", "killed by the system, which does that when memory runs out"
    import signal  # late: it is slow, and few programs come here

    return "crashed", f"{detail}: {signal.Signals(number).name}"
