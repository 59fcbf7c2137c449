"""A live source supervises with the values of a store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import (
    FinalStates,
    LiveSupervision,
    SupervisedBatch,
    SupervisionSettings,
    SupervisionSource,
    supervise,
)
from semalign_attribution import supervised
from semalign_geometry import Head, OutputHead, TopEntries
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..attribution.snapshot import snapshot, unsettle
from ..models import ARCHITECTURES, collate
from .chain import EXACT, EXAMPLES, TARGET_DEPTH, TOP, pair, source_model, target_model, transport_between

ENTRIES = torch.arange(1, 80)


@pytest.mark.parametrize("index", [-1, len(EXAMPLES)])
def test_an_example_that_does_not_exist_is_refused_as_a_store_does(index: int, tmp_path: Path) -> None:
    for supervision in both(tmp_path / "store", TOP):
        with pytest.raises(SemalignError, match=f"example {index} does not exist: .* examples 0 to 6"):
            supervision.collate([0, index])


def both(folder: Path, wanted: SupervisionSettings, *, architecture: str = "llama", entries: Any = ENTRIES) -> Any:
    source = source_model(architecture)
    transport = transport_between(source, target_model(architecture), entries=entries)
    batches = [collate(EXAMPLES[:3]), collate(EXAMPLES[3:])]
    stored = supervise(source, batches, pair(), transport, folder, settings=wanted, entries=entries)
    return stored, LiveSupervision(source, batches, pair(), transport, settings=wanted, entries=entries)


def weight_of(head: OutputHead) -> Tensor:
    """The rows of a head, those in no class included."""
    return head.weight if isinstance(head, Head) else head.head.weight


def assert_same(one: SupervisedBatch, other: SupervisedBatch, *, rtol: float) -> None:
    assert all(torch.equal(one.batch[key], other.batch[key]) for key in one.batch)
    assert torch.equal(one.positions.labels, other.positions.labels)
    if one.reference is None or other.reference is None:
        assert one.reference is other.reference
    else:
        assert one.reference.dtype == other.reference.dtype
        torch.testing.assert_close(one.reference, other.reference, rtol=rtol, atol=rtol)
    ours, theirs = one.output, other.output
    if isinstance(ours, TopEntries) and isinstance(theirs, TopEntries):
        torch.testing.assert_close(ours.log_probs, theirs.log_probs)
        torch.testing.assert_close(ours.tail, theirs.tail)
        assert torch.equal(ours.ids, theirs.ids)
    else:
        assert isinstance(ours, FinalStates) and isinstance(theirs, FinalStates)
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=rtol, atol=rtol)
        assert type(ours.head) is type(theirs.head)
        assert torch.equal(weight_of(ours.head), weight_of(theirs.head))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("base", [TOP, EXACT], ids=["top_k", "final_hidden"])
def test_values_are_those_of_a_store(base: Any, dtype: str, tmp_path: Path) -> None:
    wanted = base.model_copy(update={"dtype": dtype})
    stored, live = both(tmp_path / "store", wanted)
    assert len(live) == len(stored) and torch.equal(live.entries, stored.entries)
    assert torch.equal(live.lengths, stored.lengths) and torch.equal(live.counts, stored.counts)
    rtol = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2}[dtype]
    for layer in (None, *range(1, TARGET_DEPTH + 1)):
        assert_same(live.collate([4, 0, 2], layer=layer), stored.collate([4, 0, 2], layer=layer), rtol=rtol)


def test_both_follow_the_protocol_with_the_positions_of_their_tokens(tmp_path: Path) -> None:
    for supervision in both(tmp_path / "store", TOP):
        assert isinstance(supervision, SupervisionSource)
        data = supervision.collate([5, 1])
        expected = supervised(data.batch)
        for name in ("mask", "labels", "counts"):
            assert torch.equal(getattr(data.positions, name), getattr(expected, name))
        assert torch.equal(data.positions.counts, supervision.counts[[5, 1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_supervises_live(architecture: str, tmp_path: Path) -> None:
    stored, live = both(tmp_path / "store", EXACT, architecture=architecture, entries=None)
    assert_same(live.collate([1, 5], layer=2), stored.collate([1, 5], layer=2), rtol=1e-4)


@settings(max_examples=10)
@given(order=st.permutations(range(len(EXAMPLES))))
def test_an_example_does_not_depend_on_its_neighbours(order: list[int]) -> None:
    source = source_model()
    live = LiveSupervision(source, [collate(EXAMPLES)], pair(), transport_between(source, target_model()))
    together = live.collate(order, layer=1)
    assert together.reference is not None
    for row, index in enumerate(order):
        alone = live.collate([index], layer=1).reference
        assert alone is not None
        torch.testing.assert_close(together.reference[row, : alone.shape[1]], alone[0], rtol=1e-2, atol=1e-2)


def test_the_source_is_left_as_found() -> None:
    source = source_model()
    live = LiveSupervision(source, [collate(EXAMPLES)], pair(), transport_between(source, target_model()))
    unsettle(source)
    before = snapshot(source)
    live.collate([0, 1], layer=1)
    assert snapshot(source) == before


def test_wrong_input_is_named() -> None:
    source = source_model()
    transport = transport_between(source, target_model())
    with pytest.raises(SemalignError, match="no examples"):
        LiveSupervision(source, [], pair(), transport)
    with pytest.raises(SemalignError, match="the pairing is for 7"):
        LiveSupervision(source, [collate(EXAMPLES)], pair(source_depth=7), transport)
