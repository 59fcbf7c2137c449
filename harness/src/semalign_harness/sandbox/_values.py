"""Plain values as bytes: how the tests' process and the program's process talk, and how verdicts travel.

One item is a tag, a size, a colon and the payload; containers count their items, all else counts its bytes. What is
read back has exactly the built-in and standard types listed here, whatever the bytes say: a subclass with its own
`__eq__` arrives as its base class. Other objects travel as a number that only their owner can resolve.
"""

import builtins
import os
import sys
from collections.abc import Callable, Iterable, Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:  # typing would take a quarter of the time that a program takes
    Any = object

Read = Callable[[Any], Any]

# The contents of a subclass, by the base class's own methods: an override on the subclass is not asked.
PLAIN: dict[type, Read] = {
    int: int.__index__,
    float: float.__float__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes(memoryview(value)),
    bytearray: lambda value: bytearray(memoryview(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}

# What a value of a standard class is made of, and how it is made again.
STANDARD: dict[str, tuple[Read, Callable[..., Any]]] = {
    "builtins.range": (lambda value: (value.start, value.stop, value.step), range),
    "builtins.slice": (lambda value: (value.start, value.stop, value.step), slice),
    "builtins.ellipsis": (lambda value: (), lambda: ...),
    "builtins.dict_keys": (lambda value: tuple(value), lambda *keys: dict.fromkeys(keys).keys()),
    "builtins.dict_items": (lambda value: tuple(value), lambda *items: dict(items).items()),
    "builtins.dict_values": (lambda value: tuple(value), lambda *values: dict(enumerate(values)).values()),
    "collections.Counter": (lambda value: (dict(value),), lambda *a: _standard("collections").Counter(*a)),
    "collections.OrderedDict": (lambda value: (dict(value),), lambda *a: _standard("collections").OrderedDict(*a)),
    "collections.defaultdict": (
        lambda value: (dict(value),),
        lambda *a: _standard("collections").defaultdict(None, *a),
    ),
    "collections.deque": (lambda value: (list(value), value.maxlen), lambda *a: _standard("collections").deque(*a)),
    "array.array": (lambda value: (value.typecode, value.tolist()), lambda *a: _standard("array").array(*a)),
    "decimal.Decimal": (lambda value: (str(value),), lambda *a: _standard("decimal").Decimal(*a)),
    "fractions.Fraction": (
        lambda value: (value.numerator, value.denominator),
        lambda *a: _standard("fractions").Fraction(*a),
    ),
    "datetime.date": (
        lambda value: (value.year, value.month, value.day),
        lambda *a: _standard("datetime").date(*a),
    ),
    "datetime.timedelta": (
        lambda value: (value.days, value.seconds, value.microseconds),
        lambda *a: _standard("datetime").timedelta(*a),
    ),
    "datetime.time": (
        lambda value: (value.hour, value.minute, value.second, value.microsecond),
        lambda *a: _standard("datetime").time(*a),
    ),
    "datetime.datetime": (
        lambda value: (*value.timetuple()[:6], value.microsecond),
        lambda *a: _standard("datetime").datetime(*a),
    ),
}
TYPES = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "str", "tuple", "type",
)  # fmt: skip
TAGS: dict[type, bytes] = {tuple: b"t", list: b"l", set: b"s", frozenset: b"z"}
BUILDERS: dict[bytes, Callable[[Iterable[Any]], Any]] = {tag: kind for kind, tag in TAGS.items()}


class NotPlain(Exception):
    """A value that does not cross to the other process."""


class Malformed(Exception):
    """Bytes that are no encoded value."""


class Codec:
    """Values to bytes and back; objects that are no plain value go by number, which subclasses give and resolve."""

    def number(self, value: Any) -> int:
        """The number that stands for an object of this process.

        Raises:
            NotPlain: objects do not leave this process.
        """
        raise NotPlain(f"a value of type {type(value).__name__} does not cross between the processes")

    def resolve(self, number: int) -> Any:
        """What a number from the other process stands for.

        Raises:
            Malformed: nothing.
        """
        raise Malformed(f"no object has the number {number}")

    def encode(self, value: Any) -> bytes:
        """The value as bytes.

        Raises:
            NotPlain: it holds an object that does not leave this process.
            RecursionError: it is nested too deeply, or holds itself.
        """
        out: list[bytes] = []
        self._write(value, out)
        return b"".join(out)

    def decode(self, data: bytes) -> Any:
        """The value of bytes that may come from an enemy.

        Raises:
            Malformed: they are no encoded value.
            MemoryError: it is too large.
        """
        try:
            value, end = self._read(data, 0)
        except MemoryError:
            raise
        except Exception as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None
        if end != len(data):
            raise Malformed(f"{len(data) - end} bytes follow the value")
        return value

    def _write(self, value: Any, out: list[bytes]) -> None:
        kind = type(value)
        if value is None or value is True or value is False:
            out.append({None: b"N0:", True: b"T0:", False: b"F0:"}[value])
        elif kind is int:
            _scalar(b"i", f"{value:x}".encode(), out)
        elif kind is float:
            _scalar(b"f", value.hex().encode(), out)
        elif kind is complex:
            _scalar(b"c", f"{value.real.hex()} {value.imag.hex()}".encode(), out)
        elif kind is str:
            _scalar(b"u", value.encode("utf-8", "surrogatepass"), out)
        elif kind is bytes:
            _scalar(b"b", value, out)
        elif kind is bytearray:
            _scalar(b"a", bytes(value), out)
        elif kind in TAGS:
            out.append(TAGS[kind] + b"%d:" % len(value))
            for item in value:
                self._write(item, out)
        elif kind is dict:
            out.append(b"d%d:" % (2 * len(value)))
            for key, item in value.items():
                self._write(key, out)
                self._write(item, out)
        elif kind is type and value.__module__ == "builtins" and value.__name__ in TYPES:
            _scalar(b"k", value.__name__.encode(), out)
        elif kind is type(sys):
            _scalar(b"m", f"{self.number(value)} {value.__name__}".encode(), out)
        else:
            self._write_other(value, kind, out)

    def _write_other(self, value: Any, kind: type, out: list[bytes]) -> None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        naive = getattr(value, "tzinfo", None) is None if name.startswith("datetime.") else True
        if name in STANDARD and naive:
            out.append(b"x2:")
            self._write(name, out)
            self._write(STANDARD[name][0](value), out)
            return
        for base, plain in PLAIN.items():
            if issubclass(kind, base):
                self._write(plain(value), out)
                return
        _scalar(b"o", b"%d" % self.number(value), out)

    def _read(self, data: bytes, start: int) -> tuple[Any, int]:
        tag = data[start : start + 1]
        colon = data.index(b":", start, start + 20)
        size, at = int(data[start + 1 : colon]), colon + 1
        if size < 0:
            raise ValueError("negative size")
        if tag in BUILDERS or tag in (b"d", b"x"):
            items = []
            for _ in range(size):
                item, at = self._read(data, at)
                items.append(item)
            return self._assemble(tag, items), at
        end = at + size
        if end > len(data):
            raise ValueError("cut short")
        return self._scalar(tag, data[at:end]), end

    def _assemble(self, tag: bytes, items: list[Any]) -> Any:
        if tag == b"d":
            return dict(zip(items[::2], items[1::2], strict=True))
        if tag == b"x":
            name, parts = items
            return STANDARD[name][1](*parts)
        return BUILDERS[tag](items)

    def _scalar(self, tag: bytes, payload: bytes) -> Any:
        match tag:
            case b"N":
                return None
            case b"T":
                return True
            case b"F":
                return False
            case b"i":
                return int(payload, 16)
            case b"f":
                return float.fromhex(payload.decode())
            case b"c":
                real, imaginary = payload.decode().split(" ")
                return complex(float.fromhex(real), float.fromhex(imaginary))
            case b"u":
                return payload.decode("utf-8", "surrogatepass")
            case b"b":
                return payload
            case b"a":
                return bytearray(payload)
            case b"k" if payload.decode() in TYPES:
                return getattr(builtins, payload.decode())
            case b"m":
                number, name = payload.decode().split(" ")
                return self.module(int(number), name)
            case b"o":
                return self.resolve(int(payload))
        raise ValueError(f"unknown tag {tag!r}")

    def module(self, number: int, name: str) -> Any:
        """What a module of the other process stands for; an object like any other, unless a subclass knows better."""
        return self.resolve(number)


def _scalar(tag: bytes, payload: bytes, out: list[bytes]) -> None:
    out.append(tag + b"%d:" % len(payload))
    out.append(payload)


def _standard(name: str) -> Any:
    return __import__(name)


def send(descriptor: int, message: bytes) -> None:
    """Write a message and its length.

    Raises:
        OSError: nobody reads any more.
    """
    data = len(message).to_bytes(8, "big") + message
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int, limit: int) -> bytes | None:
    """The next message; None when the other side has closed.

    Raises:
        Malformed: it announces more than `limit` bytes.
    """
    header = b"".join(_exactly(descriptor, 8))
    size = int.from_bytes(header, "big")
    if len(header) == 8 and size > limit:
        raise Malformed(f"a message of {size} bytes, over the limit of {limit}")
    message = b"".join(_exactly(descriptor, size))
    return message if len(header) == 8 and len(message) == size else None


def _exactly(descriptor: int, size: int) -> Iterator[bytes]:
    while size:
        chunk = os.read(descriptor, min(size, 1 << 20))
        if not chunk:
            return
        size -= len(chunk)
        yield chunk
