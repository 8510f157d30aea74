import sys

import pytest
import torch

from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    FP8_DTYPES,
    assert_fp8,
    is_poison,
    poison,
    slice_of,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=30, suite="stage-b-kernel-unit-1-gpu-large")

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

# (heads, nope, rope, v)
DEEPSEEK = (8, 128, 64, 128)
SHAPES = [
    DEEPSEEK,
    (20, 192, 64, 256),  # GLM-4.7-Flash
    (5, 64, 64, 128),  # Mistral 4
    (1, 128, 64, 128),
    (10, 96, 32, 80),
    (3, 7, 5, 11),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(tokens, heads, nope, rope, v, dtype=torch.bfloat16):
    kv = slice_of(tokens, heads, nope + v, dtype=dtype, before=0, after=8)
    return kv[..., :nope], slice_of(tokens, 1, rope, dtype=dtype), kv[..., nope:]


def check(inputs, outputs, k_scale_inv=1.0, v_scale_inv=1.0):
    k_nope, k_pe, v = inputs
    k_pe = k_pe.flatten(1)[:, None].expand(-1, k_nope.shape[1], -1)
    k = torch.cat([k_nope, k_pe], dim=-1)
    assert_fp8(outputs[0], (k.float() * k_scale_inv).double())
    assert_fp8(outputs[1], (v.float() * v_scale_inv).double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_shapes(shape, tokens):
    inputs = make(tokens, *shape)
    heads, nope, rope, dim_v = shape
    k_wide = poison((tokens, heads + 1, nope + rope + 3), torch.float8_e4m3fn)
    v_wide = poison((tokens + 1, heads, dim_v), torch.float8_e4m3fn)
    k_out, v_out = k_wide[:, :heads, : nope + rope], v_wide[:tokens]
    outputs = mla_kv_pack_quantize_fp8(*inputs, k_out=k_out, v_out=v_out)
    assert outputs[0] is k_out and outputs[1] is v_out
    check(inputs, outputs)
    assert is_poison(k_wide[:, heads:]) and is_poison(k_wide[..., nope + rope :])
    assert is_poison(v_wide[tokens:])


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype, fp8_dtype):
    inputs = make(9, *DEEPSEEK, dtype=dtype)
    outputs = mla_kv_pack_quantize_fp8(*inputs, 0.5, 3.0, fp8_dtype=fp8_dtype)
    assert outputs[0].dtype == outputs[1].dtype == fp8_dtype
    assert outputs[0].is_contiguous() and outputs[1].is_contiguous()
    check(inputs, outputs, 0.5, 3.0)
    scales = torch.tensor([0.5, 3.0], device=DEVICE)
    on_device = mla_kv_pack_quantize_fp8(
        *inputs, scales[:1], scales[1:], fp8_dtype=fp8_dtype
    )
    for a, b in zip(outputs, on_device):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_one_layout_many_lengths():
    for tokens in (3, 1, 40, 0, 7):
        inputs = make(tokens, *DEEPSEEK)
        check(inputs, mla_kv_pack_quantize_fp8(*inputs))


def test_heads_outermost_and_flat_k_pe():
    k_nope, k_pe, v = make(6, *DEEPSEEK)
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    inputs = k_nope, k_pe[:, 0], v
    check(inputs, mla_kv_pack_quantize_fp8(*inputs))


def test_special_values():
    inputs = make(4, *DEEPSEEK)
    for x in inputs:
        x[0, ..., 0] = float("inf")
        x[1, ..., 1] = float("nan")
        x[2, ..., 2] = -1e4
    outputs = mla_kv_pack_quantize_fp8(*inputs)
    check(inputs, outputs)
    assert outputs[0][0, 0, 0].float() == 448 and outputs[1][2, 0, 2].float() == -448


class TestRejects:
    def setup_method(self):
        self.k_nope, self.k_pe, self.v = make(4, 2, 16, 8, 16)

    @pytest.mark.parametrize(
        "name, change",
        [
            ("k_nope", lambda x: x.float()),
            ("k_nope", lambda x: x[0]),
            ("k_nope", lambda x: x[:, :1]),
            ("k_nope", lambda x: x.transpose(1, 2)),
            ("k_pe", lambda x: x.to(torch.float16)),
            ("k_pe", lambda x: x.expand(4, 2, 8)),
            ("k_pe", lambda x: x[:3]),
            ("v", lambda x: x[:3]),
            ("v", lambda x: x[..., ::2]),
            ("v", lambda x: x.to(torch.float16)),
        ],
    )
    def test_inputs(self, name, change):
        given = {"k_nope": self.k_nope, "k_pe": self.k_pe, "v": self.v}
        given[name] = change(given[name])
        with pytest.raises(ValueError, match="k_nope|k_pe|v must"):
            mla_kv_pack_quantize_fp8(**given)

    def test_outputs(self):
        with pytest.raises(ValueError, match="k_out must"):
            mla_kv_pack_quantize_fp8(
                self.k_nope, self.k_pe, self.v, k_out=poison((4, 2, 8), FP8_DTYPES[0])
            )
        with pytest.raises(ValueError, match="v_out must have k_nope's 4 tokens"):
            mla_kv_pack_quantize_fp8(
                self.k_nope, self.k_pe, self.v, v_out=poison((3, 2, 16), FP8_DTYPES[0])
            )


def test_one_token_does_not_vouch_for_more():
    """A stride means nothing in a dimension of one, which passes with any."""
    for tokens in (1, 3):
        inputs = make(tokens, *DEEPSEEK)
        k_out = poison((1, 8, 192), FP8_DTYPES[0]).expand(tokens, 8, 192)
        k_out = k_out.as_strided(k_out.shape, (0, 192, 1))
        if tokens == 1:
            check(inputs, mla_kv_pack_quantize_fp8(*inputs, k_out=k_out))
        else:
            with pytest.raises(ValueError, match="k_out must not overlap itself"):
                mla_kv_pack_quantize_fp8(*inputs, k_out=k_out)


@on_gpu
def test_more_than_2_31_elements():
    inputs = make(70000, 128, *DEEPSEEK[1:])
    k_out = poison((70000, 128, 192), FP8_DTYPES[0])
    v_out = poison((70000, 128, 128), FP8_DTYPES[0])
    mla_kv_pack_quantize_fp8(*inputs, k_out=k_out, v_out=v_out)
    for rows in (slice(0, 3), slice(35000, 35003), slice(-3, None)):
        check([x[rows] for x in inputs], (k_out[rows], v_out[rows]))
    for out in (k_out, v_out):
        assert not (out.view(torch.uint8) == 0xFF).any()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
