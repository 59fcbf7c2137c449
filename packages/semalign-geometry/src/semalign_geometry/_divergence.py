"""Output divergences against a language-model head, streamed over vocabulary chunks, forward and backward.

None of these functions holds an (n, v) matrix, nor its gradient: each chunk of logits is made, used and dropped. Heads
are constants here (they do not train), so the gradient is that of the hidden states, an (n, d) matrix. The forward pass
accumulates it beside the value, if it is needed, and keeps it for the backward pass, which makes no logits
(`quadratic_divergence` alone makes each chunk again).

A token whose vectors hold a value that is not finite gets NaN, value and gradient; other tokens keep theirs. Nothing is
refused for it: a check of every batch would make a GPU wait.

Shape suffixes: N tokens, V vocabulary entries, W a vocabulary chunk, K entries kept per token.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._basis import CHUNK
from ._class_head import ClassHead, OutputHead
from ._contracts import Divergence
from ._head import Head, accumulation_dtype, full_precision
from ._logits import LogitReader, chunks, softcap_slope, weighted_rows
from .base import SemalignError, checked, short_repr


@dataclass(frozen=True, eq=False)
class TopEntries:
    """A source distribution kept as its k likeliest entries and the mass of all others, one row for each token."""

    ids: Int[Tensor, "n k"]
    """The kept vocabulary entries, likeliest first."""
    log_probs: Float[Tensor, "n k"]
    """Natural logarithms, at the temperature that they were taken at."""
    tail: Float[Tensor, " n"]
    """Natural logarithm of the mass outside of `ids`; −inf when k is the whole vocabulary."""

    __repr__ = short_repr


@checked
def kl_divergence(
    source_hidden: Float[Tensor, "n s"],
    source_head: OutputHead,
    target_hidden: Float[Tensor, "n t"],
    target_head: OutputHead,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Tensor, " n"]:
    """Exact KL(p_S ‖ p_T) of each token, in nats, with p = softmax(logits / temperature) on both sides.

    Laws: ≥ 0; 0 for equal logits; independent of the chunk size; NaN for a token with hidden states that are not
    finite. No factor temperature² is applied: gradients shrink as 1 / temperature².

    Args:
        source_hidden: (n, d_S), what the source feeds its head; constant, no gradient.
        source_head: the source's head over the shared entries.
        target_hidden: (n, d_T), what the target feeds its head.
        target_head: the target's head over the same entries in the same order.
        temperature: divides the logits of both.
        chunk: vocabulary entries in memory at a time.

    Returns:
        (n,) float32 (float64 where a head is float64).

    Raises:
        SemalignError: the two sides have different numbers of tokens or of entries, or the temperature is not positive.

    Example:
        >>> import torch
        >>> source_head, target_head = Head(torch.randn(100, 8)), Head(torch.randn(100, 6))
        >>> source_hidden, target_hidden = torch.randn(5, 8), torch.randn(5, 6, requires_grad=True)
        >>> nats = kl_divergence(source_hidden, source_head, target_hidden, target_head)
        >>> nats.sum().backward()
        >>> nats.shape, target_hidden.grad.shape
        (torch.Size([5]), torch.Size([5, 6]))

    Source: method 2.5.
    """
    _check_temperature(temperature)
    if source_head.count != target_head.count:
        raise SemalignError(
            f"the source head has {source_head.count} entries, the target head {target_head.count}: "
            "restrict both with Head.select to the shared entries (align_vocabularies)"
        )
    _check_tokens(source_hidden, target_hidden)
    value: Tensor = _ExactDivergence.apply(  # type: ignore[no-untyped-call]
        _without_unused_gradient(target_hidden), target_head, source_hidden, source_head, temperature, chunk
    )
    return value


@checked
def top_k_divergence(
    source: TopEntries,
    target_hidden: Float[Tensor, "n t"],
    target_head: OutputHead,
    *,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    chunk: int = CHUNK,
) -> Float[Tensor, " n"]:
    """Divergence of each token between source and target distributions coarsened to the source's top entries and one
    tail bucket, in nats.

    Laws: a lower bound on the exact one (data processing), equal to it when the kept entries are the whole vocabulary;
    NaN for a token with numbers that are not finite. No factor temperature² is applied: gradients shrink as
    1 / temperature², so beside another loss, such as that of the answer, raise the weight with the temperature.

    Args:
        source: top entries at the same temperature, with the ids of `target_head`; constant, no gradient.
        target_hidden: (n, d_T), what the target feeds its head.
        target_head: the target's head.
        temperature: divides the target's logits.
        kind: which divergence.
        chunk: vocabulary entries in memory at a time.

    Returns:
        (n,) float32 (float64 for a float64 head).

    Raises:
        SemalignError: an id outside of the head, or a temperature that is not positive.

    Source: method 2.5; the kinds but for `forward`: generalised knowledge distillation (arXiv 2306.13649).
    """
    found = head_statistics(target_hidden, target_head, source.ids, temperature=temperature, chunk=chunk)
    log_q_NC = torch.cat([found.selected, found.rest[:, None]], 1) - found.normaliser[:, None]
    log_p_NC = torch.cat([source.log_probs, source.tail[:, None]], 1).to(log_q_NC.dtype)
    return categorical_divergence(log_p_NC, log_q_NC, kind=kind)


@checked
@full_precision
def categorical_divergence(
    log_p: Float[Tensor, "n c"], log_q: Float[Tensor, "n c"], *, kind: Divergence = "forward"
) -> Float[Tensor, " n"]:
    """Divergence of each row of q from that of p, in nats; plain torch, so the gradient is that of `log_q`.

    Laws: ≥ 0; 0 for equal rows; `reverse` is `forward` with the sides swapped; `jensen_shannon` is the same both ways
    and at most ln 2; NaN for a row with a NaN or +∞.

    Args:
        log_p: natural logarithms of probabilities; cells at −inf, an empty tail, are left out on both sides.
        log_q: likewise, of the same cells.
        kind: which divergence.

    Returns:
        (n,) float32 (float64 for float64 input).
    """
    dtype = accumulation_dtype(log_p, log_q)
    valid = (log_p < torch.inf) & (log_q < torch.inf)  # false for NaN
    log_p, log_q = (torch.where(valid, each.to(dtype), torch.nan) for each in (log_p, log_q))
    absent = log_p == -torch.inf
    log_p, log_q = (torch.where(absent, 0.0, each) for each in (log_p, log_q))
    if kind == "forward":
        terms = log_p.exp() * (log_p - log_q)
    elif kind == "reverse":
        terms = log_q.exp() * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        terms = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2
    return terms.sum(1).clamp_min(0)  # rounding alone can make it negative


@checked
@full_precision
def span_divergence(
    source: Float[Tensor, " s"], target: Float[Tensor, " s"], *, temperature: float = 1.0
) -> Float[Tensor, " s"]:
    """KL between (P, 1 − P) of source and target, the distributions over "this span" and "any other", in nats.

    P = exp(log-likelihood / temperature). Computed in log space; probabilities closer to 1 than the dtype can hold are
    taken to be the closest one below 1, so that the value is finite there, with no gradient.

    Laws: ≥ 0; 0 for equal likelihoods; finite from P = 0 to P = 1; NaN for a NaN. No factor temperature² is applied.

    Args:
        source: (s,) log-likelihoods of spans, in nats, 0 at most; constant, no gradient.
        target: (s,) likewise of the target.
        temperature: divides the log-likelihoods.

    Returns:
        (s,) float32 (float64 for float64 input).

    Raises:
        SemalignError: the two sides have different numbers of spans, or the temperature is not positive.

    Source: approximate likelihood matching (arXiv 2503.20083), with KL for its divergence.
    """
    _check_temperature(temperature)
    _check_tokens(source, target)
    dtype = accumulation_dtype(source, target)
    limits = torch.finfo(dtype)
    numbers = (torch.where(each < torch.inf, 1.0, torch.nan).to(dtype) * each for each in (source.detach(), target))
    log_p, log_q = ((each / temperature).clamp(limits.min, -limits.eps) for each in numbers)  # NaN for +∞
    this = log_p.exp() * (log_p - log_q)
    other = -log_p.expm1() * (_log_complement(log_p) - _log_complement(log_q))
    return (this + other).clamp_min(0)  # rounding alone can make it negative


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 − p) for 0 < p < 1, exact at both ends."""
    return torch.where(log_p > -math.log(2), (-log_p.expm1()).log(), (-log_p.exp()).log1p())


@torch.no_grad()
@checked
def top_entries(
    hidden: Float[Tensor, "n d"], head: OutputHead, k: int, *, temperature: float = 1.0, chunk: int = CHUNK
) -> TopEntries:
    """The k likeliest entries of each token's distribution with their log-probabilities, and the rest as one bucket.

    A token with hidden states that are not finite gets log-probabilities that are NaN.

    Args:
        hidden: (n, d), what the model feeds its head.
        head: the head; k is cut to its number of entries.
        k: entries to keep.
        temperature: divides the logits.
        chunk: vocabulary entries in memory at a time.

    Raises:
        SemalignError: the temperature is not positive.
    """
    _check_temperature(temperature)
    k = min(k, head.count)
    values = torch.zeros(len(hidden), 0, dtype=_dtype(head), device=hidden.device)
    ids = torch.zeros(len(hidden), 0, dtype=torch.long, device=hidden.device)
    rest = torch.full((len(hidden),), -torch.inf, dtype=values.dtype, device=hidden.device)
    read = LogitReader(head, hidden, temperature=temperature, dtype=values.dtype)
    for rows in chunks(chunk, head):
        logits_NW = read(rows).logits
        best, local = logits_NW.topk(min(k, logits_NW.shape[1]), dim=1)
        candidates, order = torch.cat([values, best], 1).sort(1, descending=True)
        values, ids = candidates[:, :k], torch.cat([ids, local + rows.start], 1).gather(1, order[:, :k])
        others = logits_NW.scatter_(1, local, -torch.inf).logsumexp(1)
        rest = rest.logaddexp(others).logaddexp(candidates[:, k:].logsumexp(1))
    normaliser = rest.logaddexp(values.logsumexp(1))
    return TopEntries(ids, values - normaliser[:, None], rest - normaliser)


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Result of `head_statistics`; differentiable in the hidden states."""

    selected: Float[Tensor, "n k"]
    """Logits of the chosen entries."""
    rest: Float[Tensor, " n"]
    """logsumexp of all other entries; −inf when no entry is left."""
    normaliser: Float[Tensor, " n"]
    """logsumexp over the whole vocabulary."""

    __repr__ = short_repr


@checked
def head_statistics(
    hidden: Float[Tensor, "n d"],
    head: OutputHead,
    ids: Int[Tensor, "n k"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> HeadStatistics:
    """Logits of some entries of each token, and the logsumexp of all others: enough for NLL and coarsened KL.

    A token with hidden states that are not finite has a normaliser that is NaN.

    Args:
        hidden: (n, d), what the model feeds its head.
        head: the head.
        ids: (n, k), k different entries for each token.
        temperature: divides the logits.
        chunk: vocabulary entries in memory at a time.

    Raises:
        SemalignError: an id outside of the head, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < head.count:
        raise SemalignError(
            f"ids run from {int(ids.min())} to {int(ids.max())}, the head has entries 0 to {head.count - 1}"
        )
    statistics = _ClassStatistics if isinstance(head, ClassHead) else _HeadStatistics
    rest, selected_NK = statistics.apply(  # type: ignore[no-untyped-call]
        _without_unused_gradient(hidden), head, ids, temperature, chunk
    )
    return HeadStatistics(selected_NK, rest, torch.logaddexp(rest, torch.logsumexp(selected_NK, dim=1)))


@checked
def answer_nll(
    hidden: Float[Tensor, "n d"], head: Head, labels: Int[Tensor, " n"], *, chunk: int = CHUNK
) -> Float[Tensor, " n"]:
    """Negative log-likelihood of each token's label, in nats; NaN for a token with hidden states that are not finite.

    Args:
        hidden: (n, d), what the model feeds its head.
        head: the head.
        labels: (n,) vocabulary ids.
        chunk: vocabulary entries in memory at a time.

    Returns:
        (n,) float32 (float64 for a float64 head).

    Raises:
        SemalignError: a label outside of the head.
    """
    found = head_statistics(hidden, head, labels[:, None], chunk=chunk)
    return found.normaliser - found.selected[:, 0]


@checked
def quadratic_divergence(
    target: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], head: Head, *, chunk: int = CHUNK
) -> Float[Tensor, " n"]:
    """½ (z − z̃)ᵀ (diag p − p pᵀ) (z − z̃) of each token: z = W target, z̃ = W reference, p = softmax(z̃).

    The second-order expansion of KL(softmax z̃ ‖ softmax z): half the variance, under p, of the difference of the
    logits. Bias, scale and soft-cap of the head are ignored (a lens reads contributions, not the stream). No
    gradient to `reference`. NaN for a token with vectors that are not finite.

    Args:
        target: (n, d) residual contributions of the target.
        reference: (n, d) supervisory ones, at the target's width; constant, no gradient.
        head: the target's head.
        chunk: vocabulary entries in memory at a time.

    Returns:
        (n,) nats, float32 (float64 for a float64 head).

    Raises:
        SemalignError: the two sides have different shapes.

    Source: ACL (method 2.7, `fisher`).
    """
    _check_tokens(reference, target, widths=True)
    value: Tensor = _QuadraticDivergence.apply(target, reference, head, chunk)  # type: ignore[no-untyped-call]
    return value


def _check_tokens(one: Tensor, other: Tensor, *, widths: bool = False) -> None:
    if len(one) != len(other) or (widths and one.shape != other.shape):
        raise SemalignError(
            f"the two sides must have the same tokens{' and one width' if widths else ''}, got shapes "
            f"{tuple(one.shape)} and {tuple(other.shape)}"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise SemalignError(f"temperature is {temperature}, expected more than 0")


def _dtype(*heads: OutputHead) -> torch.dtype:
    """Of sums over the logits of these heads."""
    return accumulation_dtype(*(head.head.weight if isinstance(head, ClassHead) else head.weight for head in heads))


def _without_unused_gradient(hidden: Tensor) -> Tensor:
    """Detach under no_grad: inside of an autograd function grad mode is always off."""
    return hidden if torch.is_grad_enabled() else hidden.detach()


class _RunningSoftmax:
    """The softmax of each token over the entries that were added so far."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        # The lowest number, not −inf: a chunk may be −inf throughout.
        self.peak = torch.full((tokens, 1), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.mass = torch.zeros_like(self.peak)
        """Σ exp(logit − peak)"""

    def add(self, logits_NW: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of these entries (they overwrite the logits), and the share that all earlier ones keep."""
        peak = torch.maximum(self.peak, logits_NW.amax(1, keepdim=True))
        earlier = self.mass * (self.peak - peak).exp()
        weights_NW = logits_NW.sub_(peak).exp_()
        self.peak, self.mass = peak, earlier + weights_NW.sum(1, keepdim=True)
        mass = self.mass.clamp_min(torch.finfo(peak.dtype).tiny)  # 0 while all entries were −inf
        return weights_NW.div_(mass), earlier / mass

    def logsumexp(self) -> Tensor:
        """Over all entries that were added; −inf if all of them were."""
        return (self.peak + self.mass.log()).squeeze(1)


def _places(ids: Tensor, rows: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Which of the ids lie in a chunk, and where there."""
    at = ((ids >= rows.start) & (ids < rows.stop)).nonzero(as_tuple=True)
    return at, (at[0], ids[at].long() - rows.start)


class _HeadStatistics(torch.autograd.Function):
    """(logsumexp of the entries outside of `ids`, logits of `ids`); the gradient of the first is the mean of W under
    the softmax of those entries."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(head.weight)
        rest = _RunningSoftmax(len(hidden), dtype, hidden.device)
        selected_NK = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
        mean_ND = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        read = LogitReader(head, hidden, temperature=temperature, dtype=dtype, gradient=mean_ND is not None)
        for rows in chunks(chunk, head):
            part = read(rows)
            at, places = _places(ids, rows)
            selected_NK[at] = part.logits[places]
            part.logits[places] = -torch.inf
            p_NW, kept = rest.add(part.logits)
            if mean_ND is not None:
                mean_ND = kept * mean_ND + part.pull(p_NW)
        ctx.save_for_backward(mean_ND, ids, selected_NK)
        ctx.settings = (head, temperature, chunk, hidden.dtype)
        return rest.logsumexp(), selected_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rest_gradient: Tensor, selected_gradient: Tensor) -> tuple[Tensor | None, ...]:
        mean_ND, ids, selected_NK = ctx.saved_tensors
        head, temperature, chunk, dtype = ctx.settings
        slope_NK = softcap_slope(head, selected_NK * temperature)
        weights_NK = selected_gradient if slope_NK is None else selected_gradient * slope_NK
        gradient_ND = rest_gradient[:, None] * mean_ND
        tokens = max(1, chunk // max(1, ids.shape[1]))  # at most `chunk` rows of W at a time
        for start in range(0, len(ids), tokens):
            some = slice(start, start + tokens)
            rows_NKD = head.weight[ids[some].long()].to(gradient_ND.dtype)
            gradient_ND[some] += head.scale * (weights_NK[some, :, None] * rows_NKD).sum(1)
        return (gradient_ND / temperature).to(dtype), None, None, None, None


class _ClassStatistics(torch.autograd.Function):
    """(logsumexp of the classes outside of `ids`, logits of `ids`). The gradient of a class is a mean of rows of W that
    differs by token, so the backward pass makes each chunk again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: ClassHead, ids: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _dtype(head)
        softmax = _RunningSoftmax(len(hidden), dtype, hidden.device)
        selected_NK = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
        read = LogitReader(head, hidden, temperature=temperature, dtype=dtype)
        for rows in chunks(chunk, head):
            logits_NW = read(rows).logits
            at, places = _places(ids, rows)
            selected_NK[at] = logits_NW[places]
            logits_NW[places] = -torch.inf
            softmax.add(logits_NW)
        rest = softmax.logsumexp()
        ctx.save_for_backward(hidden, ids, rest)
        ctx.settings = (head, temperature, chunk)
        return rest, selected_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rest_gradient: Tensor, selected_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, ids, rest = ctx.saved_tensors
        head, temperature, chunk = ctx.settings
        floor_N1 = rest[:, None].clamp_min(torch.finfo(rest.dtype).min)  # −inf where no class is outside
        gradient_ND = torch.zeros(hidden.shape, dtype=rest.dtype, device=hidden.device)
        read = LogitReader(head, hidden, temperature=temperature, dtype=rest.dtype, gradient=True)
        for rows in chunks(chunk, head):
            part = read(rows)
            weights_NW = (part.logits - floor_N1).exp_().mul_(rest_gradient[:, None])
            at, places = _places(ids, rows)
            weights_NW[places] = selected_gradient[at]
            gradient_ND += part.pull(weights_NW)
        return (gradient_ND / temperature).to(hidden.dtype), None, None, None, None


class _ExactDivergence(torch.autograd.Function):
    """KL = E_p[s − t] − lse(s) + lse(t), in one pass; its gradient with respect to t is q − p with q = softmax(t),
    p = softmax(s).

    So the gradient of the target's hidden states is E_q[W] − E_p[W], times scale / temperature. The running sum is that
    of the difference, with E_p[W] beside it for the two normalisers: as q nears p, rounding vanishes with q − p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        target_hidden: Tensor,
        target_head: OutputHead,
        source_hidden: Tensor,
        source_head: OutputHead,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        dtype = _dtype(target_head, source_head)
        p, q = (_RunningSoftmax(len(target_hidden), dtype, target_hidden.device) for _ in range(2))
        gap_N1 = torch.zeros_like(p.mass)  # E_p[s − t]
        needed = ctx.needs_input_grad[0]
        if needed:
            source_mean_ND = torch.zeros(target_hidden.shape, dtype=dtype, device=target_hidden.device)  # E_p[W]
            gradient_ND = torch.zeros_like(source_mean_ND)  # E_q[W] − E_p[W]
        read_source = LogitReader(source_head, source_hidden, temperature=temperature, dtype=dtype)
        read_target = LogitReader(target_head, target_hidden, temperature=temperature, dtype=dtype, gradient=needed)
        for rows in chunks(chunk, source_head, target_head):
            source_NW, target = read_source(rows).logits, read_target(rows)
            gap_NW = source_NW - target.logits
            p_NW, p_kept = p.add(source_NW)
            q_NW, q_kept = q.add(target.logits)
            gap_N1 = p_kept * gap_N1 + gap_NW.mul_(p_NW).sum(1, keepdim=True)
            if needed:
                q_NW -= p_NW
                gradient_ND = q_kept * gradient_ND + (q_kept - p_kept) * source_mean_ND
                gradient_ND += target.pull(q_NW)
                source_mean_ND = p_kept * source_mean_ND + target.pull(p_NW)
        if needed:
            ctx.save_for_backward(gradient_ND / temperature)
            ctx.dtype = target_hidden.dtype
        return (gap_N1.squeeze(1) - p.logsumexp() + q.logsumexp()).clamp_min(0)  # rounding alone can make it negative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (value_gradient[:, None] * gradient_ND).to(ctx.dtype), None, None, None, None, None


class _QuadraticDivergence(torch.autograd.Function):
    """½ Var_p(u) with u = W(target − reference); its gradient with respect to u is p (u − E_p[u])."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, reference: Tensor, head: Head, chunk: int) -> Tensor:
        lens = Head(head.weight)
        dtype = accumulation_dtype(head.weight)
        difference = target.to(dtype) - reference.to(dtype)
        peak = torch.full((len(target),), -torch.inf, dtype=dtype, device=target.device)
        mass, first, second = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
        for rows in chunks(chunk, head):
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
        for rows in chunks(chunk, lens):
            reference_NW, u_NW = lens.logits(reference, rows), lens.logits(difference, rows)
            p_NW = (reference_NW - normaliser[:, None]).exp()
            gradient += weighted_rows(
                lens.weight[rows], lens.scale, p_NW * (u_NW - mean[:, None]) * value_gradient[:, None]
            )
        return gradient.to(target.dtype), None, None, None
