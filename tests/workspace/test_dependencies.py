"""Each project declares exactly what it imports, and imports only what stands to its left."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .projects import PROJECTS, ROOT, Project

# Import names that differ from the distribution's name.
IMPORT_NAMES = {"pyyaml": "yaml"}

# Declared without an import, and why.
NOT_IMPORTED = {
    ("semalign-geometry", "numpy"): "safetensors needs it to write tensors",
    ("semalign-harness", "bitsandbytes"): "transformers needs it to load a model in 4 bits",
    ("semalign-harness", "gguf"): "transformers needs it to load a GGUF file",
    ("semalign-harness", "tensorboard"): "torch needs it to write event files",
    ("semalign-harness", "vllm"): "lm-eval needs it for its backend of that name",
}

# Declared without a pin, and why.
NOT_CONSTRAINED = {
    "trackio": "no check installs it: it asks for an older pillow than the pin",
    "vllm": "no check installs it: it needs a GPU, and each release asks for one release of torch",
    "wandb": "no check installs it",
}

# Slow to import. Importing a project may load only those that its row names.
HEAVY = {"accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "peft", "transformers"}
MAY_LOAD = {
    "semalign_geometry": set(),
    "semalign_attribution": {"accelerate", "transformers"},
    "semalign_align": {"accelerate", "transformers"},
    "semalign_train": {"accelerate", "transformers"},
    "semalign_harness": {"accelerate", "transformers"},
}

each_project = pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)


def import_name(distribution: str) -> str:
    return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def pyproject(project: Project) -> Path:
    return project.folder.relative_to(ROOT) / "pyproject.toml"


@each_project
def test_every_import_is_declared(project: Project) -> None:
    declared = {import_name(name) for name in project.requirements}
    for module, place in project.imports.items():
        if module not in sys.stdlib_module_names and module not in declared | {project.module}:
            pytest.fail(
                f"{project.name} imports {module} ({place}) without declaring it: add its distribution to "
                f"{pyproject(project)}, and to IMPORT_NAMES in this test if the two names differ"
            )


@each_project
def test_every_dependency_is_imported(project: Project) -> None:
    for name in project.requirements:
        if import_name(name) not in project.imports and (project.name, name) not in NOT_IMPORTED:
            pytest.fail(
                f"{project.name} declares {name} and never imports {import_name(name)}: remove it from "
                f"{pyproject(project)}, or give the reason in NOT_IMPORTED in this test"
            )


def test_exceptions_are_still_needed() -> None:
    projects = {project.name: project for project in PROJECTS}
    for owner, name in NOT_IMPORTED:
        declared = name in projects[owner].requirements
        if not declared or import_name(name) in projects[owner].imports:
            fact = "now imports it" if declared else "does not declare it"
            pytest.fail(f"NOT_IMPORTED excuses {name} in {owner}, which {fact}: remove the entry")


@each_project
def test_arrows_point_left(project: Project) -> None:
    allowed = {p.module for p in PROJECTS[: PROJECTS.index(project) + 1]}
    for module, place in project.imports.items():
        if module.startswith("semalign_") and module not in allowed:
            pytest.fail(f"{project.name} imports {module} ({place}), which is to its right: move the code")


@each_project
def test_sibling_pins_are_exact(project: Project) -> None:
    for name, requirement in project.requirements.items():
        if name.startswith("semalign-") and str(requirement.specifier) != f"=={project.table['version']}":
            pytest.fail(f"{project.name} requires {requirement}: pin {name}=={project.table['version']}")


@each_project
def test_every_dependency_is_constrained(project: Project) -> None:
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in map(Requirement, lines)}
    for name, requirement in project.requirements.items():
        if name.startswith("semalign-") or name in NOT_CONSTRAINED:
            continue
        if name not in pins or not requirement.specifier.contains(pins[name]):
            pytest.fail(f"{project.name} requires {requirement}: pin such a version in .ci/constraints.txt")


@each_project
def test_import_is_light(project: Project) -> None:
    script = f"import sys, {project.module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = HEAVY & set(run.stdout.split()) - MAY_LOAD[project.module]
    assert not loaded, f"importing {project.module} loads {sorted(loaded)}: import them where they are used"
