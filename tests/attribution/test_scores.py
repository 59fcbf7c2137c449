"""Statistics over examples, and the contract of the scores."""

import json
import re
import statistics
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_attribution import Batch, DecoderView, GradientActivation, LayerScores, attribute_layers
from semalign_attribution._attribute import _spearman
from semalign_geometry.base import SemalignError
from torch import Tensor, nn

from ..models import random_batch, tiny_model

MODEL = tiny_model("llama", seed=0)
BATCH = random_batch(0)


class Given:
    """A scorer that hands out given scores, one chunk for each batch."""

    name = "given"

    def __init__(self, *chunks: Tensor) -> None:
        self.chunks = list(chunks)

    def __call__(self, source: DecoderView, batch: Batch) -> Tensor:
        return self.chunks.pop(0)


def attribute(chunks: list[Tensor], *, bootstrap: int = 200, seed: int = 0) -> LayerScores:
    """Attribution by given scores, on a source and batches of their sizes."""
    source = DecoderView(MODEL)
    source.layers = nn.ModuleList([source.layer(1)] * chunks[0].shape[-1])
    batches = [{"input_ids": torch.zeros(len(chunk), 1)} for chunk in chunks]
    return attribute_layers(source, batches, scorer=Given(*chunks), bootstrap=bootstrap, seed=seed)


def scores_of(values: Tensor, *, bootstrap: int = 200, seed: int = 0) -> LayerScores:
    return attribute([values], bootstrap=bootstrap, seed=seed)


def random_values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 7))
def test_mean_and_standard_error(seed: int, count: int, depth: int) -> None:
    values = random_values(seed, count, depth)
    scores = scores_of(values)
    array = values.numpy()
    np.testing.assert_allclose(scores.mean, array.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scores.standard_error, array.std(0, ddof=1) / np.sqrt(count), rtol=1e-10, atol=1e-14)
    assert (scores.examples, scores.depth, scores.scorer) == (count, depth, "given")
    assert scores.similarity is None


def test_batches_are_joined_in_order() -> None:
    values = random_values(1, 6, 4)
    assert attribute([values[:2], values[2:3], values[3:]]) == scores_of(values)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 5), st.integers(1, 5))
def test_similarity_rows_are_means_over_examples(seed: int, count: int, targets: int, depth: int) -> None:
    values = random_values(seed, count, targets, depth)
    scores = scores_of(values)
    np.testing.assert_allclose(scores.similarity, values.mean(0).numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scores.mean, values.mean((0, 1)).numpy(), rtol=1e-12, atol=1e-12)
    assert scores.examples == count


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 7))
def test_bootstrap_bounds(seed: int, count: int, depth: int) -> None:
    scores = scores_of(random_values(seed, count, depth))
    assert -1 - 1e-9 <= scores.stability <= 1 + 1e-9
    assert sum(scores.top_frequency) == pytest.approx(1)
    assert min(scores.top_frequency) >= 0


def test_stability_is_the_mean_rank_correlation_with_resampled_examples() -> None:
    """Against the same quantity from numpy's own draws: equal within the noise of the draws."""
    values = random_values(3, 6, 5) + torch.arange(5) * 0.5
    array, random = values.numpy(), np.random.default_rng(0)
    ranks = array.mean(0).argsort().argsort()
    correlations, first = [], np.zeros(5)
    for _ in range(4000):
        means = array[random.integers(6, size=6)].mean(0)
        correlations.append(np.corrcoef(means.argsort().argsort(), ranks)[0, 1])
        first[means.argmax()] += 1 / 4000
    scores = scores_of(values, bootstrap=4000)
    assert 0.2 < np.mean(correlations) < 0.99
    assert scores.stability == pytest.approx(np.mean(correlations), abs=0.02)
    np.testing.assert_allclose(scores.top_frequency, first, atol=0.04)


def test_the_same_seed_gives_the_same_bootstrap_and_the_global_state_is_not_used() -> None:
    values = random_values(4, 8, 6)
    state = torch.get_rng_state()
    first = scores_of(values, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert scores_of(values, seed=1) == first
    other = scores_of(values, seed=2)
    assert other.stability != first.stability
    assert (other.mean, other.standard_error) == (first.mean, first.standard_error)


def average_ranks(values: list[float]) -> list[float]:
    """Places from 0 in ascending order, written out; equal values share the mean of their places."""
    places = {value: [place for place, other in enumerate(sorted(values)) if other == value] for value in values}
    return [sum(places[value]) / len(places[value]) for value in values]


def rank_correlation(one: list[float], other: list[float]) -> float:
    ranks = [average_ranks(values) for values in (one, other)]
    if any(len(set(values)) == 1 for values in ranks):
        return float(ranks[0] == ranks[1])
    return statistics.correlation(*ranks)


@given(st.integers(1, 6), st.data())
def test_the_rank_correlation_is_that_of_average_ranks(depth: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(-2, 2).map(float), min_size=depth, max_size=depth)
    reference, rows = data.draw(row), data.draw(st.lists(row, min_size=1, max_size=4))
    found = _spearman(torch.tensor(rows, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64))
    assert found.tolist() == pytest.approx([rank_correlation(values, reference) for values in rows])


@given(st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=6), st.randoms())
def test_the_rank_correlation_forgets_the_order_of_the_layers_and_is_one_for_equal_scores(
    values: list[float], random: Random
) -> None:
    row = torch.tensor([values], dtype=torch.float64)
    assert float(_spearman(row, row[0])) == pytest.approx(1)
    other = torch.randn(1, len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = random.sample(range(len(values)), len(values))
    expected = float(_spearman(other, row[0]))
    assert float(_spearman(other[:, order], row[0, order])) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 5)])
def test_one_example_is_stable_and_has_no_error(shape: tuple[int, ...]) -> None:
    scores = scores_of(random_values(5, *shape))
    assert scores.stability == pytest.approx(1)
    assert scores.standard_error == (0.0,) * 5
    assert sorted(scores.top_frequency) == [0, 0, 0, 0, 1]


def test_one_layer_is_stable() -> None:
    scores = scores_of(random_values(6, 4, 1))
    assert scores.stability == 1
    assert scores.top_frequency == (1.0,)


def test_equal_scores_are_stable_with_ties_and_told(caplog: pytest.LogCaptureFixture) -> None:
    scores_of(torch.eye(5))
    assert not caplog.text
    scores = scores_of(torch.zeros(4, 5))
    assert "given scores all source layers alike" in caplog.text
    assert scores.stability == pytest.approx(1)
    assert scores.standard_error == (0.0,) * 5


@pytest.mark.parametrize("batches", [[], [{key: value[:0] for key, value in BATCH.items()}]], ids=["none", "no rows"])
def test_no_examples_are_refused(batches: list[Batch]) -> None:
    with pytest.raises(SemalignError, match="no examples to attribute on"):
        attribute_layers(MODEL, batches, scorer=GradientActivation())


@pytest.mark.parametrize("bootstrap", [0, -3])
def test_the_bootstrap_needs_samples(bootstrap: int) -> None:
    with pytest.raises(SemalignError, match=f"bootstrap is {bootstrap}, expected at least 1"):
        scores_of(random_values(0, 3, 4), bootstrap=bootstrap)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    values = random_values(7, 3, 4)
    values[1, 2] = bad
    with pytest.raises(SemalignError, match="given returned scores that are not finite"):
        scores_of(values)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 5, 4), (1, 3), (3, 3), (2, 1, 1, 3)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model, batch = tiny_model("llama", seed=0, depth=3), random_batch(0, examples=2)
    told = f"given returned scores of shape {shape} for 2 examples and 3 source layers: expected (examples, layers) or"
    with pytest.raises(SemalignError, match=re.escape(told)):
        attribute_layers(model, [batch], scorer=Given(torch.ones(shape)))


def test_damaged_weights_are_refused() -> None:
    model = tiny_model("llama", seed=0)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        SemalignError, match=r"gradient_activation\(residual, absolute\) returned scores that are not finite"
    ):
        attribute_layers(model, [BATCH], scorer=GradientActivation())


def test_bad_batches_are_refused_by_the_scorer() -> None:
    with pytest.raises(SemalignError, match="lacks labels"):
        attribute_layers(MODEL, [{k: v for k, v in BATCH.items() if k != "labels"}], scorer=GradientActivation())


def test_scores_survive_a_file(tmp_path: Path) -> None:
    scores = attribute_layers(MODEL, [BATCH], scorer=GradientActivation())
    assert LayerScores.read(scores.write(tmp_path / "scores.json")) == scores


def plain() -> dict[str, object]:
    return json.loads(scores_of(random_values(8, 3, 2, 4)).model_dump_json())


@pytest.mark.parametrize("key", ["standard_error", "top_frequency"])
def test_rows_of_another_length_are_refused(key: str) -> None:
    with pytest.raises(SemalignError, match="one value for each source layer: mean has 4, another row has 3"):
        LayerScores.parse(plain() | {key: [0.0, 0.0, 0.0]})


def test_similarity_rows_of_another_length_are_refused() -> None:
    with pytest.raises(SemalignError, match="one value for each source layer: mean has 4, another row has 3"):
        LayerScores.parse(plain() | {"similarity": [[0.0] * 4, [0.0] * 3]})
