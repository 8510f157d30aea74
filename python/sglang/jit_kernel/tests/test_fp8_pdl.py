"""PDL: a kernel may start before the one that writes its inputs has ended."""

import sys

import pytest
import torch
import triton
import triton.language as tl

from sglang.jit_kernel.fp8_quantize import fp8_quantize
from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.mla_kv_proj_quantize_fp8 import mla_kv_proj_quantize_fp8
from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import DEVICE
from sglang.jit_kernel.utils import is_arch_support_pdl
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=30, suite="stage-b-kernel-unit-1-gpu-large")

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or not is_arch_support_pdl(), reason="needs a GPU with PDL"
)
TOKENS, HEADS = 64, 4
# Loads in a chain: some hundred microseconds, far longer than it takes to launch the
# next kernels.
STEPS = 20000


@triton.jit
def copy_late_kernel(src, dst, chain, size, steps, BLOCK: tl.constexpr):
    """Lets its dependents start at once, and writes dst much later."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    link = tl.load(chain)
    for _ in range(steps):
        link = tl.load(chain + link)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) + link
    tl.store(dst + at, tl.load(src + at, mask=at < size), mask=at < size)


@triton.jit
def copy_kernel(src, dst, size, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    if WAIT:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + at, tl.load(src + at, mask=at < size), mask=at < size)


def flat(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.uint8) if x.element_size() == 1 else x).flatten()


def write_late(src: torch.Tensor, dst: torch.Tensor) -> None:
    # Each step waits for the one before: a chain of dependent loads, all of them zero.
    chain = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    grid = (triton.cdiv(src.numel(), 4096),)
    copy_late_kernel[grid](
        src, dst, chain, src.numel(), STEPS, BLOCK=4096, launch_pdl=True
    )


def read(src: torch.Tensor, wait: bool = True) -> torch.Tensor:
    src = flat(src)
    dst = torch.empty_like(src)
    grid = (triton.cdiv(src.numel(), 4096),)
    copy_kernel[grid](src, dst, src.numel(), WAIT=wait, BLOCK=4096, launch_pdl=True)
    return dst


def quantize(x, kv, kv_a, k_pe):
    return [fp8_quantize(x, enable_pdl=True)]


def pack(x, kv, kv_a, k_pe):
    return mla_kv_pack_quantize_fp8(kv[..., :128], k_pe, kv[..., 128:], enable_pdl=True)


def project(x, kv, kv_a, k_pe):
    return mla_kv_proj_quantize_fp8(kv_a, WEIGHT, k_pe, enable_pdl=True)


# Made once: a call has no kernel but its own between those of its neighbours.
POSITIONS = torch.arange(TOKENS, device=DEVICE)
COS_SIN = torch.ones(TOKENS, 64, device=DEVICE)
CACHE = torch.zeros(TOKENS, 576, dtype=torch.uint8, device=DEVICE)
WEIGHT = torch.rand(HEADS * 256, 512, device=DEVICE).to(torch.bfloat16)


def prefill(x, kv, kv_a, k_pe):
    out = mla_prefill_quantize_fp8(
        q=x,
        kv=kv,
        kv_a=kv_a,
        k_pe=k_pe,
        positions=POSITIONS,
        cos_sin_cache=COS_SIN,
        is_neox=False,
        qk_nope_head_dim=128,
        kv_cache=CACHE,
        cache_loc=POSITIONS,
        enable_pdl=True,
    )
    return *out, CACHE


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    sizes = [(HEADS, 192), (HEADS, 256), (512,), (1, 64)]
    return [
        torch.randn(TOKENS, *size, device=DEVICE).to(torch.bfloat16) for size in sizes
    ]


def test_a_race_shows(inputs):
    """Without the wait, the writes of the kernel before are missed."""
    x = inputs[0].flatten()
    late = torch.full_like(x, float("nan"))
    read(late, wait=False)
    write_late(x, late)
    torch.cuda.synchronize()
    late.fill_(float("nan"))
    torch.cuda.synchronize()
    write_late(x, late)
    seen = read(late, wait=False)
    assert seen.isnan().any()
    assert torch.equal(late, x)


@pytest.mark.parametrize(
    "function, late",
    [(quantize, 0), (pack, 1), (pack, 3), (project, 2), (project, 3)]
    + [(prefill, i) for i in range(4)],
)
def test_inputs_and_outputs_of_neighbours(inputs, function, late):
    wanted = [flat(out).clone() for out in function(*inputs)]
    source = inputs[late].clone()
    for _ in range(5):
        inputs[late].fill_(float("nan"))
        CACHE.fill_(0xFF)
        torch.cuda.synchronize()
        write_late(source.flatten(), inputs[late].flatten())
        outputs = function(*inputs)
        seen = [read(out) for out in outputs]
        for out, want in zip(seen, wanted):
            assert torch.equal(out, want)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
