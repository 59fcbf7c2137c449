"""The benchmark beside the peers: a smoke of every row, wrong command lines, results that disagree; no time limits."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "harness/bench"
ROWS = [
    "basis",
    "transport",
    "tokens",
    "relation",
    "cka",
    "kl",
    "attribution",
    "frontier",
    "transfer",
    "growth",
    "startup",
]
PEERS = {"cka": "ckatorch", "attribution": "captum", "transfer": "trl"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The bench's own modules, which are no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return {name: importlib.import_module(name) for name in ("case", "runner", "report")}


@pytest.mark.slow
def test_every_row_is_measured_at_the_small_scale(tmp_path: Path) -> None:
    run = bench("--scale", "small", "--repeats", "2", "--out", str(tmp_path / "bench.json"))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    installed = [row for row in ROWS if row not in PEERS or find_spec(PEERS[row])]
    assert list(dict.fromkeys(line["row"] for line in result["lines"])) == installed
    assert [each["row"] for each in result["left_out"]] == [row for row in ROWS if row not in installed]
    assert result["failures"] == []
    assert result["versions"]["torch"] == torch.__version__
    for case in result["cases"]:
        for measured in case["sides"].values():
            assert len(measured) == 2
            assert all(one["seconds"] > 0 and one["bytes"] >= 0 and one["threads"] > 0 for one in measured)
        assert case["order"][len(case["order"]) // 2 :] == case["order"][: len(case["order"]) // 2][::-1]
    for line in result["lines"]:
        assert line["row"] in run.stdout and line["peer"] in run.stdout
        for ratio in line["ratios"].values():
            assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert all(goal["met"] == (goal["measured"] <= float(goal["goal"].split()[-1])) for goal in line["goals"])
    compared = {case["row"] for case in result["cases"] if case["differences"]}
    assert compared == {"basis", "transport", "tokens", "relation", "cka", "kl", "attribution"} & set(installed)


def test_rows_are_listed() -> None:
    run = bench("--list")
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ROWS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "basis,pinv"], "unknown row 'pinv': known are basis, "),
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--source", "model"], "--source: model does not exist"),
        (["--out", f"{__file__}/bench.json"], f"--out {__file__}/bench.json cannot be written to: "),
        (["--out", str(Path(__file__).parent)], f"--out {Path(__file__).parent} cannot be written to: "),
        (["--data", __file__], "--source is missing: a real pair needs --source, --target and --data"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(arguments: list[str], said: str) -> None:
    run = bench(*arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(said) and len(run.stderr.splitlines()) == 1
    assert run.stdout == ""


def test_a_peer_that_disagrees_is_a_failure(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    case = modules["case"].Case(row="row", size="size", module="", peer="", parameters={}, warm=None, tolerance=1e-3)
    settings = modules["runner"].Settings("cpu", "float32", 1, 60.0, tmp_path)
    measured = modules["runner"].Measured(seconds=1.0, units=1.0, bytes=1, threads=1)

    def run(peer: dict[str, torch.Tensor]) -> object:
        results = {"row_ours": {"x": torch.ones(4)}, "row_peer": peer}
        return modules["runner"].measure(
            case, settings, lambda text: None, run=lambda module, function, *rest: (measured, results[function])
        )

    assert run({"x": torch.ones(4) * 1.0005}).differences["peer.x"] == pytest.approx(5e-4, rel=1e-2)
    for wrong in ({"x": torch.ones(4) * 1.002}, {"x": torch.ones(5)}, {"x": torch.full((4,), torch.nan)}, {}):
        with pytest.raises(modules["case"].BenchError, match="differ in x|nothing to compare"):
            run(wrong)


def test_a_side_that_fails_is_told(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    settings = modules["runner"].Settings("cpu", "float32", 1, 60.0, tmp_path)
    with pytest.raises(modules["case"].BenchError, match="basis_ours failed .exit status 1.: TypeError: .*entries"):
        modules["runner"].run_side("rows_geometry", "basis_ours", {}, None, settings)


def test_goals_are_judged_by_the_medians(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    case, runner, report = modules["case"], modules["runner"], modules["report"]
    goals = (case.Goal("time", 0.5), case.Goal("memory", 0.5))
    line = case.Line(plus="once", share=0.5, goals=goals)
    measured = case.Case(row="r", size="s", module="", peer="", parameters={}, warm=None, lines=(line,))

    def side(*seconds: float, memory: int) -> list[object]:
        return [runner.Measured(seconds=each, units=2.0, bytes=memory, threads=1) for each in seconds]

    sides = {"ours": side(1, 1, 4, memory=3), "peer": side(4, 4, 4, memory=10), "once": side(1, 1, 1, memory=6)}
    (found,) = report.summary(runner.Measurements(measured, sides, [], {}))
    assert found["ratios"]["time"] == {"median": 0.375, "min": 0.375, "max": 1.125}
    assert found["ratios"]["memory"] == {"median": 0.6, "min": 0.6, "max": 0.6}
    assert [goal["met"] for goal in found["goals"]] == [True, False]
