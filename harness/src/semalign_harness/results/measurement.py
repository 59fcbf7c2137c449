"""Contract of a measurement on held-out rows."""

from semalign_geometry.base import Contract, Settings


class RowFigures(Settings):
    """Figures of single held-out rows, in columns; means over the supervised tokens of a row."""

    tokens: tuple[int, ...]
    """Supervised tokens of each row, shortest row first."""
    nll: tuple[float, ...]
    """Negative log-likelihood of the answer, nats per token."""
    kl: tuple[float, ...]
    """KL(p_S ‖ p_T), nats per token."""
    agreement: tuple[float, ...]
    """Share of tokens with the source's likeliest entry."""
    correct: tuple[bool, ...] = ()
    """Whether the generated answer of each row is right, in the order of the rows that were drawn."""


class Measurement(Contract):
    """Figures of one model on held-out rows; means over supervised tokens."""

    answer_nll: float
    """Negative log-likelihood of the answer tokens, nats per token."""
    kl: float
    """Exact KL(p_S ‖ p_T) to the source, nats per token; 0 for the source itself."""
    agreement: float
    """Share of the supervised tokens where the likeliest entry is the source's."""
    accuracy: float | None = None
    """Share of the generated answers that arrive at the reference's number; None when nothing was generated."""
    tokens: int
    """Supervised tokens."""
    rows: int
    """Held-out rows."""
    answer_rows: int = 0
    """Rows with a generated answer."""
    by_row: RowFigures
    """The same row by row, for intervals and paired tests."""


def gap_recovered(source: float, before: float, after: float) -> float | None:
    """(after − before) / (source − before): 0 nothing, 1 all of the gap; None when there is no gap.

    Example:
        >>> gap_recovered(source=0.2, before=1.0, after=0.6)
        0.5
    """
    return None if source == before else (after - before) / (source - before)
