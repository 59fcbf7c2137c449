"""The command: help without torch, and one module with the same two functions for each command."""

import importlib
import subprocess
import sys

import pytest
import semalign_harness
from semalign_harness.cli.main import COMMANDS, EXAMPLES, main


def test_help_imports_no_torch() -> None:
    script = (
        "import contextlib, sys\n"
        "from semalign_harness.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "sys.exit(bool({'torch', 'transformers', 'pydantic'} & sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert all(f"\n  {name} " in ended.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"usage: semalign {name}") and COMMANDS[name] in printed
    module = importlib.import_module(f"semalign_harness.cli.{name.replace('-', '_')}")
    assert module.__doc__ is not None and module.__doc__.startswith(f"`semalign {name}`: ")


def test_the_help_has_at_most_two_examples_of_a_command() -> None:
    named = [line.split()[1] for line in EXAMPLES.splitlines() if line.startswith("  semalign ")]
    assert set(named) == set(COMMANDS) and max(map(named.count, named)) <= 2


def test_public_names_are_found_when_they_are_used() -> None:
    for name in semalign_harness.__all__:
        assert getattr(semalign_harness, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = semalign_harness.nothing
