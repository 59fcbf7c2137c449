"""The plan of a run: counted as it is done, for every method."""

import re
from pathlib import Path

import pytest
from semalign_harness import RunResult
from semalign_harness.cli.main import main


@pytest.mark.parametrize("kind", ["semalign", "kd", "sft", "laten"])
def test_counts_are_those_of_the_run(
    kind: str, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["train.steps=null", "train.passes=3", f"method.kind={kind}"]  # 3 whole passes of 16 rows
    assert main(["run", "tiny", *overrides, *more, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    (found,) = re.findall(r"plan: (\d+) steps, \d+ tokens \((\d+) supervised\)", shown)
    training = RunResult.read(tmp_path / "run" / "result.json").training
    assert tuple(map(int, found)) == (training.steps, training.supervised_tokens)
    assert "of memory" in shown and "on disk" in shown
