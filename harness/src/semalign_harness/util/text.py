"""Sizes as text."""


def gb(count: int) -> str:
    """Return bytes in units of 10⁹, or of 10⁶ where that is too coarse."""
    if count == 0:
        return "none"
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
