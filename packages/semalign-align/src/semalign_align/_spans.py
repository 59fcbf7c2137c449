"""Spans: pieces of an answer between the bytes at which a token ends under the source's and the target's tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Float, Int, Num
from semalign_attribution import Batch
from semalign_geometry.base import SemalignError
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Tokens of each span of an answer, on both sides."""

    source: tuple[int, ...]
    """Tokens of each span under the source's tokenizer, 1 or more."""
    target: tuple[int, ...]
    """Tokens of each span under the target's."""

    def __post_init__(self) -> None:
        """Refuse sides with different numbers of spans, and spans without tokens."""
        if len(self.source) != len(self.target) or min(*self.source, *self.target, 1) < 1:
            raise SemalignError(
                f"spans need one token or more on both sides, got {self.source} and {self.target}: make them with "
                "align_spans"
            )


def align_spans(source: Sequence[bytes | None], target: Sequence[bytes | None]) -> Spans:
    """Cut an answer at every byte at which a token ends on both sides.

    Laws: spans cover the answer and are disjoint; each ends at one byte on both sides; with equal tokens on both sides
    every token is a span. The special entries at the end (end of turn) are one span. A space that one side alone
    writes before the answer (a dummy prefix) is ignored. Tokens without bytes belong to the span that follows, at the
    end to the last one.

    Args:
        source: bytes of the answer's tokens under the source's tokenizer, as `Vocabulary.bytes_of` returns them; None
            for a special entry.
        target: likewise of the target's.

    Raises:
        SemalignError: the sides hold different bytes, as after a normaliser; one side alone ends with special entries;
            or there is a special entry within the answer, or no token at all.

    Example:
        >>> align_spans([b"The", b" cat", b"s", None], [b"The", b" c", b"ats", None])
        Spans(source=(1, 2, 1), target=(1, 2, 1))
    """
    ours, theirs = _text_of(source), _text_of(target)
    ends = (len(source) > len(ours), len(target) > len(theirs))
    if ends[0] != ends[1]:
        raise SemalignError(
            f"the answer ends with a special entry on the {'source' if ends[0] else 'target'}'s side alone: end it on "
            "both sides or on none"
        )
    ours, theirs = _same_text(ours, theirs)
    found, other = _ends(ours), _ends(theirs)
    cuts = [(count, other[end]) for end, count in found.items() if end in other]
    whole = (len(source), len(target))
    if ends[0]:
        cuts.append(whole)
    elif cuts:
        cuts[-1] = whole
    if not cuts:
        raise SemalignError("the answer has no token with text: leave the row out")
    steps = [(b - a, d - c) for (a, c), (b, d) in pairwise([(0, 0), *cuts])]
    return Spans(tuple(step[0] for step in steps), tuple(step[1] for step in steps))


@dataclass(frozen=True, eq=False)
class PairedBatch:
    """Rows as two models with different tokenizers read them."""

    source: Batch
    """input_ids, attention_mask and labels under the source's tokenizer, padded on the right."""
    target: Batch
    """The same rows in the same order under the target's."""
    spans: tuple[Spans, ...]
    """Spans of each row's answer."""


AnyBatch = Batch | PairedBatch
"""Rows of one tokenizer, or of two."""


@dataclass(frozen=True, eq=False)
class BatchSpans:
    """Spans of all rows of a micro-batch, end to end.

    A span starts at the position that predicts its first token; there both models have read the same bytes.
    """

    counts: Int[Tensor, " b"]
    """Spans of each row."""
    starts: Int[Tensor, " s"]
    """Place of each span's first token among the target's answer tokens, in the order of `Supervised.mask`."""
    lengths: Int[Tensor, " s"]
    """Target tokens of each span."""
    source_starts: Int[Tensor, " s"]
    """Place of each span's first token among the source's answer tokens."""
    several: Bool[Tensor, " s"]
    """Whether the span has more than one token on either side."""
    log_likelihood: Float[Tensor, " s"]
    """Of the span under the source, given all before it, in nats at temperature 1."""


def span_log_likelihoods(token_log_probs: Float[Tensor, " p"], spans: BatchSpans) -> Float[Tensor, " s"]:
    """Sum the log-probabilities of the target's answer tokens within each span; differentiable.

    Args:
        token_log_probs: of all answer tokens of the micro-batch, in nats.
        spans: its spans.
    """
    return sums_within(token_log_probs, spans.lengths)


def sums_within(values: Num[Tensor, " p"], lengths: Int[Tensor, " s"]) -> Num[Tensor, " s"]:
    """Sum of the first `lengths[0]` values, of the next `lengths[1]`, …; the lengths add up to all of them."""
    span = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths, output_size=len(values))
    return values.new_zeros(len(lengths)).index_add(0, span, values)


def _text_of(tokens: Sequence[bytes | None]) -> list[bytes]:
    """The tokens before the special entries at the end."""
    count = len(tokens)
    while count and tokens[count - 1] is None:
        count -= 1
    text = [token for token in tokens[:count] if token is not None]
    if len(text) < count:
        raise SemalignError("there is a special entry within the answer: leave the row out")
    return text


def _same_text(source: list[bytes], target: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Both sides without a leading space that one alone has."""
    ours, theirs = b"".join(source), b"".join(target)
    if ours == b" " + theirs:
        return _without_first_byte(source), target
    if theirs == b" " + ours:
        return source, _without_first_byte(target)
    if ours != theirs:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise SemalignError(
            f"the tokenizers read different text from byte {place} of the answer on, {ours[place : place + 12]!r} and "
            f"{theirs[place : place + 12]!r}, as when one of them normalises it: leave the row out"
        )
    return source, target


def _without_first_byte(tokens: list[bytes]) -> list[bytes]:
    first = next(number for number, token in enumerate(tokens) if token)
    return [*tokens[:first], tokens[first][1:], *tokens[first + 1 :]]


def _ends(tokens: list[bytes]) -> dict[int, int]:
    """Tokens up to each byte at which one ends, without those of no bytes that follow."""
    ends: dict[int, int] = {}
    for count, end in enumerate(accumulate(map(len, tokens)), 1):
        ends.setdefault(end, count)
    ends.pop(0, None)
    return ends
