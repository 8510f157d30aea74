"""Prefill preparation of one layer as SGLang runs it, on a GPU: unpatched, with SGLang
0.5.13's kernels in this hook, and patched.

From kv_b_proj's output to the attention kernel's inputs: the projections, norms, the
attention kernel and the merge of its results are replaced by ones that cost nothing,
everything else is SGLang's own code without a CUDA graph. GPU time is the sum over the
kernels, copies and fills of a layer, as the profiler sees them. Unpatched is
SGLANG_MLA_FP8_PREFILL=off, which runs SGLang's own path.

    bench_layer.py --sglang TARGET [--peers FOLDER] [--host]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import patched_sglang
from tabulate import tabulate

CHUNK = 8192
CASES = [(heads, chunks) for heads in (128, 16) for chunks in (0, 1, 4)]
QUICK_CASES = [(16, 0), (16, 1)]
HOST_TOKENS = (1, 8, 128)
LAYERS = 20


def free(attn, inputs, hidden) -> None:
    """Take the time out of the layer's projections and norms."""
    import torch

    outputs = dict(
        q_a_layernorm=None,  # what it is given
        q_b_proj=(inputs["q"].flatten(1), None),
        kv_a_layernorm=inputs["kv_a"],
        kv_b_proj=(inputs["kv"].flatten(1), None),
        o_proj=(hidden, None),
    )
    for name, output in outputs.items():
        getattr(attn, name).forward = lambda x, *_, output=output, **__: (
            x if output is None else output
        )
    kv_a, k_pe = inputs["kv_a"], inputs["k_pe"].squeeze(1)
    latent = torch.cat([kv_a.new_zeros(len(kv_a), attn.q_lora_rank), kv_a, k_pe], -1)
    attn.prepare_qkv_latent = lambda *_: latent


@contextlib.contextmanager
def free_attention(heads):
    """Take out the attention kernel and the merge of its results."""
    import flashinfer.prefill
    import torch

    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha

    lse = torch.zeros(CHUNK, heads, device="cuda")

    def attention(out, return_lse, **_):
        return (out, lse) if return_lse else out

    with (
        mock.patch.object(
            flashinfer.prefill, "trtllm_ragged_attention_deepseek", attention
        ),
        mock.patch.object(forward_mha, "merge_state_v2", lambda *_: None),
    ):
        yield


def make_layer(heads, tokens, chunks=0, producer="fused"):
    """An environment, its batch behind so many chunks of a prefix, and its forward
    batch."""
    import mla_harness as harness

    from sglang.jit_kernel.tests.fp8_reference import MODELS
    from sglang.srt.environ import envs

    size = max(tokens * (chunks + 2), 64)
    with envs.SGLANG_MLA_FP8_PREFILL.override(producer):
        env = harness.make_env(
            MODELS["deepseek-v3"]._replace(heads=heads),
            "trtllm_mla",
            q_lora=1536,
            slots=-(-size // 64) * 64,
            max_context=size,
        )
    prefix = [tokens * chunks] if chunks else None
    batch = harness.make_batch(env, [tokens], prefix, chunks=chunks or None)
    free(env.attn, harness.layer_inputs(env, batch), batch.hidden)
    with harness.chunk_capacity(batch.chunk_capacity):
        forward_batch = harness.make_forward_batch(env, batch)
        env.backend.init_forward_metadata(forward_batch)
    return env, batch, forward_batch


def gpu_time(heads, chunks, producer) -> tuple[float, float]:
    """(microseconds, launches) of a layer."""
    import mla_harness as harness
    import torch
    from torch.profiler import ProfilerActivity, profile

    env, batch, forward_batch = make_layer(heads, CHUNK, chunks, producer)

    def layers(count):
        for _ in range(count):
            state = harness.prepare(env, forward_batch, batch.hidden)
            env.attn.forward_core(state)
        torch.cuda.synchronize()

    with (
        torch.no_grad(),
        free_attention(heads),
        harness.chunk_capacity(batch.chunk_capacity),
    ):
        layers(3)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            layers(LAYERS)
    # The calls that launch are events too, of no time on the GPU.
    events = [e for e in profiled.key_averages() if e.self_device_time_total]
    return (
        sum(event.self_device_time_total for event in events) / LAYERS,
        sum(event.count for event in events) / LAYERS,
    )


def host_time(tokens, use_peers) -> dict:
    """Microseconds that one call takes to return: of the kernel's function, of the hook
    less kv_b_proj, and of the hook with 0.5.13's kernels."""
    import mla_harness as harness
    import torch
    from torch.utils.benchmark import Timer

    from sglang.srt.layers.attention import mla_fp8_prefill

    env, batch, forward_batch = make_layer(128, tokens)
    hook = env.backend.prepare_prefill_qkv
    kernel = mla_fp8_prefill.mla_prefill_quantize_fp8
    with (
        torch.no_grad(),
        mock.patch.object(env.backend, "prepare_prefill_qkv", wraps=hook) as hooked,
        mock.patch.object(
            mla_fp8_prefill, "mla_prefill_quantize_fp8", wraps=kernel
        ) as launched,
    ):
        harness.prepare(env, forward_batch, batch.hidden)

    def timed(function, call):
        timer = Timer("function(**x)", globals=dict(function=function, x=call.kwargs))
        return timer.blocked_autorange(min_run_time=0.5).median * 1e6

    row = {"tokens": tokens, "kernel": timed(kernel, launched.call_args)}
    row["hook"] = timed(hook, hooked.call_args)
    with use_peers() as peers:
        if peers:
            row["hook, 0.5.13's kernels"] = timed(hook, hooked.call_args)
    return row


@contextlib.contextmanager
def peers_in_the_hook(folder):
    """The hook launches SGLang 0.5.13's kernels, where their folder is given."""
    if folder is None:
        yield False
        return
    from sglang.jit_kernel.benchmark import bench_mla_fp8_prefill as bench
    from sglang.srt.layers.attention import mla_fp8_prefill

    quantize, pack = (
        bench.load_peer(folder, name) for name in (bench.QUANTIZE, bench.PACK)
    )
    with mock.patch.multiple(
        mla_fp8_prefill,
        mla_prefill_quantize_fp8=lambda **x: bench.sglang_0_5_13_prefill(quantize, x),
        mla_kv_pack_quantize_fp8=functools.partial(pack, enable_pdl=True),
    ):
        yield True


def layer_row(heads, chunks, use_peers) -> dict:
    row = {"heads": heads, "chunks": chunks}
    before, launches_before = gpu_time(heads, chunks, "off")
    with use_peers() as peers:
        if peers:
            row["0.5.13's kernels"], _ = gpu_time(heads, chunks, "fused")
    after, launches = gpu_time(heads, chunks, "fused")
    row |= {"unpatched": before, "patched": after, "ratio": before / after}
    return row | {"launches": f"{launches_before:.0f} / {launches:.0f}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument("--peers", help="folder with SGLang 0.5.13's kernels")
    parser.add_argument("--host", action="store_true", help="the host's time only")
    parser.add_argument("--quick", action="store_true", help="two cases")
    options = parser.parse_args()
    sys.path.insert(0, str(patched_sglang.lay_out(options.sglang).patched))
    import machine

    print(machine.describe())
    use_peers = functools.partial(peers_in_the_hook, options.peers)
    show = functools.partial(
        tabulate, headers="keys", tablefmt="pipe", floatfmt=("", "", ".1f")
    )
    if not options.host:
        cases = QUICK_CASES if options.quick else CASES
        rows = [layer_row(*case, use_peers) for case in cases]
        print(
            f"\ntrtllm_mla, {CHUNK} new tokens behind chunks of {CHUNK}: us a layer\n"
        )
        print(show(rows))
    print("\nhost: us a call\n")
    print(show([host_time(tokens, use_peers) for tokens in HOST_TOKENS]))


if __name__ == "__main__":
    main()
