"""Contract of the fidelity of a transport."""

from semalign_geometry import FidelityReport


class RunFidelity(FidelityReport):
    """Fidelity of a run's transport, and of the other frames on the same layers."""

    others: tuple[FidelityReport, ...] = ()
    """Fidelity of the other frames, in the order of `FRAMES`; empty without a transport."""
