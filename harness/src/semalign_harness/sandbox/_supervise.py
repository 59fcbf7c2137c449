"""The process that starts player and referee, watches them, ends both and reports."""

import os
import select
import time
from collections.abc import Callable

from . import _confine
from ._confine import SIGKILL
from ._player import play
from ._referee import GONE, UNREADY, referee
from ._typing import Any
from ._values import Codec, receive, send

VERDICT_LIMIT = 1 << 16
SIGXCPU, SILENT = 24, "silent"
FIRST_FREE = 64
"""Above every descriptor that this process has open."""
INTERVAL = 0.05
"""Seconds between two checks of the processes."""
WINDOW = 0.5
"""Seconds over which CPU time is compared with the clock: a busy machine runs each a little."""
IDLE = 0.01
"""A smaller share of the CPU counts as sleep."""
CPU_CLOCK = 2
"""The clock of a process by its number counts user and system time, for all its threads."""
LAST_WORDS = 1.0
"""Seconds for a program whose pipe has closed to end by itself, with a status."""

Report = tuple[bool, str, str]
"""Passed, reason, detail."""


def main(settings: dict[str, Any]) -> None:
    """Probe the machine, or judge the job on standard input; report on standard output."""
    codec = Codec()
    if settings["probe"]:
        send(1, codec.encode(_confine.available()))
        return
    _confine.die_with_parent()
    if settings["parent"] not in (None, os.getppid()):
        return
    try:
        report = _judge(settings)
    except _confine.Refused as error:
        report = (False, UNREADY, str(error))
    send(1, codec.encode(report))


def _judge(settings: dict[str, Any]) -> Report:
    layers = settings["layers"]
    requests, replies, verdict, output = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    paths = _confine.readable_paths()
    rules = [_confine.landlock_ruleset(layers["landlock"], paths)] if layers["landlock"] else []
    _confine.enter_namespaces(layers["namespaces"])
    os.chdir("/")

    def judging() -> None:
        try:
            _confine.confine(settings, ruleset=6)
        except Exception as error:
            send(5, Codec().encode((False, UNREADY, f"{type(error).__name__}: {error}")))
            return
        referee(0, 3, 4, 5)

    def playing() -> None:
        _confine.confine(settings, ruleset=5)
        _confine.audit(paths)
        play(3, 4)

    # Neither process starts with the job in its memory: only the referee holds its pipe.
    judge = _start([0, nothing, nothing, requests[1], replies[0], verdict[1], *rules], judging)
    _confine.enter_pid_namespace(layers["namespaces"])
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
        _confine.die_with_parent()
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

    The kernel limits the CPU time of each process. This limits the time in which neither of them
    uses any: sleep, which is no work that a busy machine could slow down.
    """
    start = last = time.monotonic()
    rest = _Rest(watched)
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
        last = now
        if (threads := max(map(_threads, watched))) > _confine.MOST_THREADS:
            return False, "memory", f"runs {threads} threads, more than {_confine.MOST_THREADS}"
        if (asleep := rest.look()) > settings["idle_seconds"]:
            return False, "timeout", f"slept for {asleep:.0f} seconds"


class _Rest:
    """Seconds in which processes have slept: neither used a CPU nor waited for one.

    Where the system does not say how long they waited for a CPU, the time since the last look
    counts as sleep if they used next to none in it.
    """

    def __init__(self, processes: list[int]) -> None:
        self.processes, self.seconds = processes, 0.0
        self.delays: dict[str, float] = {}
        """Seconds that each thread waited for a CPU, also of threads that have ended."""
        self.used: dict[int, float] = {}
        self.start = self.last = time.monotonic()
        self.before = self._busy()

    def look(self) -> float:
        now = time.monotonic()
        if now - self.last > WINDOW:
            busy = self._busy()
            if self.delays:
                self.seconds = now - self.start - busy
            elif busy - self.before < IDLE * (now - self.last):
                self.seconds += now - self.last
            self.last, self.before = now, busy
        return self.seconds

    def _busy(self) -> float:
        """Return seconds of use and of waiting for it; else the wall time."""
        if not _confine.LINUX:
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
    """Return the number of threads of a process; 0 where the system does not say."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[17])
    except OSError:
        return 0


def _wait(process: int, seconds: float) -> tuple[int, float] | None:
    """Return status and CPU seconds of a child once it has ended; None if it still runs."""
    deadline = time.monotonic() + seconds
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            return status, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def _last_words(ended: tuple[int, float] | None, settings: dict[str, Any], detail: str) -> tuple[str, str]:
    """Return reason and detail of a process that closed its pipe."""
    if ended is None:
        return "exited", f"{detail}, but still runs"
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
