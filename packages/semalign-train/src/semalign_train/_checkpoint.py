"""Checkpoints of a training that can be killed at any moment and resumed: finished stages, and states within one."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from semalign_align import Ranks
from semalign_geometry.base import ArtifactManifest, SemalignError, read_artifact, read_manifest, write_artifact
from torch import Tensor

from ._records import StageRecord, StepRecord
from ._settings import KEPT_STATES, TrainSettings

LOGGER = logging.getLogger(__name__)

TIME_SHARE = 33
"""A state that is due by time waits until this many times as long has passed as saving the last one took."""
QUICK_BYTES = 10**9
"""Largest state that is saved while an interrupted training ends."""


class StageManifest(ArtifactManifest):
    """A finished stage; the tensors are its weights."""

    training: str
    """Fingerprint of the training."""
    code: dict[str, str] = {}
    """Hashes of the code of components that are not built in, by sort and name."""
    record: StageRecord
    """Record of the stage."""


class StateManifest(ArtifactManifest):
    """The state within a stage after a step.

    The tensors are the trainable parameters, the optimiser's moments and the random state.
    """

    training: str
    """Fingerprint of the training."""
    code: dict[str, str] = {}
    """Hashes of the code of components that are not built in, by sort and name."""
    records: tuple[StepRecord, ...]
    """The steps of the stage so far."""


@dataclass(frozen=True, eq=False)
class State:
    """A stage in the middle."""

    records: tuple[StepRecord, ...]
    """The steps so far."""
    tensors: dict[str, Tensor]
    """Trainable parameters, the optimiser's moments and the random state."""


class Checkpoints:
    """A folder with one subfolder for each finished stage and each kept state, whole or absent."""

    def __init__(
        self,
        folder: Path,
        training: str,
        ranks: Ranks,
        config: TrainSettings,
        *,
        code: Mapping[str, str] | None = None,
    ) -> None:
        """Use a folder, made when it does not exist; damaged parts of it are dropped with a warning.

        Args:
            folder: where the checkpoints are kept, and those of an interrupted training are found.
            training: fingerprint of all that decides the result of the training, code aside.
            ranks: the processes that train together; the first decides and writes, all read.
            config: settings that say when a state is due.
            code: hashes of the code of components that are not built in, as `Components.code` returns them.

        Raises:
            SemalignError: the folder holds the checkpoints of another training, or of one with other code.
        """
        self.folder, self._training, self._ranks = folder, training, ranks
        self._config, self._code = config, dict(code or {})
        self._saved_at, self._took = monotonic(), 0.0
        ranks.broadcast_from_first(self._clean)
        self._found = self._newest_state()
        ranks.barrier()  # before the first process drops states

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (".stage-*", ".state-*"):
            for place in self.folder.glob(name):
                shutil.rmtree(place)  # what was being written when the training was killed
        kinds: tuple[tuple[str, type[StageManifest] | type[StateManifest]], ...] = (
            ("stage-*", StageManifest),
            ("state-*", StateManifest),
        )
        for name, kind in kinds:
            for place in sorted(self.folder.glob(name)):
                try:
                    found = read_manifest(place, kind)
                except SemalignError as error:
                    LOGGER.warning("%s; that part is trained again", error)
                    shutil.rmtree(place)
                    continue
                if found.training != self._training:
                    raise SemalignError(
                        f"{self.folder} holds the checkpoints of another training: choose another folder, or "
                        "delete them"
                    )
                edited = [name for name in self._code | found.code if self._code.get(name) != found.code.get(name)]
                if edited:
                    raise SemalignError(
                        f"the code of the {edited[0]} changed since the training in {self.folder} began: restore it, "
                        "choose another folder, or delete the checkpoints"
                    )

    def stage(self, layer: int) -> tuple[StageRecord, dict[str, Tensor]] | None:
        """A finished stage and its weights; None when the layer has not been trained to the end."""
        folder = self._stage_folder(layer)
        if not folder.exists():
            return None
        manifest, tensors = read_artifact(folder, StageManifest)
        LOGGER.info("layer %d was trained before: %s", layer, folder)
        return manifest.record, tensors

    def save_stage(self, record: StageRecord, tensors: dict[str, Tensor]) -> None:
        """Keep a finished stage; the states within it are deleted."""
        if not self._ranks.is_first:
            return
        manifest = StageManifest(training=self._training, code=self._code, record=record)
        write_artifact(self._stage_folder(record.layer), manifest, tensors)
        self._drop_states(keep=0)
        self._saved_at = monotonic()

    def state(self, layer: int) -> State | None:
        """The newest state within the stage of a layer, returned once; None where there is none."""
        found, self._found = self._found, None
        return found if found is not None and found.records[-1].layer == layer else None

    def _newest_state(self) -> State | None:
        states = self._states()
        if not states:
            return None
        manifest, tensors = read_artifact(states[-1], StateManifest)
        LOGGER.info("resuming from %s", states[-1])
        return State(manifest.records, tensors)

    def keep(
        self, records: Sequence[StepRecord], tensors: Callable[[], dict[str, Tensor]], *, ended: bool = False
    ) -> None:
        """Save the state after a step where the settings say so: by the number of steps, or by the time since the last.

        A state that is due by time alone may fail to be written, as on a full disk, with a warning.

        Args:
            records: the steps so far.
            tensors: returns the tensors of the state.
            ended: whether this was the last step, whose state is saved too where steps are counted.
        """
        if not self._ranks.is_first:
            return
        every, minutes = self._config.checkpoint_steps, self._config.checkpoint_minutes
        if every is not None and (records[-1].step % every == 0 or ended):
            self.save_state(State(tuple(records), tensors()))
        elif minutes is not None and monotonic() - self._saved_at >= max(60 * minutes, TIME_SHARE * self._took):
            try:
                self.save_state(State(tuple(records), tensors()))
            except OSError as error:
                self._saved_at = monotonic()
                LOGGER.warning("the state of the training could not be kept: %s", error)

    def keep_last(self, records: Sequence[StepRecord], tensors: dict[str, Tensor]) -> None:
        """Save the state of an interrupted training, unless it is there already or too large to be written at once."""
        if not self._ranks.is_first or not records or self._state_folder(records[-1]).exists():
            return
        if sum(value.nbytes for value in tensors.values()) <= QUICK_BYTES:
            self.save_state(State(tuple(records), tensors))

    def save_state(self, state: State) -> None:
        """Keep the state after a step."""
        if not self._ranks.is_first:
            return
        began, last = monotonic(), state.records[-1]
        write_artifact(
            self._state_folder(last),
            StateManifest(training=self._training, code=self._code, records=state.records),
            state.tensors,
        )
        LOGGER.debug("kept the state after step %d of layer %d", last.step, last.layer)
        self._drop_states(keep=KEPT_STATES)
        self._saved_at = monotonic()
        self._took = self._saved_at - began

    def _state_folder(self, last: StepRecord) -> Path:
        return self.folder / f"state-{last.layer:03}-{last.step:06}"

    def _stage_folder(self, layer: int) -> Path:
        return self.folder / f"stage-{layer:03}"

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*"))

    def _drop_states(self, *, keep: int) -> None:
        states = self._states()
        for folder in states[: len(states) - keep]:
            gone = folder.with_name(f".{folder.name}")
            folder.rename(gone)  # at once: half of a state is no state
            shutil.rmtree(gone)


def kept_until(folder: Path) -> str | None:
    """Place where a training with these checkpoints resumes, such as `after step 12 of layer 3`; None where nothing is
    kept."""
    if states := sorted(folder.glob("state-*")):
        layer, step = (int(part) for part in states[-1].name.split("-")[1:])
        return f"after step {step}" + (f" of layer {layer}" if layer else "")
    stages = sorted(folder.glob("stage-*"))
    return f"after layer {int(stages[-1].name.split('-')[1])}" if stages else None


def fingerprint(*parts: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of texts and tensors."""
    digest = hashlib.sha256("\n".join(parts).encode())
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
