"""`make bench`: the kernel benchmark and the layer benchmark, on the patched SGLang."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import patched_sglang


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument("--compile-check", action="store_true")
    parser.add_argument("--peers", help="folder with SGLang 0.5.13's kernels")
    options, rest = parser.parse_known_args()
    if options.peers and not options.compile_check:
        rest += ["--peers", os.path.abspath(options.peers)]
    tree = patched_sglang.lay_out(options.sglang).patched
    path = [str(tree), str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")]
    script = tree / "sglang/jit_kernel/benchmark/bench_mla_fp8_prefill.py"
    if options.compile_check:
        script = HERE / "compile_check.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    status = subprocess.run([sys.executable, str(script), *rest], env=env).returncode
    if status == 0 and not options.compile_check and "--quick" not in rest:
        layer = [sys.executable, str(HERE / "bench_layer.py")]
        layer += ["--sglang", options.sglang]
        if options.peers:
            layer += ["--peers", options.peers]
        status = subprocess.run(layer).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
