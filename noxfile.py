# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.2.9"]
# ///
"""Checks and the demo: `nox -l` lists the sessions, `nox -t check` runs every check."""

import functools
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / ".ci/constraints.txt"
WORKSPACE = nox.project.load_toml(ROOT / "pyproject.toml")
FOLDERS = {
    "geometry": ROOT / "packages/semalign-geometry",
    "attribution": ROOT / "packages/semalign-attribution",
    "align": ROOT / "packages/semalign-align",
    "train": ROOT / "packages/semalign-train",
    "harness": ROOT / "harness",
}


TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"
"""Index of torch's builds without CUDA, as torch's own installation page names it."""


def install(session: nox.Session, *requirements: str | Path, groups: tuple[str, ...] = ()) -> None:
    """Install in one pip call, so that pip finds siblings by their paths and torch by its pin."""
    grouped = nox.project.dependency_groups(WORKSPACE, *groups)
    # Bytecode is compiled at import: a session imports a small part of torch and transformers.
    options = ("--no-compile", "-c", str(CONSTRAINTS))
    is_new = not any(Path(session.virtualenv.location).glob("lib/python*/site-packages/torch"))
    if requirements and is_new:
        size, build = ("2 GB", "for CPUs") if _is_without_cuda(session) else ("up to 8 GB", "that pip finds")
        session.log(f"new environment: {size} on disk with the build of torch {build}, one to five minutes")
        if build == "for CPUs":  # alone, as this index holds no other package at its pin
            session.install(*options, "--no-deps", "--index-url", TORCH_FOR_CPU, "torch")
    session.install(*options, *map(str, requirements), *grouped)


def _is_without_cuda(session: nox.Session) -> bool:
    """Return whether torch's builds for CPUs are wanted: on Linux without an NVIDIA driver and an index of one's own.

    Elsewhere pip finds such a build by itself, and whoever has configured an index has chosen the builds.
    """
    if sys.platform != "linux" or Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return False
    configured = session.run_install("python", "-m", "pip", "config", "list", silent=True, log=False) or ""
    return not any(word in str(configured) for word in ("index", "find-links"))


def with_siblings(package: str) -> list[Path]:
    """Return the folder of a package and of the siblings it declares, theirs included."""
    folders = [FOLDERS[package]]
    for dependency in nox.project.load_toml(FOLDERS[package] / "pyproject.toml")["project"]["dependencies"]:
        if dependency.startswith("semalign-"):
            folders += with_siblings(dependency.removeprefix("semalign-").partition("==")[0])
    return sorted(set(folders))


SUITES = {
    "geometry": "the maths, with torch and without transformers",
    "attribution": "views of decoders, scores and pairings, with transformers",
    "align": "the source's supervision and the objectives",
    "train": "both trainers, with peft",
    "harness": "experiments, evaluation, sandbox and the command",
    "workspace": "what the five packages have in common, and the documents",
}


@nox.session(tags=["check"], venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all tests, one session for each package: those below."""
    for suite in SUITES:
        session.notify(f"tests({suite})")


def _tests(session: nox.Session, suite: str) -> None:
    folders = FOLDERS.values() if suite == "workspace" else with_siblings(suite)
    install(session, *folders, groups=tuple({"test", f"test-{suite}"} & WORKSPACE["dependency-groups"].keys()))
    # One worker for each processor, each with one thread: models this small gain nothing from more.
    at_once = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile")
    session.run("python", "-m", "pytest", *at_once, f"tests/{suite}", *session.posargs, env={"OMP_NUM_THREADS": "1"})


for _suite, _about in SUITES.items():
    _run = functools.partial(_tests, suite=_suite)
    _run.__doc__ = f"Test {_about}."
    nox.session(_run, name=f"tests({_suite})", default=False)


@nox.session(tags=["check"])
def lint(session: nox.Session) -> None:
    """Check style and formatting; `nox -s lint -- --fix` repairs style where it can."""
    install(session, groups=("lint",))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(tags=["check"])
def typecheck(session: nox.Session) -> None:
    """Check the types of all five packages with mypy, strictly."""
    install(session, *FOLDERS.values(), groups=("typecheck",))
    session.run("mypy", *session.posargs)


@nox.session(tags=["check"], default=False)
def wheels(session: nox.Session) -> None:
    """Build the five wheels, install them, and use them away from the sources."""
    install(session, groups=("build",))
    with tempfile.TemporaryDirectory() as dist:
        for folder in FOLDERS.values():
            session.run("python", "-m", "build", "--no-isolation", "--outdir", dist, str(folder))
        built = sorted(Path(dist).glob("*.whl"))
        for wheel in built:
            _check_contents(session, wheel)
        install(session, *built)
        with session.chdir(dist):
            session.run("python", "-m", "pip", "check")
            for package in FOLDERS:
                session.run("python", "-c", f"import semalign_{package}")
            session.run("semalign", "--help", *session.posargs)


def _check_contents(session: nox.Session, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    endings = ["/py.typed", "/licenses/LICENSE"]
    if wheel.name.startswith("semalign_harness"):
        endings.append(".yaml")
    for ending in endings:
        if not any(name.endswith(ending) for name in names):
            session.error(f"{wheel.name} holds no *{ending}")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Write the API pages of the five packages into build/docs, from their docstrings; a warning is an error."""
    install(session, *FOLDERS.values(), groups=("docs",))
    session.run("python", "-W", "error", ".ci/docs.py", *(session.posargs or ["build/docs"]))


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Run the smallest pair of models through the command line, on the CPU: two minutes, nothing downloaded."""
    install(session, *with_siblings("harness"))
    session.run("semalign", "run", "tiny", *session.posargs)
    session.log(f"the command for your own runs: source {os.path.relpath(session.bin)}/activate; semalign --help")


@nox.session(name="eval", tags=["eval"], default=False)
def evaluation(session: nox.Session) -> None:
    """Measure a model on all benchmarks: `nox -s eval -- MODEL`, or on some: `nox -s eval -- MODEL --tasks gsm8k`."""
    install(session, *with_siblings("harness"))
    session.run("semalign", "evaluate", *session.posargs)


EVERY_METHOD = ("tiny", "--methods", "all", "--seeds", "0,1,2", "--jobs", "2", "data.train_rows=512", "train.passes=3")
# Each with its own learning rate: harness/LOG.md.
RATES = (
    "train.learning_rate=1e-3",
    *(f"{method}:train.learning_rate=3e-3" for method in ("sft_full", "kd_full", "pissa")),
    *(f"{method}:train.learning_rate=1e-2" for method in ("sft", "kd", "hidden")),
)


@nox.session(default=False)
def compare(session: nox.Session) -> None:
    """Methods side by side: every method on the tiny pair, or `nox -s compare -- EXPERIMENT --methods …`."""
    install(session, *with_siblings("harness"))
    session.run("semalign", "compare", *(session.posargs or (*EVERY_METHOD, *RATES)))


@nox.session(tags=["bench"], default=False)
def bench(session: nox.Session) -> None:
    """Measure time and memory beside the peers: `nox -s bench -- --rows basis,kl`; `-- --list` for the rows."""
    install(session, *with_siblings("harness"), groups=("bench",))
    session.run("python", "harness/bench", *session.posargs)


if __name__ == "__main__":
    nox.main()
