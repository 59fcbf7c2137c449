"""The examples in docstrings and in the README."""

import doctest
import re
from pathlib import Path

import pytest
import semalign_train

from ..examples import assert_prints_what_it_says, examples_of

README = Path(__file__).parents[2] / "packages" / "semalign-train" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


@examples_of(semalign_train)
def test_example(example: doctest.DocTest) -> None:
    assert_prints_what_it_says(example)


@pytest.mark.parametrize("block", BLOCKS, ids=["frontier", "joint"])
def test_readme(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block prints losses, of which the KL falls."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, README.name, "exec"), {"__name__": "__main__"})
    printed = re.findall(r"'output': ([\d.]+)", capsys.readouterr().out)
    pairs = list(zip(printed[::2], printed[1::2], strict=True))
    assert pairs and all(float(last) < float(first) for first, last in pairs)
