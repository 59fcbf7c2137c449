"""Figures as they stand in tables."""

from collections.abc import Sequence
from pathlib import Path

NOTHING = "–"


def form(*, percent: bool, sign: str = "") -> str:
    """How numbers stand: shares in percent, other figures with four decimals."""
    return f"{sign}.1%" if percent else f"{sign}.4f"


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
