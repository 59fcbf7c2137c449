"""Sizes and durations as text."""


def gb(count: int) -> str:
    """Return bytes in units of 10⁹, or of 10⁶ where that is too coarse."""
    if count == 0:
        return "none"
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return seconds in hours, minutes or seconds."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.0f} s"
