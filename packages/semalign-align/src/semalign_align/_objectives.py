"""Terms of the loss: objectives on the residual contribution of a layer, and on the model's output.

Every objective returns a sum and the number of its units (spans or sequences), so that the trainer can divide by the
count of the whole optimisation batch: the mean does not depend on how the batch is split. With one tokenizer every
answer token is a span. With two, sums over answer tokens are divided by spans too: these cover the same text on both
sides, so that the numbers of both models compare.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import semalign_geometry as geometry  # its maths, with torch, is imported when it is used
from pydantic import Field
from semalign_geometry import Divergence
from semalign_geometry.base import SemalignError, Settings

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from semalign_geometry import Head, OutputHead
    from torch import Tensor

    from ._spans import BatchSpans
    from ._step import Step
    from ._supervision import OutputTarget


@runtime_checkable
class Objective(Protocol):
    """One term of the loss."""

    @property
    def name(self) -> str:
        """Name of the term in results."""
        ...

    @property
    def needs_output(self) -> bool:
        """Whether the forward run must reach the head."""
        ...

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the units of a micro-batch."""
        ...

    def count(self, counts: "Int[Tensor, ' b']") -> int:
        """Units in examples with these numbers of spans."""
        ...


class _Term(Settings):
    """A mean over spans."""

    def count(self, counts: "Int[Tensor, ' b']") -> int:
        """Spans."""
        return int(counts.sum())


class _LayerObjective(_Term):
    compares_vectors: ClassVar[bool] = False
    """Whether source and target must have one width, by a transport or as they are."""
    kind: str

    @property
    def name(self) -> str:
        """The kind."""
        return self.kind

    @property
    def needs_output(self) -> bool:
        """Objectives on a layer stop the forward run there."""
        return False


class Relation(_LayerObjective):
    """Distance of centred token-token relations, 1 − CKA, at the starts of the spans; the prompt's own are ignored.

    Source: v2, reading (method 2.4).
    """

    kind: Literal["relation"] = "relation"
    """Chooses this objective in a configuration."""

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the sequences with three spans or more."""
        distances, counted = geometry.relation_distances(step.residual, step.reference, mask=step.mask)
        return (distances * counted).sum()

    def count(self, counts: "Int[Tensor, ' b']") -> int:
        """Sequences with three spans or more, as all relations of two are equal."""
        return int((counts >= geometry.LEAST_TOKENS).sum())


class Cosine(_LayerObjective):
    """1 − cosine of the residual contribution and the supervisory one; 1 where either is zero, with a finite gradient.

    Source: v1 (method 2.7), its first term; the second is `LabelCosine`.
    """

    compares_vectors: ClassVar[bool] = True
    kind: Literal["cosine"] = "cosine"
    """Chooses this objective in a configuration."""

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the spans."""
        target, reference = _at_target_width(step, self.kind)
        return (1 - (geometry.unit_rows(target) * geometry.unit_rows(reference)).sum(-1)).sum()


class Fisher(_LayerObjective):
    """Fisher-weighted quadratic of the lens logits of both contributions; over the target's whole vocabulary where the
    output is over classes of two.

    Source: ACL (method 2.7). Deviation: the output KL is a term of every stage, not of the last layer's alone.
    """

    compares_vectors: ClassVar[bool] = True
    kind: Literal["fisher"] = "fisher"
    """Chooses this objective in a configuration."""

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the spans."""
        target, reference = _at_target_width(step, self.kind)
        lens = step.shared_head if isinstance(step.shared_head, geometry.Head) else step.head
        return geometry.quadratic_divergence(target, reference, lens).sum()


class _OutputTerm(_Term):
    @property
    def needs_output(self) -> bool:
        """Terms of the output need all layers above the frontier."""
        return True


class OutputKL(_OutputTerm):
    """KL(p_S ‖ p_T) at the start of each span: exact on final hidden states, a lower bound on top entries. Method
    2.5."""

    divergence: Divergence = "forward"
    """Which divergence; on final hidden states the forward KL alone."""

    @property
    def name(self) -> str:
        """`output`."""
        return "output"

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the spans, in nats."""
        return self.of(step.output, step.span_hidden, step.shared_head, step.temperature).sum()

    def of(
        self, source: "OutputTarget", hidden: "Float[Tensor, 's t']", head: "OutputHead", temperature: float
    ) -> "Float[Tensor, ' s']":
        """Each span's value, in nats.

        Args:
            source: the source's output distribution.
            hidden: inputs of the target's head at the same places.
            head: the target's head over the entries or classes that `source` is over.
            temperature: divides the logits of both.

        Raises:
            SemalignError: another divergence than `forward` on final hidden states.
        """
        from ._supervision import FinalStates

        if isinstance(source, geometry.TopEntries):
            return geometry.top_k_divergence(source, hidden, head, temperature=temperature, kind=self.divergence)
        assert isinstance(source, FinalStates)
        if self.divergence != "forward":
            raise SemalignError(
                f"on final hidden states there is no {self.divergence} divergence: supervise by top entries "
                "(output=TopK()), or set divergence=forward"
            )
        return geometry.kl_divergence(source.hidden, source.head, hidden, head, temperature=temperature)


class SpanLikelihood(_OutputTerm):
    """Binary KL between source and target of each span with several tokens on a side: this span or any other text.

    Inside such a span the distributions at its start only say how it begins. Spans of one token on both sides are left
    out, as `OutputKL` knows more of them; without spans the term is 0. Source: ALM (arXiv 2503.20083); deviation: those
    spans alone.
    """

    temperature: float = Field(1.0, gt=0)
    """Divides the log-likelihoods of both models."""

    @property
    def name(self) -> str:
        """`span`."""
        return "span"

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the spans with several tokens, in nats."""
        assert step.hidden is not None
        if step.spans is None:
            return step.hidden[:0].sum()
        return self.of(step.spans, step.hidden, step.head, step.labels).sum()

    def of(
        self, spans: "BatchSpans", hidden: "Float[Tensor, 'p t']", head: "Head", labels: "Int[Tensor, ' p']"
    ) -> "Float[Tensor, ' m']":
        """The value of each span with several tokens, in nats.

        Args:
            spans: of a micro-batch.
            hidden: inputs of the target's head at the positions that predict its answer tokens.
            head: the target's head.
            labels: the answer tokens.
        """
        from ._spans import sums_within

        chosen = spans.several
        tokens = chosen.repeat_interleave(spans.lengths, output_size=len(labels))
        likelihood = sums_within(-geometry.answer_nll(hidden[tokens], head, labels[tokens]), spans.lengths[chosen])
        return geometry.span_divergence(spans.log_likelihood[chosen], likelihood, temperature=self.temperature)


class AnswerNLL(_OutputTerm):
    """Negative log-likelihood of the answer tokens."""

    @property
    def name(self) -> str:
        """`answer`."""
        return "answer"

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the answer tokens, in nats."""
        assert step.hidden is not None
        return geometry.answer_nll(step.hidden, step.head, step.labels).sum()


class LabelCosine(_OutputTerm):
    """1 − cosine of the target's logits and the one-hot answer token: −z_y/‖z‖, up to the constant.

    All logits of a micro-batch are in memory at once. Source: v1 (method 2.7), its second term.
    """

    @property
    def name(self) -> str:
        """`label`."""
        return "label"

    def total(self, step: "Step") -> "Float[Tensor, '']":
        """Sum over the answer tokens."""
        assert step.hidden is not None
        logits = step.head.logits(step.hidden)
        cosines: Tensor = logits.gather(1, step.labels[:, None])[:, 0] / logits.norm(dim=1).clamp_min(1e-12)
        return (1 - cosines).sum()


def _at_target_width(step: "Step", kind: str) -> "tuple[Tensor, Tensor]":
    """Both sides at the real places, (p, d_T)."""
    if step.residual.shape[-1] != step.reference.shape[-1]:
        raise SemalignError(
            f"the {kind} objective compares vectors of one width, the supervision has "
            f"{step.reference.shape[-1]} and the "
            f"target {step.residual.shape[-1]}: use a transport with a frame, or the relation objective"
        )
    return step.residual[step.mask], step.reference[step.mask].to(step.residual.dtype)
