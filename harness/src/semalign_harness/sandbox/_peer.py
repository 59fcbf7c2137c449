"""Two processes that use each other's values as if they were one: shared containers, numbered objects, calls both ways.

Only one of the two runs at a time, the other waits for its message. Each message begins with all that has changed in
the containers that both know, so that a change shows wherever Python would show it: after a call, an exception or a
step of a generator, through any alias. Values that cannot change cross by content. Everything else has a number, which
means the same object in both: even numbers belong to the tests' process, odd ones to the program's.
"""

import sys
from _operator import is_  # `operator` would be slower to load
from collections.abc import Callable
from itertools import repeat

from . import _loop
from ._mirror import OPERATIONS, Mirrors
from ._values import STANDARD, Codec, Malformed, NotPlain, head, receive, scalar, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn
else:  # typing would take a quarter of the time that a program takes
    Any = NoReturn = object


class Container:
    """How containers of one class are read and filled, always by the methods of that class.

    Args:
        options: arguments of the class for an empty container like this.
        items: the content, as a list of values or as bytes.
        fill: replace the content.
    """

    def __init__(
        self, options: Callable[[Any], Any], items: Callable[[Any], Any], fill: Callable[[Any, Any], None]
    ) -> None:
        self.options, self.items, self.fill = options, items, fill


def _pairs(value: Any) -> list[Any]:
    return [item for pair in dict.items(value) for item in pair]


def _fill_dict(value: Any, items: list[Any]) -> None:
    dict.clear(value)
    for key, item in zip(items[::2], items[1::2], strict=True):
        dict.__setitem__(value, key, item)


def _fill_set(value: Any, items: list[Any]) -> None:
    set.clear(value)
    set.update(value, items)


def _fill_ordered(value: Any, items: list[Any]) -> None:
    kind = _standard("collections.OrderedDict")
    kind.clear(value)
    for key, item in zip(items[::2], items[1::2], strict=True):
        kind.__setitem__(value, key, item)


def _fill_default(value: Any, items: list[Any]) -> None:
    value.default_factory = items[0]
    _fill_dict(value, items[1:])


def _fill_deque(value: Any, items: list[Any]) -> None:
    kind = _standard("collections.deque")
    kind.clear(value)
    kind.extend(value, items)


def _fill_array(value: Any, content: bytes) -> None:
    del value[:]
    value.frombytes(content)


def _none(value: Any) -> tuple[()]:
    return ()


CONTAINERS: dict[str, Container] = {
    "builtins.list": Container(
        _none, lambda v: list(list.__iter__(v)), lambda v, items: list.__setitem__(v, slice(None), items)
    ),
    "builtins.dict": Container(_none, _pairs, _fill_dict),
    "builtins.set": Container(_none, lambda v: list(set.__iter__(v)), _fill_set),
    "builtins.bytearray": Container(
        _none, lambda v: bytes(memoryview(v)), lambda v, items: bytearray.__setitem__(v, slice(None), items)
    ),
    "collections.Counter": Container(_none, _pairs, _fill_dict),
    "collections.OrderedDict": Container(
        _none, lambda v: [x for pair in _standard("collections.OrderedDict").items(v) for x in pair], _fill_ordered
    ),
    "collections.defaultdict": Container(_none, lambda v: [v.default_factory, *_pairs(v)], _fill_default),
    "collections.deque": Container(
        lambda v: ((), v.maxlen), lambda v: list(_standard("collections.deque").__iter__(v)), _fill_deque
    ),
    "array.array": Container(lambda v: (v.typecode,), lambda v: v.tobytes(), _fill_array),
}
# Content of an object of a subclass, by the plain class's own methods: an override on the subclass is not asked.
FIXED: dict[type, Callable[[Any], Any]] = {
    int: int.__index__,
    float: float.__float__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes(memoryview(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}


def _standard(path: str) -> Any:
    """The class of a dotted name with one dot."""
    module, _, name = path.partition(".")
    return getattr(__import__(module), name)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def plain_base(kind: type) -> type | None:
    """The first plain class among a class and its bases."""
    if id(kind) not in PLAIN_BASES:  # by identity: a metaclass may define what is equal
        found = (base for base in kind.__mro__ if any(map(is_, FIXED, repeat(base))) or _name(base) in CONTAINERS)
        PLAIN_BASES[id(kind)] = (next(found, None), kind)
    return PLAIN_BASES[id(kind)][0]


PLAIN_BASES: dict[int, tuple[type | None, type]] = {}
"""Results of `plain_base`, each with the class, which keeps its identity."""


def is_standard(value: Any) -> bool:
    """Whether a class belongs to Python."""
    return str(value.__module__).partition(".")[0] in sys.stdlib_module_names


def look_up(path: str) -> Any:
    """The standard object of a path `module:name.name`.

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
    """The path under which `look_up` finds this very class, function or module; None if it does not."""
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
    "copy": lambda value: __import__("copy").copy(value),
    "deepcopy": lambda value: __import__("copy").deepcopy(value),
    "run": _loop.run,
    # To its end: the end of the loop must not look like that of something else to await.
    "__anext__": lambda value: _loop.run(type(value).__anext__(value)),
    # Methods that a class may lack although its objects can do this.
    "__getitem__": lambda value, key: value[key],
    "__iter__": iter,
    "__len__": len,
    "__dir__": dir,
}


async def _coroutine() -> None: ...


async def _async_generator() -> Any:
    yield


_PENDING = _coroutine()
REAL: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        map, filter, zip, enumerate, reversed, memoryview, property, type(len), type(look_up),
        type(_ for _ in ()), type(_PENDING), type(_async_generator()), type(Codec().encode),
    )
}  # fmt: skip
"""Standard classes that a stand-in may claim, by their names: those whose objects hold no value to compare."""
_PENDING.close()


def _counts(objects: dict[int, Any]) -> dict[int, int]:
    return {number: sys.getrefcount(value) for number, value in objects.items()}


ONLY_HERE = _counts({0: object()})[0]
"""References to an object that only the table knows."""


class Peer(Codec):
    """One side of the conversation.

    Args:
        incoming: descriptor to read messages from.
        outgoing: descriptor to write messages to.
        first: first number that this side gives.
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
        """Ticket of the next message."""
        return self.ticket

    def check(self, ticket: Any) -> None:
        """Accept or refuse the ticket of a message."""
        self.ticket = ticket

    def dropped(self) -> list[int]:
        """Numbers that this side needs no more."""
        return []

    def loose(self) -> list[int]:
        """Numbers of the objects that nothing but the table refers to."""
        return [number for number, value in self.objects.items() if sys.getrefcount(value) <= ONLY_HERE]

    def path(self, value: Any) -> str | None:
        """The name that stands for a standard class, function or module on the other side."""
        return path_of(value)

    def named(self, path: str) -> Any:
        """The standard object of a name that the other side has sent."""
        return look_up(path)

    def real(self, module: str, name: str) -> Any:
        """The standard class that stand-ins for objects of this class say they have; None for none."""
        return REAL.get(name) if module == "builtins" else None

    def known_exception(self, module: str, qualname: str) -> type | None:
        """The exception of a standard module that this process has loaded."""
        if module.partition(".")[0] not in sys.stdlib_module_names or module not in sys.modules:
            return None
        found = getattr(sys.modules[module], qualname, None)
        return found if isinstance(found, type) and issubclass(found, BaseException) else None

    def details(self, value: Any) -> Any:
        """Further content of an object, for `build` of the other side."""
        return None

    def build(self, kind: type, details: Any) -> Any:
        """The stand-in for an object that is neither plain nor an exception."""
        return object.__new__(kind)

    def perform(self, operation: str, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Do what the other side asks.

        Raises:
            Malformed: there is no such operation.
        """
        if operation in WAYS:
            return WAYS[operation](target, *arguments)
        if operation not in OPERATIONS:
            raise Malformed(f"no operation {operation}")
        return getattr(type(target), operation)(target, *arguments, **keywords)

    def raised(self, operation: str, error: BaseException) -> BaseException:
        """The exception to raise here for one that the other side has raised."""
        return error

    # Conversation

    def ask(self, operation: str, target: Any, *arguments: Any, **keywords: Any) -> Any:
        """Let the other side do something, and meanwhile do what it asks.

        Raises:
            BaseException: what the other side raised.
        """
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
        # Exactly these types: a stand-in of a subclass would answer anew each time that it is looked at.
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
        """The next message.

        Raises:
            EOFError: the other side has closed.
        """
        message = receive(self.incoming, self.limit)
        if message is None:
            raise EOFError
        return self.unpack(message)

    def hash_of(self, value: Any) -> int:
        """The hash of an object of the other side."""
        known = self.hashes.get(self.numbers[id(value)])
        if known is None:
            raise TypeError(f"unhashable type: {type(value).__name__!r}")
        return known

    # Messages

    def pack(self, payload: Any) -> bytes:
        """A message: what is new, what has changed, the payload, and what is not shared any more."""
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
        self.write(tuple(self.dropped()), out)
        return b"t5:" + b"".join(out)

    def _changes(self) -> list[bytes]:
        changes: list[bytes] = []
        self.pending = list(self.contents)
        for number in self.pending:  # grows where a container holds new ones
            value = self.objects[number]
            new, old = self.container(value).items(value), self.contents[number]
            if old is None or not _same(old, new):
                self.contents[number] = new
                out = [b"t2:"]
                self.write(number, out)
                self.write(new if type(new) is bytes else tuple(new), out)
                changes.append(b"".join(out))
        return changes

    def unpack(self, data: bytes) -> Any:
        """The payload of a message, after all else in it has been done.

        Raises:
            Malformed: it is no message.
            MemoryError: it is too large.
        """
        self.reading = True
        try:
            tag, size, at = head(data, 0)
            if (tag, size) != (b"t", 5):
                raise ValueError("no message")
            ticket, at = self.read(data, at)
            self.check(ticket)
            _, count, at = head(data, at)
            for _ in range(count):
                parts, at = self.read(data, at)
                self._admit(*parts)
            _, count, at = head(data, at)
            for _ in range(count):
                (number, items), at = self.read(data, at)
                self._fill(number, items)
            payload, at = self.read(data, at)
            drops, end = self.read(data, at)
            self.forget(drops)
            if end != len(data):
                raise ValueError(f"{len(data) - end} bytes follow the message")
            return payload
        except MemoryError:
            raise
        except Exception as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None
        finally:
            self.reading = False

    def forget(self, numbers: Any) -> None:
        """Remove numbers."""
        for number in numbers:
            del self.numbers[id(self.objects.pop(number))]
            self.contents.pop(number, None)
            self.hashes.pop(number, None)

    def container(self, value: Any) -> Container:
        """How the content of a shared container is read and filled."""
        return CONTAINERS[_name(plain_base(type(value)) or object)]

    # Values

    def write_other(self, value: Any, kind: type, out: list[bytes]) -> None:
        """Append the number of a value, or the name of a standard one."""
        number = self.numbers.get(id(value))
        if number is not None:
            scalar(b"r", b"%d" % number, out)
        elif (isinstance(value, type) or kind.__module__ == "builtins") and (path := self.path(value)) is not None:
            scalar(b"n", path.encode(), out)
        else:
            number = self._class(value) if isinstance(value, type) else self._introduce(value, kind)
            scalar(b"r", b"%d" % number, out)

    def read_scalar(self, tag: bytes, payload: bytes) -> Any:
        """The value of an item that holds no other."""
        if tag == b"r":
            return self.objects[int(payload)]
        if tag == b"n":
            return self.named(payload.decode())
        return super().read_scalar(tag, payload)

    def _number(self, value: Any) -> int:
        number = self.next
        self.next += 2
        self.objects[number] = value
        self.numbers[id(value)] = number
        return number

    def _say(self, *parts: Any) -> None:
        out: list[bytes] = []
        self.write(parts, out)
        self.news.append(b"".join(out))

    def _introduce(self, value: Any, kind: type) -> int:
        number, plain = self._number(value), plain_base(kind)
        shared = plain is not None and plain not in FIXED
        if shared:
            self.contents[number] = None
            self.pending.append(number)
        if plain is kind:
            self._say("container", number, _name(kind), self.container(value).options(value))
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
        self._say("object", number, path or self._class(kind), _hash(value, kind), content)
        return number

    def _class(self, kind: type) -> int:
        """The number of a class, introduced if it is new."""
        if id(kind) in self.numbers:
            return self.numbers[id(kind)]
        number, bases = self._number(kind), []
        for base in kind.__bases__:
            if issubclass(base, BaseException):
                bases.append(self.path(base) or self._class(base))
            elif base is plain_base(kind):
                bases.append(_name(base))
            elif not is_standard(base) or plain_base(base) not in (None, base):
                bases.append(self._class(base))
        own = kind.__mro__[: next(i for i, base in enumerate(kind.__mro__) if _is_root(base))]
        plain = plain_base(kind)
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
        name, qualname, module = map(str, (kind.__name__, kind.__qualname__, kind.__module__))
        self._say("class", number, name, qualname, module, tuple(bases), tuple(sorted(operations)))
        return number

    def _admit(self, form: str, number: int, *parts: Any) -> None:
        """Make what stands for something new of the other side."""
        if type(number) is not int or number % 2 == self.parity or number in self.objects:
            raise ValueError(f"{number!r} is no new number")
        match form:
            case "container":
                name, options = parts
                value = _standard(name)(*options) if name in CONTAINERS else None
                self.contents[number] = None
            case "class":
                name, qualname, module, bases, operations = parts
                if type(operations) is not tuple or not _texts((name, qualname, module, *operations)):
                    raise ValueError("a name that is no text")
                if f"{module}.{qualname}" in STANDARD or f"{module}.{qualname}" in CONTAINERS:
                    raise ValueError(f"a false {qualname}")
                known = tuple(self._base(base) for base in bases)
                value = self.known_exception(module, qualname)
                value = value or self.mirrors.make(name, qualname, module, known, operations, self.real(module, name))
            case "object":
                value = self._object(number, *parts)
            case _:
                raise ValueError(form)
        self.objects[number] = value
        self.numbers[id(value)] = number

    def _base(self, base: Any) -> type:
        if type(base) is int:
            found: type = self.objects[base]
            if not (isinstance(found, self.mirrors.metaclass) or issubclass(found, BaseException)):
                raise ValueError(f"{base} is no class")
            return found
        if type(base) is not str:
            raise ValueError("a name that is no text")
        if ":" in base:
            return self._exception(base)
        if not (base in CONTAINERS or base in map(_name, FIXED)):
            raise ValueError(f"{base} is no plain class")
        kind: type = _standard(base)
        return kind

    def _exception(self, path: str) -> type:
        kind = self.named(path)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise ValueError(f"{path} is no exception")
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

    def _fill(self, number: int, items: Any) -> None:
        value = self.objects[number]
        if number not in self.contents:
            raise ValueError(f"{number} is no container")
        container = self.container(value)
        container.fill(value, items if type(items) is bytes else list(items))
        self.contents[number] = container.items(value)


def _texts(values: Any) -> bool:
    return [value for value in values if type(value) is not str] == []


LONGEST_TEXT = 1 << 12
"""Longest text in the arguments of an exception, in characters."""


def _same(old: Any, new: Any) -> bool:
    if type(old) is bytes:
        return bool(old == new)
    return len(old) == len(new) and all(map(is_, old, new))


def _is_root(kind: type) -> bool:
    """Whether a class and all its bases are Python's, as far as objects of its subclasses are concerned."""
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
