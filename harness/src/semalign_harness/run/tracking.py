"""Metrics of a training, step by step: `metrics.jsonl`, and trackers."""

import contextlib
import importlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from semalign_geometry.base import Contract, SemalignError
from semalign_train import StageRecord, StepRecord

from ..results.files import METRICS, TRACKED
from .run_folder import cut_metrics, leaves, steps_of

if TYPE_CHECKING:
    from .job import Job

LOGGER = logging.getLogger(__name__)


PROJECT = "semalign"


class Tracked(Contract):
    """Trackers of the run in a folder, so that an interrupted run resumes there as the same one."""

    id: str
    """Identity of the run among others of its name."""
    trackers: tuple[str, ...] = ()
    """Names of the trackers."""


@runtime_checkable
class Tracker(Protocol):
    """Keeps metrics of a run by name and step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep metrics of a step."""
        ...

    def finish(self, *, whole: bool) -> None:
        """Write everything out; `whole` when the run is finished, not interrupted."""
        ...


@dataclass(frozen=True)
class Start:
    """Arguments of a tracker."""

    folder: Path
    """The run folder, whose name is the run's."""
    id: str
    """Identity of the run among others of its name."""
    config: dict[str, Any]
    """The experiment."""
    resumed: bool
    """Whether the tracker has a part of the run."""
    quiet: bool
    """Whether it prints nothing."""


class _TensorBoard:
    """Event files in the run folder."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(start.folder / "tensorboard"))
        if not start.resumed:
            settings = {
                place: value if isinstance(value, bool | int | float) else str(value)
                for place, value in leaves(start.config)
            }
            self._writer.add_hparams(settings, {}, run_name=".")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, *, whole: bool) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, in the project of WANDB_PROJECT."""

    def __init__(self, start: Start) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.folder.name,
            id=start.id,
            resume="allow",
            dir=start.folder,
            config=start.config,
            settings=wandb.Settings(silent=start.quiet),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class _Trackio:
    """A run of trackio, which keeps it on this machine unless TRACKIO_SPACE_ID is set."""

    def __init__(self, start: Start) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # which is for results
            self._run: Any = trackio.init(
                project=PROJECT,
                name=start.folder.name,
                config=start.config,
                resume="allow" if start.resumed else "never",
                embed=False,
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, *, whole: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
"""By name, which is also the name of the needed package and of the extra that installs it."""


def find_trackers(given: Sequence[str]) -> tuple[str, ...]:
    """Return the names in texts such as `wandb,tensorboard`, each once.

    Raises:
        SemalignError: there is no such tracker, or its package is not installed.
    """
    names = tuple(dict.fromkeys(name.strip() for text in given for name in text.split(",")))
    for name in names:
        if name not in TRACKERS:
            raise SemalignError(f"tracker {name!r} is unknown: choose among {', '.join(TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError:
            raise SemalignError(f'{name} is not installed: pip install "semalign-harness[{name}]"') from None
    return names


class Metrics:
    """`metrics.jsonl` of a run folder, and the trackers, which get the same; of the first process alone.

    Trackers get the metrics of a step under `train/` and of a stage under `stage/`, at the number of the step among
    all, and those of the result under `result/`, one further. A resumed run does not repeat the steps that they have.
    A tracker that fails is dropped with a warning.
    """

    def __init__(self, folder: Path, trackers: dict[str, Tracker] | None = None) -> None:
        """Continue the metrics of a folder.

        Args:
            folder: the run folder.
            trackers: by name, those that have the steps in it; one that fails is taken out.
        """
        self._folder, self._trackers = folder, {} if trackers is None else trackers
        self._told = len(steps_of(folder))
        self._steps: int | None = None

    def add(self, record: StepRecord) -> int:
        """Append a step; the first one drops the later steps of an interrupted training.

        Returns:
            The steps before it.
        """
        before = cut_metrics(self._folder, record) if self._steps is None else self._steps
        with (self._folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")
        self._steps = before + 1
        if self._steps > self._told:
            self._log(figures("train", record.model_dump()), self._steps)
        return before

    def add_stage(self, record: StageRecord) -> None:
        """Log the stage that the last step has ended."""
        if self._steps is not None and self._steps >= self._told:
            held_out = dict(zip(("before", "after"), record.held_out or (), strict=False))
            self._log(figures("stage", {**record.model_dump(), "held_out": held_out}), self._steps)

    def add_result(self, result: Mapping[str, Any]) -> None:
        """Log the result of the run."""
        self._log(figures("result", result), (self._told if self._steps is None else self._steps) + 1)

    def close(self, *, whole: bool) -> None:
        """Let the trackers write everything out; `whole` when the run is finished."""
        self._tell(lambda tracker: tracker.finish(whole=whole))

    def _log(self, values: dict[str, float], step: int) -> None:
        self._tell(lambda tracker: tracker.log(values, step))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                what(tracker)
            except Exception as error:
                del self._trackers[name]
                LOGGER.warning("%s fails and is dropped: %s; %s holds every step", name, error, METRICS)


@contextlib.contextmanager
def tracked(job: "Job", names: Sequence[str]) -> Iterator[Metrics]:
    """Open the metrics of a run folder, and trackers that finish with the block; one that is new to the run gets the
    steps in the folder first.

    Raises:
        SemalignError: a tracker does not start.
    """
    folder, console = job.folder, job.console
    known = Tracked.read(folder / TRACKED) if (folder / TRACKED).is_file() else Tracked(id=uuid.uuid4().hex)
    started: dict[str, Tracker] = {}
    metrics = Metrics(folder, started)
    try:
        for name in names:
            resumed = name in known.trackers
            start = Start(folder, known.id, job.experiment.model_dump(mode="json"), resumed, console.quiet)
            try:
                started[name] = tracker = TRACKERS[name](start)
                for number, step in enumerate([] if resumed else steps_of(folder), 1):
                    tracker.log(figures("train", step), number)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise SemalignError(f"{name} does not start ({reason}): leave --track {name} out") from error
            console.note(f"{name} tracks the run")
        if set(names) > set(known.trackers):
            known.model_copy(update={"trackers": tuple({*known.trackers, *names})}).write(folder / TRACKED)
        yield metrics
    except BaseException:
        metrics.close(whole=False)
        raise
    metrics.close(whole=True)


def figures(prefix: str, tree: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by their place in it, such as `train/losses/output`."""
    found = {f"{prefix}/{place.replace('.', '/')}": value for place, value in leaves(tree)}
    numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if not name.endswith("/version")}  # of a contract
