"""What the table of batches does not say of the hook and its pieces."""

import functools
from collections import Counter
from types import SimpleNamespace

import batch_runs
import mla_harness as harness
import pytest
import torch
from batch_cases import BACKENDS, CHUNKS, DEEPSEEK
from mla_harness import TINY, Scenario, make_env, reference, same_bits
from sglang_cpu import DEVICE, HAS_GPU

from sglang.jit_kernel import (
    fp8_quantize,
    mla_kv_pack_quantize_fp8,
    mla_prefill_quantize_fp8,
)
from sglang.jit_kernel.fixup_zero_kv import fixup_zero_kv_rows
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.environ import envs
from sglang.srt.layers.attention import mla_fp8_prefill
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.mla_fp8_prefill import (
    attend_prefix_chunks,
    prepare_prefill_qkv,
    resolve_attn_backend,
)
from sglang.srt.layers.attention.trtllm_mla_backend import (
    TRTLLMMLABackend,
    _quantize_fp8_qkv,
)
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

E4M3 = torch.float8_e4m3fn
SWITCH = "SGLANG_MLA_FP8_PREFILL"
GEMM_SWITCH = "SGLANG_MLA_FP8_PREFILL_GEMM"
UE8M0 = dict(act_scale_ue8m0=True)

on_each = pytest.mark.parametrize("backend", BACKENDS)
with_each_producer = pytest.mark.parametrize("producer", ["fused", "composed"])


class HookCall:
    """The hook, called as the model calls it, and everything it may touch."""

    def __init__(self, env, batch):
        self.env, self.batch = env, batch
        self.forward_batch = harness.start_batch(env, batch)
        self.new_metadata()
        self.inputs = harness.layer_inputs(env, batch)
        self.projections = 0
        env.attn.kv_b_proj.register_forward_pre_hook(self._count)

    def new_metadata(self):
        self.env.backend.init_forward_metadata(self.forward_batch)

    def _count(self, *_):
        self.projections += 1

    def __call__(self, rows: slice = slice(None)):
        q, kv_a, k_pe, positions = (
            self.inputs[name][rows] for name in ("q", "kv_a", "k_pe", "positions")
        )
        with torch.no_grad():
            return prepare_prefill_qkv(
                self.env.attn,
                q,
                q[..., self.env.dims.nope :],
                kv_a,
                k_pe,
                positions,
                self.forward_batch,
            )

    def rows(self) -> torch.Tensor:
        cache = self.env.pool.kv_buffer[0]
        return cache[self.batch.out_cache_loc, 0].contiguous().view(E4M3)

    def assert_nothing_touched(self):
        assert self.projections == 0
        cache = self.env.pool.kv_buffer[0]
        assert same_bits(cache, self.batch.cache_before)
        inputs = harness.layer_inputs(self.env, self.batch)
        for name in ("q", "kv_a", "k_pe", "positions"):
            assert same_bits(self.inputs[name], inputs[name]), name


def hook_call(backend, **env) -> HookCall:
    env = make_env(env.pop("dims", TINY), backend, **env)
    return HookCall(env, harness.make_batch(env, [5, 3]))


class TestRows:
    @with_each_producer
    def test_tokens_beyond_the_cache_slots_are_not_cached(
        self, producer, flashinfer, monkeypatch
    ):
        monkeypatch.setenv(SWITCH, producer)
        flashinfer(True)
        call = hook_call("trtllm_mla", dims=DEEPSEEK)
        call.forward_batch.out_cache_loc = call.batch.out_cache_loc[:5]
        written, write = [], call.env.pool.set_mla_kv_buffer

        def set_mla_kv_buffer(layer, *rows):
            written.append([len(x) for x in rows])
            write(layer, *rows)

        call.env.pool.set_mla_kv_buffer = set_mla_kv_buffer
        wanted = harness.expected(call.env, call.batch)
        for actual, exact in zip(call(), wanted):
            reference.assert_fp8(actual, exact)
        reference.assert_fp8(call.rows()[:5], wanted.rows[:5])
        before = call.batch.cache_before[call.batch.out_cache_loc[5:], 0]
        assert same_bits(call.rows()[5:].view(before.dtype), before)
        assert written == [[5, 5, 5]] * (producer == "composed")

    @with_each_producer
    def test_no_tokens_launch_nothing(self, producer, flashinfer, monkeypatch):
        monkeypatch.setenv(SWITCH, producer)
        flashinfer(True)
        call = hook_call("trtllm_mla", dims=DEEPSEEK)
        call.forward_batch.out_cache_loc = call.batch.out_cache_loc[:0]
        launches = Counter()
        with batch_runs.counting(launches):
            qkv = call(slice(0, 0))
        heads, nope, rope, v, _ = call.env.dims
        widths = (nope + rope, nope + rope, v)
        assert [tuple(x.shape) for x in qkv] == [(0, heads, width) for width in widths]
        # A grid of no blocks is an error on a GPU.
        assert {kernel for kind, kernel in launches if kind == "launch"} <= {
            "set_mla_kv_buffer_kernel"
        }
        assert same_bits(call.env.pool.kv_buffer[0], call.batch.cache_before)


class UnusualBuffer(memory_pool.MLATokenToKVPool):
    def _create_buffers(self):
        super()._create_buffers()


class OwnAccessor(memory_pool.MLATokenToKVPool):
    def get_key_buffer(self, layer_id):
        return super().get_key_buffer(layer_id)


class StoresScales(memory_pool.MLATokenToKVPool):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, use_nsa=True, override_kv_cache_dim=128)


class OfTorchao(torch.Tensor):
    pass


class NoLatentRows(batch_runs.OwnWriterPool):
    """As SGLang's pool of MLA and sliding-window MLA (Dots3-Note)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        del self.kv_lora_rank


def multi_head_pool(layer_num, kv_lora_rank, qk_rope_head_dim, **kwargs):
    return memory_pool.HybridLinearKVPool(
        **kwargs,
        head_num=2,
        head_dim=8,
        full_attention_layer_ids=[0],
        enable_kvcache_transpose=False,
        mamba_pool=None,
    )


class TestPools:
    @pytest.mark.parametrize(
        "pool_class, outcome",
        [
            (memory_pool.MLATokenToKVPool, "with the fused producer"),
            (batch_runs.linear_pool, "with the fused producer"),
            (batch_runs.OwnWriterPool, "with the composed producer"),
            (UnusualBuffer, "with the composed producer"),
            (OwnAccessor, "with the composed producer"),
            (StoresScales, "declined: StoresScales takes no FP8 rows"),
            (NoLatentRows, "declined: NoLatentRows takes no FP8 rows"),
            (multi_head_pool, "declined: HybridLinearKVPool takes no FP8 rows"),
        ],
    )
    def test_the_log_at_start_says_how_rows_get_into_it(
        self, pool_class, outcome, log, flashinfer
    ):
        flashinfer(True)
        make_env(TINY, "trtllm_mla", pool_class=pool_class)
        assert log() == [f"TRTLLMMLABackend: FP8 prefill preparation {outcome}"]

    @on_each
    def test_is_that_of_the_batch(self, backend, flashinfer):
        flashinfer(False)
        call = hook_call(backend)
        other = make_env(TINY, backend, pool_class=batch_runs.OwnWriterPool).pool
        for pool, taken in ((call.env.pool, True), (other, False)) * 2:
            call.forward_batch.token_to_kv_pool = pool
            call.new_metadata()
            assert (call() is not None) == taken


class TestDeclines:
    @on_each
    def test_touch_nothing_and_are_logged_once(self, backend, log, monkeypatch):
        monkeypatch.setattr(mla_fp8_prefill, "in_cuda_graph", lambda: True)
        call = hook_call(backend)
        for _ in range(2):
            call.new_metadata()
            assert call() is None and call() is None
        call.assert_nothing_touched()
        reason = "declines a batch: CUDA graph"
        assert [line.endswith(reason) for line in log()] == [False, True]

    @on_each
    def test_a_batch_is_decided_once_for_all_layers(self, backend, monkeypatch):
        asked = []
        monkeypatch.setattr(mla_fp8_prefill, "in_cuda_graph", lambda: asked.append(1))
        call = hook_call(backend)
        for batches in (1, 2):
            call.new_metadata()
            assert call() is not None and call() is not None
            assert len(asked) == batches

    def test_a_rotary_embedding_of_part_of_the_width(self, log):
        call = hook_call("trtllm_mla")
        rotary = batch_runs.own_rope(call.env.attn)
        rotary.cos_sin_cache = rotary.cos_sin_cache[:, :32].contiguous()
        assert call() is None
        assert log()[-1].endswith("declines a batch: rotary embedding")


class TestSwitch:
    @pytest.mark.parametrize("value", ["off", "OFF"])
    def test_off_takes_any_checkpoint_and_no_batch(self, value, monkeypatch, log):
        monkeypatch.setenv(SWITCH, value)
        call = hook_call("tokenspeed_mla", k_scale=0.3)
        assert call() is None
        call.assert_nothing_touched()
        start = "TokenspeedMLABackend: FP8 prefill preparation"
        assert log() == [f"{start} declined: {SWITCH}=off"]

    def test_off_keeps_the_refusal_of_scales(self, monkeypatch):
        monkeypatch.setenv(SWITCH, "off")
        env = make_env(TINY, "tokenspeed_mla", v_scale=4.0)
        with pytest.raises(AssertionError, match="must be 1.0"):
            harness.run_prefill(env, harness.make_batch(env, [5, 3]))

    @on_each
    @pytest.mark.parametrize("value", ["", "on", "1"])
    def test_anything_else_is_an_error(self, value, backend, monkeypatch):
        monkeypatch.setenv(SWITCH, value)
        with pytest.raises(ValueError, match=f"{SWITCH} must be .*'{value}'"):
            make_env(TINY, backend)

    def test_is_read_at_start(self, monkeypatch):
        call = hook_call("trtllm_mla")
        monkeypatch.setenv(SWITCH, "off")
        assert call() is not None

    def test_default_is_fused(self, monkeypatch):
        monkeypatch.delenv(SWITCH, raising=False)
        assert envs.SGLANG_MLA_FP8_PREFILL.get() == "fused"


class TestNoHook:
    @pytest.mark.parametrize("backend", [batch_runs.RaggedBackend(), SimpleNamespace()])
    def test_a_backend_without_it_declines(self, backend):
        """SimpleNamespace: a plugin's backend, which is no AttentionBackend."""
        assert AttentionBackend.prepare_prefill_qkv is None
        call = hook_call("trtllm_mla")
        call.forward_batch.attn_backend = backend
        assert call() is None
        call.assert_nothing_touched()

    def test_a_linear_layer_has_none(self):
        call = hook_call("trtllm_mla")
        wrapper = harness.wrap_hybrid_linear(call.env.backend, [7])
        call.forward_batch.attn_backend = wrapper
        assert call() is None

    @pytest.mark.parametrize(
        "change, version",
        [
            (dict(attention_arch=AttentionArch.MHA), 3),
            ({}, 4),
            (dict(qk_nope_head_dim=None), 3),  # as of MiniCPM3
        ],
    )
    def test_flash_attention_has_none_but_version_3_for_mla(self, change, version, log):
        env = make_env(TINY, "fa3")
        lines = log()
        assert env.backend.prepare_prefill_qkv is not None
        vars(env.runner.model_config).update(change)
        backend = FlashAttentionBackend(env.runner, fa_impl_ver=version)
        assert backend.prepare_prefill_qkv is None and log() == lines


class TestResolve:
    @pytest.fixture(scope="class")
    def env(self):
        return make_env(TINY, "tokenspeed_mla")

    @pytest.fixture(scope="class")
    def other(self, env):
        return harness.make_backend(env, "trtllm_mla")

    def resolve(self, backend, mode="EXTEND", layer_id=5):
        batch = SimpleNamespace(attn_backend=backend, forward_mode=ForwardMode[mode])
        return resolve_attn_backend(batch, layer_id)

    @pytest.mark.parametrize(
        "mode, speculative, prefill",
        [
            ("EXTEND", "prefill", True),
            ("DECODE", "prefill", False),
            ("TARGET_VERIFY", "prefill", True),
            ("TARGET_VERIFY", "decode", False),
        ],
    )
    def test_hybrid(self, mode, speculative, prefill, env, other, monkeypatch):
        monkeypatch.setattr(env.server_args, "speculative_attention_mode", speculative)
        hybrid = harness.wrap_hybrid(env, prefill=env.backend, decode=other)
        assert self.resolve(hybrid, mode) is (env.backend if prefill else other)

    def test_hybrid_linear(self, env):
        wrapper = harness.wrap_hybrid_linear(env.backend, [1, 5])
        assert self.resolve(wrapper) is env.backend
        assert self.resolve(wrapper, layer_id=2) is wrapper.linear_attn_backend

    @pytest.mark.parametrize("order", ["", "thl", "lht", "hh"])
    def test_any_nest(self, order, env, other):
        """t, h and l from the outside in; decode leaves at the first h."""
        backend = env.backend
        for wrapper in reversed(order):
            if wrapper == "t":
                backend = harness.wrap_tbo(backend, [other, other])
            elif wrapper == "l":
                backend = harness.wrap_hybrid_linear(backend, [5])
            else:
                backend = harness.wrap_hybrid(env, prefill=backend, decode=other)
        assert self.resolve(backend) is env.backend
        if "h" in order:
            assert self.resolve(backend, "DECODE") is other


@on_each
def test_chunks_behind_operands_in_the_models_dtype_are_left_to_sglang(backend):
    q = torch.zeros(1, dtype=torch.bfloat16)
    env = make_env(TINY, backend)
    assert attend_prefix_chunks(env.attn, q, None, None, None) is None


def assert_launches_and_casts(
    backend, switch, batch, launches, casts, **scenario
) -> None:
    """{kernel: how often}, which is all but for the indices of the cache's slots and
    the merges, and {shape of the result: how often}."""
    counts = Counter()
    given = dict(
        # Heads for which SGLang has no kernel of its own to concatenate k.
        env=dict(dims=TINY._replace(heads=12)),
        batch=dict(extend_lens=[5, 3], **batch),
        environ={SWITCH: switch},
        how=lambda env, batch: harness.run_prefill(
            env, batch, inside=lambda _: batch_runs.counting(counts)
        ),
    )
    result = Scenario(**{**given, **scenario}).on(backend).run()
    assert {shape: n for (kind, shape), n in counts.items() if kind == "cast"} == casts
    found = {name: n for (kind, name), n in counts.items() if kind == "launch"}
    found.pop("create_chunked_prefix_cache_kv_indices", None)
    found.pop("create_flashinfer_kv_indices_triton", None)
    found.pop("merge_state_kernel", None)
    if HAS_GPU:
        found = {name: found[name] for name in launches if name in found}
    else:
        ropes = result.counts["apply_rope_with_cos_sin_cache_inplace"]
        assert ropes == (switch == "off")
    assert found == {name: n for name, n in launches.items() if n}


@on_each
@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize("switch", ["fused", "off"])
def test_launches_and_casts(switch, chunks, backend):
    """What stands between kv_b_proj and the attention kernel, for N chunks.

    One launch for q, k, v and the cache rows, and for each chunk one to gather and one
    to pack; nothing is cast outside of them. Without the hook q is cast N + 1 times, k
    and v once and once for each chunk, and the two parts of the cache rows; RoPE, the
    rows and each gather are launches, beside the copies.
    """
    batch = dict(prefix_lens=[4 * chunks, 4 * chunks], chunks=chunks or None)
    launches, casts = {"get_mla_kv_buffer_kernel": chunks}, {}
    if switch == "fused":
        launches["_mla_prefill_quantize_fp8_kernel"] = 1
        launches["_mla_kv_pack_quantize_fp8_kernel"] = chunks
    else:
        launches["set_mla_kv_buffer_kernel"] = 1
        # k of a chunk has q's shape.
        n, (heads, nope, rope, v, lora) = 8, TINY._replace(heads=12)
        casts = {
            (n, heads, nope + rope): (chunks + 1) + 1 + chunks,
            (n, heads, v): 1 + chunks,
            (n, 1, lora): 1,
            (n, 1, rope): 1,
        }
    assert_launches_and_casts(backend, switch, batch, launches, casts)


@on_each
def test_launches_with_projections_in_fp8(backend):
    """One launch that is q_b_proj, one for the cache rows and one that is kv_b_proj; for
    each chunk one to gather and one that is kv_b_proj."""
    launches = {
        "_mla_q_proj_quantize_fp8_kernel": 1,
        "_mla_prefill_quantize_fp8_kernel": 1,
        "_mla_kv_proj_quantize_fp8_kernel": 1 + 2,
        "get_mla_kv_buffer_kernel": 2,
    }
    assert_launches_and_casts(
        backend,
        "fused",
        dict(prefix_lens=[8, 8], chunks=2),
        launches,
        {},
        env=dict(dims=DEEPSEEK),
        environ={GEMM_SWITCH: "on"},
        change=batch_runs.any_batch_is_large,
    )


class TestGemm:
    """Whether this project's GEMM multiplies by the weight of kv_b_proj."""

    @pytest.fixture
    def env(self, monkeypatch):
        monkeypatch.setenv(GEMM_SWITCH, "on")
        env = make_env(DEEPSEEK, "trtllm_mla")
        batch_runs.any_batch_is_large(env)
        return env

    @staticmethod
    def takes(env, tokens: int = 4) -> bool:
        return env.backend._gemm_weight(env.attn.kv_b_proj, tokens) is not None

    def test_how_large_a_batch_has_to_be(self, env):
        env.backend.least_gemm_rows = 12 * DEEPSEEK.heads
        assert self.takes(env, 12) and not self.takes(env, 11)
        env.backend.least_q_gemm_rows = 15 * DEEPSEEK.heads
        takes_q = functools.partial(env.backend._q_gemm_weight, env.attn)
        assert takes_q(15) is not None and takes_q(14) is None
        batch_runs.kv_b_proj_in_fp8(env)
        env.backend.least_fp8_gemm_rows = 3 * DEEPSEEK.heads
        assert self.takes(env, 3) and not self.takes(env, 2)

    def test_rows_that_are_not_aligned(self, env, monkeypatch):
        def misaligned(x, norm):
            rows = x.new_empty(len(x), x.shape[1] + 8)[:, 4:-4]
            return rows.copy_(norm(x))

        for norm in (env.attn.q_a_layernorm, env.attn.kv_a_layernorm):
            forward = functools.partial(misaligned, norm=norm.forward)
            monkeypatch.setattr(norm, "forward", forward)
        batch = harness.make_batch(env, extend_lens=[5, 3])
        result = harness.run_prefill(env, batch)
        for actual, wanted in zip(
            result.calls[0].real_rows(), harness.expected(env, batch)
        ):
            harness.reference.assert_fp8(actual, wanted)

    @pytest.mark.parametrize(
        "layer, change",
        [
            (dict(is_neox=True), lambda env: None),
            (dict(rope=None), lambda env: None),
            (dict(dims=DEEPSEEK._replace(rope=32)), lambda env: None),
            ({}, lambda env: setattr(env.attn.q_b_proj, "gather_output", True)),
            ({}, lambda env: setattr(env.attn.kv_b_proj, "gather_output", True)),
            (dict(q_lora=128), lambda env: batch_runs.weight_in_fp8(env, "q_b_proj")),
        ],
        ids=["neox", "no rope", "rope 32", "q_b_proj", "kv_b_proj", "in FP8"],
    )
    def test_when_q_b_proj_projects_q(self, layer, change, monkeypatch):
        monkeypatch.setenv(GEMM_SWITCH, "on")
        env = make_env(**{"dims": DEEPSEEK, "backend": "trtllm_mla", **layer})
        batch_runs.any_batch_is_large(env)
        change(env)
        monkeypatch.delattr(mla_fp8_prefill, "mla_q_proj_quantize_fp8")
        batch = harness.make_batch(env, extend_lens=[5, 3])
        result = harness.run_prefill(env, batch)
        exact = harness.expected(env, batch)
        assert harness.relative_error(result.calls[0].q, exact.q) < 0.05

    @pytest.mark.parametrize(
        "change",
        [
            lambda proj: setattr(proj, "bias", proj.weight),
            lambda proj: setattr(proj, "quant_method", SimpleNamespace()),
            lambda proj: setattr(
                proj, "__class__", type("WithLoRA", (type(proj),), {})
            ),
            lambda proj: setattr(proj, "gather_output", True),
            lambda proj: proj.half(),
            lambda proj: delattr(proj, "weight"),
            lambda proj: setattr(
                proj,
                "weight",
                torch.nn.Parameter(proj.weight.data.as_subclass(OfTorchao), False),
            ),
            lambda proj: setattr(
                proj.weight, "data", proj.weight.data.T.contiguous().T
            ),
        ],
        ids=[
            *("bias", "quantized", "lora", "gathered", "dtype", "no weight"),
            *("subclass", "layout"),
        ],
    )
    def test_what_kv_b_proj_has_to_be(self, change, env):
        change(env.attn.kv_b_proj)
        self.is_refused(env)

    def is_refused(self, env) -> None:
        assert not self.takes(env)
        reason = env.backend._no_gemm_reason(env.runner.model)
        assert reason == "its weight is not plain"

    @pytest.mark.parametrize(
        "change",
        [
            lambda scale: scale.to(torch.float16),
            lambda scale: scale.repeat_interleave(2, 1),
            lambda scale: scale.T.contiguous().T,
            lambda scale: setattr(scale, "format_ue8m0", True) or scale,
            lambda scale: None,
        ],
        ids=["dtype", "block", "layout", "ue8m0", "none"],
    )
    def test_what_scales_of_a_weight_in_fp8_have_to_be(self, change, env):
        batch_runs.kv_b_proj_in_fp8(env)
        assert self.takes(env)
        proj = env.attn.kv_b_proj
        scale = change(proj.weight_scale_inv.data)
        del proj.weight_scale_inv
        proj.weight_scale_inv = scale
        self.is_refused(env)

    @pytest.mark.parametrize("keywords, ue8m0", [({}, False), (UE8M0, True)])
    def test_latent_is_quantized_as_by_the_linear(
        self, keywords, ue8m0, env, monkeypatch
    ):
        """With scales that are powers of two where kv_b_proj's own would be."""
        batch_runs.kv_b_proj_in_fp8(env)
        method = env.attn.kv_b_proj.quant_method
        method.w8a8_block_fp8_linear = functools.partial(print, **keywords)
        given = []

        def quantize(x, group_size, scale_ue8m0):
            given.append((group_size, scale_ue8m0))
            return harness.reference.quantize_blocks(x, 1)

        monkeypatch.setattr(mla_fp8_prefill, "per_token_group_quant_fp8", quantize)
        harness.run_prefill(env, harness.make_batch(env, extend_lens=[5, 3]))
        assert given == [(128, ue8m0)]

    @pytest.mark.parametrize(
        "setting, dims, device, capability, reason",
        [
            ("off", DEEPSEEK, "cuda", (9, 0), "SGLANG_MLA_FP8_PREFILL_GEMM=off"),
            ("on", TINY, "cuda", (9, 0), "head dimensions other than 128"),
            ("on", DEEPSEEK, "cuda", (8, 9), "needs SM90 or SM100"),
            ("on", DEEPSEEK, "cuda", (12, 0), "needs SM90 or SM100"),
            ("on", DEEPSEEK, "cuda", (10, 0), None),
            ("AUTO", DEEPSEEK, "cuda", (9, 0), None),
            ("auto", DEEPSEEK, "cuda", (10, 0), "measured on SM90 only"),
            ("auto", DEEPSEEK, "cpu", None, "measured on SM90 only"),
        ],
    )
    def test_where_it_runs(
        self, setting, dims, device, capability, reason, monkeypatch
    ):
        env = make_env(dims, "trtllm_mla")
        monkeypatch.setenv(GEMM_SWITCH, setting)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        env.backend.device = device
        found = env.backend._no_gemm_reason(env.runner.model)
        assert found is None if reason is None else found.startswith(reason)

    def test_no_such_setting(self, monkeypatch):
        monkeypatch.setenv(GEMM_SWITCH, "yes")
        with pytest.raises(ValueError, match=f"^{GEMM_SWITCH} must be auto, on or off"):
            make_env(DEEPSEEK, "trtllm_mla")


@pytest.mark.parametrize("switch", ["fused", "off"])
def test_launches_and_casts_over_a_prefix_in_one_shot(switch):
    """One launch for q and the cache rows, then one to gather the rows of prefix and new
    tokens and one to pack their k and v; nothing is cast outside of them."""
    launches, casts = {"get_mla_kv_buffer_kernel": 1}, {}
    if switch == "fused":
        launches["_mla_prefill_quantize_fp8_kernel"] = 1
        launches["_mla_kv_pack_quantize_fp8_kernel"] = 1
    else:
        launches["set_mla_kv_buffer_kernel"] = 1
        n, n_kv, (heads, nope, rope, v, lora) = 8, 24, TINY._replace(heads=12)
        casts = {
            (n, heads, nope + rope): 1,
            (n_kv, heads, nope + rope): 1,
            (n_kv, heads, v): 1,
            (n, 1, lora): 1,
            (n, 1, rope): 1,
        }
    batch = dict(prefix_lens=[12, 4])
    assert_launches_and_casts("fa3", switch, batch, launches, casts)


@pytest.mark.parametrize("switch", ["fused", "off"])
def test_outputs_are_not_filled_before_the_kernel_writes_them(switch):
    scenario = Scenario(
        batch={**CHUNKS, "pad_rows": 3},
        how=batch_runs.in_nan_memory,
        environ={SWITCH: switch},
    )
    result = scenario.on("trtllm_mla").run()
    assert len(result.calls) == 3
    for call in result.calls:
        assert call.out_before.isnan().all()
    assert result.output.isfinite().all() and (result.output[9:] == 0).all()


@pytest.mark.parametrize("heads", [1, 4, 5, 10, 16])
def test_rows_without_keys_are_zero_for_any_number_of_heads(heads):
    """SGLang's kernel writes four heads at a time, at addresses of 16 bytes."""
    out = torch.randn(10, heads, 16, device=DEVICE).bfloat16()
    lse = torch.randn(10, heads, device=DEVICE)
    wanted = out.clone(), lse.clone()
    for rows in (slice(3, 5), slice(6, 8)):
        wanted[0][rows], wanted[1][rows] = 0, -torch.inf
    kv_lens = torch.tensor([4, 0, 2, 0], dtype=torch.int32, device=DEVICE)
    cum_lens = torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32, device=DEVICE)
    fixup_zero_kv_rows(out, lse, kv_lens, cum_lens, 3)
    assert same_bits(out, wanted[0]) and same_bits(lse, wanted[1])


@pytest.fixture
def specializations(monkeypatch):
    """A function that gives what Triton has compiled the hook's kernels for; in the
    interpreter, what it would have compiled them for."""
    jit_kernels = {
        kernel.__name__: kernel
        for kernel in (
            fp8_quantize._fp8_quantize_kernel,
            mla_kv_pack_quantize_fp8._mla_kv_pack_quantize_fp8_kernel,
            mla_prefill_quantize_fp8._mla_prefill_quantize_fp8_kernel,
        )
    }
    if HAS_GPU:
        device = torch.cuda.current_device()
        return lambda: {
            (name, key)
            for name, kernel in jit_kernels.items()
            for key in kernel.device_caches[device][0]
        }
    from triton.runtime.interpreter import InterpretedFunction

    seen, run = set(), InterpretedFunction.run

    def noted_run(self, *args, **kwargs):
        values = {**dict(zip(self.arg_names, args)), **kwargs}
        free = self.kwargs.get("do_not_specialize") or ()
        any_alignment = self.kwargs.get("do_not_specialize_on_alignment") or ()
        key = []
        for name in self.arg_names if self.__name__ in jit_kernels else ():
            value = values[name]
            what = type(value)
            if isinstance(value, torch.Tensor):
                aligned = name in any_alignment or value.data_ptr() % 16 == 0
                what = value.dtype, aligned
            elif "constexpr" in str(self.fn.__annotations__.get(name)):
                what = value
            elif isinstance(value, int) and name not in free:
                what = value == 1, value % 16 == 0
            key.append((name, what))
        if key:
            seen.add((self.__name__, *key))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted_run)
    return lambda: set(seen)


class TestStart:
    @pytest.mark.parametrize(
        "backend, gemm, layer",
        [
            ("trtllm_mla", "on", {}),
            ("trtllm_mla", "off", dict(is_neox=True)),
            ("trtllm_mla", "off", dict(rope=None)),
            ("trtllm_mla", "off", dict(k_scale=0.5, v_scale=4.0)),
            ("trtllm_mla", "on", dict(v_scale=4.0, dtype=torch.float16)),
            ("fa3", "on", dict(k_scale=0.5, v_scale=4.0)),
            ("fa3", "off", dict(rope=None)),
            ("trtllm_mla", "in FP8", {}),
            ("trtllm_mla", "in FP8", dict(k_scale=0.5)),
        ],
    )
    @with_each_producer
    def test_requests_launch_what_ran_before(
        self, producer, backend, gemm, layer, flashinfer, monkeypatch, specializations
    ):
        """The kernels' constants, and the types and the alignment of what else they are
        given and specialize on."""
        monkeypatch.setenv(SWITCH, producer)
        monkeypatch.setenv(GEMM_SWITCH, "on" if gemm == "in FP8" else gemm)
        flashinfer(True)
        monkeypatch.setenv("SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD", "1")
        env = make_env(DEEPSEEK, backend, **layer)
        batch_runs.any_batch_is_large(env)
        if gemm == "in FP8":
            batch_runs.kv_b_proj_in_fp8(env)
        variants = env.backend._prefill_variants(env.runner.model)
        weights = env.backend._gemm_weights(env.runner.model)
        q_weight = env.backend._q_gemm_weight_of(env.runner.model)
        env.backend._compile_prefill_kernels(producer, variants, weights, q_weight)
        at_start = specializations()
        for how, batch in (
            (harness.run_prefill, CHUNKS),
            (harness.run_prefill, dict(extend_lens=[1])),
            # On fa3, over prefix and new tokens at once.
            (harness.run_prefill, dict(extend_lens=[2, 3], prefix_lens=[4, 0])),
            (harness.run_prefill, dict(extend_lens=[1], prefix_lens=[1])),
            # The second child's indices are a slice from the fifth token on.
            (batch_runs.overlapped, dict(extend_lens=[5, 2, 3])),
        ):
            how(env, harness.make_batch(env, **batch))
        assert at_start and specializations() == at_start

    def test_a_weight_on_the_host(self, monkeypatch):
        """As --cpu-offload-gb leaves that of q_b_proj."""
        monkeypatch.setenv(GEMM_SWITCH, "on")
        env = make_env(DEEPSEEK, "trtllm_mla")
        weight = env.attn.q_b_proj.weight
        # Not on the backend's device before it is asked to go there.
        on_host = SimpleNamespace(to={env.backend.device: weight}.__getitem__)
        given = []
        monkeypatch.setattr(
            mla_fp8_prefill, "mla_q_proj_quantize_fp8", lambda *args: given.append(args)
        )
        variants = env.backend._prefill_variants(env.runner.model)
        env.backend._compile_prefill_kernels("fused", variants, [], on_host)
        assert [args[1] is weight for args in given] == [True]

    def test_each_variant_of_the_model_is_compiled(self):
        layers = [
            make_env(TINY, "trtllm_mla", **layer).attn
            for layer in (
                dict(rope="default"),
                dict(rope="yarn"),
                dict(is_neox=True),
                dict(rope=None),
                dict(rope=None, k_scale=0.5, v_scale=4.0),
            )
        ]
        backend = make_env(TINY, "trtllm_mla").backend
        variants = {(False, 1, 1), (True, 1, 1), (None, 1, 1), (None, 2.0, 0.25)}
        assert backend._prefill_variants(torch.nn.Sequential(*layers)) == variants

    @pytest.mark.parametrize(
        "device, skip_prefill, compiles",
        [("cuda:1", False, 1), ("cuda", True, 0), ("cpu", False, 0)],
    )
    def test_when_kernels_are_compiled(
        self, device, skip_prefill, compiles, monkeypatch
    ):
        env = make_env(TINY, "trtllm_mla")
        compiled = []
        env.backend._compile_prefill_kernels = lambda *args: compiled.append(args)
        env.backend.device, env.backend.skip_prefill = device, skip_prefill
        env.backend.init_fp8_prefill(env.runner)
        assert compiled == [("fused", {(False, 1.0, 1.0)}, [], None)] * compiles

    def test_one_line_for_each_backend_on_rank_0(self, log, monkeypatch):
        for backend in BACKENDS * 2:
            make_env(TINY, backend)
        lines = log()
        assert [line.split(":")[0] for line in lines] == [
            "TokenspeedMLABackend",
            "TRTLLMMLABackend",
            "FlashAttentionBackend",
        ]
        rank = "sglang.srt.distributed.get_tensor_model_parallel_rank"
        monkeypatch.setattr(rank, lambda: 1)
        make_env(DEEPSEEK, "trtllm_mla", rope=None)
        assert log() == lines

    def test_no_line_from_a_backend_without_prefill(self, log):
        """The steps of a draft model decode only."""
        env = make_env(TINY, "trtllm_mla")
        buffer = torch.zeros(9, dtype=torch.int32, device=DEVICE)
        before = log()
        TRTLLMMLABackend(
            env.runner,
            skip_prefill=True,
            kv_indptr_buf=buffer,
            q_indptr_decode_buf=buffer,
        )
        assert log() == before


def test_a_rope_that_changes_its_positions_first_is_not_for_the_hook():
    """As BailingMRotaryEmbedding, which has RotaryEmbedding's method for GPUs."""
    env = make_env(TINY, "trtllm_mla")
    rotary = batch_runs.own_rope(env.attn)
    assert mla_fp8_prefill._is_plain_rope(rotary, TINY.rope)
    forward = type(rotary).forward
    shifted = lambda self, positions, *args: forward(self, positions + 1, *args)
    rotary.__class__ = type("Shifted", (type(rotary),), dict(forward=shifted))
    assert not mla_fp8_prefill._is_plain_rope(rotary, TINY.rope)


def test_tables_and_pools_of_another_dtype_are_not_for_the_hook(monkeypatch):
    env = make_env(TINY, "trtllm_mla")
    rotary = batch_runs.own_rope(env.attn)
    assert mla_fp8_prefill._pool_producer(env.pool) == "fused"
    assert mla_fp8_prefill._is_plain_rope(rotary, TINY.rope)
    monkeypatch.setattr(env.pool, "dtype", torch.bfloat16)
    rotary.cos_sin_cache = rotary.cos_sin_cache.bfloat16()
    assert mla_fp8_prefill._pool_producer(env.pool) is None
    assert not mla_fp8_prefill._is_plain_rope(rotary, TINY.rope)


@pytest.mark.parametrize("v_scale, multiplications", [(None, 0), (1.0, 0), (1.7, 1)])
def test_outputs_of_tokenspeed_are_multiplied_where_v_scale_is_not_1(
    v_scale, multiplications, monkeypatch
):
    multiply, seen = torch.Tensor.mul_, []

    def mul_(self, other):
        seen.append((self.dtype, other))
        return multiply(self, other)

    env = make_env(TINY, "tokenspeed_mla", k_scale=0.3, v_scale=v_scale)
    batch = harness.make_batch(env, **CHUNKS)
    monkeypatch.setattr(torch.Tensor, "mul_", mul_)
    calls = harness.run_prefill(env, batch).calls
    wanted = [(torch.bfloat16, v_scale)] * multiplications * len(calls)
    assert [some for some in seen if some[0] == torch.bfloat16] == wanted


def test_an_fp8_q_tells_that_k_and_v_are_divided():
    # As for fa3, SGLang may cast a declined batch's K itself, without its scale.
    scale = torch.tensor(0.5, device=DEVICE)
    layer = SimpleNamespace(
        k_scale=scale, k_scale_float=0.5, v_scale=scale, v_scale_float=0.5
    )
    q, k, v = torch.randn(3, 4, 2, 32, device=DEVICE).to(torch.bfloat16).unbind()
    k, v = k.to(E4M3), v.to(E4M3)
    _, *divided, _, _ = _quantize_fp8_qkv(q, k, v, layer)
    for x, y in zip(divided, (k, v)):
        assert same_bits(x, (y.float() / 0.5).to(E4M3))
    _, *left, _, _ = _quantize_fp8_qkv(q.to(E4M3), k, v, layer)
    for x, y in zip(left, (k, v)):
        assert same_bits(x, y)
