import sys

import pytest
import torch

from sglang.jit_kernel.mla_q_proj_quantize_fp8 import mla_q_proj_quantize_fp8
from sglang.jit_kernel.tests.fp8_reference import (
    DEVICE,
    assert_fp8,
    expected_q_proj,
    make_cos_sin_cache,
    nan_memory,
    slice_of,
)
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=30, suite="stage-b-kernel-unit-1-gpu-large")

FP8 = torch.float8_e4m3fn
NOPE, ROPE = 128, 64
MAX_POSITION = 1000
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0),
    reason="needs SM90",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(tokens, heads, lora=64, dtype=torch.bfloat16, index=torch.int64):
    """A latent in wider rows, a weight that keeps its size, positions, cosines and sines."""
    q_a = slice_of(tokens, lora, dtype=dtype, before=0)
    weight = torch.randn(heads * (NOPE + ROPE), lora, device=DEVICE).mul_(lora**-0.5)
    positions = torch.randint(MAX_POSITION, (tokens + 1,), device=DEVICE, dtype=index)
    cos_sin_cache = make_cos_sin_cache(MAX_POSITION, ROPE)
    return q_a, weight.to(dtype), positions[1:], cos_sin_cache


def run(inputs):
    """Call the kernel in memory full of NaN and compare with the definition."""
    with nan_memory():
        q = mla_q_proj_quantize_fp8(*inputs)
    assert q.is_contiguous() and q.dtype == FP8
    assert_fp8(q, expected_q_proj(*inputs))


@pytest.mark.parametrize("heads", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 127, 129])
def test_shapes(tokens, heads):
    run(make(tokens, heads))


@on_gpu
@pytest.mark.parametrize("heads", [1, 7, 16, 128])
def test_more_tiles_than_programs(heads):
    for tokens in torch.randint(1500, 5000, (3,)).tolist():
        run(make(tokens, heads, lora=1536))


@pytest.mark.parametrize("lora", [48, 192])
@pytest.mark.parametrize(
    "dtype, index", [(torch.bfloat16, torch.int32), (torch.float16, torch.int64)]
)
def test_dtypes(dtype, index, lora):
    run(make(9, 2, lora, dtype, index))


def test_one_layout_many_lengths():
    for tokens in (3, 1, 140, 0, 7):
        run(make(tokens, 1))


def test_special_values():
    q_a, weight, positions, cos_sin_cache = make(3, 1)
    q_a[0], q_a[1, 0], q_a[2] = 3e4, float("nan"), 0
    q = mla_q_proj_quantize_fp8(q_a, weight.abs(), positions, cos_sin_cache).float()
    assert (q[0, :, :NOPE] == 448).all() and not q[0].isnan().any()
    assert q[1].isnan().all() and (q[2] == 0).all()


@pytest.mark.parametrize(
    "name, change",
    [
        ("q_a", lambda x: x.float()),
        ("q_a", lambda x: x[0]),
        ("q_a", lambda x: x.T),
        ("q_a", lambda x: x.as_strided((4, 32), (35, 1))),
        ("q_a", lambda x: x.as_strided((4, 32), (56, 1), 4)),
        ("lora", lambda x: x[:, :8]),
        ("weight", lambda x: x.to(torch.float16)),
        ("weight", lambda x: x[:191]),
        ("weight", lambda x: x[:0]),
        ("weight", lambda x: x[:, :16]),
        ("weight", lambda x: x.repeat(1, 2)[:, :32]),
        ("positions", lambda x: x[:3]),
        ("positions", lambda x: x.float()),
        ("positions", lambda x: x.repeat(2)[::2]),
        ("cos_sin_cache", lambda x: x.double()),
        ("cos_sin_cache", lambda x: x[:, :32]),
    ],
)
def test_rejects(name, change):
    names = "q_a", "weight", "positions", "cos_sin_cache"
    given = dict(zip(names, make(4, 1, lora=32)))
    argument = {"lora": "q_a"}.get(name, name)
    given[argument] = change(given[argument])
    with pytest.raises(ValueError, match=f"^{name} must"):
        mla_q_proj_quantize_fp8(**given)


@on_gpu
def test_more_than_2_31_elements():
    inputs = make(90000, 128)
    with nan_memory():
        q = mla_q_proj_quantize_fp8(*inputs)
    q_a, weight, positions, cos_sin_cache = inputs
    for rows in (slice(0, 3), slice(87380, 87383), slice(-3, None)):
        wanted = expected_q_proj(q_a[rows], weight, positions[rows], cos_sin_cache)
        assert_fp8(q[rows], wanted)
    assert not (q.view(torch.uint8) & 0x7F == 0x7F).any()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-s"]))
