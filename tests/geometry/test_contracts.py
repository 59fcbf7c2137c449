"""Contracts: JSON and back, closed, versioned, frozen."""

from pathlib import Path

import pytest
import semalign_geometry
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import BasisManifest, Contract, FidelityReport, LayerFidelity, SemalignError

from ..contracts import assert_keeps_the_laws, settings_of
from .strategies import contracts

LAYER = LayerFidelity(target_layer=1, source_layer=2, recomposition_cosine=1.0, cka_transported=0.5, cka_direct=0.6)
REPORT = FidelityReport(frame="dual", fold_gain=False, tokens=3, layers=(LAYER,))


def test_every_contract_is_covered() -> None:
    assert settings_of(semalign_geometry) == set(contracts)


@pytest.mark.parametrize("contract", contracts, ids=lambda contract: contract.__name__)
@given(data=st.data())
def test_contracts_keep_the_laws(contract: type[Contract], data: st.DataObject) -> None:
    assert_keeps_the_laws(data.draw(contracts[contract]))


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
