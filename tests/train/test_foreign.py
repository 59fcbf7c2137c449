"""Layer objectives that an installed package brings: configured, trained, told apart, and reported like our own."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field
from semalign_align import (
    AnswerNLL,
    Cosine,
    Fisher,
    LabelCosine,
    OutputKL,
    Relation,
    Step,
    Supervision,
    check_objective,
)
from semalign_geometry.base import ComponentError, SemalignError, Settings
from semalign_train import KNOWN_OBJECTIVES, FrontierConfig, FrontierTrainer, TransferReport
from torch import Tensor

from ..align.chain import target_model
from ..components import bring

GROUP = "semalign.objectives"


class Stretched(Settings):
    """A multiple of the squared distance."""

    kind: Literal["stretched"] = "stretched"
    factor: float = Field(1.0, gt=0)

    @property
    def name(self) -> str:
        return self.kind

    @property
    def needs_output(self) -> bool:
        return False

    def total(self, step: Step) -> Tensor:
        return self.factor * (step.residual[step.mask] - step.reference[step.mask]).square().sum()

    def count(self, counts: Tensor) -> int:
        return int(counts.sum())


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return bring(monkeypatch, {GROUP: [("stretched", Stretched)]})


def config(**objective: Any) -> FrontierConfig:
    settings = {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 3e-3}
    return FrontierConfig.parse({**settings, "objective": {"kind": "stretched", **objective}})


def test_a_foreign_objective_trains_and_is_reported(top: Supervision, tmp_path: Path) -> None:
    target, ours = target_model(), target_model()
    report = FrontierTrainer(target, top, config(factor=2.0)).fit()
    assert {"stretched", "output"} == set(report.stages[0].last_losses)
    assert TransferReport.read(report.write(tmp_path / "report.json")) == report
    assert report.model_dump(mode="json")["config"]["objective"] == {"kind": "stretched", "factor": 2.0}
    FrontierTrainer(ours, top, config().model_copy(update={"objective": Stretched(factor=2.0)})).fit()
    for one, other in zip(target.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_reports_without_their_package_say_what_is_missing(
    top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FrontierTrainer(target_model(), top, config()).fit().write(tmp_path / "report.json")
    bring(monkeypatch, {})
    words = "unknown objective 'stretched': choose one of relation, cosine, fisher, or install the package"
    with pytest.raises(SemalignError, match=words):
        TransferReport.read(path)


def test_mistakes_in_foreign_settings_name_the_key() -> None:
    with pytest.raises(SemalignError, match=r"^input: unknown key 'objective\.factr': did you mean 'factor'\?$"):
        config(factr=1)
    with pytest.raises(SemalignError, match=r"^input: 'objective\.factor' is -1: input should be greater than 0$"):
        config(factor=-1)
    report = {"config": {"objective": {"kind": "stretched", "factr": 1}}, "stages": []}
    with pytest.raises(SemalignError, match=r"unknown key 'config\.objective\.factr'"):
        TransferReport.parse({**report, "supervised_tokens": 0, "seconds": 0})
    with pytest.raises(SemalignError, match="unknown objective 'stretchd': choose one of .*, stretched"):
        config(kind="stretchd")


def test_foreign_settings_and_versions_tell_trainings_apart(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(settings: FrontierConfig) -> str:
        return FrontierTrainer(target_model(), top, settings)._fingerprint()

    first, other = fingerprint(config()), fingerprint(config(factor=2.0))
    assert first == fingerprint(config()) and first != other
    bring(monkeypatch, {GROUP: [("stretched", Stretched)]}, version="1.6")
    assert first != fingerprint(config())
    whole = config().model_copy(update={"objective": Relation()})
    bring(monkeypatch, {})
    assert fingerprint(whole) not in (first, other)


def test_our_objectives_need_no_look_at_packages(asked: list[str], top: Supervision) -> None:
    for kind in KNOWN_OBJECTIVES.built_in:
        FrontierTrainer(target_model(), top, config(kind=kind))._fingerprint()
    assert asked == []


def test_an_edited_objective_does_not_resume(top: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same settings and version, given in a configuration or in Python."""
    text = inspect.getsource(Stretched)
    head = "from typing import Literal\nfrom pydantic import Field\nfrom semalign_align import Step\n"
    head += "from semalign_geometry import Settings\nfrom torch import Tensor\n"
    file = tmp_path / "written_objective.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(text: str) -> Any:
        file.write_text(head + text, encoding="utf-8")
        sys.modules.pop("written_objective", None)
        importlib.invalidate_caches()
        found = importlib.import_module("written_objective").Stretched
        bring(monkeypatch, {GROUP: [("stretched", found)]})
        return found

    for place in ("configured", "given"):

        def fit(found: Any, place: str = place) -> None:
            own = {"objective": found()} if place == "given" else {}
            FrontierTrainer(target_model(), top, config(), checkpoints=tmp_path / place, **own).fit()

        fit(written(text))
        fit(written(text))
        edited = written(text.replace("square()", "abs()"))
        words = "the code of the objective stretched changed since the training in .* began: restore it, choose another"
        with pytest.raises(SemalignError, match=words):
            fit(edited)
        fit(written(text))
    sys.modules.pop("written_objective")


WRONG_TOTALS: dict[str, tuple[Any, str]] = {
    "none": (lambda step: None, "None from total"),
    "float": (lambda step: 1.5, "1.5 of type float from total"),
    "vector": (lambda step: step.residual[step.mask].square().sum(-1), r"a tensor of shape \(\d+,\) from total"),
    "detached": (lambda step: step.residual.detach().sum(), ".* of type float without a gradient from total"),
    "tuple": (lambda step: (step.residual.sum(), 3), r"\(tensor\(.* of type tuple from total"),
}
WRONG_COUNTS: dict[str, tuple[Any, str]] = {
    "float": (lambda counts: float(counts.sum()), ".* of type float from count"),
    "vector": (lambda counts: counts, r"tensor\(.* of type Tensor from count"),
    "none": (lambda counts: None, "None from count"),
    "negative": (lambda counts: -1, "-1 of type int from count"),
}


@pytest.mark.parametrize("wrong", WRONG_TOTALS)
def test_a_total_that_is_no_number_is_one_sentence(
    wrong: str, top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = WRONG_TOTALS[wrong]
    monkeypatch.setattr(Stretched, "total", lambda self, step: made(step))
    words = f"^the objective stretched returned {told}: expected one number, the sum over the units of the micro-batch"
    with pytest.raises(ComponentError, match=words):
        FrontierTrainer(target_model(), top, config()).fit()
    with pytest.raises(ComponentError, match=words):
        check_objective(Stretched(), width=6, reference_width=6)


@pytest.mark.parametrize("wrong", WRONG_COUNTS)
def test_a_count_that_is_no_whole_number_is_one_sentence(
    wrong: str, top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = WRONG_COUNTS[wrong]
    monkeypatch.setattr(Stretched, "count", lambda self, counts: made(counts))
    words = f"^the objective stretched returned {told}: expected the number of units as an int of 0 or more"
    with pytest.raises(ComponentError, match=words):
        FrontierTrainer(target_model(), top, config())
    with pytest.raises(ComponentError, match=words):
        check_objective(Stretched(), width=6, reference_width=6)


@pytest.mark.parametrize("made", [lambda counts: counts.sum(), lambda counts: int(counts.sum())])
def test_whole_numbers_of_other_types_are_counts(made: Any, top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stretched, "count", lambda self, counts: made(counts))
    FrontierTrainer(target_model(), top, config()).fit()


def test_made_up_examples_fit_our_objectives_and_their_errors_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for objective in (Relation(), Cosine(), Fisher(), OutputKL(), AnswerNLL(), LabelCosine(), Stretched()):
        check_objective(objective, width=6, reference_width=6)
    check_objective(Cosine(), width=6, reference_width=7)  # which refuses the widths
    check_objective(Stretched(), width=6, reference_width=7)  # which raises an error of torch

    def refuse(self: Stretched, step: Step) -> Tensor:
        raise SemalignError(f"{step.mask.shape[1]} tokens, expected rows of 8 or more")

    monkeypatch.setattr(Stretched, "total", refuse)
    check_objective(Stretched(), width=6, reference_width=6)
