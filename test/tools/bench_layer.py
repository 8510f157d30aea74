"""Prefill preparation of one layer as SGLang runs it, patched and unpatched (GPU).

From kv_b_proj's output to the attention kernel's inputs: the projections, norms, the
attention kernel and the merge of its results are replaced by ones that cost nothing,
everything else is SGLang's own code without a CUDA graph. GPU time is the sum over the
kernels, copies and fills of a layer, as the profiler sees them; host time is what the
hook takes to return.

    bench_layer.py --sglang TARGET      lays out both trees and prints the table
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]
CHUNK = 8192
CASES = [(heads, chunks) for heads in (128, 16) for chunks in (0, 1, 4)]
HOST_TOKENS = (1, 8, 128)
LAYERS = 20


def median(values):
    return sorted(values)[len(values) // 2]


class Costless:
    """Stands in for a projection, whose time is not the question here."""

    def __init__(self, outputs):
        self.outputs = {len(x): x for x in outputs}

    def __call__(self, x):
        return self.outputs[len(x)], None


def costless(env, batch):
    """Take out of the layer what is not preparation; returns its inputs."""
    import flashinfer.prefill
    import mla_harness as harness
    import torch

    inputs = harness.layer_inputs(env, batch)
    attn, modules = env.attn, env.attn._modules
    for name, outputs in (
        ("q_b_proj", [inputs.q.flatten(1)]),
        ("kv_b_proj", [inputs.kv.flatten(1)]),
        ("o_proj", [batch.hidden]),
    ):
        del modules[name]
        object.__setattr__(attn, name, Costless(outputs))
    for name, output in (("q_a_layernorm", None), ("kv_a_layernorm", inputs.kv_a)):
        del modules[name]
        object.__setattr__(
            attn, name, lambda x, output=output: output if output is not None else x
        )
    lse = torch.zeros(batch.tokens, env.dims.heads, device="cuda")
    flashinfer.prefill.trtllm_ragged_attention_deepseek = (
        lambda out, return_lse, **rest: ((out, lse) if return_lse else out)
    )
    latent = torch.cat([inputs.kv_a, inputs.k_pe.squeeze(1)], dim=-1)
    q_latent = torch.zeros(batch.rows, env.dims.q_lora, device="cuda", dtype=env.dtype)
    latent = torch.cat([q_latent, latent], dim=-1)
    object.__setattr__(attn, "prepare_qkv_latent", lambda *args: latent)
    forward_mha = sys.modules[type(attn).forward_normal_prepare.__module__]
    forward_mha.merge_state_v2 = lambda *args: None
    return inputs


def gpu_microseconds(heads, chunks):
    import mla_harness as harness
    import torch

    env = harness.make_env(
        harness.Dims.deepseek_v3(heads=heads),
        "trtllm_mla",
        slots=CHUNK * (chunks + 2),
        max_context=CHUNK * (chunks + 2),
    )
    prefix = [CHUNK * chunks] if chunks else None
    batch = harness.make_batch(env, [CHUNK], prefix, chunks=chunks or None)
    costless(env, batch)
    with harness.chunk_capacity(batch.chunk_capacity), torch.no_grad():
        forward_batch = harness.make_forward_batch(env, batch)
        env.backend.init_forward_metadata(forward_batch)

        def layer():
            state = harness.prepare(env, forward_batch, batch.hidden)
            env.attn.forward_core(state)

        for _ in range(3):
            layer()
        torch.cuda.synchronize()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            for _ in range(LAYERS):
                layer()
            torch.cuda.synchronize()
    # The calls that launch are events too, of no time on the GPU.
    events = [e for e in profile.key_averages() if e.self_device_time_total]
    launches = sum(event.count for event in events) / LAYERS
    return sum(event.self_device_time_total for event in events) / LAYERS, launches


def host_microseconds(tokens, peers):
    """Of one call of the hook less kv_b_proj, and of SGLang 0.5.13's four launches.

    None without the hook; None for 0.5.13 where its kernels are not given.
    """
    import mla_harness as harness
    import torch

    env = harness.make_env(harness.Dims.deepseek_v3(heads=128), "trtllm_mla")
    hook = getattr(env.backend, "prepare_prefill_qkv", None)
    if hook is None:
        return None
    from sglang.jit_kernel.benchmark import bench_mla_fp8_prefill as bench

    batch = harness.make_batch(env, [tokens])
    inputs = costless(env, batch)
    forward_batch = harness.make_forward_batch(env, batch)
    env.backend.init_forward_metadata(forward_batch)
    q = inputs.q
    arguments = dict(
        q=q,
        q_pe=q[..., env.dims.nope :],
        kv_a=inputs.kv_a,
        k_pe=inputs.k_pe,
        positions=batch.positions,
        layer=env.attn,
        forward_batch=forward_batch,
    )
    assert hook(**arguments) is not None

    def timed(function):
        times = []
        for _ in range(60):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(30):
                function()
            times.append((time.perf_counter() - start) / 30 * 1e6)
        return median(times)

    quantize = bench.load_peer(peers, "fp8_quantize") if peers else None
    if quantize is None:
        return timed(lambda: hook(**arguments)), None
    upstream = bench.Prefill({"fp8_quantize": quantize}).upstream
    tensors = dict(
        q=q,
        kv=inputs.kv,
        kv_a=inputs.kv_a,
        k_pe=inputs.k_pe,
        positions=batch.positions,
        cos_sin_cache=env.cos_sin_cache,
        qk_nope_head_dim=env.dims.nope,
        kv_cache=env.pool.get_key_buffer(0),
        cache_loc=batch.out_cache_loc,
    )
    for _ in range(3):
        upstream(tensors)
    return timed(lambda: hook(**arguments)), timed(lambda: upstream(tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument("--peers", help="folder with SGLang 0.5.13's kernels")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        gpu = [gpu_microseconds(*case) for case in CASES]
        host = [host_microseconds(n, options.peers) for n in HOST_TOKENS]
        print(json.dumps({"gpu": gpu, "host": host}))
        return
    import patched_sglang

    results = []
    for tree in patched_sglang.lay_out(options.sglang):
        peers = ["--peers", options.peers] if options.peers else []
        try:
            output = patched_sglang.run_python(tree, __file__, "--measure", *peers)
        except RuntimeError as error:
            sys.exit(str(error))
        results.append(json.loads(output.splitlines()[-1]))
    before, after = results
    print(f"trtllm_mla, {CHUNK} new tokens, prefix chunks of {CHUNK}; us per layer")
    columns = ("heads", "chunks", "unpatched", "patched", "ratio", "launches")
    print("{:>6} {:>7} {:>10} {:>9} {:>6} {:>10}".format(*columns))
    for (heads, chunks), old, new in zip(CASES, before["gpu"], after["gpu"]):
        print(
            f"{heads:>6} {chunks:>7} {old[0]:>10.0f} {new[0]:>9.0f} "
            f"{old[0] / new[0]:>6.2f} {old[1]:>5.0f}/{new[1]:.0f}"
        )
    print("host time of the hook less kv_b_proj, and of SGLang 0.5.13's path; us")
    for tokens, (us, upstream) in zip(HOST_TOKENS, after["host"]):
        print(f"{tokens:>6} tokens {us:>6.1f} {upstream or float('nan'):>8.1f}")


if __name__ == "__main__":
    main()
