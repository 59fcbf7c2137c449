"""Run the cells of a matrix: in processes on this machine, or as an array of Slurm jobs through submitit."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from semalign_geometry.base import SemalignError

from ..experiment import Experiment
from ..models.shape import is_small
from ..results.files import ENVIRONMENT, RESULT
from ..results.run import Environment, RunResult
from ..run.dry_run import DryRun
from ..run.pipeline import run_experiment
from ..run.run_folder import is_claimed
from ..util.console import Console, interruptible, logged
from .folder import LOGS, MATRIX, Standing, check_folder, claimed_matrix, failure_file, keep_reason
from .jobs import check_parameters, is_done, known_jobs, read_jobs, submit_jobs, write_jobs
from .matrix import Cell, Matrix

if TYPE_CHECKING:
    from submitit import Job
    from submitit.core.utils import DelayedSubmission

EXECUTORS = ("local", "slurm", "submitit-local")


@dataclass(frozen=True)
class Target:
    """The place where cells run, checked when it is made.

    Raises:
        SemalignError: there is no such executor, submitit or Slurm is missing, or a parameter is unknown or wrong.
    """

    executor: str = "local"
    """`local` for processes on this machine, `slurm`, or `submitit-local` for submitit's jobs on this machine."""
    at_once: int | None = None
    """Most cells at a time; None for one on this machine, and for submitit's own limit on Slurm."""
    slurm: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of submitit's executors, such as `partition`, `gpus_per_node` and `timeout_min`."""
    trackers: tuple[str, ...] = ()
    """Trackers that receive every step of every cell."""

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise SemalignError(f"executor {self.executor!r} is unknown: choose one of {', '.join(EXECUTORS)}")
        if self.at_once is not None and self.at_once < 1:
            raise SemalignError(f"--jobs {self.at_once}: expected at least 1")
        if self.executor == "local":
            if self.slurm:
                raise SemalignError("--slurm sets parameters of Slurm jobs: give --executor slurm too")
            return
        if self.executor == "submitit-local" and self.at_once is not None:
            raise SemalignError("--jobs has no effect on submitit-local, which starts all cells at once: leave it out")
        if "array_parallelism" in self.slurm and self.at_once is not None:
            raise SemalignError("--jobs and array_parallelism are the same setting: leave one of them out")
        check_parameters(self.slurm)
        if self.executor == "slurm" and shutil.which("sbatch") is None:
            raise SemalignError("sbatch is not on this machine: submit from a login node, or choose --executor local")

    @property
    def cluster(self) -> str:
        """Name of the cluster for submitit."""
        return "slurm" if self.executor == "slurm" else "local"

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters for submitit."""
        return {**self.slurm, **({} if self.at_once is None else {"array_parallelism": self.at_once})}


def submit_matrix(
    matrix: Matrix, folder: Path, target: Target, *, wait: bool = False, console: Console | None = None
) -> list[Standing]:
    """Run or submit the cells that are not finished and not running; returns the state of each.

    On this machine (`local`) the call ends with the cells; Slurm jobs outlive it. A failed or interrupted cell stops
    no other, and the next call tries it again.

    Args:
        matrix: the cells.
        folder: place of their run folders; it may hold other cells of such a matrix.
        target: where they run.
        wait: wait for the jobs.
        console: shows progress; None shows nothing.

    Raises:
        SemalignError: the folder holds something else, or Slurm refuses the jobs.
    """
    console = console or Console(quiet=True)
    with claimed_matrix(folder, matrix):
        now = look(matrix, folder)
        for each in now:
            if each.state == "failed":
                console.note(f"{each.cell.name} failed before, and is tried again: {each.note}")
        names = [each.cell.name for each in now if each.state in ("failed", "not run")]
        _forget(folder, names)
        jobs: dict[str, Job[None]] = {}
        if names and target.executor == "local":
            _run_here(folder, names, target, console)
        elif names:
            parameters = {"name": f"semalign-{matrix.name}", **target.parameters}
            run = CellRun(str(folder.resolve()), target.trackers)
            jobs = submit_jobs(run, names, folder, target.cluster, parameters)
            ids = sorted({job.job_id.partition("_")[0] for job in jobs.values()})
            console.note(f"submitted {len(names)} of {len(now)} cells: job {', '.join(ids)}")
    if wait:
        jobs = {**known_jobs(folder), **jobs}
        while not all([is_done(job) for job in jobs.values()]):
            time.sleep(1)
    return look(matrix, folder)


def look(matrix: Matrix, folder: Path) -> list[Standing]:
    """State of each cell; nothing is run or written, and the folder need not exist.

    Raises:
        SemalignError: the folder holds something else, or submitit is missing although jobs were submitted.
    """
    check_folder(folder, matrix)
    jobs = known_jobs(folder)
    return [_look(cell, folder, jobs.get(cell.name)) for cell in matrix.cells]


def _look(cell: Cell, folder: Path, job: "Job[None] | None") -> Standing:
    place, reason = folder / cell.name, failure_file(folder, cell.name)
    if (place / RESULT).is_file():
        return Standing(cell, "finished", result=RunResult.read(place / RESULT))
    if job is not None and not is_done(job):
        return Standing(cell, "running", f"job {job.job_id}")
    if is_claimed(place):
        return Standing(cell, "running", "in another process")
    if reason.is_file():
        return Standing(cell, "failed", reason.read_text(encoding="utf-8").strip())
    if job is not None:
        return Standing(cell, "failed", f"job {job.job_id} ended without a result: see {job.paths.stdout}")
    return Standing(cell, "not run")


def look_ahead(matrix: Matrix, folder: Path) -> list[Standing]:
    """State of each cell, with those that would be refused if they ran now; nothing is run or written.

    Raises:
        SemalignError: as `look`.
    """
    checks, found = DryRun(), []
    for each in look(matrix, folder):
        if each.state in ("failed", "not run"):
            try:
                notes = checks.check(each.cell.experiment, folder / each.cell.name)
                each = replace(each, note="; ".join(filter(None, (each.note, *(f"not checked: {n}" for n in notes)))))
            except SemalignError as error:
                each = replace(each, state="refused", note=str(error))
        found.append(each)
    return found


@dataclass(frozen=True)
class CellRun:
    """Run one cell of the matrix in a folder; a preempted job resumes in its run folder."""

    folder: str
    """Folder of the matrix."""
    trackers: tuple[str, ...] = ()
    """Trackers that receive every step."""

    def __call__(self, name: str) -> None:
        """Run a cell; a file keeps the reason of a failure.

        Raises:
            Exception: the error of the run.
        """
        transformers.logging.disable_progress_bar()
        folder = Path(self.folder)
        (cell,) = (cell for cell in Matrix.read(folder / MATRIX).cells if cell.name == name)
        try:
            with interruptible(), logged(verbose=True):  # into the log of the cell
                run_experiment(cell.experiment, folder / name, console=Console(), trackers=self.trackers)
        except Exception as error:
            known = isinstance(error, SemalignError | OSError)
            reason = " ".join(str(error).split())
            keep_reason(folder, name, reason if known else f"{type(error).__name__}: {reason}")
            raise

    def checkpoint(self, name: str) -> "DelayedSubmission":
        """The job that submitit queues again after a preemption or at the time limit."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self, name)


def _forget(folder: Path, names: Sequence[str]) -> None:
    """Delete reasons and jobs of earlier attempts, which the next ones would inherit."""
    for name in names:
        failure_file(folder, name).unlink(missing_ok=True)
    if before := read_jobs(folder):
        write_jobs(folder, {name: record for name, record in before.items() if name not in names})


def _run_here(folder: Path, names: Sequence[str], target: Target, console: Console) -> None:
    """Run each cell in a process of its own, which has its own memory and crashes alone."""
    (folder / LOGS).mkdir(exist_ok=True)
    waiting, done = list(names), 0
    free = list(range(target.at_once or 1))
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    # A run that names its device, such as cuda:1, counts the devices as this process does.
    experiments = {cell.name: cell.experiment for cell in Matrix.read(folder / MATRIX).cells}
    anywhere = {name for name, experiment in experiments.items() if experiment.device in ("auto", "cuda")}
    tick = console.ticker("runs")
    tick(0, len(names))
    try:
        while waiting or running:
            while waiting and free:
                name, slot = waiting.pop(0), free.pop(0)
                console.note(f"{name} begins, its log is {folder / LOGS / name}.log")
                threads = _threads(folder / name, experiments[name], target.at_once or 1)
                environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
                if name in anywhere:
                    environment |= device_of_slot(slot, torch.cuda.device_count(), os.environ)
                running[name] = _start(folder, name, target.trackers, environment), slot
            time.sleep(0.05)
            for name, (process, slot) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[name]
                free.append(slot)
                done += 1
                if code and not failure_file(folder, name).is_file():
                    why = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    keep_reason(folder, name, f"{why}: see {folder / LOGS / name}.log")
                console.note(f"{name} {'failed' if code else 'is finished'}, {done} of {len(names)}")
                tick(done, len(names))
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start(
    folder: Path, name: str, trackers: Sequence[str], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "semalign_harness.grid.submit", str(folder), name, *trackers]
    with (folder / LOGS / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def device_of_slot(slot: int, count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment that shows a run one of the `count` visible CUDA devices, slot by slot; empty for fewer than two."""
    if count < 2:
        return {}
    given = environment.get("CUDA_VISIBLE_DEVICES")
    visible = [str(index) for index in range(count)] if given is None else given.split(",")[:count]
    return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)].strip()}


def _threads(folder: Path, experiment: Experiment, at_once: int) -> int:
    """A cell's share of the processors, so that cells do not wait for each other's threads; one for small models.

    An interrupted cell keeps its number, on which its results depend.
    """
    if (folder / ENVIRONMENT).is_file():
        return Environment.read(folder / ENVIRONMENT).threads
    if is_small(experiment.source) and is_small(experiment.target):
        return 1
    return max(1, torch.get_num_threads() // at_once)


def _main() -> int:
    folder, name, *trackers = sys.argv[1:]
    try:
        CellRun(folder, tuple(trackers))(name)
    except (SemalignError, OSError) as error:
        print(f"semalign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(_main())
