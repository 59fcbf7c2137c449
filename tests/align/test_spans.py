"""Spans of two encodings of one answer: they cover it, are disjoint, and end at equal bytes on both sides."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import BatchSpans, Spans, align_spans, span_log_likelihoods
from semalign_geometry.base import SemalignError

Tokens = list[bytes | None]

texts = st.text("abc é漢🙂\n", min_size=1, max_size=12).map(str.encode)


@st.composite
def splits(draw: st.DrawFn, text: bytes) -> Tokens:
    """Tokens that are the text together, some of them empty; code points may be split."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def answers(draw: st.DrawFn) -> tuple[Tokens, Tokens]:
    """Two encodings of one answer, both with special entries at the end, or none of them."""
    text = draw(texts)
    one, other = draw(splits(text)), draw(splits(text))
    ended = draw(st.booleans())
    ends = [[None] * (draw(st.integers(1, 2)) if ended else 0) for _ in range(2)]
    return [*one, *ends[0]], [*other, *ends[1]]


def pieces(tokens: Tokens, sizes: tuple[int, ...]) -> list[bytes]:
    """Text of each span, the end of turn as a byte that no text has."""
    ends = list(accumulate(sizes))
    assert ends[-1] == len(tokens), "the spans cover the answer"
    written = [b"\0" if token is None else token for token in tokens]
    return [b"".join(written[end - size : end]).replace(b"\0\0", b"\0") for end, size in zip(ends, sizes, strict=True)]


def inner_ends(tokens: Tokens) -> set[int]:
    """Bytes at which a token ends."""
    return set(accumulate(len(token) for token in tokens if token))


@given(answers())
def test_spans_are_the_same_text_on_both_sides(sides: tuple[Tokens, Tokens]) -> None:
    source, target = sides
    spans = align_spans(source, target)
    ours, theirs = pieces(source, spans.source), pieces(target, spans.target)
    assert ours == theirs and all(ours)


@given(answers())
def test_every_byte_at_which_both_sides_have_an_end_is_one_of_a_span(sides: tuple[Tokens, Tokens]) -> None:
    source, target = sides
    texts_of_spans = pieces(source, align_spans(source, target).source)
    found = set(accumulate(len(piece) for piece in texts_of_spans if piece != b"\0"))
    assert found == inner_ends(source) & inner_ends(target)


@given(answers())
def test_sides_can_be_swapped(sides: tuple[Tokens, Tokens]) -> None:
    source, target = sides
    one, other = align_spans(source, target), align_spans(target, source)
    assert (one.source, one.target) == (other.target, other.source)


@given(texts.flatmap(splits), st.booleans())
def test_with_one_tokenizer_spans_are_tokens(tokens: Tokens, ended: bool) -> None:
    tokens = [token for token in tokens if token] + [None] * ended
    ones = (1,) * len(tokens)
    assert align_spans(tokens, tokens) == Spans(ones, ones)


@given(answers(), st.booleans())
def test_a_space_that_one_side_writes_first_is_ignored(sides: tuple[Tokens, Tokens], own_token: bool) -> None:
    source, target = sides
    plain = align_spans(source, target)
    if own_token:
        first, *others = align_spans([b" ", *source], target).source
        assert (first - 1, *others) == plain.source
    else:
        place = next(number for number, token in enumerate(source) if token)
        spaced = [*source[:place], b" " + (source[place] or b""), *source[place + 1 :]]
        assert align_spans(spaced, target) == plain


def test_tokens_without_bytes_join_the_span_that_follows() -> None:
    assert align_spans([b"", b"a", b"", b"b", b""], [b"a", b"b"]) == Spans((2, 3), (1, 1))
    assert align_spans([b"a", b"", None], [b"a", None]) == Spans((1, 2), (1, 1))
    assert align_spans([b"", None], [None]) == Spans((2,), (1,))


@pytest.mark.parametrize(
    ("source", "target", "match"),
    [
        ([b"caf\xc3\xa9"], [b"cafe\xcc\x81"], r"different text from byte 3 .* b'\\xc3\\xa9' and b'e\\xcc\\x81'"),
        ([b"ab"], [b"abc"], r"different text from byte 2 of the answer on, b'' and b'c'"),
        ([b"  a"], [b"a"], "different text from byte 0"),
        ([b"a", None], [b"a"], "ends with a special entry on the source's side alone: end it on both"),
        ([b"a"], [b"a", None], "ends with a special entry on the target's side alone"),
        ([b"a", None, b"b"], [b"ab"], "special entry within the answer: leave the row out"),
        ([], [], "no token with text"),
        ([b""], [b"", b""], "no token with text"),
    ],
)
def test_answers_that_do_not_match_are_refused(source: Tokens, target: Tokens, match: str) -> None:
    with pytest.raises(SemalignError, match=match):
        align_spans(source, target)


@pytest.mark.parametrize(("source", "target"), [((1, 2), (1,)), ((1, 0), (1, 1)), ((1,), (-1,))])
def test_spans_have_tokens_on_both_sides(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(SemalignError, match="one token or more on both sides, got .*: make them with align_spans"):
        Spans(source, target)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 10_000))
def test_likelihoods_of_spans_are_sums_over_their_tokens(lengths: list[int], seed: int) -> None:
    sizes = torch.tensor(lengths)
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spans = BatchSpans(
        counts=torch.tensor([len(lengths)]),
        starts=sizes.cumsum(0) - sizes,
        lengths=sizes,
        source_starts=torch.arange(len(lengths)),
        several=sizes > 1,
        log_likelihood=torch.zeros(len(lengths)),
    )
    found = span_log_likelihoods(values.requires_grad_(), spans)
    torch.testing.assert_close(found, torch.stack([part.sum() for part in values.split(lengths)]))
    found.sum().backward()
    assert values.grad is not None and (values.grad == 1).all()
