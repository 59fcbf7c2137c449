"""Jobs of a matrix through submitit: on Slurm, or as processes of this machine."""

import difflib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from semalign_geometry.base import Contract, SemalignError, Settings

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job

JOBS, JOB_FILES = "jobs.json", "jobs"
_TIMEOUTS = 20
"""Times that a job may reach its time limit and resume."""
_DEFAULTS = {"timeout_min": 240, "stderr_to_stdout": True}
_ONE_PROCESS = ("nodes", "tasks_per_node", "ntasks_per_node")


class JobRecord(Settings):
    """The last job that was submitted for a cell."""

    cluster: str
    """`slurm`, or `local` for submitit's processes on this machine."""
    id: str
    """Its name on the cluster."""


class Jobs(Contract):
    """The jobs of a matrix."""

    cells: dict[str, JobRecord]
    """By the name of their cell."""


def read_jobs(folder: Path) -> dict[str, JobRecord]:
    """The jobs that were submitted, by the name of their cell."""
    return Jobs.read(folder / JOBS).cells if (folder / JOBS).is_file() else {}


def write_jobs(folder: Path, jobs: Mapping[str, JobRecord]) -> None:
    """Write the jobs, by the name of their cell."""
    Jobs(cells=dict(jobs)).write(folder / JOBS)


def submit_jobs(
    call: Callable[[str], None], names: Sequence[str], folder: Path, cluster: str, parameters: Mapping[str, Any]
) -> "dict[str, Job[None]]":
    """Submit one array with a job for each name, and add the jobs to `jobs.json`.

    Raises:
        SemalignError: Slurm refuses them.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(folder / JOB_FILES, cluster, parameters)
    try:
        submitted = executor.map_array(call, names)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SemalignError(f"Slurm refused the jobs: {' '.join(str(error).split())}") from error
    jobs = dict(zip(names, submitted, strict=True))
    write_jobs(
        folder, read_jobs(folder) | {name: JobRecord(cluster=cluster, id=job.job_id) for name, job in jobs.items()}
    )
    return jobs


def known_jobs(folder: Path) -> "dict[str, Job[None]]":
    """The jobs of a matrix by the name of their cell.

    Raises:
        SemalignError: submitit is missing although jobs were submitted.
    """
    if not (records := read_jobs(folder)):
        return {}
    _require_submitit()
    from submitit import LocalJob, SlurmJob

    kinds: dict[str, type[Job[None]]] = {"slurm": SlurmJob, "local": LocalJob}
    return {name: kinds[record.cluster](folder / JOB_FILES, record.id) for name, record in records.items()}


def is_done(job: "Job[None]") -> bool:
    """Whether a job has ended."""
    from submitit import LocalJob

    if not job.done():
        return False
    # submitit takes a local job of another process for done while it runs.
    return not isinstance(job, LocalJob) or job.paths.result_pickle.exists() or not _is_alive(int(job.job_id))


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _executor(folder: Path, cluster: str, parameters: Mapping[str, Any]) -> "AutoExecutor":
    from submitit import AutoExecutor

    executor = AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
    shared = AutoExecutor._valid_parameters()
    given = {name if name in shared else f"slurm_{name}": value for name, value in parameters.items()}
    executor.update_parameters(**{**_DEFAULTS, **given})
    return executor


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that submitit cannot use.

    Raises:
        SemalignError: submitit is missing, or a parameter is unknown or wrong.
    """
    _require_submitit()
    from submitit import AutoExecutor, SlurmExecutor

    known = sorted(AutoExecutor._valid_parameters() | SlurmExecutor._valid_parameters())
    for name in parameters:
        if name in _ONE_PROCESS:
            raise SemalignError(f"--slurm {name}: a cell runs in one process: leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"submitit knows {', '.join(known)}"
            raise SemalignError(f"--slurm: unknown parameter {name!r}: {hint}")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _executor(Path(scratch), "local", parameters)
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise SemalignError(f"--slurm: {' '.join(str(error).split())}") from error


def _require_submitit() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise SemalignError('submitit is not installed: pip install "semalign-harness[slurm]"') from None
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it would write to standard output
