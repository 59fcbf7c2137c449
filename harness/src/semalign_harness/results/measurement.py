"""Contract of a measurement on held-out rows."""

import math

from semalign_geometry.base import Contract, Settings


class RowMetrics(Settings):
    """Metrics of single held-out rows, in columns; means over the spans of a row.

    A span is the text between two places where a token ends on both sides; with one tokenizer every supervised token
    is a span.
    """

    tokens: tuple[int, ...]
    """Spans of each row, shortest row first."""
    nll: tuple[float, ...]
    """Negative log-likelihood of the answer, nats per span."""
    kl: tuple[float, ...]
    """KL(p_S ‖ p_T), nats per span."""
    agreement: tuple[float, ...]
    """Share of spans at whose start the likeliest entry is the source's."""
    answer_bytes: tuple[int, ...] = ()
    """Length of each answer in UTF-8, at least 1; empty in results of earlier versions."""
    correct: tuple[bool, ...] = ()
    """Whether the generated answer of each row is right, in the order of the rows that were drawn."""

    @property
    def bits_per_byte(self) -> tuple[float, ...]:
        """Negative log-likelihood of each answer in bits per byte; empty where the bytes are not known."""
        rows = zip(self.nll, self.tokens, self.answer_bytes, strict=True) if self.answer_bytes else ()
        return tuple(nll * spans / size / math.log(2) for nll, spans, size in rows)


class Measurement(Contract):
    """Metrics of one model on held-out rows; means over spans, which are supervised tokens with one tokenizer."""

    answer_nll: float
    """Negative log-likelihood of the answers, nats per span."""
    bits_per_byte: float | None = None
    """The same in bits per byte of the answers, which compares models whatever their tokenizers; None in results of
    earlier versions."""
    kl: float
    """Exact KL(p_S ‖ p_T) to the source, nats per span, of prefix classes where the tokenizers differ; 0 for the source
    itself."""
    agreement: float
    """Share of the spans at whose start the likeliest entry, or class, is the source's."""
    accuracy: float | None = None
    """Share of the generated answers that reach the reference's number; None when nothing was generated."""
    tokens: int
    """Supervised tokens of the target."""
    spans: int | None = None
    """Spans; None with one tokenizer."""
    rows: int
    """Held-out rows."""
    answer_rows: int = 0
    """Rows with a generated answer."""
    by_row: RowMetrics
    """The same metrics row by row, for intervals and paired tests."""


def gap_recovered(source: float, before: float, after: float) -> float | None:
    """Return (after − before) / (source − before): 0 nothing, 1 all of the gap; None without a gap.

    Example:
        >>> gap_recovered(source=0.2, before=1.0, after=0.6)
        0.5
    """
    return None if source == before else (after - before) / (source - before)
