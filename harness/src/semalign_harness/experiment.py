"""An experiment: everything a run depends on."""

import copy
import datetime
import json
import typing
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    WrapValidator,
    field_validator,
    model_validator,
)
from semalign_align import SupervisionSettings
from semalign_attribution import (
    Ablation,
    GradientActivation,
    Manual,
    Monotone,
    NearestCritical,
    Random,
    SimilarityPairing,
    Uniform,
)
from semalign_geometry import KNOWN_FRAMES
from semalign_geometry.base import Contract, Kinds, SemalignError, Settings
from semalign_train import TrainSettings

from .data.settings import DAY, DataConfig, TemplateOptions
from .methods import KNOWN_METHODS, Method, SemAlign, parse_method
from .models.settings import ModelConfig

Policy = Monotone | Uniform | NearestCritical | SimilarityPairing | Manual | Random
"""The built-in pairing policies."""


class SimilarityScorer(Settings):
    """Score pairs of layers by CKA with the target."""

    kind: Literal["similarity"] = "similarity"
    """Chooses this scorer."""


KNOWN_SCORERS = Kinds(
    "semalign.scorers", "scorer", (GradientActivation, Ablation, SimilarityScorer), needs=("name", "__call__")
)
"""The scorers that a kind stands for, those of installed packages included."""


KNOWN_PAIRINGS = Kinds("semalign.pairings", "pairing", typing.get_args(Policy), needs=("name", "__call__"))
"""The pairing policies that a kind stands for, those of installed packages included."""


class TransportConfig(Settings):
    """Transport of residual contributions to the target's width."""

    frame: str = "parseval"
    """`parseval`; for ablation `dual`, `cosine` or `none` (geometry is matched in the source's own space); or one of an
    installed package."""
    fold_gain: bool = True
    """Whether heads are read through the gain of the final norm."""

    @field_validator("frame")
    @classmethod
    def _known_frame(cls, frame: str) -> str:
        if frame != "none":
            KNOWN_FRAMES.find(frame, besides=["none"])
        return frame


class MeasureConfig(Settings):
    """Measurements besides NLL, KL and agreement."""

    answer_rows: int = Field(0, ge=0)
    """Held-out rows whose answers are generated greedily and compared by their number; 0 for none."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated answer, in tokens."""


def _name_of_folder(name: str) -> str:
    # Letters, marks that combine with them, and numbers of every script.
    kinds = {unicodedata.category(character)[0] for character in name if character not in "._- "}
    if not name.strip(".") or "" in name.split(" ") or not kinds <= {"L", "M", "N"}:
        raise ValueError(
            "expected the name of a folder: letters, digits, '.', '_', '-', and single blanks between words"
        )
    return name


_TO_METHOD = ("objective", "divergence", "weights", "trainable", "layers", "train_final_norm", "shard_frozen")
MOVED = {
    **{f"train.{name}": f"method.{name}" for name in _TO_METHOD},
    "train.guards.rollback": "method.rollback",
    "train.recompute_suffix": "train.recompute",
    "method.learning_rate": "train.learning_rate",
    "method.warmup": "train.warmup",
    "method.schedule": "train.schedule",
    "method.start": "method.trainable.start",
}
"""Settings of older experiments, and their places of today."""
GONE = ("train.version", "supervision.residual", "method.objective.scope", "method.objective.unit_tokens")
"""Settings of older experiments that no longer exist, besides those of methods."""
GONE_OF_METHODS = ("method.seconds", "method.variant")
"""Settings of older methods that no longer exist."""


class Experiment(Contract):
    """Everything a run depends on."""

    name: Annotated[str, AfterValidator(_name_of_folder)]
    """Name of the run folder: letters of every script, digits, and blanks between words."""
    source: ModelConfig
    """The larger model."""
    target: ModelConfig
    """The smaller model, which is trained."""
    data: DataConfig
    """Rows."""
    chat_template: TemplateOptions = {}
    """Options that chat templates read, such as `enable_thinking: false`, for rows, answers and benchmarks."""
    date: datetime.date = DAY
    """Day for a chat template that reads the clock, so that a run is the same on every day."""
    scorer: Annotated[
        SerializeAsAny[GradientActivation | Ablation | SimilarityScorer],
        Field(discriminator="kind"),
        WrapValidator(KNOWN_SCORERS.or_foreign),
    ] = GradientActivation()
    """Scorer of the source's layers; also a kind that an installed package brings."""
    pairing: Annotated[
        SerializeAsAny[Policy], Field(discriminator="kind"), WrapValidator(KNOWN_PAIRINGS.or_foreign)
    ] = Monotone()
    """Policy that assigns source layers to target layers; also a kind that an installed package brings."""
    transport: TransportConfig = TransportConfig()
    """Transport of the contributions to the target's width."""
    supervision: SupervisionSettings = SupervisionSettings()
    """Form of the stored supervision."""
    live: bool = False
    """Whether the source stays in memory and supervises every batch, instead of all rows once onto the disk."""
    method: Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)] = SemAlign()
    """Method that trains the target, with its own settings: frontier training (`semalign`), or a baseline."""
    train: TrainSettings = TrainSettings()
    """Settings of training that all methods share. `steps` are for each layer of the target; `learning_rate: null` is
    the method's own default."""
    measure: MeasureConfig = MeasureConfig()
    """Measurements before and after."""
    device: str = "auto"
    """Device of the models: `cpu`, `cuda`, `mps`, …; `auto` takes the first accelerator, else the CPU."""
    batch_size: int = Field(8, ge=1)
    """Rows in a forward run of supervision and measurement, and a fourth of those whose answers are written at once.
    Attribution takes one row at a time."""

    @model_validator(mode="after")
    def _target_trains(self) -> "Experiment":
        if self.target.load_in_4bit:
            raise ValueError("the target trains and cannot be in 4 bits: set target.load_in_4bit=false")
        return self

    @model_validator(mode="after")
    def _similarity_needs_its_scorer(self) -> "Experiment":
        if self.pairing.kind == "similarity" and self.scorer.kind != "similarity":
            raise ValueError("the similarity pairing needs the similarity scorer: set scorer.kind=similarity")
        return self

    @model_validator(mode="after")
    def _output_fits_the_method(self) -> "Experiment":
        if self.method.needs_top_entries and self.supervision.output.kind != "top_k":
            raise ValueError(
                f"method.kind={self.method.kind} as it is set needs supervision by top entries: set "
                "supervision.output.kind=top_k, or method.divergence=forward"
            )
        return self

    @classmethod
    def parse(cls, data: Any, *, origin: str = "input") -> "Experiment":
        """Validate plain data; the message for an older setting names its place of today, or that it is gone."""
        for old, new in _moved(data):
            raise SemalignError(f"{origin}: {old} is now {new}")
        try:
            return super().parse(data, origin=origin)
        except SemalignError as error:
            for old in (*GONE, *GONE_OF_METHODS):
                if f"unknown key '{old}'" in str(error):
                    raise SemalignError(f"{origin}: {old} no longer exists: leave it out") from error
            raise

    @classmethod
    def read(cls, path: str | Path) -> "Experiment":
        """Read the experiment of a run folder, also of an older one."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return super().read(path)  # which names the reason
        return cls.parse(upgraded(tree), origin=str(path))


def _moved(tree: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings of a tree that have moved, with their places of today."""
    method = tree.get("method") if isinstance(tree, dict) else None
    own = method if isinstance(method, dict) else {}
    known = KNOWN_METHODS.built_in.get(own.get("kind", "semalign"))
    fields = own if known is None else known.model_fields  # a foreign method may name its settings as it likes
    for old, new in MOVED.items():
        section, _, name = old.rpartition(".")
        inside = _section(tree, section)
        if name in inside and not (section == "method" and name in fields):
            yield old, new


def upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an older experiment in their places of today, without those that no longer exist.

    A method's own setting wins over that of the same name in `train`.
    """
    tree = copy.deepcopy(tree)
    for old, new in list(_moved(tree)):
        value = _section(tree, old.rpartition(".")[0]).pop(old.rpartition(".")[2])
        place = _section(tree, new.rpartition(".")[0], make=True)
        if value is not None and (old.startswith("method.") or new.rpartition(".")[2] not in place):
            place[new.rpartition(".")[2]] = value
    for old in GONE:
        _section(tree, old.rpartition(".")[0]).pop(old.rpartition(".")[2], None)
    if (trainable := _section(tree, "method.trainable")).get("kind") == "full":
        trainable.pop("start", None)  # the start is of adapters alone
    if isinstance(_section(tree, "train").get("steps"), list):
        tree["train"]["steps"] = max(tree["train"]["steps"])
    if (kind := _section(tree, "method").get("kind", "semalign")) in KNOWN_METHODS.built_in:
        known = KNOWN_METHODS.built_in[kind].model_fields
        tree["method"] = {name: value for name, value in _section(tree, "method").items() if name in known}
    return tree


def _section(tree: Any, place: str, *, make: bool = False) -> dict[str, Any]:
    """Return the mapping at a dotted place; an empty one where there is none, put there with `make`."""
    section: dict[str, Any] = tree if isinstance(tree, dict) else {}
    for part in place.split("."):
        inside = section.setdefault(part, {}) if make else section.get(part)
        section = inside if isinstance(inside, dict) else {}
    return section
