"""What a person sees while an experiment runs."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Bar:
    """A progress bar whose postfix tells where it is."""

    def __init__(self, bar: "tqdm[NoReturn]") -> None:
        """Wrap a tqdm bar."""
        self._bar = bar

    def skip(self, steps: int) -> None:
        """Steps that were done before."""
        self._bar.update(steps)

    def advance(self, postfix: str) -> None:
        """One step further."""
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update()


class Console:
    """Steps, notes and bars on standard error; bars only on a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Start the clock.

        Args:
            quiet: show nothing.
        """
        self._quiet = quiet
        self._stream = sys.stderr  # also while a library's own output is turned away
        self._no_bars = quiet or not self._stream.isatty()
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self._started

    def note(self, text: str) -> None:
        """A line."""
        if not self._quiet:
            tqdm.write(f"[{self.seconds:7.1f} s] {text}", file=self._stream)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """A part of the run, shown with its seconds when it ends."""
        begun = time.perf_counter()
        yield
        self.note(f"{label}: {time.perf_counter() - begun:.1f} s")

    def progress(self, label: str, items: Sequence[T]) -> Iterator[T]:
        """The items, with a bar."""
        with self.step(label):
            yield from tqdm(items, desc=label, disable=self._no_bars, leave=False, file=self._stream)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A bar that the caller advances."""
        with self.step(label), self._tqdm(label, total) as bar:
            yield Bar(bar)

    def ticker(self, label: str) -> Callable[[int, int], None]:
        """A bar for work that reports the steps done and all steps; it appears with the first report."""
        bars: list[tqdm[NoReturn]] = []

        def report(done: int, total: int) -> None:
            if not bars:
                bars.append(self._tqdm(label, total))
            bars[0].update(done - bars[0].n)
            if done == total:
                bars[0].close()

        return report

    def counter(self, label: str, total: int) -> Callable[[int], None]:
        """A bar for work that reports how many more are done."""
        tick, done = self.ticker(label), 0

        def report(more: int) -> None:
            nonlocal done
            done += more
            tick(done, total)

        return report

    def _tqdm(self, label: str, total: int) -> "tqdm[NoReturn]":
        return tqdm(total=total, desc=label, disable=self._no_bars, leave=False, file=self._stream)
