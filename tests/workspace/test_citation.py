"""CITATION.cff says of the software what the projects say."""

import yaml

from .projects import PROJECTS, ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_fits_the_projects() -> None:
    assert set(CITATION) >= {"cff-version", "message", "title", "authors"}, "what the format asks for"
    assert {CITATION["version"]} == {project.table["version"] for project in PROJECTS}
    assert {CITATION["license"]} == {project.table["license"] for project in PROJECTS}
    assert CITATION["authors"] == [{"name": "The semalign authors"}]


def test_the_paper_is_the_readmes() -> None:
    (paper,) = CITATION["references"]
    assert set(paper) >= {"type", "title", "authors"}, "what the format asks for"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert paper["title"] in readme and paper["notes"] == "arXiv 2510.24208v2" and paper["notes"] in readme
