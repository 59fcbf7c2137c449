"""Size of a store, before the source runs."""

from ._settings import SupervisionSettings, TopK

TOKEN_BYTES = 8
"""A token's id and label."""
EXAMPLE_BYTES = 8
"""An example's length and its supervised tokens."""
ENTRY_BYTES = 8
"""The id of a vocabulary entry."""


def store_bytes(
    settings: SupervisionSettings,
    *,
    examples: int,
    tokens: int,
    supervised_tokens: int,
    layers: int,
    width: int,
    source_width: int,
    head_bytes: int,
    entries: int,
) -> int:
    """Bytes of the tensors of a store; the headers of its files and the manifest add some kilobytes.

    Args:
        settings: what is kept, and in which form.
        examples: rows.
        tokens: all their tokens.
        supervised_tokens: those with supervision.
        layers: paired source layers, each counted once.
        width: of the transported contributions.
        source_width: of the source's final hidden states.
        head_bytes: the source's head over the shared entries.
        entries: shared vocabulary entries.
    """
    number = {"float32": 4, "bfloat16": 2, "int8": 1}[settings.dtype]
    scale = 4 if settings.dtype == "int8" else 0
    supervised = layers * (number * width + scale)
    fixed = EXAMPLE_BYTES * examples + TOKEN_BYTES * tokens + ENTRY_BYTES * entries
    if isinstance(settings.output, TopK):
        supervised += 8 * min(settings.output.k, entries) + 4  # ids, log-probabilities, and the tail
    else:
        supervised += (4 if settings.dtype == "float32" else 2) * source_width
        fixed += head_bytes
    return fixed + supervised * supervised_tokens
