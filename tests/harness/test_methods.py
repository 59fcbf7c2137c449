"""The laws of the methods: the same tokens for each, nothing changed but the target, and what they save is what they
trained."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError, Settings, sha256_of
from semalign_harness import Experiment, RunResult
from semalign_harness.cli.main import main
from semalign_harness.loading import load_experiment
from semalign_harness.methods import (
    JointMethod,
    LayerUse,
    Method,
    MethodContext,
    MethodReport,
    find_methods,
    known_kinds,
    known_methods,
    parse_method,
    settings_of,
)
from semalign_harness.run.pipeline import run_experiment
from semalign_harness.run.run_folder import steps_of
from semalign_harness.util.settings import merged
from semalign_train import JointLoss, JointStep
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..components import bring

TRAIN_ALIKE = ("sft", "sft_full", "kd", "kd_full", "hidden", "gold", "pissa", "no_geometry", "semalign_fisher")
"""Methods that see the tokens that SemAlign sees."""


def experiment_of(overrides: list[str], name: str, *more: str) -> Experiment:
    """The tiny experiment with the settings of a method."""
    tree = load_experiment("tiny", overrides=[*overrides, *more]).model_dump(mode="json")
    return Experiment.parse(merged(tree, known_methods()[name]), origin=name)


@pytest.fixture
def run(tmp_path: Path, overrides: list[str]) -> Iterator[Any]:
    def runner(name: str, *more: str) -> RunResult:
        return run_experiment(experiment_of(overrides, name, *more), tmp_path / name)

    yield runner


def weights(folder: str | Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


@pytest.mark.parametrize("name", [name for name in known_methods() if name != "alm" and not name.startswith("frame_")])
def test_every_method_changes_the_target_alone_and_saves_it(
    name: str, run: Any, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    source, target = map(hashes, pair)
    result = run(name)
    assert (hashes(pair[0]), hashes(pair[1])) == (source, target)
    before, after = weights(pair[1]), weights(tmp_path / name / "model")
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert changed
    assert all(torch.isfinite(value).all() for value in after.values())
    assert result.training.steps > 0 and result.training.trained_parameters > 0
    assert RunResult.read(tmp_path / name / "result.json") == result


def test_methods_see_the_same_tokens_at_the_same_steps(run: Any) -> None:
    reference = run("semalign").training
    for name in TRAIN_ALIKE:
        report = run(name).training
        assert (report.steps, report.supervised_tokens) == (reference.steps, reference.supervised_tokens), name


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ({"kind": "semalign"}, 3e-5),
        ({"kind": "kd"}, 1e-4),
        ({"kind": "sft", "trainable": {"kind": "full"}}, 3e-5),
        ({"kind": "hidden"}, 1e-4),
    ],
)
def test_a_method_has_a_learning_rate_of_its_own_unless_one_is_set(
    method: dict[str, Any], rate: float, overrides: list[str], tmp_path: Path
) -> None:
    tree = load_experiment("tiny", overrides=[*overrides, "train.schedule=constant", "train.warmup=0"])
    for given in (None, 2e-4):
        whole = merged(tree.model_dump(mode="json"), {"method": method, "train": {"learning_rate": given}})
        folder = tmp_path / str(given)
        run_experiment(Experiment.parse(whole), folder)
        assert {step["learning_rate"] for step in steps_of(folder)} == {given or rate}


def test_a_mix_of_both_terms_is_their_mix(run: Any, tmp_path: Path) -> None:
    run("kd", "method.kind=kd", "method.answer=0.25")
    mixed = steps_of(tmp_path / "kd")[0]["losses"]
    run("kd_full", "method.kind=kd", "method.answer=0")
    alone = steps_of(tmp_path / "kd_full")[0]["losses"]
    assert mixed["output"] == pytest.approx(0.75 * alone["output"], rel=1e-4)
    assert mixed["answer"] > 0 and set(alone) == {"output"}


@pytest.mark.parametrize("kind", ["kd", "hidden"])
def test_methods_train_by_the_divergence_that_is_set(kind: str, overrides: list[str], tmp_path: Path) -> None:
    losses = []
    for divergence in ("forward", "reverse"):
        settings = [*overrides, f"method.kind={kind}", f"method.divergence={divergence}"]
        run_experiment(load_experiment("tiny", overrides=settings), tmp_path / divergence)
        losses.append(steps_of(tmp_path / divergence)[0]["losses"]["output"])
    assert losses[0] != losses[1]


def test_the_critical_layer_alone_trains(run: Any, tmp_path: Path) -> None:
    """For the steps of all stages."""
    report = run("semalign_v1", "train.steps=2").training
    assert report.transfer is not None
    (stage,) = report.transfer.stages
    assert report.steps == stage.steps == 6
    scores = json.loads((tmp_path / "semalign_v1" / "attribution.json").read_text())["mean"]
    assert stage.source_layer == 1 + scores.index(max(scores))
    assert set(stage.first_losses) == {"cosine", "label"}


class Circle(Settings):
    """No method."""

    kind: Literal["foreign"] = "foreign"


class Foreign(Method):
    """A method of another package."""

    kind: Literal["foreign"] = "foreign"
    """Chooses this method in a configuration."""
    factor: float = 2.0
    """Scales the first layer's output projection."""

    def run(self, context: MethodContext) -> MethodReport:
        """Scale a matrix."""
        with torch.no_grad():
            context.target.model.layers[0].mlp.down_proj.weight *= self.factor  # type: ignore[operator]
        return MethodReport(method=self.kind, trained_parameters=0, steps=0, supervised_tokens=0, seconds=0.0)


def test_methods_of_installed_packages_are_known(
    run: Any, tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(monkeypatch, {"semalign.methods": [("foreign", Foreign)]})
    assert "foreign" in known_methods()
    run("foreign", "method.kind=foreign", "method.factor=3.0")
    key = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(weights(tmp_path / "foreign" / "model")[key], 3 * weights(pair[1])[key])
    environment = json.loads((tmp_path / "foreign" / "environment.json").read_text())
    assert environment["packages"]["extras"] == "1.5"


@dataclass(frozen=True)
class SmoothedAnswers(JointLoss):
    """The answer NLL, with a share of it spread over the whole vocabulary."""

    share: float

    def terms(self, step: JointStep) -> dict[str, Tensor]:
        log_q = step.head.logits(step.hidden).log_softmax(1)
        answer = -log_q.gather(1, step.labels[:, None]).sum()
        return {"answer": (1 - self.share) * answer, "uniform": -self.share * log_q.mean(1).sum()}


class Smoothed(JointMethod):
    """A joint loss of another package, as a method: this and the loss above are all of its code."""

    kind: Literal["foreign"] = "foreign"
    """Chooses this method in a configuration."""
    share: float = 0.1
    """Share that is spread."""

    def loss(self, context: MethodContext, view: DecoderView) -> JointLoss:
        """Return the smoothed NLL."""
        return SmoothedAnswers(self.share)


def test_a_new_joint_loss_is_a_method(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, {"semalign.methods": [("foreign", Smoothed)]})
    report = run("foreign", "method.kind=foreign", "method.share=0.2").training
    assert report.method == "foreign" and report.trained_parameters > 0
    assert [set(step["losses"]) for step in steps_of(tmp_path / "foreign")] == [{"answer", "uniform"}] * 6


def test_the_use_of_the_layers_is_known() -> None:
    found: dict[str, LayerUse] = {kind: parse_method({"kind": kind}).layer_use for kind in known_kinds()}
    others = dict.fromkeys(("kd", "gold", "alm", "sft", "seeking", "laten"), "none")
    assert found == {"semalign": "transported", "hidden": "paired", **others}
    assert Foreign().layer_use == "none" and not Foreign().stored


def test_what_packages_bring_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in (dict, Settings, Circle):
        bring(monkeypatch, {"semalign.methods": [("foreign", loaded)]})
        with pytest.raises(SemalignError, match="no class of settings with kind, check, needs, run, stored, work"):
            known_kinds()
    bring(monkeypatch, {"semalign.methods": [("kd", Foreign)]})
    with pytest.raises(SemalignError, match="rename its entry point"):
        known_kinds()


def test_a_broken_package_is_in_nobody_elses_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, {"semalign.methods": [("foreign", dict)]})
    assert find_methods("semalign,sft.late") == ["semalign", "sft.late"]
    assert settings_of("sft.late") == settings_of("sft")
    with pytest.raises(SemalignError, match="no class of settings"):
        find_methods("sft,foreign")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.kind=sfd", "unknown method 'sfd': choose one of semalign, sft"),
        ("method=sft", "expected settings such as method.kind=sft"),
        ("method={kind: kd, answr: 1}", "unknown key 'method.answr': did you mean 'answer'?"),
        ("method={kind: kd, answer: 2}", "'method.answer' is 2"),
        ("method.learning_rate=1", "method.learning_rate is now train.learning_rate"),
        ("train.layers=[1]", "train.layers is now method.layers"),
        ("train.guards.rollback=1", "train.guards.rollback is now method.rollback"),
        ("method={kind: laten, warmup: 0}", "method.warmup is now train.warmup"),
    ],
)
def test_wrong_methods_are_one_sentence(
    override: str, words: str, tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tiny", *overrides, override, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
