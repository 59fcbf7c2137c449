"""Vocabulary entries that two models share, and their ids in each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .base import SemalignError, short_repr


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """Entries known to both tokenizers: entry i is row `source_ids[i]` of one head and row `target_ids[i]` of the
    other.

    Padded rows, which no tokenizer entry names, are in neither.
    """

    source_ids: Int[Tensor, " e"]
    """Ids in the source's vocabulary, ascending."""
    target_ids: Int[Tensor, " e"]
    """Ids of the same entries in the target's."""
    only_in_source: int
    """Entries of the source's tokenizer that the target's lacks."""
    only_in_target: int
    """Entries of the target's tokenizer that the source's lacks."""

    __repr__ = short_repr

    @property
    def same_ids(self) -> bool:
        """Whether every shared entry has the same id on both sides, so that one tokenisation serves both models."""
        return torch.equal(self.source_ids, self.target_ids)

    def __len__(self) -> int:
        return len(self.source_ids)


def align_vocabularies(source: Mapping[str, int], target: Mapping[str, int]) -> SharedVocabulary:
    """Match two vocabularies by token string.

    Args:
        source: token string → id, as `tokenizer.get_vocab()` returns it.
        target: the same for the target.

    Raises:
        SemalignError: nothing is shared.
    """
    pairs = sorted((source[token], target[token]) for token in source.keys() & target.keys())
    if not pairs:
        raise SemalignError(
            f"the tokenizers share none of their {len(source)} and {len(target)} entries: choose models of one family"
        )
    ids = torch.tensor(pairs, dtype=torch.long)
    return SharedVocabulary(ids[:, 0].clone(), ids[:, 1].clone(), len(source) - len(pairs), len(target) - len(pairs))
