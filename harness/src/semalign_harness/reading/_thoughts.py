"""Thoughts before an answer."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGINS, _ENDS = ("<think>", "<thinking>", "[THINK]"), ("</think>", "</thinking>", "[/THINK]")
_END = re.compile("|".join(map(re.escape, _ENDS)))
_BEGIN = re.compile(rf"\s*(?:{'|'.join(map(re.escape, _BEGINS))})")


def after_thoughts(text: str) -> str:
    """Return the text after the last `</think>` (`</thinking>`, `[/THINK]`).

    Text that opens `<think>` and never closes it was cut off within the thoughts: it holds no answer,
    and the result is empty. Where the prompt itself opens `<think>`, the text has no mark and is
    taken as it is.
    """
    ends = list(_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return "" if _BEGIN.match(rest) else rest


def answer_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Decode an answer without special tokens, but with the marks that `after_thoughts` needs.

    The marks are special tokens in some models.

    Args:
        tokenizer: of the model that wrote the answer.
        ids: the answer as token ids.
    """
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in (*_BEGINS, *_ENDS)} - {None, tokenizer.unk_token_id}
    if marks.isdisjoint(ids):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    dropped = {*tokenizer.all_special_ids, *special} - marks
    return str(tokenizer.decode([token for token in ids if token not in dropped], skip_special_tokens=False))
