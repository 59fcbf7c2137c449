"""Contract of the fidelity of a transport."""

from semalign_geometry import (
    FidelityReport,
)


class RunFidelity(FidelityReport):
    """Fidelity of the transport of a run, and what other frames would keep."""

    others: tuple[FidelityReport, ...] = ()
    """The same layers by the other frames, in the order of `FRAMES`; empty where nothing is transported."""
