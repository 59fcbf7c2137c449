"""Size of a store, before the source runs."""

from typing import TYPE_CHECKING

from ._settings import SupervisionSettings, TopK

if TYPE_CHECKING:
    from semalign_geometry import VocabularyClasses

TOKEN_BYTES = 8
"""A token's id and label."""
EXAMPLE_BYTES = 8
"""An example's length and the number of its spans."""
SOURCE_LENGTH_BYTES = 4
"""An example's length as the source reads it, with two tokenizers."""
SPAN_BYTES = 12
"""A span's tokens on both sides and its log-likelihood, with two tokenizers."""
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
    source_tokens: int = 0,
    spans: int | None = None,
    classes: "VocabularyClasses | None" = None,
) -> int:
    """Bytes of the tensors of a store; the headers of its files and the manifest add some kilobytes.

    Args:
        settings: what is kept, and in which form.
        examples: rows.
        tokens: all their tokens as the target reads them.
        supervised_tokens: those with supervision, with one tokenizer.
        layers: paired source layers, each counted once.
        width: of the transported contributions.
        source_width: of the source's final hidden states.
        head_bytes: the source's head over the shared entries.
        entries: shared vocabulary entries, or classes.
        source_tokens: all tokens as the source reads them, with two tokenizers.
        spans: spans of all answers, with two tokenizers; None with one.
        classes: classes of the two vocabularies; the bytes of their entries are left out where they are unknown.
    """
    number = {"float32": 4, "bfloat16": 2, "int8": 1}[settings.dtype]
    scale = 4 if settings.dtype == "int8" else 0
    supervised = layers * (number * width + scale)
    fixed = EXAMPLE_BYTES * examples + TOKEN_BYTES * tokens
    if spans is None:
        fixed += ENTRY_BYTES * entries
    else:
        fixed += SOURCE_LENGTH_BYTES * examples + TOKEN_BYTES * source_tokens
        if classes is not None:
            from ._classes import class_tensors  # with torch

            fixed += sum(value.nbytes for value in class_tensors(classes).values())
        supervised += SPAN_BYTES
    if isinstance(settings.output, TopK):
        supervised += 8 * min(settings.output.k, entries) + 4  # ids, log-probabilities, and the tail
    else:
        supervised += (4 if settings.dtype == "float32" else 2) * source_width
        fixed += head_bytes
    return fixed + supervised * (supervised_tokens if spans is None else spans)
