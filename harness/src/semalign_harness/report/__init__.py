"""Runs or comparisons as one page, in HTML with figures and in Markdown with the same tables."""

from ._write import NAME as NAME
from ._write import write_report as write_report

__all__ = ["NAME", "write_report"]
