"""Write the API pages of the five packages into a folder: `nox -s docs`.

pdoc alone leaves some things out, or shows what is none of the reader's business: the docstring of a constant stands
where it is assigned, in a private module, and not where the package exports it; what a scorer, a pairing policy or a
transport does is its `__call__`; a required field of a pydantic model has no default; types carry validators; bases are
called by their private modules.
"""

import re
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pdoc
from pdoc.doc_types import empty
from pydantic_core import PydanticUndefined

PAGES = (
    "semalign_geometry",
    "semalign_attribution",
    "semalign_align",
    "semalign_train",
    "semalign_harness",
    "semalign_harness.benchmarks",
    "semalign_harness.comparison",
    "semalign_harness.doctor",
    "semalign_harness.evaluation",
    "semalign_harness.experiment",
    "semalign_harness.methods",
    "semalign_harness.reading",
    "semalign_harness.report",
    "semalign_harness.sandbox",
    "semalign_harness.statistics",
)


def page(name: str) -> pdoc.doc.Module:
    """What pdoc knows of a module, completed."""
    module = pdoc.doc.Module.from_name(name)
    private = [pdoc.doc.Module(each) for path, each in list(sys.modules.items()) if path.startswith(f"{name}._")]
    written = {variable.name: variable.docstring for each in private for variable in each.variables}
    for variable in module.variables:
        variable.docstring = variable.docstring or written.get(variable.name, "")
    for each in module.classes:
        each.bases = [
            (place.partition("._")[0], base, re.sub(r"\._\w+(?=\.)", "", text)) for place, base, text in each.bases
        ]
        for member in each.own_members:
            if isinstance(member, pdoc.doc.Variable):
                member.annotation = without_validators(member.annotation)
                member.default_value = empty if member.default_value is PydanticUndefined else member.default_value
            if member.name == "__call__" and member.docstring:
                member.docstring += "\n\n@public"
    return module


def without_validators(annotation: Any) -> Any:
    """A type as it was before `Annotated` added to it or to its parts."""
    return typing.get_type_hints(SimpleNamespace(__annotations__={"of": annotation}))["of"]


def main(folder: Path) -> None:
    """Write every page, the index of them, and that of the search."""
    pdoc.render.configure(docformat="google", footer_text="semalign")
    pages = {name: page(name) for name in PAGES}
    texts = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(module, pages) for name, module in pages.items()}
    texts |= {"index.html": pdoc.render.html_index(pages), "search.js": pdoc.render.search_index(pages)}
    for place, text in texts.items():
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
