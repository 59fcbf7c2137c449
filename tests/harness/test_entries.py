"""The entries whose probability a transfer changed most."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_harness.run.entries import SHOWN, _readable, entry_changes, keep_probabilities, kept_probabilities


@given(st.integers(2, 60), st.integers(0, 2**31))
def test_the_largest_changes_are_named_in_order(entries: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    source, before, after = torch.rand(3, entries, generator=generator).softmax(1)
    found = entry_changes(torch.stack([source, before]), torch.stack([source, after]), str, spans=7)
    change = (after - before).tolist()
    order = sorted(range(entries), key=change.__getitem__, reverse=True)
    assert [int(each.entry) for each in found.gained] == [place for place in order if change[place] > 0][:SHOWN]
    assert [int(each.entry) for each in found.lost] == [place for place in order[::-1] if change[place] < 0][:SHOWN]
    for each in (*found.gained, *found.lost):
        assert (each.source, each.before, each.after) == pytest.approx(
            tuple(float(column[int(each.entry)]) for column in (source, before, after))
        )


def test_without_a_change_there_is_no_entry() -> None:
    same = torch.full((2, 4), 0.25)
    found = entry_changes(same, same, str, spans=1)
    assert found.gained == found.lost == ()


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b" the", "'␣the'"), (b"    ", "'␣␣␣␣'"), (b"\n\t", r"'\n\t'"), (b"\xe6\xbc", r"b'\xe6\xbc'"), ("end", "end")],
)
def test_names_show_spaces_and_bytes(name: bytes | str, shown: str) -> None:
    assert _readable(name) == shown


def test_probabilities_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    file, probabilities = tmp_path / "before.safetensors", torch.rand(2, 5)
    assert kept_probabilities(file) is None
    keep_probabilities(file, probabilities)
    found = kept_probabilities(file)
    assert found is not None and torch.equal(found, probabilities)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    file.write_bytes(file.read_bytes()[:20])
    assert kept_probabilities(file) is None
