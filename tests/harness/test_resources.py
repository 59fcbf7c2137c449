"""What a run took of the machine."""

import os
import subprocess
import sys

import pytest
import torch
from semalign_harness.util import resources
from semalign_harness.util.resources import forget_peak_memory, one_thread, peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not inherit a peak")
def test_the_peak_of_a_process_is_its_own() -> None:
    held = torch.ones(2**28, dtype=torch.uint8).fill_(1)  # 256 MiB more than the child has
    own = peak_memory(CPU)
    command = (
        "import torch; from semalign_harness.util.resources import peak_memory; print(peak_memory(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert 2**26 < int(child.stdout) <= own - len(held) / 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="a process has one peak for its whole life")
def test_a_forgotten_peak_counts_no_more() -> None:
    held = torch.ones(2**28, dtype=torch.uint8).fill_(1)
    size = len(held)
    whole = peak_memory(CPU)
    del held
    forget_peak_memory(CPU)
    later = peak_memory(CPU)
    assert later <= whole - size / 2
    again = torch.ones(2**27, dtype=torch.uint8).fill_(1)
    assert later + len(again) / 2 <= peak_memory(CPU)


@pytest.mark.parametrize(
    ("known", "fast"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False}, False),
        ({"architecture": "arm64"}, True),
    ],
)
@pytest.mark.parametrize("disturbed", [torch.bfloat16, torch.float32])
def test_other_work_does_not_change_what_a_known_processor_has(
    disturbed: torch.dtype, known: dict[str, object], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(resources, "_product_seconds", lambda dtype: float(dtype == disturbed))
    if known["architecture"] == "arm64":  # of which only trying tells
        fast = disturbed != torch.bfloat16
    assert resources.bfloat16_is_fast.__wrapped__() == fast


@pytest.mark.parametrize("chosen", [None, "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_small_model_has_one_thread_unless_another_number_is_chosen(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "3")
    notes: list[str] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), one_thread(notes.append):
            assert torch.get_num_threads() == (3 if chosen else 1)
            with one_thread(notes.append):  # no second note
                raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert len(notes) == (chosen is None)
