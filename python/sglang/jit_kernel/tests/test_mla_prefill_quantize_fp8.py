import random
import sys

import pytest
import torch

import sglang.jit_kernel.mla_prefill_quantize_fp8 as prefill_module
from sglang.jit_kernel.fp8_common import PlanCache
from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    FP8_DTYPES,
    MODELS,
    MLADims,
    assert_fp8,
    expected_prefill,
    is_poison,
    nan_memory,
    poison,
    prefill_inputs,
    rotate,
    slice_of,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=60, suite="stage-b-kernel-unit-1-gpu-large")

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

DIMS = MODELS["deepseek-v3"]._replace(heads=8)
SHAPES = [
    DIMS,
    *(MODELS[name] for name in ("deepseek-v2-lite", "glm-4.7-flash", "mistral-4")),
    DIMS._replace(heads=1),
    DIMS._replace(heads=2),
    MODELS["glm-5"]._replace(heads=5),
    MLADims(heads=10, nope=48, rope=96, v=80, lora=20),  # no power of two
]
ROPE = {"interleaved": False, "neox": True, "none": None}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(inputs, scale_invs=(1.0, 1.0), **options):
    """Call the kernel in memory full of NaN and compare with the definition."""
    with nan_memory():
        outputs = mla_prefill_quantize_fp8(**inputs, **options)
    wanted = expected_prefill(inputs, *scale_invs)
    for actual, value in zip(outputs, wanted):
        if value is None:
            assert actual is None
            continue
        assert actual.is_contiguous()
        assert_fp8(actual, value)
    if inputs["kv_cache"] is not None:
        rows = inputs["kv_cache"].view(torch.uint8)[inputs["cache_loc"].long()]
        assert_fp8(rows.view(outputs[0].dtype).flatten(1), wanted.rows)
    return outputs


@pytest.mark.parametrize("is_neox", ROPE.values(), ids=ROPE)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_shapes(dims, is_neox):
    for tokens in (1, 17):
        inputs = prefill_inputs(dims, tokens, is_neox, max_position=97)
        run(inputs)
        free = torch.ones(len(inputs["kv_cache"]), dtype=torch.bool, device=DEVICE)
        free[inputs["cache_loc"]] = False
        assert is_poison(inputs["kv_cache"].view(torch.uint8)[free])


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype, fp8_dtype):
    inputs = prefill_inputs(MLADims(4, 32, 16, 32, 64), 11, dtype=dtype)
    inputs["kv_cache"] = inputs["kv_cache"].view(torch.uint8)
    scales = dict(k_scale_inv=0.5, v_scale_inv=4)
    outputs = run(inputs, scales.values(), **scales, fp8_dtype=fp8_dtype)
    assert all(out.dtype == fp8_dtype for out in outputs)
    # Addresses that are only aligned for float32.
    on_device = torch.tensor([9, 0.5, 4.0], device=DEVICE)
    on_device = dict(k_scale_inv=on_device[1], v_scale_inv=on_device[2:])
    run(inputs, scales.values(), **on_device, fp8_dtype=fp8_dtype)


def test_index_dtypes_after_one_another():
    inputs = prefill_inputs(DIMS, 11)
    for name in ("positions", "cache_loc"):
        run(inputs)
        inputs[name] = inputs[name].to(torch.int32)
    run(inputs)


def test_one_layout_many_lengths():
    for tokens in (3, 1, 40, 0, 7):
        run(prefill_inputs(DIMS, tokens))


def test_a_stride_for_each_length_does_not_fill_memory():
    cache = PlanCache()
    for length in range(1000):
        cache.find((length,), lambda: length)
    assert 0 < len(cache) <= 256


def test_fewer_slots_than_tokens():
    for cached in (0, 1, 9):
        inputs = prefill_inputs(DIMS, 13)
        inputs["cache_loc"] = inputs["cache_loc"][:cached]
        run(inputs)
        written = (inputs["kv_cache"].view(torch.uint8) != 0xFF).any(-1).sum()
        assert written == cached


def test_without_cache():
    inputs = {**prefill_inputs(DIMS, 13), "kv_cache": None, "cache_loc": None}
    run(inputs)
    with pytest.raises(ValueError, match="k_pe_out must be given with kv_cache"):
        run(inputs, k_pe_out=poison((13, 64), torch.float8_e4m3fn))


@pytest.mark.parametrize("is_neox", ROPE.values(), ids=ROPE)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_without_k_and_v(dims, is_neox):
    for tokens in (1, 17, 0):
        inputs = {**prefill_inputs(dims, tokens, is_neox), "kv": None}
        run(inputs)
        # Rows past those that are cached are rotated too.
        inputs["cache_loc"] = inputs["cache_loc"][: tokens // 2]
        k_pe = poison((tokens, dims.rope), torch.float8_e4m3fn)
        run(inputs, k_pe_out=k_pe, k_scale_inv=0.5)
        rope = [inputs[name] for name in ("positions", "cos_sin_cache", "is_neox")]
        wanted = rotate(inputs["k_pe"], *rope)[:, 0] * 0.5
        assert_fp8(k_pe, wanted)
        # Without heads, cache rows and k_pe alone.
        k_pe = poison((tokens, dims.rope), torch.float8_e4m3fn)
        run({**inputs, "q": inputs["q"][:, :0]}, k_pe_out=k_pe, k_scale_inv=0.5)
        assert_fp8(k_pe, wanted)


def test_layouts():
    inputs = prefill_inputs(DIMS, 13)
    inputs["q"] = slice_of(13, 9, 192)[:, 1:]
    inputs["kv"] = inputs["kv"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["kv_a"] = slice_of(13, 512)
    inputs["k_pe"] = inputs["k_pe"][:, 0]
    table = torch.zeros(4096, 100, device=DEVICE)[:, 3:67]
    inputs["cos_sin_cache"] = table.copy_(inputs["cos_sin_cache"])
    wide = poison((len(inputs["kv_cache"]), 1, 600), torch.float8_e4m3fn)
    inputs["kv_cache"] = wide[..., 3:579]
    run(inputs)
    assert is_poison(wide[..., :3]) and is_poison(wide[..., 579:])


def test_inputs_are_not_modified():
    inputs = prefill_inputs(DIMS, 13)
    before = {
        name: x.clone()
        for name, x in inputs.items()
        if isinstance(x, torch.Tensor) and name != "kv_cache"
    }
    mla_prefill_quantize_fp8(**inputs)
    for name, x in before.items():
        assert torch.equal(x, inputs[name]), name


def test_special_values():
    inputs = prefill_inputs(DIMS, 5)
    for name in ("q", "kv", "kv_a", "k_pe"):
        inputs[name][0, ..., 0] = float("inf")
        inputs[name][1, ..., 1] = float("nan")
        inputs[name][2, ..., 2] = -1e4
    # Rotated, infinity may become NaN; it does so in the definition too.
    run(inputs)


@pytest.mark.parametrize("enable_pdl", [None, False, True])
def test_pdl_setting(enable_pdl):
    run(prefill_inputs(DIMS, 13), enable_pdl=enable_pdl)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: x.float(), "q must be bfloat16 or float16"),
        ("q", lambda x: x[0], "q must be"),
        ("q", lambda x: x[..., :128], "q must be"),
        ("q", lambda x: x.transpose(1, 2), "q must"),
        ("kv", lambda x: x[:, :4], "kv must be"),
        ("kv", lambda x: x[:9], "same number of tokens"),
        ("kv", lambda x: x.to(torch.float16), "kv must be torch.bfloat16"),
        ("kv", lambda x: x[..., ::2], "kv must"),
        ("kv_a", lambda x: x[:, None], "kv_a must be"),
        ("kv_a", lambda x: x[:9], "same number of tokens"),
        ("kv_a", lambda x: x[:, :256], "kv_cache must be"),
        ("k_pe", lambda x: x[..., :32], "k_pe must have q's rope dimension"),
        ("k_pe", lambda x: x[:9], "same number of tokens"),
        ("k_pe", lambda x: x.expand(-1, 8, -1), "k_pe must be"),
        ("positions", lambda x: x.float(), "positions must be a contiguous"),
        ("positions", lambda x: x.repeat(2)[::2], "positions must be a contiguous"),
        ("positions", lambda x: x[:5], "same number of tokens"),
        ("cos_sin_cache", lambda x: x.bfloat16(), "cos_sin_cache must be float32"),
        ("cos_sin_cache", lambda x: x[:, :32], "cos_sin_cache must be float32"),
        ("kv_cache", lambda x: None, "given together"),
        ("kv_cache", lambda x: x.to(torch.bfloat16), "kv_cache must be"),
        ("kv_cache", lambda x: x[..., :512], "kv_cache must be"),
        ("cache_loc", lambda x: None, "given together"),
        ("cache_loc", lambda x: x.repeat(2), "at most one slot"),
        ("cache_loc", lambda x: x.repeat(2)[::2], "cache_loc must be a contiguous"),
        ("cache_loc", lambda x: x[:, None], "cache_loc must be"),
        ("k_pe_out", lambda x: x[:5], "k_pe_out must have"),
        ("k_pe_out", lambda x: x.view(torch.uint8), "k_pe_out must be"),
        ("k_pe_out", lambda x: x[:, :32], "k_pe_out must be"),
        ("k_pe_out", lambda x: x.view(26, 32)[::2], "k_pe_out must be"),
        ("k_pe_out", lambda x: poison((13, 80), x.dtype)[:, :64], "must be contiguous"),
    ],
)
def test_rejects(name, change, message):
    inputs = prefill_inputs(DIMS, 13)
    inputs["k_pe_out"] = poison((13, 64), torch.float8_e4m3fn)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        mla_prefill_quantize_fp8(**inputs)
    if inputs["kv_cache"] is not None and inputs["kv_cache"].element_size() == 1:
        assert is_poison(inputs["kv_cache"])


@pytest.mark.parametrize("name", ["positions", "cache_loc"])
def test_a_call_with_one_token_does_not_vouch_for_more(name):
    """A stride means nothing in a vector of one, which passes with any."""
    for tokens in (1, 3):
        inputs = prefill_inputs(DIMS, tokens)
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
        if tokens == 1:
            run(inputs)
        else:
            with pytest.raises(ValueError, match=f"{name} must be a contiguous"):
                mla_prefill_quantize_fp8(**inputs)


@pytest.mark.parametrize("name", ["nope", "rope", "v"])
def test_head_dimensions_are_multiples_of_16(name):
    dims = MLADims(2, 32, 32, 32, 64)
    for size in (24, 41):
        with pytest.raises(ValueError, match=f"{name} must be a positive multiple of"):
            mla_prefill_quantize_fp8(**prefill_inputs(dims._replace(**{name: size}), 3))


PER_TOKEN = ("q", "kv", "kv_a", "k_pe", "positions", "cache_loc")


@on_gpu
def test_slices_of_indices_compile_nothing():
    """Two-batch overlap slices them at any token, aligned or not."""
    kernel = prefill_module._mla_prefill_quantize_fp8_kernel
    compiled, _, *_ = kernel.device_caches[torch.cuda.current_device()]
    inputs = prefill_inputs(DIMS, 17)
    run(inputs)
    before = len(compiled)
    for start in (1, 2, 16):
        run({**inputs, **{name: inputs[name][start:] for name in PER_TOKEN}})
    assert len(compiled) == before


@on_gpu
@pytest.mark.parametrize("case", range(20))
def test_random_calls(case):
    """What the interpreter cannot see: layouts and dimensions as a compiler has them."""
    torch.manual_seed(case)
    pick = random.Random(case)
    dims = MLADims(
        pick.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 64, 128]),
        *(16 * pick.randint(1, 16) for _ in range(3)),
        pick.randint(1, 600),
    )
    dtype = pick.choice([torch.bfloat16, torch.float16])
    tokens = pick.randint(1, 60)
    inputs = prefill_inputs(dims, tokens, pick.choice([False, True, None]), dtype)
    layout = dict(dtype=dtype, before=pick.randint(0, 9), after=pick.randint(0, 9))
    inputs["q"] = slice_of(tokens, dims.heads, dims.nope + dims.rope, **layout)
    kv = slice_of(dims.heads, tokens, dims.nope + dims.v, **layout)
    inputs["kv"] = pick.choice([kv.transpose(0, 1)] * 3 + [None])
    inputs["k_pe"] = slice_of(tokens, 1, dims.rope, **layout)
    inputs["cache_loc"] = inputs["cache_loc"][: pick.randint(0, tokens)]
    inputs["kv_cache"] = inputs["kv_cache"].view(torch.uint8)
    if pick.random() < 0.5:
        inputs["positions"] = inputs["positions"].int()
    # Powers of two: scaling itself does not round.
    scales = [2.0 ** pick.randint(-2, 2) for _ in range(2)]
    k_scale_inv, v_scale_inv = (
        pick.choice([x, torch.tensor([x], device=DEVICE)]) for x in scales
    )
    run(
        inputs,
        scales,
        k_scale_inv=k_scale_inv,
        v_scale_inv=v_scale_inv,
        fp8_dtype=pick.choice(FP8_DTYPES),
    )


@on_gpu
def test_more_than_2_31_elements():
    # Slots far apart, so that their offsets pass 2^31 too.
    inputs = prefill_inputs(MODELS["deepseek-v3"], 70000, free_slots=4_000_000)
    outputs = mla_prefill_quantize_fp8(**inputs)
    q_out, _, _ = mla_prefill_quantize_fp8(**{**inputs, "kv": None})
    assert torch.equal(q_out.view(torch.uint8), outputs[0].view(torch.uint8))
    for rows in (slice(0, 3), slice(35000, 35003), slice(-3, None)):
        some = {name: inputs[name][rows] for name in PER_TOKEN}
        wanted = expected_prefill({**inputs, **some})
        cached = inputs["kv_cache"].view(torch.uint8)[some["cache_loc"]]
        actual = [out[rows] for out in outputs] + [cached.view(outputs[0].dtype)[:, 0]]
        for part, value in zip(actual, wanted):
            assert_fp8(part, value)
    inputs["kv_cache"].view(torch.uint8)[inputs["cache_loc"]] = 0xFF
    assert is_poison(inputs["kv_cache"])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
