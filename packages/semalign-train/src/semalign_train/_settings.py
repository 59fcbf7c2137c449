"""How the target is trained, and what training reports."""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, SerializeAsAny, WrapValidator
from semalign_align import Cosine, Fisher, Relation
from semalign_geometry import Contract, Divergence, Kinds, SemalignError, Settings

KNOWN_OBJECTIVES = Kinds(
    "semalign.objectives",
    "objective",
    (Relation, Cosine, Fisher),
    needs=("name", "needs_output", "total", "count"),
)
"""The layer objectives that a kind stands for, those of installed packages included."""


Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment."""


class FullLayer(Settings):
    """Every parameter of the frontier layer trains."""

    kind: Literal["full"] = "full"
    """Chooses this in a configuration."""


class LoraLayer(Settings):
    """A low-rank adapter on the frontier layer trains, and is merged when its stage ends."""

    kind: Literal["lora"] = "lora"
    """Chooses this in a configuration."""
    rank: int = Field(16, ge=1)
    """r."""
    alpha: int = Field(32, ge=1)
    """The adapter is scaled by alpha / r."""
    modules: tuple[str, ...] = ("up_proj", "down_proj", "v_proj", "o_proj")
    """Names of the linear modules inside the layer that get an adapter."""


class LossWeights(Settings):
    """Weights of the terms of the loss; a weight of 0 leaves a term out, and layers above the frontier run only where a
    term looks at the output."""

    geometry: float = Field(0.1, ge=0, allow_inf_nan=False)
    """w_geo, of the layer objective; the weight of 1 slowed the fall of the KL on the tiny pair."""
    output: float = Field(1.0, ge=0, allow_inf_nan=False)
    """w_out, of the KL to the source."""
    answer: float = Field(0.0, ge=0, allow_inf_nan=False)
    """w_ce, of the answer NLL."""
    label: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of 1 − cosine of logits and one-hot labels, the second term of v1."""

    @property
    def needs_output(self) -> bool:
        """Whether a term looks at the output, so that layers above the frontier run."""
        return self.output > 0 or self.answer > 0 or self.label > 0


class Guards(Settings):
    """What training watches for."""

    max_skipped: int = Field(3, ge=0)
    """Steps of a stage that may be skipped because the gradient is not finite; one more, or a stage that ends on such
    a step, stops the training."""
    rollback: float | None = Field(None, ge=0)
    """A stage whose loss on held-out rows rises by more than this share is undone; None measures nothing."""
    drowned: float = Field(100.0, gt=1)
    """A warning is logged when the mean gradient norms of two terms in a stage differ by more than this factor."""


class TransferConfig(Contract):
    """Settings of frontier training."""

    objective: Annotated[
        SerializeAsAny[Relation | Cosine | Fisher],
        Field(discriminator="kind"),
        WrapValidator(KNOWN_OBJECTIVES.or_foreign),
    ] = Relation()
    """What the frontier layer's residual contribution is trained to match, and how; also a kind that an installed
    package brings."""
    divergence: Divergence = "forward"
    """What the term of the output is: the KL of the source's distribution from the target's; or, for ablation, the
    other way round or their Jensen-Shannon divergence, which need supervision by top entries."""
    weights: LossWeights = LossWeights()
    """Weights of the terms."""
    trainable: Annotated[FullLayer | LoraLayer, Field(discriminator="kind")] = FullLayer()
    """What of the frontier layer trains."""
    train_final_norm: bool = False
    """Whether the final norm trains along in the last layer's stage."""
    layers: tuple[int, ...] | None = None
    """Target layers that get a stage, counted from 1, ascending; None for all."""
    passes: float = Field(3.0, gt=0, allow_inf_nan=False)
    """Passes over the examples, shared equally by the stages and rounded up to whole steps: every layer trains on its
    share, and training sees as many tokens as that many epochs of joint training."""
    steps: PositiveInt | tuple[PositiveInt, ...] | None = None
    """Steps of each stage, instead of passes: one number for all, or one for each stage."""
    batch_size: int = Field(16, ge=1)
    """Examples in an optimiser step."""
    micro_batch_size: int = Field(8, ge=1)
    """Examples in memory at a time; the result does not depend on it (relation scope `batch` aside)."""
    optimiser: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon, which moves the layers' matrices by their orthogonalised momentum, as far as AdamW would at the
    same rate, and leaves the rest (gains, biases, stacks of experts) to AdamW."""
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of a stage's steps with a linearly rising learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up: fall to 0 linearly or along a cosine, or stay."""
    clip: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    """Norm that gradients are clipped to; None for no clipping."""
    recompute_suffix: bool = False
    """Whether the frozen layers above the frontier keep only their inputs and are run again in the backward run: less
    memory for more time, the same gradients."""
    shard_frozen: bool = False
    """Whether several processes share the frozen layers among them (FSDP2) instead of each holding all: less memory
    for more traffic."""
    compile: bool = False
    """Whether layers go through `torch.compile`: faster steps on accelerators, after the time that compiling takes."""
    autocast: Literal["model", "bfloat16"] = "model"
    """Mixed precision: `model` uses bfloat16 products for bfloat16 models and full precision for others, `bfloat16`
    uses them for float32 models too. Trainable weights are float32 in every case."""
    guards: Guards = Guards()
    """What training watches for."""
    seed: int = 0
    """Seed of the order of the examples, and of where adapters start."""
    checkpoint_steps: PositiveInt | None = None
    """Steps between two saved states within a stage, or of a method without stages, where checkpoints are kept; None
    saves by `checkpoint_minutes` alone. The result does not depend on it."""
    checkpoint_minutes: float | None = Field(5.0, gt=0, allow_inf_nan=False)
    """Minutes after which a state is saved too, more where saving would take over 3% of the time; None saves none by
    time. With AdamW in float32, a state takes 12 bytes on disk for each number that trains; the last two are kept. The
    result does not depend on it."""

    def without_checkpoints(self) -> "TransferConfig":
        """The settings that the result depends on: those that say when states are saved at their defaults."""
        fields = type(self).model_fields
        return self.model_copy(update={key: fields[key].default for key in ("checkpoint_steps", "checkpoint_minutes")})

    def decisive(self) -> str:
        """JSON of the settings that the result depends on, for fingerprints.

        `checkpoint_minutes` is younger than kept fingerprints, and left out.
        """
        return self.without_checkpoints().model_dump_json(exclude={"checkpoint_minutes"})

    def stages(self, depth: int) -> tuple[int, ...]:
        """The layers that get a stage in a target of some depth, shallow to deep.

        Raises:
            SemalignError: a layer does not exist, `steps` or `train_final_norm` do not fit the layers, two settings
                exclude each other, or every term has weight 0.
        """
        layers = tuple(range(1, depth + 1)) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= depth:
            raise SemalignError(f"layers are {layers}, expected ascending numbers from 1 to {depth}")
        if self.train_final_norm and layers[-1] != depth:
            raise SemalignError(f"train_final_norm needs a stage of layer {depth}, which layers={layers} leaves out")
        if isinstance(self.steps, tuple) and len(self.steps) != len(layers):
            raise SemalignError(f"steps names {len(self.steps)} stages, there are {len(layers)}")
        if self.shard_frozen and self.compile:
            raise SemalignError("shard_frozen and compile do not go together: set one of them to false")
        if not (self.weights.geometry or self.weights.needs_output):
            raise SemalignError("every weight of the loss is 0: set one of geometry, output, answer, label above 0")
        return layers

    def stage_steps(self, depth: int, examples: int) -> tuple[int, ...]:
        """Optimiser steps of each stage, in the order of `stages`; passes are shared equally by the stages.

        Args:
            depth: layers of the target.
            examples: how many there are to train on.

        Raises:
            SemalignError: as `stages`.

        Example:
            >>> TransferConfig(passes=3, batch_size=16).stage_steps(depth=4, examples=100)
            (5, 5, 5, 5)
            >>> TransferConfig(layers=(2, 4), steps=(10, 20)).stage_steps(depth=4, examples=100)
            (10, 20)
        """
        layers = self.stages(depth)
        if isinstance(self.steps, tuple):
            return self.steps
        steps = self.steps or math.ceil(self.passes * examples / (self.batch_size * len(layers)))
        return (steps,) * len(layers)


class StepRecord(Settings):
    """One optimiser step."""

    layer: int
    """Frontier layer, counted from 1."""
    step: int
    """Step within the stage, counted from 1."""
    steps: int
    """Steps of the stage."""
    losses: dict[str, float]
    """Mean of each term over the optimisation batch: unweighted, but with its weight where all layers train at
    once."""
    gradient_norms: dict[str, float]
    """Norm of each term's weighted gradient."""
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
    """A finished transfer."""

    config: TransferConfig
    """Settings that it ran with."""
    stages: tuple[StageRecord, ...]
    """Its stages, shallow to deep."""
    supervised_tokens: int
    """Supervised tokens seen by the trainable part, over all stages."""
    seconds: float
    """Wall time."""
