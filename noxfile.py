# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.2.9"]
# ///
"""Checks and the demo: `nox -l` lists the sessions, `nox -t check` runs every check."""

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


def install(session: nox.Session, *requirements: str | Path, groups: tuple[str, ...] = ()) -> None:
    """Install in one pip call, so that pip finds siblings by their paths and torch by its pin."""
    grouped = nox.project.dependency_groups(WORKSPACE, *groups)
    # Bytecode is compiled at import: a session imports a small part of torch and transformers.
    session.install("--no-compile", "-c", str(CONSTRAINTS), *map(str, requirements), *grouped)


def with_siblings(package: str) -> list[Path]:
    """Return the folder of a package and of the siblings it declares, theirs included."""
    folders = [FOLDERS[package]]
    for dependency in nox.project.load_toml(FOLDERS[package] / "pyproject.toml")["project"]["dependencies"]:
        if dependency.startswith("semalign-"):
            folders += with_siblings(dependency.removeprefix("semalign-").partition("==")[0])
    return sorted(set(folders))


@nox.session(tags=["check"])
@nox.parametrize("package", [*FOLDERS, "workspace"], ids=[*FOLDERS, "workspace"])
def tests(session: nox.Session, package: str) -> None:
    """Run tests/<package> with only that package and its siblings; `workspace` has all five."""
    folders = FOLDERS.values() if package == "workspace" else with_siblings(package)
    install(session, *folders, groups=tuple({"test", f"test-{package}"} & WORKSPACE["dependency-groups"].keys()))
    # One worker for each processor, each with one thread: models this small gain nothing from more.
    at_once = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile")
    session.run("python", "-m", "pytest", *at_once, f"tests/{package}", *session.posargs, env={"OMP_NUM_THREADS": "1"})


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
    """Run the smallest pair of models through the command line, on the CPU."""
    install(session, *with_siblings("harness"))
    session.run("semalign", "run", "tiny", *session.posargs)


TASKS = ("mmlu", "gsm8k", "humaneval", "mbpp")


@nox.session(name="eval", tags=["eval"], default=False)
@nox.parametrize("task", TASKS, ids=TASKS)
def evaluation(session: nox.Session, task: str) -> None:
    """Measure a model on one benchmark: `nox -s "eval(gsm8k)" -- MODEL`, `nox -t eval -- --config FILE` for all."""
    install(session, *with_siblings("harness"))
    session.run("semalign", "evaluate", *session.posargs, "--tasks", task)


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
