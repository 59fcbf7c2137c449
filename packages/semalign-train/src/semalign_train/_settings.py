"""Settings of training: those that both trainers share, and those of each."""

import math
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveInt, SerializeAsAny, WrapValidator
from semalign_align import Cosine, Fisher, Relation
from semalign_geometry import Divergence
from semalign_geometry.base import Kinds, SemalignError, Settings

# Not typing.Self: a run-time checker that decorates single methods cannot resolve it.
TrainT = TypeVar("TrainT", bound="TrainSettings")

KNOWN_OBJECTIVES = Kinds(
    "semalign.objectives",
    "objective",
    (Relation, Cosine, Fisher),
    needs=("name", "needs_output", "total", "count"),
)
"""The layer objectives that a kind stands for, those of installed packages included."""


KEPT_STATES = 2
"""States within a stage that are kept: where the newest is damaged, training resumes from the one before."""
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment."""


class FullLayer(Settings):
    """Every parameter trains: of the frontier layer, or of the whole model in joint training."""

    kind: Literal["full"] = "full"
    """Chooses this in a configuration."""


class LoraLayer(Settings):
    """A low-rank adapter trains on the frontier layer, or on every layer in joint training; it is merged at the end."""

    kind: Literal["lora"] = "lora"
    """Chooses this in a configuration."""
    rank: int = Field(16, ge=1)
    """r."""
    alpha: int = Field(32, ge=1)
    """The adapter is scaled by alpha / r."""
    modules: tuple[str, ...] = ("up_proj", "down_proj", "v_proj", "o_proj")
    """Names of the linear modules inside a layer that get an adapter."""
    start: Literal["zero", "pissa"] = "zero"
    """Start of the adapter: no change, or the principal components of the weights, which are taken out of them
    (PiSSA)."""


class LossWeights(Settings):
    """Weights of the terms of the loss; a weight of 0 leaves a term out.

    Layers above the frontier run only where a term needs the output.
    """

    geometry: float = Field(0.1, ge=0, allow_inf_nan=False)
    """w_geo, of the layer objective; the weight of 1 slowed the fall of the KL on the tiny pair."""
    output: float = Field(1.0, ge=0, allow_inf_nan=False)
    """w_out, of the KL to the source."""
    span: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of the likelihoods of spans with several tokens, relative to `output`; ignored with one tokenizer."""
    answer: float = Field(0.0, ge=0, allow_inf_nan=False)
    """w_ce, of the answer NLL."""
    label: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of 1 − cosine of logits and one-hot labels, the second term of v1."""

    @property
    def needs_output(self) -> bool:
        """Whether a term needs the output, so that layers above the frontier run."""
        return self.output > 0 or self.answer > 0 or self.label > 0


class Guards(Settings):
    """Limits that training watches."""

    max_skipped: int = Field(3, ge=0)
    """Steps that may be skipped because the gradient is not finite, in each stage where there are stages. One more,
    or a skipped last step, stops the training."""
    drowned: float = Field(100.0, gt=1)
    """A warning is logged when the mean gradient norms of two terms in a stage differ by more than this factor."""


class TrainSettings(Settings):
    """Settings that both trainers share."""

    default_rate: ClassVar[float] = 1e-4
    """Peak learning rate where `learning_rate` is None; a configuration of another method may set its own."""

    passes: float = Field(3.0, gt=0, allow_inf_nan=False)
    """Passes over the examples, rounded up to whole steps. Stages share them, so that frontier training and joint
    training see equally many tokens."""
    steps: PositiveInt | None = None
    """Optimiser steps, instead of passes: of each stage in frontier training, of the whole in joint training."""
    batch_size: int = Field(16, ge=1)
    """Examples in an optimiser step."""
    micro_batch_size: int = Field(8, ge=1)
    """Examples in memory at a time; the result does not depend on it."""
    optimiser: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon, which moves the layers' matrices by their orthogonalised momentum, as far as AdamW would at the
    same rate, and leaves the rest (gains, biases, stacks of experts, embeddings, head) to AdamW."""
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Peak learning rate; None takes the trainer's own."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps, in each stage where there are stages, with a linearly rising learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: it falls to 0 linearly or along a cosine, or stays."""
    clip: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    """Norm that gradients are clipped to; None for no clipping."""
    recompute: bool = False
    """Whether layers keep only their inputs and run again in the backward run: less memory for more time, the same
    gradients. In frontier training these are the frozen layers above the frontier."""
    compile: bool = False
    """Whether layers go through `torch.compile`: faster steps on accelerators, after the time that compiling takes."""
    autocast: Literal["model", "bfloat16"] = "model"
    """Mixed precision: `model` uses bfloat16 products for bfloat16 models and full precision for others, `bfloat16`
    uses them for float32 models too. Trainable weights are float32 in every case."""
    guards: Guards = Guards()
    """Limits that training watches."""
    seed: int = 0
    """Seed of the order of the examples, and of the start of adapters."""
    checkpoint_steps: PositiveInt | None = None
    """Steps between two saved states, where checkpoints are kept; None saves by `checkpoint_minutes` alone. The result
    does not depend on it."""
    checkpoint_minutes: float | None = Field(5.0, gt=0, allow_inf_nan=False)
    """Minutes after which a state is saved too, more where saving would take over 3% of the time; None saves none by
    time. With AdamW in float32, a state takes 12 bytes on disk for each number that trains; the last two are kept. The
    result does not depend on it."""

    @property
    def rate(self) -> float:
        """Peak learning rate: `learning_rate`, or the trainer's own where that is None."""
        return self.default_rate if self.learning_rate is None else self.learning_rate

    def total_steps(self, examples: int) -> int:
        """Steps of a training without stages.

        Example:
            >>> JointConfig(passes=3, batch_size=16).total_steps(examples=100)
            19
        """
        return self.steps or math.ceil(self.passes * examples / self.batch_size)

    def without_checkpoints(self: "TrainT") -> "TrainT":
        """The settings with `checkpoint_steps` and `checkpoint_minutes` at their defaults; the result is the same."""
        fields = TrainSettings.model_fields
        return self.model_copy(update={key: fields[key].default for key in ("checkpoint_steps", "checkpoint_minutes")})

    def decisive(self) -> str:
        """JSON of the settings that the result depends on, for fingerprints."""
        guards = self.guards.model_copy(update={"drowned": Guards().drowned})  # only warns
        resolved = self.model_copy(update={"learning_rate": self.rate, "guards": guards})
        return resolved.without_checkpoints().model_dump_json()


class FrontierSettings(Settings):
    """Settings that frontier training alone needs."""

    objective: Annotated[
        SerializeAsAny[Relation | Cosine | Fisher],
        Field(discriminator="kind"),
        WrapValidator(KNOWN_OBJECTIVES.or_foreign),
    ] = Relation()
    """Objective on the frontier layer's residual contribution; also a kind that an installed package brings."""
    divergence: Divergence = "forward"
    """Divergence of the output term: the KL of the source's distribution from the target's; or, for ablation, the
    other way round or their Jensen-Shannon divergence, which need supervision by top entries."""
    weights: LossWeights = LossWeights()
    """Weights of the terms."""
    trainable: Annotated[FullLayer | LoraLayer, Field(discriminator="kind")] = FullLayer()
    """Part of the frontier layer that trains."""
    layers: tuple[int, ...] | None = None
    """Target layers that get a stage, counted from 1, ascending; None for all."""
    train_final_norm: bool = False
    """Whether the final norm trains along in the last layer's stage."""
    shard_frozen: bool = False
    """Whether several processes share the frozen layers among them (FSDP2) instead of each holding all: less memory
    for more traffic."""
    rollback: float | None = Field(None, ge=0)
    """A stage whose loss on held-out rows rises by more than this share is undone; None measures nothing."""


class JointSettings(Settings):
    """Settings that joint training alone needs."""

    trainable: Annotated[FullLayer | LoraLayer, Field(discriminator="kind")] = LoraLayer()
    """Part that trains: adapters in every layer, or every parameter of the model."""


class FrontierConfig(TrainSettings, FrontierSettings):
    """Settings of frontier training."""

    default_rate: ClassVar[float] = 3e-5

    def stages(self, depth: int) -> tuple[int, ...]:
        """The layers that get a stage in a target of some depth, shallow to deep.

        Raises:
            SemalignError: a layer does not exist, `train_final_norm` does not fit the layers, two settings exclude
                each other, or every term has weight 0.
        """
        layers = tuple(range(1, depth + 1)) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= depth:
            raise SemalignError(f"layers are {layers}, expected ascending numbers from 1 to {depth}")
        if self.train_final_norm and layers[-1] != depth:
            raise SemalignError(f"train_final_norm needs a stage of layer {depth}, which layers={layers} leaves out")
        if self.shard_frozen and self.compile:
            raise SemalignError("shard_frozen and compile do not go together: set one of them to false")
        if not (self.weights.geometry or self.weights.needs_output):
            raise SemalignError("every weight of the loss is 0: set one of geometry, output, answer, label above 0")
        return layers

    def stage_steps(self, depth: int, examples: int) -> tuple[int, ...]:
        """Optimiser steps of each stage, in the order of `stages`.

        Stages share the passes as evenly as whole steps allow. The shallower ones get what is left over, and each has
        one step at least.

        Args:
            depth: layers of the target.
            examples: number of examples.

        Raises:
            SemalignError: as `stages`.

        Example:
            >>> FrontierConfig(passes=3, batch_size=16).stage_steps(depth=4, examples=100)
            (5, 5, 5, 4)
            >>> FrontierConfig(layers=(2, 4), steps=10).stage_steps(depth=4, examples=100)
            (10, 10)
        """
        count = len(self.stages(depth))
        if self.steps is not None:
            return (self.steps,) * count
        share, rest = divmod(max(self.total_steps(examples), count), count)
        return tuple(share + (place < rest) for place in range(count))


class JointConfig(TrainSettings, JointSettings):
    """Settings of joint training."""
