"""Entries of real tokenizers as bytes: trained here, of every family that is read, and of those that are refused."""

import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import Vocabulary, align_classes
from semalign_geometry.base import SemalignError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "The cat sat on the mat; the hat was 1234 or 99 wide.",
    "def add(a, b):\n    return a + b\n\n\nclass Other:\n        value = 201  # the\ttab",
    "naïve café, Ünïcode, straße, 你好世界 こんにちは, 🙂🙃👍🏽, the end",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>"]
sentences = st.lists(
    st.sampled_from(
        [
            *"abz 0129\n\t.,(",
            " the",
            "  ",
            "    ",
            "cat",
            "é",
            "ß",
            "你好",
            "世",
            "🙂",
            "👍🏽",
            "<s>",
            "▁",
            "Ġ",
            "\u0301",
        ]
    ),
    min_size=1,
    max_size=12,
).map("".join)


@dataclass
class Fast:
    """The few attributes of a transformers fast tokenizer that are read."""

    backend_tokenizer: Any
    special: list[str] = field(default_factory=lambda: SPECIAL)

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self.backend_tokenizer.token_to_id("</s>")
        return found

    @property
    def all_special_ids(self) -> list[int]:
        ids = [self.backend_tokenizer.token_to_id(piece) for piece in self.special]
        return [i for i in ids if i is not None]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def trained(tokenizer: Tokenizer, trainer: Any) -> Fast:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return Fast(tokenizer)


def byte_level(size: int, *, digits: bool, special: Iterable[str] = SPECIAL, prefix_space: bool = False) -> Fast:
    """As GPT-2's, Llama 3's or, with digits one by one, Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), own]) if digits else own
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    return trained(tokenizer, trainer)


def with_byte_fallback(*, older: bool) -> Fast:
    """BPE with "▁" and byte fallback, the space put before a text by a normaliser (Llama 2) or not at all (Gemma)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if older:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")  # trained on words, used without
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    fast = trained(tokenizer, trainer)
    described = json.loads(fast.backend_tokenizer.to_str())
    described["added_tokens"] = [entry for entry in described["added_tokens"] if entry["content"] in SPECIAL]
    if older:
        described["pre_tokenizer"] = None
    return Fast(Tokenizer.from_str(json.dumps(described)))


def unigram() -> Fast:
    """As T5's or XGLM's: pieces with "▁", no bytes; what it does not know is <unk>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trained(tokenizer, trainer)


def with_added_spaces() -> Fast:
    """As GPT-NeoX's: several spaces are added entries, not special, of the text itself."""
    fast = byte_level(400, digits=False)
    fast.backend_tokenizer.add_tokens([AddedToken("    ", normalized=True), AddedToken("<tool>", normalized=False)])
    return fast


FAMILIES: dict[str, Callable[[], Fast]] = {
    "byte-level": lambda: byte_level(500, digits=False),
    "byte-level, single digits": lambda: byte_level(400, digits=True, special=["<|end|>", "</s>"]),
    "byte-level, space before": lambda: byte_level(400, digits=False, prefix_space=True),
    "byte-level, added spaces": with_added_spaces,
    "byte fallback, as Llama 2": lambda: with_byte_fallback(older=True),
    "byte fallback, newer": lambda: with_byte_fallback(older=False),
    "unigram": unigram,
}
COMPLETE = [name for name in FAMILIES if name != "unigram"]
"""Families that write every text."""


@cache
def family(name: str) -> Fast:
    return FAMILIES[name]()


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary.of(family(name))


@pytest.mark.parametrize("name", COMPLETE)
@given(sentences)
def test_the_bytes_of_a_text_s_tokens_are_the_text(name: str, text: str) -> None:
    text = text.replace("<s>", "")
    if name.startswith("byte fallback"):
        text = text.replace("▁", "")  # is a space to it
    tokens = vocabulary(name).bytes_of(family(name).encode(text))
    assert None not in tokens
    joined = b"".join(token for token in tokens if token is not None)
    assert joined in (text.encode(), b" " + text.encode())


@given(sentences)
def test_unigram_gives_back_what_it_knows(text: str) -> None:
    tokens = vocabulary("unigram").bytes_of(family("unigram").encode(text))
    if None not in tokens:
        joined = b"".join(token for token in tokens if token is not None).decode()
        assert joined.split() == unicodedata.normalize("NFKC", text).replace("▁", " ").split()


@pytest.mark.parametrize("name", FAMILIES)
def test_special_entries_are_none_and_others_are_bytes(name: str) -> None:
    fast, found = family(name), vocabulary(name)
    ids = fast.get_vocab()
    assert len(found.entries) == max(ids.values()) + 1
    for piece in (*SPECIAL, "<|end|>"):
        if piece in ids:
            assert found.entries[ids[piece]] is None
    known = [entry for entry in found.entries if entry is not None]
    assert len(known) >= len(found.entries) - 4
    assert found.ends == {ids["</s>"]}
    assert found.bytes_of([len(found.entries) + 7, ids["</s>"]]) == (None, None)


def test_forms_of_entries() -> None:
    """One space in two printed forms, single bytes, and entries that are the text itself."""
    for name, piece in (("byte-level", "Ġthe"), ("byte fallback, as Llama 2", "▁the"), ("unigram", "▁t")):
        text = " " + piece[1:]
        assert vocabulary(name).entries[family(name).get_vocab()[piece]] == text.encode()
    fallback = vocabulary("byte fallback, newer")
    assert fallback.entries[family("byte fallback, newer").get_vocab()["<0xF0>"]] == b"\xf0"
    added = vocabulary("byte-level, added spaces")
    ids = family("byte-level, added spaces").get_vocab()
    assert (added.entries[ids["    "]], added.entries[ids["<tool>"]]) == (b"    ", b"<tool>")


def test_ends_can_be_named() -> None:
    found = Vocabulary.of(family("byte-level"), ends=[0, 1])
    assert found.ends == {0, 1} and found.entries[:2] == (None, None)


@pytest.mark.parametrize("name", FAMILIES)
@given(st.binary(min_size=1, max_size=6) | sentences.map(str.encode))
def test_the_first_token_of_bytes_begins_them(name: str, text: bytes) -> None:
    found = vocabulary(name).first(text)
    if found is not None:
        entry = vocabulary(name).entries[found]
        assert entry and text.startswith(entry)
    elif name != "unigram":
        assert "▁".encode() in text


@pytest.mark.parametrize("name", FAMILIES)
@given(st.sampled_from(["the", " the", "cat", " cat", "1234", "99", "(", "你好", "  ", "\n"]))
def test_nothing_is_put_before_bytes_inside_of_a_text(name: str, text: str) -> None:
    """The first token after a word is the first token of what follows it, where the tokenizer splits there."""
    found = vocabulary(name).first(text.encode())
    ids = family(name).encode(f"x\t{text}")
    tokens = vocabulary(name).bytes_of(ids)
    at = next((i for i in range(len(tokens)) if b"".join(t or b"" for t in tokens[:i]).endswith(b"\t")), None)
    if at is not None:
        assert found == ids[at]


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("source", FAMILIES)
def test_classes_of_real_tokenizers(source: str, target: str) -> None:
    one, other = vocabulary(source), vocabulary(target)
    classes = align_classes(one, other)
    for side, column in ((one, classes.source), (other, classes.target)):
        for i, c in enumerate(column.tolist()):
            entry, name = side.entries[i], classes.names[c] if c >= 0 else None
            if isinstance(name, bytes):
                assert entry is not None and entry.startswith(name)
            else:
                assert entry is None or (entry[:1] not in classes.names)
            assert (name == "end") == (i in side.ends)
    if source == target:
        names = [one.entries[i] for i in range(len(one.entries)) if one.entries[i] is not None]
        assert {*classes.names} - {"end", "rest"} == {*names}
    if {source, target} <= {*COMPLETE}:  # every single byte is shared: no entry is lost
        lost = classes.names.index("rest") if "rest" in classes.names else -1
        for side, column in ((one, classes.source), (other, classes.target)):
            assert all(side.entries[i] is None for i in (column == lost).nonzero()[:, 0].tolist())


def test_digits_several_spaces_and_split_code_points() -> None:
    """Groups of digits go to their first digit; what one side alone spells goes to its first piece on the other."""
    grouped, single = vocabulary("byte-level"), vocabulary("byte-level, single digits")
    classes = align_classes(grouped, single)
    ids = family("byte-level").get_vocab()
    for piece, name in (("Ġ1234", b" "), ("1234", b"1"), ("ĠĠĠ", None), ("<s>", "rest"), ("</s>", "end")):
        if piece in ids:
            found = classes.names[int(classes.source[ids[piece]])]
            assert found == name or (name is None and isinstance(found, bytes) and not found.strip())
    fallback = align_classes(grouped, vocabulary("byte fallback, newer"))
    smiles = [i for i, entry in enumerate(grouped.entries) if entry and "🙂".encode().startswith(entry)]
    assert smiles
    for i in smiles:
        assert fallback.names[int(fallback.source[i])] in ("🙂".encode(), b"\xf0")


def lowercasing() -> Fast:
    fast = byte_level(300, digits=False)
    fast.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    return fast


def words() -> Fast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


def word_pieces() -> Fast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    return trained(tokenizer, trainers.WordPieceTrainer(special_tokens=SPECIAL, show_progress=False))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lowercasing, "its Lowercase changes the text; choose a model with a byte-level"),
        (words, "its Whitespace drops spaces"),
        (word_pieces, "its WordPiece marks where words begin or end"),
        (
            object,
            "object has no fast backend whose entries can be read as bytes: load the tokenizer with use_fast=True",
        ),
    ],
)
def test_tokenizers_that_lose_the_text_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(SemalignError, match=words):
        Vocabulary.of(make())
