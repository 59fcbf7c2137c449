"""Runs the sides of a case in turn, each in a fresh process, and compares their results."""

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import child
from case import BenchError, Case
from safetensors.torch import load_file
from torch import Tensor

PRELOADED = [
    "semalign_geometry",
    "semalign_harness.models.opening",
    "semalign_train",
    "transformers.models.qwen2.modeling_qwen2",
]
"""Slow to import; none of them computes anything by being imported."""


@dataclass(frozen=True)
class Measured:
    """One side of one repeat."""

    seconds: float
    units: float
    bytes: int
    threads: int


@dataclass(frozen=True)
class Measurements:
    """All repeats of a case."""

    case: Case
    sides: dict[str, list[Measured]]
    order: list[str]
    """Sides as they ran."""
    differences: dict[str, float]
    """Relative difference from ours of each result of each other side, at the first repeat."""


@dataclass(frozen=True)
class Settings:
    """What holds for every case."""

    device: str
    dtype: str
    repeats: int
    seconds: float
    """No further repeat of a case begins after so long."""
    workspace: Path
    """Folder for models, rows and results."""


Run = Callable[[str, str, Mapping[str, Any], Mapping[str, Any] | None, Settings], tuple[Measured, dict[str, Tensor]]]
"""Module, function, its arguments and those of the warm-up → one measurement, and the results to compare."""


def run_side(
    module: str, function: str, parameters: Mapping[str, Any], warm: Mapping[str, Any] | None, settings: Settings
) -> tuple[Measured, dict[str, Tensor]]:
    """Measure one side in a process of its own.

    Raises:
        BenchError: the process failed; its last line is told.
    """
    with tempfile.TemporaryDirectory(dir=settings.workspace) as folder:
        place = Path(folder)
        request = {
            "module": module,
            "function": function,
            "parameters": dict(parameters),
            "warm": None if warm is None else dict(warm),
            "device": settings.device,
            "dtype": settings.dtype,
            "results": str(place / "results.safetensors"),
            "answer": str(place / "answer.json"),
            "printed": str(place / "printed.txt"),
        }
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        process = _processes(settings.device).Process(target=child.main, args=(str(place / "request.json"),))
        process.start()
        process.join()
        if process.exitcode:
            said = (place / "printed.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            ended = f"exit status {process.exitcode}" + (", killed for want of memory perhaps" * (process.exitcode < 0))
            raise BenchError(f"{function} failed ({ended}): {said[-1] if said else 'it printed nothing'}")
        answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
        return Measured(**answer), load_file(place / "results.safetensors")


def _processes(device: str) -> multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext:
    """How fresh processes start: on a CPU as forks of a server that has imported the libraries, and done nothing else.

    Accelerators do not survive a fork.
    """
    if device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def measure(case: Case, settings: Settings, tell: Callable[[str], None], *, run: Run = run_side) -> Measurements:
    """Measure all sides of a case in turn, up to `settings.repeats` times, every other time in reverse order.

    Raises:
        BenchError: a side failed, or computed something else than ours.
    """
    names = list(case.sides)
    sides: dict[str, list[Measured]] = {name: [] for name in names}
    order: list[str] = []
    differences: dict[str, float] = {}
    started = time.monotonic()
    for repeat in range(settings.repeats):
        if repeat and time.monotonic() - started > settings.seconds:
            break
        results = {}
        for name in names if repeat % 2 == 0 else reversed(names):
            function = case.function or f"{case.row}_{name}"
            arguments = prepared({**case.parameters, **case.sides[name]}, settings, run)
            warming = None if case.warm is None else prepared(case.warm, settings, run)
            found, results[name] = run(case.module, function, arguments, warming, settings)
            sides[name].append(found)
            order.append(name)
            tell(f"{case.row} {case.size}: {repeat + 1}/{settings.repeats} {name} {found.seconds:.3g} s")
        if repeat == 0 and case.tolerance is not None:
            differences = agreement(case, results)
    return Measurements(case, sides, order, differences)


def prepared(arguments: Mapping[str, Any], settings: Settings, run: Run) -> dict[str, Any]:
    """Arguments with the folder of a pair of models in place of its description; each pair is made once."""
    if "pair" not in arguments:
        return dict(arguments)
    description = arguments["pair"]
    name = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    folder = settings.workspace / name
    if not folder.exists():
        run("pair", "prepare", {**description, "folder": str(folder)}, None, settings)
    return {key: value for key, value in arguments.items() if key != "pair"} | {"folder": str(folder)}


def agreement(case: Case, results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Relative difference ‖peer − ours‖ / ‖peer‖ of each result that another side has in common with ours.

    Raises:
        BenchError: one is larger than the tolerance of the case, or a peer computed nothing that can be compared.
    """
    assert case.tolerance is not None
    differences = {}
    for name, theirs in results.items():
        if name == "ours" or (name != "peer" and not theirs):
            continue
        if not theirs or theirs.keys() != results["ours"].keys():
            raise BenchError(f"{case.row} {case.size}: ours and {name} computed different things, nothing to compare")
        for key, value in theirs.items():
            ours = results["ours"][key]
            shapes = f"{tuple(ours.shape)} and {tuple(value.shape)}"
            difference = float((value - ours).norm() / value.norm()) if ours.shape == value.shape else float("nan")
            if not difference <= case.tolerance:
                raise BenchError(
                    f"{case.row} {case.size}: ours and {name} differ in {key} by {difference:.3g} of its size, "
                    f"expected at most {case.tolerance:g} (shapes {shapes})"
                )
            differences[f"{name}.{key}"] = difference
    return differences
