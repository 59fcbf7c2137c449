"""The table of families lists what the installed transformers has, and its checks find right and refused families."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from semalign_geometry.base import SemalignError
from semalign_harness.models import opening as models
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = Path(__file__).parents[2] / "harness/families"
TABLE = FAMILIES.parent / "FAMILIES.md"
USABLE = {"NLL, KL": "✓", "replay": "✓", "reload": "✓", "generation": "✓ in batches"}


@pytest.fixture
def checks(builder: ModuleType) -> Any:
    return importlib.import_module("family_checks")


@pytest.mark.parametrize("family", ["llama", "mamba", "qwen3_5_text"])
def test_usable_families_pass_every_check(family: str, checks: Any) -> None:
    assert checks.check_family(family) == USABLE


def test_a_refused_family_says_why(checks: Any) -> None:
    found = checks.check_family("bloom")
    assert found.keys() == {"refused"} and "BloomBlock returns a tuple" in found["refused"]


def test_a_family_whose_sizes_cannot_be_told_is_not_usable(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run estimates its memory, and no evaluation its batches."""

    def unable(*given: object) -> None:
        raise SemalignError("no sizes")

    monkeypatch.setattr(models, "shape_of_view", unable)
    assert checks.check_family("llama") == {"refused": "llama: no sizes"}
    monkeypatch.undo()
    monkeypatch.setattr(checks, "row_bytes", lambda config, tokens, all_logits: config.no_such_size)
    assert checks.check_family("llama")["refused"].startswith("TRACEBACK AttributeError: ")


def test_a_check_finds_another_result(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.measure

    def a_little_more(*arguments: Any, **settings: Any) -> Any:
        found = real(*arguments, **settings)
        more = found.metrics.model_copy(update={"answer_nll": found.metrics.answer_nll * 1.01})
        return found._replace(metrics=more)

    monkeypatch.setattr(checks, "measure", a_little_more)
    assert checks.check_family("llama")["NLL, KL"].startswith("WRONG NLL is ")


def test_the_table_lists_every_family_of_the_installed_transformers(builder: ModuleType) -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `")]
    assert sorted(rows) == builder.families()
    assert f"{len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} model types" in text
    assert "TRACEBACK" not in text and "WRONG" not in text


def test_unknown_families_are_named() -> None:
    run = subprocess.run([sys.executable, str(FAMILIES), "lama"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "unknown family 'lama': known are afmoe" in run.stderr
