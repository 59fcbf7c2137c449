"""What a run took of the machine."""

import subprocess
import sys

import pytest
import torch
from semalign_harness.resources import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not inherit a peak")
def test_the_peak_of_a_process_is_its_own() -> None:
    held = torch.ones(2**28, dtype=torch.uint8).fill_(1)  # 256 MiB more than the child has
    own = peak_memory(torch.device("cpu"))
    command = (
        "import torch; from semalign_harness.resources import peak_memory; print(peak_memory(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert 2**26 < int(child.stdout) <= own - len(held) / 2
