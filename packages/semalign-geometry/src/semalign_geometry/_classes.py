"""Prefix classes: what the entries of two vocabularies have in common, where their tokenizers differ."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ._tokens import Vocabulary
from ._vocabulary import SharedVocabulary
from .base import SemalignError, short_repr

_END, _REST = "end", "rest"


@dataclass(frozen=True, eq=False)
class VocabularyClasses:
    """Prefix classes of two vocabularies.

    Where two models have read the same bytes, their distributions over next tokens speak of the same text. Entry x of
    one side is sent to the first token of its bytes under the other side's tokenizer, that one likewise, and so on
    until an entry whose bytes both vocabularies hold: the class of x. Entries that end a turn are one class, "end";
    other special entries and those that come to no shared entry are one class, "rest".

    Laws: each id is in one class at most; the class of a shared entry is itself; the class is a prefix of the entry's
    bytes; with one vocabulary on both sides each entry is its own class.

    Source: ours.
    """

    source: Int[Tensor, " v"]
    """Class of each source id; −1 for ids in no class."""
    target: Int[Tensor, " w"]
    """Class of each target id; −1 for ids in no class."""
    shared: SharedVocabulary
    """The entries whose bytes both sides hold: entry c stands for class c."""
    names: tuple[bytes | str, ...]
    """Bytes of each class; "end" and "rest" for the last ones, which exist only where both sides have members."""

    __repr__ = short_repr

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.names)


def align_classes(
    source: Vocabulary, target: Vocabulary, *, source_rows: int | None = None, target_rows: int | None = None
) -> VocabularyClasses:
    """Find the prefix classes of two vocabularies.

    Args:
        source: the source's entries.
        target: the target's.
        source_rows: rows of the source's head, the number of classes to return; ids at or beyond are in no class, and
            so are rows that no entry has. The vocabulary's size by default.
        target_rows: likewise of the target.

    Raises:
        SemalignError: the two share no entry.
    """
    sides = (_Side(source, source_rows), _Side(target, target_rows))
    pairs = sorted((sides[0].ids[text], sides[1].ids[text], text) for text in sides[0].ids.keys() & sides[1].ids.keys())
    if not pairs:
        raise SemalignError(
            f"the tokenizers share none of their {len(source.entries)} and {len(target.entries)} entries: choose "
            "models that write the same script"
        )
    names: list[bytes | str] = [text for _, _, text in pairs]
    chains = _Chains(sides, {text: i for i, (_, _, text) in enumerate(pairs)})
    columns = [side.classes(len(pairs), chains.classes(i)) for i, side in enumerate(sides)]
    for name, provisional in ((_END, len(pairs)), (_REST, len(pairs) + 1)):
        members = [column == provisional for column in columns]
        exists = all(bool(each.any()) for each in members)
        for column, each in zip(columns, members, strict=True):
            column[each] = len(names) if exists else -1
        names += [name] * exists
    ids = torch.tensor([(i, j) for i, j, _ in pairs], dtype=torch.long)
    shared = SharedVocabulary(ids[:, 0].clone(), ids[:, 1].clone(), *(len(side.ids) - len(pairs) for side in sides))
    return VocabularyClasses(columns[0], columns[1], shared, tuple(names))


class _Side:
    """A vocabulary within the rows of its head."""

    def __init__(self, vocabulary: Vocabulary, rows: int | None) -> None:
        self.vocabulary = vocabulary
        self.rows = len(vocabulary.entries) if rows is None else rows
        members = defaultdict(list)
        for i, entry in enumerate(vocabulary.entries[: self.rows]):
            if entry:
                members[entry].append(i)
        self.ids = {text: self._written(text, ids) for text, ids in members.items()}
        """Id that stands for the entries of these bytes."""

    def _written(self, text: bytes, ids: list[int]) -> int:
        """Of several ids of equal bytes ("A" and "<0x41>") the one that the tokenizer writes itself."""
        if len(ids) == 1:
            return ids[0]
        written = self.vocabulary.first(text)
        return written if written in ids else ids[0]

    def classes(self, shared: int, found: dict[bytes, int]) -> Int[Tensor, " v"]:
        """Class of each row; provisionally `shared` for "end" and one more for "rest"."""
        column = torch.full((self.rows,), -1, dtype=torch.long)
        for i, entry in enumerate(self.vocabulary.entries[: self.rows]):
            if i in self.vocabulary.ends:
                column[i] = shared
            else:
                column[i] = shared + 1 if not entry else found.get(entry, shared + 1)
        return column


class _Chains:
    """Follows entries from side to side until they come to shared bytes."""

    def __init__(self, sides: tuple[_Side, _Side], shared: dict[bytes, int]) -> None:
        self._sides = sides
        self._shared = shared
        self._longest = max(map(len, shared))
        self._found: tuple[dict[bytes, int | None], dict[bytes, int | None]] = ({}, {})

    def classes(self, side: int) -> dict[bytes, int]:
        """Class of the bytes of one side's entries; bytes that come to no shared entry are left out."""
        found = {text: self._follow(text, side) for text in self._sides[side].ids}
        return {text: each for text, each in found.items() if each is not None}

    def _follow(self, text: bytes, side: int) -> int | None:
        """Class of an entry of one side: that of the first token of its bytes on the other side."""
        passed = []
        while text not in self._shared and text not in self._found[side]:
            passed.append((side, text))
            side = 1 - side
            token = self._sides[side].vocabulary.first(text)
            # Each step shortens the bytes: an entry of the same bytes would make them shared.
            start = None if token is None else self._sides[side].vocabulary.entries[token]
            if start is None or len(start) >= len(text) or start not in self._sides[side].ids:
                found = self._longest_prefix(text)
                break
            text = start
        else:
            found = self._shared[text] if text in self._shared else self._found[side][text]
        for at, each in passed:
            self._found[at][each] = found
        return found

    def _longest_prefix(self, text: bytes) -> int | None:
        """Class of the longest shared entry that the bytes begin with, where the other tokenizer cannot read them."""
        lengths = range(min(len(text) - 1, self._longest), 0, -1)
        return next((self._shared[text[:n]] for n in lengths if text[:n] in self._shared), None)
