"""Bytes of plain values, for messages between the processes and for verdicts.

An item is a tag, a size, a colon and the payload. The size of a container counts its items, any
other size counts bytes. Decoding makes only the built-in and standard types listed here, whatever
the bytes are. An object that is no plain value has no bytes here: `_peer` numbers it.
"""

import builtins
import os
from collections.abc import Callable, Iterator

from ._typing import Any

STANDARD: dict[str, str | Callable[[Any], Any]] = {
    "builtins.range": "start stop step",
    "builtins.slice": "start stop step",
    "builtins.ellipsis": "",
    "builtins.NotImplementedType": "",
    "builtins.dict_keys": tuple,
    "builtins.dict_items": tuple,
    "builtins.dict_values": tuple,
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": "numerator denominator",
    "datetime.date": "year month day",
    "datetime.timedelta": "days seconds microseconds",
    "datetime.timezone": lambda value: value.__getinitargs__(),
    "datetime.time": "hour minute second microsecond tzinfo fold",
    "datetime.datetime": "year month day hour minute second microsecond tzinfo fold",
    "zoneinfo.ZoneInfo": "key",
    "re.Pattern": "pattern flags",
    "uuid.UUID": "int",
    "pathlib.PosixPath": lambda value: value.parts,
    "pathlib.PurePosixPath": lambda value: value.parts,
}
"""Standard classes that cross by content: its attributes, or a function that returns it."""
MAKERS: dict[str, Callable[..., Any]] = {
    "builtins.ellipsis": lambda: ...,
    "builtins.NotImplementedType": lambda: NotImplemented,
    "builtins.dict_keys": lambda *keys: dict.fromkeys(keys).keys(),
    "builtins.dict_items": lambda *items: dict(items).items(),
    "builtins.dict_values": lambda *values: dict(enumerate(values)).values(),
    "datetime.time": lambda *parts: standard("datetime.time")(*parts[:-1], fold=parts[-1]),
    "datetime.datetime": lambda *parts: standard("datetime.datetime")(*parts[:-1], fold=parts[-1]),
    "re.Pattern": lambda *parts: standard("re.compile")(*parts),
    "uuid.UUID": lambda number: standard("uuid.UUID")(int=number),
}
"""Functions from the content to the value, where the class itself is not that function."""
TYPES = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "str", "tuple", "type",
)  # fmt: skip
READERS: dict[bytes, Callable[[bytes], Any]] = {
    b"N": lambda payload: None,
    b"T": lambda payload: True,
    b"F": lambda payload: False,
    b"i": lambda payload: int(payload, 16),
    b"f": lambda payload: float.fromhex(payload.decode()),
    b"c": lambda payload: complex(*map(float.fromhex, payload.decode().split(" "))),
    b"u": lambda payload: payload.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"a": bytearray,
    b"k": lambda payload: getattr(builtins, TYPES[TYPES.index(payload.decode())]),
}
TAGS: dict[type, bytes] = {tuple: b"t", list: b"l", set: b"s", frozenset: b"z", dict: b"d"}
BUILDERS: dict[bytes, Callable[[list[Any]], Any]] = {
    **{tag: kind for kind, tag in TAGS.items()},
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    b"x": lambda items: _value(*items),
}


class NotPlain(Exception):
    """A value does not cross to the other process."""


class Malformed(Exception):
    """Bytes are no encoded value."""


def standard(path: str) -> Any:
    """Return the object of a dotted name with one dot."""
    module, _, name = path.partition(".")
    return getattr(__import__(module), name)


def name_of(kind: type) -> str:
    """Return the dotted name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


class Codec:
    """Values to bytes and back, containers by their content."""

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value.

        Raises:
            NotPlain: it holds an object.
            RecursionError: it is nested too deeply, or holds itself.
        """
        out: list[bytes] = []
        self.write(value, out)
        return b"".join(out)

    def decode(self, data: bytes) -> Any:
        """Return the value of bytes that may come from an enemy.

        Raises:
            Malformed: they are no encoded value.
            MemoryError: it is too large.
        """
        return guarded(self.read_whole, data)

    def read_whole(self, data: bytes) -> Any:
        """Read the one item that the bytes hold."""
        value, end = self.read(data, 0)
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes follow the value")
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
        elif (name := name_of(kind)) in STANDARD:
            parts = STANDARD[name]
            content = tuple(getattr(value, each) for each in parts.split()) if isinstance(parts, str) else parts(value)
            out.append(b"x2:")
            self.write(name, out)
            self.write(content, out)
        else:
            self.write_other(value, kind, out)

    def write_items(self, kind: type, items: Any, out: list[bytes]) -> None:
        """Append the bytes of a container's items."""
        out.append(TAGS[kind] + b"%d:" % len(items))
        for item in items:
            self.write(item, out)

    def write_other(self, value: Any, kind: type, out: list[bytes]) -> None:
        """Append the bytes of a container that can change, or refuse an object."""
        if kind is dict:
            self.write_items(dict, [item for pair in value.items() for item in pair], out)
        elif kind in TAGS:
            self.write_items(kind, value, out)
        elif kind is bytearray:
            scalar(b"a", bytes(value), out)
        else:
            raise NotPlain(f"a value of type {kind.__name__} does not cross between the processes")

    def read(self, data: bytes, start: int) -> tuple[Any, int]:
        """Return the value whose bytes begin at `start`, and where they end."""
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
        """Return the value of an item that holds no other."""
        return READERS[tag](payload)


def guarded(read: Callable[[bytes], Any], data: bytes) -> Any:
    """Read bytes that may come from an enemy; any error but a full memory is `Malformed`."""
    try:
        return read(data)
    except MemoryError:
        raise
    except Exception as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def _value(name: str, parts: Any) -> Any:
    STANDARD[name]  # nothing else may be made
    return MAKERS[name](*parts) if name in MAKERS else standard(name)(*parts)


def head(data: bytes, start: int) -> tuple[bytes, int, int]:
    """Return tag and size of the item at `start`, and where its payload begins."""
    colon = data.index(b":", start, start + 20)
    size = int(data[start + 1 : colon])
    if size < 0:
        raise ValueError("negative size")
    return data[start : start + 1], size, colon + 1


def scalar(tag: bytes, payload: bytes, out: list[bytes]) -> None:
    """Append an item that holds no other."""
    out += tag + b"%d:" % len(payload), payload


def send(descriptor: int, message: bytes) -> None:
    """Write a message and its length; an `OSError` where nobody reads any more."""
    data = len(message).to_bytes(8, "big") + message
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int, limit: int) -> bytes | None:
    """Return the next message; None when the other side has closed.

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
