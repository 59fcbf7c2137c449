"""Output of a run while it works: steps, notes, progress bars and log lines, on standard error."""

import io
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

T = TypeVar("T")
OURS = ("semalign_geometry", "semalign_attribution", "semalign_align", "semalign_train", "semalign_harness")
"""Names of the loggers of the five packages."""
LOADERS = ("transformers", "bitsandbytes")
"""Names of the loggers of the packages that load models."""
NOTED_EVERY = 10.0
"""Seconds between two notes of a bar where there is no terminal."""


class _Notes(tqdm):  # type: ignore[type-arg]
    """A bar for where there is no terminal: a note of its state, once in a while."""

    def __init__(self, note: Callable[[str], None], **given: Any) -> None:
        self._note = note
        form = "{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}"
        every: dict[str, Any] = {"mininterval": NOTED_EVERY, "delay": NOTED_EVERY, "miniters": 1}
        super().__init__(**given, **every, leave=False, file=io.StringIO(), bar_format=form)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # an empty message clears the bar, and there is nothing to clear
            self._note(str(self))


class Bar:
    """A progress bar with a postfix."""

    def __init__(self, bar: "tqdm[NoReturn]") -> None:
        self._bar = bar

    def skip(self, steps: int) -> None:
        """Resume after steps that were done before, which count for no rate."""
        if steps > self._bar.n:
            self._bar.initial = self._bar.n = self._bar.last_print_n = steps

    def advance(self, postfix: str = "") -> None:
        """Count one step."""
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update()


class Console:
    """Steps, notes and bars on standard error; without a terminal, a note every ten seconds for a bar.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._stream = sys.stderr  # also while a library's own output is turned away
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self._started

    def note(self, text: str) -> None:
        """Show a line."""
        if not self.quiet:
            tqdm.write(f"[{self.seconds:7.1f} s] {text}", file=self._stream)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show a part of the run while it lasts, and its seconds when it ends."""
        with self._shown(label, f"{label} …"):
            yield

    def progress(self, label: str, items: Sequence[T]) -> Iterator[T]:
        """Yield the items, with a bar."""
        with self.bar(label, len(items)) as bar:
            for item in items:
                yield item
                bar.advance()

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """Show a bar that the caller advances."""
        with self._shown(label, label, total=total) as bar:
            yield Bar(bar)

    def ticker(self, label: str) -> Callable[[int, int], None]:
        """Return a function of the steps done and all steps, which shows a bar."""
        bars: list[tqdm[NoReturn]] = []
        begun = time.perf_counter()

        def report(done: int, total: int) -> None:
            if not bars:
                bars.append(self._tqdm(label, total=total))
            bars[0].update(done - bars[0].n)
            if done == total:
                bars[0].close()
                self.note(f"{label}: {time.perf_counter() - begun:.1f} s")

        return report

    def counter(self, label: str, total: int) -> Callable[[int], None]:
        """Return a function of the further steps done, which shows a bar."""
        tick, done = self.ticker(label), 0

        def report(more: int) -> None:
            nonlocal done
            done += more
            tick(done, total)

        return report

    @contextmanager
    def _shown(self, label: str, text: str, *, total: int | None = None) -> Iterator["tqdm[NoReturn]"]:
        begun = time.perf_counter()
        with self._tqdm(text, total=total) as bar:
            yield bar
        self.note(f"{label}: {time.perf_counter() - begun:.1f} s")

    def _tqdm(self, label: str, *, total: int | None = None) -> "tqdm[NoReturn]":
        common: dict[str, Any] = {"total": total, "desc": label, "disable": self.quiet}
        if not self._stream.isatty():
            return _Notes(self.note, **common)
        form = "{desc}" if total is None else None
        return tqdm(**common, bar_format=form, leave=False, file=self._stream, dynamic_ncols=True)


class _Lines(logging.Handler):
    """Log lines on standard error, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logged(*, verbose: bool) -> Iterator[None]:
    """Show warnings of the five packages and errors of those that load models in the block.

    With `verbose`, show all lines of the five packages and warnings of the others, each with its
    time.
    """
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(levelname)s: %(message)s"
    handler = _Lines()
    handler.setFormatter(logging.Formatter(form))
    wanted = dict.fromkeys(OURS, logging.DEBUG if verbose else logging.WARNING)
    wanted |= dict.fromkeys(LOADERS, logging.WARNING if verbose else logging.ERROR)
    with ExitStack() as stack:
        stack.callback(_return_handler)
        if "transformers" in sys.modules:
            take_handler()
        for logger, level in ((logging.getLogger(name), level) for name, level in wanted.items()):
            stack.callback(logger.setLevel, logger.level)
            stack.callback(logger.removeHandler, handler)
            logger.setLevel(level)
            logger.addHandler(handler)
        yield


def take_handler() -> None:
    """Import transformers, and leave its log lines to `logged`: its own handler knows of no bars."""
    level = logging.getLogger("transformers").level
    import transformers  # half a second

    transformers.logging.disable_default_handler()
    logging.getLogger("transformers").setLevel(level)  # the import sets one of its own


def _return_handler() -> None:
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.enable_default_handler()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` for Ctrl-C also where an extension turns it into another error.

    torch does so when it is interrupted while it finds out the class of an object. Outside the
    main thread, and where Ctrl-C is ignored, nothing changes.
    """
    before, pressed = signal.getsignal(signal.SIGINT), False
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def noted(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, noted)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
