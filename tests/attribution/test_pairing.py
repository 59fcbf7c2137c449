"""Pairing policies: one source layer for each target layer, in depth order; `monotone` finds the best."""

import json
import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from semalign_attribution import (
    POLICIES,
    LayerPairing,
    LayerScores,
    Manual,
    Monotone,
    NearestCritical,
    PairingPolicy,
    Random,
    SimilarityPairing,
    Uniform,
    pair_layers,
)
from semalign_geometry.base import ComponentError, SemalignError

Matrix = Sequence[Sequence[float]]

depths = st.integers(1, 12)
score = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-1e4, 1e4)
depth_weights = st.sampled_from([0.0, 1.0, 100.0]) | st.floats(0, 1e3)


def scores_of(mean: Sequence[float], similarity: Matrix | None = None) -> LayerScores:
    zeros = (0.0,) * len(mean)
    rows = None if similarity is None else tuple(map(tuple, similarity))
    return LayerScores(
        scorer="given",
        examples=1,
        mean=tuple(mean),
        standard_error=zeros,
        stability=1.0,
        top_frequency=zeros,
        similarity=rows,
    )


@st.composite
def problems(draw: st.DrawFn, largest: int = 12) -> LayerScores:
    """Scores with a similarity row for each layer of a target; its depth is the number of rows."""
    depth, target_depth = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    row = st.lists(score, min_size=depth, max_size=depth)
    return scores_of(draw(row), draw(st.lists(row, min_size=target_depth, max_size=target_depth)))


def target_depth_of(scores: LayerScores) -> int:
    assert scores.similarity is not None
    return len(scores.similarity)


def objective(rows: Matrix, path: Sequence[int], depth_weight: float) -> float:
    """Σ_k score_{k,π(k)} / max|score| − λ (π(k)/L_S − k/L_T)²."""
    largest = max(abs(value) for row in rows for value in row) or 1.0
    return math.fsum(
        row[layer - 1] / largest - depth_weight * (layer / len(row) - k / len(rows)) ** 2
        for k, (row, layer) in enumerate(zip(rows, path, strict=True), 1)
    )


def best_objective(rows: Matrix, depth_weight: float) -> float:
    """The largest objective over all non-decreasing sequences."""
    every = combinations_with_replacement(range(1, len(rows[0]) + 1), len(rows))
    return max(objective(rows, path, depth_weight) for path in every)


@pytest.mark.parametrize("name", POLICIES)
@given(problems())
def test_one_source_layer_for_each_target_layer_in_depth_order(name: str, scores: LayerScores) -> None:
    target_depth = target_depth_of(scores)
    pairing = pair_layers(scores, target_depth, policy=name)
    assert (pairing.policy, pairing.source_depth, pairing.target_depth) == (name, scores.depth, target_depth)
    layers = pairing.source_layers
    assert len(layers) == target_depth
    assert all(1 <= layer <= scores.depth for layer in layers)
    assert all(before <= after for before, after in zip(layers, layers[1:], strict=False))
    assert [pairing.source_of(k) for k in range(1, target_depth + 1)] == list(layers)
    assert LayerPairing.parse(json.loads(pairing.model_dump_json())) == pairing
    assert pair_layers(scores, target_depth, policy=name) == pairing


@given(problems(largest=6), depth_weights)
def test_monotone_equals_brute_force(scores: LayerScores, depth_weight: float) -> None:
    rows = [scores.mean] * target_depth_of(scores)
    path = pair_layers(scores, len(rows), policy=Monotone(depth_weight=depth_weight)).source_layers
    best = best_objective(rows, depth_weight)
    assert objective(rows, path, depth_weight) == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(problems(largest=6), depth_weights)
def test_similarity_equals_brute_force(scores: LayerScores, depth_weight: float) -> None:
    assert scores.similarity is not None
    policy = SimilarityPairing(depth_weight=depth_weight)
    path = pair_layers(scores, len(scores.similarity), policy=policy).source_layers
    best = best_objective(scores.similarity, depth_weight)
    assert objective(scores.similarity, path, depth_weight) == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(problems(), st.sampled_from(["monotone", "similarity"]))
def test_a_large_depth_weight_gives_equal_relative_depth(scores: LayerScores, name: str) -> None:
    target_depth = target_depth_of(scores)
    policy = (Monotone if name == "monotone" else SimilarityPairing)(depth_weight=1e9)
    path = pair_layers(scores, target_depth, policy=policy).source_layers
    for k, layer in enumerate(path, 1):
        # |π(k)/L_S − k/L_T|, in units of 1 / (L_S L_T).
        deviations = [abs(other * target_depth - k * scores.depth) for other in range(1, scores.depth + 1)]
        assert deviations[layer - 1] == min(deviations)
    if scores.depth % target_depth == 0:
        assert path == Uniform()(scores, target_depth)


@given(problems())
def test_without_depth_weight_a_single_best_layer_takes_all(scores: LayerScores) -> None:
    best = max(scores.mean)
    others = [value for value in scores.mean if value != best]
    assume(
        len(others) == scores.depth - 1 and all(best - value > 1e-6 * max(map(abs, scores.mean)) for value in others)
    )
    path = pair_layers(scores, target_depth_of(scores), policy=Monotone(depth_weight=0)).source_layers
    assert set(path) == {scores.mean.index(best) + 1}


@given(problems(), st.sampled_from([0.5, 4.0, 1024.0]))
def test_monotone_does_not_depend_on_the_unit_of_the_scores(scores: LayerScores, unit: float) -> None:
    assume(all(value == 0 or abs(value) > 1e-200 for value in scores.mean))
    scaled = scores_of([unit * value for value in scores.mean])
    target_depth = target_depth_of(scores)
    assert pair_layers(scaled, target_depth) == pair_layers(scores, target_depth)


@given(depths, depths, st.floats(0, 1e3))
def test_ties_go_to_the_shallower_layer(depth: int, target_depth: int, level: float) -> None:
    path = pair_layers(scores_of([level] * depth), target_depth, policy=Monotone(depth_weight=0)).source_layers
    assert path == (1,) * target_depth


def test_ties_on_the_way_go_to_the_shallower_layer() -> None:
    scores = scores_of([0.0] * 3, [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert pair_layers(scores, 2, policy=SimilarityPairing(depth_weight=0)).source_layers == (1, 3)


@given(depths)
def test_the_identity_gives_the_diagonal(depth: int) -> None:
    scores = scores_of([0.0] * depth, torch.eye(depth).tolist())
    policy = SimilarityPairing(depth_weight=0)
    assert pair_layers(scores, depth, policy=policy).source_layers == tuple(range(1, depth + 1))


@given(problems())
def test_uniform_is_the_formula(scores: LayerScores) -> None:
    target_depth = target_depth_of(scores)
    layers = pair_layers(scores, target_depth, policy="uniform").source_layers
    assert layers == tuple(max(1, (scores.depth * k) // target_depth) for k in range(1, target_depth + 1))
    assert layers[-1] == scores.depth


def test_uniform_of_llama_2() -> None:
    layers = pair_layers(scores_of([0.0] * 40), 32, policy="uniform").source_layers
    assert layers[:5] == (1, 2, 3, 5, 6) and layers[-2:] == (38, 40)


@given(problems())
def test_nearest_critical_puts_the_critical_layer_at_its_place(scores: LayerScores) -> None:
    target_depth = target_depth_of(scores)
    uniform = pair_layers(scores, target_depth, policy="uniform").source_layers
    layers = pair_layers(scores, target_depth, policy="nearest_critical").source_layers
    critical = scores.mean.index(max(scores.mean)) + 1
    place = min(k for k in range(target_depth) if uniform[k] >= critical)
    assert layers[place] == critical
    assert layers[:place] + layers[place + 1 :] == uniform[:place] + uniform[place + 1 :]


@given(depths, depths, st.integers(0, 1000))
def test_random_is_reproducible_and_leaves_the_global_state(depth: int, target_depth: int, seed: int) -> None:
    scores, state = scores_of([0.0] * depth), torch.get_rng_state()
    first = pair_layers(scores, target_depth, policy=Random(seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        assert pair_layers(scores, target_depth, policy=Random(seed=seed)) == first


def test_random_reaches_every_layer_and_differs_by_seed() -> None:
    scores = scores_of([0.0] * 3)
    drawn = {pair_layers(scores, 2, policy=Random(seed=seed)).source_layers for seed in range(100)}
    assert drawn == {(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)}


@given(problems(), st.data())
def test_manual_is_taken_as_it_is(scores: LayerScores, data: st.DataObject) -> None:
    target_depth = target_depth_of(scores)
    layer = st.integers(1, scores.depth)
    layers = tuple(sorted(data.draw(st.lists(layer, min_size=target_depth, max_size=target_depth))))
    assert pair_layers(scores, target_depth, policy=Manual(layers=layers)).source_layers == layers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 2), "the manual pairing names 2 source layers for 3 target layers: name one for each target layer"),
        ((), "the manual pairing names 0 source layers for 3 target layers"),
        ((1, 2, 5), "manual pairing: .*target layer 3 has source layer 5, expected 1 to 4"),
        ((0, 1, 2), "manual pairing: .*target layer 1 has source layer 0, expected 1 to 4"),
        ((1, 3, 2), r"manual pairing: .*must not decrease with depth, got \[1, 3, 2\]"),
    ],
)
def test_manual_is_checked(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(SemalignError, match=message):
        pair_layers(scores_of([0.0] * 4), 3, policy=Manual(layers=layers))


class Deepest:
    """A policy of a user's own."""

    name = "deepest"

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        return (scores.depth,) * target_depth


class Broken(Deepest):
    name = "broken"

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        return tuple(range(scores.depth, scores.depth - target_depth, -1))


def test_any_policy_may_be_given_and_is_checked() -> None:
    scores = scores_of([0.0] * 4)
    pairing = pair_layers(scores, 6, policy=Deepest())
    assert (pairing.policy, pairing.source_layers) == ("deepest", (4,) * 6)
    with pytest.raises(SemalignError, match=r"broken pairing: .*got \[4, 3\]"):
        pair_layers(scores, 2, policy=Broken())
    assert all(isinstance(policy, PairingPolicy) for policy in [*POLICIES.values(), Deepest()])


def test_unknown_policies_are_named_with_the_known_ones() -> None:
    known = "uniform, nearest_critical, monotone, similarity, random"
    with pytest.raises(SemalignError, match=f"unknown pairing policy 'best': choose one of {known}"):
        pair_layers(scores_of([0.0]), 1, policy="best")


@pytest.mark.parametrize("target_depth", [0, -1])
def test_a_target_has_layers(target_depth: int) -> None:
    with pytest.raises(SemalignError, match=f"target_depth is {target_depth}, expected at least 1"):
        pair_layers(scores_of([0.0]), target_depth)


def test_similarity_needs_the_scores_of_this_target() -> None:
    with pytest.raises(SemalignError, match="needs a row of scores for each of 2 target layers, and given has none"):
        pair_layers(scores_of([0.0] * 3), 2, policy="similarity")
    with pytest.raises(SemalignError, match="for each of 2 target layers"):
        pair_layers(scores_of([0.0] * 3, [[0.0] * 3]), 2, policy="similarity")


@pytest.mark.parametrize("policy", [Monotone, SimilarityPairing])
@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_depth_weights_are_finite_and_not_negative(policy: type[Monotone], weight: float) -> None:
    with pytest.raises(SemalignError, match=f"'depth_weight' is {weight}"):
        policy.parse({"depth_weight": weight})


def test_names_stand_for_policies_of_their_kind() -> None:
    assert {name: policy.name for name, policy in POLICIES.items()} == {name: name for name in POLICIES}
    assert Manual(layers=(1,)).name == "manual"
    classes = (Uniform, NearestCritical, Monotone, SimilarityPairing, Random)
    assert tuple(map(type, POLICIES.values())) == classes


PLAIN = {"policy": "manual", "source_depth": 4, "source_layers": [1, 2, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_depth": 3}, "target layer 3 has source layer 4, expected 1 to 3"),
        ({"source_layers": [2, 1]}, "must not decrease"),
        ({"source_layers": []}, "'source_layers' is"),
    ],
)
def test_bad_pairings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SemalignError, match=message):
        LayerPairing.parse(PLAIN | change)


@pytest.mark.parametrize("layer", [-1, 0, 4])
def test_target_layers_are_counted_from_one(layer: int) -> None:
    pairing = LayerPairing.parse(PLAIN)
    assert [pairing.source_of(k) for k in (1, 2, 3)] == [1, 2, 4]
    with pytest.raises(SemalignError, match=f"target layer {layer} does not exist"):
        pairing.source_of(layer)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "the own pairing returned None: expected a tuple with a source layer for each target layer"),
        (3, "the own pairing returned 3 of type int: expected a tuple"),
        ((1.5, 2.5), "own pairing: 'source_layers.0' is 1.5: input should be a valid integer"),
    ],
)
def test_a_policy_that_returns_no_layers_is_one_sentence(returned: object, told: str) -> None:
    class Own:
        name = "own"

        def __call__(self, scores: LayerScores, target_depth: int) -> object:
            return returned

    with pytest.raises(SemalignError, match=told) as caught:
        pair_layers(scores_of([1.0, 2.0, 3.0]), target_depth=2, policy=Own())  # type: ignore[arg-type]
    assert isinstance(caught.value, ComponentError) == (not isinstance(returned, tuple))


def test_what_is_no_score_is_refused_in_one_sentence() -> None:
    with pytest.raises(SemalignError, match="scores is of type list, expected a LayerScores"):
        pair_layers([0.1, 0.9], 2)
