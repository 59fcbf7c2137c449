"""The process that holds the program: it answers calls, knows nothing of the tests, and is trusted with nothing."""

import os
import sys

from ._values import Codec, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn
else:  # typing would take a quarter of the time that a program takes
    Any = NoReturn = object

READY = "ready"
"""First message of a player, once it is confined: whatever ends it later is the program's doing."""


class PlayerCodec(Codec):
    """Objects of the program go out as numbers and come back as themselves."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def number(self, value: Any) -> int:
        """The number of an object, which is kept alive so that no other object gets its id."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def resolve(self, number: int) -> Any:
        """The object of a number."""
        return self.objects[number]


def play(requests: int, replies: int) -> NoReturn:
    """Answer requests until the other side closes."""
    codec = PlayerCodec()
    send(replies, codec.encode(READY))
    while (message := receive(requests, sys.maxsize)) is not None:
        ticket, operation, arguments = codec.decode(message)
        try:
            reply = _answer(codec, ticket, operation, arguments)
        except BaseException as error:
            kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
            reply = codec.encode((ticket, False, (kind, _text(error)), None))
        send(replies, reply)
    os._exit(0)


def _answer(codec: PlayerCodec, ticket: bytes, operation: str, arguments: tuple[Any, ...]) -> bytes:
    before = codec.encode(arguments[1]) if operation == "call" else None
    value = OPERATIONS[operation](*arguments)
    changed = None
    if operation == "call" and codec.encode(arguments[1]) != before:
        changed = arguments[1]
    return codec.encode((ticket, True, value, changed))


def _load(code: str, names: list[str]) -> list[tuple[bool, Any]]:
    """Run the module and look up the names the tests use; each with whether it is there."""
    module = type(sys)("solution")
    sys.modules["solution"] = module
    exec(compile(code, "solution.py", "exec", dont_inherit=True), module.__dict__)
    return [(name in module.__dict__, module.__dict__.get(name)) for name in names]


def _call(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return function(*arguments, **keywords)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


OPERATIONS: dict[str, Any] = {
    "load": _load,
    "call": _call,
    "get": getattr,
    "set": setattr,
    "item": lambda value, key: value[key],
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
}
