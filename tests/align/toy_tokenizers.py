"""Two toy tokenizers, models that read them, and rows as both read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from semalign_align import PairedBatch, align_spans
from semalign_geometry import SemanticBasis, Transport, Vocabulary, VocabularyClasses, align_classes, fit_transport
from torch import Tensor

from ..models import Example, collate, tiny_model
from .chain import SOURCE_DEPTH, SOURCE_WIDTH, TARGET_DEPTH, TARGET_WIDTH

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PADDING, BEGIN, END = 0, 1, 2


@dataclass(frozen=True)
class ToyTokenizer:
    """Takes the longest entry that the text begins with; entries 0, 1 and 2 are padding, begin and end of turn."""

    pieces: tuple[bytes, ...]
    rows: int
    """Rows of the head, more than there are entries."""

    def encode(self, text: bytes) -> list[int]:
        ids = []
        while text:
            piece = max((piece for piece in self.pieces if text.startswith(piece)), key=len)
            ids.append(3 + self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary((None, None, None, *self.pieces), frozenset([END]), lambda text: self.encode(text)[0])


def _tokenizer(pieces: str, rows: int) -> ToyTokenizer:
    return ToyTokenizer(tuple(piece.encode() for piece in pieces.split("|")), rows)


SOURCE_TOKENS = _tokenizer("a|b|c|d|e| |ab|bc|abc|de| a| e|dd|ccc", 20)
TARGET_TOKENS = _tokenizer("e|d|c|b|a| |cd|e |bc|bcd|aa|ab|  ", 18)
CLASSES: VocabularyClasses = align_classes(
    SOURCE_TOKENS.vocabulary, TARGET_TOKENS.vocabulary, source_rows=20, target_rows=18
)
ROWS = [(b"ab", b"abcd e"), (b"cd de", b"a"), (b"e", b"bcd aabde  a"), (b"dd", b"ccc"), (b" a", b"abcabc"), (b"c", b"")]
"""Prompts and answers; the last answer is an end of turn alone."""


def source_model(architecture: str = "llama") -> "PreTrainedModel":
    return tiny_model(architecture, seed=100, depth=SOURCE_DEPTH, width=SOURCE_WIDTH, vocabulary=SOURCE_TOKENS.rows)


def target_model(architecture: str = "llama") -> "PreTrainedModel":
    return tiny_model(architecture, seed=200, depth=TARGET_DEPTH, width=TARGET_WIDTH, vocabulary=TARGET_TOKENS.rows)


def transport_between(source: "PreTrainedModel", target: "PreTrainedModel") -> Transport:
    bases = [
        SemanticBasis.from_model(model, entries=ids)
        for model, ids in ((source, CLASSES.shared.source_ids), (target, CLASSES.shared.target_ids))
    ]
    return fit_transport(bases[0], bases[1], fold_gain=True)


def example(tokenizer: ToyTokenizer, row: tuple[bytes, bytes]) -> Example:
    """Tokens of a row, the prompt after a begin and the answer before an end of turn; and those of the prompt."""
    prompt, answer = tokenizer.encode(row[0]), tokenizer.encode(row[1])
    return torch.tensor([BEGIN, *prompt, *answer, END]), 1 + len(prompt)


def paired(
    rows: Sequence[tuple[bytes, bytes]] = ROWS,
    *,
    source: ToyTokenizer = SOURCE_TOKENS,
    target: ToyTokenizer = TARGET_TOKENS,
) -> PairedBatch:
    """A batch of rows as both tokenizers read them."""
    sides = [[example(tokenizer, row) for row in rows] for tokenizer in (source, target)]

    def answer(tokenizer: ToyTokenizer, row: Example) -> tuple[bytes | None, ...]:
        ids: Tensor = row[0][row[1] :]
        return tokenizer.vocabulary.bytes_of(ids.tolist())

    spans = [align_spans(answer(source, one), answer(target, other)) for one, other in zip(*sides, strict=True)]
    return PairedBatch(collate(sides[0]), collate(sides[1]), tuple(spans))
