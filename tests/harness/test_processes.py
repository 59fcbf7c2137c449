"""`semalign run` in several processes: one run folder, the result of one process, and one sentence when it fails."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from semalign_align import Ranks, Supervision
from semalign_harness import RunResult
from semalign_harness.cli.main import main
from semalign_harness.results.source_phase import SourcePhase
from semalign_train._loop import Loop

from tests.processes import run_processes


def command(folder: Path, arguments: list[str]) -> None:
    """The command, as a launcher starts it in each process; what it prints goes to a file of each."""
    for stream in ("stdout", "stderr"):
        setattr(sys, stream, (folder / f"{stream}-{Ranks.current().rank}").open("w", encoding="utf-8"))
    code = main(arguments)
    sys.stdout.close()
    sys.stderr.close()
    sys.exit(code)


def printed(folder: Path, stream: str, rank: int) -> str:
    return (folder / f"{stream}-{rank}").read_text(encoding="utf-8")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in ours)


@pytest.mark.parametrize("more", [[], ["method.shard_frozen=true"], ["live=true"]], ids=["", "sharded", "live"])
def test_two_processes_run_an_experiment_together(
    more: list[str], tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "tiny", *overrides, "--quiet", "--out", str(tmp_path / "one")]) == 0
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "other cache"))
    arguments = ["run", "tiny", *overrides, *more, "--out", str(tmp_path / "two")]
    assert run_processes(command, tmp_path, arguments) == [0, 0]
    one, two = (RunResult.read(tmp_path / name / "result.json") for name in ("one", "two"))
    assert two.after.kl == pytest.approx(one.after.kl, abs=1e-4)
    assert two.source.answer_nll == pytest.approx(one.source.answer_nll, abs=1e-5)
    assert (two.after.tokens, two.after.accuracy) == (one.after.tokens, one.after.accuracy)
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert {file.name for file in (tmp_path / "two").iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}
    if "live=true" not in more:
        phase = SourcePhase.read(tmp_path / "two" / "supervision.json")
        shards = Supervision.open(Path(phase.folder) / "supervision").manifest.shards
        assert {shard.file[:9] for shard in shards} == {"shard-000", "shard-001"}
    assert "target after" in printed(tmp_path, "stdout", 0)
    assert printed(tmp_path, "stdout", 1) == printed(tmp_path, "stderr", 1) == ""


def test_a_bad_input_is_told_once(tmp_path: Path, overrides: list[str]) -> None:
    arguments = ["run", "tiny", *overrides, "data.train.path=/nowhere.jsonl", "--out", str(tmp_path / "run")]
    assert run_processes(command, tmp_path, arguments) == [2, 2]
    assert printed(tmp_path, "stderr", 0).splitlines()[-1].startswith("semalign: /nowhere.jsonl does not exist")
    assert printed(tmp_path, "stderr", 1) == ""
    assert not (tmp_path / "run").exists()


def dying(folder: Path, arguments: list[str]) -> None:
    step = Loop._step

    def fatal(self: Loop, number: int, *more: Any) -> Any:
        if Ranks.current().rank == 1 and (self._layer, number) == (2, 2):
            os._exit(9)
        return step(self, number, *more)

    Loop._step = fatal  # type: ignore[method-assign]
    command(folder, arguments)


def test_a_process_that_dies_leaves_a_run_that_can_go_on(tmp_path: Path, overrides: list[str]) -> None:
    arguments = ["run", "tiny", *overrides, "train.checkpoint_steps=1", "--out"]
    assert run_processes(command, tmp_path, [*arguments, str(tmp_path / "whole")]) == [0, 0]
    codes = run_processes(dying, tmp_path, [*arguments, str(tmp_path / "run")])
    assert codes[1] == 9 and codes[0] != 0
    assert not (tmp_path / "run" / "result.json").exists()
    assert run_processes(command, tmp_path, [*arguments, str(tmp_path / "run")]) == [0, 0]
    assert "resuming the interrupted run" in printed(tmp_path, "stderr", 0)
    whole, run = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "run"))
    assert whole.read_bytes() == run.read_bytes()
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run")]
    assert len(lines[0]) == len(lines[1])
