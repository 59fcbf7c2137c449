"""Laws of vocabulary alignment."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import SemanticBasis, align_vocabularies
from semalign_geometry.base import SemalignError

from .strategies import normal, seeds, vocabularies


@given(vocabularies)
def test_equal_vocabularies_share_everything_at_equal_ids(tokens: list[str]) -> None:
    ids = {token: i for i, token in enumerate(tokens)}
    shared = align_vocabularies(ids, ids)
    assert shared.same_ids
    assert shared.source_ids.tolist() == list(range(len(tokens)))
    assert (len(shared), shared.only_in_source, shared.only_in_target) == (len(tokens), 0, 0)


@given(st.data())
def test_each_pair_names_one_token(data: st.DataObject) -> None:
    tokens = data.draw(vocabularies)
    source = {token: i for i, token in enumerate(data.draw(st.permutations(tokens)))}
    kept = data.draw(st.lists(st.sampled_from(tokens), min_size=1, unique=True))
    target = {token: 3 * i for i, token in enumerate([*kept, "TARGET ONLY"])}
    shared = align_vocabularies(source, target)
    names = {i: token for token, i in source.items()}
    assert shared.source_ids.tolist() == sorted(shared.source_ids.tolist())
    assert {names[i] for i in shared.source_ids.tolist()} == set(kept)
    for i, j in zip(shared.source_ids.tolist(), shared.target_ids.tolist(), strict=True):
        assert target[names[i]] == j
    assert (shared.only_in_source, shared.only_in_target) == (len(tokens) - len(kept), 1)
    assert shared.same_ids == all(source[token] == target[token] for token in kept)


@given(vocabularies, vocabularies)
def test_sides_are_exchangeable(first: list[str], second: list[str]) -> None:
    one = {token: i for i, token in enumerate([*first, "BOTH"])}
    other = {token: i for i, token in enumerate([*second, "BOTH"])}
    there, back = align_vocabularies(one, other), align_vocabularies(other, one)
    pairs = set(zip(there.source_ids.tolist(), there.target_ids.tolist(), strict=True))
    assert pairs == set(zip(back.target_ids.tolist(), back.source_ids.tolist(), strict=True))
    assert (there.only_in_source, there.only_in_target) == (back.only_in_target, back.only_in_source)


def test_ids_are_long_and_one_shared_entry_is_enough() -> None:
    shared = align_vocabularies({"a": 4, "b": 0}, {"a": 7, "c": 1, "d": 2})
    assert (shared.source_ids.dtype, shared.target_ids.dtype) == (torch.long, torch.long)
    assert (shared.source_ids.tolist(), shared.target_ids.tolist(), len(shared)) == ([4], [7], 1)
    assert (shared.only_in_source, shared.only_in_target, shared.same_ids) == (1, 2, False)


def test_disjoint_vocabularies_are_refused() -> None:
    with pytest.raises(SemalignError, match="none of their 1 and 2 entries"):
        align_vocabularies({"a": 0}, {"b": 0, "c": 1})


@given(vocabularies, seeds, st.integers(1, 5))
def test_padded_rows_are_in_no_basis(tokens: list[str], seed: int, padding: int) -> None:
    ids = {token: i for i, token in enumerate(tokens)}
    shared = align_vocabularies(ids, ids)
    head = normal(seed, len(tokens), 3)
    padded = torch.cat([head, torch.full((padding, 3), float("nan"), dtype=torch.float64)])
    basis = SemanticBasis.from_head(padded, entries=shared.target_ids)
    assert basis.manifest == SemanticBasis.from_head(head, entries=torch.arange(len(head))).manifest
