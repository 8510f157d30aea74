"""The harness itself: its references, its stand-ins, and runs of SGLang through it.

Everything here holds for an unpatched SGLang and for a patched one.
"""

import math
from pathlib import Path

import mla_harness as harness
import pytest
import torch
import triton
import triton.language as tl
from mla_harness import KERNELS, Dims, Scenario, round_fp8
from sglang_cpu import DEVICE, HAS_GPU

import sglang

E4M3, E5M2 = harness.FP8_DTYPES
BACKENDS = ["tokenspeed_mla", "trtllm_mla"]

# Three FP8 operands with 3 mantissa bits each: 2% to 4% of noise in the output.
FP8_NOISE = 0.06
BF16_NOISE = 0.01

cpu_only = pytest.mark.skipif(HAS_GPU, reason="stand-in used without a GPU only")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def all_bfloat16() -> torch.Tensor:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16).to(DEVICE)


def assert_same_fp8(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal bits, but for the sign of NaN."""
    nan = wanted.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    bits = actual.view(torch.uint8) == wanted.view(torch.uint8)
    assert bits[~nan].all()


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


class TestFp8ByDefinition:
    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_table_is_torchs_decoding(self, dtype):
        values = harness.fp8_values(dtype)
        bits = torch.arange(len(values)).to(torch.uint8)
        assert values.float().equal(bits.view(dtype).float())
        assert values[-1] == torch.finfo(dtype).max

    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_equals_torchs_cast_in_range(self, dtype):
        x = all_bfloat16()
        x = x[x.abs() <= torch.finfo(dtype).max]
        assert x.numel() > 30000
        assert harness.same_bits(round_fp8(x, dtype), x.to(dtype))

    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_midpoints_go_to_even_and_a_hair_decides(self, dtype):
        values = harness.fp8_values(dtype)
        middle = (values[1:] + values[:-1]) / 2
        index = torch.arange(len(values) - 1)
        bits = [
            round_fp8(middle * (1 + hair), dtype).view(torch.uint8).long()
            for hair in (-1e-12, 0, 1e-12)
        ]
        assert bits[0].equal(index)
        assert bits[1].equal(index + index % 2)
        assert bits[2].equal(index + 1)

    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_saturates_and_keeps_nan_and_signs(self, dtype):
        limit = torch.finfo(dtype).max
        x = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, -0.0, limit * 2])
        out = round_fp8(x, dtype).float()
        assert out[[0, 1, 2, 3, 6]].tolist() == [limit, -limit, limit, -limit, limit]
        assert out[4].isnan() and torch.signbit(out[5])

    def test_ulps(self):
        a = torch.tensor([1.0, -1.0, 0.0, math.nan, math.nan, 448.0, 2**-9]).to(E4M3)
        b = torch.tensor([1.125, -0.9375, -0.0, math.nan, 1.0, -448.0, -(2**-9)])
        off = harness.fp8_ulps(a, b.to(E4M3)).tolist()
        assert off[:4] == [1, 1, 0, 0] and off[5:] == [252, 2]
        assert off[4] > 255  # more than any two numbers


class TestTritonConversions:
    """Of the repaired interpreter, or of the GPU: the same is wanted of both."""

    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_every_bfloat16_to_fp8(self, dtype):
        x = all_bfloat16()
        assert_same_fp8(convert(x, dtype), round_fp8(x, dtype))

    @pytest.mark.parametrize("source", [torch.float16, torch.float32])
    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_wider_types_to_fp8(self, source, dtype):
        values = harness.fp8_values(dtype)
        middle = (values[1:] + values[:-1]) / 2
        near = torch.cat([middle * (1 + s) for s in (-(2.0**-20), 0, 2.0**-20)])
        x = torch.cat([near, -near, torch.tensor([math.inf, math.nan, 1e5])])
        size = triton.next_power_of_2(x.numel())
        x = torch.nn.functional.pad(x, (0, size - x.numel())).to(source).to(DEVICE)
        assert_same_fp8(convert(x, dtype), round_fp8(x, dtype))

    @pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_every_fp8_value_widens(self, dtype, target):
        bits = torch.arange(256)
        if HAS_GPU and dtype == E5M2:
            bits[bits % 128 > 0x7B] = 0  # a GPU widens infinity and NaN its own way
        x = bits.to(torch.uint8).view(dtype).to(DEVICE)
        torch.testing.assert_close(
            convert(x, target), x.to(target), rtol=0, atol=0, equal_nan=True
        )

    def test_float32_to_bfloat16_rounds_to_even(self):
        x = torch.randn(4096, device=DEVICE)
        x[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
        assert convert(x, torch.bfloat16).equal(x.to(torch.bfloat16))

    @pytest.mark.parametrize("source", [torch.int32, torch.float64])
    def test_other_types_and_bfloat16(self, source):
        x = torch.tensor([-3, 0, 1, 1000], dtype=source, device=DEVICE)
        narrow = convert(x, torch.bfloat16)
        assert narrow.tolist() == x.tolist()
        assert convert(narrow, source).equal(x)

    @pytest.mark.parametrize("pdl", [False, True])
    def test_clip_loop_bound_and_pdl(self, pdl):
        if HAS_GPU and pdl and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("PDL instructions need SM90")
        x = torch.tensor([math.nan, 3.0, -3.0, 1.0], device=DEVICE)
        out = torch.full((5, 3), -1.0, device=DEVICE)
        clip_kernel[(1,)](x, out, torch.tensor([4], device=DEVICE), PDL=pdl)
        out = out.tolist()
        # A GPU's min and max return the operand that is a number.
        assert out[0][:2] == [2.0, -2.0] and math.isnan(out[0][2])
        assert out[1:] == [[2.0] * 3, [-2.0, -2.0, -3.0], [1.0] * 3, [-1.0] * 3]


class TestKernelStandIns:
    def test_merge_is_natural(self):
        out = torch.randn(2, 3, 2, 16, device=DEVICE)
        lse = torch.randn(2, 3, 2, device=DEVICE) * 3
        lse[1, 0] = -math.inf
        merged, total = torch.empty_like(out[0]), torch.empty_like(lse[0])
        harness.forward_mha.merge_state_v2(
            out[1], lse[1], out[0], lse[0], merged, total
        )
        wanted = harness.merge64(
            out[1].double(), lse[1].double(), out[0].double(), lse[0].double()
        )
        torch.testing.assert_close(merged, wanted[0].float())
        torch.testing.assert_close(total, wanted[1].float())

    @cpu_only
    @pytest.mark.parametrize("is_neox", [False, True])
    def test_rope_in_place(self, is_neox):
        cache = torch.randn(9, 16)
        q, k = torch.randn(5, 3, 16).bfloat16(), torch.randn(5, 1, 16).bfloat16()
        positions = torch.tensor([8, 0, 3, 3, 5])
        wanted = [
            harness.rope64(x, positions, cache, is_neox).bfloat16() for x in (q, k)
        ]
        harness._rope_in_place(q, k, cache, positions, is_neox=is_neox)
        torch.testing.assert_close([q, k], wanted, rtol=2**-8, atol=0)

    @cpu_only
    @pytest.mark.parametrize("is_neox", [False, True])
    def test_rope_and_quantize(self, is_neox):
        cache, positions = torch.randn(9, 16), torch.tensor([8, 0, 3])
        q, k = torch.randn(3, 2, 40).bfloat16(), torch.randn(3, 2, 40).bfloat16()
        outs = [torch.empty(3, 2, 40, dtype=E4M3) for _ in range(2)]
        harness.mla_rope_quantize_fp8(
            q[..., 24:],
            k[..., 24:],
            q[..., :24],
            k[..., :24],
            cache,
            positions,
            is_neox=is_neox,
            quant_scale_kv=500.0,
            q_rope_out=outs[0][..., 24:],
            k_rope_out=outs[1][..., 24:],
            q_nope_out=outs[0][..., :24],
            k_nope_out=outs[1][..., :24],
        )
        for x, scale, out in zip((q, k), (1, 500), outs):
            rotated = harness.rope64(x[..., 24:], positions, cache, is_neox)
            wanted = torch.cat([x[..., :24].double(), rotated], dim=-1) * scale
            assert harness.fp8_ulps(out, round_fp8(wanted)).max() == 0

    def test_nan_memory(self):
        with harness.nan_memory():
            assert torch.empty(3, dtype=E4M3).float().isnan().all()
            assert torch.zeros(2).new_empty(3).isnan().all()
        assert not torch.utils.deterministic.fill_uninitialized_memory or (
            not torch.are_deterministic_algorithms_enabled()
        )


def lse_base(backend: str) -> float:
    return 2 if backend == "trtllm_mla" else math.e


def assert_close_to_definition(env, batch, result, backend):
    """q, k, v, cache rows, attention and output against float64."""
    noise = FP8_NOISE if env.is_fp8 else BF16_NOISE
    wanted, n = harness.expected(env, batch), batch.tokens
    for name, scale in (("q", 1.0), ("k", env.k_scale), ("v", env.v_scale)):
        actual, exact = getattr(result, name), getattr(wanted, name)
        assert actual.shape == exact.shape
        if actual.dtype in harness.FP8_DTYPES:
            bound, exact = 0.04, exact / scale
        else:
            bound = 0.004
        assert harness.relative_error(actual[:n].float(), exact[:n]) < bound, name
    slots = batch.out_cache_loc[:n]
    rows = result.rows(slots).view(env.pool.dtype)
    if env.is_fp8:
        ulps = harness.fp8_ulps(rows, round_fp8(wanted.rows[:n], env.pool.dtype))
        # The BF16 path rounds twice, which moves a few elements by one.
        assert ulps.max() <= 1 and (ulps == 0).float().mean() > 0.9
    else:
        assert harness.relative_error(rows, wanted.rows[:n]) < 0.004
    untouched = torch.ones(result.cache.shape[0], dtype=torch.bool, device=DEVICE)
    untouched[batch.out_cache_loc] = False
    assert result.cache[untouched].equal(batch.cache_before[untouched])
    attention = harness.expected_attention(env, batch, lse_base=lse_base(backend))
    assert harness.relative_error(result.attn_output[:n], attention) < noise
    output = harness.expected_output(env, attention)
    assert harness.relative_error(result.output[:n], output) < noise


CHUNKS = [
    pytest.param([0, 0, 0], None, id="no-prefix"),
    pytest.param([9, 0, 4], 1, id="1-chunk"),
    pytest.param([16, 0, 7], 4, id="4-chunks"),
]


class TestPrefill:
    @pytest.mark.parametrize("prefix_lens, chunks", CHUNKS)
    @pytest.mark.parametrize("dims", [Dims.deepseek_v3(2), Dims.v2_lite(1)], ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_chunks(self, backend, dims, prefix_lens, chunks):
        env = harness.make_env(dims, backend)
        batch = harness.make_batch(env, [5, 1, 3], prefix_lens, chunks=chunks)
        result = harness.run_prefill(env, batch)
        assert result.method == "MHA_CHUNKED_KV"
        assert_close_to_definition(env, batch, result, backend)
        lens = batch.chunk_lens()
        assert len(lens) == (chunks or 0)
        assert [c.causal for c in result.calls] == [True] + [False] * len(lens)
        assert [c.cu_kv for c in result.calls[1:]] == [
            harness._cumulate(x) for x in lens
        ]
        assert all(c.dtypes == (E4M3,) * 3 for c in result.calls)
        assert result.calls[0].return_lse == bool(lens)
        if not HAS_GPU:
            assert result.counts["merge_state_v2"] == len(lens)

    def test_log_sum_exp_base_shows(self):
        """trtllm-gen's base-2 values, merged as natural ones, weight wrongly."""
        errors = {}
        for backend in BACKENDS:
            env = harness.make_env(Dims.deepseek_v3(2), backend)
            batch = harness.make_batch(env, [2], [64], chunks=1)
            result = harness.run_prefill(env, batch)
            exact = harness.expected_attention(env, batch)
            errors[backend] = harness.relative_error(result.attn_output, exact)
        assert errors["tokenspeed_mla"] < FP8_NOISE < errors["trtllm_mla"]

    @pytest.mark.parametrize(
        "dims", [Dims.glm_4_7_flash(5), Dims.mistral4(4), Dims.tiny(3), Dims.odd(5)]
    )
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_other_dims(self, backend, dims):
        env = harness.make_env(dims, backend)
        batch = harness.make_batch(env, [4, 2], [6, 0], chunks=2)
        result = harness.run_prefill(env, batch)
        assert_close_to_definition(env, batch, result, backend)

    @pytest.mark.parametrize(
        "rope, is_neox",
        [("default", True), ("yarn", False), ("yarn", True), (None, False)],
    )
    def test_rope(self, rope, is_neox):
        env = harness.make_env(Dims.deepseek_v3(2), rope=rope, is_neox=is_neox)
        batch = harness.make_batch(env, [5, 3], [40, 0], chunks=1)
        result = harness.run_prefill(env, batch)
        assert (env.cos_sin_cache is None) == (rope is None)
        if rope:
            assert env.cos_sin_cache.dtype == torch.float32
        assert_close_to_definition(env, batch, result, "tokenspeed_mla")

    @pytest.mark.parametrize(
        "dtype, cache_dtype",
        [
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.float16, E4M3),
        ],
    )
    def test_other_types(self, dtype, cache_dtype):
        env = harness.make_env(
            Dims.deepseek_v3(2), "trtllm_mla", dtype=dtype, cache_dtype=cache_dtype
        )
        batch = harness.make_batch(env, [5, 3], [8, 0], chunks=2)
        result = harness.run_prefill(env, batch)
        assert result.calls[0].dtypes[0] == (E4M3 if env.is_fp8 else dtype)
        assert_close_to_definition(env, batch, result, "trtllm_mla")

    def test_takes_the_cuda_branches(self):
        """A BF16 cache is not for FP8 prefill: rows go through the pool as on CUDA."""
        seen = []

        class Pool(harness.MLATokenToKVPool):
            def set_mla_kv_buffer(self, *args):
                seen.append("set")
                return super().set_mla_kv_buffer(*args)

            def get_mla_kv_buffer(self, *args):
                seen.append("get")
                return super().get_mla_kv_buffer(*args)

        env = harness.make_env(
            Dims.tiny(), "trtllm_mla", cache_dtype=torch.bfloat16, pool_class=Pool
        )
        batch = harness.make_batch(env, [5, 3], [4, 0], chunks=2)
        result = harness.run_prefill(env, batch)
        assert seen == ["set", "get", "get"]
        if not HAS_GPU:
            assert result.counts["apply_rope_with_cos_sin_cache_inplace"] == 1

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_padding(self, backend):
        env = harness.make_env(Dims.tiny(), backend)
        batch = harness.make_batch(env, [5, 3], [4, 0], chunks=2, pad_rows=3)
        result = harness.run_prefill(env, batch)
        assert batch.out_cache_loc[8:].tolist() == [0, 0, 0]
        assert result.output.shape[0] == result.calls[0].q.shape[0] == 11
        assert result.calls[0].cu_q == [0, 5, 8]
        assert_close_to_definition(env, batch, result, backend)

    def test_scales(self):
        env = harness.make_env(Dims.tiny(), "trtllm_mla", k_scale=0.5, v_scale=4.0)
        batch = harness.make_batch(env, [5, 3], [4, 0], chunks=1)
        result = harness.run_prefill(env, batch)
        assert_close_to_definition(env, batch, result, "trtllm_mla")
        for call in result.calls:
            assert call.bmm1_scale == pytest.approx(env.attn.scaling * 0.5)
            assert call.bmm2_scale == 4.0
        wanted = round_fp8(harness.expected(env, batch).v / 4)
        assert harness.fp8_ulps(result.calls[0].v, wanted).max() <= 1

    def test_scales_are_an_error_for_tokenspeed(self):
        env = harness.make_env(Dims.tiny(), "tokenspeed_mla", k_scale=0.5)
        batch = harness.make_batch(env, [5])
        with pytest.raises((AssertionError, ValueError), match="k_scale"):
            harness.run_prefill(env, batch)

    def test_idle_rank(self):
        env = harness.make_env(Dims.tiny())
        batch = harness.make_batch(env, [])
        result = harness.run_prefill(env, batch)
        assert result.output.shape == (0, env.dims.hidden) and not result.calls
        assert result.q is None and result.cache.equal(batch.cache_before)

    def test_runs_repeat(self):
        env = harness.make_env(Dims.tiny())
        batch = harness.make_batch(env, [5, 3], [4, 0], chunks=2)
        first, second = (harness.run_prefill(env, batch) for _ in range(2))
        for name in ("q", "k", "v", "cache", "output"):
            assert harness.same_bits(getattr(first, name), getattr(second, name))

    def test_start_up_compiles(self):
        harness.forget_compiled_kernels()
        harness.make_env(Dims.deepseek_v3(2), "tokenspeed_mla")
        assert {c[1:3] for c in KERNELS.compiled} == {(192, 128)}
        assert {c[3:5] for c in KERNELS.compiled} == {
            (True, True),
            (True, False),
            (False, True),
        }


def wrappers(env):
    other = harness.make_backend(env, "trtllm_mla")
    tbo = harness.wrap_tbo(env.backend, [harness.make_backend(env, "trtllm_mla")] * 2)
    hybrid = harness.wrap_hybrid(env, prefill=env.backend, decode=other)
    return {
        "tbo": tbo,
        "hybrid": hybrid,
        "linear": harness.wrap_hybrid_linear(env.backend),
        "nested": harness.wrap_tbo(harness.wrap_hybrid_linear(hybrid), []),
    }


class TestWrappers:
    @pytest.mark.parametrize("name", ["tbo", "hybrid", "linear", "nested"])
    def test_same_as_the_bare_backend(self, name):
        env = harness.make_env(Dims.tiny(), "tokenspeed_mla")
        batch = harness.make_batch(env, [5, 3], [4, 0], chunks=2)
        bare = harness.run_prefill(env, batch)
        wrapped = harness.run_prefill(env, batch, backend=wrappers(env)[name])
        assert harness.same_bits(wrapped.output, bare.output)
        assert harness.same_bits(wrapped.cache, bare.cache)
        assert {c.name for c in wrapped.calls} == {"tokenspeed_mla_prefill"}

    @pytest.mark.parametrize(
        "extend_lens, pad_rows, cu_q",
        [
            pytest.param([5, 2, 3], 0, [[0, 5], [0, 2, 5]], id="between-requests"),
            pytest.param([9, 2], 0, [[0, 5], [0, 4, 6]], id="within-a-request"),
            pytest.param([4, 2, 2], 1, [[0, 4], [0, 2, 4]], id="padded"),
        ],
    )
    def test_two_batch_overlap_children(self, extend_lens, pad_rows, cu_q):
        env = harness.make_env(Dims.tiny(), "tokenspeed_mla")
        children = [harness.make_backend(env, "tokenspeed_mla") for _ in range(2)]
        tbo = harness.wrap_tbo(env.backend, children)
        batch = harness.make_batch(
            env, extend_lens, [4, 0, 6][: len(extend_lens)], pad_rows=pad_rows
        )
        halves = harness.run_overlapped(env, batch, tbo)
        assert [h.forward_batch.attn_backend for h in halves] == children
        assert [h.calls[0].cu_q for h in halves] == cu_q
        actual = torch.cat([h.attn_output for h in halves])[: batch.tokens]
        wanted = harness.expected_attention(env, batch)
        assert harness.relative_error(actual, wanted) < FP8_NOISE


def test_run_elsewhere_is_the_same_run():
    site = Path(sglang.__file__).resolve().parents[1]
    scenario = Scenario(
        env=dict(dims=Dims.tiny(), backend="trtllm_mla", rope="yarn"),
        batch=dict(extend_lens=[5, 3], prefix_lens=[4, 0], chunks=2),
    )
    here = scenario.run()
    (there,) = harness.run_elsewhere(site, [scenario])
    for name in ("q", "k", "v", "cache", "attn_output", "output"):
        assert harness.same_bits(getattr(here, name), getattr(there, name))
    assert [c.cu_kv for c in here.calls] == [c.cu_kv for c in there.calls]
    with pytest.raises(ValueError, match="holds no sglang"):
        harness.run_elsewhere(Path(__file__).parent, [scenario])
