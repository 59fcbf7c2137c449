"""Help, lists, mistakes and reports import no torch, and importing a package little of transformers."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ANSWERED = [
    *[["run", "--help"], ["compare", "--help"], ["report", "--help"], ["run", "--unknown"]],
    *[["presets"], ["models", "list"], ["store", "list"]],
    *[["run", "unknown"], ["run", "tiny", "train.unknown=1"], ["run", "tiny", "train.batch_size=-1"]],
    *[["run", "missing.yaml"], ["run", "broken.yaml"], ["run", "tiny", "--out", "taken"]],
    *[["doctor", "a", "b", "train.unknown=1"], ["evaluate", "m", "--tasks", "unknown"]],
    *[["compare", "tiny", "--methods", "unknown"], ["sweep", "tiny", "--over", "train.unknown=1,2"]],
    *[["submit", "tiny", "--over", "train.unknown=1,2"], ["report", "missing"], ["compare-evaluations", "a", "b"]],
]


def loaded(script: str, names: Sequence[str], folder: Path) -> set[str]:
    """Those of some modules that a fresh interpreter has after a script."""
    code = f"{script}\nimport sys; print(*{{*{list(names)!r}}} & sys.modules.keys(), file=open('loaded', 'w'))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return set((folder / "loaded").read_text().split())


@pytest.mark.parametrize("arguments", ANSWERED, ids=" ".join)
def test_it_is_answered_without_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    script = (
        "import contextlib\nfrom semalign_harness.cli.main import main\n"
        f"with contextlib.suppress(SystemExit):\n    assert main({arguments!r}) in (0, 2)"
    )
    assert not loaded(script, ["torch", "transformers", "datasets", "lm_eval"], tmp_path)


@pytest.mark.parametrize("package", ["geometry", "attribution", "align", "train"])
def test_settings_and_contracts_import_no_torch(package: str, tmp_path: Path) -> None:
    script = f"""
import semalign_{package} as package
from pathlib import Path
text = Path(package.__file__).with_name("__init__.pyi").read_text()
places = [line.split() for line in text.splitlines()]
for _, module, _, name, *_ in places:
    if module in ("._contracts", "._frame", "._pairing", "._scores", "._scorers", "._settings", "._records",
                  "._objectives", "._size", "._errors"):
        getattr(package, name)
"""
    assert not loaded(script, ["torch", "transformers"], tmp_path)


def test_a_view_imports_no_modelling_code_of_transformers(tmp_path: Path) -> None:
    heavy = ["transformers.modeling_utils", "transformers.generation", "transformers.loss", "torch.distributed.tensor"]
    assert not loaded("from semalign_attribution import *", heavy, tmp_path)
