"""What every package keeps about the names that it exports and the modules that importing it loads."""

import subprocess
import sys
from collections.abc import Collection
from types import ModuleType


def assert_exports_what_it_names(package: ModuleType) -> None:
    """`__all__` names each public value of the package once, and each of ours that is callable has a docstring."""
    values = {name: getattr(package, name) for name in dir(package) if not name.startswith("_")}
    public = {name for name, value in values.items() if not isinstance(value, ModuleType)}
    assert sorted(package.__all__) == sorted(public), set(package.__all__) ^ public
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value) and getattr(value, "__module__", "").startswith("semalign"):
            assert value.__doc__, f"{name} has no docstring"


def assert_loads_none_of(names: Collection[str], package: ModuleType) -> None:
    """A fresh interpreter that imports the package has none of these modules."""
    code = f"import sys, {package.__name__}; print(*[name for name in {tuple(names)} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not result.stdout.split(), result.stdout
