"""The error of a process that only repeats another's."""

from semalign_geometry.base import SemalignError


class RaisedElsewhere(SemalignError):
    """An error of the first process, raised on another one; the first prints it."""
