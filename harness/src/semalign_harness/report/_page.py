"""Blocks of a page; HTML and Markdown show the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[str, ...]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells, each after its name; a cell may have several lines."""

    header: Row
    rows: tuple[Row, ...]
    folded: str | None = None
    """Title of a table that is closed at first; None for an open table."""

    def __post_init__(self) -> None:
        """Every row has one cell for each column."""
        assert all(len(row) == len(self.header) for row in self.rows), self.header


@dataclass(frozen=True)
class Picture:
    """A plot; Markdown leaves it out."""

    svg: str
    caption: str
    """Explanation in a line."""


@dataclass(frozen=True)
class Code:
    """Verbatim text."""

    text: str
    folded: str | None = None
    """Title of a text that is closed at first; None for an open one."""


@dataclass(frozen=True)
class Answer:
    """The answer of one model."""

    model: str
    verdict: str
    text: str


@dataclass(frozen=True)
class Example:
    """One question with the answers of several models."""

    title: str
    question: str
    answers: tuple[Answer, ...]


Block = Text | Facts | Table | Picture | Code | Example


@dataclass(frozen=True)
class Section:
    """Blocks under a title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    sections: tuple[Section, ...]


def page_of(title: str, sections: dict[str, list[Block]]) -> Page:
    """Return a page without its empty sections."""
    return Page(title, tuple(Section(name, tuple(blocks)) for name, blocks in sections.items() if blocks))


def table_blocks(rows: Sequence[Row], reading: str, *, folded: str | None = None) -> list[Block]:
    """Return a table, the header first, with its explanation; nothing without rows under the header."""
    return [Table(rows[0], tuple(rows[1:]), folded), Text(reading)] if len(rows) > 1 else []
