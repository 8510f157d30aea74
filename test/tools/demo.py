"""`make run`: patch a real SGLang and show what its own prefill code then does."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import patched_sglang
from tabulate import tabulate

from prefill_patch import SOURCE
from prefill_patch.patch import inspect
from prefill_patch.target import open_target

BACKENDS = ("tokenspeed_mla", "trtllm_mla")
NEXT_STEPS = """\
equal to float64: of what an attention kernel and the KV cache get, the share of elements
that are bit for bit the definition in float64, rounded to FP8 once; unpatched is
SGLANG_MLA_FP8_PREFILL=off, which rounds twice. The attention kernels themselves need an
SM100 GPU and are stand-ins here.

To patch your own checkout or installed SGLang, and to take it back:

    python3 -m prefill_patch apply  --sglang /path/to/sglang
    python3 -m prefill_patch revert --sglang /path/to/sglang

and on a Blackwell GPU (B200, GB200, B300, GB300):

    python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324 --tp 8 \\
        --attention-backend trtllm_mla --kv-cache-dtype fp8_e4m3
    python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324 --tp 8 \\
        --attention-backend tokenspeed_mla --kv-cache-dtype fp8_e4m3 --page-size 64"""


@contextmanager
def step(text: str):
    print(f"... {text}", flush=True)
    start = time.monotonic()
    yield
    print(f"    {time.monotonic() - start:.1f} s", flush=True)


def show_patch(target) -> None:
    for diff in inspect(SOURCE, target).diffs():
        kind = "new" if diff.new else "edited"
        print(f"    {kind:<7} {diff.path}  +{diff.added} -{diff.removed}")


def prefill(backend: str, producer: str, heads: int, lens: list[int]):
    """A layer's operands and cache rows, the same in float64, and its output."""
    import mla_harness as harness

    from sglang.jit_kernel.tests.fp8_reference import MODELS
    from sglang.srt.environ import envs

    dims = MODELS["deepseek-v3"]._replace(heads=heads)
    with envs.SGLANG_MLA_FP8_PREFILL.override(producer):
        env = harness.make_env(dims, backend, q_lora=1536, slots=8192, max_context=4096)
    batch = harness.make_batch(env, lens)
    result = harness.run_prefill(env, batch)
    exact = harness.expected(env, batch)
    (call,) = result.calls
    rows = result.cache[batch.out_cache_loc, 0].view(env.pool.dtype)
    return exact._replace(q=call.q, k=call.k, v=call.v, rows=rows), exact, result.output


def show_layers() -> None:
    import mla_harness as harness
    import torch

    from sglang.jit_kernel.tests.fp8_reference import fp8_difference

    heads, lens, where = 4, [21, 12], "CPU, kernels in Triton's interpreter"
    if harness.HAS_GPU:
        heads, lens, where = 128, [3000, 1096], torch.cuda.get_device_name()
    for backend in BACKENDS:
        with step(f"SGLang prefills a layer, {backend}, unpatched and patched"):
            before, exact, output_before = prefill(backend, "off", heads, lens)
            after, _, output = prefill(backend, "fused", heads, lens)
        print(
            f"\n{backend}: DeepSeek-V3's dimensions, {sum(lens)} tokens, on {where}\n"
        )
        rows = []
        for name, old, new, wanted in zip(exact._fields, before, after, exact):
            old, new = (fp8_difference(x, wanted) for x in (old, new))
            shares = (f"{1 - x.differing / x.elements:.5%}" for x in (old, new))
            rows.append([name, list(wanted.shape), *shares, new.max_ulps])
        header = ["", "shape", "equal to float64: unpatched", "patched", "steps off"]
        print(tabulate(rows, header, disable_numparse=True))
        error = harness.relative_error(output, output_before)
        print(f"\nlayer output against the unpatched one: {error:.2%} rms\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sglang", default="0.5.12.post1")
    sglang = parser.parse_args().sglang
    target = open_target(sglang)
    print(f"SGLang {target.version} from {target.root / target.package}")
    with step("copying it to .build/ and applying the patch to the copy"):
        trees = patched_sglang.lay_out(sglang)
    show_patch(target)
    # SGLang says on import what a machine without a GPU lacks.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with step("importing the patched SGLang"):
        sys.path.insert(0, str(trees.patched))
        import mla_harness  # noqa: F401
    show_layers()
    print(NEXT_STEPS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
