"""Runs and comparisons as one page, in HTML with plots and in Markdown with the same tables."""

from ._write import report_run as report_run
from ._write import write_report as write_report

__all__ = ["report_run", "write_report"]
