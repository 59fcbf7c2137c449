"""Entries of a tokenizer as the bytes that they stand for, read from a fast tokenizer's own description."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .base import SemalignError, short_repr

_LOSSY = ("BertNormalizer", "Lowercase", "StripAccents")
"""Normalisers that write another text, from which the bytes of the given one are not to be had."""
_DROPPING = ("BertPreTokenizer", "CharDelimiterSplit", "Whitespace", "WhitespaceSplit")
"""Pre-tokenisers that drop the whitespace between words."""
_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
"""Entry of one byte, in vocabularies with byte fallback."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Entries of a tokenizer as bytes.

    Two tokenizers print one entry in different forms ("Ġthe" and "▁the"); its bytes, " the" here, are the same.

    Law: the entries of the tokens of a text, joined, are the text, but for one leading space that some tokenizers add
    and what Unicode normalisation (NFC, NFKC) changes.
    """

    entries: tuple[bytes | None, ...]
    """Bytes by id; None for a special entry, and for an id that no entry has."""
    ends: frozenset[int]
    """Ids that end a turn; special entries all."""
    first: Callable[[bytes], int | None]
    """First token of some bytes that stand inside of a text; None where the tokenizer cannot read them."""

    __repr__ = short_repr

    @classmethod
    def of(cls, tokenizer: Any, *, ends: Collection[int] = ()) -> "Vocabulary":
        """Read the vocabulary of a transformers fast tokenizer.

        Byte-level entries, SentencePiece's "▁" for a space, with byte fallback or without, and entries that are the
        text itself are understood.

        Args:
            tokenizer: the tokenizer.
            ends: ids that end a turn; the tokenizer's `eos_token_id` by default.

        Raises:
            SemalignError: a tokenizer without a fast backend, or one whose entries do not give the text back
                (lower-casing, stripped accents, dropped spaces, WordPiece).
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise SemalignError(
                f"{type(tokenizer).__name__} has no fast backend whose entries can be read as bytes: load the "
                "tokenizer with use_fast=True, from a folder with a tokenizer.json"
            )
        described = json.loads(backend.to_str())
        _check_keeps_text(described)
        ids = tokenizer.get_vocab()
        eos = tokenizer.eos_token_id
        ends = frozenset(ends or ([] if eos is None else [eos]))
        special = {entry["content"] for entry in described["added_tokens"] if entry["special"]}
        special |= {described["model"].get("unk_token")}
        left_out = ends | frozenset(tokenizer.all_special_ids)
        to_bytes = _reading(described)
        entries: list[bytes | None] = [None] * (max(ids.values(), default=-1) + 1)
        for piece, i in ids.items():
            if piece not in special and i not in left_out:
                entries[i] = to_bytes(piece)
        if (unknown := described["model"].get("unk_id")) is not None:
            entries[unknown] = None
        found = tuple(entries)
        return cls(found, ends, _FirstToken(backend, described, found))

    def bytes_of(self, ids: Sequence[int]) -> tuple[bytes | None, ...]:
        """Bytes of each of some tokens; None for special entries, and for ids beyond the vocabulary."""
        return tuple(self.entries[i] if i < len(self.entries) else None for i in ids)


class _FirstToken:
    """Reads bytes with a copy of a tokenizer that takes them to stand inside of a text: nothing is put before them."""

    def __init__(self, backend: Any, described: dict[str, Any], entries: tuple[bytes | None, ...]) -> None:
        self._tokenizer = type(backend).from_str(json.dumps(_inside(described)))
        self._tokenizer.encode_special_tokens = True  # their names are text here
        self._entries = entries
        self._byte_level = "ByteLevel" in _kinds(described)
        self._bytes = {}
        if described["model"].get("byte_fallback"):
            ids = backend.get_vocab()
            self._bytes = {byte: ids.get(f"<0x{byte:02X}>") for byte in range(256)}

    def __call__(self, text: bytes) -> int | None:
        """First token of the bytes; None where the tokenizer cannot read them."""
        start = next(self._read(text), None)
        entry = None if start is None else self._entries[start]
        return start if entry and text.startswith(entry) else None  # a normaliser may have changed the text

    def _read(self, text: bytes) -> Iterator[int]:
        try:
            yield from self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError as error:
            if self._byte_level:
                pieces = self._tokenizer.model.tokenize("".join(_PRINTED[byte] for byte in text))
                yield from (piece.id for piece in pieces)
            elif error.start:
                yield from self._read(text[: error.start])
            elif (byte := self._bytes.get(text[0])) is not None:
                yield byte


def _inside(described: dict[str, Any]) -> dict[str, Any]:
    """Description of the tokenizer that puts no space, and no token, before a text."""
    inside: dict[str, Any] = json.loads(json.dumps({key: part for key, part in described.items() if key != "model"}))
    inside |= {"truncation": None, "padding": None, "post_processor": None, "model": described["model"]}
    for part in _parts(inside["normalizer"], inside["pre_tokenizer"]):
        part |= {key: value for key, value in (("add_prefix_space", False), ("prepend_scheme", "never")) if key in part}
        for steps in ("normalizers", "pretokenizers"):
            if steps in part:
                part[steps] = [step for step in part[steps] if step["type"] not in ("Prepend", *_DROPPING)]
    if (inside["normalizer"] or {}).get("type") == "Prepend":
        inside["normalizer"] = None
    return inside


def _parts(*described: Any) -> Iterator[dict[str, Any]]:
    """Parts of a pipeline, and the parts of its sequences."""
    for part in described:
        if part is not None:
            yield part
            for steps in ("normalizers", "pretokenizers", "decoders"):
                yield from _parts(*part.get(steps, ()))


def _kinds(described: dict[str, Any]) -> set[str]:
    return {part["type"] for part in _parts(*(described[step] for step in ("normalizer", "pre_tokenizer", "decoder")))}


def _check_keeps_text(described: dict[str, Any]) -> None:
    """Refuse a tokenizer whose entries are not pieces of the text."""
    kinds = _kinds(described)
    model = described["model"]
    reasons = [f"its {kind} changes the text" for kind in _LOSSY if kind in kinds]
    if "Metaspace" not in kinds and "ByteLevel" not in kinds:
        reasons += [f"its {kind} drops spaces" for kind in _DROPPING if kind in kinds]
    if model["type"] == "WordPiece" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        reasons.append(f"its {model['type']} marks where words begin or end in the entries themselves")
    if reasons:
        raise SemalignError(
            f"the entries of this tokenizer do not give the text back: {reasons[0]}; choose a model with a byte-level "
            "or SentencePiece tokenizer"
        )


def _reading(described: dict[str, Any]) -> Callable[[str], bytes]:
    """Function from the printed form of an entry to its bytes."""
    if "ByteLevel" in _kinds(described):
        return _bytes_of_printed
    replaced = "▁" in json.dumps(
        [described["normalizer"], described["pre_tokenizer"], described["decoder"]], ensure_ascii=False
    )
    fallback = bool(described["model"].get("byte_fallback"))

    def to_bytes(piece: str) -> bytes:
        if fallback and (byte := _FALLBACK.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return (piece.replace("▁", " ") if replaced else piece).encode()

    return to_bytes


def _printed() -> list[str]:
    """Printed form of each byte in byte-level vocabularies: itself where it is visible, else a letter from U+0100 on.

    Source: GPT-2.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


_PRINTED = _printed()
_BYTE = {printed: byte for byte, printed in enumerate(_PRINTED)}


def _bytes_of_printed(piece: str) -> bytes:
    """Bytes of a byte-level entry; an added entry may hold characters that print no byte, and is the text itself."""
    try:
        return bytes(_BYTE[each] for each in piece)
    except KeyError:
        return piece.encode()
