"""Two processes as one: shared containers, numbered objects, calls both ways.

Only one of the two runs at a time, the other waits for its message. Each message begins with all
that has changed in the containers that both know. So a change shows wherever Python would show it:
after a call, an exception or a step of a generator, through any alias. Values that cannot change
cross by content. Everything else has a number, which means the same object in both: even numbers
belong to the tests' process, odd ones to the program's.
"""

import sys
import types
from _operator import is_  # `operator` would be slower to load
from collections.abc import Callable
from itertools import repeat

from . import _loop
from ._mirror import OPERATIONS, Mirrors
from ._typing import Any
from ._values import STANDARD, Codec, Malformed, NotPlain, guarded, head, name_of, receive, scalar, send, standard

CONTAINERS = {
    "builtins.list": "sequence",
    "builtins.dict": "mapping",
    "builtins.set": "set",
    "builtins.bytearray": "bytes",
    "collections.Counter": "mapping",
    "collections.OrderedDict": "mapping",
    "collections.defaultdict": "mapping",
    "collections.deque": "sequence",
    "array.array": "bytes",
}
"""Plain classes whose objects can change, by the form of their content."""
OPTIONS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "collections.deque": lambda value: ((), value.maxlen),
    "array.array": lambda value: (value.typecode,),
}
"""Arguments of the class for an empty container like a given one; none elsewhere."""
FIXED: dict[type, Callable[[Any], Any]] = {
    int: int.__index__,
    float: float.__float__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes(memoryview(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}
"""Plain classes whose objects cannot change, with the content, whatever a subclass overrides."""


def content_of(value: Any) -> Any:
    """Return the content of a container, as a list or bytes, by the methods of its plain class."""
    plain: Any = plain_base(type(value))
    form = CONTAINERS[name_of(plain)]
    if form == "bytes":
        return bytes(memoryview(value))
    if form != "mapping":
        return list(plain.__iter__(value))
    items = [item for pair in plain.items(value) for item in pair]
    return [value.default_factory, *items] if plain.__name__ == "defaultdict" else items


def fill(value: Any, content: Any) -> None:
    """Replace the content of a container, by the methods of its plain class."""
    plain: Any = plain_base(type(value))
    form = CONTAINERS[name_of(plain)]
    if form == "bytes":
        made = content if plain is bytearray else plain(plain.typecode.__get__(value), content)
        plain.__setitem__(value, slice(None), made)
        return
    plain.clear(value)
    if form != "mapping":
        (plain.update if form == "set" else plain.extend)(value, content)
        return
    if plain.__name__ == "defaultdict":
        value.default_factory, content = content[0], content[1:]
    for key, item in zip(content[::2], content[1::2], strict=True):
        plain.__setitem__(value, key, item)


def plain_base(kind: type) -> type | None:
    """Return the first plain class among a class and its bases."""
    if id(kind) not in PLAIN_BASES:  # by identity: a metaclass may define what is equal
        found = (base for base in kind.__mro__ if any(map(is_, FIXED, repeat(base))) or name_of(base) in CONTAINERS)
        PLAIN_BASES[id(kind)] = (next(found, None), kind)
    return PLAIN_BASES[id(kind)][0]


PLAIN_BASES: dict[int, tuple[type | None, type]] = {}
"""Results of `plain_base`, each with the class, which keeps its identity."""


def is_standard(value: Any) -> bool:
    """Return whether a class belongs to Python."""
    return str(value.__module__).partition(".")[0] in sys.stdlib_module_names


def look_up(path: str) -> Any:
    """Return the standard object of a path `module:name.name`.

    Raises:
        Malformed: it is not in the standard library.
    """
    module, _, names = path.partition(":")
    if module.partition(".")[0] not in sys.stdlib_module_names:
        raise Malformed(f"{module} is no standard module")
    __import__(module)
    value = sys.modules[module]
    for name in names.split(".") if names else ():
        value = getattr(value, name)
    return value


def path_of(value: Any) -> str | None:
    """Return the path by which `look_up` finds this class, function or module; None without."""
    if type(value) is type(sys):
        path = f"{value.__name__}:"
    else:
        owner = getattr(value, "__objclass__", None)
        module = getattr(value, "__module__", None) or getattr(owner, "__module__", None) or "builtins"
        path = f"{module}:{getattr(value, '__qualname__', '')}"
    try:
        return path if look_up(path) is value else None
    except Exception:
        return None


WAYS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "copy": lambda value: standard("copy.copy")(value),
    "deepcopy": lambda value: standard("copy.deepcopy")(value),
    "run": _loop.run,
    # To its end: the end of the loop must not look like that of something else to await.
    "__anext__": lambda value: _loop.run(type(value).__anext__(value)),
    # Methods that a class may lack although its objects can do this.
    "__getitem__": lambda value, key: value[key],
    "__iter__": iter,
    "__len__": len,
    "__dir__": dir,
}
CLAIMED: tuple[type, ...] = (
    map, filter, zip, enumerate, reversed, memoryview, property, types.BuiltinFunctionType, types.FunctionType,
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, types.MethodType,
)  # fmt: skip
REAL = {kind.__name__: kind for kind in CLAIMED}
"""Standard classes that a stand-in may claim: their objects hold no value to compare."""
LONGEST_TEXT = 1 << 12
"""Longest text in the arguments of an exception, in characters."""


def _references(objects: dict[int, Any]) -> dict[int, int]:
    return {number: sys.getrefcount(value) for number, value in objects.items()}


ONLY_HERE = _references({0: object()})[0]
"""References to an object that only the table knows."""


class Peer(Codec):
    """One side of the conversation.

    Args:
        incoming: descriptor to read messages from.
        outgoing: descriptor to write messages to.
        first: first number that this side assigns.
        limit: longest message to read, in bytes.
        trusting: see `Mirrors`.
    """

    def __init__(self, incoming: int, outgoing: int, *, first: int, limit: int, trusting: bool) -> None:
        self.incoming, self.outgoing, self.limit = incoming, outgoing, limit
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.contents: dict[int, Any] = {}
        """Of each shared container, the content that both sides know; None for none yet."""
        self.hashes: dict[int, int] = {}
        self.next, self.parity = first, first % 2
        self.news: list[bytes] = []
        self.pending: list[int] = []
        self.reading = False
        self.ticket = b""
        self.mirrors = Mirrors(self.ask, self.hash_of, trusting=trusting)

    # For subclasses

    passed_on: type[BaseException] = Exception
    """Exceptions of `perform` that the other side shall see."""

    def stamp(self) -> bytes:
        """Return the ticket of the next message."""
        return self.ticket

    def check(self, ticket: Any) -> None:
        """Accept or refuse the ticket of a message."""
        self.ticket = ticket

    def may_drop(self, number: int) -> bool:
        """Return whether this side may drop an object that nothing but the table refers to."""
        return False

    def path(self, value: Any) -> str | None:
        """Return the name of a standard class, function or module on the other side."""
        return path_of(value)

    def named(self, path: str) -> Any:
        """Return the standard object of a name that the other side has sent."""
        return look_up(path)

    def real(self, module: str, name: str) -> Any:
        """Return the standard class that stand-ins for objects of a class claim; None for none."""
        return REAL.get(name) if module == "builtins" else None

    def known_exception(self, module: str, qualname: str) -> type | None:
        """Return the exception of a standard module that this process has loaded."""
        if module.partition(".")[0] not in sys.stdlib_module_names or module not in sys.modules:
            return None
        found = getattr(sys.modules[module], qualname, None)
        return found if isinstance(found, type) and issubclass(found, BaseException) else None

    def details(self, value: Any) -> Any:
        """Return further content of an object, for `build` of the other side."""
        return None

    def build(self, kind: type, details: Any) -> Any:
        """Return the stand-in for an object that is neither plain nor an exception."""
        return object.__new__(kind)

    def perform(self, operation: str, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Do what the other side asks."""
        if operation in WAYS:
            return WAYS[operation](target, *arguments)
        if operation not in OPERATIONS:
            raise Malformed(f"no operation {operation}")
        return getattr(type(target), operation)(target, *arguments, **keywords)

    def raised(self, operation: str, error: BaseException) -> BaseException:
        """Return the exception to raise here for one that the other side has raised."""
        return error

    # Conversation

    def ask(self, operation: str, target: Any, *arguments: Any, **keywords: Any) -> Any:
        """Let the other side act, and meanwhile do what it asks; raise what it raises."""
        if self.reading:
            return NotImplemented  # a comparison in a set that is being filled: different objects differ
        self.send(("ask", operation, target, arguments, keywords))
        while True:
            message = self.receive()
            form, *parts = message if type(message) is tuple and message else (None,)
            if form == "value" and len(parts) == 1:
                return parts[0]
            if form == "raise" and len(parts) == 1 and isinstance(parts[0], BaseException):
                raise self.raised(operation, parts[0])
            self.answer(message)

    def answer(self, message: Any) -> None:
        """Do what a message asks and send the result."""
        if type(message) is not tuple or len(message) != 5 or message[0] != "ask":
            raise Malformed("a message that neither asks nor answers")
        _, operation, target, arguments, keywords = message
        # Exactly these types: a stand-in of a subclass would answer again at each reading.
        if (type(operation), type(arguments), type(keywords)) != (str, tuple, dict) or not _texts(keywords):
            raise Malformed("a question whose parts are no plain values")
        try:
            reply = ("value", self.perform(operation, target, arguments, keywords))
        except Malformed:
            raise
        except self.passed_on as error:
            reply = ("raise", error)
        try:
            self.send(reply)
        except (NotPlain, RecursionError, MemoryError) as error:
            kind = TypeError if type(error) is NotPlain else type(error)
            self.send(("raise", kind(str(error))))

    def send(self, payload: Any) -> None:
        """Send a message."""
        send(self.outgoing, self.pack(payload))

    def receive(self) -> Any:
        """Return the next message; an `EOFError` where the other side has closed."""
        message = receive(self.incoming, self.limit)
        if message is None:
            raise EOFError
        return self.unpack(message)

    def hash_of(self, value: Any) -> int:
        """Return the hash of an object of the other side."""
        known = self.hashes.get(self.numbers[id(value)])
        if known is None:
            raise TypeError(f"unhashable type: {type(value).__name__!r}")
        return known

    # Messages

    def pack(self, payload: Any) -> bytes:
        """Return a message: new objects, changes, the payload, and what is shared no more."""
        first, self.news = self.next, []
        out: list[bytes] = []
        try:
            said: list[bytes] = []
            self.write(payload, said)
            changes = self._changes()
            self.write(self.stamp(), out)
        except BaseException:
            self.forget([number for number in range(first, self.next, 2) if number in self.objects])
            self.contents = dict.fromkeys(self.contents)
            raise
        out += [b"t%d:" % len(self.news), *self.news, b"t%d:" % len(changes), *changes, *said]
        counts = _references(self.objects).items()
        dropped = [number for number, count in counts if count <= ONLY_HERE and self.may_drop(number)]
        self.forget(dropped)
        self.write(tuple(dropped), out)
        return b"t5:" + b"".join(out)

    def _changes(self) -> list[bytes]:
        changes: list[bytes] = []
        self.pending = list(self.contents)
        for number in self.pending:  # grows where a container holds new ones
            new, old = content_of(self.objects[number]), self.contents[number]
            if old is None or not _same(old, new):
                self.contents[number] = new
                changes.append(self._written((number, new if type(new) is bytes else tuple(new))))
        return changes

    def _written(self, parts: tuple[Any, ...]) -> bytes:
        out: list[bytes] = []
        self.write(parts, out)
        return b"".join(out)

    def unpack(self, data: bytes) -> Any:
        """Return the payload of a message, after all else in it; `Malformed` if it is none."""
        self.reading = True
        try:
            return guarded(self._take, data)
        finally:
            self.reading = False

    def _take(self, data: bytes) -> Any:
        tag, size, at = head(data, 0)
        if (tag, size) != (b"t", 5):
            raise ValueError("no message")
        ticket, at = self.read(data, at)
        self.check(ticket)
        for take in (self._admit, self._fill):
            _, count, at = head(data, at)
            for _ in range(count):
                parts, at = self.read(data, at)
                take(*parts)
        payload, at = self.read(data, at)
        drops, end = self.read(data, at)
        self.forget(drops)
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes follow the message")
        return payload

    def forget(self, numbers: Any) -> None:
        """Remove numbers from the tables."""
        for number in numbers:
            del self.numbers[id(self.objects.pop(number))]
            self.contents.pop(number, None)
            self.hashes.pop(number, None)

    # Values

    def write_other(self, value: Any, kind: type, out: list[bytes]) -> None:
        """Append the number of a value, or the name of a standard one."""
        number = self.numbers.get(id(value))
        if number is None:
            if (isinstance(value, type) or kind.__module__ == "builtins") and (path := self.path(value)) is not None:
                return scalar(b"n", path.encode(), out)
            number = self._class(value) if isinstance(value, type) else self._introduce(value, kind)
        scalar(b"r", b"%d" % number, out)

    def read_scalar(self, tag: bytes, payload: bytes) -> Any:
        """Return the value of an item that holds no other."""
        if tag == b"r":
            return self.objects[int(payload)]
        return self.named(payload.decode()) if tag == b"n" else super().read_scalar(tag, payload)

    def _number(self, value: Any) -> int:
        number = self.next
        self.next += 2
        self.objects[number] = value
        self.numbers[id(value)] = number
        return number

    def _introduce(self, value: Any, kind: type) -> int:
        number, plain = self._number(value), plain_base(kind)
        shared = plain is not None and plain not in FIXED
        if shared:
            self.contents[number] = None
            self.pending.append(number)
        if plain is kind:
            name = name_of(kind)
            options = OPTIONS[name](value) if name in OPTIONS else ()
            self.news.append(self._written(("container", number, name, options)))
            return number
        if plain in FIXED:
            content: Any = FIXED[plain](value)
        elif isinstance(value, BaseException):
            arguments = tuple(x[:LONGEST_TEXT] if type(x) is str else x for x in value.args)
            if isinstance(value, BaseExceptionGroup):
                arguments = (arguments[0], value.exceptions)
            content = (arguments, value.__cause__)
        else:
            content = None if shared else self.details(value)
        path = self.path(kind) if issubclass(kind, BaseException) else None
        self.news.append(self._written(("object", number, path or self._class(kind), _hash(value, kind), content)))
        return number

    def _class(self, kind: type) -> int:
        """Return the number of a class, introduced if it is new."""
        if id(kind) in self.numbers:
            return self.numbers[id(kind)]
        number, bases, plain = self._number(kind), [], plain_base(kind)
        for base in kind.__bases__:
            if issubclass(base, BaseException):
                bases.append(self.path(base) or self._class(base))
            elif base is plain:
                bases.append(name_of(base))
            elif not is_standard(base) or plain_base(base) not in (None, base):
                bases.append(self._class(base))
        own = kind.__mro__[: next(i for i, base in enumerate(kind.__mro__) if _is_root(base))]
        operations = {
            name
            for base in own
            for name in base.__dict__
            if name in OPERATIONS
            or name == "__await__"
            or (plain and not name.startswith("_") and hasattr(plain, name))
        }
        if plain is None and not issubclass(kind, BaseException):
            operations |= {"__str__", "__repr__"}
        names = map(str, (kind.__name__, kind.__qualname__, kind.__module__))
        self.news.append(self._written(("class", number, *names, tuple(bases), tuple(sorted(operations)))))
        return number

    def _admit(self, form: str, number: int, *parts: Any) -> None:
        """Make what stands for something new of the other side."""
        if type(number) is not int or number % 2 == self.parity or number in self.objects:
            raise ValueError(f"{number!r} is no new number")
        match form:
            case "container":
                name, options = parts
                value = standard(name)(*options) if name in CONTAINERS else None
                self.contents[number] = None
            case "class":
                value = self._stand_in(*parts)
            case "object":
                value = self._object(number, *parts)
            case _:
                raise ValueError(form)
        self.objects[number] = value
        self.numbers[id(value)] = number

    def _stand_in(self, name: str, qualname: str, module: str, bases: Any, operations: Any) -> type:
        if type(operations) is not tuple or not _texts((name, qualname, module, *operations)):
            raise ValueError("a name that is no text")
        if f"{module}.{qualname}" in STANDARD or f"{module}.{qualname}" in CONTAINERS:
            raise ValueError(f"a false {qualname}")
        known = tuple(self._base(base) for base in bases)
        found = self.known_exception(module, qualname)
        return found or self.mirrors.make(name, qualname, module, known, operations, self.real(module, name))

    def _base(self, base: Any) -> type:
        """Return the class of a number, of an exception's path or of a plain class's name."""
        if type(base) is int:
            found: Any = self.objects[base]
            allowed = isinstance(found, self.mirrors.metaclass) or issubclass(found, BaseException)
        elif type(base) is not str:
            raise ValueError("a name that is no text")
        elif ":" in base:
            found = self.named(base)
            allowed = isinstance(found, type) and issubclass(found, BaseException)
        else:
            allowed = base in CONTAINERS or base in map(name_of, FIXED)
            found = standard(base) if allowed else None
        if not allowed:
            raise ValueError(f"{base} is no class, exception or plain class")
        kind: type = found
        return kind

    def _object(self, number: int, which: Any, hashed: Any, content: Any) -> Any:
        kind = self._base(which)
        if type(hashed) is int:
            self.hashes[number] = hashed
        plain: Any = plain_base(kind)
        if issubclass(kind, BaseException):
            arguments, cause = content
            value = _exception(kind, arguments)
            if cause is not None:
                value.__cause__ = cause
            return value
        if not isinstance(kind, self.mirrors.metaclass):
            raise ValueError(f"an object of {kind.__name__}")
        if plain is None:
            return self.build(kind, content)
        if plain in FIXED:
            if type(content) is not plain:
                raise ValueError("another content than its class has")
            make: Any = plain.__new__
            return make(kind, content)
        self.contents[number] = None
        return plain.__new__(kind)

    def _fill(self, number: int, content: Any) -> None:
        value = self.objects[number]
        if number not in self.contents:
            raise ValueError(f"{number} is no container")
        fill(value, content if type(content) is bytes else list(content))
        self.contents[number] = content_of(value)


def _texts(values: Any) -> bool:
    return [value for value in values if type(value) is not str] == []


def _same(old: Any, new: Any) -> bool:
    if type(old) is bytes:
        return bool(old == new)
    return len(old) == len(new) and all(map(is_, old, new))


def _is_root(kind: type) -> bool:
    """Return whether a class is Python's or plain, where the search for operations ends."""
    return kind is object or plain_base(kind) is kind or (issubclass(kind, BaseException) and is_standard(kind))


def _hash(value: Any, kind: type) -> int | None:
    method: Any = kind.__hash__
    if method is None or method is object.__hash__:
        return None
    try:
        return hash(value)
    except Exception:
        return None


def _exception(kind: Any, arguments: tuple[Any, ...]) -> BaseException:
    try:
        made = kind.__new__(kind, *arguments)
        if is_standard(kind):
            made.__init__(*arguments)
    except TypeError:  # such as JSONDecodeError, whose arguments are not its `args`
        made = BaseException.__new__(kind) if kind.__new__ is BaseException.__new__ else kind.__new__(kind)
        made.args = arguments
    if not isinstance(made, BaseException):
        raise ValueError("no exception")
    return made
