"""Tables in plain text and in Markdown, drawn by tabulate: the first column to the left, the others to the right."""

from collections.abc import Sequence

from tabulate import tabulate  # type: ignore[import-untyped]

Row = Sequence[str]


def aligned(rows: Sequence[Row]) -> str:
    """Return rows of cells as plain text."""
    return _drawn(rows, (), "plain")


def markdown(rows: Sequence[Row]) -> str:
    """Return rows of Markdown cells, the header first, as a table that is readable as text too."""
    header, *body = [[cell.replace("\n", "; ") for cell in row] for row in rows]
    return _drawn(body, header, "pipe")


def _drawn(rows: Sequence[Row], header: Row, style: str) -> str:
    align = ("left", *("right",) * (len(header or rows[0]) - 1))
    text: str = tabulate(
        rows,
        header,
        tablefmt=style,
        disable_numparse=True,
        preserve_whitespace=True,
        colalign=align,
        headersalign=align,
    )
    return text
