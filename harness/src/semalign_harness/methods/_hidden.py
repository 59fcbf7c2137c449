"""Hidden-state matching as in FitNets and TinyBERT: a learned projection onto the source's stream, and output KL."""

from typing import TYPE_CHECKING, ClassVar, Literal

import semalign_train
from pydantic import Field
from semalign_geometry import Divergence

from ..models.shape import ModelShape
from ._joint import JointMethod
from ._method import LayerUse, MethodContext, MethodNeeds

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from semalign_train import JointLoss


class Hidden(JointMethod):
    """MSE between the source's hidden states and a learned linear map of the target's, at each paired layer, and
    KL(p_S ‖ p_T).

    The source runs beside the target, as its streams are not stored. Source: FitNets (Romero et al. 2015), TinyBERT
    (Jiao et al. 2020).
    """

    stored: ClassVar[bool] = True
    layer_use: ClassVar[LayerUse] = "paired"
    keeps_source: ClassVar[bool] = True
    one_tokenizer: ClassVar[bool] = False
    kind: Literal["hidden"] = "hidden"
    """Chooses this method in a configuration."""
    weight: float = Field(1.0, ge=0)
    """Weight of the MSE, a mean over layers and channels relative to the mean square of the source's states."""
    divergence: Divergence = "forward"
    """Divergence of the two distributions; others than `forward` need supervision by top entries."""

    @property
    def needs_top_entries(self) -> bool:
        """Whether the divergence is not that of `forward`."""
        return self.divergence != "forward"

    def needs(self, source: ModelShape, target: ModelShape, *, rows: int, tokens: int) -> MethodNeeds:
        """Add a projection for each layer of the target."""
        joint = super().needs(source, target, rows=rows, tokens=tokens)
        return joint._replace(trained=joint.trained + target.layers * source.width * target.width)

    def loss(self, context: MethodContext, view: "DecoderView") -> "JointLoss":
        """Return the loss on states and output; its projections train along, and are dropped."""
        pairing, source = context.supervision.manifest.pairing, context.load_source()
        return semalign_train.HiddenLoss(
            source, view, pairing, weight=self.weight, divergence=self.divergence, seed=context.train.seed
        )
