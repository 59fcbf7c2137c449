"""Values cross between the processes with their exact types, and hostile bytes give nothing else."""

import array
import collections
import datetime
import decimal
import enum
import fractions
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from semalign_harness.sandbox._player import PlayerCodec
from semalign_harness.sandbox._values import PLAIN, STANDARD, TYPES, Codec, Malformed, NotPlain

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
    | st.datetimes()
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


def crossed(value: Any) -> Any:
    return Codec().decode(Codec().encode(value))


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
        (Point(1, _Number(2)), (1, 2)),
        (type("F", (float,), {})(1.5), 1.5),
        (type("C", (complex,), {})(1.5j), 1.5j),
        (type("B", (bytes,), {})(b"b"), b"b"),
        (type("A", (bytearray,), {})(b"b"), bytearray(b"b")),
        (type("T", (tuple,), {})((1,)), (1,)),
        (type("S", (set,), {})((1,)), {1}),
        (type("Z", (frozenset,), {})((1,)), frozenset({1})),
        (collections.defaultdict(int, a=1), collections.defaultdict(None, a=1)),
    ],
)
def test_a_subclass_arrives_as_its_base_with_its_true_content(value: Any, plain: Any) -> None:
    assert picture(crossed(value)) == picture(plain)


def test_every_plain_class_is_tried_above() -> None:
    assert set(PLAIN) == {int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset}


ALLOWED = {*PLAIN, bool, type(None), type, type({}.values()), type({}.keys()), type({}.items())}
ALLOWED |= {range, slice, type(...), collections.Counter, collections.OrderedDict, collections.defaultdict}
ALLOWED |= {collections.deque, array.array, decimal.Decimal, fractions.Fraction}
ALLOWED |= {datetime.date, datetime.time, datetime.datetime, datetime.timedelta}


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
@example(b"o1:0")
@example(b"m4:0 os")
@example(b"N0:N0:")
@example(b"")
def test_hostile_bytes_give_a_listed_type_or_an_error(data: bytes) -> None:
    try:
        value = Codec().decode(data)
    except Malformed:
        return
    assert type(value) in ALLOWED


@given(values, st.data())
def test_a_damaged_message_never_gives_an_unlisted_type(value: Any, data: st.DataObject) -> None:
    message = bytearray(Codec().encode(value))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    test_hostile_bytes_give_a_listed_type_or_an_error.hypothesis.inner_test(bytes(message))  # type: ignore[attr-defined]


def test_only_these_classes_can_be_named() -> None:
    assert {name.partition(".")[0] for name in STANDARD} == {
        "builtins", "collections", "array", "decimal", "fractions", "datetime",
    }  # fmt: skip
    assert not {"exec", "eval", "open", "compile", "super", "property"} & set(TYPES)


@pytest.mark.parametrize(
    "make", [lambda: [].append, lambda: object(), lambda: (i for i in ()), lambda: print, lambda: math]
)
def test_objects_stay_in_their_process(make: Callable[[], Any]) -> None:
    with pytest.raises(NotPlain, match="does not cross"):
        Codec().encode([make()])


def test_objects_of_the_program_come_back_as_themselves() -> None:
    codec, thing = PlayerCodec(), object()
    message = codec.encode([thing, (thing,), print])
    first, (second,), third = codec.decode(message)
    assert first is thing and second is thing and third is print
    assert codec.encode([thing, (thing,), print]) == message


def test_an_aware_time_is_an_object_since_its_zone_does_not_cross() -> None:
    with pytest.raises(NotPlain):
        Codec().encode(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


@pytest.mark.parametrize("make", [lambda: [], lambda: {}])
def test_a_value_inside_itself_is_refused(make: Callable[[], Any]) -> None:
    value = make()
    value.append(value) if isinstance(value, list) else value.update({0: value})
    with pytest.raises(RecursionError):
        Codec().encode(value)
