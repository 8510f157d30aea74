import sys

import pytest
import torch

import sglang.jit_kernel.fp8_common as fp8_common
from sglang.jit_kernel.fp8_quantize import _flatten_to_2d, fp8_quantize
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    FP8_DTYPES,
    assert_fp8,
    is_poison,
    poison,
    round_to_fp8,
    slice_of,
    ulps_off,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=30, suite="stage-b-kernel-unit-1-gpu-large")

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scaled(x: torch.Tensor, scale_inv: float) -> torch.Tensor:
    # The product is taken in float32, as documented; it is exact for scale 1.
    return (x.float() * scale_inv).double()


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_inv", [1.0, 0.3, 40.0])
@pytest.mark.parametrize("clamped", [False, True])
def test_every_input_value(dtype, fp8_dtype, scale_inv, clamped, monkeypatch):
    if clamped:  # as on AMD GPUs
        kind = fp8_common.CONVERT_CLAMPED.value
        monkeypatch.setattr(fp8_common, "fp8_conversion", lambda device: kind)
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=DEVICE)
    x = bits.to(torch.int16).view(dtype)
    out = fp8_quantize(x, scale_inv, fp8_dtype=fp8_dtype)
    wanted = round_to_fp8(scaled(x, scale_inv), fp8_dtype)
    assert ulps_off(out, wanted).max() == 0
    # Saturated, never infinite; NaN exactly where the input has it.
    assert torch.equal(out.float().isnan(), x.isnan())
    assert not out.float().isinf().any()


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
def test_conversion_through_float16(fp8_dtype, monkeypatch):
    """GPUs before SM90 truncate to float16 first, which the kernel prepares for: what
    it hands on is exact in float16 and rounds to the same FP8 value."""
    x = torch.randn(1 << 16).bfloat16().to(DEVICE)
    exact = (x.float() * 0.3).double()
    sticky = exact.float().view(torch.int32)
    sticky = (sticky & ~0xFFFF) | torch.where((sticky & 0xFFFF) != 0, 0x10000, 0)
    half = sticky.to(torch.int32).view(torch.float32)
    normal = half.abs() >= 2.0**-14
    assert torch.equal(half[normal].half().float(), half[normal])
    via_float16 = fp8_common.CONVERT_VIA_FLOAT16.value
    monkeypatch.setattr(fp8_common, "fp8_conversion", lambda device: via_float16)
    out = fp8_quantize(x, 0.3, fp8_dtype=fp8_dtype)
    assert ulps_off(out, round_to_fp8(exact, fp8_dtype)).max() == 0


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (7,), (4096,), (5, 1), (3, 100), (2, 3, 96), (4, 5, 192), (2, 2, 2, 17)]
    + [(1, 7168), (3, 1000), (33, 128)],
)
@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
def test_contiguous(shape, fp8_dtype):
    x = torch.randn(shape, device=DEVICE).to(torch.bfloat16)
    out = fp8_quantize(x, fp8_dtype=fp8_dtype)
    assert out.shape == x.shape and out.dtype == fp8_dtype and out.is_contiguous()
    assert_fp8(out, x.double())


@pytest.mark.parametrize("length", [1, 6, 64, 96, 128, 192, 512, 1000])
def test_views(length):
    x = slice_of(5, 3, length)
    wide = poison((5, 3, length + 9), torch.float8_e4m3fn)
    out = wide[..., 4 : 4 + length]
    assert fp8_quantize(x, 0.5, out=out) is out
    assert_fp8(out, scaled(x, 0.5))
    assert is_poison(wide[..., :4]) and is_poison(wide[..., 4 + length :])


def test_a_view_is_written_from_a_contiguous_input():
    x = torch.randn(5, 32, device=DEVICE).to(torch.bfloat16)
    wide = poison((5, 48), torch.float8_e4m3fn)
    fp8_quantize(x, out=wide[:, :32])
    assert_fp8(wide[:, :32], x.double())
    assert is_poison(wide[:, 32:])


def test_every_second_row():
    x = slice_of(9, 32)[::2]
    assert_fp8(fp8_quantize(x), x.double())


def test_scale_on_device():
    x = slice_of(17, 128)
    # An address that is only aligned for float32.
    scale = torch.tensor([9.0, 0.25], device=DEVICE)[1:]
    assert torch.equal(
        fp8_quantize(x, scale).view(torch.uint8),
        fp8_quantize(x, 0.25).view(torch.uint8),
    )


@pytest.mark.parametrize("shape", [(0,), (0, 128), (3, 0), (4, 0, 8)])
def test_empty(shape):
    out = fp8_quantize(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))
    assert out.shape == shape and out.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("enable_pdl", [None, False, True])
def test_pdl_setting(enable_pdl):
    x = slice_of(65, 128)
    assert_fp8(fp8_quantize(x, enable_pdl=enable_pdl), x.double())


class TestFlatten:
    def test_folds(self):
        x = torch.empty(4, 5, 24)
        assert _flatten_to_2d(x) == (20, 24, 24)
        assert _flatten_to_2d(x[..., 8:]) == (20, 16, 24)
        assert _flatten_to_2d(x[:, :1, 8:]) == (4, 16, 120)
        assert _flatten_to_2d(x[0, 0]) == (1, 24, 24)
        assert _flatten_to_2d(x[::2].select(1, 0)) == (2, 24, 240)

    def test_strides_of_single_rows_do_not_matter(self):
        x = torch.empty(6, 8).as_strided((6, 1, 8), (8, 5, 1))
        assert _flatten_to_2d(x) == (6, 8, 8)

    @pytest.mark.parametrize(
        "x",
        [torch.empty(4, 5, 8).transpose(0, 1), torch.empty(4, 5, 8)[:, ::2][:, :2]],
    )
    def test_no_single_row_stride(self, x):
        with pytest.raises(ValueError, match="row stride"):
            _flatten_to_2d(x)

    def test_last_dimension(self):
        with pytest.raises(ValueError, match="contiguous last dimension"):
            _flatten_to_2d(torch.empty(4, 5).t())


class TestRejects:
    def setup_method(self):
        self.x = torch.zeros(4, 8, dtype=torch.bfloat16, device=DEVICE)

    def test_dtypes(self):
        with pytest.raises(ValueError, match="x must be bfloat16 or float16"):
            fp8_quantize(self.x.float())
        with pytest.raises(ValueError, match="fp8_dtype must be one of"):
            fp8_quantize(self.x, fp8_dtype=torch.uint8)

    def test_scales(self):
        for scale in (
            torch.ones(2, device=DEVICE),
            torch.ones(1, device=DEVICE, dtype=torch.float64),
        ):
            with pytest.raises(ValueError, match="scale_inv must be a float or"):
                fp8_quantize(self.x, scale)

    def test_outputs(self):
        for out in (
            poison((4, 9), torch.float8_e4m3fn),
            poison((4, 8), torch.float8_e5m2),
            poison((4, 8), torch.uint8),
        ):
            with pytest.raises(ValueError, match="out must be torch.float8_e4m3fn"):
                fp8_quantize(self.x, out=out)
        with pytest.raises(ValueError, match="out must not overlap itself"):
            fp8_quantize(self.x, out=poison((1, 8), torch.float8_e4m3fn).expand(4, 8))
        with pytest.raises(ValueError, match="out: .*no single row stride"):
            x = self.x.view(2, 2, 8)
            out = poison((2, 3, 8), torch.float8_e4m3fn)[:, :2]
            fp8_quantize(x, out=out)

    @on_gpu
    def test_devices(self):
        with pytest.raises(ValueError, match="x must be on a GPU"):
            fp8_quantize(self.x.cpu())
        with pytest.raises(ValueError, match="scale_inv must be on cuda:0"):
            fp8_quantize(self.x, torch.ones(1))


@on_gpu
@pytest.mark.parametrize("view", [False, True])
def test_more_than_2_31_elements(view):
    rows, length = 70000, 128 * 256
    x = torch.randn(rows, length, dtype=torch.bfloat16, device=DEVICE)
    if view:
        x = x.view(rows, 128, 256)[..., 128:]
    out = poison(x.shape, torch.float8_e4m3fn)
    fp8_quantize(x, out=out)
    for rows in (slice(0, 3), slice(35000, 35003), slice(-3, None)):
        assert_fp8(out[rows], x[rows].double())
    assert not (out.view(torch.uint8) == 0xFF).any()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
