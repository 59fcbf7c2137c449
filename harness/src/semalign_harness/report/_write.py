"""A page as files: HTML in one piece, and Markdown."""

import importlib.resources
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from semalign_geometry.base import SemalignError, replace_file

from ..results.files import REPORT
from ..util.console import Console
from ..util.tables import markdown
from ._page import Answer, Block, Code, Example, Facts, Page, Picture, Table, Text
from ._read import ReportedComparison, ReportedRun, read_folders
from ._run import run_page
from ._runs import runs_page
from .plots import standalone

_INTERVAL = re.compile(r"(\[(?:[-+]?\d|unbounded)[^][]*\](?:, p (?:< )?\d\.\d+)?)")
_SPECIAL = re.compile(r"[\\`*<>|$~]|&(?=[#\w]+;)|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|(?<=!)\[")
"""Characters with a meaning in Markdown; an underscore only at the edge of a word."""


def write_report(folders: Sequence[Path], out: Path | None = None, *, plots: Path | None = None) -> Path:
    """Write the report of runs or comparisons as HTML, and as Markdown beside it; several stand side by side.

    Args:
        folders: run folders, also evaluations of the models of a single run; or folders of comparisons.
        out: the HTML file; None for `report.html` in the folder of a single run or comparison, else in the current one.
        plots: folder for each plot as an SVG file, in the order of the page; None writes none.

    Returns:
        The HTML file.

    Raises:
        SemalignError: a folder holds nothing to report or something unfinished, the folders do not go together, or the
            name does not end in .html.
        OSError: the disk is full or not writable.
    """
    if out is not None and out.suffix != ".html":
        raise SemalignError(f"the report is an HTML file, but the name {out} does not end in .html: rename it")
    found = read_folders(folders)
    own = found[0].folder if len(found) == 1 else Path()
    page = _page(found)
    file = out or own / REPORT
    if file.is_dir():
        raise SemalignError(f"{file} is a folder: name another file with --out")
    if plots is not None and plots.is_file():
        raise SemalignError(f"{plots} is a file: name a folder with --plots")
    if plots is not None:
        pictures = [block for section in page.sections for block in section.blocks if isinstance(block, Picture)]
        for number, picture in enumerate(pictures, 1):
            replace_file(plots / f"plot-{number}.svg", standalone(picture.svg))
    replace_file(file.with_suffix(".md"), as_markdown(page))
    return replace_file(file, as_html(page))


def report_run(folder: Path, console: Console) -> None:
    """Write the report of a finished run unless it exists; a report that fails leaves the result as it is.

    Raises:
        KeyboardInterrupt: Ctrl-C; its text says where the same command resumes.
    """
    if (folder / REPORT).is_file():
        return
    try:
        for left_over in folder.glob(".report.*"):  # by a process that was killed meanwhile
            left_over.unlink()
        with console.step("write the report"):
            write_report([folder])
    except KeyboardInterrupt:
        raise KeyboardInterrupt("with the report of the finished run") from None
    except Exception as error:
        console.note(f"no report ({error}): `semalign report {folder}` tries again")


def _page(found: Sequence[ReportedRun] | Sequence[ReportedComparison]) -> Page:
    comparisons = [each for each in found if isinstance(each, ReportedComparison)]
    if comparisons:
        from ._comparison import comparison_page, comparisons_page  # loads lm-eval

        return comparison_page(comparisons[0]) if len(comparisons) == 1 else comparisons_page(comparisons)
    runs = [each for each in found if isinstance(each, ReportedRun)]
    return run_page(runs[0]) if len(runs) == 1 else runs_page(runs)


def as_html(page: Page) -> str:
    """Return the page as one file without external references."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["lines"] = _lines
    environment.tests |= {kind.__name__.lower(): _is(kind) for kind in typing.get_args(Block)}
    template = (importlib.resources.files(__package__) / "page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page) + "\n"


def as_markdown(page: Page) -> str:
    """Return the page without its plots."""
    parts = [f"# {_escaped(page.title)}"]
    for section in page.sections:
        written = [text for block in section.blocks if (text := _markdown(block))]
        if written:
            parts += [f"## {_escaped(section.title)}", *written]
    return "\n\n".join(parts) + "\n"


def _is(kind: type) -> Callable[[object], bool]:
    return lambda block: isinstance(block, kind)


def _lines(cell: str) -> list[list[tuple[str, bool]]]:
    """The lines of a cell in parts; intervals are marked, and shown smaller than values."""
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
            return markdown([[_escaped(cell.replace("\n", "; ")) for cell in row] for row in (header, *rows)])
        case Picture():
            return ""
        case Code(text, folded):
            return ("" if folded is None else f"{_escaped(folded)}:\n\n") + _fenced(text)
        case Example(title, question, answers):
            return "\n\n".join([f"### {_escaped(title)}", _fenced(question), *map(_answer, answers)])


def _answer(answer: Answer) -> str:
    return f"{_escaped(answer.model)}, {_escaped(answer.verdict)}:\n\n{_fenced(answer.text)}"


def _escaped(text: str) -> str:
    """One line in which no character has a meaning in Markdown."""
    return _SPECIAL.sub(lambda match: "\\" + match[0], " ".join(text.split()))


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
