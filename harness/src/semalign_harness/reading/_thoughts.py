"""Thoughts before an answer."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BEGINS, _ENDS = ("<think>", "<thinking>", "[THINK]"), ("</think>", "</thinking>", "[/THINK]")
_END = re.compile("|".join(map(re.escape, _ENDS)))
_BEGIN = re.compile(rf"\s*(?:{'|'.join(map(re.escape, _BEGINS))})")


def after_thoughts(text: str) -> str:
    """The text after the last `</think>` (`</thinking>`, `[/THINK]`).

    Text that begins with `<think>` and never closes it was cut off while the model thought: it holds no answer, and
    the result is empty. Where the prompt itself opens `<think>`, such text has no mark and is taken as it is.
    """
    ends = list(_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return "" if _BEGIN.match(rest) else rest


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer without special tokens, but with the marks of thoughts, which are special in some models:
    `after_thoughts` could not tell thoughts from the answer without them.

    Args:
        tokenizer: of the model that wrote it.
        ids: what the model wrote, as token ids.
    """
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in (*_BEGINS, *_ENDS)} - {None, tokenizer.unk_token_id}
    if marks.isdisjoint(ids):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    dropped = {*tokenizer.all_special_ids, *special} - marks
    return str(tokenizer.decode([token for token in ids if token not in dropped], skip_special_tokens=False))
