"""What a run is going to do: counted as it is done, and the time that remains by what it took."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.methods import _semalign
from semalign_harness.run import pipeline
from semalign_harness.run.inputs import read_inputs
from semalign_harness.run.plan import Clock, Plan, make_plan
from semalign_harness.util.console import Console
from semalign_harness.util.text import duration
from torch.utils.flop_counter import FlopCounterMode


def plan_of(overrides: list[str], *more: str, processes: int = 1, supervised: bool = False) -> Plan:
    experiment = load_experiment("tiny", overrides=[*overrides, *more])
    inputs = read_inputs(experiment, Console(quiet=True))
    return make_plan(
        experiment,
        inputs.split,
        source=inputs.source.shape,
        target=inputs.target.shape,
        processes=processes,
        supervised=supervised,
        speed=1e9,
    )


def test_counts_are_those_of_the_run(overrides: list[str], tmp_path: Path) -> None:
    more = ["train.steps=null", "train.passes=3", "train.batch_size=8"]
    plan = plan_of(overrides, *more)
    result = pipeline.run_experiment(load_experiment("tiny", overrides=[*overrides, *more]), tmp_path / "run")
    assert plan.stages == len(result.training.transfer.stages)
    assert plan.steps == sum(stage.steps for stage in result.training.transfer.stages)
    assert plan.supervised_tokens == result.training.supervised_tokens  # 3 whole passes of 16 rows


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["method.weights.geometry=0", "method.weights.output=0", "method.weights.answer=1"],
        ["method.weights.output=0"],
        ["supervision.output.kind=final_hidden"],
        ["method.layers=[1]"],
        ["method.layers=[3]"],
        ["train.recompute=true"],
        ["live=true"],
    ],
)
def test_the_work_of_training_is_what_torch_counts(
    more: list[str], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    train = _semalign._train

    def counting(*arguments: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            report = train(*arguments)
        counted.append(counter.get_total_flops())
        return report

    monkeypatch.setattr(_semalign, "_train", counting)
    assert main(["run", "tiny", *overrides, *more, "--quiet", "--out", str(tmp_path / "run")]) == 0
    # Padding and the products of tokens with tokens, which are small beside real widths, are left out.
    assert 0.5 * counted[0] < sum(plan_of(overrides, *more).training) < 1.2 * counted[0]


def test_more_work_takes_longer(overrides: list[str]) -> None:
    plan = plan_of(overrides)
    assert plan.source > 0 and plan.measuring > 0 and plan.flops > 0
    assert plan_of(overrides, processes=2).training == pytest.approx([work / 2 for work in plan.training])
    assert plan_of(overrides, supervised=True).source == 0
    assert list(plan.training) == sorted(plan.training, reverse=True)  # the suffix above the frontier shrinks
    assert sum(plan_of(overrides, "live=true").training) > sum(plan.training)
    assert plan_of(overrides, "live=true").source < plan.source


@given(work=st.lists(st.floats(1, 100), min_size=1, max_size=6), speed=st.floats(0.1, 10), done=st.integers(1, 6))
def test_a_steady_machine_is_predicted_exactly(work: list[float], speed: float, done: int) -> None:
    done = min(done, len(work))
    plan = Plan(
        stages=len(work), steps=1, tokens=1, supervised_tokens=1, source=0, training=tuple(work), measuring=2, flops=1
    )
    clock = Clock(plan, range(1, len(work) + 1))
    left = [clock.after(layer, seconds / speed) for layer, seconds in enumerate(work[:done], 1)]
    assert left[-1] == pytest.approx((sum(work[done:]) + 1) / speed)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (89, "89 s"), (120, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(float(seconds)) == text


def test_the_plan_is_told(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _semalign.TELL_EVERY, before = 0.0, _semalign.TELL_EVERY
    try:
        assert main(["run", "tiny", *overrides, "--out", str(tmp_path / "run")]) == 0
    finally:
        _semalign.TELL_EVERY = before
    told = capsys.readouterr().err
    assert "plan: 3 stages, 6 steps" in told and "of memory" in told and "on disk" in told
    assert "layer 1 of 3: about" in told and "left" in told


def test_other_methods_have_no_plan(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "make_plan", None)
    assert main(["run", "tiny", *overrides, "method.kind=kd", "--out", str(tmp_path / "run")]) == 0
    assert "plan:" not in capsys.readouterr().err
