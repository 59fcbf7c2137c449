"""GOLD, the baseline of TRL for two tokenizers: equal entries by a divergence, all others by the rank of their
probabilities.

Shape suffixes: P answer tokens, S spans, V entries of a side, E entries that both sides have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from semalign_attribution import DecoderView, view_of
from semalign_geometry import Head
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ._losses import JointLoss, JointStep, answer_sum, run_source

CHUNK = 64
"""Spans whose distributions over whole vocabularies are in memory at a time."""
LEAST = math.log(1e-8)
"""Logarithm of the least probability that an entry counts with."""


class GoldLoss(JointLoss):
    """Hybrid loss of GOLD (General On-policy Logit Distillation), whose source stays in memory.

    Each span has one distribution on either side, `merge`d from those of its tokens by the chain rule: not normalised
    where the span has several. Entries that both vocabularies have are matched by the generalised Jensen-Shannon
    divergence; the probabilities of all other entries are sorted on each side and matched rank by rank by their L1
    distance, as in ULD.

    Laws: 0 for equal models with one tokenizer; independent of the order of the entries that one side alone has.
    Source: `ULDLoss` of TRL 1.10.0.dev0 (trl/experimental/gold/gold_trainer.py, commit f2cd577) with its defaults but
    for `uld_use_hybrid_loss=True`; after ULD (Boizard et al., arXiv 2402.12030) and GKD (arXiv 2306.13649).
    Deviations:

    - The distribution that predicts a token is compared there. TRL's `observed` reads it one token too late, so that
      the probabilities that it multiplies are not those of the answer's tokens.
    - The end of turn is a span as any other (TRL's slice has the distribution that predicts it too, for that reason).
    - Entries are equal by their bytes, not by their printed form, and special entries are in the part that is sorted.
    - Spans come from bytes, as all of this library's, and a sum over spans is divided by the spans of the optimisation
      batch; TRL takes the mean over the spans of an answer, then over answers.
    - The answers are those of the rows: no text is drawn from the target (`lmbda=0`).
    """

    def __init__(
        self,
        source: PreTrainedModel | DecoderView,
        *,
        beta: float = 0.5,
        weights: tuple[float, float] | None = None,
        merge: Literal["observed", "bayesian"] = "observed",
        answer: float = 0.0,
    ) -> None:
        """Take the source, which is left as it was.

        Args:
            source: the source.
            beta: share of the source in the mixture of the Jensen-Shannon divergence; 0 is KL(p_S ‖ p_T) and 1 is
                KL(p_T ‖ p_S), which for merged distributions may be negative.
            weights: of the equal entries and of the others; None takes the share of the source's entries that are
                equal, and the rest.
            merge: the distribution of a span of several tokens: that at its first token times the probabilities of the
                later ones (`observed`), or that at its last token times those of the earlier ones (`bayesian`).
            answer: weight of the NLL of the answers.

        Raises:
            SemalignError: beta is not between 0 and 1.
        """
        if not 0 <= beta <= 1:
            raise SemalignError(f"beta is {beta}, expected 0 to 1")
        self.beta, self.weights, self.merge, self.answer = beta, weights, merge, answer
        self._source = view_of(source)

    def terms(self, step: JointStep) -> Mapping[str, Float[Tensor, ""]]:
        """`matched`, `unmatched`, and `answer` where it has a weight."""
        source, target = self._sides(step)
        equal = _equal_entries(step)
        # Distributions are made again in the backward run, chunk by chunk.
        sums = sum(
            checkpoint(self._distances, *chunk, equal, use_reentrant=False)
            for chunk in zip(source.chunks(), target.chunks(), strict=True)
        )
        share = len(equal[0]) / len(source.head.weight)
        weights = (share, 1 - share) if self.weights is None else self.weights
        terms = {"matched": weights[0] * sums[0], "unmatched": weights[1] * sums[1]}
        return terms | ({"answer": self.answer * answer_sum(step)} if self.answer else {})

    def _sides(self, step: JointStep) -> tuple["_Side", "_Side"]:
        """Source and target on one micro-batch."""
        trace, positions = run_source(self._source, step)
        assert trace.final is not None
        device, spans, labels = step.view.device, step.spans, positions.labels
        hidden = trace.final[positions.mask.to(self._source.device)].to(device)
        ones = torch.ones_like(step.labels)
        lengths = (ones, ones)
        if spans is not None:
            end = spans.source_starts.new_tensor([len(labels)])
            lengths = (spans.source_starts.diff(append=end), spans.lengths)
        return (
            _Side(hidden, labels.to(device), lengths[0], self._source.head.to(device), step.temperature),
            _Side(step.hidden, step.labels, lengths[1], step.head, step.temperature),
        )

    def _distances(self, source: "_Side", target: "_Side", equal: tuple[Tensor, Tensor]) -> Float[Tensor, "2"]:
        """Divergence of the equal entries and distance of the others, summed over some spans."""
        with torch.no_grad():
            log_p_SV = source.merged(self.merge)
        log_q_SV = target.merged(self.merge)
        matched = generalised_divergence(log_p_SV[:, equal[0]], log_q_SV[:, equal[1]], beta=self.beta)
        others = (_without(log_p_SV, equal[0]).exp(), _without(log_q_SV, equal[1]).exp())
        return torch.stack([matched.sum(), ranked_distance(*others).sum()])


@dataclass(frozen=True, eq=False)
class _Side:
    """One model on some spans, end to end."""

    hidden: Float[Tensor, "p d"]
    labels: Int[Tensor, " p"]
    lengths: Int[Tensor, " s"]
    head: Head
    temperature: float

    def chunks(self) -> list["_Side"]:
        """The same in chunks of spans."""
        lengths = self.lengths.split(CHUNK)
        tokens = [int(part.sum()) for part in lengths]
        parts = zip(self.hidden.split(tokens), self.labels.split(tokens), lengths, strict=True)
        return [_Side(*part, self.head, self.temperature) for part in parts]

    def merged(self, merge: str) -> Float[Tensor, "s v"]:
        """Log-distribution of each span."""
        log_p_PV = self.head.log_probs(self.hidden, temperature=self.temperature)
        return merged_log_probs(log_p_PV, self.labels, self.lengths, last=merge == "bayesian")


def merged_log_probs(
    log_probs: Float[Tensor, "p v"], labels: Int[Tensor, " p"], lengths: Int[Tensor, " s"], *, last: bool
) -> Float[Tensor, "s v"]:
    """Distribution of each span by the chain rule: that at one of its tokens, times the probabilities of the others.

    Laws: a span of one token keeps its distribution; the value at the label of the token that is kept is the
    log-likelihood of the span.

    Args:
        log_probs: log-distributions that predict the tokens of the spans, end to end.
        labels: the tokens.
        lengths: tokens of each span.
        last: whether the distribution at the last token is kept, instead of the first.
    """
    starts = lengths.cumsum(0) - lengths
    kept = starts + lengths - 1 if last else starts
    tokens_P = log_probs.gather(1, labels[:, None])[:, 0].clamp_min(LEAST)
    span_P = torch.arange(len(lengths), device=labels.device).repeat_interleave(lengths, output_size=len(labels))
    whole_S = tokens_P.new_zeros(len(lengths)).index_add(0, span_P, tokens_P)
    return log_probs[kept] + (whole_S - tokens_P[kept])[:, None]


def generalised_divergence(
    log_p: Float[Tensor, "s e"], log_q: Float[Tensor, "s e"], *, beta: float
) -> Float[Tensor, " s"]:
    """Generalised Jensen-Shannon divergence β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, in nats.

    At β = 0 it is KL(p ‖ q), at β = 1 KL(q ‖ p). Probabilities under 1e-8 count as 1e-8. Laws: 0 for equal rows; not
    negative for β between 0 and 1, even where rows do not add up to 1.
    """
    log_p, log_q = log_p.clamp_min(LEAST), log_q.clamp_min(LEAST)
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(1)


def ranked_distance(p: Float[Tensor, "s a"], q: Float[Tensor, "s b"]) -> Float[Tensor, " s"]:
    """L1 distance of each row's values in descending order, the shorter side filled up with zeros; 0 where a side has
    no entry.

    Only as many values as the shorter side has are sorted: the rest of the other side faces zeros, whatever its order.
    """
    shorter = min(p.shape[1], q.shape[1])
    if not shorter:
        return (p.sum(1) + q.sum(1)) * 0
    best_p, best_q = p.topk(shorter).values, q.topk(shorter).values
    rest = (p.sum(1) - best_p.sum(1)) + (q.sum(1) - best_q.sum(1))
    return (best_p - best_q).abs().sum(1) + rest


def _equal_entries(step: JointStep) -> tuple[Tensor, Tensor]:
    """Ids of the entries that both vocabularies have, on either side."""
    classes, device = step.supervision.classes, step.view.device
    if classes is None:
        entries = step.supervision.entries.to(device)
        return entries, entries
    return classes.shared.source_ids.to(device), classes.shared.target_ids.to(device)


def _without(values_SV: Tensor, ids: Tensor) -> Tensor:
    """The columns but those of some ids."""
    kept_V = torch.ones(values_SV.shape[1], dtype=torch.bool, device=values_SV.device)
    kept_V[ids] = False
    return values_SV[:, kept_V]
