"""Settings and contracts: JSON and back, closed, versioned, within their ranges."""

from typing import Any

import pytest
import semalign_align
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import (
    AnswerNLL,
    Cosine,
    FinalHidden,
    Fisher,
    LabelCosine,
    OutputKL,
    Relation,
    Shard,
    SpanLikelihood,
    SupervisionManifest,
    SupervisionSettings,
    TopK,
)
from semalign_attribution import LayerPairing
from semalign_geometry import TransportManifest
from semalign_geometry.base import Contract, SemalignError, Settings

from ..contracts import assert_keeps_the_laws, settings_of

_number = st.integers(0, 10**9)
_shards = st.builds(Shard, file=st.text(max_size=8), examples=_number)
_settings = st.builds(
    SupervisionSettings,
    output=st.one_of(st.just(FinalHidden()), st.builds(TopK, k=st.integers(1, 10**6))),
    temperature=st.floats(0, 100, exclude_min=True),
    dtype=st.sampled_from(["bfloat16", "float32", "int8"]),
    shard_bytes=st.integers(1, 2**40),
)
_pairings = st.lists(st.integers(1, 9), min_size=1, max_size=9).map(
    lambda layers: LayerPairing(policy="manual", source_depth=9, source_layers=tuple(sorted(layers)))
)
_manifests = st.builds(
    SupervisionManifest,
    files=st.dictionaries(st.text(max_size=8), st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3),
    key=st.text(max_size=8),
    settings=_settings,
    pairing=_pairings,
    transport=st.builds(TransportManifest),
    examples=_number,
    tokens=_number,
    supervised_tokens=_number,
    residual_error=st.floats(0, 1),
    entries=_number,
    head_scale=st.floats(0.01, 100),
    head_softcap=st.none() | st.floats(0.1, 100),
    shards=st.lists(_shards, max_size=3).map(tuple),
)
GROUPS: dict[type[Settings], st.SearchStrategy[Any]] = {
    AnswerNLL: st.just(AnswerNLL()),
    Cosine: st.just(Cosine()),
    FinalHidden: st.just(FinalHidden()),
    Fisher: st.just(Fisher()),
    LabelCosine: st.just(LabelCosine()),
    OutputKL: st.builds(OutputKL, divergence=st.sampled_from(["forward", "reverse", "jensen_shannon"])),
    Relation: st.just(Relation()),
    Shard: _shards,
    SpanLikelihood: st.builds(SpanLikelihood, temperature=st.floats(0.01, 100)),
    SupervisionManifest: _manifests,
    SupervisionSettings: _settings,
    TopK: st.builds(TopK, k=st.integers(1, 10**6)),
}


def test_every_group_of_settings_is_covered() -> None:
    assert settings_of(semalign_align) == set(GROUPS)
    assert [group for group in GROUPS if issubclass(group, Contract)] == [SupervisionManifest]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
@given(data=st.data())
def test_settings_keep_the_laws(group: type[Settings], data: st.DataObject) -> None:
    assert_keeps_the_laws(data.draw(GROUPS[group]))


def test_unknown_keys_inside_name_their_place() -> None:
    with pytest.raises(SemalignError, match=r"unknown key 'output\.kk': did you mean 'k'"):
        SupervisionSettings.parse({"output": {"kind": "top_k", "kk": 3}})


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"dtype": "float16"}, "dtype"),
        ({"output": {"kind": "top_k", "k": 0}}, "output.k"),
        ({"output": {"kind": "dense"}}, "output"),
    ],
)
def test_values_out_of_range_are_named(data: dict[str, Any], key: str) -> None:
    with pytest.raises(SemalignError, match=f"'{key}' is "):
        SupervisionSettings.parse(data)
