"""ALM, the baseline of tokenkit for two tokenizers: likelihoods of spans alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from semalign_align import BatchSpans
from semalign_geometry import TopEntries, VocabularyClasses, span_divergence
from semalign_geometry.base import SemalignError
from torch import Tensor

from ._losses import JointLoss, JointStep, answer_sum, target_likelihoods

SPACES = b" \t\n"
"""Bytes that are taken to end a token."""


@dataclass(frozen=True)
class AlmLoss(JointLoss):
    """Approximate likelihood matching: KL between (P_S, 1 − P_S) and (P_T, 1 − P_T) with P the likelihood of a chunk.

    A chunk is a span, or several in a row. Where a token ends, a tokenizer may rule out that certain bytes follow, on
    one side and not on the other, and the likelihoods do not compare. So, as in tokenkit, a chunk goes on until
    white space follows it with a probability above `threshold` under the source, and its likelihood is multiplied by
    the probability that white space follows, on both sides.

    Laws: 0 for equal likelihoods; independent of how a side splits a span. Source: `compute_alm_loss` of tokenkit
    (commit bcacdef) with its defaults: `binary_ce` at temperature 100, mode `merge_by_space_prob+append_space`,
    threshold 0.1; the paper (Minixhofer et al., arXiv 2503.20083) leaves chunks out by a precomputed bias instead.
    Deviations:

    - The cross-entropy is less the source's entropy, so that the least value is 0; the gradient is the same.
    - Likelihoods of spans come from the supervision, as does the probability of white space: where top entries were
      stored, it is that of the stored ones.
    - A sum over chunks is divided by the spans of the optimisation batch.
    - The loss for the answers, which tokenkit's recipes add with a gradient of equal size, has a weight instead.
    """

    temperature: float = 100.0
    """Divides the log-likelihoods of both models."""
    threshold: float | None = 0.1
    """Probability of white space above which a chunk ends, above 0 and below 1; None compares span by span, as they
    are."""
    answer: float = 0.0
    """Weight of the NLL of the answers."""

    def __post_init__(self) -> None:
        """Refuse a threshold that is no probability."""
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise SemalignError(f"threshold is {self.threshold}, expected a probability above 0 and below 1, or None")

    def terms(self, step: JointStep) -> Mapping[str, Float[Tensor, ""]]:
        """`span`, and `answer` where it has a weight.

        Raises:
            SemalignError: the supervision is of one tokenizer, or at another temperature than 1 with a threshold.
        """
        spans, classes = step.spans, step.supervision.classes
        if spans is None or classes is None:
            raise SemalignError("ALM needs spans of two tokenizers, the supervision has one: use OutputLoss")
        source, target = spans.log_likelihood, target_likelihoods(step, spans)
        if self.threshold is not None:
            source, target = _chunks(step, spans, classes, source, target, threshold=self.threshold)
        terms = {"span": span_divergence(source, target, temperature=self.temperature).sum()}
        return terms | ({"answer": self.answer * answer_sum(step)} if self.answer else {})


def _chunks(
    step: JointStep, spans: BatchSpans, classes: VocabularyClasses, source: Tensor, target: Tensor, *, threshold: float
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of the chunks on both sides, with white space after each but the last of a row."""
    if step.temperature != 1:
        raise SemalignError(
            f"the supervision is at temperature {step.temperature}, ALM with a threshold needs 1: supervise with "
            "temperature=1, or set threshold=None"
        )
    spaces = _spaces(classes).to(step.view.device)
    if isinstance(step.output, TopEntries):
        log_p = step.output.log_probs.masked_fill(~spaces[step.output.ids.long()], -torch.inf)
    else:
        log_p = step.output.head.log_probs(step.output.hidden)[:, spaces]
    log_q = step.shared_head.log_probs(step.span_hidden)[:, spaces]
    last = spans.counts.cumsum(0) - 1
    # Of the start of the next span, the end of this one; after the last there is nothing.
    after = [each.logsumexp(1).roll(-1).index_fill(0, last, 0.0) for each in (log_p, log_q)]
    ends = after[0] > math.log(threshold)
    chunk = ends.cumsum(0) - ends.long()
    return _summed(source, after[0], chunk, ends), _summed(target, after[1], chunk, ends)


def _summed(likelihoods: Tensor, after: Tensor, chunk: Tensor, ends: Bool[Tensor, " s"]) -> Tensor:
    """Log-likelihoods within each chunk, and that of what follows its end."""
    return after[ends].to(likelihoods).index_add(0, chunk, likelihoods)


def _spaces(classes: VocabularyClasses) -> Bool[Tensor, " c"]:
    """Classes that begin with white space, and those of special entries."""
    return torch.tensor([not isinstance(name, bytes) or name[:1] in SPACES for name in classes.names])
