"""Methods side by side: figures follow from the rows of the runs, and what is done is not done again."""

import contextlib
import csv
import gzip
import io
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from scipy import stats
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, Measurement, RunResult, load_experiment
from semalign_harness.cli.main import main
from semalign_harness.comparison import Benchmarks, Comparison, ComparisonConfig, compare, comparison_csv
from semalign_harness.evaluation import _run as evaluation
from semalign_harness.evaluation import read_evaluation
from semalign_harness.grid import submit
from semalign_harness.grid.folder import keep_reason
from semalign_harness.grid.matrix import Matrix
from semalign_harness.methods import BASELINES, MethodReport, known_methods
from semalign_harness.models.settings import ModelConfig
from semalign_harness.report.published import published_table, read_published
from semalign_harness.results.measurement import RowMetrics
from semalign_harness.statistics import compare_values, estimate_gap_recovered, proportion
from semalign_harness.util.console import Console

from ..contracts import assert_keeps_the_laws
from .test_benchmarks import ROWS

DIGITS = 12
"""Held-out rows of a run that is made up."""
METRICS = ("KL", "answer NLL", "agreement", "exact answers")


@dataclass
class Runs:
    """Runs that are made up, in place of those that train."""

    ran: list[str] = field(default_factory=list)
    """Names of the cells, in order."""
    failing: dict[str, str] = field(default_factory=dict)
    """Why a cell fails."""
    interrupted_after: int | None = None
    """Cells that end before the user presses Ctrl-C."""
    model: Path | None = None
    """What a run leaves as its model."""
    rows: int = DIGITS
    """Held-out rows."""
    models: str = ""
    """Tells the untrained models from those of other runs."""


def measurement(seed: str, *, rows: int, source: bool = False) -> Measurement:
    """Figures of rows that are drawn by a seed, and their means."""
    draw = random.Random(seed)
    tokens = [3 + row // 2 for row in range(rows)]
    kl = [0.0 if source else draw.uniform(0.1, 2) for _ in tokens]
    nll = [draw.uniform(0.1, 3) for _ in tokens]
    agreement = [1.0 if source else draw.randrange(count + 1) / count for count in tokens]
    correct = [source or draw.random() < 0.4 for _ in tokens]

    def weighted(values: Sequence[float]) -> float:
        return sum(w * x for w, x in zip(tokens, values, strict=True)) / sum(tokens)

    return Measurement(
        answer_nll=weighted(nll),
        kl=weighted(kl),
        agreement=weighted(agreement),
        accuracy=sum(correct) / rows,
        tokens=sum(tokens),
        rows=rows,
        answer_rows=rows,
        by_row=RowMetrics(tokens=tokens, nll=nll, kl=kl, agreement=agreement, correct=correct),
    )


def made_up(experiment: Experiment, rows: int, models: str = "") -> RunResult:
    name, seed = experiment.name, experiment.train.seed
    stored = bool(experiment.method.stored)  # type: ignore[attr-defined]
    number = len(name)
    return RunResult(
        name=name,
        source=measurement(f"source{models}", rows=rows, source=True),
        before=measurement(f"before{models}", rows=rows),
        after=measurement(f"{name} {seed}", rows=rows),
        training=MethodReport(
            method=name,
            trained_parameters=1000 * number,
            steps=7,
            supervised_tokens=500 + (name == "laten"),
            seconds=10.0 * number + seed,
        ),
        supervision_bytes=stored * 3_000_000,
        supervision_seconds=stored * 4.5,
        train_rows=experiment.data.train_rows - (experiment.data.answers != "gold"),  # one could not be used
        seconds=100.0,
        peak_bytes=10**9,
        training_peak_bytes=(seed + 1) * 10**8,
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Cells end at once, with figures of their own."""
    runs = Runs()

    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        cells = {cell.name: cell for cell in Matrix.read(folder / "matrix.json").cells}
        for place, name in enumerate(todo):
            if place == runs.interrupted_after:
                raise KeyboardInterrupt
            runs.ran.append(name)
            if name in runs.failing:
                keep_reason(folder, name, runs.failing[name])
                continue
            if runs.model is not None:
                shutil.copytree(runs.model, folder / name / "model")
                settings = json.loads((runs.model / "config.json").read_text(encoding="utf-8"))
                text = json.dumps(settings | {"trained_as": name})  # other weights have another hash
                (folder / name / "model" / "config.json").write_text(text, encoding="utf-8")
            (folder / name).mkdir(exist_ok=True)
            made_up(cells[name].experiment, runs.rows, runs.models).write(folder / name / "result.json")

    monkeypatch.setattr(submit, "_run_here", run_here)
    return runs


def compared(tmp_path: Path, *more: str) -> int:
    return main(["compare", "tiny", *more, "--quiet", "--out", str(tmp_path / "out")])


def comparison(tmp_path: Path) -> Comparison:
    return Comparison.read(tmp_path / "out" / "comparison.json")


def results(tmp_path: Path, name: str, seeds: Sequence[int]) -> list[RunResult]:
    return [RunResult.read(tmp_path / "out" / "runs" / f"{name}_seed-{seed}" / "result.json") for seed in seeds]


def settings_of(tmp_path: Path) -> dict[str, Experiment]:
    return {cell.name: cell.experiment for cell in Matrix.read(tmp_path / "out" / "runs" / "matrix.json").cells}


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The sentence; nothing is written."""

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}

    before = state()
    assert compared(tmp_path, *more) == 2
    captured = capsys.readouterr()
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("semalign: ") and captured.out == "" and state() == before
    return sentence


def column(measured: Measurement, metric: str) -> tuple[list[float], list[int] | None]:
    """Items of a metric and their weights, by hand."""
    rows = measured.by_row
    if metric == "exact answers":
        return [float(right) for right in rows.correct], None
    return list({"KL": rows.kl, "answer NLL": rows.nll, "agreement": rows.agreement}[metric]), list(rows.tokens)


def weighted_mean(items: Sequence[float], weights: Sequence[float] | None) -> float:
    weights = weights or [1] * len(items)
    return sum(w * x for w, x in zip(weights, items, strict=True)) / sum(weights)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one seed", "three seeds"])
def test_every_figure_follows_from_the_rows_of_the_runs(seeds: tuple[int, ...], tmp_path: Path, runs: Runs) -> None:
    names = ["semalign", "sft", "kd", "laten", "random_pairing"]
    assert compared(tmp_path, "--methods", ",".join(names), "--seeds", ",".join(map(str, seeds))) == 0
    found = comparison(tmp_path)
    assert list(found.methods) == names and tuple(found.metrics) == METRICS
    of = {name: results(tmp_path, name, seeds) for name in names}
    baselines = [name for name in names if name in BASELINES]
    assert baselines == ["sft", "kd", "laten"]
    for metric, described in found.metrics.items():
        items, weights = {}, None
        for name in names:
            columns = [column(result.after, metric)[0] for result in of[name]]
            items[name] = [sum(values) / len(seeds) for values in zip(*columns, strict=True)]
            weights = column(of[name][0].after, metric)[1]
        source, before = (column(result, metric)[0] for result in (of["sft"][0].source, of["sft"][0].before))
        value = {name: weighted_mean(each, weights) for name, each in items.items()}
        gap = weighted_mean(source, weights) - weighted_mean(before, weights)
        assert described.source.value == pytest.approx(weighted_mean(source, weights))
        assert described.before.value == pytest.approx(weighted_mean(before, weights))
        assert described.lower_is_better == (metric in ("KL", "answer NLL")) == (not described.percent)
        assert described.items == DIGITS
        best = (min if described.lower_is_better else max)(baselines, key=value.__getitem__)
        assert described.rival == best
        for name in names:
            figure = found.methods[name].metrics[metric]
            assert figure.estimate.value == pytest.approx(value[name])
            assert figure.gap.value == pytest.approx((value[name] - weighted_mean(before, weights)) / gap)
            each_seed = [weighted_mean(*column(result.after, metric)) for result in of[name]]
            assert figure.over_seeds.values == pytest.approx(each_seed)
            if len(seeds) > 1:
                mean = sum(each_seed) / len(seeds)
                spread = math.sqrt(sum((one - mean) ** 2 for one in each_seed) / (len(seeds) - 1))
                assert figure.over_seeds.spread == pytest.approx(spread)
            if name == best:
                assert figure.versus_rival is None
            else:
                assert figure.versus_rival is not None
                assert figure.versus_rival.difference.value == pytest.approx(value[name] - value[best])

    # The interval of a weighted mean, the gap's, and the paired test, of one method.
    figure, weights = found.methods["semalign"].metrics["KL"], list(of["sft"][0].after.by_row.tokens)
    ours = [sum(rows) / len(seeds) for rows in zip(*(r.after.by_row.kl for r in of["semalign"]), strict=True)]
    residual = [w * (x - weighted_mean(ours, weights)) for w, x in zip(weights, ours, strict=True)]
    error = math.sqrt(DIGITS / (DIGITS - 1) * sum(one**2 for one in residual)) / sum(weights)
    reach = float(stats.t.ppf(0.975, DIGITS - 1)) * error
    assert (figure.estimate.low, figure.estimate.high) == pytest.approx(
        (figure.estimate.value - reach, figure.estimate.value + reach)
    )
    untrained = (of["sft"][0].source.by_row.kl, of["sft"][0].before.by_row.kl)
    assert figure.gap == estimate_gap_recovered(*untrained, ours, weights=weights, seed=0)
    rivals = {metric: str(described.rival) for metric, described in found.metrics.items()}
    theirs = [sum(rows) / len(seeds) for rows in zip(*(r.after.by_row.kl for r in of[rivals["KL"]]), strict=True)]
    assert figure.versus_rival == compare_values(ours, theirs, weights=weights, seed=0)
    # Right and wrong answers: Wilson and McNemar where there is one seed; shares of seeds are values.
    answers = found.methods["semalign"].metrics["exact answers"]
    assert answers.versus_rival is not None
    if len(seeds) == 1:
        (mine,), (other,) = (
            [r.after.by_row.correct for r in of[name]] for name in ("semalign", rivals["exact answers"])
        )
        interval = stats.binomtest(sum(mine), DIGITS).proportion_ci(method="wilson")
        assert (answers.estimate.low, answers.estimate.high) == pytest.approx((interval.low, interval.high))
        alone = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((mine, other), (other, mine))]
        assert answers.versus_rival.p_value == pytest.approx(stats.binomtest(alone[0], sum(alone)).pvalue)
    assert answers.versus_rival.method == ("mcnemar" if len(seeds) == 1 else "paired_bootstrap")

    for name in names:
        costs, trainings = found.methods[name], [result.training for result in of[name]]
        assert costs.trained_parameters == trainings[0].trained_parameters
        assert (costs.steps, costs.supervised_tokens) == (7, trainings[0].supervised_tokens)
        assert costs.training_seconds == pytest.approx(sum(each.seconds for each in trainings) / len(seeds))
        assert (costs.peak_bytes, costs.training_peak_bytes) == (10**9, len(seeds) * 10**8)
        assert (costs.source_seconds > 0) == (costs.stored_bytes > 0) == (name not in ("sft", "laten"))


def test_variants_of_a_method_are_tested_against_the_one_that_is_named(tmp_path: Path, runs: Runs) -> None:
    names = ["semalign", "sft", "semalign.wide", "kd.cold", "semalign.again"]
    asked = ["--methods", ",".join(names), "--against", "semalign.again"]
    own = ["semalign.wide:transport.frame=none", "kd.cold:train.warmup=0"]
    assert compared(tmp_path, *asked, *own) == 0
    ran, found = settings_of(tmp_path), comparison(tmp_path)
    assert runs.ran == [f"{name}_seed-0" for name in names[:-1]]
    assert [ran[name].transport.frame for name in ("semalign_seed-0", "semalign.wide_seed-0")] == ["parseval", "none"]
    kd = ran["kd.cold_seed-0"]
    assert (kd.method.kind, kd.train.warmup) == ("kd", 0)  # type: ignore[attr-defined]
    assert found.methods["semalign.again"].same_as == "semalign"
    assert {metric.rival for metric in found.metrics.values()} == {"semalign"}  # whose runs those are
    for name in names[1:-1]:
        figures = found.methods[name].metrics.values()
        assert all(figure.versus_rival is not None for figure in figures)
    assert "Each method − semalign.again, paired" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "asked",
    [("--methods", "semalgin.wide"), ("--methods", "semalign."), ("--methods", "semalign.a b"),
     ("--methods", "semalign,sft", "--against", "kd"), ("--methods", "semalign", "semalign.wide:train.passes=1")],
    ids=" ".join,
)  # fmt: skip
def test_variants_that_cannot_be(
    asked: tuple[str, ...], tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(tmp_path, capsys, *asked)
    assert "choose of semalign" in sentence or "among --methods" in sentence


def test_the_figures_of_one_run_are_its_result(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign") == 0
    figures = comparison(tmp_path).methods["semalign"].metrics
    ((result,), found) = results(tmp_path, "semalign", [0]), {key: each.estimate.value for key, each in figures.items()}
    after = result.after
    assert [found[metric] for metric in METRICS] == pytest.approx(
        [after.kl, after.answer_nll, after.agreement, after.accuracy]
    )
    assert all(each.versus_rival is None and each.over_seeds.spread is None for each in figures.values())


def written(tmp_path: Path) -> dict[str, bytes]:
    return {name: (tmp_path / "out" / f"comparison.{name}").read_bytes() for name in ("json", "md", "csv")}


def test_a_second_call_runs_nothing(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--methods", "semalign,sft,kd", "--seeds", "0,1"]
    assert compared(tmp_path, *call) == 0
    first, printed = written(tmp_path), capsys.readouterr().out
    assert len(runs.ran) == 6 and printed.startswith(first["md"].decode())
    assert f"comparison folder: {tmp_path / 'out'}" in printed
    assert compared(tmp_path, *call) == 0
    assert len(runs.ran) == 6 and written(tmp_path) == first and capsys.readouterr().out == printed


def test_further_methods_and_seeds_extend_the_folder(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign") == 0
    alone = comparison(tmp_path).methods["semalign"]
    assert compared(tmp_path, "--methods", "sft,semalign", "--seeds", "1,0") == 0
    assert runs.ran == ["semalign_seed-0", "sft_seed-1", "sft_seed-0", "semalign_seed-1"]
    both = comparison(tmp_path)
    assert list(both.methods) == ["sft", "semalign"] and both.config.seeds == (1, 0)
    assert both.methods["semalign"].metrics["KL"].over_seeds.values[1] == alone.metrics["KL"].estimate.value
    assert compared(tmp_path, "--methods", "semalign") == 0
    assert len(runs.ran) == 4 and comparison(tmp_path).methods["semalign"] == alone


def test_an_interrupted_comparison_goes_on(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.interrupted_after = 2
    call = ["--methods", "semalign,sft,kd"]
    assert compared(tmp_path, *call) == 130
    assert "interrupted; the same command resumes: semalign " in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("comparison.*"))
    runs.interrupted_after = None
    assert compared(tmp_path, *call) == 0
    assert runs.ran == ["semalign_seed-0", "sft_seed-0", "kd_seed-0"]


def test_a_folder_of_other_files_is_refused(
    tmp_path: Path, runs: Runs, benched: "Benched", capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*benched.call, "--methods", "semalign", "--tasks", "gsm8k"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "experiment.json").touch()
    assert "is not empty, and holds no comparison: choose another folder with --out" in refused(tmp_path, capsys, *call)
    (out / "experiment.json").unlink()
    # An evaluation of the user's own, on other documents than the comparison's.
    source = benched.call[0].partition("=")[2]
    evaluated = ["evaluate", source, "--tasks", "gsm8k", "--data", str(benched.data), "--limit", "1", "--quiet"]
    assert main([*evaluated, "--out", str(out / "evaluation-source")]) == 0
    capsys.readouterr()
    assert "evaluation-source" in refused(tmp_path, capsys, *call)
    shutil.rmtree(out)
    out.touch()
    assert "is a file" in refused(tmp_path, capsys, *call)
    out.unlink()
    main(["submit", "tiny", "--over", "train.seed=0", "--quiet", "--out", str(out / "runs")])
    capsys.readouterr()
    assert "varies train.seed there, method and train.seed here" in refused(tmp_path, capsys, *call)


def test_a_comparison_that_was_interrupted_while_it_evaluated_goes_on(
    tmp_path: Path, runs: Runs, benched: "Benched", monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [*benched.call, "--methods", "semalign", "--tasks", "gsm8k"]
    make, loaded = evaluation._Runner._make, benched.loaded

    def interrupted(self: Any) -> LM:
        if loaded:
            raise KeyboardInterrupt
        return make(self)

    monkeypatch.setattr(evaluation._Runner, "_make", interrupted)
    assert compared(tmp_path, *call) == 130
    assert (tmp_path / "out" / "evaluation-source" / "evaluation.json").is_file()
    monkeypatch.setattr(evaluation._Runner, "_make", make)
    assert compared(tmp_path, *call) == 0
    assert loaded == ["source", "target", "semalign_seed-0"]


def test_a_failed_run_stops_no_other_and_is_tried_again(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.failing = {"semalign_seed-1": "the loss | is not finite"}
    call = ["--methods", "semalign,sft,frame_parseval", "--seeds", "0,1"]
    assert compared(tmp_path, *call) == 2
    assert len(runs.ran) == 4
    found, printed = comparison(tmp_path), capsys.readouterr().out
    reason = "semalign_seed-1: the loss | is not finite"
    for name in ("semalign", "frame_parseval"):  # which shares its runs
        assert found.methods[name].missing == (reason,) and not found.methods[name].metrics
    assert found.methods["sft"].metrics and not found.methods["sft"].missing
    assert f"- {reason}\n" in printed
    assert [row[:2] for row in table(printed)[3:]] == [
        ["semalign", "–"],
        ["sft", table(printed)[4][1]],
        ["frame_parseval (= semalign)", "–"],
    ]
    lines = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    assert [line["note"] for line in lines if not line["value"]] == [reason] * 2
    runs.failing = {}
    assert compared(tmp_path, *call) == 0
    assert runs.ran[4:] == ["semalign_seed-1"] and not comparison(tmp_path).methods["semalign"].missing


def test_a_run_whose_figures_are_not_finite_stops_no_other(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_up

    def diverged(experiment: Experiment, *more: Any) -> RunResult:
        result = made(experiment, *more)
        rows = result.after.by_row
        broken = rows.model_copy(update={"kl": (math.nan, *rows.kl[1:])})
        after = result.after.model_copy(update={"by_row": broken})
        return result if experiment.name == "sft" else result.model_copy(update={"after": after})

    monkeypatch.setitem(globals(), "made_up", diverged)
    assert compared(tmp_path, "--methods", "semalign,sft") == 2
    found = comparison(tmp_path)
    assert found.methods["semalign"].missing == ("semalign_seed-0: its KL or NLL is not finite on some rows",)
    assert found.methods["sft"].metrics


def test_nothing_finished_is_one_sentence(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.failing = {"sft_seed-0": "too large", "kd_seed-0": "too slow"}
    assert compared(tmp_path, "--methods", "sft,kd") == 2
    assert "no method has finished all its runs: sft_seed-0: too large; kd_seed-0: too slow" in capsys.readouterr().err


def test_another_experiment_is_refused_with_the_difference(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.failing = {"kd_seed-0": "wrong"}
    assert compared(tmp_path, "--methods", "semalign,sft,kd") == 2
    capsys.readouterr()
    runs.ran.clear()
    sentence = refused(tmp_path, capsys, "--methods", "semalign,sft,kd", "train.passes=1")
    assert "semalign_seed-0: train.passes is 12.0 there, 1.0 here" in sentence and "--out" in sentence
    sentence = refused(tmp_path, capsys, "--methods", "semalign,sft", "sft:train.learning_rate=1e-4")
    assert "sft_seed-0: train.learning_rate is 0.003 there, 0.0001 here" in sentence
    assert not runs.ran
    # What never began may be mended.
    runs.failing = {}
    assert compared(tmp_path, "--methods", "semalign,kd", "kd:method.answer=0.5") == 0
    assert runs.ran == ["kd_seed-0"]


def test_a_run_that_failed_may_keep_states_from_now_on(tmp_path: Path, runs: Runs) -> None:
    runs.failing = {"kd_seed-0": "killed"}
    assert compared(tmp_path, "--methods", "semalign,kd") == 2
    runs.failing = {}
    assert compared(tmp_path, "--methods", "semalign,kd", "train.checkpoint_steps=5") == 0
    assert runs.ran == ["semalign_seed-0", "kd_seed-0", "kd_seed-0"]


@pytest.mark.parametrize("names", ["semalign,frame_parseval", "frame_parseval,semalign"])
def test_methods_with_the_same_settings_share_their_runs(names: str, tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", f"{names},frame_dual", "--seeds", "0,1") == 0
    assert set(runs.ran) == {f"{name}_seed-{seed}" for name in ("semalign", "frame_dual") for seed in (0, 1)}
    found = comparison(tmp_path).methods
    assert list(found) == [*names.split(","), "frame_dual"]
    assert found["frame_parseval"] == found["semalign"].model_copy(update={"same_as": "semalign"})
    assert found["frame_dual"].same_as is None


def test_a_method_with_an_override_of_its_own_shares_nothing(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign,frame_parseval", "semalign:transport.fold_gain=false") == 0
    assert runs.ran == ["semalign_seed-0", "frame_parseval_seed-0"]


def test_random_pairings_are_drawn_by_the_seed(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "random_pairing,uniform_pairing", "--seeds", "3,4") == 0
    found = settings_of(tmp_path)
    for seed in (3, 4):
        assert found[f"random_pairing_seed-{seed}"].pairing.model_dump() == {"kind": "random", "seed": seed}
        assert found[f"uniform_pairing_seed-{seed}"].pairing.kind == "uniform"
        assert all(found[f"{name}_pairing_seed-{seed}"].train.seed == seed for name in ("random", "uniform"))


def test_overrides_are_of_all_methods_or_of_one(tmp_path: Path, runs: Runs) -> None:
    more = ["train.passes=2", "sft:train.learning_rate=1e-3", "sft:train.passes=1", "data.train.path=C:/rows.jsonl"]
    assert compared(tmp_path, "--methods", "semalign,sft,kd", *more) == 0
    found = settings_of(tmp_path)
    assert [found[f"{name}_seed-0"].train.passes for name in ("semalign", "sft", "kd")] == [2, 1, 2]
    assert [found[f"{name}_seed-0"].train.learning_rate for name in ("sft", "kd")] == [1e-3, 3e-3]
    assert found["kd_seed-0"].data.train.path == "C:/rows.jsonl"


def test_semalign_is_semalign_whatever_the_experiment_trains_with(tmp_path: Path, runs: Runs) -> None:
    names = "semalign,semalign_v1,frame_dual,sft"
    assert compared(tmp_path, "--methods", names, "method.kind=sft", "train.learning_rate=0.5") == 0
    kinds = {
        name.partition("_seed")[0]: each.method.model_dump()["kind"] for name, each in settings_of(tmp_path).items()
    }
    assert kinds == {"semalign": "semalign", "semalign_v1": "semalign", "frame_dual": "semalign", "sft": "sft"}


def test_the_seed_is_the_experiments_where_none_is_named(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign", "train.seed=5") == 0
    assert runs.ran == ["semalign_seed-5"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "sft,semalgin"], ["unknown method 'semalgin'", "semalign_v1, sft", "or all"]),
        (["--methods", ""], ["unknown method ''"]),
        (["--methods", "sft, sft"], ["sft is named twice"]),
        (["--methods", "all,kd"], ["kd is named twice"]),
        (["--seeds", "0,x"], ["--seeds 0,x", "whole numbers"]),
        (["--seeds", "1,1"], ["names a seed twice"]),
        (["--seeds", "1", "train.seed=2"], ["--seeds and train.seed are the same setting"]),
        (["--tasks", "gsm9k"], ["'gsm9k'", "gsm8k"]),
        (["--tasks", "gsm8k", "--limit", "0"], ["limit", "greater than or equal to 1"]),
        (["--limit", "3"], ["--limit", "--tasks"]),
        (["--data", "here"], ["--data", "--tasks"]),
        (["--jobs", "0"], ["--jobs 0", "at least 1"]),
        (["train.lerning_rate=1"], ["did you mean 'learning_rate'"]),
        (["--methods", "sft", "kd:method.answer=1"], ["'kd'", "not compared", "--methods"]),
        (["--methods", "sft", "sft:"], ["not of the form key.key=value"]),
        (["--methods", "sft", "sft:method.rate=1"], ["method sft", "rate"]),
        (["--methods", "sft", "sft:train.seed=3"], ["sft:train.seed", "--seeds"]),
        (["--methods", "sft", "sft:train={seed: 3}"], ["sft:train.seed", "--seeds"]),
        (["--methods", "random_pairing", "random_pairing:pairing.seed=3"], ["random_pairing:pairing.seed", "--seeds"]),
        (["--methods", "sft", "sft:name=mine"], ["sft:name"]),
        (["--methods", "sft", "sft:data.seed=3"], ["method sft has data.seed of its own", "set it for all"]),
        (["--methods", "sft", "sft:measure.answer_rows=3"], ["measure.answer_rows of its own"]),
        (["--methods", "sft", "sft:target.path=other"], ["target.path of its own"]),
    ],
)
def test_wrong_input_is_one_sentence(
    more: list[str], words: list[str], tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(tmp_path, capsys, *more)
    for word in words:
        assert word in sentence
    assert not runs.ran


def test_without_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "compare needs an experiment" in capsys.readouterr().err


def test_methods_that_are_joined_by_blanks(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, "--methods", "semalign", "kd", "kd:train.learning_rate=1e-3") == 2
    assert "'kd' is not an override" in (said := capsys.readouterr().err) and "--methods semalign,kd" in said


def test_the_rows_of_a_method_may_have_other_answers(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign,sft", "sft:data.answers=source") == 0
    assert settings_of(tmp_path)["sft_seed-0"].data.answers == "source"
    assert "; 2,047 to 2,048 training rows." in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "2,047 to 2,048 of " in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    older = comparison(tmp_path).model_dump(mode="json")
    for found in older["methods"].values():
        del found["train_rows"]
    assert Comparison.model_validate(older).train_rows() == "2,048"


@pytest.mark.parametrize(
    ("of_all", "of_one", "refused"),
    [
        ("data.held_out_answers=target", "data.answers=source", False),
        ("data.held_out_answers=gold", "data.writing.temperature=1", False),
        ("data.held_out_answers=target", "data.writing.keep=correct", False),
        ("data.held_out_answers=target", "data.writing.temperature=1", True),
        ("data.held_out_answers=gold", "data.held_out_answers=target", True),
    ],
)
def test_methods_are_measured_on_the_same_answers(
    of_all: str, of_one: str, refused: bool, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, of_all, "--methods", "semalign,sft", f"sft:{of_one}") == 2 * refused
    assert (of_one.partition("=")[0] in capsys.readouterr().err) == refused


def test_rows_that_changed_between_two_calls_are_not_compared(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, "--methods", "semalign") == 0
    runs.rows += 1
    assert compared(tmp_path, "--methods", "semalign,sft") == 2
    assert "a run of sft was measured on other held-out rows" in capsys.readouterr().err


def test_models_that_changed_between_two_calls_are_not_compared(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, "--methods", "semalign") == 0
    runs.models = " of another day"
    assert compared(tmp_path, "--methods", "semalign,sft") == 2
    assert "a run of sft found other metrics of the source" in capsys.readouterr().err


def test_a_baseline_is_the_rival_under_the_name_that_ran(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign,kd.a,kd") == 0
    found = comparison(tmp_path)
    assert found.methods["kd"].same_as == "kd.a"
    assert {metric.rival for metric in found.metrics.values()} == {"kd.a"}


def test_a_variant_of_a_baseline_can_be_the_best_one(tmp_path: Path, runs: Runs) -> None:
    variants = ["kd.a", "kd.b", "kd.c"]
    rates = [f"{name}:train.learning_rate={place}e-3" for place, name in enumerate(variants, 1)]
    assert compared(tmp_path, "--methods", ",".join(["semalign", *variants]), *rates) == 0
    found = comparison(tmp_path)
    kl = {name: found.methods[name].metrics["KL"].estimate.value for name in variants}
    assert found.metrics["KL"].rival == min(kl, key=kl.__getitem__)


def test_a_method_does_not_become_another_one(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, "--methods", "semalign,sft", "sft:method.kind=kd") == 2
    assert "makes it the method kd: name that among --methods instead" in capsys.readouterr().err


def test_help_lists_the_methods_and_what_makes_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = capsys.readouterr().out
    for name in known_methods():
        assert any(line.split()[:1] == [name] for line in printed.splitlines()), name
    assert "pairing.kind=nearest_critical" in printed and "the experiment as it is" in printed


def test_the_settings_of_methods_fit_every_experiment() -> None:
    assert set(BASELINES) <= set(known_methods())
    config = config_of({name: () for name in known_methods()})
    assert ComparisonConfig.parse(json.loads(config.model_dump_json())) == config


def config_of(methods: dict[str, tuple[str, ...]], **more: Any) -> ComparisonConfig:
    return ComparisonConfig(experiment=load_experiment("tiny"), methods=methods, **more)


def test_the_function_refuses_what_the_command_refuses(tmp_path: Path, runs: Runs) -> None:
    for name, own in (("semalgin", ()), ("sft", ("method.rate=1",))):
        with pytest.raises(SemalignError):
            compare(config_of({name: own}), tmp_path / "out")
    for wrong in ('{"methods": {}}', '{"against": "kd"}', '{"seeds": []}', '{"seeds": [0, 0]}'):
        tree = {"experiment": load_experiment("tiny"), "methods": {"sft": ()}, **json.loads(wrong)}
        with pytest.raises(SemalignError):
            ComparisonConfig.parse(tree)
    assert not list(tmp_path.iterdir())


def test_contracts_keep_the_laws(tmp_path: Path, runs: Runs) -> None:
    benchmarks = Benchmarks(tasks=("mmlu",), data="here", limit=1, chat=False)
    found = compare(config_of({"semalign": (), "sft": ("train.passes=1",)}), tmp_path / "out")
    sft = found.methods["sft"]
    for value in (benchmarks, found, sft, sft.metrics["KL"], found.metrics["KL"], read_published()):
        assert_keeps_the_laws(value)
    assert_keeps_the_laws(config_of({"sft": ()}, benchmarks=benchmarks, seeds=(3,)))


def test_the_csv_equals_the_json(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign,sft,frame_parseval", "--seeds", "0,1") == 0
    found = comparison(tmp_path)
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["metric"]) for line in lines] == [
        (name, metric) for name in found.methods for metric in METRICS
    ]

    def number(text: str) -> float | None:
        return float(text) if text else None

    for line in lines:
        method = found.methods[line["method"]]
        figure, best = method.metrics[line["metric"]], found.metrics[line["metric"]].rival
        estimate, gap, versus = figure.estimate, figure.gap, figure.versus_rival
        assert [number(line[key]) for key in ("value", "low", "high", "spread", "gap", "gap_low", "gap_high")] == [
            estimate.value, estimate.low, estimate.high, figure.over_seeds.spread, gap.value, gap.low, gap.high,
        ]  # fmt: skip
        differences = [number(line[key]) for key in ("difference", "difference_low", "difference_high", "p")]
        if versus is None:
            assert differences == [None] * 4 and line["rival"] == ""
        else:
            apart = versus.difference
            assert differences == [apart.value, apart.low, apart.high, versus.p_value] and line["rival"] == best
        for key in ("trained_parameters", "steps", "supervised_tokens", "training_seconds", "source_seconds"):
            assert number(line[key]) == getattr(method, key)
        assert [int(line[key]) for key in ("peak_bytes", "stored_bytes")] == [method.peak_bytes, method.stored_bytes]
        assert line["note"] == ("same settings as semalign" if line["method"] == "frame_parseval" else "")


def table(markdown: str, number: int = 0) -> list[list[str]]:
    """Cells of one of the tables in a Markdown text, without the rule."""
    blocks = [block for block in markdown.split("\n\n") if block.startswith("|")]
    lines = blocks[number].splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    rows = [[cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1 and set("".join(rows[1])) == {"-", ":"}
    return [rows[0], *rows[2:]]


def test_the_markdown_table_has_a_row_for_each_method(tmp_path: Path, runs: Runs) -> None:
    assert compared(tmp_path, "--methods", "semalign,sft,kd,frame_parseval,laten", "--seeds", "0,1") == 0
    found, text = comparison(tmp_path), (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    header, *rows = table(text)
    assert header == ["", "KL ↓", "answer NLL ↓", "agreement ↑", "exact answers ↑"]
    names = ["semalign", "sft", "kd", "frame_parseval (= semalign)", "laten"]
    assert [row[0] for row in rows] == ["source", "target before", *names]
    kl, answers = (found.methods["kd"].metrics[key] for key in ("KL", "exact answers"))
    gap = f"{kl.gap.low:.0%}, {kl.gap.high:.0%}" if kl.gap.bounded else "unbounded"
    value = f"{kl.estimate.value:.4f} [{kl.estimate.low:.4f}, {kl.estimate.high:.4f}]"
    assert rows[4][1] == f"{value}; gap {kl.gap.value:.0%} [{gap}]"
    assert rows[4][4].startswith(f"{100 * answers.estimate.value:.1f}% [{100 * answers.estimate.low:.1f}%, ")
    costs = {row[0]: row[1:] for row in table(text, 1)}
    assert list(costs) == ["", *names]
    assert costs["kd"] == ["2,000", "7", "500", "20.5 s", "4.5 s", "0.2 GB", "3.0 MB"]
    assert costs["sft"] == ["3,000", "7", "500", "30.5 s", "–", "0.2 GB", "none"]
    assert "Mean over 2 seeds" in text and "2,048 training rows" in text
    assert "Budget: 500 supervised tokens for every method but laten;" in text
    spreads = {row[0]: row[1:] for row in table(text, 2)}
    assert list(spreads) == ["", "semalign", "sft", "kd", "laten"]
    over = found.methods["sft"].metrics["KL"].over_seeds
    assert spreads["sft"][0] == f"{over.mean:.4f} ± {over.spread:.4f}; [{over.low:.4f}, {over.high:.4f}]"
    best = [metric.rival for metric in found.metrics.values()]
    tests = table(text, 3)
    assert tests[0][1:] == [f"{name} − {other}" for name, other in zip(METRICS, best, strict=True)]
    versus = found.methods["semalign"].metrics["KL"].versus_rival
    assert versus is not None
    assert tests[1][1].startswith(f"{versus.difference.value:+.4f} [") and f"p {versus.p_value:.3f}" in tests[1][1]
    assert [row[1] for row in tests[1:] if row[0] == best[0]] == ["–"]


@pytest.mark.parametrize("option", [("--plain",), ("--chat",), ("--limit", "3"), ("--data", "here")], ids=" ".join)
def test_options_of_benchmarks_need_benchmarks(
    option: tuple[str, ...], tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name some with --tasks" in refused(tmp_path, capsys, "--methods", "sft", *option)


def test_what_is_unbounded_is_called_so(tmp_path: Path, runs: Runs) -> None:
    runs.rows = 1
    assert compared(tmp_path, "--methods", "semalign,sft") == 0
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "inf" not in text and "nan" not in text
    assert table(text)[3][1].count("[unbounded]") == 2 and "[unbounded], p 1.000" in table(text, 2)[1][1]
    assert "same supervised tokens for every method" in text and "standard deviation" not in text
    assert compared(tmp_path, "--methods", "semalign") == 0
    assert "baseline" not in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


PUBLISHED = """
| | MMLU | GSM8K | HumanEval | MBPP |
| target | 44.20 | 16.07 | 14.05 | 17.80 |
| source | 52.90 | 20.55 | 18.75 | 19.20 |
| seeking | 49.60 | 28.23 | 15.44 | 20.60 |
| laten | 44.40 | 20.47 | 14.63 | 18.20 |
| semalign_v1 | 50.30 | 19.21 | 17.34 | 18.78 |
"""
"""arXiv 2510.24208v1, from the general source."""
FROM_CODE = {
    "CodeLlama-13b-Python-hf": {
        "source": (47.56, 37.80), "seeking": (16.05, 21.40), "laten": (14.02, 17.80), "semalign_v1": (20.12, 22.35)
    },
    "WizardCoder-Python-13B-V1.0": {
        "source": (56.71, 41.60), "seeking": (15.04, 19.80), "laten": (14.02, 18.60), "semalign_v1": (19.46, 21.18)
    },
}  # fmt: skip
"""The same from code models: HumanEval and MBPP."""


def test_published_figures_are_those_of_the_paper() -> None:
    published = read_published()
    assert published.source == "arXiv 2510.24208v1"
    assert {table.target for table in published.tables} == {"meta-llama/Llama-2-7b-chat-hf"}
    found = {table.source.rpartition("/")[2]: table.metrics for table in published.tables}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PUBLISHED.strip().splitlines()]
    general: dict[str, dict[str, float]] = {
        name.lower(): {line[0]: float(line[place]) for line in lines[1:]} for place, name in enumerate(lines[0]) if name
    }
    assert found.pop("Llama-2-13b-chat-hf") == general
    for place, task in enumerate(("humaneval", "mbpp")):
        for name, figures in FROM_CODE.items():
            expected = {method: pair[place] for method, pair in figures.items()}
            assert found[name][task] == {"target": general[task]["target"], **expected}
    assert found.keys() == FROM_CODE.keys() and all(set(each) == {"humaneval", "mbpp"} for each in found.values())


def llama(source: str, metrics: Sequence[str], tmp_path: Path) -> Comparison:
    """A comparison of Llama 2 on benchmarks, of figures that are made up."""
    made = compare(config_of({"semalign_v1": (), "sft": ()}), tmp_path / source.replace("/", "-"))
    models = [ModelConfig(path=path) for path in (source, "meta-llama/Llama-2-7b-chat-hf")]
    experiment = made.config.experiment.model_copy(update=dict(zip(("source", "target"), models, strict=True)))
    right = {"source": 5, "before": 2, "semalign_v1": 3, "sft": 4}
    shares = {name: proportion([place < count for place in range(10)]) for name, count in right.items()}
    metric, methods = made.metrics["exact answers"], {}
    described = metric.model_copy(update={"source": shares["source"], "before": shares["before"]})
    for name, each in made.methods.items():
        figure = each.metrics["exact answers"].model_copy(update={"estimate": shares[name]})
        methods[name] = each.model_copy(update={"metrics": dict.fromkeys(metrics, figure)})
    return made.model_copy(
        update={
            "config": made.config.model_copy(update={"experiment": experiment}),
            "metrics": dict.fromkeys(metrics, described),
            "methods": methods,
        }
    )


def test_paper_and_ours_stand_side_by_side(tmp_path: Path, runs: Runs) -> None:
    general = "meta-llama/Llama-2-13b-chat-hf"
    (text,) = published_table(llama(general, ["KL", "gsm8k", "mmlu"], tmp_path))
    header, *rows, where = text.splitlines()
    assert header.split() == ["paper", "/", "ours", "mmlu", "gsm8k"] and where == "paper: arXiv 2510.24208v1"
    cells = {row.split()[0]: row.split("  ", 1)[1].strip() for row in rows}
    assert list(cells) == ["target", "source", "seeking", "laten", "semalign_v1", "sft"]
    assert cells["target"].split("   ") == ["44.20 / 20.00 [5.7, 51.0]", "16.07 / 20.00 [5.7, 51.0]"]
    assert cells["source"].startswith("52.90 / 50.00 [") and cells["semalign_v1"].startswith("50.30 / 30.00 [")
    assert cells["seeking"].split("  ")[-1].strip() == "28.23 / –"
    assert cells["sft"].split("  ")[0].strip() == "– / 40.00 [16.8, 68.7]"
    assert not list(published_table(llama(general, ["KL"], tmp_path)))
    assert not list(published_table(llama("other/model", ["gsm8k", "mmlu"], tmp_path)))
    (code,) = published_table(llama("codellama/CodeLlama-13b-Python-hf", ["gsm8k", "humaneval"], tmp_path))
    assert code.splitlines()[0].split() == ["paper", "/", "ours", "humaneval"] and "47.56 / 50.00" in code


def test_a_method_that_failed_has_no_figure_beside_the_papers(tmp_path: Path, runs: Runs) -> None:
    whole = llama("meta-llama/Llama-2-13b-chat-hf", ["gsm8k"], tmp_path)
    failed = whole.methods["semalign_v1"].model_copy(update={"metrics": {}, "missing": ("because",)})
    (text,) = published_table(whole.model_copy(update={"methods": whole.methods | {"semalign_v1": failed}}))
    assert "19.21 / –" in text


class Solver(LM):
    """Solves the problems that it was told, and counts what it was asked."""

    def __init__(self, solved: int, asked: Counter[str]) -> None:
        super().__init__()
        self.solved, self.asked = solved, asked

    def generate_until(self, requests: list[Instance], *, ended: Any = lambda place, text: None, **_: Any) -> list[str]:
        texts = []
        for place, request in enumerate(requests):
            self.asked[request.args[0]] += 1
            (known,) = (index for index, row in enumerate(ROWS["gsm8k"]) if row["question"] in request.args[0])
            texts.append(ROWS["gsm8k"][known]["answer"] if known < self.solved else "nothing")
            ended(place, texts[-1])
        return texts

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        return [(-1.0 - place % 4, True) for place, _ in enumerate(requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError


@dataclass
class Benched:
    """A comparison on benchmarks."""

    call: list[str]
    data: Path
    loaded: list[str]
    """Models that were put to a benchmark, in order."""
    asked: Counter[str]


@pytest.fixture
def benched(pair: tuple[Path, Path], tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Benched]:
    """Source solves all, the target nothing, a trained one as many problems as its seed says."""
    data = tmp_path / "data"
    for task in ("gsm8k", "mmlu"):
        (data / task).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in ROWS[task])
        (data / task / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    copies = []
    for folder in pair:
        copies.append(tmp_path / folder.name)
        shutil.copytree(folder, copies[-1])
        settings = json.loads((copies[-1] / "config.json").read_text(encoding="utf-8"))
        settings["max_position_embeddings"] = 2048
        (copies[-1] / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    runs.model = copies[1]
    loaded: list[str] = []
    asked: Counter[str] = Counter()

    def make(self: Any) -> LM:
        place = Path(self.config.model.path)
        name = place.parent.name if place.name == "model" else place.name
        loaded.append(name)
        return Solver({"source": 3, "target": 0}.get(name, int(name[-1]) if name[-1].isdigit() else 0), asked)

    monkeypatch.setattr(evaluation._Runner, "_make", make)
    models = [f"source.path={copies[0]}", f"target.path={copies[1]}"]
    yield Benched([*models, "--data", str(data)], data, loaded, asked)


def test_benchmarks_enter_the_table(tmp_path: Path, runs: Runs, benched: Benched) -> None:
    call = [*benched.call, "--methods", "semalign,sft,frame_parseval", "--seeds", "2", "--tasks"]
    assert compared(tmp_path, *call, "gsm8k") == 0
    found = comparison(tmp_path)
    assert tuple(found.metrics) == (*METRICS, "gsm8k")
    metric, figure = found.metrics["gsm8k"], found.methods["semalign"].metrics["gsm8k"]
    assert (metric.items, metric.source.value, metric.before.value, metric.rival) == (3, 1.0, 0.0, "sft")
    assert metric.percent and not metric.lower_is_better
    assert figure.estimate == proportion([True, True, False]) and figure.gap.value == pytest.approx(2 / 3)
    assert figure.versus_rival is not None and figure.versus_rival.method == "mcnemar"
    assert "gsm8k ↑" in table((tmp_path / "out" / "comparison.md").read_text(encoding="utf-8"))[0]
    assert benched.loaded == ["source", "target", "semalign_seed-2", "sft_seed-2"], "what is untrained before the runs"
    items = read_evaluation(tmp_path / "out" / "runs" / "sft_seed-2" / "evaluation").items["gsm8k"]
    assert [item.correct for item in items] == [True, True, False]

    first, loaded = written(tmp_path), list(benched.loaded)
    assert compared(tmp_path, *call, "gsm8k") == 0
    assert benched.loaded == loaded and written(tmp_path) == first, "evaluated once"
    # The folder takes further benchmarks, and tables have those that were asked for.
    assert compared(tmp_path, *call, "gsm8k, mmlu") == 0
    assert tuple(comparison(tmp_path).metrics) == (*METRICS, "gsm8k", "mmlu")
    loaded = list(benched.loaded)
    assert compared(tmp_path, *call, "gsm8k") == 0
    assert benched.loaded == loaded and written(tmp_path) == first
    assert compared(tmp_path, *call, "mmlu", "--methods", "semalign,kd") == 0
    assert tuple(comparison(tmp_path).metrics) == (*METRICS, "mmlu") and benched.loaded[len(loaded) :] == ["kd_seed-2"]


def test_an_evaluation_is_the_same_wherever_the_command_is_given(
    tmp_path: Path, runs: Runs, benched: Benched, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [*benched.call, "--methods", "semalign", "--tasks", "gsm8k", "--limit", "2"]
    assert compared(tmp_path, *call) == 0
    loaded = list(benched.loaded)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "tiny", *call, "--quiet", "--out", "out"]) == 0
    assert benched.loaded == loaded and comparison(tmp_path).metrics["gsm8k"].items == 2


def test_other_documents_are_evaluated_anew_and_trained_models_stay(
    tmp_path: Path, runs: Runs, benched: Benched
) -> None:
    call = [*benched.call, "--methods", "semalign", "--tasks", "gsm8k"]
    assert compared(tmp_path, *call, "--limit", "1") == 0
    ran = list(runs.ran)
    for more, documents in ((["--limit", "2"], 2), (["--limit", "1"], 1), (["--limit", "2", "--plain"], 2)):
        assert compared(tmp_path, *call, *more) == 0
        assert comparison(tmp_path).metrics["gsm8k"].items == documents
    assert runs.ran == ran


@pytest.mark.parametrize("part", ["encoding", "benchmark_version", "extraction"])
def test_an_evaluation_that_was_put_differently_is_made_anew(
    part: str, tmp_path: Path, runs: Runs, benched: Benched
) -> None:
    call = [*benched.call, "--methods", "semalign", "--tasks", "gsm8k"]
    assert compared(tmp_path, *call) == 0
    file = tmp_path / "out" / "evaluation-source" / "evaluation.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    before = json.loads(json.dumps(whole))
    before["benchmarks"]["gsm8k"]["protocol"][part] = "otherwise" if part == "extraction" else 0
    file.write_text(json.dumps(before), encoding="utf-8")
    assert compared(tmp_path, *call) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["benchmarks"] == whole["benchmarks"]


def test_an_evaluation_of_the_users_own_is_used_or_left_alone(
    tmp_path: Path, runs: Runs, benched: Benched, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*benched.call, "--methods", "semalign", "--tasks"]
    assert compared(tmp_path, *call, "gsm8k", "--limit", "1") == 0
    (file,) = (tmp_path / "out" / "runs").glob("semalign_seed-*/evaluation/evaluation.json")
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["config"]["gold"] = True
    file.write_text(json.dumps(tree), encoding="utf-8")
    before, loaded = file.read_bytes(), list(benched.loaded)
    assert compared(tmp_path, *call, "gsm8k", "--limit", "1") == 0
    assert benched.loaded == loaded and file.read_bytes() == before
    for more in (["gsm8k", "--limit", "2"], ["gsm8k,mmlu", "--limit", "1"]):
        assert compared(tmp_path, *call, *more) == 2
        said = capsys.readouterr().err
        assert f"{file.parent} holds an evaluation that a comparison does not make" in said
        assert file.read_bytes() == before


def test_benchmarks_that_cannot_be_had_cost_no_training(
    tmp_path: Path, runs: Runs, benched: Benched, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*benched.call[:2], "--methods", "semalign", "--tasks", "gsm8k"]
    assert "none" in refused(tmp_path, capsys, *call, "--data", str(tmp_path / "none"))
    assert not runs.ran
    call = [*benched.call, "--methods", "semalign", "--tasks", "gsm8k"]
    assert compared(tmp_path, *call) == 0
    capsys.readouterr()
    text = "".join(json.dumps({**row, "answer": "#### 1"}) + "\n" for row in ROWS["gsm8k"])
    (benched.data / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert compared(tmp_path, *call[:-3], "semalign,sft", "--tasks", "gsm8k") == 2
    assert "gsm8k was put differently to a run of sft" in capsys.readouterr().err


def test_runs_that_train(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        for name in todo:
            ran.append(name)
            with contextlib.suppress(SemalignError):
                submit.CellRun(str(folder))(name)

    monkeypatch.setattr(submit, "_run_here", run_here)
    call = [*overrides, "--methods", "sft,semalign.deep,semalign", "semalign.deep:method.layers=[9]"]
    assert compared(tmp_path, *call) == 2
    assert ran == ["sft_seed-0", "semalign.deep_seed-0", "semalign_seed-0"]
    found, printed = comparison(tmp_path), capsys.readouterr().out
    assert "- semalign.deep_seed-0: layers are (9,), expected ascending numbers from 1 to 3" in printed
    semalign, sft = (found.methods[name] for name in ("semalign", "sft"))
    assert sft.source_seconds == sft.stored_bytes == 0 < semalign.stored_bytes
    for name in ("semalign", "sft"):
        (result,) = results(tmp_path, name, [0])
        figures = found.methods[name].metrics
        assert [figures[metric].estimate.value for metric in METRICS] == pytest.approx(
            [result.after.kl, result.after.answer_nll, result.after.agreement, result.after.accuracy]
        )
        assert found.metrics["KL"].before.value == pytest.approx(result.before.kl)
        assert found.metrics["KL"].source.value == 0 < found.metrics["answer NLL"].source.value
