"""What the package exports, and what importing it loads."""

import semalign_geometry

from ..surface import assert_exports_what_it_names, assert_loads_none_of


def test_the_public_surface() -> None:
    assert_exports_what_it_names(semalign_geometry)


def test_importing_loads_nothing_heavy() -> None:
    assert_loads_none_of(["transformers", "datasets", "accelerate", "peft", "pandas"], semalign_geometry)
