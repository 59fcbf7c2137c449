"""Contracts: JSON and back, closed, versioned, frozen."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import semalign_geometry
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from semalign_geometry import BasisManifest, Contract, FidelityReport, LayerFidelity, SemalignError

from .strategies import contracts

each_contract = pytest.mark.parametrize("contract", contracts, ids=lambda contract: contract.__name__)
LAYER = LayerFidelity(target_layer=1, source_layer=2, recomposition_cosine=1.0, cka_transported=0.5, cka_direct=0.6)
REPORT = FidelityReport(frame="dual", fold_gain=False, tokens=3, layers=(LAYER,))


def test_every_contract_is_covered() -> None:
    exported = [value for value in vars(semalign_geometry).values() if isinstance(value, type)]
    assert {value for value in exported if issubclass(value, Contract)} - {Contract} == set(contracts)


@each_contract
@given(data=st.data())
def test_round_trip_through_json(contract: type[Contract], data: st.DataObject) -> None:
    written = data.draw(contracts[contract])
    with TemporaryDirectory() as folder:
        path = written.write(Path(folder) / "deeper" / "contract.json")
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # strict JSON: no bare Infinity
        assert contract.read(path) == written


@each_contract
@given(data=st.data())
def test_unknown_keys_are_refused_with_the_nearest_name(contract: type[Contract], data: st.DataObject) -> None:
    plain = data.draw(contracts[contract]).model_dump(mode="json")
    name = data.draw(st.sampled_from(sorted(contract.model_fields)))
    with pytest.raises(SemalignError) as caught:
        contract.parse({**plain, f"{name}x": 1}, origin="here")
    assert str(caught.value) == f"here: unknown key '{name}x': did you mean '{name}'?"


@each_contract
@given(data=st.data(), ahead=st.integers(1, 9))
def test_newer_versions_are_refused(contract: type[Contract], data: st.DataObject, ahead: int) -> None:
    plain = data.draw(contracts[contract]).model_dump(mode="json")
    newer = contract.current_version + ahead
    with pytest.raises(SemalignError, match=rf"{contract.__name__} has format version {newer}, .* upgrade semalign"):
        contract.parse({**plain, "version": newer, "key of the future": 1})


@each_contract
@given(data=st.data())
def test_contracts_are_frozen(contract: type[Contract], data: st.DataObject) -> None:
    drawn = data.draw(contracts[contract])
    for name in contract.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(drawn, name, getattr(drawn, name))


@each_contract
def test_every_field_has_its_docstring(contract: type[Contract]) -> None:
    assert all(field.description for field in contract.model_fields.values())


def test_problems_inside_of_a_contract_name_their_place() -> None:
    plain = REPORT.model_dump(mode="json")
    plain["layers"][0]["cka_transportd"] = 1
    with pytest.raises(SemalignError, match=r"unknown key 'layers\.0\.cka_transportd': did you mean 'cka_transported'"):
        FidelityReport.parse(plain)
    plain = REPORT.model_dump(mode="json")
    plain["layers"][0]["version"] = 7
    with pytest.raises(SemalignError, match="LayerFidelity has format version 7"):
        FidelityReport.parse(plain)


def test_missing_and_wrong_values_are_named() -> None:
    plain = REPORT.model_dump(mode="json")
    with pytest.raises(SemalignError, match="key 'tokens' is missing"):
        FidelityReport.parse({key: value for key, value in plain.items() if key != "tokens"})
    with pytest.raises(SemalignError, match="'tokens' is 'many': "):
        FidelityReport.parse({**plain, "tokens": "many"})
    with pytest.raises(SemalignError, match=r"known keys are condition, entries, "):
        BasisManifest.parse(
            {"zzzz": 1} | dict.fromkeys(("width", "entries", "rank", "condition"), 1) | {"products": "x"}
        )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist; expected a FidelityReport"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "the whole"),
    ],
)
def test_files_that_are_no_contract_are_refused(content: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SemalignError, match=problem) as caught:
        FidelityReport.read(path)
    assert str(path) in str(caught.value)
