"""The tutorial, done from top to bottom on random models, with fewer steps and rows."""

import re
import shlex
from pathlib import Path

import pytest
from semalign_harness.cli.main import main

TEXT = (Path(__file__).parents[2] / "harness/docs/tutorial.md").read_text(encoding="utf-8")
FEWER = {
    "train_rows: 512": "train_rows: 16",
    "held_out_rows: 128": "held_out_rows: 4",
    "passes: 3": "passes: 1",
    "answer_rows: 128": "answer_rows: 2",
    "--limit 500": "--limit 4",
    "--seeds 0,1": "--seeds 0",
}


def test_the_tutorial_works(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, models = TEXT, {"generated:tiny-source": str(pair[0]), "generated:tiny-target": str(pair[1])}
    for many, few in {**FEWER, **models}.items():
        assert many in text
        text = text.replace(many, few)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        if language == "python":
            exec(block, {})
        elif language == "yaml":
            Path("my-transfer.yaml").write_text(block, encoding="utf-8")
        elif not language:
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
    assert all(Path(f"runs/my-transfer{end}/report.html").is_file() for end in ("", "-comparison"))
    assert Path("runs/my-transfer/model/model.safetensors").is_file()
