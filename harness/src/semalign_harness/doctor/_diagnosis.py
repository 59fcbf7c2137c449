"""Result of the doctor, as a contract and as text."""

import textwrap

from semalign_attribution import LayerPairing
from semalign_geometry import FidelityReport
from semalign_geometry.base import Contract

from ..results.similarity import Matrix
from ..run.checks import Finding as Finding
from ..run.checks import Level
from ..util.tables import aligned

WIDTH = 80
"""Longest line of a message, its level and check aside."""


class Diagnosis(Contract):
    """Findings on a pair before a run."""

    source: str
    """The larger model, as it was given."""
    target: str
    """The smaller model, as it was given."""
    device: str
    """Device whose memory is compared."""
    findings: tuple[Finding, ...]
    """One or more of each check."""
    fidelity: tuple[FidelityReport, ...] = ()
    """Geometry that each frame keeps, where the weights were loaded."""
    similarity: Matrix = ()
    """Linear CKA of the contributions, likewise: a row for each target layer, a column for each source layer."""
    pairing: LayerPairing | None = None
    """Pairing of the layers that were compared, likewise."""

    @property
    def is_usable(self) -> bool:
        """Whether no error was found."""
        return self.count("error") == 0

    def count(self, level: Level) -> int:
        """Count the findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Return the findings as a table with their remedies, the fidelity of each frame, and the outcome."""
    lines = []
    for finding in diagnosis.findings:
        parts = textwrap.wrap(finding.message, WIDTH, break_long_words=False, break_on_hyphens=False)
        if finding.remedy is not None:
            parts.append(f"→ {finding.remedy}")  # in one line, as it is to be pasted
        lines += [(finding.level, finding.check, parts[0]), *(("", "", part) for part in parts[1:])]
    checks, messages = (max(len(line[column]) for line in lines) for column in (1, 2))
    blocks = [aligned([(level, check.ljust(checks), part.ljust(messages)) for level, check, part in lines])]
    if diagnosis.fidelity:
        blocks.append(_frames(diagnosis.fidelity))
    errors, warnings = (_many(diagnosis.count(level), level) for level in ("error", "warning"))
    verdict = "this pair can be used" if diagnosis.is_usable else "a run would be refused"
    blocks.append(f"{verdict}: {errors}, {warnings}")
    return "\n\n".join(blocks)


def _frames(reports: tuple[FidelityReport, ...]) -> str:
    """Return linear CKA of each target layer with its source layer, without a transport and by each frame."""
    rows = [("target layer", "source layer", "without", *(report.frame for report in reports))]
    for index, layer in enumerate(reports[0].layers):
        values = (layer.cka_direct, *(report.layers[index].cka_transported for report in reports))
        rows.append((str(layer.target_layer), str(layer.source_layer), *(f"{value:.2f}" for value in values)))
    direct = sum(layer.cka_direct for layer in reports[0].layers) / len(reports[0].layers)
    means = (direct, *(report.mean_cka_transported for report in reports))
    rows.append(("mean", "", *(f"{mean:.2f}" for mean in means)))
    return f"linear CKA of paired layers, without a transport and by each frame\n{aligned(rows)}"


def _many(count: int, name: str) -> str:
    return f"{count or 'no'} {name}{'' if count == 1 else 's'}"
