"""What the package exports, and what importing it loads."""

import semalign_train

from ..surface import assert_exports_what_it_names, assert_loads_none_of


def test_the_public_surface() -> None:
    assert_exports_what_it_names(semalign_train)


def test_importing_loads_nothing_heavy() -> None:
    assert_loads_none_of(["datasets", "lm_eval", "peft", "matplotlib", "pandas"], semalign_train)
