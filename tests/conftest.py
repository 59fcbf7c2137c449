"""Hypothesis profiles, every jaxtyping signature checked at run time, and fixtures of all packages."""

import functools
import os
from typing import Any

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from torch import nn

settings.register_profile("dev", deadline=None, max_examples=30)
settings.register_profile("ci", settings.get_profile("ci"), deadline=None)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

install_import_hook(
    ["semalign_geometry", "semalign_attribution", "semalign_align", "semalign_train", "semalign_harness"],
    "beartype.beartype",
)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose methods go through torch.compile, which gives its graphs without its slow code generator."""
    modules: list[nn.Module] = []
    own = functools.partial(torch.compile, backend="aot_eager")

    def compile(*given: Any, **more: Any) -> Any:
        modules.extend(f.__self__ for f in given if isinstance(getattr(f, "__self__", None), nn.Module))
        return own(*given, **more)

    monkeypatch.setattr(torch, "compile", compile)
    return modules
