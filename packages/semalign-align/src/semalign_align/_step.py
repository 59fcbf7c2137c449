"""One micro-batch as the terms of the loss read it."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from semalign_geometry import Head, OutputHead
from torch import Tensor

from ._spans import BatchSpans
from ._supervision import OutputTarget


@dataclass(frozen=True, eq=False)
class Step:
    """One micro-batch after its forward run, as objectives read it."""

    residual: Float[Tensor, "b m t"]
    """Residual contribution of the frontier layer at the start of each span, padded."""
    reference: Float[Tensor, "b m r"]
    """Supervisory residual y_k at the same places."""
    mask: Bool[Tensor, "b m"]
    """Which places are real."""
    hidden: Float[Tensor, "p t"] | None
    """Input of the target's head at the positions that predict the answer tokens; None when no objective needs it."""
    labels: Int[Tensor, " p"]
    """The answer tokens."""
    output: OutputTarget
    """The source's output distribution at the start of each span."""
    head: Head
    """The target's head over its whole vocabulary."""
    shared_head: OutputHead
    """The target's head over the entries or classes that `output` is over."""
    temperature: float
    """Divides the logits of both models in `output`."""
    spans: BatchSpans | None = None
    """Spans of two tokenizers; None with one, where every answer token is a span."""

    @property
    def span_hidden(self) -> Float[Tensor, "s t"]:
        """`hidden` at the start of each span."""
        assert self.hidden is not None
        return self.hidden if self.spans is None else self.hidden[self.spans.starts]
