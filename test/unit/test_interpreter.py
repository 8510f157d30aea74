"""What the tests without a GPU rest on: conversions of the repaired interpreter. The
same is wanted of a GPU."""

import math

import pytest
import torch
import triton
import triton.language as tl
from mla_harness import reference
from sglang_cpu import DEVICE, HAS_GPU

E4M3, E5M2 = reference.FP8_DTYPES
both_formats = pytest.mark.parametrize("dtype", [E4M3, E5M2])


@triton.jit
def convert_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def clip_kernel(x, y, n, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in range(tl.load(n)):
        value = tl.load(x + i)
        tl.store(y + 3 * i, tl.maximum(tl.minimum(value, 2.0), -2.0))
        tl.store(y + 3 * i + 1, tl.clamp(value, -2.0, 2.0))
        tl.store(y + 3 * i + 2, tl.minimum(value, 2.0, tl.PropagateNan.ALL))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    block = min(x.numel(), 1 << 13)
    convert_kernel[(x.numel() // block,)](x, out, BLOCK=block)
    return out


def assert_rounds_to_nearest(x: torch.Tensor, dtype: torch.dtype) -> None:
    wanted = reference.round_to_fp8(x.double(), dtype)
    assert not reference.ulps_off(convert(x, dtype), wanted).any()


@both_formats
def test_every_bfloat16_to_fp8(dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    assert_rounds_to_nearest(bits.view(torch.bfloat16).to(DEVICE), dtype)


@both_formats
@pytest.mark.parametrize("source", [torch.float16, torch.float32])
def test_wider_types_to_fp8_about_every_middle(source, dtype):
    values = reference.finite_values(dtype)
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([middle * (1 + s) for s in (-(2.0**-20), 0, 2.0**-20)])
    x = torch.cat([near, -near, torch.tensor([math.inf, math.nan, 1e5])])
    size = triton.next_power_of_2(x.numel())
    x = torch.nn.functional.pad(x, (0, size - x.numel())).to(source).to(DEVICE)
    assert_rounds_to_nearest(x, dtype)


@both_formats
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_every_fp8_value_widens(target, dtype):
    bits = torch.arange(256)
    if HAS_GPU and dtype == E5M2:
        bits[bits % 128 > 0x7B] = 0  # a GPU widens infinity and NaN its own way
    x = bits.to(torch.uint8).view(dtype).to(DEVICE)
    torch.testing.assert_close(
        convert(x, target), x.to(target), rtol=0, atol=0, equal_nan=True
    )


def test_float32_to_bfloat16_rounds_to_even():
    x = torch.randn(4096, device=DEVICE)
    x[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert convert(x, torch.bfloat16).equal(x.to(torch.bfloat16))


@pytest.mark.parametrize("source", [torch.int32, torch.float64])
def test_other_types_and_bfloat16(source):
    x = torch.tensor([-3, 0, 1, 1000], dtype=source, device=DEVICE)
    narrow = convert(x, torch.bfloat16)
    assert narrow.tolist() == x.tolist()
    assert convert(narrow, source).equal(x)


@pytest.mark.parametrize("pdl", [False, True])
def test_clips_loop_bounds_and_pdl(pdl):
    if HAS_GPU and pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("PDL instructions need SM90")
    x = torch.tensor([math.nan, 3.0, -3.0, 1.0], device=DEVICE)
    out = torch.full((5, 3), -1.0, device=DEVICE)
    clip_kernel[(1,)](x, out, torch.tensor([4], device=DEVICE), PDL=pdl)
    out = out.tolist()
    # A GPU's min and max return the operand that is a number.
    assert out[0][:2] == [2.0, -2.0] and math.isnan(out[0][2])
    assert out[1:] == [[2.0] * 3, [-2.0, -2.0, -3.0], [1.0] * 3, [-1.0] * 3]


@pytest.mark.parametrize("wrong", [1.25, math.nan, -1.0])
def test_a_wrong_element_is_noticed(wrong):
    wanted = torch.ones(3, 4, dtype=torch.float64, device=DEVICE)
    actual = wanted.to(E4M3)
    reference.assert_fp8(actual, wanted)
    actual[2, 1] = wrong
    with pytest.raises(AssertionError, match=r"\[2, 1\]"):
        reference.assert_fp8(actual, wanted)
