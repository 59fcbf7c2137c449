"""Models of lm-eval that read texts as a run does."""

from collections.abc import Sequence
from typing import Any

from ..data.encoding import TextEncoder
from ..models.opening import OpenedModel

UNLIMITED = 10**9
"""Tokens: a tokenizer that tells so many or more tells no limit."""


def longest_input(opened: OpenedModel) -> int | None:
    """Most tokens that a model reads at once: what its configuration tells, else what its tokenizer tells, else None
    for no limit."""
    if opened.positions is not None:
        return opened.positions
    told = opened.tokenizer.model_max_length
    return int(told) if 0 < told < UNLIMITED else None


class EncodedLM:
    """Replaces the tokenisation of a model of lm-eval, which it stands before among the bases of a class."""

    encoder: TextEncoder
    """Turns texts into token ids."""

    def tok_encode(
        self,
        string: str | Sequence[str],
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Token ids of a prompt, or of each of several.

        Args:
            string: the text of a prompt, or several.
            add_special_tokens: ignored, as are further settings: the encoder decides.
            left_truncate_len: most tokens, above 0, the first ones being cut; None for all.
            kwargs: ignored.
        """
        assert left_truncate_len is None or left_truncate_len > 0
        if not isinstance(string, str):
            return [self.tok_encode(each, left_truncate_len=left_truncate_len) for each in string]
        ids = self.encoder.ids(string)
        return ids[-left_truncate_len:] if left_truncate_len is not None else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.encoder.pair_ids(context, continuation)
