"""Figures as they stand in tables."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..statistics import Estimate, GapRecovered

NOTHING = "–"


def number(value: float, *, percent: bool, sign: str = "") -> str:
    """A share in percent, or another figure with four decimals."""
    return f"{100 * value:{sign}.1f}%" if percent else f"{value:{sign}.4f}"


def interval(estimate: Estimate, *, percent: bool, sign: str = "") -> str:
    """A figure with its 95% interval."""
    value, low, high = (
        number(each, percent=percent, sign=sign) for each in (estimate.value, estimate.low, estimate.high)
    )
    bounded = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return f"{value} [{low}, {high}]" if bounded else f"{value} [unbounded]"


def share(gap: GapRecovered | None) -> str:
    """The share of a gap with its interval, where the items bound it."""
    if gap is None or gap.value is None:
        return NOTHING
    if gap.low is None or gap.high is None:
        return f"{gap.value:.0%} [unbounded]"
    return f"{gap.value:.0%} [{gap.low:.0%}, {gap.high:.0%}]"


def seconds(value: float) -> str:
    """Wall time."""
    return f"{value:,.1f} s" if value < 100 else f"{value:,.0f} s"


def many(count: int, one: str, more: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def arrow(*, lower_is_better: bool) -> str:
    """Which way is better."""
    return "↓" if lower_is_better else "↑"


def distinct(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """A name for each folder, no two alike: its own, else the folder's, else its whole path."""
    for found in (names, [folder.name for folder in folders], [str(folder) for folder in folders]):
        if len(set(found)) == len(found):
            return list(found)
    return [f"{number}: {folder}" for number, folder in enumerate(folders, 1)]
