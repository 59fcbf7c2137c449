"""Contracts of a run: what it ran on, and what it measured."""

from semalign_geometry.base import Contract

from ..methods import MethodReport
from .measurement import Measurement


class Environment(Contract):
    """What a run ran on."""

    packages: dict[str, str]
    """Versions."""
    code: dict[str, str] = {}
    """Hashes of the code of the components that do not come along, by their sort and name."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and processor."""
    device: str
    """Device of the models."""
    dtypes: list[str]
    """What the source and the target compute in."""
    threads: int
    """CPU threads that torch used."""
    processes: int = 1
    """Processes that ran together."""
    data_sha256: dict[str, str]
    """Hash of each local data file, by its path."""
    models: list[str]
    """Of the source and the target: hash of the files, or the commit on the hub."""
    supervision_key: str
    """Hash of all that decides what the source leaves behind."""
    date: str | None = None
    """The day that the chat template was told; None where it does not read the clock."""


class RunResult(Contract):
    """What a run measured."""

    name: str
    """Name of the experiment."""
    source: Measurement
    """The source on the held-out rows."""
    before: Measurement
    """The target before the transfer."""
    after: Measurement
    """The target after the transfer, reloaded from the run folder."""
    training: MethodReport
    """What the method did."""
    supervision_bytes: int
    """Size of the training supervision on disk; 0 for methods that do without it."""
    supervision_seconds: float
    """Wall time of making it, attribution and pairing included; 0 for methods that do without it."""
    train_rows: int
    """Rows that were trained on."""
    seconds: float
    """Wall time of the process that finished the run, the building or conversion of models included."""
    peak_bytes: int
    """Peak memory of the process, of several the largest; on a CUDA device, that device's peak."""
    training_peak_bytes: int | None = None
    """The same while the method trained: `peak_bytes` on a system that cannot tell, None where an earlier process did a
    part of the training, and in results of earlier versions."""
