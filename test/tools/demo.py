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

from prefill_patch.patch import Patch, inspect
from prefill_patch.target import open_target

BACKENDS = ("tokenspeed_mla", "trtllm_mla")


@contextmanager
def step(text: str):
    print(f"... {text}", flush=True)
    start = time.monotonic()
    yield
    print(f"    {time.monotonic() - start:.1f} s", flush=True)


def show_patch(target) -> None:
    patch = Patch.load()
    for diff in inspect(patch, target).diffs():
        kind = "new" if diff.new else "edited"
        print(f"    {kind:<7} {diff.path}  +{diff.added} -{diff.removed}")
    print("applied with git apply")


def run_layers(trees: patched_sglang.Trees) -> None:
    # SGLang says on import what a machine without a GPU lacks.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with step("importing the patched SGLang"):
        sys.path.insert(0, str(trees.patched))
        import mla_harness as harness
        import torch

    if harness.HAS_GPU:
        heads, lens, where = 128, [3000, 1096], torch.cuda.get_device_name()
        rounding = "the GPU's rounding"
    else:
        heads, lens, where = 4, [21, 12], "CPU, kernels in Triton's interpreter"
        rounding = "rounding as on a GPU"
    scenarios = [
        harness.Scenario(
            env=dict(
                dims=harness.Dims.deepseek_v3(heads=heads),
                backend=backend,
                slots=8192,
                max_context=4096,
            ),
            batch=dict(extend_lens=lens),
        )
        for backend in BACKENDS
    ]
    with step("the unpatched SGLang prefills one layer"):
        unpatched = harness.run_elsewhere(trees.unpatched, scenarios)
    for backend, scenario, before in zip(BACKENDS, scenarios, unpatched):
        env = harness.make_env(**scenario.env)
        batch = harness.make_batch(env, **scenario.batch)
        with step(f"the patched SGLang prefills the same layer, {backend}"):
            after = harness.run_prefill(env, batch)
            exact = harness.expected(env, batch)
        print(
            f"\n{backend}: {env.dims.heads} heads, {batch.tokens} tokens, DeepSeek-V3 "
            f"dimensions, on {where} ({rounding})"
        )
        columns = ("", "shape", "dtype", "bit-exact", "max ulp", "vs BF16 path")
        print("{:<10} {:<16} {:<14} {:>9} {:>8} {:>26}".format(*columns))
        loc = batch.out_cache_loc
        old, new = before.calls[0], after.calls[0]
        for name, actual, wanted, other in (
            ("q", new.q, exact.q, old.q),
            ("k", new.k, exact.k, old.k),
            ("v", new.v, exact.v, old.v),
            ("cache row", after.rows(loc), exact.rows, before.rows(loc)),
        ):
            actual, other = (
                x.to(harness.DEVICE).view(torch.float8_e4m3fn) for x in (actual, other)
            )
            rounded = harness.round_fp8(wanted)
            off = harness.fp8_ulps(actual, rounded)
            differs = harness.fp8_ulps(actual, other)
            print(
                f"{name:<10} {'x'.join(map(str, actual.shape)):<16} "
                f"{str(actual.dtype).removeprefix('torch.'):<14} "
                f"{(off == 0).double().mean().item():>9.4%} {off.max().item():>8} "
                f"{(differs == 0).double().mean().item():>10.4%} equal,"
                f" {differs.max().item():>3} ulp"
            )
        output = harness.relative_error(
            after.output, before.output.to(after.output.device)
        )
        print(f"layer output against the unpatched SGLang's: {output:.2%} rms\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sglang", default="0.5.12.post1")
    sglang = parser.parse_args().sglang
    target = open_target(sglang)
    print(f"SGLang {target.version} from {target.root / target.package}")
    with step("copying it to .build/ twice and applying the patch to one"):
        trees = patched_sglang.lay_out(sglang)
    show_patch(target)
    run_layers(trees)
    print(
        f"""bit-exact: share of elements equal to the float64 definition rounded once.
vs BF16 path: against the FP8 operands of the unpatched SGLang, which rounds twice.
The attention kernels themselves need an SM100 GPU and are stand-ins here.

To patch your own checkout or installed SGLang, and to take it back:

    python3 -m prefill_patch apply  --sglang /path/to/sglang
    python3 -m prefill_patch revert --sglang /path/to/sglang

and on a Blackwell GPU (B200, GB200, B300, GB300):

    python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324 --tp 8 \\
        --attention-backend trtllm_mla --kv-cache-dtype fp8_e4m3
    python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324 --tp 8 \\
        --attention-backend tokenspeed_mla --kv-cache-dtype fp8_e4m3 --page-size 64"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
