"""The process of the program: it does what the tests ask, and nothing trusts it."""

import os
import sys
from _thread import RLock  # `threading` would be slower to load
from collections.abc import Callable

from . import _loop
from ._peer import Peer, path_of
from ._typing import Any, NoReturn
from ._values import Codec, send

Signature = tuple[tuple[str, ...], tuple[str, ...], int, str, tuple[str, ...], str]
"""Parameters of a function: by position, those of all that have a default, how many only by
position, `*`, only by name, `**`; empty for none."""
LEFT_OUT = object()
READY = "ready"
"""First message of a confined player: whatever ends it later is the program's doing."""
OWN_FRAMES = 30
"""Most calls of ours below one of the program, which its recursion limit does not count."""


class Player(Peer):
    """The program's side."""

    passed_on = BaseException

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing, first=1, limit=sys.maxsize, trusting=True)
        self.turn = RLock()
        """Held by the thread that talks with the tests, free while the program works."""
        self.turn.acquire()
        self.names: list[str] = []
        self.space: dict[str, Any] = {}
        self.exports: dict[str, Any] = {}
        """The names that the tests use, shared with them, so that they see a new binding."""

    def pack(self, payload: Any) -> bytes:
        """Return a message, with the present values of the names that the tests use."""
        self.exports.update({name: self.space[name] for name in self.names if name in self.space})
        return super().pack(payload)

    def may_drop(self, number: int) -> bool:
        """Return whether it is a container of the tests."""
        return number % 2 == 0 and number in self.contents

    def path(self, value: Any) -> str | None:
        """Return the name of a built-in exception: the tests' process looks up nothing else."""
        known = isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == "builtins"
        return path_of(value) if known else None

    def real(self, module: str, name: str) -> Any:
        """Return the standard class of this name, if the program can know it."""
        known = super().real(module, name)
        standard = module.partition(".")[0] in sys.stdlib_module_names
        return known or (getattr(sys.modules.get(module), name, None) if standard else None)

    def build(self, kind: type, details: Any) -> Any:
        """Return a function with the tests' parameters, or an object without storage."""
        if details is None:
            return super().build(kind, details)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return self.ask("__call__", shell, *arguments, **keywords)

        shell: Any = _function(forward, *details)
        return shell

    def perform(self, operation: str, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Do what the tests ask."""
        self.turn.release()
        try:
            if operation == "load":
                return self.load(*arguments)
            return super().perform(operation, target, arguments, keywords)
        finally:
            self.turn.acquire()

    def ask(self, operation: str, target: Any, *arguments: Any, **keywords: Any) -> Any:
        """Let the tests do something, once no other thread talks with them."""
        with self.turn:
            return super().ask(operation, target, *arguments, **keywords)

    def receive(self) -> Any:
        """Return the next message; end when there is none."""
        try:
            return super().receive()
        except EOFError:
            os._exit(0)

    def load(self, code: str, names: list[str]) -> Any:
        """Run the module and return the values of those names that it binds."""
        code = code.removeprefix("\ufeff")  # as for any file
        module = type(sys)("solution")
        module.__loader__ = _Source(code)  # type: ignore[assignment]
        sys.modules["solution"] = module
        self.names, self.space = names, module.__dict__
        if "asyncio" in code:
            _loop.prepare()
        exec(compile(code, "solution.py", "exec", dont_inherit=True), self.space)
        return self.exports


def _function(
    forward: Callable[..., Any], name: str, qualname: str, doc: str | None, parameters: Signature, waits: bool
) -> Any:
    """Return a function with the name and the parameters of another, which it calls.

    Parameters that have a default there get `LEFT_OUT` here, and are left out of the call.
    """
    fixed, optional, positional_only, rest, named, others = parameters
    listed = [each + "=_LEFT_OUT" * (each in optional) for each in (*fixed, *named)]
    listed[len(fixed) : len(fixed)] = [f"*{rest}"] if rest else ["*"] if named else []
    listed[positional_only:positional_only] = ["/"] if positional_only else []
    listed += [f"**{others}"] if others else []

    def call(given: dict[str, Any]) -> Any:
        further, more = given.pop(rest, ()), given.pop(others, {})
        kept = {name: value for name, value in given.items() if value is not LEFT_OUT}
        first = next((i for i, each in enumerate(fixed) if each not in kept), len(fixed))
        return forward(*[kept.pop(each) for each in fixed[:first]], *further, **kept, **more)

    space: dict[str, Any] = {"_LEFT_OUT": LEFT_OUT, "_call": call}
    exec(f"{'async ' * waits}def made({', '.join(listed)}): return {'await ' * waits}_call(locals())", space)
    made = space["made"]
    made.__name__, made.__qualname__, made.__doc__, made.__module__ = name, qualname, doc, "tests"
    return made


class _Source:
    """The program's own lines, for `inspect` and `traceback`."""

    def __init__(self, code: str) -> None:
        self.code = code

    def get_source(self, name: str) -> str:
        return self.code


def play(requests: int, replies: int) -> NoReturn:
    """Do what the tests ask until they are through."""
    player = Player(requests, replies)
    sys.setrecursionlimit(sys.getrecursionlimit() + OWN_FRAMES)
    sys.argv = ["solution.py"]
    send(replies, Codec().encode(READY))
    while True:
        player.answer(player.receive())
