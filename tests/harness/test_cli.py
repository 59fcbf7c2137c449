"""The command: help without torch, and one module with the same two functions for each command."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import semalign_harness
from semalign_harness.cli._typed import typed
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
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = semalign_harness.nothing


@pytest.mark.parametrize(
    ("program", "path", "expected"),
    [
        ("bin/semalign", "bin", "semalign run 'a b'"),
        ("bin/semalign", "", "bin/semalign run 'a b'"),
        ("bin/semalign", "other", "bin/semalign run 'a b'"),
        ("semalign_harness/__main__.py", "bin", f"{Path(sys.executable).name} -m semalign_harness run 'a b'"),
        ("pytest", "bin", "semalign run 'a b'"),
    ],
)
def test_a_command_is_named_as_it_was_typed(
    program: str, path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bin", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "semalign").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / path) if path else "")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / program)])
    assert typed(["run", "a b"]) == expected


def test_a_command_outside_of_the_folder_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "semalign"
    program.touch(mode=0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert typed(["run"]) == f"{program} run"
