"""An experiment: everything a run depends on."""

import datetime
import typing
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, WrapValidator, field_validator, model_validator
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
from semalign_geometry import KNOWN_FRAMES, Contract, Kinds, Settings
from semalign_train import TransferConfig

from .data.encoding import DAY, TemplateOptions
from .data.settings import DataConfig
from .models.settings import ModelConfig

Policy = Monotone | Uniform | NearestCritical | SimilarityPairing | Manual | Random
"""The pairing policies that come along."""


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
    """How residual contributions come to the target's width."""

    frame: str = "parseval"
    """`parseval`; for ablation `dual`, `cosine` or `none` (geometry is matched in the source's own space); or one that
    an installed package brings."""
    fold_gain: bool = True
    """Whether heads are read through the gain of the final norm."""

    @field_validator("frame")
    @classmethod
    def _known_frame(cls, frame: str) -> str:
        if frame != "none":
            KNOWN_FRAMES.find(frame, besides=["none"])
        return frame


class MeasureConfig(Settings):
    """What is measured besides NLL, KL and agreement."""

    answer_rows: int = Field(0, ge=0)
    """Held-out rows whose answers are generated greedily and compared by the number they arrive at; 0 for none."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated answer, in tokens."""


def _method(value: Any) -> Settings:
    from .methods import parse_method  # which needs the configurations of models and rows above

    return parse_method(value)


class Experiment(Contract):
    """Everything a run depends on."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the run folder."""
    source: ModelConfig
    """The larger model."""
    target: ModelConfig
    """The smaller model, which is trained."""
    data: DataConfig
    """Rows."""
    chat_template: TemplateOptions = {}
    """Options that chat templates read, such as `enable_thinking: false`, for rows, answers and benchmarks."""
    date: datetime.date = DAY
    """The day that a chat template is told which reads the clock, so that a run is the same on every day."""
    scorer: Annotated[
        SerializeAsAny[GradientActivation | Ablation | SimilarityScorer],
        Field(discriminator="kind"),
        WrapValidator(KNOWN_SCORERS.or_foreign),
    ] = GradientActivation()
    """How source layers are scored; also a kind that an installed package brings."""
    pairing: Annotated[
        SerializeAsAny[Policy], Field(discriminator="kind"), WrapValidator(KNOWN_PAIRINGS.or_foreign)
    ] = Monotone()
    """How target layers get their source layer; also a kind that an installed package brings."""
    transport: TransportConfig = TransportConfig()
    """How contributions come to the target's width."""
    supervision: SupervisionSettings = SupervisionSettings()
    """What the source leaves behind."""
    live: bool = False
    """Whether the source stays in memory and supervises every batch anew, instead of once onto the disk."""
    method: Annotated[SerializeAsAny[Settings], BeforeValidator(_method)] = Field(default_factory=lambda: _method({}))
    """What trains the target: frontier training (`semalign`), or a baseline."""
    train: TransferConfig = TransferConfig()
    """How the target trains."""
    measure: MeasureConfig = MeasureConfig()
    """What is measured before and after."""
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
    def _settings_fit_together(self) -> "Experiment":
        if self.train.divergence != "forward" and self.supervision.output.kind != "top_k":
            raise ValueError(
                f"train.divergence={self.train.divergence} needs supervision by top entries: set "
                "supervision.output.kind=top_k, or train.divergence=forward"
            )
        if getattr(self.method, "critical_layer_only", False) and self.train.train_final_norm:
            raise ValueError(
                "train.train_final_norm needs a stage of the last layer, which method.critical_layer_only may leave "
                "out: set one of them to false"
            )
        if self.train.divergence != "forward" and self.train.guards.rollback is not None:
            raise ValueError(
                f"train.divergence={self.train.divergence} has no figure on held-out rows, whose output is kept whole: "
                "set train.guards.rollback=null, or train.divergence=forward"
            )
        return self
