"""The prefix cache: what it replays is what the full forward run computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import Supervision
from semalign_attribution import view_of
from semalign_train import PrefixCache
from torch import Tensor

from ..align.chain import EXAMPLES, TARGET_DEPTH, make_store, run_plainly, source_model, target_model
from ..models import ARCHITECTURES, collate

LENGTHS = [len(ids) for ids, _ in EXAMPLES]
SORTED = sorted(range(len(EXAMPLES)), key=lambda index: LENGTHS[index])


def cache(model: Any, store: Supervision, folder: Path | None = None, batch_size: int = len(EXAMPLES)) -> PrefixCache:
    return PrefixCache(view_of(model), store, folder=folder, batch_size=batch_size)


def streams(prefix: PrefixCache) -> list[Tensor]:
    """The held stream of each example, without padding."""
    held = []
    for index in range(len(EXAMPLES)):
        inputs = prefix.inputs([index])
        assert inputs is not None and inputs.shape[:2] == (1, LENGTHS[index])
        held.append(inputs[0])
    return held


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_replayed_streams_are_those_of_the_full_forward_run(architecture: str, where: str, tmp_path: Path) -> None:
    model = target_model(architecture)
    store = make_store(source_model(architecture), model, tmp_path / "store")
    folder = None if where == "memory" else tmp_path
    with torch.no_grad():
        hidden = run_plainly(model, collate([EXAMPLES[index] for index in SORTED])).hidden
    walked = cache(model, store, folder)
    assert walked.inputs([0, 1]) is None and set(walked.positions) == {0}
    for layer in range(1, TARGET_DEPTH):
        walked.advance(layer)
        assert set(walked.positions) == {layer}
        rows = {index: hidden[layer][row, : LENGTHS[index]] for row, index in enumerate(SORTED)}
        assert_equal(streams(walked), [rows[index] for index in range(len(EXAMPLES))])
    jumped = cache(model, store)
    jumped.advance(TARGET_DEPTH - 1)
    assert_equal(streams(jumped), streams(walked))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_batch_sizes_make_no_difference(architecture: str, batch_size: int, top: Supervision) -> None:
    model = target_model(architecture)
    prefix = cache(model, top, batch_size=batch_size)
    prefix.advance(1)
    prefix.advance(3)
    for index, stream in enumerate(streams(prefix)):
        with torch.no_grad():
            alone = run_plainly(model, collate([EXAMPLES[index]])).hidden[3][0]
        torch.testing.assert_close(stream, alone, rtol=1e-4, atol=1e-4)


walks = st.lists(
    st.tuples(st.integers(0, TARGET_DEPTH), st.sets(st.integers(0, len(EXAMPLES) - 1))), min_size=1, max_size=5
)


@settings(max_examples=20)
@given(walks)
def test_each_example_goes_as_far_as_it_was_asked_to(top: Supervision, walk: list[tuple[int, set[int]]]) -> None:
    model = target_model()
    prefix, ran = cache(model, top, batch_size=3), [0] * TARGET_DEPTH
    with torch.no_grad():
        hidden = [run_plainly(model, collate([example])).hidden for example in EXAMPLES]
    handles = [
        view_of(model).layer(layer).register_forward_pre_hook(_counter(ran, layer - 1))
        for layer in range(1, TARGET_DEPTH + 1)
    ]
    for layer, examples in walk:
        prefix.advance(layer, examples)
    for handle in handles:
        handle.remove()
    for index, position in enumerate(prefix.positions):
        assert position == max([0, *(layer for layer, examples in walk if index in examples)])
        inputs = prefix.inputs([index])
        if position == 0:
            assert inputs is None
        else:
            assert inputs is not None
            torch.testing.assert_close(inputs[0], hidden[index][position][0], rtol=1e-4, atol=1e-4)
    # Each layer ran once on each example that has been through it.
    assert ran == [sum(position >= layer for position in prefix.positions) for layer in range(1, TARGET_DEPTH + 1)]


def _counter(ran: list[int], place: int) -> Any:
    def count(module: Any, arguments: tuple[Tensor, ...]) -> None:
        ran[place] += len(arguments[0])

    return count


def test_inputs_are_padded_on_the_right(top: Supervision) -> None:
    prefix = cache(target_model(), top)
    prefix.advance(2)
    chosen = [1, 3, 1]
    inputs = prefix.inputs(chosen)
    assert inputs is not None and inputs.shape[:2] == (3, 12)
    held = streams(prefix)
    for row, index in enumerate(chosen):
        assert torch.equal(inputs[row, : LENGTHS[index]], held[index])
        assert (inputs[row, LENGTHS[index] :] == 0).all()


def test_after_a_failure_the_streams_are_computed_again(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, whole = cache(target_model(), top, batch_size=2), cache(target_model(), top, batch_size=2)
    prefix.advance(1)
    store, calls = PrefixCache._store, []

    def failing(self: PrefixCache, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        store(self, *given)

    monkeypatch.setattr(PrefixCache, "_store", failing)
    with pytest.raises(MemoryError):
        prefix.advance(3)
    assert set(prefix.positions) == {0}
    prefix.advance(3)
    whole.advance(3)
    for one, other in zip(streams(prefix), streams(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_advancing_backwards_or_nowhere_does_nothing(top: Supervision) -> None:
    prefix = cache(target_model(), top)
    prefix.advance(0)
    assert set(prefix.positions) == {0} and prefix.inputs([0]) is None
    prefix.advance(2)
    held = [stream.clone() for stream in streams(prefix)]
    prefix.advance(1)
    prefix.advance(2)
    assert set(prefix.positions) == {2}
    assert_equal(streams(prefix), held)


def test_advancing_uses_the_weights_of_the_moment(top: Supervision) -> None:
    model = target_model()
    prefix = cache(model, top)
    prefix.advance(1)
    with torch.no_grad():
        for parameter in view_of(model).layer(2).parameters():
            parameter.mul_(1.5)
    prefix.advance(2)
    fresh = cache(model, top)
    fresh.advance(2)
    assert_equal(streams(prefix), streams(fresh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_streams_are_written_to_the_scratch_folder_which_is_left_empty(
    dtype: torch.dtype, tmp_path: Path, top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda file: (sizes.append(file.stat().st_size), unlink(file)))
    model = target_model(dtype=dtype)
    in_memory, in_file = cache(model, top), cache(model, top, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for prefix in (in_memory, in_file):
        prefix.advance(2)
    assert_equal(streams(in_file), streams(in_memory))
    assert streams(in_file)[0].dtype == dtype
    assert sizes == [sum(LENGTHS) * 32 * dtype.itemsize]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [7, 100_000])
def test_a_file_left_in_the_scratch_folder_is_no_obstacle(before: int, tmp_path: Path, top: Supervision) -> None:
    model = target_model()
    (tmp_path / "prefix-0.bin").write_bytes(b"\xff" * before)
    fresh, again = cache(model, top), cache(model, top, tmp_path)
    for prefix in (fresh, again):
        prefix.advance(1)
    assert_equal(streams(again), streams(fresh))
