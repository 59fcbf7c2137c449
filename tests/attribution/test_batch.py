"""Supervised positions of a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_attribution import IGNORE, supervised
from semalign_geometry.base import SemalignError

from ..models import random_batch, random_examples

seeds = st.integers(0, 10_000)


@given(seeds, st.integers(1, 5), st.integers(4, 12))
def test_supervised_positions_are_those_that_predict_an_answer_token(seed: int, count: int, length: int) -> None:
    examples = random_examples(seed, examples=count, length=length)
    found = supervised(random_batch(seed, examples=count, length=length))
    expected = [(row, t - 1) for row, (ids, prompt) in enumerate(examples) for t in range(prompt, len(ids))]
    assert found.mask.nonzero().tolist() == [list(position) for position in expected]
    assert found.labels.tolist() == [int(examples[row][0][t + 1]) for row, t in expected]
    assert found.counts.tolist() == [len(ids) - prompt for ids, prompt in examples]


@given(seeds, st.integers(1, 5))
def test_example_means_are_means_within_each_example(seed: int, count: int) -> None:
    found = supervised(random_batch(seed, examples=count))
    values = torch.randn(len(found.labels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([part.mean() for part in values.split(found.counts.tolist())])
    torch.testing.assert_close(found.example_means(values), expected)


def test_labels_under_padding_and_of_the_first_token_do_not_count() -> None:
    batch = random_batch(0, examples=1, length=5)
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"][0, 3:] = 0
    assert supervised(batch).mask.tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("key", ["input_ids", "attention_mask", "labels"])
def test_a_missing_key_is_named(key: str) -> None:
    batch = random_batch(0)
    del batch[key]
    with pytest.raises(SemalignError, match=f"lacks {key}"):
        supervised(batch)


@pytest.mark.parametrize("key", ["input_ids", "attention_mask", "labels"])
def test_shapes_must_agree(key: str) -> None:
    batch = random_batch(0)
    batch[key] = batch[key][:, :-1]
    with pytest.raises(SemalignError, match=r"one shape \(b, n\)"):
        supervised(batch)


def test_batches_have_two_dimensions() -> None:
    with pytest.raises(SemalignError, match=r"one shape \(b, n\)"):
        supervised({key: value[0] for key, value in random_batch(0).items()})


def test_left_padding_is_refused() -> None:
    batch = {key: value.flip(1) for key, value in random_batch(0).items()}
    with pytest.raises(SemalignError, match="padded on the left"):
        supervised(batch)


def test_a_hole_in_the_mask_is_refused() -> None:
    batch = random_batch(0)
    batch["attention_mask"][:, 1] = 0
    with pytest.raises(SemalignError, match="a hole: padding must follow the tokens"):
        supervised(batch)


@pytest.mark.parametrize("kept", [0, 1], ids=["none", "first token only"])
def test_an_example_without_answer_is_named(kept: int) -> None:
    batch = random_batch(0)
    batch["labels"][2] = IGNORE
    batch["labels"][2, :kept] = 5
    with pytest.raises(SemalignError, match="example 2 of the batch has no answer token"):
        supervised(batch)


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(SemalignError, match="no answer token|no token"):
        supervised({key: value[:, :0] for key, value in random_batch(0).items()})
