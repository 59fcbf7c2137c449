"""Values cross between the processes with their exact types, and hostile bytes give nothing else."""

import array
import collections
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import re
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from semalign_harness.sandbox._peer import CONTAINERS, FIXED, Peer
from semalign_harness.sandbox._player import Player
from semalign_harness.sandbox._referee import Referee
from semalign_harness.sandbox._values import STANDARD, TYPES, Codec, Malformed, NotPlain

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs"]))
    | st.binary()
    | st.binary().map(bytearray)
    | st.sampled_from([int, str, bool, list, type])
    | st.just(...)
)
hashables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
standard = (
    st.builds(range, st.integers(), st.integers(), st.integers(1, 9))
    | st.builds(slice, st.none() | st.integers(), st.integers())
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.times()
    | st.datetimes(timezones=st.none() | st.timezones() | st.just(datetime.UTC))
    | st.timedeltas()
    | st.lists(st.floats(allow_nan=False)).map(lambda items: array.array("d", items))
    | st.dictionaries(hashables, st.integers()).map(collections.Counter)
    | st.dictionaries(hashables, st.integers()).map(collections.OrderedDict)
    | st.builds(collections.deque, st.lists(st.integers()), st.none() | st.integers(0, 3))
)
values = st.recursive(
    scalars | standard,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.frozensets(hashables, max_size=4)
    ),
    max_leaves=20,
)


def picture(value: Any) -> Any:
    """A value with the types of all its parts, in which nan equals nan and the zeros differ."""
    kind = type(value)
    if kind is float:
        return kind, "nan" if math.isnan(value) else value.hex()
    if kind is complex:
        return kind, picture(value.real), picture(value.imag)
    if kind in (list, tuple, collections.deque):
        return kind, [picture(item) for item in value], getattr(value, "maxlen", None)
    if kind in (set, frozenset):
        return kind, sorted((picture(item) for item in value), key=repr)
    if issubclass(kind, dict):
        return kind, [(picture(key), picture(item)) for key, item in value.items()]
    return kind, value


class Pair:
    """Both sides in one process; messages do not pass through a pipe."""

    def __init__(self) -> None:
        self.player, self.referee = Player(0, 1), Referee(0, 1, limit=1 << 30, tests="")

    def to_tests(self, value: Any) -> Any:
        self.player.ticket = self.referee.ticket
        return self.referee.unpack(self.player.pack(("value", value)))[1]

    def to_program(self, value: Any) -> Any:
        return self.player.unpack(self.referee.pack(("value", value)))[1]


PAIR = Pair()


def crossed(value: Any) -> Any:
    return PAIR.to_tests(value)


plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.frozensets(hashables, max_size=4)
    ),
)


@given(plain)
def test_a_plain_value_crosses_by_content(value: Any) -> None:
    assert picture(Codec().decode(Codec().encode(value))) == picture(value)


@given(values)
def test_a_value_comes_back_as_itself(value: Any) -> None:
    pair = PAIR
    other = pair.to_tests([value])
    back = pair.to_program([other, *other])
    assert back[0][0] == back[1] or picture(back[0][0]) == picture(back[1])
    assert picture(back[1]) == picture(value)
    if f"{type(value).__module__}.{type(value).__qualname__}" in CONTAINERS:
        assert back[1] is value


def test_a_change_crosses_to_every_alias() -> None:
    pair, inner = Pair(), [1]
    other = pair.to_program({"a": inner, "b": [inner]})
    other["a"].append(2)
    pair.referee.ticket = pair.player.ticket
    pair.to_tests(None)
    assert inner == [1, 2] and other["b"][0] is other["a"]


def test_what_the_tests_forget_is_shared_no_more() -> None:
    pair = Pair()
    for _ in range(3):
        pair.to_tests([[1], {2: [3]}])
        pair.to_program([4])
    for _ in range(4):  # what a container held is dropped after the container
        pair.to_program(None)
    assert not pair.referee.contents and not pair.player.contents and not pair.player.objects


@given(values)
@example([-0.0, 0.0, math.nan, -math.inf, 1, True, 1.0, "\ud800", 10**5000, [[]], {1: {1}}, ((),)])
def test_a_value_keeps_its_types_and_its_content(value: Any) -> None:
    assert picture(crossed(value)) == picture(value)


@given(st.dictionaries(st.text(), st.integers()))
def test_views_of_dicts_arrive_as_views(content: dict[str, int]) -> None:
    assert crossed(content.keys()) == content.keys()
    assert crossed(content.items()) == content.items()
    assert list(crossed(content.values())) == list(content.values())
    assert type(crossed(content.values())) is type(content.values())


class _Number(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __index__(self) -> int:
        return 0

    __hash__ = int.__hash__


class _Text(str):
    def __str__(self) -> str:
        return "other"

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class _List(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(())

    def __eq__(self, other: object) -> bool:
        return True


class _Dict(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        return ()


class _Colour(enum.IntEnum):
    RED = 3


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (_Number(7), 7),
        (_Text("text"), "text"),
        (_List([1, 2]), [1, 2]),
        (_Dict(a=1), {"a": 1}),
        (_Colour.RED, 3),
        (Point(1, 2), (1, 2)),
        (type("F", (float,), {})(1.5), 1.5),
        (type("C", (complex,), {})(1.5j), 1.5j),
        (type("B", (bytes,), {})(b"b"), b"b"),
        (type("A", (bytearray,), {})(b"b"), bytearray(b"b")),
        (type("T", (tuple,), {})((1,)), (1,)),
        (type("S", (set,), {})((1,)), {1}),
        (type("Z", (frozenset,), {})((1,)), frozenset({1})),
        (type("D", (collections.deque,), {})((1,)), collections.deque((1,))),
    ],
)
def test_a_subclass_arrives_with_its_true_content(value: Any, plain: Any) -> None:
    pair = Pair()
    other = pair.to_tests(value)
    assert isinstance(other, type(plain)) and type(other).__name__ == type(value).__name__
    for method in ("__eq__", "__lt__", "__hash__"):
        assert getattr(type(other), method, None) is getattr(type(plain), method, None)
    assert type(plain).__eq__(other, plain) is True
    assert pair.to_program(other) is value


ALLOWED = {
    *FIXED,
    list,
    dict,
    set,
    bytearray,
    bool,
    type(None),
    type,
    type({}.values()),
    type({}.keys()),
    type({}.items()),
}
ALLOWED |= {range, slice, type(...), type(NotImplemented), decimal.Decimal, fractions.Fraction, re.Pattern, uuid.UUID}
ALLOWED |= {datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone, zoneinfo.ZoneInfo}
ALLOWED |= {pathlib.PosixPath, pathlib.PurePosixPath}


@given(st.binary() | st.text("NTFifcubaktlszdxom0123456789:-", max_size=40).map(str.encode))
@example(b"l1:" * 100_000)
@example(b"i5:0x1_f")
@example(b"d2:l0:N0:")
@example(b"d1:N0:")
@example(b"l99999999999:N0:")
@example(b"u-1:")
@example(b"u9:a")
@example(b"u1:\xff")
@example(b"k4:exec")
@example(b"k9:SystemExi")
@example(b"x2:u9:os.systemt1:u2:id")
@example(b"x2:u16:fractions.Fractiont2:i1:1i1:0")
@example(b"x1:u1:a")
@example(b"r1:0")
@example(b"n9:os:system")
@example(b"N0:N0:")
@example(b"")
def test_hostile_bytes_give_a_listed_type_or_an_error(data: bytes) -> None:
    referee = PAIR.referee
    referee.ticket = b""
    for read in (Codec().decode, lambda data: referee.unpack(b"t5:b0:t0:t0:" + data + b"t0:"), referee.unpack):
        try:
            value = read(data)
        except Malformed:
            continue
        assert type(value) in ALLOWED or issubclass(value, BaseException)


@given(plain, st.data())
def test_a_damaged_message_never_gives_an_unlisted_type(value: Any, data: st.DataObject) -> None:
    message = bytearray(Codec().encode(value))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    test_hostile_bytes_give_a_listed_type_or_an_error.hypothesis.inner_test(bytes(message))  # type: ignore[attr-defined]


def test_only_these_classes_can_be_named() -> None:
    assert {name.partition(".")[0] for name in {**STANDARD, **CONTAINERS}} == {
        "builtins", "collections", "array", "decimal", "fractions", "datetime", "zoneinfo", "re", "uuid", "pathlib",
    }  # fmt: skip
    assert not {"exec", "eval", "open", "compile", "super", "property"} & set(TYPES)


@pytest.mark.parametrize(
    "make", [lambda: [].append, lambda: object(), lambda: (i for i in ()), lambda: print, lambda: math]
)
def test_objects_stay_in_their_process(make: Callable[[], Any]) -> None:
    with pytest.raises(NotPlain, match="does not cross"):
        Codec().encode([make()])


def test_objects_come_back_as_themselves() -> None:
    pair, thing = Pair(), object()
    first, (second,), third = pair.to_tests((thing, (thing,), print))
    assert first is second and first is not thing and first is not third
    assert pair.to_program((first, third)) == (thing, print)


def test_a_message_that_cannot_be_written_leaves_no_number_behind() -> None:
    pair, deep, shared = Pair(), (), [1]
    for _ in range(10**5):
        deep = (deep,)
    kept = pair.to_tests(shared)
    shared.append(2)
    with pytest.raises(RecursionError):
        pair.to_tests([[object()], deep])
    assert pair.to_tests([3]) == [3] and kept == [1, 2]


def test_numbers_of_the_wrong_side_are_refused() -> None:
    with pytest.raises(Malformed, match="no new number"):
        Referee(0, 1, limit=99, tests="").unpack(b"t5:b0:t1:t4:u9:containeri1:2u13:builtins.listt0:t0:N0:t0:")


def test_every_container_is_tried_above() -> None:
    assert {type(value) for value in (7, "", b"", 0.0, 0j, (), frozenset())} == set(FIXED)
    assert {name.rpartition(".")[2] for name in CONTAINERS} == {
        "list", "dict", "set", "bytearray", "Counter", "OrderedDict", "defaultdict", "deque", "array",
    }  # fmt: skip
    assert issubclass(Player, Peer) and issubclass(Referee, Peer)
