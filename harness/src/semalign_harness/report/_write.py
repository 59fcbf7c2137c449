"""A page as files: HTML in one piece, and Markdown."""

import importlib.resources
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from semalign_geometry.base import SemalignError, replace_file

from ..results.files import REPORT
from ..util.tables import markdown
from ._comparison import comparison_page
from ._comparisons import comparisons_page
from ._page import Answer, Block, Code, Example, Facts, Page, Picture, Row, Table, Text
from ._read import ReportedComparison, ReportedRun, read_folders
from ._run import run_page
from ._runs import runs_page
from .plots import standalone

_INTERVAL = re.compile(r"(\[(?:[-+]?\d|unbounded)[^][]*\](?:, p (?:< )?\d\.\d+)?)")
_SPECIAL = re.compile(r"[\\`*<>|$~]|&(?=[#\w]+;)|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|(?<=!)\[")
"""What Markdown would take for its own; an underscore only at the edge of a word."""


def write_report(folders: Sequence[Path], out: Path | None = None, *, figures: Path | None = None) -> Path:
    """Report runs or comparisons, several side by side: an HTML file, and the same in Markdown beside it.

    Args:
        folders: run folders, with evaluations of the models of a single one among them; or folders of comparisons.
        out: the HTML file; None for `report.html` in the folder of a single run or comparison, else in this one.
        figures: where each figure is written as an SVG file too, in the order of the page; None for nowhere.

    Returns:
        The HTML file.

    Raises:
        SemalignError: a folder holds nothing to report or something unfinished, the folders do not go together, or the
            name does not end in .html.
        OSError: the disk is full or not writable.
    """
    if out is not None and out.suffix != ".html":
        raise SemalignError(f"the report goes into a file whose name ends in .html, not {out}: rename it")
    found = read_folders(folders)
    own = found[0].folder if len(found) == 1 else Path()
    page = _page(found)
    file = out or own / REPORT
    if file.is_dir():
        raise SemalignError(f"{file} is a folder: name another file with --out")
    if figures is not None and figures.is_file():
        raise SemalignError(f"{figures} is a file: name a folder with --figures")
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        pictures = [block for section in page.sections for block in section.blocks if isinstance(block, Picture)]
        for number, picture in enumerate(pictures, 1):
            replace_file(figures / f"figure-{number}.svg", standalone(picture.svg))
    replace_file(file.with_suffix(".md"), as_markdown(page))
    return replace_file(file, as_html(page))


def _page(found: Sequence[ReportedRun] | Sequence[ReportedComparison]) -> Page:
    runs = [each for each in found if isinstance(each, ReportedRun)]
    comparisons = [each for each in found if isinstance(each, ReportedComparison)]
    if comparisons:
        return comparison_page(comparisons[0]) if len(comparisons) == 1 else comparisons_page(comparisons)
    return run_page(runs[0]) if len(runs) == 1 else runs_page(runs)


def as_html(page: Page) -> str:
    """The page as one file that refers to no other."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["lines"] = _lines
    environment.tests |= {kind.__name__.lower(): _is(kind) for kind in typing.get_args(Block)}
    template = (importlib.resources.files(__package__) / "page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page) + "\n"


def as_markdown(page: Page) -> str:
    """The page without its figures."""
    parts = [f"# {_escaped(page.title)}"]
    for section in page.sections:
        written = [text for block in section.blocks if (text := _markdown(block))]
        if written:
            parts += [f"## {_escaped(section.title)}", *written]
    return "\n\n".join(parts) + "\n"


def _is(kind: type) -> Callable[[object], bool]:
    return lambda block: isinstance(block, kind)


def _lines(cell: str) -> list[list[tuple[str, bool]]]:
    """The lines of a cell in parts, and which of these are intervals, that stand back behind the figures."""
    return [
        [(part, bool(place % 2)) for place, part in enumerate(_INTERVAL.split(line)) if part]
        for line in cell.split("\n")
    ]


def _markdown(block: Block) -> str:
    match block:
        case Text(text):
            return _escaped(text)
        case Facts(pairs):
            return "\n".join(f"- {_escaped(name)}: {_escaped(value)}" for name, value in pairs)
        case Table(header, rows):
            return _table(header, rows)
        case Picture():
            return ""
        case Code(text, folded):
            return ("" if folded is None else f"{_escaped(folded)}:\n\n") + _fenced(text)
        case Example(title, question, answers):
            parts = [f"### {_escaped(title)}", _fenced(question), *map(_answer, answers)]
            return "\n\n".join(parts)


def _answer(answer: Answer) -> str:
    return f"{_escaped(answer.model)}, {_escaped(answer.verdict)}:\n\n{_fenced(answer.text)}"


def _table(header: Row, rows: Sequence[Row]) -> str:
    return markdown([[_escaped(cell.replace("\n", "; ")) for cell in row] for row in (header, *rows)])


def _escaped(text: str) -> str:
    """One line in which nothing is taken for Markdown."""
    return _SPECIAL.sub(lambda match: "\\" + match[0], " ".join(text.split()))


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
