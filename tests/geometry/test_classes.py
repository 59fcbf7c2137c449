"""Laws of prefix classes, on toy vocabularies."""

from collections.abc import Collection

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import raises
from semalign_geometry import Vocabulary, VocabularyClasses, align_classes
from semalign_geometry.base import SemalignError

texts = st.binary(min_size=1, max_size=4).map(lambda text: bytes(b"ab"[byte % 2] for byte in text))


def toy(entries: list[bytes | None], ends: Collection[int] = (), reads: str = "longest") -> Vocabulary:
    """A tokenizer that reads the longest or the shortest entry that some bytes begin with, the last id of several equal
    ones; a shy one reads no more than two bytes."""
    ids = {entry: i for i, entry in enumerate(entries) if entry is not None}

    def first(text: bytes) -> int | None:
        lengths = range(1, len(text) + 1)
        if reads == "shy" and len(text) > 2:
            return None
        return next(
            (ids[text[:n]] for n in (lengths if reads == "shortest" else lengths[::-1]) if text[:n] in ids), None
        )

    return Vocabulary(tuple(entries), frozenset(ends), first)


Drawn = tuple[list[bytes | None], set[int], str]
"""Entries, ends and reading of a vocabulary, which the test makes: the check of its types draws random numbers."""


@st.composite
def vocabularies(draw: st.DrawFn) -> Drawn:
    """Entries over two bytes, some repeated; special entries, of which some end a turn."""
    entries: list[bytes | None] = [*draw(st.lists(texts, min_size=1, max_size=12)), None, None]
    entries = draw(st.permutations(entries))
    special = [i for i, entry in enumerate(entries) if entry is None]
    ends = set(draw(st.lists(st.sampled_from(special))))
    return entries, ends, draw(st.sampled_from(["longest", "shortest", "shy"]))


def sharing(drawn: tuple[Drawn, Drawn]) -> bool:
    return bool({*drawn[0][0]} & {*drawn[1][0]} - {None})


pairs = st.tuples(vocabularies(), vocabularies()).filter(sharing)


def name_of(classes: VocabularyClasses, c: int) -> bytes | str | None:
    return None if c < 0 else classes.names[c]


def expected_name(text: bytes, side: Vocabulary, other: Vocabulary) -> bytes | str:
    """The class of an entry, by its definition; what no tokenizer reads goes to its longest shared prefix."""
    if text in other.entries:
        return text
    token = other.first(text)
    if token is not None and (found := other.entries[token]) is not None:
        return expected_name(found, other, side)
    shared = {*side.entries} & {*other.entries}
    return next((text[:n] for n in range(len(text), 0, -1) if text[:n] in shared), "rest")


@given(pairs)
def test_each_entry_has_the_class_of_its_definition(drawn: tuple[Drawn, Drawn]) -> None:
    pair = (toy(*drawn[0]), toy(*drawn[1]))
    classes = align_classes(*pair)
    for side, other, column in ((*pair, classes.source), (*pair[::-1], classes.target)):
        assert len(column) == len(side.entries)
        for i, c in enumerate(column.tolist()):
            entry = side.entries[i]
            if i in side.ends:
                expected: bytes | str = "end"
            else:
                expected = "rest" if entry is None else expected_name(entry, side, other)
            assert name_of(classes, c) == expected or (c == -1 and expected not in classes.names)
            if entry is not None and isinstance(name_of(classes, c), bytes):
                assert entry.startswith(classes.names[c])


@given(pairs)
def test_a_shared_entry_is_its_own_class_and_every_class_has_members_on_both_sides(
    drawn: tuple[Drawn, Drawn],
) -> None:
    pair = (toy(*drawn[0]), toy(*drawn[1]))
    classes = align_classes(*pair)
    shared = torch.arange(len(classes.shared))
    assert torch.equal(classes.source[classes.shared.source_ids], shared)
    assert torch.equal(classes.target[classes.shared.target_ids], shared)
    assert classes.shared.source_ids.tolist() == sorted(classes.shared.source_ids.tolist())
    assert {*classes.names[: len(shared)]} == ({*pair[0].entries} & {*pair[1].entries}) - {None}
    assert set(classes.names[len(shared) :]) <= {"end", "rest"}
    for column in (classes.source, classes.target):
        assert {*column.tolist()} - {-1} == {*range(classes.count)}
    for i, name in enumerate(classes.names[: len(shared)]):
        for side, ids in zip(pair, (classes.shared.source_ids, classes.shared.target_ids), strict=True):
            written = side.first(name)
            if (
                written is not None and side.entries[written] == name
            ):  # of several equal entries that one stands for all
                assert written == int(ids[i])
    only = [len({*a.entries} - {*b.entries} - {None}) for a, b in (pair, pair[::-1])]
    assert [classes.shared.only_in_source, classes.shared.only_in_target] == only


@given(pairs)
def test_sides_are_exchangeable(drawn: tuple[Drawn, Drawn]) -> None:
    pair = (toy(*drawn[0]), toy(*drawn[1]))
    there, back = align_classes(*pair), align_classes(*pair[::-1])
    for mine, theirs in ((there.source, back.target), (there.target, back.source)):
        assert [name_of(there, c) for c in mine.tolist()] == [name_of(back, c) for c in theirs.tolist()]


@given(vocabularies(), st.integers(0, 5))
def test_one_vocabulary_keeps_its_entries_and_rows_that_no_entry_has_are_in_no_class(
    drawn: Drawn, padding: int
) -> None:
    vocabulary = toy(*drawn)
    rows = len(vocabulary.entries) + padding
    classes = align_classes(vocabulary, vocabulary, source_rows=rows, target_rows=rows)
    assert torch.equal(classes.source, classes.target)
    assert classes.source[len(vocabulary.entries) :].tolist() == [-1] * padding
    for i, entry in enumerate(vocabulary.entries):
        name = name_of(classes, int(classes.source[i]))
        assert name == (entry or ("end" if i in vocabulary.ends else "rest"))


def test_ids_beyond_the_head_are_in_no_class() -> None:
    one, other = toy([b"a", b"b", b"ab"]), toy([b"b", b"a"])
    classes = align_classes(one, other, source_rows=1)
    assert (classes.source.tolist(), classes.target.tolist(), classes.names) == ([0], [-1, 0], (b"a",))


def test_chains_go_from_side_to_side() -> None:
    """Digits grouped on one side: "201" begins with "20" on the other side, which begins with "2" on the first."""
    grouped, split = toy([b"201", b"2", b"0", b"1"]), toy([b"20", b"2", b"0", b"1"])
    classes = align_classes(grouped, split)
    assert [name_of(classes, c) for c in classes.source.tolist()] == [b"2", b"2", b"0", b"1"]
    assert [name_of(classes, c) for c in classes.target.tolist()] == [b"2", b"2", b"0", b"1"]


def test_vocabularies_that_share_nothing_are_refused() -> None:
    with raises(SemalignError, match="share none of their 1 and 2 entries"):
        align_classes(toy([b"a"]), toy([b"b", b"c"]))
