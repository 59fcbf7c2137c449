"""Supervision made on a device, and batches of it sent to one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import FinalHidden, FinalStates, LiveSupervision, OutputKL, SupervisionSettings, TopK, supervise
from semalign_attribution import view_of
from semalign_geometry import TopEntries

from ..devices import elsewhere, usable
from . import toy_tokenizers as pairs
from .chain import EXAMPLES, TARGET_DEPTH, make_store, pair, source_model, target_model

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


@elsewhere
@each_output
def test_spans_of_two_tokenizers_go_to_the_device(name: str, kept: Any, tmp_path: Path) -> None:
    wanted = SupervisionSettings(output=kept, dtype="float32")
    models, indices = (pairs.source_model(), pairs.target_model()), [2, 0, 4]
    transport, more = pairs.transport_between(*models), {"settings": wanted, "classes": pairs.CLASSES}
    store = supervise(models[0], [pairs.paired()], pair(), transport, tmp_path / "cpu", **more)
    expected = store.collate(indices, layer=2)
    assert expected.spans is not None and expected.source is not None
    with usable(name) as device:
        live = LiveSupervision(models[0].to(device), [pairs.paired()], pair(), transport, **more)
        for supervision, tolerance in ((store, 0.0), (live, 1e-2)):
            there = supervision.collate(indices, layer=2, device=device)
            assert there.spans is not None and there.source is not None
            found = [(getattr(there.spans, key), value) for key, value in vars(expected.spans).items()]
            found += [(there.source[key], value) for key, value in expected.source.items()]
            found += [(there.reference, expected.reference)]
            for mine, theirs in found:
                assert mine.device.type == device.type
                torch.testing.assert_close(mine.cpu(), theirs, rtol=tolerance, atol=tolerance)
        head = store.output_head(view_of(models[1].to(device)).head)
        hidden = torch.randn(int(expected.counts.sum()), head.head.weight.shape[1]).to(device)
        there = store.collate(indices, device=device)
        assert torch.isfinite(OutputKL().of(there.output, hidden, head, 1.0).cpu()).all()
