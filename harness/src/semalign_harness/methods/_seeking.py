"""Seeking: low-rank adapters that start at the source's weights."""

import time
from typing import ClassVar, Literal

import semalign_align
import semalign_attribution
import semalign_train
from semalign_geometry.base import SemalignError
from semalign_train import TrainSettings

from ..models.shape import ModelShape
from ._joint import JointMethod
from ._method import MethodContext, MethodNeeds, MethodReport
from .baselines.seeking_settings import SoughtLora


class Seeking(JointMethod):
    """Low-rank adapters that start at the source's weights, trained on the NLL of the answers.

    The source's layers and windows of their matrices are chosen by their sensitivity on the attribution rows. The
    start of an adapter is taken out of the weight under it, so that the target starts as it was (weights narrower
    than float32 are rounded once more). Embeddings and head stay as they are, so that the vocabularies may differ; each
    model reads the rows by its own tokenizer. The paper trains with a learning rate of 3e-4, a warm-up of 0.03, a
    linear schedule, three passes and batches of 64. Source: Zhong et al., ICLR 2024, "Seeking Neural Nuggets".
    """

    one_tokenizer: ClassVar[bool] = False
    kind: Literal["seeking"] = "seeking"
    """Chooses this method in a configuration."""
    trainable: SoughtLora = SoughtLora()
    """The adapters, in every layer."""

    def check(self, source: ModelShape, target: ModelShape, train: TrainSettings, *, reference_width: int) -> None:
        """Check that the layers of both models have modules of one name."""
        super().check(source, target, train, reference_width=reference_width)
        if source.linear_features.keys().isdisjoint(target.linear_features):
            raise SemalignError(
                "the layers of source and target have no linear modules named alike, which method.kind=seeking needs: "
                "choose models of one family, or another method"
            )

    def needs(self, source: ModelShape, target: ModelShape, *, rows: int, tokens: int) -> MethodNeeds:
        """Add the score of every weight of the source's layers."""
        joint = super().needs(source, target, rows=rows, tokens=tokens)
        return joint._replace(beside_source=source.layers * source.layer_parameters)

    def run(self, context: MethodContext) -> MethodReport:
        """Seek in the source, let go of it, and train all layers on the answers; `seconds` counts both."""
        from .baselines.seeking import dropping, injected, sought  # with torch

        began = time.perf_counter()
        view, seed = semalign_attribution.DecoderView(context.target), context.train.seed
        ranks = semalign_align.Ranks.current()
        nuggets = ranks.broadcast_from_first(lambda: sought(context, view, self.trainable))
        with (
            injected(view, nuggets, self.trainable, seed=seed) as found,
            dropping(view.layers, view.device, seed=seed),
        ):
            seconds = time.perf_counter() - began
            report = self.train(context, view, semalign_train.AnswerLoss(), parameters=found)
        return report.model_copy(update={"seconds": seconds + report.seconds})
