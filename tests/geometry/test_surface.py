"""What the package exports, and what importing it loads."""

import subprocess
import sys

import semalign_geometry

HEAVY = ("transformers", "datasets", "accelerate", "peft", "pandas")


def test_all_is_the_public_surface() -> None:
    public = {
        name
        for name, value in vars(semalign_geometry).items()
        if not name.startswith("_") and not hasattr(value, "__path__") and name != "annotations"
    }
    assert sorted(semalign_geometry.__all__) == sorted(public)
    assert len(set(semalign_geometry.__all__)) == len(semalign_geometry.__all__)


def test_everything_public_is_documented() -> None:
    for name in semalign_geometry.__all__:
        value = getattr(semalign_geometry, name)
        if callable(value) and getattr(value, "__module__", "").startswith("semalign"):
            assert value.__doc__, name


def test_importing_loads_nothing_heavy() -> None:
    code = f"import sys, semalign_geometry; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
