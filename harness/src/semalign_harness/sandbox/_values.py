"""Plain values as bytes: how the tests' process and the program's process talk, and how verdicts travel.

One item is a tag, a size, a colon and the payload; containers count their items, all else counts its bytes. Decoding
makes exactly the built-in and standard types listed here, whatever the bytes say. Objects that are no plain value do
not cross; `_peer` gives them numbers.
"""

import builtins
import os
from collections.abc import Callable, Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:  # typing would take a quarter of the time that a program takes
    Any = object

Read = Callable[[Any], Any]

# What a value of a standard class is made of, and how it is made again.
STANDARD: dict[str, tuple[Read, Callable[..., Any]]] = {
    "builtins.range": (lambda value: (value.start, value.stop, value.step), range),
    "builtins.slice": (lambda value: (value.start, value.stop, value.step), slice),
    "builtins.ellipsis": (lambda value: (), lambda: ...),
    "builtins.dict_keys": (lambda value: tuple(value), lambda *keys: dict.fromkeys(keys).keys()),
    "builtins.dict_items": (lambda value: tuple(value), lambda *items: dict(items).items()),
    "builtins.dict_values": (lambda value: tuple(value), lambda *values: dict(enumerate(values)).values()),
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
    "datetime.timezone": (lambda value: value.__getinitargs__(), lambda *a: _standard("datetime").timezone(*a)),
    "zoneinfo.ZoneInfo": (lambda value: (str(value.key),), lambda *a: _standard("zoneinfo").ZoneInfo(*a)),
    "datetime.time": (
        lambda value: (value.hour, value.minute, value.second, value.microsecond, value.tzinfo, value.fold),
        lambda *a: _standard("datetime").time(*a[:5], fold=a[5]),
    ),
    "datetime.datetime": (
        lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo, value.fold),
        lambda *a: _standard("datetime").datetime(*a[:8], fold=a[8]),
    ),
    "re.Pattern": (lambda value: (value.pattern, value.flags), lambda *a: _standard("re").compile(*a)),
    "uuid.UUID": (lambda value: (value.int,), lambda *a: _standard("uuid").UUID(int=a[0])),
    "pathlib.PosixPath": (lambda value: value.parts, lambda *a: _standard("pathlib").Path(*a)),
    "pathlib.PurePosixPath": (lambda value: value.parts, lambda *a: _standard("pathlib").PurePosixPath(*a)),
    "builtins.NotImplementedType": (lambda value: (), lambda: NotImplemented),
}
TYPES = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "str", "tuple", "type",
)  # fmt: skip


class NotPlain(Exception):
    """A value that does not cross to the other process."""


class Malformed(Exception):
    """Bytes that are no encoded value."""


class Codec:
    """Values to bytes and back, containers by their content."""

    def encode(self, value: Any) -> bytes:
        """The value as bytes.

        Raises:
            NotPlain: it holds an object.
            RecursionError: it is nested too deeply, or holds itself.
        """
        out: list[bytes] = []
        self.write(value, out)
        return b"".join(out)

    def decode(self, data: bytes) -> Any:
        """The value of bytes that may come from an enemy.

        Raises:
            Malformed: they are no encoded value.
            MemoryError: it is too large.
        """
        try:
            value, end = self.read(data, 0)
        except MemoryError:
            raise
        except Exception as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None
        if end != len(data):
            raise Malformed(f"{len(data) - end} bytes follow the value")
        return value

    def write(self, value: Any, out: list[bytes]) -> None:
        """Append the bytes of a value."""
        kind = type(value)
        if value is None or value is True or value is False:
            out.append({None: b"N0:", True: b"T0:", False: b"F0:"}[value])
        elif kind is int:
            scalar(b"i", f"{value:x}".encode(), out)
        elif kind is float:
            scalar(b"f", value.hex().encode(), out)
        elif kind is complex:
            scalar(b"c", f"{value.real.hex()} {value.imag.hex()}".encode(), out)
        elif kind is str:
            scalar(b"u", value.encode("utf-8", "surrogatepass"), out)
        elif kind is bytes:
            scalar(b"b", value, out)
        elif kind is tuple or kind is frozenset:
            self.write_items(kind, value, out)
        elif kind is type and value.__module__ == "builtins" and value.__name__ in TYPES:
            scalar(b"k", value.__name__.encode(), out)
        elif (name := f"{kind.__module__}.{kind.__qualname__}") in STANDARD:
            out.append(b"x2:")
            self.write(name, out)
            self.write(STANDARD[name][0](value), out)
        else:
            self.write_other(value, kind, out)

    def write_items(self, kind: type, items: Any, out: list[bytes]) -> None:
        """Append the bytes of a container's items."""
        out.append(TAGS[kind] + b"%d:" % len(items))
        for item in items:
            self.write(item, out)

    def write_other(self, value: Any, kind: type, out: list[bytes]) -> None:
        """Append the bytes of a container that can change, or of an object.

        Raises:
            NotPlain: it is an object.
        """
        if kind is dict:
            self.write_items(dict, [item for pair in value.items() for item in pair], out)
        elif kind in TAGS:
            self.write_items(kind, value, out)
        elif kind is bytearray:
            scalar(b"a", bytes(value), out)
        else:
            raise NotPlain(f"a value of type {kind.__name__} does not cross between the processes")

    def read(self, data: bytes, start: int) -> tuple[Any, int]:
        """The value whose bytes begin at `start`, and where they end."""
        tag, size, at = head(data, start)
        if tag in BUILDERS:
            items = []
            for _ in range(size):
                item, at = self.read(data, at)
                items.append(item)
            return BUILDERS[tag](items), at
        end = at + size
        if end > len(data):
            raise ValueError("cut short")
        return self.read_scalar(tag, data[at:end]), end

    def read_scalar(self, tag: bytes, payload: bytes) -> Any:
        """The value of an item that holds no other."""
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
        raise ValueError(f"unknown tag {tag!r}")


def _dict(items: list[Any]) -> Any:
    return dict(zip(items[::2], items[1::2], strict=True))


def _value(items: list[Any]) -> Any:
    name, parts = items
    return STANDARD[name][1](*parts)


TAGS: dict[type, bytes] = {tuple: b"t", list: b"l", set: b"s", frozenset: b"z", dict: b"d"}
BUILDERS: dict[bytes, Callable[[list[Any]], Any]] = {
    **{tag: kind for kind, tag in TAGS.items()},
    b"d": _dict,
    b"x": _value,
}


def head(data: bytes, start: int) -> tuple[bytes, int, int]:
    """Tag and size of the item at `start`, and where its payload begins."""
    colon = data.index(b":", start, start + 20)
    size = int(data[start + 1 : colon])
    if size < 0:
        raise ValueError("negative size")
    return data[start : start + 1], size, colon + 1


def scalar(tag: bytes, payload: bytes, out: list[bytes]) -> None:
    """Append an item that holds no other."""
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
