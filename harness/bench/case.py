"""What a row of the table compares: its sides, the ratios that are printed, and what they should be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """Ours over another side may be at most this."""

    quantity: Literal["time", "memory", "bound"]
    """`bound` is time over the lower bound's, the other two are over the peer's."""
    most: float

    def __str__(self) -> str:
        return f"{self.quantity} ≤ {self.most:.3g}"


@dataclass(frozen=True)
class Line:
    """One line of the table: a side beside its peer."""

    ours: str = "ours"
    peer: str = "peer"
    label: str = ""
    """Added to the size."""
    bound: str | None = None
    """Side that is a lower bound on the time."""
    plus: str | None = None
    """Side whose cost belongs to ours, too."""
    share: float = 1.0
    """Part of the time of `plus` that one unit of ours bears."""
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Case:
    """Sides that are measured in turn, each in a process of its own.

    Side `s` of row `r` is the function `r_s` of `module`. An argument `pair` describes a pair of models and rows, which
    is made before, and the side gets its `folder`.
    """

    row: str
    size: str
    module: str
    peer: str
    """What ours stands beside."""
    parameters: Mapping[str, Any]
    """Arguments of every side."""
    warm: Mapping[str, Any] | None
    """Arguments of a call before the measured one, which takes the setup costs; None for no such call."""
    sides: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"ours": {}, "peer": {}})
    """Name of each side, with its own arguments."""
    function: str = ""
    """The one function of all sides, which then differ in their arguments."""
    lines: tuple[Line, ...] = (Line(),)
    requires: tuple[str, ...] = ()
    """Distributions that only the bench needs."""
    tolerance: float | None = None
    """Relative difference of the results that rounding explains; None where they are not comparable."""
    gib: float = 0.0
    """Estimate of the memory that the hungriest side takes."""
    unit: str = ""
    """What times are given for; empty for the whole call."""


class BenchError(Exception):
    """Something that the person at the command line can mend, in one sentence."""
