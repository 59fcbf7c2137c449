"""Base of the methods that train all layers at once: their settings and their loss."""

from typing import TYPE_CHECKING, Any

import semalign_attribution
import semalign_train
from semalign_train import FullLayer, JointConfig, JointSettings, TrainSettings

from ..models.shape import ModelShape
from ._method import Method, MethodContext, MethodNeeds, MethodReport, adapter_parameters, check_adapters

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from semalign_train import JointLoss


class JointMethod(JointSettings, Method):
    """A method that trains all layers at once. A method derives from this class and overrides `loss`."""

    @property
    def default_rate(self) -> float:
        """Peak learning rate where `train.learning_rate` is null: lower where every parameter trains."""
        return 3e-5 if isinstance(self.trainable, FullLayer) else 1e-4

    def check(self, source: ModelShape, target: ModelShape, train: TrainSettings, *, reference_width: int) -> None:
        """Check that the target has the modules that adapters name."""
        if not isinstance(self.trainable, FullLayer):
            check_adapters(self.trainable, target)

    def needs(self, source: ModelShape, target: ModelShape, *, rows: int, tokens: int) -> MethodNeeds:
        """Return the needs of a training of every parameter, or of adapters in every layer."""
        if isinstance(self.trainable, FullLayer):
            return MethodNeeds(trained=target.parameters)
        return MethodNeeds(trained=target.layers * adapter_parameters(self.trainable, target))

    def loss(self, context: MethodContext, view: "DecoderView") -> "JointLoss":
        """Return the loss of a run; `view` is the target's."""
        raise NotImplementedError

    def run(self, context: MethodContext) -> MethodReport:
        """Train all layers on the loss."""
        view = semalign_attribution.DecoderView(context.target)
        return self.train(context, view, self.loss(context, view))

    def train(self, context: MethodContext, view: "DecoderView", loss: "JointLoss", **given: Any) -> MethodReport:
        """Minimise a loss; `given` are further arguments of the trainer."""
        steps = self.work(context.train, view.depth, len(context.rows)).steps
        shared = {**dict(context.train), "learning_rate": context.train.learning_rate or self.default_rate}
        config = JointConfig(**{**shared, "steps": steps, "trainable": self.trainable})
        trainer = semalign_train.JointTrainer(
            view,
            context.supervision,
            config,
            loss=loss,
            checkpoints=context.checkpoints,
            callback=context.callback,
            **given,
        )
        return MethodReport.of(self.kind, trainer.fit())
