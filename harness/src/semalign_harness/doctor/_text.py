"""A diagnosis as a person reads it."""

import textwrap

from semalign_geometry import FidelityReport

from ..util.tables import aligned
from ._findings import Diagnosis

WIDTH = 80
"""Longest line of a message, its level and check aside."""


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """The findings as a table with their remedies, the frames layer by layer where weights were loaded, the outcome."""
    lines = []
    for finding in diagnosis.findings:
        parts = _wrapped(finding.message)
        if finding.remedy is not None:
            parts.append(f"→ {finding.remedy}")  # in one line, as it is to be pasted
        lines += [(finding.level, finding.check, parts[0]), *(("", "", part) for part in parts[1:])]
    checks, messages = (max(len(line[column]) for line in lines) for column in (1, 2))
    table = aligned([(level, check.ljust(checks), part.ljust(messages)) for level, check, part in lines])
    blocks = [table]
    if diagnosis.fidelity:
        blocks.append(_frames(diagnosis.fidelity))
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    verdict = "this pair can be used" if diagnosis.is_usable else "a run would be refused"
    blocks.append(f"{verdict}: {_many(errors, 'error')}, {_many(warnings, 'warning')}")
    return "\n\n".join(blocks)


def _frames(reports: tuple[FidelityReport, ...]) -> str:
    """Linear CKA of each target layer with its source layer, without a transport and by each frame."""
    rows = [("target layer", "source layer", "without", *(report.frame for report in reports))]
    for index, layer in enumerate(reports[0].layers):
        figures = (layer.cka_direct, *(report.layers[index].cka_transported for report in reports))
        rows.append((str(layer.target_layer), str(layer.source_layer), *(f"{figure:.2f}" for figure in figures)))
    direct = sum(layer.cka_direct for layer in reports[0].layers) / len(reports[0].layers)
    means = (direct, *(report.mean_cka_transported for report in reports))
    rows.append(("mean", "", *(f"{mean:.2f}" for mean in means)))
    return f"linear CKA of paired layers, without a transport and by each frame\n{aligned(rows)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _many(count: int, name: str) -> str:
    return f"{count or 'no'} {name}{'' if count == 1 else 's'}"
