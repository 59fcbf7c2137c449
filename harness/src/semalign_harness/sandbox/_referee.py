"""The process that runs the tests: it holds no line of the program, only stand-ins that ask the player's process."""

import builtins
import os
import sys

from ._player import READY
from ._values import Codec, Malformed, NotPlain, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn
else:  # typing would take a quarter of the time that a program takes
    Any = NoReturn = object

UNREADY, GONE, BROKEN, ENDED = "sandbox", "gone", "broken", "exited"


DETAIL = 1000
"""Longest detail, in characters: much of it is the program's own words."""


class Stopped(BaseException):
    """The program ended or broke the protocol: no test goes on, whatever it catches."""


class Remote:
    """An object of the program. Equality is identity: the program's own `__eq__` has no say in a comparison."""

    def __init__(self, link: "Link", number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._link.ask("call", self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of the standard library, such as those of copy and of operators
            raise AttributeError(name)
        return self._link.ask("get", self, name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an object of the program cannot be copied by its tests")

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self, key)

    def __iter__(self) -> Any:
        return self._link.ask("iter", self)

    def __next__(self) -> Any:
        return self._link.ask("next", self)

    def __len__(self) -> int:
        return int(self._link.ask("len", self))

    def __bool__(self) -> bool:
        return bool(self._link.ask("bool", self))

    def __str__(self) -> str:
        return str(self._link.ask("str", self))

    def __repr__(self) -> str:
        return str(self._link.ask("repr", self))


OUT_OF_MEMORY = ("without exception set", "without setting an exception")
"""How the SystemError ends that CPython raises in place of a MemoryError where an allocation inside it fails."""


class Link(Codec):
    """Calls into the player's process."""

    def __init__(self, requests: int, replies: int, *, limit: int) -> None:
        self.requests, self.replies, self.limit = requests, replies, limit
        self.remotes: dict[int, Remote] = {}
        self.wanted_modules: set[str] = set()
        self.stopped: tuple[str, str] | None = None

    def number(self, value: Any) -> int:
        """The number of a stand-in."""
        if type(value) is not Remote:
            raise NotPlain(f"the tests pass a value of type {type(value).__name__}, which does not leave their process")
        return int(object.__getattribute__(value, "_number"))

    def resolve(self, number: int) -> Remote:
        """The stand-in for an object of the program."""
        return self.remotes.setdefault(number, Remote(self, number))

    def module(self, number: int, name: str) -> Any:
        """The standard module that the tests call by this name, from this process; else a stand-in."""
        if name in self.wanted_modules and name in sys.stdlib_module_names:
            return __import__(name)
        return self.resolve(number)

    def load(self, code: str, names: list[str]) -> dict[str, Any]:
        """Run the program; returns those names that it defines."""
        if receive(self.replies, self.limit) != self.encode(READY):
            raise self._stop(UNREADY, "the program's process could not be confined")
        self.wanted_modules = set(names)
        found = self.ask("load", code, names)
        self.wanted_modules = set()
        try:
            return {name: value for name, (known, value) in zip(names, found, strict=True) if known is True}
        except (TypeError, ValueError) as error:
            raise self._stop(BROKEN, f"the program's process sent no names: {error}") from None

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Send one request and wait for its reply.

        Raises:
            Stopped: the program ended, or its process broke the protocol.
            Exception: what the program raised, as the built-in class nearest to it.
        """
        if self.stopped:
            raise Stopped
        ticket = os.urandom(16)
        request = self.encode((ticket, operation, arguments))
        try:
            send(self.requests, request)
            reply = receive(self.replies, self.limit)
        except (OSError, Malformed) as error:
            raise self._stop(GONE if isinstance(error, OSError) else BROKEN, str(error)) from None
        if reply is None:
            raise self._stop(GONE, "the program ended before it answered")
        try:
            ticket_back, fine, value, changed = self.decode(reply)
            if type(ticket_back) is not bytes or ticket_back != ticket:
                raise Malformed("an answer to another question")
            if fine is not True:
                kind, message = map(str, value)
        except (Malformed, TypeError, ValueError) as error:
            raise self._stop(BROKEN, f"the program's process broke the protocol: {error}") from None
        if fine is not True:
            raise self._error(kind, message)
        if operation == "call" and changed is not None:
            _reflect(arguments[1], changed)
        return value

    def _stop(self, reason: str, detail: str) -> Stopped:
        self.stopped = self.stopped or (reason, detail)
        return Stopped()

    def _error(self, kind: str, message: str) -> BaseException:
        if kind == "SystemError" and message.endswith(OUT_OF_MEMORY):
            return MemoryError()
        found = getattr(builtins, kind, None)
        if not (isinstance(found, type) and issubclass(found, Exception)):
            return self._stop(ENDED, f"{kind}: {message}")
        try:
            return found(message)
        except TypeError:  # such as UnicodeDecodeError, which wants five arguments
            return RuntimeError(f"{kind}: {message}")


def _reflect(old: Any, new: Any) -> None:
    """Change the containers of `old` into what the program made of them."""
    if type(old) is not type(new):
        return
    if isinstance(old, tuple | list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            if type(before) is type(after) and isinstance(before, tuple | list | dict | set | bytearray):
                _reflect(before, after)
                if not isinstance(before, tuple) or before == after:
                    continue
            if isinstance(old, list):
                old[index] = after
    elif isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


def referee(job: int, requests: int, replies: int, verdict: int) -> NoReturn:
    """Read the job, run the tests, report, end."""
    message = receive(job, sys.maxsize)
    assert message is not None
    code, prompt, tests, names, trusted, limit = Codec().decode(message)
    link = Link(requests, replies, limit=limit)
    passed, reason, detail = _run(link, code, prompt, tests, names, trusted)
    if link.stopped:  # also where the tests caught it
        passed, (reason, detail) = False, link.stopped
    send(verdict, Codec().encode((passed, reason, detail[:DETAIL])))
    os._exit(0)


def _run(link: Link, code: str, prompt: str, tests: str, names: list[str], trusted: list[str]) -> tuple[bool, str, str]:
    space: dict[str, Any] = {"__name__": "tests"}
    helpers: dict[str, Any] = {"__name__": "prompt"}
    try:
        space.update(link.load(code, names))
        if trusted:
            exec(compile(prompt, "prompt.py", "exec", dont_inherit=True), helpers)
            space.update({name: helpers[name] for name in trusted})
        exec(compile(tests, "tests.py", "exec", dont_inherit=True), space)
    except Stopped:
        return False, "failed", ""
    except NotPlain as error:
        return False, "refused", str(error)
    except MemoryError:
        return False, "memory", "MemoryError"
    except BaseException as error:
        return False, "failed", _describe(error, tests)
    return True, "passed", ""


def _describe(error: BaseException, tests: str) -> str:
    """The error and the line of the tests where it came up."""
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.split("\n")
    where = f" at {lines[number - 1].strip()}" if 0 < number <= len(lines) else ""
    return f"{type(error).__name__}{': ' if str(error) else ''}{error}{where}"
