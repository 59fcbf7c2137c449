"""ALM: likelihoods of spans of two tokenizers."""

from typing import TYPE_CHECKING, ClassVar, Literal

import semalign_train
from pydantic import Field

from ._joint import JointMethod
from ._method import MethodContext

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from semalign_train import JointLoss


class Alm(JointMethod):
    """Approximate likelihood matching (tokenkit; Minixhofer et al. 2025) on the stored likelihoods; see
    `semalign_train.AlmLoss` for its deviations."""

    stored: ClassVar[bool] = True
    one_tokenizer: ClassVar[bool] = False
    two_tokenizers: ClassVar[bool] = True
    kind: Literal["alm"] = "alm"
    """Chooses this method in a configuration."""
    temperature: float = Field(100.0, gt=0)
    """Divides the log-likelihoods of both models."""
    threshold: float | None = Field(0.1, gt=0, lt=1)
    """Probability of white space above which a chunk of spans ends; null compares span by span."""
    answer: float = Field(0.0, ge=0)
    """Weight of the NLL of the answers."""

    def loss(self, context: MethodContext, view: "DecoderView") -> "JointLoss":
        """Return the divergence of the likelihoods."""
        return semalign_train.AlmLoss(temperature=self.temperature, threshold=self.threshold, answer=self.answer)
