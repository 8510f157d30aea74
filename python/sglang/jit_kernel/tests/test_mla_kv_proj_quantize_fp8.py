import sys

import pytest
import torch

from sglang.jit_kernel.mla_kv_proj_quantize_fp8 import mla_kv_proj_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    assert_fp8,
    expected_kv_proj,
    nan_memory,
    quantize_blocks,
    slice_of,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=30, suite="stage-b-kernel-unit-1-gpu-large")

FP8 = torch.float8_e4m3fn
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
needs_tma = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0),
    reason="needs SM90",
)
pytestmark = needs_tma

MOST_HEADS = 128 if DEVICE == "cuda" else 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(tokens, heads, lora=512, rope=64, dtype=torch.bfloat16):
    """A latent in wider rows, a weight that keeps its size, a rotated k_pe."""
    kv_a = slice_of(tokens, lora, dtype=dtype, before=0)
    weight = torch.randn(heads * 256, lora, device=DEVICE).mul_(lora**-0.5)
    k_pe = slice_of(tokens, 1, rope, dtype=dtype)
    return kv_a, weight.to(dtype), k_pe


def make_fp8(tokens, heads, lora=512, rope=64, unit_latent=False):
    """The same with latent and weight in FP8 and the scales of their blocks; the latent
    without any if it is as in the KV cache."""
    kv_a, weight, k_pe = make(tokens, heads, lora, rope)
    weight, weight_scale = quantize_blocks(weight, 128)
    kv_a_scale = None
    if not unit_latent:
        kv_a, kv_a_scale = quantize_blocks(kv_a, 1)
    in_wider_rows = kv_a.new_empty(tokens, lora + 16, dtype=FP8)[:, :lora]
    in_wider_rows.copy_(kv_a)
    scales = dict(kv_a_scale=kv_a_scale, weight_scale=weight_scale)
    return (in_wider_rows, weight, k_pe), scales


def run(inputs, scale_invs=(1.0, 1.0), scales={}, **options):
    """Call the kernel in memory full of NaN and compare with the definition."""
    with nan_memory():
        outputs = mla_kv_proj_quantize_fp8(*inputs, **scales, **options)
    # K and V are some 3.
    slack = 2**-7 * max(scale_invs) if scales and DEVICE == "cuda" else 0.0
    for out, wanted in zip(outputs, expected_kv_proj(*inputs, scale_invs, **scales)):
        assert out.is_contiguous() and out.dtype == FP8
        assert_fp8(out, wanted, slack)
    return outputs


@pytest.mark.parametrize("heads", sorted({1, 3, MOST_HEADS}))
@pytest.mark.parametrize("tokens", [1, 127, 129, 300])
def test_shapes(tokens, heads):
    run(make(tokens, heads))


@pytest.mark.parametrize("unit_latent", [False, True])
@pytest.mark.parametrize(
    "tokens, heads, lora, rope", [(1, 1, 512, 64), (65, 3, 256, 32), (127, 2, 128, 16)]
)
def test_fp8_weight(tokens, heads, lora, rope, unit_latent):
    inputs, scales = make_fp8(tokens, heads, lora, rope, unit_latent)
    run(inputs, scales=scales)
    run(inputs, (0.5, 3.0), scales, k_scale_inv=0.5, v_scale_inv=3.0)


@on_gpu
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_more_tiles_than_programs(heads):
    for tokens in torch.randint(1500, 5000, (3,)).tolist():
        run(make(tokens, heads))
        for unit_latent in (False, True):
            inputs, scales = make_fp8(tokens, heads, unit_latent=unit_latent)
            run(inputs, scales=scales)


@pytest.mark.parametrize("lora, rope", [(512, 64), (192, 32), (48, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype, lora, rope):
    kv_a, weight, k_pe = make(9, 2, lora, rope, dtype)
    on_device = torch.tensor([0.5, 3.0], device=DEVICE)
    run(
        (kv_a, weight, k_pe[:, 0]),
        (0.5, 3.0),
        k_scale_inv=on_device[:1],
        v_scale_inv=on_device[1:],
    )
    run((kv_a, weight, k_pe), (1.0, 0.25), v_scale_inv=0.25)
    # In FP8 it is scaled already.
    scaled = k_pe.to(FP8)
    with nan_memory():
        outputs = mla_kv_proj_quantize_fp8(kv_a, weight, scaled, 0.5, 0.25)
    unscaled = scaled.double() / 0.5
    for out, wanted in zip(
        outputs, expected_kv_proj(kv_a, weight, unscaled, (0.5, 0.25))
    ):
        assert_fp8(out, wanted)


def test_one_layout_many_lengths():
    for tokens in (3, 1, 140, 0, 7):
        run(make(tokens, 1))


def test_special_values():
    kv_a, weight, k_pe = make(4, 1)
    kv_a[0], kv_a[1, 0], kv_a[2] = 3e4, float("nan"), 0
    k_pe[3] = float("inf")
    k, v = mla_kv_proj_quantize_fp8(kv_a, weight.abs(), k_pe)
    assert (k[0, :, :128].float() == 448).all() and (v[0].float() == 448).all()
    assert k[1, :, :128].float().isnan().all() and v[1].float().isnan().all()
    assert (k[2, :, :128].float() == 0).all() and (v[2].float() == 0).all()
    assert (k[3, :, 128:].float() == 448).all()


@pytest.mark.parametrize(
    "name, change",
    [
        ("kv_a", lambda x: x.float()),
        ("kv_a", lambda x: x[0]),
        ("kv_a", lambda x: x.T),
        ("kv_a", lambda x: x.as_strided((4, 32), (35, 1))),
        ("kv_a", lambda x: x.as_strided((4, 32), (56, 1), 4)),
        ("lora", lambda x: x[:, :8]),
        ("weight", lambda x: x.to(torch.float16)),
        ("weight", lambda x: x[:255]),
        ("weight", lambda x: x[:0]),
        ("weight", lambda x: x[:, :16]),
        ("weight", lambda x: x.repeat(1, 2)[:, :32]),
        ("k_pe", lambda x: x.to(torch.float16)),
        ("k_pe", lambda x: x[:3]),
        ("k_pe", lambda x: x.expand(4, 2, 16)),
        ("k_pe", lambda x: x.float()),
        ("k_pe", lambda x: x.to(FP8).repeat(1, 1, 2)[..., ::2]),
        ("rope", lambda x: x[..., :8]),
    ],
)
def test_rejects(name, change):
    given = dict(zip(("kv_a", "weight", "k_pe"), make(4, 1, lora=32, rope=16)))
    argument = {"lora": "kv_a", "rope": "k_pe"}.get(name, name)
    given[argument] = change(given[argument])
    with pytest.raises(ValueError, match=f"^{name} must"):
        mla_kv_proj_quantize_fp8(**given)


@pytest.mark.parametrize(
    "name, change",
    [
        ("kv_a", lambda x: x.to(torch.bfloat16)),
        ("kv_a", lambda x: x.repeat(1, 2).as_strided((4, 256), (264, 1))),
        ("lora", lambda x: x[:, :192]),
        ("weight", lambda x: x.to(torch.bfloat16)),
        ("k_pe", lambda x: x.float()),
        ("k_pe", lambda x: x.to("meta")),
        ("kv_a_scale", lambda x: x[:3]),
        ("kv_a_scale", lambda x: x[:, :1]),
        ("kv_a_scale", lambda x: x.T.contiguous().T),
        ("kv_a_scale", lambda x: x.double()),
        ("weight_scale", lambda x: x[:1]),
        ("weight_scale", lambda x: x.T),
        ("weight_scale", lambda x: None),
    ],
)
def test_rejects_in_fp8(name, change):
    inputs, scales = make_fp8(4, 1, lora=256, rope=16)
    given = dict(zip(("kv_a", "weight", "k_pe"), inputs), **scales)
    argument = {"lora": "kv_a"}.get(name, name)
    given[argument] = change(given[argument])
    refused = "kv_a" if given["weight_scale"] is None else name
    with pytest.raises(ValueError, match=f"^{refused} must"):
        mla_kv_proj_quantize_fp8(**given)


@on_gpu
def test_more_than_2_31_elements():
    inputs = make(100000, 128)
    with nan_memory():
        outputs = mla_kv_proj_quantize_fp8(*inputs)
    kv_a, weight, k_pe = inputs
    for rows in (slice(0, 3), slice(87380, 87383), slice(-3, None)):
        for out, wanted in zip(
            outputs, expected_kv_proj(kv_a[rows], weight, k_pe[rows])
        ):
            assert_fp8(out[rows], wanted)
    for out in outputs:
        assert not (out.view(torch.uint8) & 0x7F == 0x7F).any()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
