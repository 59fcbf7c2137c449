"""Settings and contracts of attribution keep what all keep."""

from typing import Any

import pytest
import semalign_attribution
from hypothesis import given
from hypothesis import strategies as st
from semalign_attribution import (
    Ablation,
    GradientActivation,
    LayerPairing,
    LayerScores,
    Manual,
    Monotone,
    NearestCritical,
    Random,
    SimilarityPairing,
    Uniform,
)
from semalign_geometry.base import Settings

from ..contracts import assert_keeps_the_laws, settings_of

_number = st.floats(allow_nan=False, allow_infinity=False)
_weight = st.floats(0, 1e6)
_layers = st.lists(st.integers(1, 9), min_size=1, max_size=9).map(lambda layers: tuple(sorted(layers)))


@st.composite
def _scores(draw: st.DrawFn) -> LayerScores:
    depth = draw(st.integers(1, 6))
    row = st.lists(_number, min_size=depth, max_size=depth).map(tuple)
    return LayerScores(
        scorer=draw(st.text(max_size=10)),
        examples=draw(st.integers(1, 1000)),
        mean=draw(row),
        standard_error=draw(row),
        stability=draw(_number),
        top_frequency=draw(row),
        similarity=draw(st.none() | st.lists(row, min_size=1, max_size=4).map(tuple)),
    )


GROUPS: dict[type[Settings], st.SearchStrategy[Any]] = {
    Ablation: st.just(Ablation()),
    GradientActivation: st.builds(GradientActivation),
    LayerPairing: st.builds(LayerPairing, policy=st.text(max_size=8), source_depth=st.just(9), source_layers=_layers),
    LayerScores: _scores(),
    Manual: st.builds(Manual, layers=_layers),
    Monotone: st.builds(Monotone, depth_weight=_weight),
    NearestCritical: st.just(NearestCritical()),
    Random: st.builds(Random, seed=st.integers()),
    SimilarityPairing: st.builds(SimilarityPairing, depth_weight=_weight),
    Uniform: st.just(Uniform()),
}


def test_every_group_of_settings_is_covered() -> None:
    assert settings_of(semalign_attribution) == set(GROUPS)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
@given(data=st.data())
def test_settings_keep_the_laws(group: type[Settings], data: st.DataObject) -> None:
    assert_keeps_the_laws(data.draw(GROUPS[group]))
