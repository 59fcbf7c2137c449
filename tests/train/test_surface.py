"""What the package exports, and what importing it loads."""

import subprocess
import sys

import semalign_train

HEAVY = ("datasets", "lm_eval", "matplotlib", "pandas")


def test_all_is_the_public_surface() -> None:
    public = {
        name
        for name, value in vars(semalign_train).items()
        if not name.startswith("_") and not hasattr(value, "__path__") and name != "annotations"
    }
    assert sorted(semalign_train.__all__) == sorted(public)
    assert len(set(semalign_train.__all__)) == len(semalign_train.__all__)


def test_everything_public_is_documented() -> None:
    for name in semalign_train.__all__:
        value = getattr(semalign_train, name)
        if callable(value) and getattr(value, "__module__", "").startswith("semalign"):
            assert value.__doc__, name


def test_importing_loads_nothing_heavy() -> None:
    code = f"import sys, semalign_train; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
