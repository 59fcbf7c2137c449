"""Supervision made on a device, and batches of it sent to one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import FinalHidden, FinalStates, SupervisionSettings, TopK
from semalign_geometry import TopEntries

from ..devices import elsewhere, usable
from .chain import EXAMPLES, TARGET_DEPTH, make_store, source_model, target_model

each_output = pytest.mark.parametrize("kept", [TopK(k=8), FinalHidden()], ids=["top_k", "final_hidden"])
CPU = torch.device("cpu")
EVERYTHING = range(len(EXAMPLES))


@elsewhere
@each_output
def test_the_store_is_that_of_the_cpu(name: str, kept: Any, tmp_path: Path) -> None:
    settings = SupervisionSettings(output=kept, dtype="float32")
    expected = make_store(source_model(), target_model(), tmp_path / "cpu", settings=settings)
    with usable(name) as device:
        models = source_model().to(device), target_model().to(device)
        store = make_store(*models, tmp_path / "there", settings=settings)
    for layer in range(1, TARGET_DEPTH + 1):
        mine, theirs = (s.collate(EVERYTHING, layer=layer) for s in (store, expected))
        torch.testing.assert_close(mine.reference, theirs.reference, rtol=1e-2, atol=1e-2)
        if isinstance(theirs.output, FinalStates):
            assert isinstance(mine.output, FinalStates)
            torch.testing.assert_close(mine.output.hidden, theirs.output.hidden, rtol=1e-2, atol=1e-2)
        else:
            assert isinstance(mine.output, TopEntries)
            torch.testing.assert_close(mine.output.log_probs, theirs.output.log_probs, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(mine.output.tail, theirs.output.tail, rtol=1e-2, atol=1e-2)


@elsewhere
@each_output
def test_batches_go_to_the_device_whole(name: str, kept: Any, tmp_path: Path) -> None:
    settings = SupervisionSettings(output=kept, dtype="float32")
    store = make_store(source_model(), target_model(), tmp_path / "store", settings=settings)
    here = store.collate([2, 0], layer=3)
    assert here.reference is not None
    with usable(name) as device:
        there = store.collate([2, 0], layer=3, device=device)
        assert there.reference is not None
        pairs = [(there.batch[key], here.batch[key]) for key in here.batch]
        pairs += [(there.reference, here.reference)]
        pairs += [(getattr(there.positions, key), getattr(here.positions, key)) for key in ("mask", "labels", "counts")]
        if isinstance(here.output, FinalStates):
            assert isinstance(there.output, FinalStates)
            pairs += [(there.output.hidden, here.output.hidden), (there.output.head.weight, here.output.head.weight)]
        else:
            pairs += [(getattr(there.output, key), getattr(here.output, key)) for key in ("ids", "log_probs", "tail")]
        for mine, theirs in pairs:
            assert mine.device.type == device.type
            torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0)
