"""GOLD: equal entries of two vocabularies by a divergence, the others by rank."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import semalign_train
from pydantic import Field

from ._joint import JointMethod
from ._method import MethodContext

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from semalign_train import JointLoss

Weight = Annotated[float, Field(ge=0)]


class Gold(JointMethod):
    """The hybrid loss of GOLD (TRL), after ULD (Boizard et al. 2024), on the answers of the rows; see
    `semalign_train.GoldLoss` for its deviations.

    The source runs beside the target, as distributions over its whole vocabulary are not stored.
    """

    stored: ClassVar[bool] = True
    keeps_source: ClassVar[bool] = True
    one_tokenizer: ClassVar[bool] = False
    kind: Literal["gold"] = "gold"
    """Chooses this method in a configuration."""
    beta: float = Field(0.5, ge=0, le=1)
    """Share of the source in the mixture of the generalised Jensen-Shannon divergence of equal entries; 0 is
    KL(p_S ‖ p_T), 1 is KL(p_T ‖ p_S)."""
    weights: tuple[Weight, Weight] | None = None
    """Weights of the equal entries and of all others; null takes the share of the source's entries that are equal, and
    the rest."""
    merge: Literal["observed", "bayesian"] = "observed"
    """Distribution of a span of several tokens: that at its first token times the probabilities of the later ones, or
    that at its last token times those of the earlier ones."""
    answer: Weight = 0.0
    """Weight of the NLL of the answers."""

    def loss(self, context: MethodContext, view: "DecoderView") -> "JointLoss":
        """Return the hybrid loss."""
        source = context.load_source()
        return semalign_train.GoldLoss(
            source, beta=self.beta, weights=self.weights, merge=self.merge, answer=self.answer
        )
