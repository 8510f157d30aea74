"""Benchmark the FP8 preparation of MLA prefills at DeepSeek-V3's dimensions.

Compares, by operation, as far as each does it:
  - ``fused``:         the kernel of that name.
  - ``sglang_0_5_13``: what SGLang 0.5.13 launches for it, with the fp8_quantize.py and
                       mla_kv_pack_quantize_fp8.py of the folder given with --peers.
  - ``flashinfer``:    mla_rope_quantize_fp8 alone: q and k, no v and no cache.
  - ``bf16``:          the path without the hook: RoPE and concatenation in BF16, casts.
  - ``separate``:      the projections by cuBLAS, or SGLang's linear for weights in FP8
                       (DeepGEMM where it is installed), which quantizes its input, then
                       the launch that quantizes their output.

Inputs are rotated, so that L2 holds none of them. Bytes count each input element read
once and each output element written once; a share of 1 is the bandwidth of a large
device copy in the same run. Results are compared with float64 before they are timed.
"""

import argparse
import importlib.util
import itertools
import math

import torch
from flashinfer.rope import mla_rope_quantize_fp8
from sgl_kernel import concat_mla_k
from tabulate import tabulate

from sglang.jit_kernel.benchmark.utils import get_benchmark_range, run_benchmark
from sglang.jit_kernel.fp8_quantize import fp8_quantize
from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.mla_kv_proj_quantize_fp8 import mla_kv_proj_quantize_fp8
from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.jit_kernel.mla_q_proj_quantize_fp8 import mla_q_proj_quantize_fp8
from sglang.jit_kernel.rope import apply_rope_with_cos_sin_cache_inplace
from sglang.jit_kernel.tests.fp8_reference import (
    MODELS,
    expected_prefill,
    fp8_difference,
    prefill_inputs,
    quantize_blocks,
    times_scales,
)
from sglang.srt.layers.attention.mla_fp8_prefill import MLAFP8PrefillMixin
from sglang.srt.layers.attention.mla_fp8_prefill_internals import (
    per_token_group_quant_fp8,
)
from sglang.srt.layers.attention.utils import concat_and_cast_mha_k_triton
from sglang.srt.layers.quantization.fp8_utils import dispatch_w8a8_block_fp8_linear
from sglang.srt.mem_cache.utils import set_mla_kv_buffer_triton
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=60, suite="stage-b-kernel-benchmark-1-gpu-large")

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
# A rotation is several times an L2; MAX_SETS bounds the set-up of short inputs.
ROTATED_BYTES, MAX_SETS = 240e6, 400

TOKENS = get_benchmark_range(
    full_range=[1, 8, 64, 128, 512, 2048, 8192, 16384, 32768, 65536],
    ci_range=[128, 2048, 8192],
)
# At tensor parallel size 8, 4, 2 and 1.
HEADS = get_benchmark_range(full_range=[16, 32, 64, 128], ci_range=[16, 128])
PREFILL, PACK = "mla_prefill_quantize_fp8", "mla_kv_pack_quantize_fp8"
QUANTIZE = "fp8_quantize"
# Without K and V, as one-shot attention over a prefix takes it.
Q_AND_CACHE = "mla_prefill_quantize_fp8, kv=None"
# K and V straight out of kv_b_proj: of a prefix chunk, and of new tokens with Q and the
# cache rows; Q straight out of q_b_proj where the hook has it so.
PROJECT = "mla_kv_proj_quantize_fp8"
PROJECT_ALL = "mla_q_proj_quantize_fp8, mla_prefill_quantize_fp8, " + PROJECT
# The same with weights in FP8; a chunk's latent is as it is in the cache.
PROJECT_FP8, PROJECT_ALL_FP8 = f"{PROJECT}, FP8", f"{PROJECT_ALL}, FP8"
CHUNKS, NEW_TOKENS = (PROJECT, PROJECT_FP8), (PROJECT_ALL, PROJECT_ALL_FP8)
IN_FP8 = (PROJECT_FP8, PROJECT_ALL_FP8)
Q_LORA = 1536
CASES = [
    *itertools.product([PREFILL], HEADS, TOKENS),
    *itertools.product([Q_AND_CACHE], [16, 128], TOKENS),
    *itertools.product([PACK], [128], TOKENS),
    (QUANTIZE, 128, 8192),
    *itertools.product(
        [*CHUNKS, *NEW_TOKENS], [16, 128], [n for n in TOKENS if n >= 512]
    ),
]


def k_and_v(x):
    """k_nope, k_pe and v from the inputs of a prefill."""
    nope = x["qk_nope_head_dim"]
    return x["kv"][..., :nope], x["k_pe"], x["kv"][..., nope:]


def flashinfer_rope(x):
    q, nope = x["q"], x["qk_nope_head_dim"]
    q_fp8, k_fp8 = torch.empty_like(q, dtype=FP8), torch.empty_like(q, dtype=FP8)
    mla_rope_quantize_fp8(
        q[..., nope:],
        x["k_pe"].expand(-1, q.shape[1], -1),
        q[..., :nope],
        x["kv"][..., :nope],
        x["cos_sin_cache"],
        x["positions"],
        is_neox=x["is_neox"],
        quantize_dtype=FP8,
        q_rope_out=q_fp8[..., nope:],
        k_rope_out=k_fp8[..., nope:],
        q_nope_out=q_fp8[..., :nope],
        k_nope_out=k_fp8[..., :nope],
        enable_pdl=True,
    )
    return q_fp8, k_fp8


def write_cache(x, latent, k_pe):
    cache, latent, k_pe = (y.view(torch.uint8) for y in (x["kv_cache"], latent, k_pe))
    set_mla_kv_buffer_triton(cache, x["cache_loc"], latent, k_pe)


def sglang_0_5_13_prefill(quantize, x):
    q_fp8, k_fp8 = flashinfer_rope(x)
    v_fp8 = quantize(k_and_v(x)[2], enable_pdl=True)
    latent = quantize(x["kv_a"], enable_pdl=True).unsqueeze(1)
    write_cache(x, latent, k_fp8[:, :1, x["qk_nope_head_dim"] :])
    return q_fp8, k_fp8, v_fp8


def bf16_q_and_cache(x):
    q, k_pe = x["q"], x["k_pe"]
    q_pe = q[..., x["qk_nope_head_dim"] :]
    apply_rope_with_cos_sin_cache_inplace(
        q_pe, k_pe, x["cos_sin_cache"], x["positions"], is_neox=x["is_neox"]
    )
    q[..., x["qk_nope_head_dim"] :] = q_pe
    write_cache(x, x["kv_a"].unsqueeze(1).to(FP8), k_pe.to(FP8))
    return q.to(FP8), None, None


def bf16_prefill(x):
    return bf16_q_and_cache(x)[0], *bf16_pack(*k_and_v(x))


def bf16_pack(k_nope, k_pe, v):
    tokens, heads, nope = k_nope.shape
    k = k_nope.new_empty(tokens, heads, nope + k_pe.shape[-1])
    if heads == 128:
        concat_mla_k(k=k, k_nope=k_nope, k_rope=k_pe)
    else:
        concat_and_cast_mha_k_triton(k, k_nope, k_pe)
    return k.to(FP8), v.to(FP8)


def linear(x, weight):
    """x @ weight.T, a weight in FP8 with its scales as SGLang's linear does it."""
    if not isinstance(weight, tuple):
        return torch.nn.functional.linear(x, weight)
    return dispatch_w8a8_block_fp8_linear()(x, weight[0], [128, 128], weight[1])


def projected(x):
    """x with kv by kv_b_proj."""
    kv = linear(x["kv_a"], x["kv_weight"]).view(x["kv"].shape)
    return {**x, "kv": kv}


def q_projected(x):
    """x with q by q_b_proj."""
    return {**x, "q": linear(x["q_a"], x["q_weight"]).view(x["q"].shape)}


def q_by_gemm(x):
    """Whether the hook has Q straight out of q_b_proj."""
    tokens, heads, _ = x["q"].shape
    large = tokens * heads >= MLAFP8PrefillMixin.least_q_gemm_rows
    return large and not isinstance(x["q_weight"], tuple)


def chunk_by_gemm(x):
    if "latent" not in x:
        return mla_kv_proj_quantize_fp8(x["kv_a"], x["kv_weight"], x["k_pe"])
    weight, scale = x["kv_weight"]
    return mla_kv_proj_quantize_fp8(
        x["latent"], weight, x["latent_k_pe"], weight_scale=scale
    )


def prefill_by_gemm(x):
    kv_a, weight, scales, projected_q = x["kv_a"], x["kv_weight"], {}, None
    if isinstance(weight, tuple):
        weight, scales["weight_scale"] = weight
        kv_a, scales["kv_a_scale"] = per_token_group_quant_fp8(kv_a, 128)
    if q_by_gemm(x):
        rope = x["positions"], x["cos_sin_cache"]
        projected_q = mla_q_proj_quantize_fp8(x["q_a"], x["q_weight"], *rope)
        x = {**x, "q": x["q"][:, :0]}
    else:
        x = q_projected(x)
    k_pe = x["k_pe"].new_empty(x["k_pe"].flatten(1).shape, dtype=FP8)
    q, _, _ = mla_prefill_quantize_fp8(**only_prefill({**x, "kv": None}), k_pe_out=k_pe)
    k_and_v = mla_kv_proj_quantize_fp8(kv_a, weight, k_pe, **scales)
    return q if projected_q is None else projected_q, *k_and_v


def only_prefill(x):
    """The arguments of mla_prefill_quantize_fp8 among these."""
    others = {"kv_weight", "q_weight", "q_a", "latent", "latent_k_pe"}
    return {name: x[name] for name in x.keys() - others}


def load_peer(folder, name):
    """SGLang 0.5.13's function of this name, from its file in `folder`."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def get_providers(operation, peers):
    """From the inputs of a prefill to a tuple of results, by provider."""
    if operation == Q_AND_CACHE:
        return {
            "fused": lambda x: mla_prefill_quantize_fp8(**{**x, "kv": None}),
            "bf16": bf16_q_and_cache,
        }
    if operation in CHUNKS:
        return {
            "fused": chunk_by_gemm,
            "separate": lambda x: mla_kv_pack_quantize_fp8(*k_and_v(projected(x))),
        }
    if operation in NEW_TOKENS:
        return {
            "fused": prefill_by_gemm,
            "separate": lambda x: mla_prefill_quantize_fp8(
                **only_prefill(projected(q_projected(x)))
            ),
        }
    peer = peers and load_peer(peers, QUANTIZE if operation == PREFILL else operation)
    if operation == PREFILL:
        providers = {
            "fused": lambda x: mla_prefill_quantize_fp8(**x),
            "sglang_0_5_13": lambda x: sglang_0_5_13_prefill(peer, x),
            "flashinfer": flashinfer_rope,
            "bf16": bf16_prefill,
        }
    elif operation == PACK:
        providers = {
            "fused": lambda x: mla_kv_pack_quantize_fp8(*k_and_v(x)),
            "sglang_0_5_13": lambda x: peer(*k_and_v(x), enable_pdl=True),
            "bf16": lambda x: bf16_pack(*k_and_v(x)),
        }
    else:
        providers = {
            "fused": lambda x: (fp8_quantize(k_and_v(x)[2]),),
            "sglang_0_5_13": lambda x: (peer(k_and_v(x)[2], enable_pdl=True),),
            "bf16": lambda x: (k_and_v(x)[2].to(FP8),),
        }
    if not peers:
        del providers["sglang_0_5_13"]
    return providers


def with_weights(x, operation):
    """The inputs, with the weights of q_b_proj and kv_b_proj and the input of q_b_proj, and
    a chunk's latent as it is in the cache; for other operations as they are."""
    if operation not in (*CHUNKS, *NEW_TOKENS):
        return x
    heads, row = x["kv"].shape[1:]
    x["q_a"] = torch.randn(len(x["q"]), Q_LORA, dtype=BF16, device="cuda")
    for name, out, lora in (
        ("q_weight", heads * x["q"].shape[2], Q_LORA),
        ("kv_weight", heads * row, x["kv_a"].shape[1]),
    ):
        weight = torch.randn(out, lora, dtype=BF16, device="cuda")
        x[name] = weight.mul_(lora**-0.5)
        if operation in IN_FP8:
            x[name] = quantize_blocks(weight, 128)
    if operation == PROJECT_FP8:
        x["latent"], x["latent_k_pe"] = x["kv_a"].to(FP8), x["k_pe"].to(FP8)
        x["kv_a"], x["k_pe"] = x["latent"].to(BF16), x["latent_k_pe"].to(BF16)
    return x


def make_inputs(dims, tokens, sets=1):
    """Sets of the inputs of a prefill, as the layers of a model have them."""
    inputs = [prefill_inputs(dims, tokens) for _ in range(sets)]
    for x in inputs:
        # Views but k_pe would make the bandwidth a matter of the gaps in them.
        x.update({name: x[name].contiguous() for name in ("q", "kv", "kv_a")})
        x["cos_sin_cache"] = inputs[0]["cos_sin_cache"]
    return inputs


def bytes_moved(operation, dims, tokens):
    heads, nope, rope, v, lora = dims
    # As the launch that follows kv_b_proj.
    if operation in CHUNKS:
        operation = PACK
    elif operation in NEW_TOKENS:
        operation = PREFILL
    if operation == QUANTIZE:
        return tokens * heads * 3 * v
    pack = tokens * heads * (2 * (nope + v) + nope + rope + v)
    k_pe = tokens * 2 * rope
    if operation == PACK:
        return pack + k_pe
    # And q, the cache row, position and slot, cosines and sines.
    row = 2 * lora + lora + rope + 8 + 8 + 4 * rope
    q_and_cache = tokens * (heads * 3 * (nope + rope) + row) + k_pe
    return q_and_cache + (pack if operation == PREFILL else 0)


def check(operation, provider, function, dims):
    """Raise unless the results are those of the definition."""
    (x,) = make_inputs(dims, tokens=512)
    x = with_weights(x, operation)
    exact, slack = x, 0.0
    if operation in (*CHUNKS, *NEW_TOKENS):
        kv_a, weight = x["kv_a"].double(), x["kv_weight"]
        if operation in IN_FP8:
            weight, slack = times_scales(*weight), 2**-7
        if operation == PROJECT_ALL_FP8:
            kv_a = times_scales(*per_token_group_quant_fp8(x["kv_a"], 128))
        kv = kv_a @ weight.double().T
        exact = {**q_projected(x), "kv": kv.view(x["kv"].shape)}
        if q_by_gemm(x):
            q = x["q_a"].double() @ x["q_weight"].double().T
            exact["q"] = q.view(x["q"].shape)
    # Before the call, as bf16_prefill rotates in place. Packing does not rotate.
    whole = operation in (PREFILL, Q_AND_CACHE, *NEW_TOKENS)
    wanted = expected_prefill(exact if whole else {**exact, "cos_sin_cache": None})
    if operation in (PACK, *CHUNKS):
        wanted = wanted[1:3]
    elif operation == QUANTIZE:
        wanted = [wanted.v]
    results = function(x)
    if len(results) == 3:
        results = *results, x["kv_cache"][x["cache_loc"]].flatten(1)
    for actual, exact in zip(results, wanted):
        if actual is None:
            continue
        difference = fp8_difference(actual, exact, slack)
        # What is rounded to BF16 first is off by a step here and there; by more where it
        # is rotated after that, or a chunk's latent is quantized again.
        rounded = provider in ("bf16", "separate")
        far = rounded and operation in (PROJECT_FP8, PROJECT_ALL)
        most = 0xFF if far else 1
        enough = difference.within_bounds or rounded
        if difference.max_ulps > most or not enough:
            raise AssertionError(f"{operation}, {provider}: {difference}")


def benchmark(operation, heads, tokens, peers, copy):
    """A row of the table; vs_ is a provider's time over the fused kernel's."""
    dims = MODELS["deepseek-v3"]._replace(heads=heads)
    size = bytes_moved(operation, dims, tokens)
    sets = min(max(math.ceil(ROTATED_BYTES / size), 2), MAX_SETS)
    times = {}
    for provider, function in get_providers(operation, peers).items():
        check(operation, provider, function, dims)
        inputs = make_inputs(dims, tokens, sets)
        inputs = [with_weights(x, operation) for x in inputs]
        torch.cuda.synchronize()
        # The list keeps the outputs of a rotation alive: each has memory of its own.
        times[provider], _, _ = run_benchmark(
            lambda: [function(x) for x in inputs], scale=sets
        )
    us = times.pop("fused")
    row = dict(operation=operation, heads=heads, tokens=tokens, us=us)
    if operation not in (*CHUNKS, *NEW_TOKENS):
        row.update(gbps=size / us / 1e3, copy_share=size / us / copy)
    return row | {f"vs_{name}": time / us for name, time in times.items()}


def copy_bandwidth():
    """Bytes per microsecond, read and written, of a large device copy."""
    source = torch.zeros(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / run_benchmark(lambda: target.copy_(source))[0]


def run(peers=None):
    """Benchmark and print all cases; their rows."""
    copy = copy_bandwidth()
    rows = [benchmark(*case, peers, copy) for case in CASES]
    print(f"device copy: {copy / 1e3:.0f} GB/s")
    print(tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".3f"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="folder of SGLang 0.5.13's kernels")
    run(parser.parse_args().peers)
