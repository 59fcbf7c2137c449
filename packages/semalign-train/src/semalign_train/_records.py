"""Records of training: each step, each stage, and the reports of finished trainings."""

from typing import Any, ClassVar

from pydantic import model_validator
from semalign_geometry.base import Contract, Settings

from ._settings import FrontierConfig, JointConfig


class StepRecord(Settings):
    """One optimiser step."""

    layer: int
    """Frontier layer, counted from 1; 0 where all layers train at once."""
    step: int
    """Step within the stage, counted from 1."""
    steps: int
    """Steps of the stage."""
    losses: dict[str, float]
    """Mean of each term over the spans of the optimisation batch, its answer tokens with one tokenizer: unweighted, but
    with its weight where all layers train at once."""
    gradient_norms: dict[str, float]
    """Norm of each term's weighted gradient; empty where all layers train at once."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    skipped: bool = False
    """Whether the gradient was not finite, and the weights were left as they were."""
    learning_rate: float
    """Learning rate of this step."""
    supervised_tokens: int
    """Supervised tokens in the optimisation batch."""
    tokens: int
    """All tokens in the optimisation batch."""
    seconds: float
    """Wall time of the step."""
    tokens_per_second: float
    """`tokens` / `seconds`."""
    examples: tuple[int, ...] = ()
    """Examples of the store in the optimisation batch, counted from 0."""


class StageRecord(Settings):
    """One stage: the training of one layer."""

    layer: int
    """Frontier layer, counted from 1."""
    source_layer: int
    """The source layer that supervised it."""
    steps: int
    """Optimiser steps."""
    trainable_parameters: int
    """Numbers that trained."""
    first_losses: dict[str, float]
    """Terms at the first step, before any update."""
    last_losses: dict[str, float]
    """Terms at the last step."""
    skipped: int = 0
    """Steps whose gradient was not finite."""
    held_out: tuple[float, float] | None = None
    """Weighted loss on held-out rows before and after the stage; None when it was not measured."""
    rolled_back: bool = False
    """Whether the stage was undone because the held-out loss rose."""
    supervised_tokens: int
    """Supervised tokens seen, repeats included."""
    seconds: float
    """Wall time, the advance of the prefix included."""


class TransferReport(Contract):
    """A finished frontier training."""

    current_version: ClassVar[int] = 2

    version: int = 2
    """Format version of this contract; a reader refuses versions newer than its own."""
    config: FrontierConfig
    """Settings that it ran with."""
    stages: tuple[StageRecord, ...]
    """Its stages, shallow to deep."""
    supervised_tokens: int
    """Supervised tokens seen by the trainable part, over all stages."""
    seconds: float
    """Wall time."""

    @model_validator(mode="before")
    @classmethod
    def _read_version_1(cls, data: Any) -> Any:
        """Settings of version 1 carry a version of their own. Steps by stage are in `stages`; settings that are gone
        are left out."""
        config = data.get("config") if isinstance(data, dict) else None
        if not isinstance(config, dict) or "version" not in config:
            return data
        config = {key: value for key, value in config.items() if key != "version"}
        guards, objective = dict(config.get("guards", {})), dict(config.get("objective", {}))
        if "recompute_suffix" in config:
            config["recompute"] = config.pop("recompute_suffix")
        if "rollback" in guards:
            config["rollback"] = guards.pop("rollback")
        if isinstance(config.get("steps"), list):
            config["steps"] = max(config["steps"])
        if objective.get("kind", "relation") == "relation":
            objective = {"kind": "relation"}
        return data | {"config": config | {"guards": guards, "objective": objective}}


class JointReport(Contract):
    """A finished joint training."""

    config: JointConfig
    """Settings that it ran with."""
    steps: int
    """Optimiser steps."""
    trained_parameters: int
    """Numbers that trained, those of the loss included."""
    skipped: int = 0
    """Steps whose gradient was not finite."""
    first_losses: dict[str, float]
    """Weighted terms at the first step, before any update."""
    last_losses: dict[str, float]
    """Weighted terms at the last step."""
    supervised_tokens: int
    """Supervised tokens seen, repeats included."""
    seconds: float
    """Wall time, that before an interruption included."""
