import sys

import pytest
import torch

from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    FP8_DTYPES,
    MODELS,
    MLADims,
    assert_fp8,
    is_poison,
    nan_memory,
    poison,
    slice_of,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=30, suite="stage-b-kernel-unit-1-gpu-large")

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

DIMS = MODELS["deepseek-v3"]._replace(heads=8)
SHAPES = [
    DIMS,
    MODELS["glm-4.7-flash"],
    MODELS["mistral-4"]._replace(heads=5),
    DIMS._replace(heads=1),
    MLADims(heads=10, nope=48, rope=96, v=80, lora=0),  # no power of two
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(tokens, dims, dtype=torch.bfloat16):
    kv = slice_of(tokens, dims.heads, dims.nope + dims.v, dtype=dtype, before=0)
    k_pe = slice_of(tokens, 1, dims.rope, dtype=dtype)
    return kv[..., : dims.nope], k_pe, kv[..., dims.nope :]


def run(inputs, scale_invs=(1.0, 1.0), **options):
    """Call the kernel in memory full of NaN and compare with the definition."""
    with nan_memory():
        outputs = mla_kv_pack_quantize_fp8(*inputs, **options)
    k_nope, k_pe, v = inputs
    k_pe = k_pe.flatten(1)[:, None].expand(-1, k_nope.shape[1], -1)
    k = torch.cat([k_nope, k_pe], dim=-1)
    assert_fp8(outputs[0], (k.float() * scale_invs[0]).double())
    assert_fp8(outputs[1], (v.float() * scale_invs[1]).double())
    return outputs


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_shapes_and_given_outputs(dims, tokens):
    inputs = make(tokens, dims)
    heads, qk = dims.heads, dims.nope + dims.rope
    k_wide = poison((tokens, heads + 1, qk + 3), torch.float8_e4m3fn)
    v_wide = poison((tokens + 1, heads, dims.v), torch.float8_e4m3fn)
    k_out, v_out = k_wide[:, :heads, :qk], v_wide[:tokens]
    outputs = run(inputs, k_out=k_out, v_out=v_out)
    assert outputs[0] is k_out and outputs[1] is v_out
    assert is_poison(k_wide[:, heads:]) and is_poison(k_wide[..., qk:])
    assert is_poison(v_wide[tokens:])


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype, fp8_dtype):
    inputs = make(9, DIMS, dtype=dtype)
    on_device = torch.tensor([0.5, 3.0], device=DEVICE)
    for k_scale_inv, v_scale_inv in ((0.5, 3), (on_device[:1], on_device[1:])):
        outputs = run(
            inputs,
            (0.5, 3.0),
            k_scale_inv=k_scale_inv,
            v_scale_inv=v_scale_inv,
            fp8_dtype=fp8_dtype,
        )
        assert all(out.dtype == fp8_dtype for out in outputs)
        assert all(out.is_contiguous() for out in outputs)


def test_one_layout_many_lengths():
    for tokens in (3, 1, 40, 0, 7):
        run(make(tokens, DIMS))


def test_a_call_that_fits_does_not_vouch_for_a_longer_one():
    dims = MLADims(heads=2, nope=16, rope=16, v=16, lora=0)
    memory = poison((1000,), torch.float8_e4m3fn)
    for tokens in (4, 8):
        k_out = memory.as_strided((tokens, 2, 32), (64, 400, 1))
        if tokens == 4:
            run(make(tokens, dims), k_out=k_out)
        else:
            with pytest.raises(ValueError, match="k_out must not overlap itself"):
                mla_kv_pack_quantize_fp8(*make(tokens, dims), k_out=k_out)


def test_heads_outermost_and_flat_k_pe():
    k_nope, k_pe, v = make(6, DIMS)
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    run((k_nope, k_pe[:, 0], v))


def test_special_values():
    inputs = make(4, DIMS)
    for x in inputs:
        x[0, ..., 0] = float("inf")
        x[1, ..., 1] = float("nan")
        x[2, ..., 2] = -1e4
    k, v = run(inputs)
    assert k[0, 0, 0].float() == 448 and v[2, 0, 2].float() == -448


@pytest.mark.parametrize(
    "name, change",
    [
        ("k_nope", lambda x: x.float()),
        ("k_nope", lambda x: x[0]),
        ("k_nope", lambda x: x[:, :0]),
        ("k_nope", lambda x: x.transpose(1, 2)),
        ("nope", lambda x: x[..., :8]),
        ("k_pe", lambda x: x.to(torch.float16)),
        ("k_pe", lambda x: x.expand(4, 2, 16)),
        ("k_pe", lambda x: x[:3]),
        ("rope", lambda x: x[..., :8]),
        ("v", lambda x: x[:3]),
        ("v", lambda x: x[:, :1]),
        ("v", lambda x: x[..., ::2]),
        ("v", lambda x: x.to(torch.float16)),
        ("k_out", lambda x: x[..., :32]),
        ("k_out", lambda x: x.view(torch.float8_e5m2)),
        ("k_out", lambda x: x[:1].expand(4, 2, 48)),
        ("v_out", lambda x: x[:3]),
    ],
)
def test_rejects(name, change):
    given = dict(zip(("k_nope", "k_pe", "v"), make(4, MLADims(2, 32, 16, 32, 0))))
    given["k_out"] = poison((4, 2, 48), torch.float8_e4m3fn)
    given["v_out"] = poison((4, 2, 32), torch.float8_e4m3fn)
    argument = {"nope": "k_nope", "rope": "k_pe"}.get(name, name)
    given[argument] = change(given[argument])
    with pytest.raises(ValueError, match=f"^({name}|v) must"):
        mla_kv_pack_quantize_fp8(**given)


@on_gpu
def test_more_than_2_31_elements():
    inputs = make(70000, MODELS["deepseek-v3"])
    with nan_memory():
        outputs = mla_kv_pack_quantize_fp8(*inputs)
    for rows in (slice(0, 3), slice(35000, 35003), slice(-3, None)):
        k_nope, k_pe, v = (x[rows].double() for x in inputs)
        k = torch.cat([k_nope, k_pe.expand(-1, 128, -1)], dim=-1)
        assert_fp8(outputs[0][rows], k)
        assert_fp8(outputs[1][rows], v)
    for out in outputs:
        assert not (out.view(torch.uint8) & 0x7F == 0x7F).any()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
