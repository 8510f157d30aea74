"""The kernels compile for every GPU family; what the machine code must have is there."""

import os
import subprocess
import sys
from pathlib import Path


def test_machine_code_for_every_gpu_family(pytestconfig):
    # A process of its own: here the kernels are interpreted, there compiled.
    tool = Path(__file__).parents[1] / "tools/compile_check.py"
    done = subprocess.run(
        [sys.executable, tool, "--sglang", pytestconfig.getoption("--sglang")],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for family in ("sm89", "sm90", "sm100", "sm103", "sm120", "gfx942", "gfx950"):
        for operation in ("prefill", "pack", "quantize"):
            assert f"{family} {operation} deepseek-v3" in done.stdout
