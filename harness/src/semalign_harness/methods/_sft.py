"""Supervised fine-tuning."""

from typing import TYPE_CHECKING, ClassVar, Literal

import semalign_train

from ._joint import JointMethod
from ._method import MethodContext

if TYPE_CHECKING:
    from semalign_attribution import DecoderView
    from semalign_train import JointLoss


class Sft(JointMethod):
    """Supervised fine-tuning: the NLL of the answers."""

    one_tokenizer: ClassVar[bool] = False
    kind: Literal["sft"] = "sft"
    """Chooses this method in a configuration."""

    def loss(self, context: MethodContext, view: "DecoderView") -> "JointLoss":
        """Return the NLL of the answers."""
        return semalign_train.AnswerLoss()
