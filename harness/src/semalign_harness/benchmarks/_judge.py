"""What a benchmark needs of whatever runs programs."""

from collections.abc import Callable
from typing import Any

from ..sandbox import Program, Verdict

Judge = Callable[[list[Program]], list[Verdict]]
"""Runs programs and gives one verdict for each, in their order."""


def judged(programs: list[Program], judge: Judge | None) -> list[dict[str, Any]]:
    """Run programs, all in one call, and give what was read of each response."""
    assert judge is not None, "a task that runs code is not built without a judge"
    return [
        {
            "extracted": program.code,
            "correct": verdict.passed,
            "reason": verdict.reason,
            "detail": verdict.detail,
        }
        for program, verdict in zip(programs, judge(programs), strict=True)
    ]
