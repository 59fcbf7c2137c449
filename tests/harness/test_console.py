"""What the command shows: bars on a terminal, notes elsewhere, and log lines as they were asked for."""

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest
from semalign_harness.cli.main import main
from semalign_harness.util.console import Console, interruptible, logged


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_bars_are_for_terminals(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    console = Console()
    assert list(console.progress("count", [1, 2, 3])) == [1, 2, 3]
    with console.step("think"), console.bar("train", 4) as bar:
        bar.skip(2)
        bar.advance("loss 1")
    assert ("\r" in shown.getvalue()) == shown.isatty()
    assert all(f"{label}: " in shown.getvalue() for label in ("count", "think", "train"))
    if shown.isatty():
        assert "think …" in shown.getvalue() and "it/s" in shown.getvalue()


def test_without_a_terminal_a_bar_is_a_note_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for every, notes in ((3600.0, []), (0.0, ["0 of 3", "1 of 3", "2 of 3", "3 of 3"])):
        shown = io.StringIO()
        monkeypatch.setattr(sys, "stderr", shown)
        monkeypatch.setattr("semalign_harness.util.console.NOTED_EVERY", every)
        console = Console()
        with console.bar("train", 3) as bar:
            for _ in range(3):
                bar.advance("loss 1")
        *found, end = (re.sub(r"^\[ *[\d.]+ s\] train: ", "", line) for line in shown.getvalue().splitlines())
        assert [line.split(",")[0] for line in found] == notes
        assert all(line.endswith("left, loss 1") for line in found[1:]) and re.fullmatch(r"[\d.]+ s", end)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    list(Console(quiet=True).progress("count", [1, 2]))
    assert not shown.getvalue()


def test_log_lines_are_warnings_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("semalign_train._trainer")
    with logged(verbose=False):
        logger.info("one")
        logger.warning("two")
        logging.getLogger("transformers").warning("three")
        assert not logging.getLogger("bitsandbytes.backends").isEnabledFor(logging.WARNING)
    assert capsys.readouterr().err == "WARNING: two\n"
    with logged(verbose=True):
        logger.debug("one")
        logging.getLogger("transformers").warning("three")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[2][4:] for line in lines] == [
        "DEBUG semalign_train._trainer: one",
        "WARNING transformers: three",
    ]


@pytest.mark.parametrize("command", ["run", "submit", "compare", "sweep", "evaluate"])
def test_quiet_and_verbose_exclude_each_other(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, "tiny", "--quiet", "--verbose"])
    assert "argument --verbose: not allowed with argument --quiet" in capsys.readouterr().err


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python sets it up, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "the handler is put back"


def test_ctrl_c_that_an_extension_made_another_error_is_an_interruption(ctrl_c: None) -> None:
    with pytest.raises(KeyboardInterrupt) as raised, interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None
    assert isinstance(raised.value.__cause__, ValueError)


def test_an_error_without_ctrl_c_stays_what_it_is(ctrl_c: None) -> None:
    with pytest.raises(ValueError, match="shape"), interruptible():
        raise ValueError("shape")


def test_ignored_ctrl_c_stays_ignored(ctrl_c: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN
