"""Contracts of a run: its environment and its result."""

from semalign_geometry.base import Contract

from ..methods import MethodReport
from .measurement import Measurement


class Environment(Contract):
    """Environment of a run."""

    packages: dict[str, str]
    """Versions of packages."""
    code: dict[str, str] = {}
    """Hashes of the code of components that are not built in, by sort and name."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and processor."""
    device: str
    """Device of the models."""
    dtypes: list[str]
    """dtypes of the source and the target."""
    threads: int
    """CPU threads of torch."""
    processes: int = 1
    """Processes of the job."""
    data_sha256: dict[str, str]
    """Hash of each local data file, by its path."""
    models: list[str]
    """Of the source and the target: hash of the files, or the commit on the hub."""
    supervision_key: str
    """Cache key of the supervision."""
    date: str | None = None
    """Date for the chat template; None where it does not read the clock."""


class RunResult(Contract):
    """Result of a run."""

    name: str
    """Name of the experiment."""
    source: Measurement
    """The source on the held-out rows."""
    before: Measurement
    """The target before the transfer."""
    after: Measurement
    """The target after the transfer, reloaded from the run folder."""
    training: MethodReport
    """Report of the method."""
    supervision_bytes: int
    """Size of the training supervision on disk; 0 for methods without it."""
    supervision_seconds: float
    """Wall time of the supervision, attribution and pairing included; 0 for methods without it."""
    train_rows: int
    """Training rows."""
    seconds: float
    """Wall time of the process that finished the run, with building or converting models."""
    peak_bytes: int
    """Largest peak memory of the processes; on a CUDA device, that device's peak."""
    training_peak_bytes: int | None = None
    """The same during training; `peak_bytes` on systems without that measurement. None where an
    earlier process did a part of the training, and in results of earlier versions."""
