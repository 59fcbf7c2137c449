"""Sizes as text."""


def gb(count: int) -> str:
    """Return bytes in units of 10⁹, or of 10⁶ where that is too coarse."""
    if count == 0:
        return "none"
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def seconds_text(value: float) -> str:
    """Return a measured wall time as text."""
    return f"{value:,.1f} s" if value < 100 else f"{value:,.0f} s"


def many(count: int, one: str, more: str | None = None) -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"
