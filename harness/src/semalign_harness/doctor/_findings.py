"""What the doctor found, as a contract."""

from typing import Literal

from pydantic import model_validator
from semalign_attribution import LayerPairing
from semalign_geometry import Contract, FidelityReport, Settings

Level = Literal["ok", "warning", "error"]


class Finding(Settings):
    """The outcome of one check."""

    check: str
    """What was looked at."""
    level: Level
    """`ok`; `warning`: a run works, but something is lost or may fail; `error`: a run is refused."""
    message: str
    """What was found, in one sentence."""
    remedy: str | None = None
    """A setting or a command that helps; None for what is ok."""

    @model_validator(mode="after")
    def _trouble_has_a_remedy(self) -> "Finding":
        if (self.level == "ok") != (self.remedy is None):
            raise ValueError(f"{self.check} is {self.level}: warnings and errors have a remedy, and nothing else")
        return self


class Diagnosis(Contract):
    """What is to be known of a pair before a run."""

    source: str
    """The larger model, as it was given."""
    target: str
    """The smaller model, as it was given."""
    device: str
    """Device that memory and time are estimated for."""
    findings: tuple[Finding, ...]
    """One or more of each check."""
    fidelity: tuple[FidelityReport, ...] = ()
    """What each frame keeps of the geometry, where the weights were loaded."""
    similarity: tuple[tuple[float, ...], ...] = ()
    """Linear CKA of the contributions: a row for each target layer, a column for each source layer; likewise."""
    pairing: LayerPairing | None = None
    """Pairing of the compared layers; likewise."""

    @property
    def is_usable(self) -> bool:
        """Whether no error was found."""
        return all(finding.level != "error" for finding in self.findings)

    def count(self, level: Level) -> int:
        """Findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def ok(check: str, message: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, level="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    """A run works, but something is lost or may fail."""
    return Finding(check=check, level="warning", message=message, remedy=remedy)


def error(check: str, message: str, remedy: str) -> Finding:
    """A run is refused."""
    return Finding(check=check, level="error", message=message, remedy=remedy)
