"""SemAlign: frontier training, layer by layer, on the stored supervision."""

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import semalign_align
import semalign_attribution
import semalign_train
from pydantic import model_validator
from semalign_attribution import LayerScores
from semalign_geometry.base import SemalignError
from semalign_train import (
    KNOWN_OBJECTIVES,
    FrontierConfig,
    FrontierSettings,
    LoraLayer,
    TrainSettings,
    TransferReport,
)

from ..models.shape import ModelShape
from ._method import (
    LayerUse,
    Method,
    MethodContext,
    MethodNeeds,
    MethodReport,
    Work,
    adapter_parameters,
    check_adapters,
)

if TYPE_CHECKING:
    from semalign_align import SupervisionSource


class SemAlign(FrontierSettings, Method):
    """Frontier training."""

    stored: ClassVar[bool] = True
    layer_use: ClassVar[LayerUse] = "transported"
    one_tokenizer: ClassVar[bool] = False
    kind: Literal["semalign"] = "semalign"
    """Chooses this method in a configuration."""
    critical_layer_only: bool = False
    """Whether only the first target layer that is paired with the best-scored source layer, or a deeper one, trains,
    as in v1; it gets the steps of all."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "SemAlign":
        if self.critical_layer_only and self.train_final_norm:
            raise ValueError(
                "train_final_norm needs a stage of the last layer, which critical_layer_only may leave out: set one of "
                "them to false"
            )
        if self.divergence != "forward" and self.rollback is not None:
            raise ValueError(
                f"divergence={self.divergence} has no value on held-out rows, whose output is kept whole: set "
                "rollback=null, or divergence=forward"
            )
        return self

    @property
    def default_rate(self) -> float:
        """Peak learning rate where `train.learning_rate` is null."""
        return 3e-5

    @property
    def needs_top_entries(self) -> bool:
        """Whether the divergence is not that of `forward`."""
        return self.divergence != "forward"

    def config(self, train: TrainSettings) -> FrontierConfig:
        """Return the settings of the trainer."""
        own = {name: getattr(self, name) for name in FrontierSettings.model_fields}
        rate = train.learning_rate or self.default_rate
        return FrontierConfig(**{**dict(train), **own, "learning_rate": rate})

    def check(self, source: ModelShape, target: ModelShape, train: TrainSettings, *, reference_width: int) -> None:
        """Check layers, adapters and objective."""
        self.config(train).stages(target.layers)
        if isinstance(self.trainable, LoraLayer):
            check_adapters(self.trainable, target)
        if not self.weights.geometry:
            return
        if type(self.objective) not in KNOWN_OBJECTIVES.built_in.values():
            semalign_align.check_objective(self.objective, width=target.width, reference_width=reference_width)
        if getattr(self.objective, "compares_vectors", False) and reference_width != target.width:
            raise SemalignError(
                f"the {self.objective.name} objective compares vectors of one width, the source has {reference_width} "
                f"and the target {target.width}: set transport.frame to a frame, or method.objective.kind=relation"
            )

    def work(self, train: TrainSettings, depth: int, rows: int) -> Work:
        """Return the amount of training in all stages."""
        steps = sum(self.config(train).stage_steps(depth, rows))
        return Work(steps, steps * train.batch_size)

    def needs(self, source: ModelShape, target: ModelShape, *, rows: int, tokens: int) -> MethodNeeds:
        """Return the needs of the largest stage; on disk, the inputs of the frontier layer and the trained stages."""
        weights, trainable = self.weights, self.trainable
        terms = sum(weight > 0 for weight in (weights.geometry, weights.output, weights.answer, weights.label))
        return MethodNeeds(
            trained=adapter_parameters(trainable, target)
            if isinstance(trainable, LoraLayer)
            else target.layer_parameters,
            gradients=terms + 1,
            scratch=tokens * target.width + target.layers * target.layer_parameters,
        )

    def foreign_code(self) -> dict[str, str]:
        """Return the hash of the objective's code."""
        return KNOWN_OBJECTIVES.code(type(self.objective))

    def foreign_packages(self) -> dict[str, str]:
        """Return the version of the objective's package."""
        return KNOWN_OBJECTIVES.packages(self.objective.kind)

    def run(self, context: MethodContext) -> MethodReport:
        """Run every stage, or resume an interrupted run."""
        config, depth = self.config(context.train), semalign_attribution.DecoderView(context.target).depth
        if self.critical_layer_only:
            layer = _critical_layer(context.folder, context.supervision)
            steps = sum(config.stage_steps(depth, len(context.rows)))
            config = config.model_copy(update={"layers": (layer,), "steps": steps})
        report = _train(context, config)
        return MethodReport(
            method=self.kind,
            trained_parameters=sum(stage.trainable_parameters for stage in report.stages),
            steps=sum(stage.steps for stage in report.stages),
            supervised_tokens=report.supervised_tokens,
            seconds=report.seconds,
            transfer=report,
        )


def _critical_layer(folder: Path, supervision: "SupervisionSource") -> int:
    scores = LayerScores.read(folder / "attribution.json").mean
    critical = max(range(len(scores)), key=scores.__getitem__) + 1
    layers = supervision.manifest.pairing.source_layers
    return next((number for number, layer in enumerate(layers, 1) if layer >= critical), len(layers))


def _train(context: MethodContext, config: FrontierConfig) -> TransferReport:
    ranks, place = semalign_align.Ranks.current(), tempfile.TemporaryDirectory
    with contextlib.ExitStack() as stack:
        scratch = ranks.broadcast_from_first(lambda: stack.enter_context(place(dir=context.folder, prefix=".scratch-")))
        report = semalign_train.FrontierTrainer(
            context.target,
            context.supervision,
            config,
            scratch=Path(scratch),
            held_out=context.held_out,
            checkpoints=context.checkpoints,
            callback=context.callback,
        ).fit()
    if ranks.is_first:
        report.write(context.folder / "transfer.json")
    return report
