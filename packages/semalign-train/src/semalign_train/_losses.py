"""Losses of joint training: of the answers, of the source's output, of its hidden states; and the base of your own."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import TypeAdapter
from semalign_align import (
    BatchSpans,
    OutputKL,
    OutputTarget,
    SpanLikelihood,
    SupervisedBatch,
    SupervisionSource,
    span_log_likelihoods,
)
from semalign_attribution import DecoderView, LayerPairing, Supervised, Trace, undisturbed, view_of
from semalign_geometry import (
    Divergence,
    Head,
    OutputHead,
    TopEntries,
    answer_nll,
    categorical_divergence,
    span_divergence,
)
from semalign_geometry.base import ComponentError, SemalignError, brief
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class JointStep:
    """One micro-batch after the target's forward run: everything that a loss may read.

    Numbers at *answer tokens* stand where the token is predicted. The source's output stands at the starts of *spans*,
    where both models have read the same text; with one tokenizer every answer token is a span.
    """

    view: DecoderView
    """The target."""
    trace: Trace
    """The streams around the layers of the loss, and the final states."""
    data: SupervisedBatch
    """The examples with the source's output."""
    supervision: SupervisionSource
    """The supervision that they are from."""

    @property
    def temperature(self) -> float:
        """Divides the logits of both models in the output."""
        return self.supervision.manifest.settings.temperature

    @property
    def hidden(self) -> Float[Tensor, "p t"]:
        """Input of the target's head at the answer tokens."""
        assert self.trace.final is not None
        return self.trace.final[self.data.positions.mask]

    @property
    def labels(self) -> Int[Tensor, " p"]:
        """The answer tokens."""
        return self.data.positions.labels

    @property
    def spans(self) -> BatchSpans | None:
        """Spans of two tokenizers; None with one."""
        return self.data.spans

    @property
    def span_hidden(self) -> Float[Tensor, "s t"]:
        """`hidden` at the starts of the spans."""
        return self.data.at_spans(self.hidden)

    @property
    def output(self) -> OutputTarget:
        """The source's output distribution at the starts of the spans."""
        return self.data.output

    @property
    def head(self) -> Head:
        """The target's head with the parameters themselves, which may train."""
        module = self.view.model.get_output_embeddings()
        assert module is not None
        return replace(self.view.head, weight=module.weight, bias=getattr(module, "bias", None))

    @property
    def shared_head(self) -> OutputHead:
        """`head` over the entries or classes that `output` is over."""
        return self.supervision.output_head(self.head)

    def stream(self, layer: int) -> Float[Tensor, "p t"]:
        """Residual stream after a layer at the answer tokens; the loss names the layer in `layers`."""
        return self.trace.outputs[layer][self.data.positions.mask]


@runtime_checkable
class JointLoss(Protocol):
    """A loss on all layers at once. A class that derives from it needs `terms` alone.

    Its public attributes are its settings: a training with checkpoints resumes only where they are the same.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Confidence(JointLoss):
        ...     '''The answer NLL, and a penalty on the entropy of the target's output.'''
        ...     penalty: float = 0.1
        ...     def terms(self, step):
        ...         log_q = step.head.logits(step.hidden).log_softmax(1)
        ...         answer = -log_q.gather(1, step.labels[:, None]).sum()
        ...         return {"answer": answer, "entropy": -self.penalty * (log_q.exp() * log_q).sum()}
        >>> Confidence(penalty=0.5)
        Confidence(penalty=0.5)
    """

    @property
    def layers(self) -> Collection[int]:
        """Target layers whose streams `terms` reads, counted from 1."""
        return ()

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Parameters of its own, which train along."""
        return ()

    def terms(self, step: JointStep) -> Mapping[str, Float[Tensor, ""]]:
        """Each term by its name, with its weight, summed over the answer tokens or the spans of a micro-batch; the
        trainer divides the sums by the number of spans."""
        ...


@dataclass(frozen=True)
class AnswerLoss(JointLoss):
    """Supervised fine-tuning: the negative log-likelihood of the answer tokens, in nats."""

    def terms(self, step: JointStep) -> Mapping[str, Float[Tensor, ""]]:
        """`answer`."""
        return {"answer": answer_sum(step)}


@dataclass(frozen=True)
class OutputLoss(JointLoss):
    """Knowledge distillation: KL(p_S ‖ p_T) at the starts of the spans, mixed with the NLL of the answers.

    With two tokenizers the distributions are over prefix classes, and a second term matches the likelihoods of spans
    with several tokens (`SpanLikelihood`). The KL is a lower bound where the source's top entries were stored. It has
    no factor temperature²: at a temperature of T its gradient is about 1/T² of that at 1, so above 1 the answers weigh
    more than their share.
    """

    answer: float = 0.0
    """Share of the NLL of the answers in the loss, 0 to 1."""
    divergence: Divergence = "forward"
    """Which divergence; others than `forward` need supervision by top entries."""
    span: float = 1.0
    """Weight of the likelihoods of spans, relative to the KL; ignored with one tokenizer."""

    def terms(self, step: JointStep) -> Mapping[str, Float[Tensor, ""]]:
        """`output`, `span` with two tokenizers, and `answer` where it has a share."""
        terms = {"output": (1 - self.answer) * _output(step, self.divergence)}
        if self.span and step.spans is not None:
            terms["span"] = (1 - self.answer) * self.span * _span(step, step.spans)
        if self.answer:
            terms["answer"] = self.answer * answer_sum(step)
        return terms


class HiddenLoss(JointLoss):
    """MSE between the source's hidden states and a learned linear map of the target's, at each paired layer, and
    KL(p_S ‖ p_T).

    The source runs beside the target, as its streams are not stored. States are compared at the starts of the spans,
    and with two tokenizers the likelihoods of spans are matched too, as by `OutputLoss`. Source: FitNets (Romero et al. 2015), TinyBERT
    (Jiao et al. 2020).
    """

    def __init__(
        self,
        source: PreTrainedModel | DecoderView,
        target: PreTrainedModel | DecoderView,
        pairing: LayerPairing,
        *,
        weight: float = 1.0,
        divergence: Divergence = "forward",
        seed: int = 0,
    ) -> None:
        """Draw the projections.

        Args:
            source: the source, which is left as it was.
            target: the target.
            pairing: the source layer of each target layer.
            weight: of the MSE, which is a mean over layers and channels relative to the mean square of the source's
                states.
            divergence: of the output.
            seed: of the projections' start.

        Raises:
            SemalignError: the pairing is for other depths.
        """
        self.weight, self.divergence = weight, divergence
        self._source, self._pairing, view = view_of(source), pairing, view_of(target)
        depths, paired = (self._source.depth, view.depth), (pairing.source_depth, pairing.target_depth)
        if depths != paired:
            raise SemalignError(
                f"source and target have {depths[0]} and {depths[1]} layers, the pairing is for {paired[0]} and "
                f"{paired[1]}: pair again"
            )
        generator = torch.Generator().manual_seed(seed)
        shape, scale = (self._source.width, view.width), view.width**-0.5
        self._projections = [
            nn.Parameter((torch.randn(shape, generator=generator) * scale).to(view.device)) for _ in range(view.depth)
        ]

    @property
    def layers(self) -> Collection[int]:
        """All layers of the target."""
        return range(1, len(self._projections) + 1)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """A projection for each target layer, of shape (d_S, d_T)."""
        return self._projections

    def terms(self, step: JointStep) -> Mapping[str, Float[Tensor, ""]]:
        """`output`, `span` with two tokenizers, and `hidden` with its weight."""
        theirs, positions = run_source(self._source, step, keep=set(self._pairing.source_layers))
        mask, spans, device = positions.mask.to(self._source.device), step.spans, step.view.device
        matched = torch.zeros((), device=device)
        for layer, projection in enumerate(self._projections, 1):
            wanted = theirs.outputs[self._pairing.source_of(layer)][mask].to(device).float()
            wanted = wanted if spans is None else wanted[spans.source_starts]
            states = step.data.at_spans(step.stream(layer)).float() @ projection.T
            # Relative, as a few channels of a stream are hundreds of times larger than the rest.
            matched = matched + (states - wanted).square().sum(1).div(wanted.square().sum(1)).sum()
        return {
            **OutputLoss(divergence=self.divergence).terms(step),
            "hidden": self.weight * matched / len(self._projections),
        }


def terms_of(loss: JointLoss, step: JointStep) -> dict[str, Tensor]:
    """The terms of a loss; those of another author are checked.

    Raises:
        ComponentError: they are not numbers with a gradient.
    """
    terms: Any = loss.terms(step)
    named = isinstance(terms, Mapping) and bool(terms)
    if not named or not all(isinstance(value, Tensor) and value.dim() == 0 for value in terms.values()):
        raise ComponentError(
            f"the loss {type(loss).__name__} returned {brief(terms)} from terms: expected a mapping of names to sums "
            "over the supervised tokens, each a tensor without dimensions"
        )
    if not any(value.requires_grad for value in terms.values()):
        raise ComponentError(
            f"the loss {type(loss).__name__} returned terms without a gradient: compute them from step.hidden or "
            "step.stream"
        )
    return dict(terms)


def settings_of(loss: JointLoss) -> str:
    """Name and public attributes of a loss, for fingerprints.

    Raises:
        SemalignError: an attribute cannot be written as JSON.
    """
    public = {name: value for name, value in vars(loss).items() if not name.startswith("_")}
    try:
        return f"{type(loss).__qualname__} {TypeAdapter(dict[str, Any]).dump_json(public).decode()}"
    except ValueError as error:
        raise SemalignError(
            f"checkpoints need the settings of {type(loss).__name__} as JSON ({error}): let the names of its other "
            "attributes begin with an underscore"
        ) from error


def run_source(source: DecoderView, step: JointStep, *, keep: Collection[int] = ()) -> tuple[Trace, Supervised]:
    """Run the source on the examples as it reads them, and find its answer tokens; it is left as found."""
    batch = step.data.batch if step.data.source is None else step.data.source
    with torch.no_grad(), undisturbed(source.model):
        return source.trace(batch, keep=keep), Supervised.of(batch)


def answer_sum(step: JointStep) -> Float[Tensor, ""]:
    """Negative log-likelihood of the answer tokens, their sum in nats."""
    hidden, head = step.hidden, step.head
    if head.weight.requires_grad:
        return cross_entropy(head.logits(hidden), step.labels, reduction="sum")
    return answer_nll(hidden, head, step.labels).sum()


def target_likelihoods(step: JointStep, spans: BatchSpans) -> Float[Tensor, " s"]:
    """Log-likelihood of each span under the target, in nats."""
    hidden, head = step.hidden, step.head
    if head.weight.requires_grad:
        nll = cross_entropy(head.logits(hidden), step.labels, reduction="none")
    else:
        nll = answer_nll(hidden, head, step.labels)
    return span_log_likelihoods(-nll, spans)


def _span(step: JointStep, spans: BatchSpans) -> Tensor:
    """Divergence of the likelihoods of spans with several tokens, its sum in nats."""
    if not step.head.weight.requires_grad:
        return SpanLikelihood().of(spans, step.hidden, step.head, step.labels).sum()
    likelihoods = target_likelihoods(step, spans)
    return span_divergence(spans.log_likelihood[spans.several], likelihoods[spans.several]).sum()


def _output(step: JointStep, divergence: Divergence) -> Tensor:
    """Divergence of the target's output from the source's, its sum in nats.

    Raises:
        SemalignError: another one than `forward`, where the source's final states were stored.
    """
    hidden, head, source = step.span_hidden, step.shared_head, step.output
    if not step.head.weight.requires_grad:
        return OutputKL(divergence=divergence).of(source, hidden, head, step.temperature).sum()
    log_q = head.log_probs(hidden, temperature=step.temperature)
    if isinstance(source, TopEntries):
        ids = source.ids.long()
        log_p = torch.cat([source.log_probs.to(log_q), source.tail[:, None].to(log_q)], 1)
        rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        log_q = torch.cat([log_q.gather(1, ids), rest], 1)
    else:
        log_p = source.head.log_probs(source.hidden, temperature=step.temperature)
    return categorical_divergence(log_p, log_q, kind=divergence).sum()
