"""A source and a target with different tokenizers, rows as both read them, and a store made with them."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from semalign_align import PairedBatch, Supervision, SupervisionSettings, align_spans, supervise
from semalign_attribution import view_of
from semalign_geometry import SemanticBasis, Transport, Vocabulary, VocabularyClasses, align_classes, fit_transport
from semalign_train import JointStep

from ..align.chain import TOP, pair
from ..align.chain import source_model as any_source
from ..align.chain import target_model as any_target
from ..models import Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END = 2
"""Id that ends an answer, on both sides."""
SPECIAL: tuple[None, ...] = (None, None, None)
LETTERS = tuple(bytes([byte]) for byte in b"abcd012 \n")
SOURCE: tuple[bytes | None, ...] = (*SPECIAL, *LETTERS, b"ab", b" a", b" b", b"bc", b"12", b"\n ", b"  ")
TARGET: tuple[bytes | None, ...] = (*SPECIAL, b"abc", b" b", b"120", b"12", b"cd", b" a", *reversed(LETTERS))
SOURCE_ROWS, TARGET_ROWS = len(SOURCE) + 2, len(TARGET) + 1
"""Rows of the heads, those that no entry has included."""


def first_of(entries: Sequence[bytes | None], text: bytes) -> int | None:
    """The longest entry that a text begins with."""
    fits = [number for number, entry in enumerate(entries) if entry and text.startswith(entry)]
    return max(fits, key=lambda number: len(entries[number] or b""), default=None)


def read(entries: Sequence[bytes | None], text: bytes) -> list[int]:
    """Tokens of a text, longest entries first."""
    ids: list[int] = []
    while text:
        token = first_of(entries, text)
        assert token is not None
        ids.append(token)
        text = text[len(entries[token] or b"") :]
    return ids


def vocabulary(entries: tuple[bytes | None, ...]) -> Vocabulary:
    return Vocabulary(entries, frozenset({END}), partial(first_of, entries))


@cache
def classes() -> VocabularyClasses:
    return align_classes(vocabulary(SOURCE), vocabulary(TARGET), source_rows=SOURCE_ROWS, target_rows=TARGET_ROWS)


def texts(count: int, *, seed: int = 0) -> list[tuple[bytes, bytes]]:
    """Random prompts and answers, of pieces that one of the tokenizers may write as one token."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [entry for entry in (*SOURCE, *TARGET) if entry]

    def text(least: int, most: int) -> bytes:
        size = int(torch.randint(least, most + 1, (), generator=generator))
        return b"".join(pieces[int(i)] for i in torch.randint(len(pieces), (size,), generator=generator))

    return [(text(1, 4), text(2, 10)) for _ in range(count)]


ROWS = [*texts(6), (b"a", b"1"), (b"b ", b"120abcd  ab\n")]
"""Prompts and answers; some answers are one token on both sides, some spans have several tokens on either side."""


def batch_of(rows: Sequence[tuple[bytes, bytes]]) -> PairedBatch:
    """Rows as both models read them, each answer with its end."""
    sides: list[list[Example]] = [[], []]
    spans = []
    for prompt, answer in rows:
        answers = []
        for side, entries in zip(sides, (SOURCE, TARGET), strict=True):
            start, ids = [1, *read(entries, prompt)], [*read(entries, answer), END]
            side.append((torch.tensor(start + ids), len(start)))
            answers.append([entries[token] for token in ids])
        spans.append(align_spans(*answers))
    return PairedBatch(collate(sides[0]), collate(sides[1]), tuple(spans))


def source_model(**more: Any) -> "PreTrainedModel":
    return any_source(vocabulary=SOURCE_ROWS, **more)


def target_model(**more: Any) -> "PreTrainedModel":
    return any_target(vocabulary=TARGET_ROWS, **more)


def transport_between(source: Any, target: Any) -> Transport:
    shared = classes().shared
    bases = (
        SemanticBasis.from_model(source, entries=shared.source_ids),
        SemanticBasis.from_model(target, entries=shared.target_ids),
    )
    return fit_transport(*bases, fold_gain=True)


def make_store(
    folder: Path, *, settings: SupervisionSettings = TOP, over: VocabularyClasses | None = None, **more: Any
) -> Supervision:
    """A store of the source's supervision, one row in a batch."""
    source = source_model()
    transport, batches = transport_between(source, target_model()), [batch_of([row]) for row in ROWS]
    return supervise(source, batches, pair(), transport, folder, settings=settings, classes=over or classes(), **more)


def step_of(store: Any, *, trains: bool = False) -> JointStep:
    """All rows in one micro-batch; the head alone may train."""
    view = view_of(target_model())
    view.model.requires_grad_(False)
    view.model.get_output_embeddings().requires_grad_(trains)  # type: ignore[union-attr, operator]
    data = store.collate(range(len(store)))
    return JointStep(view, view.trace(data.batch, keep=range(1, view.depth + 1)), data, store)
