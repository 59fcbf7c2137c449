"""Contracts: JSON and back, closed, versioned, frozen."""

import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import semalign_geometry
import semalign_geometry.base
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator
from semalign_geometry import BasisManifest, FidelityReport, LayerFidelity
from semalign_geometry.base import Contract, SemalignError, Settings

from ..contracts import assert_keeps_the_laws, settings_of
from .strategies import contracts

LAYER = LayerFidelity(target_layer=1, source_layer=2, recomposition_cosine=1.0, cka_transported=0.5, cka_direct=0.6)
REPORT = FidelityReport(frame="dual", fold_gain=False, tokens=3, layers=(LAYER,))


def test_every_contract_is_covered() -> None:
    assert settings_of(semalign_geometry) | settings_of(semalign_geometry.base) == set(contracts)


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


def test_a_folder_is_no_contract(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="cannot be read as JSON"):
        FidelityReport.read(tmp_path)


def test_files_are_readable_text_that_ends_with_a_newline(tmp_path: Path) -> None:
    text = LAYER.write(tmp_path / "layer.json").read_text(encoding="utf-8")
    assert text == json.dumps(LAYER.model_dump(), indent=2) + "\n"


class Third(Contract):
    current_version: ClassVar[int] = 3
    size: int = 1


def test_earlier_versions_are_read_and_later_ones_refused() -> None:
    assert [Third.parse({"version": version}).version for version in (1, 2, 3, "3")] == [1, 2, 3, 3]
    for version in (4, "4", 12):
        with pytest.raises(SemalignError, match=f"^input: Third has format version {version}, .* reads up to 3: "):
            Third.parse({"version": version})
    for version in ("x", None):
        with pytest.raises(SemalignError, match=f"^input: 'version' is {version!r}: input should be a valid "):
            Third.parse({"version": version})


class Leaf(Settings):
    kind: Literal["leaf"] = "leaf"
    size: int = Field(1, ge=1)

    @field_validator("size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError("The size must be odd")
        return size


class Branch(Settings):
    kind: Literal["branch"] = "branch"
    width: int = 1
    size: int = 1

    @model_validator(mode="after")
    def _slim(self) -> "Branch":
        if self.width > self.size:
            raise ValueError("width exceeds size")
        return self


class Empty(Settings):
    pass


class Tree(Settings):
    part: Annotated[Leaf | Branch, Field(discriminator="kind")] = Leaf()
    either: Leaf | None = None
    many: tuple[Leaf, ...] = ()
    empty: Empty = Empty()
    counts: dict[str, int] = {}
    needed: int


@given(st.integers(0, 9).map(lambda half: 2 * half + 1))
def test_a_section_without_a_kind_is_of_its_default_s(size: int) -> None:
    assert Tree.parse({"needed": 1, "part": {"size": size}}).part == Leaf(size=size)
    assert Tree.parse({"needed": 1, "part": {"kind": "branch", "size": size}}).part == Branch(size=size)
    assert Tree.parse({"needed": 1, "part": {}}) == Tree(needed=1)


@pytest.mark.parametrize("number", [True, False])
def test_truth_values_are_no_numbers(number: bool) -> None:
    with pytest.raises(SemalignError, match=f"^here: needed is {number}: expected a number$"):
        Tree.parse({"needed": number}, origin="here")
    with pytest.raises(SemalignError, match=f"^here: 'either': size is {number}: expected a number$"):
        Tree.parse({"needed": 1, "either": {"size": number}}, origin="here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"needed": 1, "part": {"kind": "leaf", "siz": 1}}, "unknown key 'part.siz': did you mean 'size'?"),
        ({"needed": 1, "part": {"kind": "leaf", "width": 1}}, "unknown key 'part.width': known keys are kind, size"),
        ({"needed": 1, "part": {"kind": "branch", "wdth": 1}}, "unknown key 'part.wdth': did you mean 'width'?"),
        ({"needed": 1, "either": {"siz": 1}}, "unknown key 'either.siz': did you mean 'size'?"),
        ({"needed": 1, "many": [{}, {"siz": 1}]}, "unknown key 'many.1.siz': did you mean 'size'?"),
        ({"needed": 1, "empty": {"a": 1}}, "unknown key 'empty.a': known keys are none"),
        ({"needed": 1, "zzzz": 1}, "unknown key 'zzzz': known keys are counts, either, empty, many, needed, part"),
        ({"needed": 1, "ned": 1}, "unknown key 'ned': did you mean 'needed'?"),
        ({}, "key 'needed' is missing"),
        ({"needed": "x", "zzzz": 1}, "'needed' is 'x': input should be a valid integer"),
        ({"needed": 1, "many": [{}, 3]}, "'many.1' is 3: input should be"),
        ({"needed": 1, "many": [{"size": 0}]}, "'many.0.size' is 0: input should be greater than or equal to 1"),
        ({"needed": 1, "part": {"kind": "leaf", "size": 2}}, "'part.size' is 2: the size must be odd"),
        ({"needed": 1, "part": {"kind": "branch", "width": 2}}, "'part': width exceeds size"),
        ({"needed": 1, "part": {"kind": "twig"}}, "'part' is {'kind': 'twig'}: input tag 'twig' found"),
        (3, "'the whole' is 3: input should be"),
    ],
)
def test_each_problem_is_one_sentence_that_names_its_place(data: object, message: str) -> None:
    with pytest.raises(SemalignError) as caught:
        Tree.parse(data, origin="here")
    assert str(caught.value).startswith(f"here: {message}")
    assert "Value error" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_rule_about_several_keys_of_the_whole_names_no_key() -> None:
    with pytest.raises(SemalignError, match="^input: width exceeds size$"):
        Branch.parse({"width": 2})
