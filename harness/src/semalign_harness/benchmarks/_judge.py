"""What a benchmark needs of whatever runs programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Program:
    """A program and its tests."""

    code: str
    """What the model wrote, as a whole program."""
    tests: str
    """Source that fails when the program is wrong."""
    entry_point: str | None
    """Name of the function that the tests take as an argument; None when they call it by name."""


class Verdict(Protocol):
    """What came of running a program against its tests."""

    @property
    def passed(self) -> bool:
        """Whether every test passed."""

    @property
    def reason(self) -> str:
        """Why, in one word."""

    @property
    def detail(self) -> str:
        """Why, in a sentence."""

    @property
    def seconds(self) -> float:
        """Wall time."""


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
            "seconds": verdict.seconds,
        }
        for program, verdict in zip(programs, judge(programs), strict=True)
    ]
