import sys

import pytest
import torch

from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    FP8_DTYPES,
    assert_fp8,
    is_poison,
    poison,
    rotate,
    slice_of,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=60, suite="stage-b-kernel-unit-1-gpu-large")

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

# (heads, nope, rope, v, lora)
DEEPSEEK = (8, 128, 64, 128, 512)
SHAPES = [
    DEEPSEEK,
    (16, 128, 64, 128, 512),  # DeepSeek-V2-Lite
    (20, 192, 64, 256, 512),  # GLM-4.7-Flash
    (32, 64, 64, 128, 256),  # Mistral 4
    (1, 128, 64, 128, 512),
    (2, 128, 64, 128, 512),
    (5, 192, 64, 256, 512),
    (10, 192, 64, 256, 512),
    (3, 7, 6, 11, 20),  # nothing is a power of two
]
SLOTS = 61
STYLES = {"interleaved": False, "neox": True, "none": None}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(tokens, shape, style="interleaved", dtype=torch.bfloat16, **changes):
    heads, nope, rope, v, lora = shape
    max_position = 97
    cos_sin = None
    if STYLES[style] is not None:
        angle = torch.rand(max_position, rope // 2, device=DEVICE) * 6.3
        cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1)
    latent = slice_of(tokens, 1, lora + rope, dtype=dtype, before=16)
    inputs = dict(
        q=slice_of(tokens, heads, nope + rope, dtype=dtype, before=0, after=0),
        kv=slice_of(tokens, heads, nope + v, dtype=dtype, before=0, after=8),
        kv_a=slice_of(tokens, lora, dtype=dtype, before=0, after=0),
        k_pe=latent[..., lora:],
        positions=torch.randint(0, max_position, (tokens,), device=DEVICE),
        cos_sin_cache=cos_sin,
        is_neox=bool(STYLES[style]),
        qk_nope_head_dim=nope,
        kv_cache=poison((SLOTS, 1, lora + rope), torch.float8_e4m3fn),
        cache_loc=torch.randperm(SLOTS, device=DEVICE)[:tokens],
    )
    inputs.update(changes)
    return inputs


def check(inputs, outputs, rows=slice(None), k_scale_inv=1.0, v_scale_inv=1.0):
    """Compare these rows with the definition; k and v after scaling in float64."""
    q, kv, kv_a = (inputs[name][rows] for name in ("q", "kv", "kv_a"))
    nope, heads = inputs["qk_nope_head_dim"], q.shape[1]
    k_pe = inputs["k_pe"][rows].flatten(1)[:, None]
    rope = (inputs["positions"][rows], inputs["cos_sin_cache"], inputs["is_neox"])
    k_pe = rotate(k_pe, *rope)
    wanted_q = torch.cat([q[..., :nope].double(), rotate(q[..., nope:], *rope)], dim=-1)
    k = torch.cat([kv[..., :nope].double(), k_pe.expand(-1, heads, -1)], dim=-1)
    for actual, wanted in zip(
        outputs, (wanted_q, k * k_scale_inv, kv[..., nope:].double() * v_scale_inv)
    ):
        assert actual.is_contiguous()
        assert_fp8(actual[rows], wanted)
    if inputs["kv_cache"] is not None:
        loc = inputs["cache_loc"][rows].long()
        cached = inputs["kv_cache"].view(outputs[0].dtype)
        cached = cached.view(cached.shape[0], -1)[loc]
        row = torch.cat([kv_a.double(), k_pe[:, 0]], dim=-1)
        assert_fp8(cached, row[: len(loc)])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, style):
    for tokens in (1, 17):
        inputs = make(tokens, shape, style)
        check(inputs, mla_prefill_quantize_fp8(**inputs))
        free = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
        free[inputs["cache_loc"]] = False
        assert is_poison(inputs["kv_cache"].view(torch.uint8)[free])


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype, fp8_dtype):
    shape = (4, 32, 16, 32, 64)
    cache = poison((SLOTS, 1, 80), torch.uint8)
    inputs = make(11, shape, dtype=dtype, kv_cache=cache)
    scales = dict(k_scale_inv=0.5, v_scale_inv=4.0)
    outputs = mla_prefill_quantize_fp8(**inputs, **scales, fp8_dtype=fp8_dtype)
    assert all(out.dtype == fp8_dtype for out in outputs)
    check(inputs, outputs, **scales)
    on_device = {n: torch.full((1,), x, device=DEVICE) for n, x in scales.items()}
    again = mla_prefill_quantize_fp8(**inputs, **on_device, fp8_dtype=fp8_dtype)
    for a, b in zip(outputs, again):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_index_dtypes():
    inputs = make(11, DEEPSEEK)
    for name in ("positions", "cache_loc"):
        inputs[name] = inputs[name].to(torch.int32)
    check(inputs, mla_prefill_quantize_fp8(**inputs))


def test_one_layout_many_lengths():
    for tokens in (3, 1, 40, 0, 7):
        inputs = make(tokens, DEEPSEEK)
        check(inputs, mla_prefill_quantize_fp8(**inputs))


def test_fewer_slots_than_tokens():
    for cached in (0, 1, 9):
        inputs = make(13, DEEPSEEK)
        inputs["cache_loc"] = inputs["cache_loc"][:cached]
        check(inputs, mla_prefill_quantize_fp8(**inputs))
        rows = (inputs["kv_cache"].view(torch.uint8) != 0xFF).any(-1).sum()
        assert rows == cached


def test_without_cache():
    inputs = make(13, DEEPSEEK, kv_cache=None, cache_loc=None)
    check(inputs, mla_prefill_quantize_fp8(**inputs))


def test_layouts():
    inputs = make(13, DEEPSEEK)
    inputs["q"] = slice_of(13, 9, 192)[:, 1:]
    inputs["kv"] = inputs["kv"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["kv_a"] = slice_of(13, 512)
    inputs["k_pe"] = inputs["k_pe"][:, 0]
    inputs["cos_sin_cache"] = slice_of(97, 64, dtype=torch.float32)
    wide = poison((SLOTS, 1, 600), torch.float8_e4m3fn)
    inputs["kv_cache"] = wide[..., 3:579]
    check(inputs, mla_prefill_quantize_fp8(**inputs))
    assert is_poison(wide[..., :3]) and is_poison(wide[..., 579:])


def test_inputs_are_not_modified():
    inputs = make(13, DEEPSEEK)
    before = {
        name: x.clone()
        for name, x in inputs.items()
        if isinstance(x, torch.Tensor) and name != "kv_cache"
    }
    mla_prefill_quantize_fp8(**inputs)
    for name, x in before.items():
        assert torch.equal(x, inputs[name]), name


def test_special_values():
    inputs = make(5, DEEPSEEK)
    for name in ("q", "kv", "kv_a", "k_pe"):
        inputs[name][0, ..., 0] = float("inf")
        inputs[name][1, ..., 1] = float("nan")
        inputs[name][2, ..., 2] = -1e4
    # Rotated, infinity may become NaN; it does so in the definition too.
    check(inputs, mla_prefill_quantize_fp8(**inputs))


@pytest.mark.parametrize("enable_pdl", [None, False, True])
def test_pdl_setting(enable_pdl):
    inputs = make(13, DEEPSEEK)
    check(inputs, mla_prefill_quantize_fp8(**inputs, enable_pdl=enable_pdl))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: x.float(), "q must be bfloat16 or float16"),
        ("q", lambda x: x[0], "q must be"),
        ("q", lambda x: x[..., :128], "q must be"),
        ("q", lambda x: x[..., :191], "even rope dimension"),
        ("q", lambda x: x.transpose(1, 2), "q must"),
        ("kv", lambda x: x[:, :4], "kv must be"),
        ("kv", lambda x: x[:9], "same number of tokens"),
        ("kv", lambda x: x.to(torch.float16), "kv must be torch.bfloat16"),
        ("kv", lambda x: x[..., ::2], "kv must"),
        ("kv_a", lambda x: x[:, None], "kv_a must be"),
        ("kv_a", lambda x: x[:, :256], "kv_cache must be"),
        ("k_pe", lambda x: x[..., :32], "k_pe must have q's rope dimension"),
        ("k_pe", lambda x: x.expand(-1, 8, -1), "k_pe must be"),
        ("positions", lambda x: x.float(), "positions must be"),
        ("positions", lambda x: x[::2], "positions must be"),
        ("positions", lambda x: x[:5], "same number of tokens"),
        ("cos_sin_cache", lambda x: x.bfloat16(), "cos_sin_cache must be float32"),
        ("cos_sin_cache", lambda x: x[:, :32], "cos_sin_cache must be float32"),
        ("kv_cache", lambda x: None, "given together"),
        ("kv_cache", lambda x: x.to(torch.bfloat16), "kv_cache must be"),
        ("kv_cache", lambda x: x[..., :512], "kv_cache must be"),
        ("cache_loc", lambda x: None, "given together"),
        ("cache_loc", lambda x: x.repeat(2), "at most one slot"),
        ("cache_loc", lambda x: x[:, None], "cache_loc must be"),
    ],
)
def test_rejects(name, change, message):
    inputs = make(13, DEEPSEEK)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        mla_prefill_quantize_fp8(**inputs)
    if inputs["kv_cache"] is not None and inputs["kv_cache"].element_size() == 1:
        assert is_poison(inputs["kv_cache"])


@pytest.mark.parametrize("name", ["positions", "cache_loc"])
def test_one_token_does_not_vouch_for_more(name):
    """A stride means nothing in a vector of one, which passes the checks with any."""
    for tokens in (1, 3):
        inputs = make(tokens, DEEPSEEK)
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
        assert inputs[name].stride() == (2,)
        if tokens == 1:
            check(inputs, mla_prefill_quantize_fp8(**inputs))
        else:
            with pytest.raises(ValueError, match=f"{name} must be a contiguous"):
                mla_prefill_quantize_fp8(**inputs)


def test_whole_numbers_are_scales_too():
    inputs = make(5, DEEPSEEK)
    for scale in (2, 0.5, 1, 1.0):
        outputs = mla_prefill_quantize_fp8(**inputs, k_scale_inv=scale)
        check(inputs, outputs, k_scale_inv=scale)


@on_gpu
def test_more_than_2_31_elements():
    tokens, shape = 70000, (128, 128, 64, 128, 512)
    inputs = make(tokens, shape)
    inputs["kv_cache"] = poison((4_000_000, 1, 576), torch.float8_e4m3fn)
    # Slots far apart, so that their offsets pass 2^31 too.
    inputs["cache_loc"] = torch.randperm(4_000_000, device=DEVICE)[:tokens]
    outputs = mla_prefill_quantize_fp8(**inputs)
    for rows in (slice(0, 3), slice(35000, 35003), slice(-3, None)):
        check(inputs, outputs, rows)
    inputs["kv_cache"].view(torch.uint8)[inputs["cache_loc"]] = 0xFF
    assert is_poison(inputs["kv_cache"])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
