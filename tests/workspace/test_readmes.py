"""Every Python block in a document runs, alone and in an empty folder.

A block that cannot run here (it needs a real model, say) opens with "```python no-run": it has to compile.
"""

from typing import NamedTuple

import pytest

from .projects import ROOT
from .test_documents import DOCUMENTS


class Block(NamedTuple):
    place: str
    source: str
    runs: bool


def python_blocks() -> list[Block]:
    blocks = []
    for path in DOCUMENTS:
        lines = path.read_text(encoding="utf-8").splitlines()
        for start, line in enumerate(lines):
            info = line.removeprefix("```").split()
            if line.startswith("```python") and info[0] == "python":
                end = lines.index("```", start)
                # Blank lines before the source, so that a traceback shows the file's line.
                source = "\n" * (start + 1) + "\n".join(lines[start + 1 : end])
                place = f"{path.relative_to(ROOT)}:{start + 1}"
                blocks.append(Block(place, source, runs="no-run" not in info))
    return blocks


def test_the_workspace_has_a_readme() -> None:
    assert (ROOT / "README.md").is_file()


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.place)
def test_readme_block(block: Block, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code = compile(block.source, block.place.partition(":")[0], "exec")
    if block.runs:
        exec(code, {"__name__": "__main__"})
