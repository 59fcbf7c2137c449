"""Components that another package brings: used from YAML, told apart by their settings and their package's version."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, RunResult, load_experiment
from semalign_harness.benchmarks import find_benchmark
from semalign_harness.evaluation import EvaluationConfig, protocol_of
from semalign_harness.grid.folder import check_folder, claimed_matrix
from semalign_harness.grid.matrix import read_matrix
from semalign_harness.loading import pair_names
from semalign_harness.results.fidelity import RunFidelity
from semalign_harness.results.run import Environment
from semalign_harness.run.environment import code_of
from semalign_harness.run.inputs import read_inputs
from semalign_harness.run.phase_cache import phase_key
from semalign_harness.run.pipeline import run_experiment
from semalign_harness.run.run_folder import differences
from semalign_harness.util.console import Console

from ..components import bring
from .external.semalign_example import BETWEEN, PARITY, Deepest, Gains, Huber, RelativeSize

EXTERNAL = Path(__file__).parent / "external"
COMPONENTS: dict[str, list[tuple[str, Any]]] = {
    "semalign.scorers": [("relative_size", RelativeSize)],
    "semalign.pairings": [("deepest", Deepest)],
    "semalign.frames": [("between", BETWEEN)],
    "semalign.objectives": [("huber", Huber)],
    "semalign.methods": [("gains", Gains)],
    "semalign.tasks": [("parity", PARITY)],
}
TREE = {
    "scorer": {"kind": "relative_size", "power": 2.0},
    "pairing": {"kind": "deepest", "skip": 1},
    "transport": {"frame": "between"},
    "method": {"objective": {"kind": "huber", "delta": 0.5}},
}
CHOSEN = ["scorer.kind=relative_size", "pairing.kind=deepest", "transport.frame=between"]


def installed(monkeypatch: pytest.MonkeyPatch, version: str = "1.5") -> list[str]:
    return bring(monkeypatch, COMPONENTS, version=version)


def test_experiments_with_foreign_components_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch)
    file = tmp_path / "foreign.yaml"
    file.write_text(yaml.safe_dump(TREE), encoding="utf-8")
    experiment = load_experiment("tiny", configs=[file])
    assert experiment.scorer == RelativeSize(power=2.0) and experiment.pairing == Deepest(skip=1)
    assert experiment.method.model_dump()["objective"] == {"kind": "huber", "delta": 0.5}
    assert load_experiment("tiny", overrides=["method={kind: gains, steps: 3}"]).method == Gains(steps=3)
    assert Experiment.read(experiment.write(tmp_path / "experiment.json")) == experiment
    assert load_experiment("tiny", overrides=["pairing.kind=monotone"], configs=[file]).pairing.kind == "monotone"
    other = load_experiment("tiny", configs=[file], overrides=["scorer.power=3", "method.objective.delta=2"])
    assert differences(experiment, other) == [
        "scorer.power is 2.0 there, 3.0 here",
        "method.objective.delta is 0.5 there, 2.0 here",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scorer.kind=relative_size", "scorer.powr=1"], "unknown key 'scorer.powr': did you mean 'power'?"),
        (["pairing.kind=deepest", "pairing.skip=-1"], "'pairing.skip' is -1: input should be greater than or equal to"),
        (["method.objective={kind: huber, dlta: 1}"], "unknown key 'method.objective.dlta': did you mean 'delta'?"),
        (["method={kind: gains, stps: 1}"], "unknown key 'method.stps': did you mean 'steps'?"),
        (
            ["scorer.kind=relative"],
            "unknown scorer 'relative': choose one of gradient_activation, ablation, similarity, ",
        ),
        (["pairing.kind=deep"], "similarity, manual, random, deepest, or install the package that adds it"),
        (["transport.frame=betwen"], "unknown frame 'betwen': choose one of cosine, dual, parseval, none, between, or"),
        (["method.kind=gain"], "unknown method 'gain': choose one of semalign, "),
    ],
)
def test_mistakes_are_one_sentence(overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(SemalignError) as caught:
        load_experiment("tiny", overrides=overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_experiments_of_our_own_need_no_look_at_packages(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    asked = installed(monkeypatch)
    for name in pair_names():
        load_experiment(name)
    EvaluationConfig.parse({"model": {"path": "x"}})
    key(overrides)
    assert asked == []


def key(overrides: list[str], *more: str) -> str:
    experiment = load_experiment("tiny", overrides=[*overrides, *more])
    return phase_key(experiment, read_inputs(experiment, Console(quiet=True)), torch.device("cpu"))


def test_foreign_settings_and_versions_decide_the_key(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    keys = [
        key(overrides, *CHOSEN),
        key(overrides, *CHOSEN, "scorer.power=2"),
        key(overrides, *CHOSEN, "pairing.skip=1"),
    ]
    assert keys[0] == key(overrides, *CHOSEN)
    assert keys[0] == key(overrides, *CHOSEN, "method.objective.kind=huber"), "training decides nothing"
    alone = [key(overrides, each) for each in CHOSEN]
    installed(monkeypatch, version="1.6")
    newer = [key(overrides, each) for each in CHOSEN]
    assert len({*keys, *alone, *newer, key(overrides)}) == 10


def test_runs_begun_with_another_version_are_told_so(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    experiment = load_experiment("tiny", overrides=[*overrides, "scorer.kind=relative_size"])
    with monkeypatch.context() as patch:
        patch.setattr("semalign_harness.run.pipeline.measured", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, tmp_path / "run")
    installed(monkeypatch, version="1.6")
    words = r"the package extras changed from 1\.5 to 1\.6 \(pip install extras==1\.5 restores it\), since the run in "
    with pytest.raises(SemalignError, match=words):
        run_experiment(experiment, tmp_path / "run")


class Edited:
    """A copy of the example package as one module, whose text changes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.patch = folder / "edited_example.py", monkeypatch
        self.text = (EXTERNAL / "semalign_example.py").read_text(encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))

    def install(self, old: str = "", new: str = "") -> None:
        """Write it, with one edit, and import it as an installed package would be."""
        assert old in self.text
        self.file.write_text(self.text.replace(old, new) if old else self.text, encoding="utf-8")
        sys.modules.pop("edited_example", None)
        importlib.invalidate_caches()
        module = importlib.import_module("edited_example")
        things = {group: [(name, getattr(module, NAMED[name])) for name, _ in of] for group, of in COMPONENTS.items()}
        bring(self.patch, things, module="edited_example")


NAMED = {"relative_size": "RelativeSize", "deepest": "Deepest", "between": "BETWEEN", "huber": "Huber"}
NAMED |= {"gains": "Gains", "parity": "PARITY"}


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edited]:
    yield Edited(tmp_path, monkeypatch)
    sys.modules.pop("edited_example", None)


@pytest.mark.parametrize("chosen", CHOSEN)
def test_the_code_of_what_supervises_decides_the_key(chosen: str, overrides: list[str], edited: Edited) -> None:
    """An edit under the same settings and the same version."""
    edited.install()
    first, none = key(overrides, chosen), key(overrides)
    edited.install()
    assert key(overrides, chosen) == first
    edited.install("from typing", "# an edit\nfrom typing")
    assert key(overrides, chosen) != first and key(overrides) == none


def test_runs_of_another_code_are_refused_before_anything_is_read(
    overrides: list[str], tmp_path: Path, edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited.install()
    words = "the code of the {} changed since the run in .* began: restore it, or choose another folder with --out"
    for sort, chosen in (
        ("objective huber", "method.objective.kind=huber"),
        ("method gains", "method.kind=gains"),
        ("scorer relative_size", "scorer.kind=relative_size"),
    ):
        folder = tmp_path / chosen
        edited.install()
        experiment = load_experiment("tiny", overrides=[*overrides, chosen])
        with monkeypatch.context() as patch:
            patch.setattr("semalign_harness.run.pipeline.measured", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_experiment(experiment, folder)
        for finished in (False, True):
            if finished:
                (folder / "result.json").write_text("{}", encoding="utf-8")
            edited.install("from typing", "# an edit\nfrom typing")
            with monkeypatch.context() as patch:
                patch.setattr("semalign_harness.run.pipeline.read_inputs", None)
                with pytest.raises(SemalignError, match=words.format(sort)):
                    run_experiment(load_experiment("tiny", overrides=[*overrides, chosen]), folder)


def test_a_matrix_does_not_mix_two_codes(overrides: list[str], tmp_path: Path, edited: Edited) -> None:
    edited.install()
    call = {"over": ["train.seed=0,1"], "overrides": [*overrides, "method.objective.kind=huber"]}
    matrix = read_matrix("tiny", **call)
    with claimed_matrix(tmp_path / "matrix", matrix):
        pass
    cell = matrix.cells[0]
    folder = tmp_path / "matrix" / cell.name
    cell.experiment.write(folder / "experiment.json")
    environment = {"packages": {}, "python": "", "platform": "", "device": "cpu", "dtypes": [], "threads": 1}
    environment |= {"data_sha256": {}, "models": [], "supervision_key": "", "code": code_of(cell.experiment)}
    Environment.parse(environment).write(folder / "environment.json")
    check_folder(tmp_path / "matrix", matrix)
    edited.install("from typing", "# an edit\nfrom typing")
    with pytest.raises(SemalignError, match="the code of the objective huber changed since the run in .*seed-0"):
        check_folder(tmp_path / "matrix", read_matrix("tiny", **call))


def test_evaluations_by_another_code_do_not_compare(edited: Edited) -> None:
    def protocol() -> Any:
        return protocol_of(find_benchmark("parity"), chat=False, options={}, date=None)

    edited.install()
    first = protocol()
    edited.install()
    assert protocol() == first
    edited.install("word.strip", "word.lstrip")
    assert protocol() != first
    assert protocol_of(find_benchmark("gsm8k"), chat=False, options={}, date=None).code_sha256 is None


def test_components_that_return_something_else_leave_no_run(
    overrides: list[str], tmp_path: Path, edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An objective is refused before the source works for it; a method when it returns."""
    edited.install("losses.mean(-1).sum()", "losses.mean(-1)")
    objective = load_experiment("tiny", overrides=[*overrides, "method.objective.kind=huber"])
    with monkeypatch.context() as patch:
        patch.setattr("semalign_harness.run.pipeline.source_stores", None)
        with pytest.raises(SemalignError, match=r"the objective huber returned a tensor of shape \(8,\) from total"):
            run_experiment(objective, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr("semalign_align.check_objective", lambda *given, **more: None)
        with pytest.raises(SemalignError, match=r"the objective huber returned a tensor of shape \(\d+,\) from total"):
            run_experiment(objective, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    edited.install("return MethodReport.of(", "MethodReport.of(")
    method = load_experiment("tiny", overrides=[*overrides, "method.kind=gains"])
    with pytest.raises(SemalignError, match="^the method gains returned None from run: expected a MethodReport$"):
        run_experiment(method, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_readings_that_are_not_one_for_each_document_are_one_sentence(edited: Edited) -> None:
    documents = [{"number": 1, "even": False}, {"number": 2, "even": True}]

    def extract() -> Any:
        task = find_benchmark("parity").task(documents, chat=False)
        return task["filter_list"][0]["filter"][0]["filter_fn"]([["odd"], ["even"]], documents)

    edited.install()
    assert [reading["correct"] for reading in extract()] == [True, True]
    for old, new, words in (
        ("return readings", "return readings[:1]", "returned 1 readings from read: expected one for each of 2"),
        ("return readings", "return None", "returned None from read: expected one for each of 2"),
        ('"correct": said', '"right": said', "returned the reading .*: expected the keys correct, extracted"),
    ):
        edited.install(old, new)
        with pytest.raises(SemalignError, match=f"^the benchmark parity {words}"):
            extract()


def test_a_run_by_a_foreign_frame_measures_it_beside_ours(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    experiment = load_experiment("tiny", overrides=[*overrides, "transport.frame=between"])
    monkeypatch.setattr("semalign_harness.run.pipeline.measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path / "run")
    found = RunFidelity.read(tmp_path / "run" / "fidelity.json")
    assert [report.frame for report in (found, *found.others)] == ["between", "cosine", "dual", "parseval"]
    assert len({report.mean_cka_transported for report in (found, *found.others)}) == 4


def interrupted(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_benchmarks_of_installed_packages_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert find_benchmark("parity") is PARITY
    assert EvaluationConfig.parse({"model": {"path": "x"}, "tasks": ["gsm8k", "parity"]}).tasks == ("gsm8k", "parity")
    with pytest.raises(
        SemalignError, match="unknown benchmark 'party': choose one of .*, mbpp, arithmetic, parity, or"
    ):
        EvaluationConfig.parse({"model": {"path": "x"}, "tasks": ["party"]})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example package is installed into."""
    folder = tmp_path_factory.mktemp("site")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder), str(EXTERNAL)]
    subprocess.run(command, check=True, timeout=300)
    return folder


def semalign(site: Path, *arguments: str) -> None:
    """The command in a process that has the package, and nothing of these tests."""
    command = [sys.executable, "-m", "semalign_harness", *arguments]
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_installed_package_runs_from_yaml(site: Path, tmp_path: Path, overrides: list[str]) -> None:
    file = tmp_path / "foreign.yaml"
    file.write_text(yaml.safe_dump(TREE), encoding="utf-8")
    run = tmp_path / "run"
    semalign(site, "run", "tiny", "--config", str(file), *overrides, "device=cpu", "--out", str(run))
    read = {path.name: json.loads(path.read_text()) for path in run.glob("*.json")}
    assert read["attribution.json"]["scorer"] == "relative_size(2)" and min(read["attribution.json"]["mean"]) > 0
    assert read["pairing.json"]["source_layers"] == [1, 2, 3], "of 4 layers, the deepest is skipped"
    assert read["fidelity.json"]["frame"] == "between"
    assert all(stage["last_losses"]["huber"] > 0 for stage in read["transfer.json"]["stages"])
    assert {key: read["experiment.json"][key] for key in ("scorer", "pairing")} == {
        key: TREE[key] for key in ("scorer", "pairing")
    }
    assert read["environment.json"]["packages"]["semalign-example"] == "0.1.0"


@pytest.mark.slow
def test_an_installed_method_and_benchmark_run(
    site: Path, tmp_path: Path, overrides: list[str], pair: tuple[Path, Path]
) -> None:
    run = tmp_path / "run"
    chosen = ["method.kind=gains", "method.steps=2", "device=cpu"]
    semalign(site, "run", "tiny", *overrides, *chosen, "--out", str(run))
    assert RunResult.read(run / "result.json").training.method == "gains"
    rows = tmp_path / "data" / "parity" / "test.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(json.dumps({"number": n, "even": n % 2 == 0}) + "\n" for n in range(6)), encoding="utf-8")
    data = ["--data", str(rows.parent.parent), "--tasks", "parity", "device=cpu"]
    semalign(site, "evaluate", str(run / "model"), *data, "--out", str(tmp_path / "out"))
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["benchmarks"]["parity"]["documents"] == 6 and result["packages"]["semalign-example"] == "0.1.0"
    assert len((tmp_path / "out" / "items-parity.jsonl").read_text().splitlines()) == 6
