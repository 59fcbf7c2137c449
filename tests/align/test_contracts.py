"""Settings and contracts: JSON and back, closed, versioned, within their ranges."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import semalign_align
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from semalign_align import (
    AnswerNLL,
    Cosine,
    FinalHidden,
    Fisher,
    OutputKL,
    Relation,
    Shard,
    SupervisionManifest,
    SupervisionSettings,
    TopK,
)
from semalign_attribution import LayerPairing
from semalign_geometry import Contract, SemalignError, Settings, TransportManifest

_number = st.integers(0, 10**9)
_shards = st.builds(Shard, file=st.text(max_size=8), examples=_number)
_settings = st.builds(
    SupervisionSettings,
    residual=st.sampled_from(["layer", "span"]),
    output=st.one_of(st.just(FinalHidden()), st.builds(TopK, k=st.integers(1, 10**6))),
    temperature=st.floats(0, 100, exclude_min=True),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    shard_bytes=st.integers(1, 2**40),
)
_pairings = st.lists(st.integers(1, 9), min_size=1, max_size=9).map(
    lambda layers: LayerPairing(policy="manual", source_depth=9, source_layers=tuple(sorted(layers)))
)
_manifests = st.builds(
    SupervisionManifest,
    files=st.dictionaries(st.text(max_size=8), st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3),
    settings=_settings,
    pairing=_pairings,
    transport=st.builds(TransportManifest),
    examples=_number,
    tokens=_number,
    supervised_tokens=_number,
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
    OutputKL: st.just(OutputKL()),
    Relation: st.builds(Relation, scope=st.sampled_from(["sequence", "batch"]), unit_tokens=st.booleans()),
    Shard: _shards,
    SupervisionManifest: _manifests,
    SupervisionSettings: _settings,
    TopK: st.builds(TopK, k=st.integers(1, 10**6)),
}

each_group = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)


def test_every_group_of_settings_is_covered() -> None:
    exported = [value for value in vars(semalign_align).values() if isinstance(value, type)]
    assert {value for value in exported if issubclass(value, Settings)} == set(GROUPS)
    assert [group for group in GROUPS if issubclass(group, Contract)] == [SupervisionManifest]


@each_group
@given(data=st.data())
def test_round_trip_through_json(group: type[Settings], data: st.DataObject) -> None:
    written = data.draw(GROUPS[group])
    assert group.model_validate_json(written.model_dump_json()) == written


@given(_manifests)
def test_the_manifest_is_read_as_it_was_written(manifest: SupervisionManifest) -> None:
    with TemporaryDirectory() as folder:
        path = manifest.write(Path(folder) / "manifest.json")
        assert SupervisionManifest.read(path) == manifest


@each_group
@given(data=st.data())
def test_unknown_keys_are_refused(group: type[Settings], data: st.DataObject) -> None:
    plain = data.draw(GROUPS[group]).model_dump(mode="json")
    names = sorted(group.model_fields)
    name = f"{data.draw(st.sampled_from(names))}x" if names else "x"
    with pytest.raises(SemalignError, match=f"here: unknown key '{name}'"):
        group.parse({**plain, name: 1}, origin="here")


def test_unknown_keys_inside_name_their_place() -> None:
    with pytest.raises(SemalignError, match=r"unknown key 'output\.kk': did you mean 'k'"):
        SupervisionSettings.parse({"output": {"kind": "top_k", "kk": 3}})


@given(_manifests, st.integers(1, 9))
def test_newer_versions_are_refused(manifest: SupervisionManifest, ahead: int) -> None:
    newer = SupervisionManifest.current_version + ahead
    plain = manifest.model_dump(mode="json") | {"version": newer, "key of the future": 1}
    with pytest.raises(SemalignError, match=rf"SupervisionManifest has format version {newer}, .* upgrade semalign"):
        SupervisionManifest.parse(plain)


@each_group
@given(data=st.data())
def test_settings_are_frozen_and_documented(group: type[Settings], data: st.DataObject) -> None:
    drawn = data.draw(GROUPS[group])
    for name, field in group.model_fields.items():
        assert field.description, name
        with pytest.raises(ValidationError, match="frozen"):
            setattr(drawn, name, getattr(drawn, name))


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"dtype": "float16"}, "dtype"),
        ({"residual": "block"}, "residual"),
        ({"output": {"kind": "top_k", "k": 0}}, "output.k"),
        ({"output": {"kind": "dense"}}, "output"),
    ],
)
def test_values_out_of_range_are_named(data: dict[str, Any], key: str) -> None:
    with pytest.raises(SemalignError, match=f"'{key}' is "):
        SupervisionSettings.parse(data)
