"""Stores that many tests of this folder train on, made once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import Supervision

from ..align.chain import EXACT, TOP, make_store, source_model, target_model


def _store(folder: Path, settings: Any, dtype: torch.dtype = torch.float32) -> Supervision:
    return make_store(source_model(dtype=dtype), target_model(dtype=dtype), folder / "store", settings=settings)


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    """Final hidden states, float32."""
    return _store(tmp_path_factory.mktemp("exact"), EXACT)


@pytest.fixture(scope="session")
def top(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    """Top entries, float32."""
    return _store(tmp_path_factory.mktemp("top"), TOP)
