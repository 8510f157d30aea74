"""The base of the prefill kernel's log-sum-exps: what is found of it, and that the
results of prefix chunks are merged with the right weights."""

import logging
import math
from types import SimpleNamespace

import batch_runs
import mla_harness as harness
import pytest
import torch
from batch_cases import BACKENDS
from gpu_stand_ins import KERNELS
from mla_harness import TINY, Scenario, make_env, same_bits
from mla_standin import kernels
from sglang_cpu import DEVICE, HAS_GPU

from sglang.srt.environ import envs
from sglang.srt.layers.attention import mla_fp8_prefill, trtllm_mla_backend
from sglang.srt.layers.attention.mla_fp8_prefill import LSE_FACTORS
from sglang.srt.layers.attention.trtllm_mla_backend import TRTLLMMLABackend

SWITCH = "SGLANG_MLA_FP8_PREFILL_LSE"
ABOUT = "log-sum-exps"
KERNEL = "trtllm_ragged_attention_deepseek"
# Rounding operands and output makes 0.003 to 0.013, another base 0.12 to 0.16.
ROUNDING, WRONG_WEIGHTS = 0.02, 0.1


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    monkeypatch.setattr(mla_fp8_prefill, "_found_lse_bases", {})
    monkeypatch.delenv(SWITCH, raising=False)
    KERNELS.clear()


@pytest.fixture
def kernel_returns(monkeypatch):
    """Let trtllm-gen's stand-in return `change(natural log-sum-exps, is_causal)`."""
    module = trtllm_mla_backend.flashinfer.prefill
    stand_in = getattr(module, KERNEL)

    def kernel_returns(change):
        def kernel(*, is_causal, return_lse, **kwargs):
            result = stand_in(is_causal=is_causal, return_lse=return_lse, **kwargs)
            return (result[0], change(result[1], is_causal)) if return_lse else result

        monkeypatch.setattr(module, KERNEL, kernel)

    return kernel_returns


@pytest.fixture
def base(monkeypatch):
    """Set the base of trtllm-gen's stand-in."""
    return lambda base: monkeypatch.setattr(
        kernels.SETTINGS, "natural_lse", base == "e"
    )


def scenario(how: str, backend: str = "trtllm_mla", **environ) -> Scenario:
    """Chunks of prefixes, with a request that has no keys in them; `how` the hook
    takes the batch, declines it, or is off."""
    if how == "off":
        environ["SGLANG_MLA_FP8_PREFILL"] = "off"
    pool = dict(pool_class=batch_runs.OwnWriterPool) if how == "declined" else {}
    return Scenario(
        env=pool,
        batch=dict(extend_lens=[5, 3, 2], prefix_lens=[90, 20, 0])
        | dict(chunks=3, pad_rows=2),
        environ=environ,
    ).on(backend)


def error(chosen: Scenario) -> float:
    """How far the layer's attention is from float64 attention over all keys, of the
    requests behind a prefix or of the other."""
    env, batch = chosen.build()
    result = chosen.how(env, batch)
    out = result.attn_output
    assert (out[batch.tokens :] == 0).all()
    wanted = harness.expected_attention(env, batch, result)
    parts = [sum(batch.extend_lens[:2]), batch.extend_lens[2]]
    pairs = zip(out[: batch.tokens].split(parts), wanted.split(parts))
    return max(harness.relative_error(*pair) for pair in pairs)


@pytest.mark.parametrize("how", ["taken", "declined", "off"])
class TestMerge:
    @pytest.mark.parametrize(
        "kernel_base, setting", [("2", "auto"), ("e", "auto"), ("2", "2"), ("e", "e")]
    )
    def test_is_right_in_either_base(
        self, how, kernel_base, setting, base, log, flashinfer
    ):
        base(kernel_base)
        flashinfer(False)
        assert error(scenario(how, **{SWITCH: setting})) < ROUNDING
        assert any("decline" in line for line in log()) == (how != "taken")

    @pytest.mark.parametrize("kernel_base, setting", [("2", "e"), ("e", "2")])
    def test_is_wrong_in_another(self, how, kernel_base, setting, base, flashinfer):
        base(kernel_base)
        flashinfer(False)
        assert error(scenario(how, **{SWITCH: setting})) > WRONG_WEIGHTS

    def test_a_base_that_sglang_converts_is_not_converted_again(
        self, how, base, flashinfer, monkeypatch
    ):
        base("2")
        flashinfer(False)
        run = TRTLLMMLABackend._run_prefill_kernel

        def run_and_convert(self, **kwargs):
            result = run(self, **kwargs)
            if not isinstance(result, tuple):
                return result
            return result[0], result[1] * math.log(2)

        monkeypatch.setattr(TRTLLMMLABackend, "_run_prefill_kernel", run_and_convert)
        assert error(scenario(how)) < ROUNDING


def one_row_off(lse: torch.Tensor, is_causal: bool) -> torch.Tensor:
    lse[-2, 1] += 0.02
    return lse


def broken(lse: torch.Tensor, is_causal: bool) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image")


class TestFound:
    @pytest.mark.parametrize(
        "kernel_base, says", [("2", "base 2, converted"), ("e", "natural")]
    )
    @pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.bfloat16])
    def test_once_in_a_process(self, kernel_base, says, cache_dtype, base, log):
        base(kernel_base)
        env = make_env(TINY, "trtllm_mla", cache_dtype=cache_dtype, k_scale=0.3)
        batch_runs.sibling(env)
        causal, other = KERNELS.calls
        assert causal.causal and not other.causal
        for call in (causal, other):
            assert call.return_lse and call.cu_q == call.cu_kv == [0, 256]
            assert call.q.dtype == cache_dtype and not call.q.float().any()
            assert call.q.shape == call.k.shape == (256, TINY.heads, 80)
            assert call.v.shape == call.out_before.shape == (256, TINY.heads, TINY.v)
        (line,) = log(ABOUT)
        assert line.startswith(f"TRTLLMMLABackend: the log-sum-exps are {says}")

    @pytest.mark.parametrize(
        "change",
        [
            lambda lse, is_causal: lse.fill_(math.nan),
            lambda lse, is_causal: lse.div_(math.log(10)),
            lambda lse, is_causal: lse.div_(math.log(2) if is_causal else 1),
            one_row_off,
            broken,
        ],
        ids=["nan", "base 10", "base 2 if causal", "one row off", "error"],
    )
    def test_neither_is_an_error_in_the_log_and_converts_nothing(
        self, change, kernel_returns, caplog
    ):
        kernel_returns(change)
        chosen = scenario("taken")
        env, batch = chosen.build()
        batch_runs.sibling(env)
        (record,) = (r for r in caplog.records if ABOUT in r.getMessage())
        assert record.levelno == logging.ERROR
        assert SWITCH in record.getMessage()
        if change is broken:
            assert "no kernel image" in record.getMessage()
            return
        result = chosen.how(env, batch)
        as_they_are = scenario("taken", **{SWITCH: "e"}).run()
        assert same_bits(result.attn_output, as_they_are.attn_output)

    def test_only_rank_0_logs_an_error(self, kernel_returns, caplog, monkeypatch):
        kernel_returns(broken)
        rank = "get_tensor_model_parallel_rank"
        monkeypatch.setattr(mla_fp8_prefill, rank, lambda: 1)
        make_env(TINY, "trtllm_mla")
        assert not [r for r in caplog.records if ABOUT in r.getMessage()]

    @pytest.mark.parametrize(
        "setting, server_args",
        [("2", {}), ("e", {}), ("auto", dict(disable_chunked_prefix_cache=True))],
    )
    def test_nothing_runs_where_nothing_is_to_be_found(
        self, setting, server_args, monkeypatch
    ):
        monkeypatch.setenv(SWITCH, setting)
        make_env(TINY, "trtllm_mla", **server_args)
        assert KERNELS.calls == []

    def test_a_backend_without_prefill_runs_nothing(self):
        env = make_env(TINY, "tokenspeed_mla")
        buffer = torch.zeros(9, dtype=torch.int32, device=DEVICE)
        TRTLLMMLABackend(
            env.runner,
            skip_prefill=True,
            kv_indptr_buf=buffer,
            q_indptr_decode_buf=buffer,
        )
        assert KERNELS.calls == []

    @pytest.mark.parametrize("setting", ["auto", "2", "e"])
    def test_tokenspeed_mla_is_natural(self, setting, log):
        chosen = scenario("taken", "tokenspeed_mla", **{SWITCH: setting})
        chosen.build()
        assert KERNELS.calls == [] and log(ABOUT) == []
        assert error(chosen) < ROUNDING


class TestConversion:
    def run(self, monkeypatch, return_lse: bool):
        monkeypatch.setenv(SWITCH, "2")
        backend = make_env(TINY, "trtllm_mla").backend
        out, lse = torch.ones(4, 2, 16), torch.tensor([[8.0, -math.inf]] * 4)
        result = (out, lse) if return_lse else out
        backend._run_prefill_kernel = lambda **kwargs: result
        backend.num_prefill_tokens = 3
        layer = SimpleNamespace(v_scale_float=None)
        return result, backend._run_padded_prefill_kernel(layer=layer)

    def test_is_in_place_and_keeps_rows_without_keys(self, monkeypatch):
        (_, lse), result = self.run(monkeypatch, True)
        assert result[1] is lse
        assert lse[:3].tolist() == [[pytest.approx(math.log(256)), -math.inf]] * 3
        assert lse[3].tolist() == [0, 0]

    def test_is_of_log_sum_exps_alone(self, monkeypatch):
        out, result = self.run(monkeypatch, False)
        assert result is out and (out[:3] == 1).all()


class TestSwitch:
    def test_default_is_auto(self):
        assert envs.SGLANG_MLA_FP8_PREFILL_LSE.get() == "auto"

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("value", ["", "10", "off"])
    def test_anything_else_is_an_error(self, value, backend, monkeypatch):
        monkeypatch.setenv(SWITCH, value)
        with pytest.raises(ValueError, match=f"{SWITCH} must be .*'{value}'"):
            make_env(TINY, backend)

    @pytest.mark.parametrize("value", ["AUTO", "E"])
    def test_any_case(self, value, monkeypatch):
        monkeypatch.setenv(SWITCH, value)
        make_env(TINY, "trtllm_mla")


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("merge", ["merge_state_v2", "merge_state_triton"])
def test_base_2_of_a_real_kernel_through_sglangs_own_merge(merge):
    """FlashInfer's own kernels return base 2 too, and run on more than SM100."""
    import flashinfer
    import sgl_kernel

    from sglang.srt.layers.attention.triton_ops import merge_state

    heads, dim, prefix, suffix = 4, 128, 3072, 64
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, dim, generator=generator, device=DEVICE).bfloat16()
        for n in (suffix, prefix + suffix, prefix + suffix)
    )
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE), "NHD", backend="fa2"
    )

    def attention(keys: slice, causal: bool):
        lens = [torch.tensor([0, n], dtype=torch.int32) for n in (suffix, len(k[keys]))]
        wrapper.plan(
            *lens, heads, heads, dim, causal=causal, q_data_type=torch.bfloat16
        )
        return wrapper.run(q, k[keys], v[keys], return_lse=True)

    parts = *attention(slice(prefix), False), *attention(slice(prefix, None), True)
    module = sgl_kernel if merge == "merge_state_v2" else merge_state
    wanted, lse = kernels.ragged_attention(
        *(x.double() for x in (q, k, v)),
        [0, suffix],
        [0, prefix + suffix],
        dim**-0.5,
        causal=True,
        dtype=torch.float64,
    )

    def merged(factor: float):
        a, lse_a, b, lse_b = parts
        out, out_lse = torch.empty_like(a), torch.empty_like(lse_a)
        getattr(module, merge)(a, lse_a * factor, b, lse_b * factor, out, out_lse)
        return harness.relative_error(out, wanted), (out_lse - lse).abs().max()

    error, lse_error = merged(LSE_FACTORS["2"])
    assert error < 0.01 and lse_error < 0.01
    error, lse_error = merged(1.0)
    assert error > 0.05 and lse_error > 1
