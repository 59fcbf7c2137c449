"""Knowledge distillation."""

from typing import TYPE_CHECKING, ClassVar, Literal

import semalign_train
from pydantic import Field
from semalign_geometry import Divergence

from ._joint import JointMethod
from ._method import MethodContext

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from semalign_train import JointLoss


class Kd(JointMethod):
    """Knowledge distillation: KL(p_S ‖ p_T) on the stored supervision, mixed with the NLL of the answers.

    Where the tokenizers differ, the KL is of prefix classes, and the likelihoods of spans of several tokens are matched
    beside it.
    """

    stored: ClassVar[bool] = True
    one_tokenizer: ClassVar[bool] = False
    kind: Literal["kd"] = "kd"
    """Chooses this method in a configuration."""
    answer: float = Field(0.0, ge=0, le=1)
    """Share of the NLL of the answers in the loss. The KL has no factor temperature²: at a `supervision.temperature` of
    T its gradient is about 1/T² of that at 1, so above 1 the answers weigh more than this share."""
    divergence: Divergence = "forward"
    """Divergence of the two distributions; others than `forward` need supervision by top entries."""
    span: float = Field(1.0, ge=0)
    """Weight of the likelihoods of spans of several tokens, relative to the KL; ignored with one tokenizer."""

    @property
    def needs_top_entries(self) -> bool:
        """Whether the divergence is not that of `forward`."""
        return self.divergence != "forward"

    def loss(self, context: MethodContext, view: "DecoderView") -> "JointLoss":
        """Return the divergence from the source's output, mixed with the NLL of the answers."""
        return semalign_train.OutputLoss(answer=self.answer, divergence=self.divergence, span=self.span)
