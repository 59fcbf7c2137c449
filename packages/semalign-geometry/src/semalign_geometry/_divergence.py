"""Output divergences against a language-model head, streamed over vocabulary chunks, forward and backward.

None of these functions holds an (n, v) matrix, nor its gradient: each chunk of logits is made, used and dropped, and
made again in the backward pass. Heads are constants here (they do not train), so the gradient is that of the hidden
states.

Shape suffixes: N tokens, V vocabulary entries, W a vocabulary chunk, K entries kept per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._basis import CHUNK
from ._errors import SemalignError
from ._head import Head, accumulation_dtype


@dataclass(frozen=True, eq=False)
class TopEntries:
    """A source distribution kept as its k likeliest entries and the mass of all others, one row for each token."""

    ids: Int[Tensor, "n k"]
    log_probs: Float[Tensor, "n k"]
    """Natural logarithms, at the temperature that they were taken at."""
    tail: Float[Tensor, " n"]
    """Natural logarithm of the mass outside of `ids`; −inf when k is the whole vocabulary."""


def output_divergence(
    source_hidden: Float[Tensor, "n s"],
    source_head: Head,
    target_hidden: Float[Tensor, "n t"],
    target_head: Head,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Tensor, " n"]:
    """Exact KL(p_S ‖ p_T) of each token, in nats, with p = softmax(logits / temperature) on both sides.

    Laws: ≥ 0; 0 for equal logits; independent of the chunk size. No factor temperature² is applied.

    Args:
        source_hidden: what the source feeds its head; constant, no gradient.
        source_head: the source's head over the shared entries.
        target_hidden: what the target feeds its head.
        target_head: the target's head over the same entries in the same order.
        temperature: divides the logits of both.
        chunk: vocabulary entries in memory at a time.

    Raises:
        SemalignError: the heads have different numbers of entries, or the temperature is not positive.

    Source: method 2.5.
    """
    _check_temperature(temperature)
    if len(source_head.weight) != len(target_head.weight):
        raise SemalignError(
            f"the source head has {len(source_head.weight)} entries, the target head {len(target_head.weight)}: "
            "restrict both with Head.select to the shared entries (align_vocabularies)"
        )
    value: Tensor = _ExactDivergence.apply(  # type: ignore[no-untyped-call]
        target_hidden, target_head, source_hidden, source_head, temperature, chunk
    )
    return value


def coarse_divergence(
    source: TopEntries,
    target_hidden: Float[Tensor, "n t"],
    target_head: Head,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Tensor, " n"]:
    """KL of each token between source and target distributions coarsened to the source's top entries and one tail
    bucket.

    Law: a lower bound on the exact KL (data processing), equal to it when the kept entries are the whole vocabulary.

    Args:
        source: top entries at the same temperature.
        target_hidden: what the target feeds its head.
        target_head: the target's head.
        temperature: divides the target's logits.
        chunk: vocabulary entries in memory at a time.

    Source: method 2.5.
    """
    found = head_statistics(target_hidden, target_head, source.ids, temperature=temperature, chunk=chunk)
    log_q_NK = found.selected - found.normaliser[:, None]
    log_p_NK = source.log_probs.to(log_q_NK.dtype)
    kept = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(1)
    tail = source.tail.to(log_q_NK.dtype)
    has_tail = torch.isfinite(tail)
    safe_tail = torch.where(has_tail, tail, 0.0)
    bucket = safe_tail.exp() * (safe_tail - (found.rest - found.normaliser))
    return (kept + torch.where(has_tail, bucket, 0.0)).clamp_min(0)


@torch.no_grad()
def top_entries(
    hidden: Float[Tensor, "n d"], head: Head, k: int, *, temperature: float = 1.0, chunk: int = CHUNK
) -> TopEntries:
    """The k likeliest entries of each token's distribution with their log-probabilities, and the rest as one bucket.

    Args:
        hidden: what the model feeds its head.
        head: the head; k is cut to its number of entries.
        k: entries to keep.
        temperature: divides the logits.
        chunk: vocabulary entries in memory at a time.
    """
    _check_temperature(temperature)
    k = min(k, len(head.weight))
    values = torch.zeros(len(hidden), 0, dtype=accumulation_dtype(head.weight), device=hidden.device)
    ids = torch.zeros(len(hidden), 0, dtype=torch.long, device=hidden.device)
    running = torch.full((len(hidden),), -torch.inf, dtype=values.dtype, device=hidden.device)
    for rows in _chunks(head, chunk):
        logits_NW = head.logits(hidden, rows) / temperature
        running = torch.logaddexp(running, torch.logsumexp(logits_NW, dim=1))
        best, local = logits_NW.topk(min(k, logits_NW.shape[1]), dim=1)
        candidates, candidate_ids = torch.cat([values, best], 1), torch.cat([ids, local + rows.start], 1)
        values, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        ids = candidate_ids.gather(1, order)
    log_probs_NK = values - running[:, None]
    covered = torch.logsumexp(log_probs_NK, dim=1)
    tail = torch.log(-torch.expm1(covered.clamp_max(-torch.finfo(covered.dtype).eps)))
    if k == len(head.weight):
        tail = torch.full_like(tail, -torch.inf)
    return TopEntries(ids, log_probs_NK, tail)


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """What `head_statistics` finds; differentiable in the hidden states."""

    selected: Float[Tensor, "n k"]
    """Logits of the entries that were asked for."""
    rest: Float[Tensor, " n"]
    """logsumexp of all other entries; −inf when there is none."""
    normaliser: Float[Tensor, " n"]
    """logsumexp over the whole vocabulary."""


def head_statistics(
    hidden: Float[Tensor, "n d"],
    head: Head,
    ids: Int[Tensor, "n k"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> HeadStatistics:
    """Logits of some entries of each token, and the logsumexp of all others: enough for NLL and coarsened KL.

    Args:
        hidden: what the model feeds its head.
        head: the head.
        ids: k different entries for each token.
        temperature: divides the logits.
        chunk: vocabulary entries in memory at a time.

    Raises:
        SemalignError: an id outside of the head, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(head.weight):
        raise SemalignError(
            f"ids run from {int(ids.min())} to {int(ids.max())}, the head has entries 0 to {len(head.weight) - 1}"
        )
    rest, selected_NK = _HeadStatistics.apply(hidden, head, ids, temperature, chunk)  # type: ignore[no-untyped-call]
    return HeadStatistics(selected_NK, rest, torch.logaddexp(rest, torch.logsumexp(selected_NK, dim=1)))


def answer_nll(
    hidden: Float[Tensor, "n d"], head: Head, labels: Int[Tensor, " n"], *, chunk: int = CHUNK
) -> Float[Tensor, " n"]:
    """Negative log-likelihood of each token's label, in nats."""
    found = head_statistics(hidden, head, labels[:, None], chunk=chunk)
    return found.normaliser - found.selected[:, 0]


def quadratic_divergence(
    target: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], head: Head, *, chunk: int = CHUNK
) -> Float[Tensor, " n"]:
    """½ (z − z̃)ᵀ (diag p − p pᵀ) (z − z̃) of each token: z = W target, z̃ = W reference, p = softmax(z̃).

    The second-order expansion of KL(softmax z̃ ‖ softmax z): half the variance, under p, of the difference of the
    logits. Bias, scale and soft-cap of the head play no part (a lens reads contributions, not the stream). No
    gradient to `reference`.

    Source: ACL (method 2.7, `fisher`).
    """
    value: Tensor = _QuadraticDivergence.apply(target, reference, head, chunk)  # type: ignore[no-untyped-call]
    return value


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise SemalignError(f"temperature is {temperature}, expected more than 0")


def _chunks(head: Head, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, len(head.weight), chunk)]


def _pull_back(head: Head, rows: slice, logits_NW: Tensor, gradient_NW: Tensor) -> Tensor:
    """Gradient of the hidden states from the gradient of a chunk of logits: through soft-cap, scale and product."""
    if head.softcap is not None:
        gradient_NW = gradient_NW * (1 - (logits_NW / head.softcap).square())
    weight_WD = head.weight[rows]
    return ((head.scale * gradient_NW).to(weight_WD.dtype) @ weight_WD).to(gradient_NW.dtype)


class _HeadStatistics(torch.autograd.Function):
    """(logsumexp of the entries outside of `ids`, logits of `ids`)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(head.weight)
        rest = torch.full((len(hidden),), -torch.inf, dtype=dtype, device=hidden.device)
        selected_NK = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
        for rows in _chunks(head, chunk):
            logits_NW = head.logits(hidden, rows) / temperature
            here, local = _within(ids, rows, logits_NW.shape[1])
            selected_NK = torch.where(here, logits_NW.gather(1, local), selected_NK)
            others_NW = logits_NW.masked_fill(_marked(here, local, logits_NW.shape[1]), -torch.inf)
            rest = torch.logaddexp(rest, torch.logsumexp(others_NW, dim=1))
        ctx.save_for_backward(hidden, ids, rest)
        ctx.settings = (head, temperature, chunk)
        return rest, selected_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rest_gradient: Tensor, selected_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, ids, rest = ctx.saved_tensors
        head, temperature, chunk = ctx.settings
        gradient = torch.zeros(hidden.shape, dtype=rest.dtype, device=hidden.device)
        for rows in _chunks(head, chunk):
            logits_NW = head.logits(hidden, rows)
            here, local = _within(ids, rows, logits_NW.shape[1])
            gradient_NW = (logits_NW / temperature - rest[:, None]).exp_() * rest_gradient[:, None]
            gradient_NW.masked_fill_(_marked(here, local, logits_NW.shape[1]), 0.0)
            gradient_NW.scatter_add_(1, local, torch.where(here, selected_gradient, 0.0))
            gradient += _pull_back(head, rows, logits_NW, gradient_NW / temperature)
        return gradient.to(hidden.dtype), None, None, None, None


def _within(ids_NK: Tensor, rows: slice, width: int) -> tuple[Tensor, Tensor]:
    """Which ids fall into a chunk, and their places in it (0 for the others)."""
    local = ids_NK.to(torch.long) - rows.start
    here = (local >= 0) & (local < width)
    return here, torch.where(here, local, 0)


def _marked(here_NK: Tensor, local_NK: Tensor, width: int) -> Tensor:
    """Which entries of a chunk are among the ids."""
    hits = torch.zeros(len(here_NK), width, dtype=torch.int32, device=here_NK.device)
    return hits.scatter_add_(1, local_NK, here_NK.to(torch.int32)) > 0


class _ExactDivergence(torch.autograd.Function):
    """KL = E_p[s] − lse(s) − E_p[t] + lse(t), in one pass; its gradient with respect to t is softmax(t) −
    softmax(s)."""

    @staticmethod
    def forward(
        ctx: Any,
        target_hidden: Tensor,
        target_head: Head,
        source_hidden: Tensor,
        source_head: Head,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        dtype = accumulation_dtype(target_head.weight, source_head.weight)
        start = torch.full((len(target_hidden),), -torch.inf, dtype=dtype, device=target_hidden.device)
        source_lse, target_lse, peak = start, start, start
        difference = torch.zeros_like(start)  # Σ exp(s − peak)(s − t)
        for rows in _chunks(source_head, chunk):
            source_NW = source_head.logits(source_hidden, rows).to(dtype) / temperature
            target_NW = target_head.logits(target_hidden, rows).to(dtype) / temperature
            source_lse = torch.logaddexp(source_lse, torch.logsumexp(source_NW, dim=1))
            target_lse = torch.logaddexp(target_lse, torch.logsumexp(target_NW, dim=1))
            higher = torch.maximum(peak, source_NW.amax(1))
            part = ((source_NW - higher[:, None]).exp() * (source_NW - target_NW)).sum(1)
            difference = difference * (peak - higher).exp() + part
            peak = higher
        ctx.save_for_backward(target_hidden, source_hidden, target_lse, source_lse)
        ctx.settings = (target_head, source_head, temperature, chunk)
        value = difference * (peak - source_lse).exp() - source_lse + target_lse
        return value.clamp_min(0)  # rounding alone can make it negative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor | None, ...]:
        target_hidden, source_hidden, target_lse, source_lse = ctx.saved_tensors
        target_head, source_head, temperature, chunk = ctx.settings
        gradient = torch.zeros(target_hidden.shape, dtype=target_lse.dtype, device=target_hidden.device)
        for rows in _chunks(source_head, chunk):
            target_NW = target_head.logits(target_hidden, rows).to(gradient.dtype)
            source_NW = source_head.logits(source_hidden, rows).to(gradient.dtype)
            gradient_NW = (target_NW / temperature - target_lse[:, None]).exp_()
            gradient_NW -= (source_NW / temperature - source_lse[:, None]).exp_()
            gradient_NW *= value_gradient[:, None] / temperature
            gradient += _pull_back(target_head, rows, target_NW, gradient_NW)
        return gradient.to(target_hidden.dtype), None, None, None, None, None


class _QuadraticDivergence(torch.autograd.Function):
    """½ Var_p(u) with u = W(target − reference); its gradient with respect to u is p (u − E_p[u])."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, reference: Tensor, head: Head, chunk: int) -> Tensor:
        lens = Head(head.weight)
        dtype = accumulation_dtype(head.weight)
        difference = target.to(dtype) - reference.to(dtype)
        peak = torch.full((len(target),), -torch.inf, dtype=dtype, device=target.device)
        mass, first, second = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
        for rows in _chunks(head, chunk):
            reference_NW, u_NW = lens.logits(reference, rows), lens.logits(difference, rows)
            higher = torch.maximum(peak, reference_NW.amax(1))
            shrink = (peak - higher).exp()
            weights_NW = (reference_NW - higher[:, None]).exp()
            mass = mass * shrink + weights_NW.sum(1)
            first = first * shrink + (weights_NW * u_NW).sum(1)
            second = second * shrink + (weights_NW * u_NW.square()).sum(1)
            peak = higher
        mean = first / mass
        ctx.save_for_backward(target, reference, peak + mass.log(), mean)
        ctx.settings = (lens, chunk)
        return ((second / mass - mean.square()) / 2).clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor | None, ...]:
        target, reference, normaliser, mean = ctx.saved_tensors
        lens, chunk = ctx.settings
        difference = target.to(mean.dtype) - reference.to(mean.dtype)
        gradient = torch.zeros(target.shape, dtype=mean.dtype, device=target.device)
        for rows in _chunks(lens, chunk):
            reference_NW, u_NW = lens.logits(reference, rows), lens.logits(difference, rows)
            p_NW = (reference_NW - normaliser[:, None]).exp()
            gradient += _pull_back(lens, rows, u_NW, p_NW * (u_NW - mean[:, None]) * value_gradient[:, None])
        return gradient.to(target.dtype), None, None, None
