"""What the package exports, and what importing it loads."""

import semalign_geometry
import semalign_geometry.base

from ..surface import assert_exports_what_it_names, assert_loads_none_of


def test_the_public_surface() -> None:
    assert_exports_what_it_names(semalign_geometry)
    assert_exports_what_it_names(semalign_geometry.base)
    assert not set(semalign_geometry.__all__) & set(semalign_geometry.base.__all__), "exported twice"


def test_importing_loads_nothing_heavy() -> None:
    assert_loads_none_of(["transformers", "datasets", "accelerate", "peft", "pandas"], semalign_geometry)
