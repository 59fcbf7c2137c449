"""What a page is made of, before it is HTML or Markdown: both show the same blocks, hence the same figures."""

from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first cell of each being its name; a cell may have several lines."""

    header: Row
    rows: tuple[Row, ...]
    folded: str | None = None
    """What stands in its place until it is opened; None for a table that is always open."""

    def __post_init__(self) -> None:
        """Every row has one cell for each column."""
        assert all(len(row) == len(self.header) for row in self.rows), self.header


@dataclass(frozen=True)
class Picture:
    """A figure; Markdown leaves it out."""

    svg: str
    caption: str
    """How to read it, in a line."""


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is."""

    text: str
    folded: str | None = None
    """As for a table."""


@dataclass(frozen=True)
class Answer:
    """What one model answered."""

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


def sections_of(*named: tuple[str, list[Block]]) -> tuple[Section, ...]:
    """Sections in order; those without any block are left out."""
    return tuple(Section(title, tuple(blocks)) for title, blocks in named if blocks)
