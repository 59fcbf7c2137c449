"""The process of the tests: it holds stand-ins that ask the player, and nothing of the program."""

import builtins
import os
import sys

from . import _loop
from ._mirror import INSPECTED
from ._peer import Peer, look_up
from ._player import READY, Signature
from ._typing import Any, NoReturn
from ._values import Codec, Malformed, NotPlain, receive, send

UNREADY, GONE, BROKEN, ENDED = "sandbox", "gone", "broken", "exited"
DETAIL = 1000
"""Longest detail, in characters: much of it is the program's own words."""
OUT_OF_MEMORY = ("without exception set", "without setting an exception")
"""Ends of the SystemError that CPython raises where an allocation inside it fails."""
SECRET = ("frame", "code", "traceback", "module")
"""Classes of objects through which a program could reach the tests."""
OPEN = (INSPECTED - {"__code__", "__closure__", "__self__", "__func__", "__dict__"}) | {
    "_asdict", "_fields", "_make", "_replace",
}  # fmt: skip
"""Names with underscores that a program may read of the tests' objects."""
VARIABLE_ARGUMENTS, VARIABLE_KEYWORDS, COROUTINE = 0x04, 0x08, 0x80
"""Flags of a code object."""
ENDS: dict[type[BaseException], str] = {StopIteration: "__next__", StopAsyncIteration: "__anext__"}
"""Exceptions that end a loop, each with the only operation that they end."""


class Stopped(BaseException):
    """The program ended or broke the protocol: no test resumes, whatever it catches."""


class Referee(Peer):
    """The tests' side.

    The program may use only objects that the tests have passed to it, and only by their public
    names, as a program in the same process would: it calls them, reads their attributes and sets
    those that are data.

    Args:
        incoming, outgoing, limit: as for `Peer`.
        tests: text of the tests, with the names and attributes that they use (`mentioned`) and the
            numbers of the lines in which their assertions stand (`asserts`).
    """

    mentioned: frozenset[str] = frozenset()
    asserts: frozenset[int] = frozenset()

    def __init__(self, incoming: int, outgoing: int, *, limit: int, tests: str) -> None:
        super().__init__(incoming, outgoing, first=2, limit=limit, trusting=False)
        self.tests = tests
        self.stopped: tuple[str, str] | None = None
        self.space: dict[str, Any] = {"__name__": "tests"}
        self.names: list[str] = []
        self.exports: dict[str, Any] = {}
        """Names that the program's process has sent, also those that the tests do not use."""

    def load(self, code: str, names: list[str]) -> None:
        """Run the program; those of the names that it binds are bound for the tests too."""
        try:
            if Codec().decode(receive(self.incoming, self.limit) or b"") != READY:
                raise Malformed
        except Malformed:
            raise self.stop(UNREADY, "the program's process could not be confined") from None
        found = self.ask("load", None, code, names)
        if type(found) is not dict:
            raise self.stop(BROKEN, "the program's process sent no names")
        self.names, self.exports = names, found
        self._bind()

    def _bind(self) -> None:
        self.space.update({name: self.exports[name] for name in self.names if name in self.exports})

    def stop(self, reason: str, detail: str | BaseException) -> Stopped:
        """End the tests for the first reason; nothing asks the program about an error any more."""
        if self.stopped is None:
            self.stopped = (reason, "")
            self.stopped = (reason, detail if isinstance(detail, str) else describe(detail, self.tests))
        return Stopped()

    # As a peer

    def stamp(self) -> bytes:
        """Return a ticket that the player cannot have sent before."""
        self.ticket = os.urandom(16)
        return self.ticket

    def check(self, ticket: Any) -> None:
        """Accept only an answer to the last message."""
        if type(ticket) is not bytes or ticket != self.ticket:
            raise ValueError("an answer to another question")

    def may_drop(self, number: int) -> bool:
        """Return whether it is a container, or an object of the program."""
        return number % 2 == 1 or number in self.contents

    def named(self, path: str) -> Any:
        """Return a built-in exception: the program names nothing else."""
        module, _, name = path.partition(":")
        found = getattr(builtins, name, None)
        if module != "builtins" or not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ValueError(f"no exception {path}")
        return found

    def known_exception(self, module: str, qualname: str) -> type | None:
        """Return an exception that the tests name: others could steer what runs the tests."""
        return super().known_exception(module, qualname) if self.mentioned.issuperset(qualname.split(".")) else None

    def details(self, value: Any) -> Any:
        """Return name and parameters of a function."""
        kind = type(value)
        if kind.__name__ in SECRET:
            raise NotPlain(f"the tests pass a value of type {kind.__name__}, which does not leave their process")
        if kind is not type(look_up):
            return None
        return value.__name__, value.__qualname__, value.__doc__, *_signature(value)

    def send(self, payload: Any) -> None:
        """Send a message, unless the program has ended."""
        if self.stopped:
            raise Stopped
        try:
            super().send(payload)
        except OSError as error:
            raise self.stop(GONE, str(error)) from None

    def receive(self) -> Any:
        """Return the next message."""
        try:
            payload = super().receive()
        except EOFError:
            raise self.stop(GONE, "the program ended before it answered") from None
        except Malformed as error:
            raise self._broken(error) from None
        self._bind()
        return payload

    def answer(self, message: Any) -> None:
        """Do what the program asks."""
        try:
            super().answer(message)
        except Malformed as error:
            raise self._broken(error) from None

    def _broken(self, error: Malformed) -> Stopped:
        return self.stop(BROKEN, f"the program's process broke the protocol: {error}")

    def perform(self, operation: str, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Do what the program asks with an object that the tests have passed to it.

        A failed assertion in the tests' own function fails the tests, whatever the program does.
        """
        number = self.numbers.get(id(target), 1)
        if number % 2 or number in self.contents and type(target).__module__ == "builtins":
            raise Malformed("the program acts on a value that is not the tests'")
        if operation in ("getattr", "setattr", "delattr"):
            name = arguments[0]
            public = type(name) is str and (not name.startswith("_") or name in OPEN)
            if not public or (name == "obj" and isinstance(target, AttributeError)):
                raise AttributeError(name)
            fixed = name.startswith("_") or isinstance(target, type) or callable(getattr(type(target), name, None))
            if operation != "getattr" and fixed:
                raise AttributeError(f"the program cannot change {name!r}")
        try:
            found = super().perform(operation, target, arguments, keywords)
            # Python's own value of such a name stays here: the program gets a copy.
            inner = operation == "getattr" and arguments[0].startswith("_") and type(found) in (dict, list, set)
            return found.copy() if inner else found
        except Exception as error:
            asserting = {line for line, function in _lines(error) if function != "<lambda>"}
            if isinstance(error, AssertionError) or asserting & self.asserts:
                raise self.stop("failed", error) from None
            raise

    def raised(self, operation: str, error: BaseException) -> BaseException:
        """Return the exception for the tests; they must name one that ends a loop or process."""
        name = next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
        text = error.args[0] if error.args and type(error.args[0]) is str else ""
        if name == "SystemError" and text.endswith(OUT_OF_MEMORY):
            return MemoryError()
        if not isinstance(error, Exception) and name not in self.mentioned:
            return self.stop(ENDED, f"{name}: {text}")
        for end, step in ENDS.items():
            if isinstance(error, end) and operation != step and end.__name__ not in self.mentioned:
                return RuntimeError(f"the program raised {end.__name__}")
        return error


def _signature(function: Any) -> tuple[Signature, bool]:
    """Return the parameters of a function, and whether it is a coroutine function."""
    code = function.__code__
    names, flags = list(code.co_varnames), code.co_flags
    fixed, named = names[: code.co_argcount], names[code.co_argcount :][: code.co_kwonlyargcount]
    further = names[code.co_argcount + code.co_kwonlyargcount :]
    rest = further.pop(0) if flags & VARIABLE_ARGUMENTS else ""
    others = further.pop(0) if flags & VARIABLE_KEYWORDS else ""
    optional = fixed[len(fixed) - len(function.__defaults__ or ()) :] + list(function.__kwdefaults__ or ())
    signature = (tuple(fixed), tuple(optional), code.co_posonlyargcount, rest, tuple(named), others)
    return signature, bool(flags & COROUTINE)


def referee(job: int, requests: int, replies: int, verdict: int) -> NoReturn:
    """Read the job, run the tests, report, end."""
    message = receive(job, sys.maxsize)
    assert message is not None
    code, prompt, tests, names, trusted, standard, mentioned, asserts, limit = Codec().decode(message)
    link = Referee(replies, requests, limit=limit, tests=tests)
    link.mentioned, link.asserts = mentioned, asserts
    passed, reason, detail = _run(link, code, prompt, names, trusted, standard)
    if link.stopped:  # also where the tests caught it
        passed, (reason, detail) = False, link.stopped
    send(verdict, Codec().encode((passed, reason, detail[:DETAIL])))
    os._exit(0)


def _run(
    link: Referee, code: str, prompt: str, names: list[str], trusted: list[str], standard: dict[str, str]
) -> tuple[bool, str, str]:
    helpers: dict[str, Any] = {"__name__": "prompt"}
    if "asyncio" in link.tests:
        _loop.prepare()
    try:
        link.load(code, names)
        if trusted:
            exec(compile(prompt, "prompt.py", "exec", dont_inherit=True), helpers)
            link.space.update({name: helpers[name] for name in trusted})
        link.space.update({name: look_up(path) for name, path in standard.items()})
        exec(compile(link.tests, "tests.py", "exec", dont_inherit=True), link.space)
    except Stopped:
        return False, "failed", ""
    except NotPlain as error:
        return False, "refused", str(error)
    except MemoryError:
        return False, "memory", "MemoryError"
    except BaseException as error:
        return False, "failed", describe(error, link.tests)
    return True, "passed", ""


def describe(error: BaseException, tests: str) -> str:
    """Return the error and the line of the tests where it came up."""
    number, lines = (_lines(error) or [(0, "")])[-1][0], tests.split("\n")
    where = f" at {lines[number - 1].strip()}" if 0 < number <= len(lines) else ""
    try:
        text = str.__str__(str(error))  # exactly a `str`, also where `__str__` returns one of a subclass
    except BaseException:  # its text may be the program's
        text = ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _lines(error: BaseException) -> list[tuple[int, str]]:
    """Return lines of the tests that an error has passed, with functions, the innermost last."""
    found, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == "tests.py":
            found.append((trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return found
