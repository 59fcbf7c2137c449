"""What importing the package loads."""

import subprocess
import sys


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, semalign_attribution; "
        "print(*sorted({'datasets', 'lm_eval', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
