"""The kernels compile for every GPU family; what the machine code must have is there."""

import os
import subprocess
import sys
from pathlib import Path


def test_compile_check():
    # A process of its own: here the kernels are interpreted, there compiled.
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "tools/compile_check.py"],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "65 passed, 0 failed" in done.stdout
