"""Components by name: those that come along and those of installed packages, each mistake one sentence."""

from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field, SerializeAsAny, ValidationError, WrapValidator, model_validator
from semalign_geometry import FRAMES, Frame, SemanticBasis, fit_transport
from semalign_geometry.base import Contract, Kinds, SemalignError, Settings

from ..components import bring

GROUP = "semalign.shapes"


class Circle(Settings):
    kind: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0)

    def area(self) -> float:
        return 3 * self.radius**2


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float = 1.0

    def area(self) -> float:
        return self.side**2


class Edge(Settings):
    width: float = Field(1.0, ge=0)


class Star(Settings):
    """What a package brings."""

    kind: Literal["star"] = "star"
    points: int = Field(5, ge=3)
    edges: tuple[Edge, ...] = ()

    @model_validator(mode="after")
    def _one_edge_a_point(self) -> "Star":
        if len(self.edges) > self.points:
            raise ValueError("There are more edges than points")
        return self

    def area(self) -> float:
        return float(self.points)


class Flat(Settings):
    kind: Literal["star"] = "star"


class Called(Settings):
    kind: Literal["other"] = "other"

    def area(self) -> float:
        return 0.0


SHAPES = Kinds(GROUP, "shape", (Circle, Square), needs=("area",))
Shape = Annotated[SerializeAsAny[Circle | Square], Field(discriminator="kind"), WrapValidator(SHAPES.or_foreign)]


class Picture(Settings):
    shape: Shape = Circle()
    more: tuple[Shape, ...] = ()


class Album(Contract):
    picture: Picture = Picture()


@pytest.fixture
def star(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return bring(monkeypatch, {GROUP: [("star", Star)]})


def test_what_comes_along_is_found_without_a_look_at_packages(star: list[str]) -> None:
    assert SHAPES.find("square") is Square and SHAPES.packages("circle", "square") == {}
    album = Album.parse({"picture": {"shape": {"kind": "square", "side": 2}, "more": [{"kind": "circle"}]}})
    assert album.picture.shape == Square(side=2.0) and Picture(shape=Circle()).shape == Circle()
    assert SHAPES.parse({"kind": "square"}) == SHAPES.parse({}, default="square") == Square()
    with pytest.raises(SemalignError, match=r"unknown key 'picture\.shape\.sid': did you mean 'side'"):
        Album.parse({"picture": {"shape": {"kind": "square", "sid": 2}}})
    assert star == []


def test_what_a_package_brings_is_parsed_and_survives_json(star: list[str]) -> None:
    tree = {"picture": {"shape": {"kind": "star", "points": 7}, "more": [{"kind": "star"}]}}
    album = Album.parse(tree)
    assert album.picture == Picture(shape=Star(points=7), more=(Star(),))  # type: ignore[arg-type]
    assert album.model_dump(mode="json")["picture"]["shape"] == {"kind": "star", "points": 7, "edges": []}
    assert Album.model_validate_json(album.model_dump_json()) == album
    assert (
        album.model_dump_json() != Album.parse({"picture": {"shape": {"kind": "star", "points": 8}}}).model_dump_json()
    )
    assert list(SHAPES.all().items()) == [("circle", Circle), ("square", Square), ("star", Star)]
    assert SHAPES.packages("star", "circle") == {"extras": "1.5"} and set(star) == {GROUP}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"kind": "star", "point": 3}, "unknown key 'picture.shape.point': did you mean 'points'?"),
        ({"kind": "star", "zzz": 3}, "unknown key 'picture.shape.zzz': known keys are edges, kind, points"),
        ({"kind": "star", "points": 2}, "'picture.shape.points' is 2: input should be greater than or equal to 3"),
        (
            {"kind": "star", "edges": [{}, {"wdth": 1}]},
            "unknown key 'picture.shape.edges.1.wdth': did you mean 'width'?",
        ),
        ({"kind": "star", "points": 3, "edges": [{}] * 4}, "'picture.shape': there are more edges than points"),
        (
            {"kind": "sta"},
            "unknown shape 'sta': choose one of circle, square, star, or install the package that adds it",
        ),
        ({"kind": 3}, "'picture.shape' is {'kind': 3}: input tag '3' found"),
        (3, "'picture.shape' is 3: input should be"),
    ],
)
def test_mistakes_name_their_place(shape: Any, message: str, star: list[str]) -> None:
    with pytest.raises(SemalignError) as caught:
        Album.parse({"picture": {"shape": shape}}, origin="here")
    text = str(caught.value)
    assert text.removeprefix("here: ").startswith(message) and "\n" not in text
    with pytest.raises(ValidationError):
        Album(picture={"shape": shape})  # type: ignore[arg-type]


def test_places_in_a_sequence_are_named(star: list[str]) -> None:
    with pytest.raises(SemalignError, match=r"^input: unknown key 'more\.1\.point': did you mean 'points'\?$"):
        Picture.parse({"more": [{"kind": "circle"}, {"kind": "star", "point": 1}]})


def test_instances_pass_where_they_fit() -> None:
    assert Picture(shape=Star(points=4)).shape == Star(points=4)  # type: ignore[arg-type, comparison-overlap]
    assert SHAPES.parse(Star()) == Star()
    for wrong in (Edge(), Flat()):
        with pytest.raises(ValidationError):
            Picture(shape=wrong)  # type: ignore[arg-type]
        with pytest.raises(SemalignError, match="expected settings such as shape.kind=circle"):
            SHAPES.parse(wrong)
    with pytest.raises(SemalignError, match="shape is 'square': expected settings such as shape.kind=square"):
        SHAPES.parse("square")
    with pytest.raises(SemalignError, match="shape.kind is None: choose one such as shape.kind=circle"):
        SHAPES.parse({})


@pytest.mark.parametrize(
    ("things", "message"),
    [
        ([("star", dict)], "the shape star of extras 1.5 is no class of settings with kind, area: uninstall it"),
        ([("star", Settings)], "is no class of settings with kind, area"),
        ([("star", Star())], "is no class of settings with kind, area"),
        ([("star", Flat)], "is no class of settings with kind, area"),
        ([("star", Called)], "the shape star of extras 1.5 calls itself 'other': rename it to its entry point"),
        ([("star", Star)] * 2, "has the name of another shape: rename its entry point"),
        ([("star", ImportError("no such module"))], "cannot be imported (ImportError: no such module): uninstall it"),
    ],
)
def test_what_packages_bring_is_checked(things: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, {GROUP: things})
    for look in (
        lambda: SHAPES.find("star"),
        SHAPES.all,
        lambda: Album.parse({"picture": {"shape": {"kind": "star"}}}),
    ):
        with pytest.raises(SemalignError) as caught:
            look()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_comes_along_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, {GROUP: [("circle", Star)]})
    assert SHAPES.find("circle") is Circle
    with pytest.raises(SemalignError, match="circle of extras 1.5 has the name of another shape"):
        SHAPES.all()


def test_other_components_of_a_package_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, {GROUP: [("broken", ImportError()), ("star", Star)]}, version=None)
    assert SHAPES.find("star") is Star and SHAPES.packages("star") == {}


def test_frames_of_installed_packages_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Frame("even", 0.25, 0.75)
    bring(monkeypatch, {"semalign.frames": [("even", frame), ("odd", frame), ("none", 3)]})
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(30, width, generator=generator) for width in (6, 4)]
    source, target = map(SemanticBasis.from_head, heads)
    named, given = (fit_transport(source, target, frame=each) for each in ("even", frame))
    torch.testing.assert_close(named.matrix, given.matrix, rtol=0, atol=0)
    assert named.manifest.frame == "even" and "even" not in FRAMES
    with pytest.raises(SemalignError, match="the frame odd of extras 1.5 calls itself 'even'"):
        fit_transport(source, target, frame="odd")
    with pytest.raises(SemalignError, match="the frame none of extras 1.5 is no Frame"):
        fit_transport(source, target, frame="none")
    with pytest.raises(
        SemalignError, match="unknown frame 'evn': choose one of cosine, dual, parseval, even, odd, none"
    ):
        fit_transport(source, target, frame="evn")
