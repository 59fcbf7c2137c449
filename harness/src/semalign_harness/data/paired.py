"""Rows for two models that have tokenizers of their own: one answer, read by each model in its own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import semalign_align
import semalign_geometry
from semalign_geometry.base import SemalignError

from .encoding import Conversation, Example, Role, SourceSide, TextEncoder

if TYPE_CHECKING:
    from semalign_align import Spans
    from semalign_geometry import Vocabulary

Pieces = tuple[bytes | None, ...]
"""Bytes of the tokens of an answer; None for special entries."""


class TextChanged(SemalignError):
    """The two models read different text in one answer."""


class TextLost(TextChanged):
    """A tokenizer has no entry for a part of a row."""


@dataclass(frozen=True, eq=False)
class PairedEncoder:
    """Encodes rows for both models, each by its own template and tokenizer, and finds the spans of their answers."""

    source: TextEncoder
    """Encoder of the source."""
    target: TextEncoder
    """Encoder of the target."""
    source_vocabulary: "Vocabulary"
    """Bytes of the source's entries."""
    target_vocabulary: "Vocabulary"
    """Bytes of the target's entries."""

    @classmethod
    def of(cls, source: TextEncoder, target: TextEncoder) -> "PairedEncoder":
        """Read both vocabularies.

        Raises:
            SemalignError: a tokenizer loses text.
        """
        vocabularies = (semalign_geometry.Vocabulary.of(each.tokenizer, ends=each.ends) for each in (source, target))
        return cls(source, target, *vocabularies)

    def example(self, conversation: Conversation, *, name: str) -> Example:
        """Encode a conversation whose last turn is the answer; errors name it by `name`.

        Space around the answer is stripped, which some templates do and others do not.

        Raises:
            TextLost: a tokenizer has no entry for a part of the prompt.
            TextChanged: a tokenizer or a template changes the text of the answer on one side.
            SemalignError: as `TextEncoder.example` does.
        """
        *before, last = conversation.messages
        stripped = replace(conversation, messages=[*before, {**last, "content": str(last["content"]).strip()}])
        target = self.target.example(stripped, name=name)
        source = self.source.example(stripped, name=f"{name} for the source")
        for encoder, read in ((self.source, source), (self.target, target)):
            if encoder.unknown in read.prompt_ids:
                raise TextLost(f"{encoder.tokenizer.name_or_path} has no entry for a part of the prompt")
        spans, framed = self._spans(source.answer_ids, target.answer_ids)
        side = SourceSide(source.prompt_ids, source.answer_ids, spans, framed, conversation)
        return Example(target.prompt_ids, target.answer_ids, str(last["content"]), side)

    def with_answer(self, row: Example, writer: Role, ids: Sequence[int]) -> Example:
        """Return a row with an answer that one of the models wrote, carried over to the other as text.

        The writer keeps its own tokens, unless the other model reads a different text next to them: then both get the
        text encoded again. An answer that was cut off has no end on either side. The reference text stays.

        Args:
            row: the row, which `example` returned.
            writer: the model that wrote the answer.
            ids: its tokens, 1 or more, with an end token unless they were cut off.

        Raises:
            TextChanged: they are no text, or read differently on both sides.
            SemalignError: a template refuses the answer.
        """
        assert row.source is not None
        vocabulary = self.source_vocabulary if writer == "source" else self.target_vocabulary
        ended = ids[-1] in vocabulary.ends
        text = _text(vocabulary.bytes_of(ids[:-1] if ended else ids))
        fresh = self.example(row.source.conversation.answered(text), name="a written answer")
        assert fresh.source is not None
        source, target = fresh.source.answer_ids, fresh.answer_ids
        if not ended:
            source = source[: _text_tokens(self.source_vocabulary.bytes_of(source))]
            target = target[: _text_tokens(self.target_vocabulary.bytes_of(target))]
        try:
            written = (tuple(ids), target) if writer == "source" else (source, tuple(ids))
            spans, framed = self._spans(*written)
        except TextChanged:
            written = (source, target)
            spans, framed = self._spans(*written)
        side = replace(row.source, answer_ids=written[0], spans=spans, framed=framed)
        return replace(row, answer_ids=written[1], source=side)

    def unread(self, conversation: Conversation) -> list[str]:
        """Return the keys of a conversation that one of the templates never reads."""
        return sorted({*self.source.unread(conversation), *self.target.unread(conversation)})

    def holds_end(self, answer: str) -> bool:
        """Return whether an answer names an end-of-sequence token before its own end."""
        return self.source.holds_end(answer) or self.target.holds_end(answer)

    def _spans(self, source: Sequence[int], target: Sequence[int]) -> "tuple[Spans, tuple[bool, bool]]":
        """Return the spans of an answer, and whether its first and its last span differ by space of one side alone."""
        sides = [self.source_vocabulary.bytes_of(source), self.target_vocabulary.bytes_of(target)]
        counts = [_text_tokens(side) for side in sides]
        space = [side[count:] for side, count in zip(sides, counts, strict=True)]
        if differs := _joined(space[0]) != _joined(space[1]):
            sides = [(*side[:count], *[None] * (len(side) - count)) for side, count in zip(sides, counts, strict=True)]
        first = [_joined(side)[:1] for side in sides]
        try:
            spans = semalign_align.align_spans(*sides)
        except SemalignError as error:
            fact, _, _ = str(error).rpartition(": ")  # the remedy is for other callers
            raise TextChanged(fact) from error
        framed = (first[0] != first[1], differs)
        if sum(framed) >= len(spans.source):
            raise TextChanged("the answer has no span besides those that differ by space of one side")
        return spans, framed


def _text_tokens(pieces: Pieces) -> int:
    """Return the number of tokens before an answer's end, without space that the template writes between both."""
    end = len(pieces)
    while end and pieces[end - 1] is None:
        end -= 1
    count = end
    while end < len(pieces) and count > 1 and (pieces[count - 1] or b"").isspace():
        count -= 1
    return count


def _joined(pieces: Pieces) -> bytes:
    return b"".join(piece for piece in pieces if piece is not None)


def _text(pieces: Pieces) -> str:
    """Text of the tokens of a written answer."""
    if None in pieces:
        raise TextChanged("the answer has special entries before its end")
    try:
        return _joined(pieces).decode().strip()
    except UnicodeDecodeError as error:
        raise TextChanged("the answer is no text, as when it was cut off inside a character") from error
