"""The patched SGLang on this host's GPU, in a process of its own, since a broken one may
take it down.

    python -m prefill_patch.selftest [--patched] BACKEND...

prints a line a check; its status says the worst of them (`doctor.SELFTEST_STATUS`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton.testing

from prefill_patch import SOURCE
from prefill_patch.doctor import (
    FAIL,
    GEMM_SWITCH,
    LSE_AUTO,
    LSE_SWITCH,
    OK,
    SELFTEST_STATUS,
    SWITCH,
    UNKNOWN,
    Check,
    print_all,
)
from prefill_patch.releases import BACKENDS, FA3

_ATTENTION = "sglang.srt.layers.attention"
# Where the kernels themselves are depends on the release.
HOOK = f"{_ATTENTION}.mla_fp8_prefill"
KERNELS = ("mla_prefill_quantize_fp8", "mla_kv_pack_quantize_fp8", "fp8_quantize")
GEMM, Q_GEMM = "mla_kv_proj_quantize_fp8", "mla_q_proj_quantize_fp8"

# SM numbers. Only these have the backends' attention kernels.
FP8_CONVERSION, GEMM_FROM = 89, 90
ATTENTION_KERNELS, FA3_KERNELS = (100, 103), (90,)
# Of copy bandwidth: what a kernel is expected to reach, and what shows a fault.
GOOD_SHARE, BAD_SHARE = 0.9, 0.5

_OFF = f"Set {SWITCH}=off, or revert the patch, until it is understood"


class Gpu(NamedTuple):
    name: str
    sm: int


class Launch(NamedTuple):
    """A kernel and its inputs: a call that returns all that it writes, what it reads,
    and the names and float64 values of what it has to write."""

    run: Callable[[], Sequence[torch.Tensor]]
    reads: Sequence[torch.Tensor]
    expected: Callable[[], dict[str, torch.Tensor]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check this host's GPU and kernels.")
    parser.add_argument("backends", nargs="+", choices=BACKENDS)
    parser.add_argument("--patched", action="store_true", help="import the patch too")
    args = parser.parse_args(argv)
    return SELFTEST_STATUS[print_all(run(args.backends, args.patched))]


def run(backends: Sequence[str], patched: bool) -> Iterator[Check]:
    """Every check, as far as it gets."""
    gpus, problem = visible_gpus()
    yield check_gpus(gpus, problem, backends)
    if not patched:
        yield Check(UNKNOWN, "kernels", "not run without the patch")
    elif not gpus or min(gpu.sm for gpu in gpus) < FP8_CONVERSION:
        yield Check(UNKNOWN, "kernels", "not run without a GPU that converts to FP8")
    else:
        yield attempt("hook", check_hook, backends)
        reference = load_reference()
        yield from check_kernels(reference)
        if min(gpu.sm for gpu in gpus) >= GEMM_FROM:
            yield attempt(GEMM, check_gemm, reference)
            yield attempt(f"{GEMM}, weight in FP8", check_gemm, reference, True)
            yield attempt(Q_GEMM, check_q_gemm, reference)
        if "trtllm_mla" in backends and runs_attention(gpus):
            yield attempt("log-sum-exp", check_lse_base, os.environ)


def visible_gpus() -> tuple[list[Gpu], str]:
    """The GPUs as torch, and so a server in this Python, sees them; or why none."""
    try:
        torch.cuda.init()
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [Gpu(gpu.name, gpu.major * 10 + gpu.minor) for gpu in found], ""
    except Exception as error:
        return [], _brief(error)


def check_gpus(gpus: Sequence[Gpu], problem: str, backends: Sequence[str]) -> Check:
    seen_by = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if not gpus:
        text = f"{seen_by} sees none, {problem}: run this on the host of the server"
        return Check(UNKNOWN, "GPU", text)
    counts = Counter(gpus).items()
    text = ", ".join(f"{count} x {gpu.name} (SM{gpu.sm})" for gpu, count in counts)
    text += f"; {seen_by}"
    if any(gpu.sm < FP8_CONVERSION for gpu in gpus):
        text += f"; FP8 conversion needs SM{FP8_CONVERSION}"
    if FA3 in backends and not runs_attention(gpus, FA3_KERNELS):
        return Check(FAIL, "GPU", f"{text}; {FA3} needs SM90: run on H100, H200, H20")
    others = [name for name in backends if name != FA3]
    if others and not runs_attention(gpus):
        text += f"; {' and '.join(others)} need SM100: run on B200, GB200, B300, GB300"
        return Check(FAIL, "GPU", text)
    return Check(OK, "GPU", text)


def runs_attention(
    gpus: Sequence[Gpu], kernels: Sequence[int] = ATTENTION_KERNELS
) -> bool:
    return bool(gpus) and all(gpu.sm in kernels for gpu in gpus)


def check_lse_base(environ: Mapping[str, str], device: str = "cuda") -> tuple[str, str]:
    """What trtllm_mla, on one rank's heads of DeepSeek-V3, finds when it starts."""
    module = importlib.import_module("sglang.srt.layers.attention.trtllm_mla_backend")
    backend = object.__new__(module.TRTLLMMLABackend)
    backend.__dict__.update(
        device=device,
        data_type=torch.float8_e4m3fn,
        q_data_type=torch.bfloat16,
        num_local_heads=16,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        scaling=192**-0.5,
        workspace_buffer=torch.zeros(
            module.DEFAULT_WORKSPACE_SIZE_MB << 20, dtype=torch.uint8, device=device
        ),
    )
    base = backend.find_lse_base()
    setting = environ.get(LSE_SWITCH, LSE_AUTO).lower()
    text = f"trtllm-gen returns base {base} here"
    if setting in (LSE_AUTO, base):
        return OK, text
    return FAIL, f"{text}, not {setting}: unset {LSE_SWITCH}"


def check_hook(backends: Sequence[str]) -> tuple[str, str]:
    """Whether what a server imports has the hook, and calls it."""
    hook = importlib.import_module(HOOK)
    for backend in backends:
        module, _, name = BACKENDS[backend].partition(":")
        module = importlib.import_module(f"{_ATTENTION}.{module}")
        if not issubclass(getattr(module, name), hook.MLAFP8PrefillMixin):
            return FAIL, f"{name} is without MLAFP8PrefillMixin"
    model = importlib.import_module(
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mha"
    )
    if not hasattr(model, hook.attend_prefix_chunks.__name__):
        return FAIL, f"{model.__name__} does not call it"
    return OK, f"{' and '.join(backends)} import with it"


def load_reference() -> ModuleType:
    """The float64 definitions that the kernels' own tests use."""
    path = SOURCE / "jit_kernel/tests/fp8_reference.py"
    spec = importlib.util.spec_from_file_location("fp8_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    return reference


def check_kernels(reference: ModuleType) -> Iterator[Check]:
    dims = reference.MODELS["deepseek-v3"]
    for check, tokens, heads in (
        (check_exact, 333, dims.heads),
        # A rank of a tensor-parallel group has a part of the heads, and other launches.
        (check_exact, 333, dims.heads // 8),
        (check_bandwidth, 8192, dims.heads),
    ):
        for name in KERNELS:
            subject = f"{name}, {heads} heads, {tokens} tokens"
            shape = dims._replace(heads=heads), tokens
            done = attempt(subject, check, reference, name, *shape)
            yield done
            if done.mark != OK:
                # What an error leaves of the GPU's context makes the rest fail too.
                return


def launches(reference: ModuleType, dims: Any, tokens: int) -> dict[str, Launch]:
    """Each kernel on random inputs, with what has to saturate or to stay NaN in the
    first tokens."""
    torch.manual_seed(0)
    inputs = reference.prefill_inputs(dims, tokens)
    # As SGLang passes them; k_pe is a view there too.
    for name in ("q", "kv", "kv_a"):
        inputs[name] = inputs[name].contiguous()
    for name in ("q", "kv", "kv_a", "k_pe"):
        for token, value in enumerate((torch.inf, torch.nan, -1e4)):
            inputs[name][token, ..., [token, -1 - token]] = value
    q, kv, kv_a, k_pe, cache = (
        inputs[name] for name in ("q", "kv", "kv_a", "k_pe", "kv_cache")
    )
    k_nope, v = kv.split([dims.nope, dims.v], dim=-1)

    def prefilled() -> dict[str, torch.Tensor]:
        *qkv, rows = reference.expected_prefill(inputs)
        slots = torch.full_like(cache, torch.nan, dtype=torch.float64)
        slots[inputs["cache_loc"], 0] = rows
        return dict(zip(("q", "k", "v", "KV cache"), (*qkv, slots)))

    def packed() -> dict[str, torch.Tensor]:
        k = torch.cat([k_nope, k_pe.expand(-1, dims.heads, -1)], dim=-1)
        return {"k": k.double() * 0.5, "v": v.double() * 0.25}

    prefill, pack, quantize = (
        getattr(importlib.import_module(HOOK), name) for name in KERNELS
    )
    # Scales are powers of two, so that scaling itself does not round.
    found = (
        Launch(lambda: (*prefill(**inputs), cache), (q, kv, kv_a, k_pe), prefilled),
        Launch(lambda: pack(k_nope, k_pe, v, 0.5, 0.25), (kv, k_pe), packed),
        Launch(lambda: (quantize(v),), (v,), lambda: {"v": v.double()}),
    )
    return dict(zip(KERNELS, found))


def check_exact(reference: ModuleType, name: str, *shape) -> tuple[str, str]:
    launch = launches(reference, *shape)[name]
    with reference.nan_memory():
        written = launch.run()
    differences = {
        output: reference.fp8_difference(actual, wanted)
        for actual, (output, wanted) in zip(
            written, launch.expected().items(), strict=True
        )
    }
    wrong = [f"{n}: {d}" for n, d in differences.items() if not d.within_bounds]
    if wrong:
        return FAIL, f"{'; '.join(wrong)}. {_OFF}"
    elements = sum(found.elements for found in differences.values())
    differing = sum(found.differing for found in differences.values())
    return OK, (
        f"{differing} of {elements} elements one step off float64 rounded once, the "
        "others equal it bit for bit"
    )


def check_bandwidth(reference: ModuleType, name: str, *shape) -> tuple[str, str]:
    """The kernel's share of what a device copy of as many bytes reaches."""
    launch = launches(reference, *shape)[name]
    moved = sum(x.nbytes for x in (*launch.reads, *launch.run()))
    source = torch.ones(moved // 2, dtype=torch.uint8, device=launch.reads[0].device)
    target = torch.empty_like(source)
    taken, copied = time_of(launch.run), time_of(lambda: target.copy_(source))
    share = copied / taken
    text = (
        f"{share:.2f} of copy bandwidth, {taken * 1e3:.0f} us; "
        f"the copy reaches {moved / copied / 1e6:.0f} GB/s"
    )
    if share < BAD_SHARE:
        text += f". Far below the {GOOD_SHARE} expected: is the GPU shared? Else {_OFF}"
        return FAIL, text
    if share < GOOD_SHARE:
        text += f". Below the {GOOD_SHARE} expected, but correct"
    return OK, text


def check_gemm(
    reference: ModuleType,
    in_fp8: bool = False,
    tokens: int = 8192,
    device: str = "cuda",
) -> tuple[str, str]:
    """K and V straight out of kv_b_proj against SGLang's GEMM and a launch, for a prefix
    chunk of DeepSeek-V3 on one GPU and on one of eight; in_fp8: for weights in FP8."""
    hook = importlib.import_module(HOOK)
    fp8_utils = importlib.import_module("sglang.srt.layers.quantization.fp8_utils")
    dims = reference.MODELS["deepseek-v3"]
    torch.manual_seed(0)
    times = []
    for heads in (dims.heads, dims.heads // 8):
        kv_a, k_pe, plain = (
            torch.randn(*shape, device=device).to(torch.bfloat16)
            for shape in (
                (tokens, dims.lora),
                (tokens, 1, dims.rope),
                (heads * (dims.nope + dims.v), dims.lora),
            )
        )
        plain *= dims.lora**-0.5
        weight, scale = (
            reference.quantize_blocks(plain, 128) if in_fp8 else (plain, None)
        )

        def fused():
            weights = hook._Weight(weight, scale)
            return hook._project_kv_fp8(weights, kv_a, k_pe, (1.0, 1.0))

        def separate():
            if in_fp8:
                linear = fp8_utils.dispatch_w8a8_block_fp8_linear()
                kv = linear(kv_a, weight, [128, 128], scale)
            else:
                kv = torch.nn.functional.linear(kv_a, weight)
            k_nope, v = kv.view(tokens, heads, -1).split([dims.nope, dims.v], dim=-1)
            return getattr(hook, KERNELS[1])(k_nope, k_pe, v)

        some = slice(-111, None)  # more would take float64's time
        with reference.nan_memory():
            k, v = (x[some] for x in fused())
        latent, latent_scale = kv_a[some], None
        if in_fp8:
            latent, latent_scale = hook.per_token_group_quant_fp8(latent, 128)
        exact_k, exact_v = reference.expected_kv_proj(
            latent,
            weight,
            k_pe[some],
            kv_a_scale=latent_scale,
            weight_scale=scale,
        )
        slack = 2**-8 if in_fp8 else 0.0
        for name, actual, exact in (("k", k, exact_k), ("v", v, exact_v)):
            difference = reference.fp8_difference(actual, exact, slack)
            if not difference.within_bounds:
                return FAIL, f"{name}: {difference}. Set {GEMM_SWITCH}=off"
        times += [time_of(separate) / time_of(fused)]
    peer = "SGLang's GEMM" if in_fp8 else "cuBLAS"
    return _faster_setting(f"as fast as {peer} and a launch", times, dims.heads)


def check_q_gemm(
    reference: ModuleType, tokens: int = 8192, device: str = "cuda"
) -> tuple[str, str]:
    """Q straight out of q_b_proj and the launch for the cache rows, against cuBLAS and
    the launch for both, on one GPU and on one of eight."""
    hook = importlib.import_module(HOOK)
    dims, lora = reference.MODELS["deepseek-v3"], 1536
    torch.manual_seed(0)
    times = []
    for heads in (dims.heads, dims.heads // 8):
        inputs = reference.prefill_inputs(dims._replace(heads=heads), tokens)
        positions, cos_sin_cache = inputs["positions"], inputs["cos_sin_cache"]
        q_a, weight = (
            torch.randn(n, lora, device=device).to(torch.bfloat16)
            for n in (tokens, heads * (dims.nope + dims.rope))
        )
        weight *= lora**-0.5

        def launch(q):
            return getattr(hook, KERNELS[0])(**{**inputs, "q": q, "kv": None})

        def fused():
            q = getattr(hook, Q_GEMM)(q_a, weight, positions, cos_sin_cache)
            return q, launch(inputs["q"][:, :0])

        def separate():
            q = torch.nn.functional.linear(q_a, weight)
            return launch(q.unflatten(1, (heads, -1)))

        some = slice(-111, None)  # more would take float64's time
        with reference.nan_memory():
            q = fused()[0][some]
        exact = reference.expected_q_proj(
            q_a[some], weight, positions[some], cos_sin_cache
        )
        difference = reference.fp8_difference(q, exact)
        if not difference.within_bounds:
            return FAIL, f"q: {difference}. Set {GEMM_SWITCH}=off"
        times += [time_of(separate) / time_of(fused)]
    return _faster_setting("as fast as cuBLAS and the launch", times, dims.heads)


def _faster_setting(what: str, times: Sequence[float], heads: int) -> tuple[str, str]:
    text = f"{times[0]:.2f} times {what} with {heads} heads, {times[1]:.2f} with "
    faster = "on" if min(times) > 1 else "off"
    return OK, f"{text}{heads // 8}: {GEMM_SWITCH}={faster} is faster here"


def time_of(call: Callable[[], Any]) -> float:
    """Milliseconds of the GPU's, in a CUDA graph: a busy host's are not among them."""
    return triton.testing.do_bench_cudagraph(call, return_mode="median")


def attempt(subject: str, check: Callable[..., tuple[str, str]], *args) -> Check:
    """A check's outcome, or the error that it ended with."""
    try:
        mark, text = check(*args)
    except torch.OutOfMemoryError as error:
        mark, text = UNKNOWN, f"not run, stop what else is on the GPU: {_brief(error)}"
    except (Exception, SystemExit) as error:
        mark, text = FAIL, f"{_brief(error)}; a server may stop the same way"
    return Check(mark, subject, text)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0].strip()}" if lines else name


if __name__ == "__main__":
    sys.exit(main())
