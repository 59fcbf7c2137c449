"""Runs or comparisons as one page, in HTML with figures and in Markdown with the same tables."""

from ._write import write_report as write_report

__all__ = ["write_report"]
