"""Contract of the entries whose probability a transfer changed most."""

from semalign_geometry.base import Contract, Settings


class EntryChange(Settings):
    """Mean probability of one entry over the held-out spans, or of one class where the tokenizers differ."""

    entry: str
    """Its text as Python writes it, with ␣ for a space, such as `'␣the'`, or its bytes where they are no text; `end`
    for the end of a turn and `rest` for what no other class holds. With one tokenizer, the tokenizer's name of it."""
    source: float
    """By the source."""
    before: float
    """By the target before the transfer."""
    after: float
    """By the target after the transfer."""


class EntryChanges(Contract):
    """Entries, or classes, whose mean probability changed most by the transfer."""

    spans: int
    """Held-out spans, which are supervised tokens with one tokenizer."""
    gained: tuple[EntryChange, ...]
    """Those that became likelier, the largest change first."""
    lost: tuple[EntryChange, ...]
    """Those that became less likely, the largest change first."""
