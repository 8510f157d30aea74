"""The hook and its pieces, on SGLang's own model, backends, pools and wrappers."""

import copy
import dataclasses
import logging
from types import SimpleNamespace

import batch_cases
import mla_harness as harness
import pytest
import torch
from batch_cases import BACKENDS, CHUNKS, E4M3, FOR_FLASHINFER, OwnWriterPool, Run
from mla_harness import KERNELS, Dims, fp8_ulps, make_env, round_fp8, same_bits
from sglang_cpu import DEVICE, HAS_GPU

import sglang.jit_kernel.mla_kv_pack_quantize_fp8 as mla_kv_pack_module
import sglang.jit_kernel.mla_prefill_quantize_fp8 as mla_prefill_module
from sglang.srt.layers.attention import mla_fp8_prefill
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.mla_fp8_prefill import (
    MLAFP8PrefillMixin,
    prefix_chunk_packing,
    prepare_prefill_qkv,
    resolve_attn_backend,
)
from sglang.srt.layers.attention.trtllm_mla_backend import TRTLLMMLABackend
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

ODD_DIMS = "with head dimensions that are no multiples of 16"
SWITCH, CHECK = "SGLANG_MLA_FP8_PREFILL", "SGLANG_MLA_FP8_PREFILL_CHECK"

on_both = pytest.mark.parametrize("backend", BACKENDS)
ROPES = [
    pytest.param(dict(rope="default"), id="interleaved"),
    pytest.param(dict(rope="default", is_neox=True), id="neox"),
    pytest.param(dict(rope="yarn"), id="yarn"),
    pytest.param(dict(rope="yarn", is_neox=True), id="yarn-neox"),
    pytest.param(dict(rope=None), id="no-rope"),
]


@pytest.fixture
def unpatched(unpatched_sglang, tmp_path_factory):
    basetemp = tmp_path_factory.getbasetemp()
    return batch_cases.unpatched_results(unpatched_sglang, basetemp)


@pytest.fixture
def flashinfer(monkeypatch):
    """FlashInfer's RoPE: the real one on a GPU, and a stand-in elsewhere."""
    if not HAS_GPU:
        monkeypatch.setattr(mla_fp8_prefill, "is_flashinfer_available", lambda: True)
        monkeypatch.setattr(
            mla_fp8_prefill, "flashinfer", harness.FLASHINFER, raising=False
        )


@pytest.fixture
def no_flashinfer(monkeypatch):
    monkeypatch.setattr(mla_fp8_prefill, "is_flashinfer_available", lambda: False)


class HookCall:
    """The hook, called as the model calls it, and everything it may touch."""

    def __init__(self, env, batch, backend=None):
        env.activate()
        env.pool.kv_buffer[0].copy_(batch.cache_before)
        self.env, self.batch = env, batch
        self.forward_batch = harness.make_forward_batch(env, batch, backend)
        self.forward_batch.attn_backend.init_forward_metadata(self.forward_batch)
        inputs = harness.layer_inputs(env, batch)
        # The layouts of the model: kv_a beside k_pe in one tensor, q_pe inside q.
        latent = torch.cat([inputs.kv_a, inputs.k_pe.squeeze(1)], dim=-1)
        self.kv_a, k_pe = latent.split([env.dims.kv_lora, env.dims.rope], dim=-1)
        self.q, self.k_pe = inputs.q, k_pe.unsqueeze(1)
        self.positions = self.forward_batch.positions
        self.projections = 0
        env.attn.kv_b_proj.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.projections += 1

    def __call__(self, rows: slice = slice(None)):
        with torch.no_grad():
            return prepare_prefill_qkv(
                self.env.attn,
                self.q[rows],
                self.q[rows, :, self.env.dims.nope :],
                self.kv_a[rows],
                self.k_pe[rows],
                self.positions[rows],
                self.forward_batch,
            )

    def assert_refused(self, error: type, match: str):
        with pytest.raises(error, match=match):
            self()
        self.assert_nothing_touched()

    def assert_nothing_touched(self):
        assert self.projections == 0
        cache = self.env.pool.kv_buffer[0]
        assert same_bits(cache, self.batch.cache_before)


def hook_call(backend, batch=dict(extend_lens=[5, 3]), **env) -> HookCall:
    env = make_env(env.pop("dims", Dims.tiny()), backend, **env)
    return HookCall(env, harness.make_batch(env, **batch))


def assert_exact(actual, wanted) -> None:
    """The float64 value rounded once: 99.99% of the bits, and never 1 FP8 value off."""
    off = fp8_ulps(actual, round_fp8(wanted))
    assert off.max() <= 1
    assert (off == 0).double().mean() >= 0.9999


def cache_rows(call: HookCall, slots=None) -> torch.Tensor:
    cache = call.env.pool.kv_buffer[0]
    slots = call.batch.out_cache_loc if slots is None else slots
    return cache[slots, 0].contiguous().view(E4M3)


class TestTaken:
    @on_both
    @pytest.mark.parametrize("rope", ROPES)
    @pytest.mark.parametrize(
        "dims", [Dims.deepseek_v3(2), Dims.odd(5)], ids=["deepseek-v3", "odd"]
    )
    def test_operands_and_cache_rows(self, backend, dims, rope):
        call = hook_call(backend, dict(extend_lens=[21, 1, 8]), dims=dims, **rope)
        inputs = [call.q, call.kv_a, call.k_pe, call.positions]
        before = [x.clone() for x in inputs]
        wanted = harness.expected(call.env, call.batch)
        result = call()
        for name, x in zip(("q", "k", "v"), result):
            assert x.dtype == E4M3 and x.is_contiguous(), name
            assert_exact(x, getattr(wanted, name))
        assert_exact(cache_rows(call), wanted.rows)
        slots = call.batch.out_cache_loc
        assert not slots.equal(slots.sort().values)
        others = torch.ones(call.batch.cache_before.shape[0], dtype=torch.bool)
        others[slots.cpu()] = False
        cache = call.env.pool.kv_buffer[0]
        assert same_bits(cache[others], call.batch.cache_before[others])
        assert all(same_bits(x, y) for x, y in zip(inputs, before))
        assert call.projections == 2  # one of them the reference's

    @on_both
    @pytest.mark.parametrize("rope", ROPES)
    def test_fp16(self, backend, rope):
        call = hook_call(backend, dtype=torch.float16, **rope)
        wanted = harness.expected(call.env, call.batch)
        for name, x in zip(("q", "k", "v"), call()):
            assert_exact(x, getattr(wanted, name))
        assert_exact(cache_rows(call), wanted.rows)

    @on_both
    def test_int32_positions(self, backend):
        call = hook_call(backend)
        wide = call()
        call.positions = call.positions.int()
        assert all(same_bits(x, y) for x, y in zip(call(), wide))

    @pytest.mark.parametrize("scales", [(0.5, None), (None, 4.0), (0.3, 1.7)])
    def test_scales(self, scales):
        k_scale, v_scale = scales
        call = hook_call(
            "trtllm_mla",
            dims=Dims.deepseek_v3(2),
            k_scale=k_scale,
            v_scale=v_scale,
        )
        wanted = harness.expected(call.env, call.batch)
        inverse = [float(torch.tensor(1 / (x or 1.0)).float()) for x in scales]
        q, k, v = call()
        assert_exact(q, wanted.q)
        assert_exact(k, wanted.k * inverse[0])
        assert_exact(v, wanted.v * inverse[1])
        assert_exact(cache_rows(call), wanted.rows)

    def test_kernel_gets_the_scales_back(self):
        run = Run(env=dict(k_scale=0.3, v_scale=1.7), batch={**CHUNKS, "chunks": 2})
        env, batch = run.on("trtllm_mla").build()
        result = run.how(env, batch)
        for call in result.calls:
            assert call.bmm1_scale == 0.3 * env.attn.attn_mha.scaling
            assert call.bmm2_scale == 1.7

    @pytest.mark.parametrize("scales", [(0.5, None), (None, 2.0), (0.5, 2.0)])
    def test_tokenspeed_takes_no_scales(self, scales):
        k_scale, v_scale = scales
        call = hook_call("tokenspeed_mla", k_scale=k_scale, v_scale=v_scale)
        message = f"k_scale_float={k_scale or 1.0} and v_scale_float={v_scale or 1.0}"
        call.assert_refused(AssertionError, message)

    @on_both
    def test_scales_of_one(self, backend):
        plain, scaled = (
            hook_call(backend, **scales)()
            for scales in ({}, dict(k_scale=1.0, v_scale=1.0))
        )
        assert all(same_bits(x, y) for x, y in zip(plain, scaled))

    @on_both
    @pytest.mark.parametrize("producer", ["fused", "composed"])
    def test_more_tokens_than_cache_slots(
        self, backend, producer, flashinfer, monkeypatch
    ):
        monkeypatch.setenv(SWITCH, producer)
        call = hook_call(backend, dims=FOR_FLASHINFER)
        wanted = harness.expected(call.env, call.batch)
        slots = call.batch.out_cache_loc
        written, writer = [], call.env.pool.set_mla_kv_buffer

        def set_mla_kv_buffer(layer, *rows):
            written.append([x.shape[0] for x in rows])
            return writer(layer, *rows)

        call.env.pool.set_mla_kv_buffer = set_mla_kv_buffer
        call.forward_batch.out_cache_loc = slots[:5]
        q, k, v = call()
        assert q.shape[0] == k.shape[0] == v.shape[0] == 8
        assert_exact(cache_rows(call, slots[:5]), wanted.rows[:5])
        rest = call.env.pool.kv_buffer[0][slots[5:]]
        assert same_bits(rest, call.batch.cache_before[slots[5:]])
        assert written == ([[5, 5, 5]] if producer == "composed" else [])

    @on_both
    @pytest.mark.parametrize("rope", ["default", None])
    @pytest.mark.parametrize("producer", ["fused", "composed"])
    def test_no_tokens(self, backend, producer, rope, flashinfer, monkeypatch):
        monkeypatch.setenv(SWITCH, producer)
        call = hook_call(backend, dims=FOR_FLASHINFER, rope=rope)
        call.forward_batch.out_cache_loc = call.batch.out_cache_loc[:0]
        dims = call.env.dims
        shapes = [(0, dims.heads, n) for n in (dims.qk, dims.qk, dims.v)]
        KERNELS.clear()
        assert [tuple(x.shape) for x in call(slice(0, 0))] == shapes
        assert same_bits(call.env.pool.kv_buffer[0], call.batch.cache_before)
        # A grid of no blocks is an error on a GPU.
        assert not KERNELS.counts


class TestComposed:
    """The other producer: the same bits, through FlashInfer and the pool's method."""

    @pytest.mark.parametrize("rope", ROPES)
    @pytest.mark.parametrize(
        "backend, scales",
        [
            ("tokenspeed_mla", {}),
            ("trtllm_mla", {}),
            ("trtllm_mla", dict(k_scale=0.3, v_scale=1.7)),
        ],
    )
    def test_same_as_fused(self, backend, scales, rope, flashinfer, monkeypatch):
        written, writer = [], memory_pool.MLATokenToKVPool.set_mla_kv_buffer

        def set_mla_kv_buffer(pool, layer, loc, *parts):
            written.append([x.dtype for x in parts])
            return writer(pool, layer, loc, *parts)

        monkeypatch.setattr(
            memory_pool.MLATokenToKVPool, "set_mla_kv_buffer", set_mla_kv_buffer
        )
        outcomes = []
        for producer in ("fused", "composed"):
            monkeypatch.setenv(SWITCH, producer)
            KERNELS.clear()
            batch = dict(extend_lens=[5, 3], pad_rows=2)
            call = hook_call(backend, batch, dims=FOR_FLASHINFER, **rope, **scales)
            outcomes.append((*call(), cache_rows(call, call.batch.out_cache_loc[:8])))
            assert not call.env.backend.prefill_declines
            ropes = KERNELS.counts["mla_rope_quantize_fp8"]
            rotated = producer == "composed" and rope["rope"] is not None
            if not HAS_GPU:
                assert ropes == (1 + bool(scales)) * rotated
        # Only the composed one wrote through the pool, and nothing is cast twice.
        assert written == [[E4M3, E4M3]]
        assert all(same_bits(x, y) for x, y in zip(*outcomes))
        assert outcomes[1][0].is_contiguous() and outcomes[1][1].is_contiguous()

    @on_both
    @pytest.mark.parametrize("producer", ["fused", "composed"])
    def test_pool_with_its_own_writer(self, backend, producer, flashinfer, monkeypatch):
        monkeypatch.setenv(SWITCH, producer)
        call = hook_call(backend, dims=FOR_FLASHINFER, pool_class=OwnWriterPool)
        wanted = harness.expected(call.env, call.batch)
        assert call() is not None and call.env.pool.writes == 1
        assert_exact(cache_rows(call), wanted.rows)

    def test_prefill_over_prefix_chunks(self, flashinfer, monkeypatch):
        results = []
        for producer in ("fused", "composed"):
            monkeypatch.setenv(SWITCH, producer)
            run = Run(dict(dims=FOR_FLASHINFER), {**CHUNKS, "chunks": 2})
            results.append(run.on("trtllm_mla").run())
        for name in ("q", "k", "v", "cache", "output"):
            assert same_bits(*(getattr(r, name) for r in results)), name


class UnusualPool(memory_pool.MLATokenToKVPool):
    def _create_buffers(self):
        super()._create_buffers()


class LoadingPool(memory_pool.MLATokenToKVPool):
    def get_key_buffer(self, layer_id):
        return super().get_key_buffer(layer_id)


def pool_args(**changes):
    args = dict(
        size=64,
        page_size=64,
        dtype=E4M3,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        layer_num=1,
        device=DEVICE,
        enable_memory_saver=False,
    )
    return {**args, **changes}


def linear_pool(use_mla: bool):
    args = pool_args()
    del args["layer_num"]
    if not use_mla:
        del args["kv_lora_rank"], args["qk_rope_head_dim"]
    return memory_pool.HybridLinearKVPool(
        **args,
        head_num=2,
        head_dim=8,
        full_attention_layer_ids=[3],
        enable_kvcache_transpose=False,
        mamba_pool=None,
        use_mla=use_mla,
    )


class TestPools:
    @pytest.mark.parametrize(
        "make, producer",
        [
            (lambda: memory_pool.MLATokenToKVPool(**pool_args()), "fused"),
            (lambda: linear_pool(use_mla=True), "fused"),
            (lambda: UnusualPool(**pool_args()), "composed"),
            (lambda: LoadingPool(**pool_args()), "composed"),
            (lambda: OwnWriterPool(**pool_args()), "composed"),
            (
                lambda: memory_pool.MLATokenToKVPool(**pool_args(dtype=torch.bfloat16)),
                None,
            ),
            (
                lambda: memory_pool.MLATokenToKVPool(
                    **pool_args(dtype=torch.float8_e5m2)
                ),
                None,
            ),
            (
                lambda: batch_cases.nsa_pool(
                    **pool_args(kv_lora_rank=512, qk_rope_head_dim=64)
                ),
                None,
            ),
            (lambda: linear_pool(use_mla=False), None),
        ],
        ids=[
            "plain",
            "hybrid-linear",
            "own-buffer",
            "own-accessor",
            "own-writer",
            "bf16",
            "e5m2",
            "nsa-656-byte-rows",
            "hybrid-linear-mha",
        ],
    )
    def test_producer(self, make, producer):
        assert mla_fp8_prefill._pool_producer(make()) == producer

    @on_both
    def test_another_pool_is_looked_at_anew(self, backend, no_flashinfer):
        call = hook_call(backend)
        assert call() is not None
        other = make_env(Dims.tiny(), backend, pool_class=OwnWriterPool).pool
        plain, call.forward_batch.token_to_kv_pool = call.env.pool, other
        assert call() is None
        call.forward_batch.token_to_kv_pool = plain
        assert call() is not None
        declines = call.env.backend.prefill_declines
        assert declines == {"KV pool without FlashInfer": 1}

    @on_both
    def test_dimensions_that_flashinfer_does_not_take(self, backend, flashinfer):
        call = hook_call(backend, dims=Dims.odd(3), pool_class=OwnWriterPool)
        assert call() is None and call.env.pool.writes == 0
        declines = call.env.backend.prefill_declines
        assert declines == {f"KV pool {ODD_DIMS}": 1}


class TestDeclines:
    """Besides the cases of test_every_batch.py."""

    @on_both
    @pytest.mark.parametrize(
        "name, reason",
        [
            ("no-metadata", "no prefill metadata"),
            ("fallback", "FlashInfer's own prefill runs the batch"),
            ("piecewise", "CUDA graph"),
            ("breakable", "CUDA graph"),
            ("speculative", "speculative batch"),
            ("activation-dtype", "activation dtype"),
        ],
    )
    def test_as_unpatched(self, name, reason, backend, unpatched):
        """Prepare steps that SGLang's dispatch does not choose, chosen all the same."""
        run = batch_cases.HOOK_RUNS[name].on(backend)
        env, batch = run.build()
        result, before = run.how(env, batch), unpatched[f"{name}-{backend}"]
        assert env.backend.prefill_declines == {reason: 1}
        assert result.method == before.method == "MHA_CHUNKED_KV"
        assert result.q.dtype == env.dtype
        for part in ("q", "k", "v", "cache"):
            assert same_bits(getattr(result, part), getattr(before, part)), part

    def more_slots(self, call):
        slots = call.batch.out_cache_loc
        call.forward_batch.out_cache_loc = torch.cat([slots, slots[:1] * 0])

    def three_positions_each(self, call):
        call.positions = torch.stack([call.positions] * 3)

    def a_position_too_many(self, call):
        call.positions = torch.cat([call.positions, call.positions[:1]])

    def bf16_cosines(self, call):
        rotary = copy.copy(call.env.attn.rotary_emb)
        call.env.attn.rotary_emb = rotary
        # nn.Module keeps its buffers in a dictionary that copy shares.
        rotary._buffers = dict(rotary._buffers)
        rotary.cos_sin_cache = rotary.cos_sin_cache.bfloat16()

    def narrow_cosines(self, call):
        rotary = copy.copy(call.env.attn.rotary_emb)
        call.env.attn.rotary_emb = rotary
        rotary._buffers = dict(rotary._buffers)
        rotary.cos_sin_cache = rotary.cos_sin_cache[:, :4].contiguous()

    @on_both
    @pytest.mark.parametrize(
        "change, reason",
        [
            (more_slots, "more cache slots than tokens"),
            (three_positions_each, "positions that are not one for each token"),
            (a_position_too_many, "positions that are not one for each token"),
            (narrow_cosines, "rotary embedding"),
            (bf16_cosines, "cosines not in float32"),
        ],
    )
    def test_touches_nothing(self, change, reason, backend):
        call = hook_call(backend)
        change(self, call)
        inputs = [call.q, call.kv_a, call.k_pe, call.positions]
        before = [x.clone() for x in inputs]
        assert call() is None and call() is None
        # Two layers of one batch.
        assert call.env.backend.prefill_declines == {reason: 1}
        call.assert_nothing_touched()
        assert all(same_bits(x, y) for x, y in zip(inputs, before))

    @on_both
    def test_are_counted_by_the_batch(self, backend):
        """A batch keeps its metadata through all layers."""
        call = hook_call(backend)
        self.more_slots(call)
        for count in (1, 2):
            assert call() is None and call() is None
            reason = "more cache slots than tokens"
            assert call.env.backend.prefill_declines == {reason: count}
            call.env.backend.init_forward_metadata(call.forward_batch)

    @on_both
    def test_are_not_logged(self, backend, caplog):
        call = hook_call(backend)
        self.more_slots(call)
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            assert call() is None
        assert not caplog.records

    @on_both
    def test_a_rope_is_looked_at_once(self, backend, monkeypatch):
        looked, look = [], mla_fp8_prefill._is_plain_rope

        def is_plain_rope(*args):
            looked.append(args)
            return look(*args)

        monkeypatch.setattr(mla_fp8_prefill, "_is_plain_rope", is_plain_rope)
        call = hook_call(backend)
        assert call() is not None and call() is not None
        assert len(looked) == 1


class TestSwitch:
    @on_both
    @pytest.mark.parametrize("value", ["off", "OFF", "Off"])
    def test_off(self, value, backend, monkeypatch):
        monkeypatch.setenv(SWITCH, value)
        call = hook_call(backend)
        assert call() is None
        call.assert_nothing_touched()
        assert not call.env.backend.prefill_declines

    @on_both
    @pytest.mark.parametrize("value", ["", "on", "fuse", "1"])
    def test_anything_else_is_an_error(self, value, backend, monkeypatch):
        monkeypatch.setenv(SWITCH, value)
        with pytest.raises(ValueError, match=f"{SWITCH} must be .*'{value}'"):
            make_env(Dims.tiny(), backend)

    @on_both
    def test_is_read_once(self, backend, monkeypatch):
        call = hook_call(backend)
        monkeypatch.setenv(SWITCH, "off")
        monkeypatch.setenv(CHECK, "1")
        call.positions = call.positions + 0
        assert call() is not None
        assert not call.env.backend._check_prefill_indices

    def test_default_is_fused(self, monkeypatch):
        monkeypatch.delenv(SWITCH, raising=False)
        assert mla_fp8_prefill.envs.SGLANG_MLA_FP8_PREFILL.get() == "fused"
        assert mla_fp8_prefill.envs.SGLANG_MLA_FP8_PREFILL_CHECK.get() is False


class TestNoHook:
    def test_backends_have_none_by_default(self):
        assert AttentionBackend.prepare_prefill_qkv is None
        call = hook_call("trtllm_mla")
        call.forward_batch.attn_backend = batch_cases.RaggedBackend()
        assert call() is None
        call.assert_nothing_touched()

    @on_both
    def test_without_the_attribute(self, backend):
        """A backend that is no AttentionBackend, as plugins have."""
        call = hook_call(backend)
        call.forward_batch.attn_backend = SimpleNamespace()
        assert call() is None

    @on_both
    def test_none_is_as_switched_off(self, backend, unpatched):
        """Bit-identical to the unpatched SGLang's run of the case "off"."""
        run = Run(
            batch={**CHUNKS, "chunks": 2, "pad_rows": 3}, how=batch_cases.in_nan_memory
        )
        env, batch = run.on(backend).build()
        env.backend.prepare_prefill_qkv = None
        result, before = run.how(env, batch), unpatched[f"off-{backend}"]
        assert result.q.dtype == torch.bfloat16
        for name in ("q", "k", "v", "cache"):
            assert same_bits(getattr(result, name), getattr(before, name)), name
        n = batch.tokens
        assert same_bits(result.output[:n], before.output[:n])


class TestResolve:
    def resolve(self, env, backend, mode="EXTEND", layer_id=0):
        batch = SimpleNamespace(attn_backend=backend, forward_mode=ForwardMode[mode])
        return resolve_attn_backend(batch, layer_id)

    @pytest.fixture(scope="class")
    def env(self):
        return make_env(Dims.tiny(), "tokenspeed_mla")

    @pytest.fixture(scope="class")
    def other(self, env):
        return harness.make_backend(env, "trtllm_mla")

    def test_bare(self, env):
        assert self.resolve(env, env.backend) is env.backend

    def test_two_batch_overlap(self, env, other):
        tbo = harness.wrap_tbo(env.backend, [other, other])
        assert self.resolve(env, tbo) is env.backend

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
        wanted = env.backend if prefill else other
        assert self.resolve(env, hybrid, mode) is wanted

    def test_hybrid_linear(self, env):
        wrapper = harness.wrap_hybrid_linear(env.backend, [1, 3])
        assert self.resolve(env, wrapper, layer_id=3) is env.backend
        linear = wrapper.linear_attn_backend
        assert self.resolve(env, wrapper, layer_id=2) is linear

    @pytest.mark.parametrize("order", ["thl", "tlh", "htl", "hlt", "lht", "lth", "hh"])
    @pytest.mark.parametrize("mode", ["EXTEND", "DECODE"])
    def test_nested(self, order, mode, env, other):
        """t, h and l from the outside in; decode leaves at the first h."""
        backend = env.backend
        for wrapper in reversed(order):
            if wrapper == "t":
                backend = harness.wrap_tbo(backend, [])
            elif wrapper == "l":
                backend = harness.wrap_hybrid_linear(backend, [5])
            else:
                backend = harness.wrap_hybrid(env, prefill=backend, decode=other)
        wanted = env.backend if mode == "EXTEND" else other
        assert self.resolve(env, backend, mode, layer_id=5) is wanted

    def test_a_linear_layer_has_no_hook(self, env):
        call = HookCall(env, harness.make_batch(env, [5, 3]))
        call.forward_batch.attn_backend = harness.wrap_hybrid_linear(env.backend, [7])
        assert call() is None


class TestQuantizedOnce:
    @on_both
    def test_kernel_gets_what_the_hook_returned(self, backend, monkeypatch):
        """The tensors themselves: nothing is cast, copied or moved in between."""
        scales = {} if backend == "tokenspeed_mla" else dict(k_scale=0.3, v_scale=1.7)
        run = Run(env=scales, batch={**CHUNKS, "chunks": 2}).on(backend)
        handed = []
        for name in ("prepare_prefill_qkv", "pack_prefix_chunk_kv"):
            method = getattr(MLAFP8PrefillMixin, name)

            def remember(*args, method=method, **kwargs):
                handed.append(method(*args, **kwargs))
                return handed[-1]

            monkeypatch.setattr(MLAFP8PrefillMixin, name, remember)
        result = run.run()
        prepared, *chunks = handed
        q = prepared[0]
        assert [len(x) for x in handed] == [3, 2, 2]
        for call, operands in zip(result.calls, [prepared, *((q, *c) for c in chunks)]):
            assert call.data_ptrs == tuple(x.data_ptr() for x in operands)
            for name, x in zip(("q", "k", "v"), operands):
                assert same_bits(getattr(call, name), x)


class TestPrefixChunks:
    @on_both
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_packing(self, backend, dtype):
        env = make_env(Dims.tiny(), backend, dtype=dtype)
        batch = SimpleNamespace(
            attn_backend=harness.wrap_tbo(harness.wrap_hybrid_linear(env.backend), []),
            forward_mode=ForwardMode.EXTEND,
        )
        layer, parts = env.attn.attn_mha, (4, env.dims.heads)
        k_nope = torch.randn(*parts, env.dims.nope, device=DEVICE).to(dtype)
        k_pe = torch.randn(4, 1, env.dims.rope, device=DEVICE).to(dtype)
        v = torch.randn(*parts, env.dims.v, device=DEVICE).to(dtype)
        q = torch.zeros(1, device=DEVICE)
        assert prefix_chunk_packing(q.to(dtype), layer, batch) == (dtype, None)
        latent_dtype, pack = prefix_chunk_packing(q.to(E4M3), layer, batch)
        assert latent_dtype == dtype
        k_fp8, v_fp8 = pack(k_nope, k_pe, v)
        k = torch.cat([k_nope, k_pe.expand(*parts, -1)], dim=-1)
        assert same_bits(k_fp8, round_fp8(k)) and same_bits(v_fp8, round_fp8(v))

    def test_packing_divides_by_the_scales(self):
        env = make_env(Dims.tiny(), "trtllm_mla", k_scale=0.5, v_scale=4.0)
        k_nope, k_pe, v = (
            torch.randn(6, heads, size, device=DEVICE).bfloat16()
            for heads, size in ((3, 16), (1, 8), (3, 16))
        )
        k_fp8, v_fp8 = env.backend.pack_prefix_chunk_kv(
            k_nope, k_pe, v, env.attn.attn_mha
        )
        k = torch.cat([k_nope, k_pe.expand(-1, 3, -1)], dim=-1)
        assert same_bits(k_fp8, round_fp8(k.double() / 0.5))
        assert same_bits(v_fp8, round_fp8(v.double() / 4.0))

    @on_both
    @pytest.mark.parametrize("switch", ["fused", "off"])
    def test_latent_is_gathered_in_the_models_dtype(self, backend, switch, monkeypatch):
        gathered, gather = [], memory_pool.MLATokenToKVPool.get_mla_kv_buffer

        def get_mla_kv_buffer(pool, layer, loc, dst_dtype=None):
            gathered.append(dst_dtype)
            return gather(pool, layer, loc, dst_dtype)

        monkeypatch.setattr(
            memory_pool.MLATokenToKVPool, "get_mla_kv_buffer", get_mla_kv_buffer
        )
        run = Run(batch={**CHUNKS, "chunks": 3}, environ={SWITCH: switch})
        result = run.on(backend).run()
        assert result.q.dtype == (E4M3 if switch == "fused" else torch.bfloat16)
        assert gathered == [torch.bfloat16] * 3

    @on_both
    @pytest.mark.parametrize("chunks", [0, 1, 4])
    def test_launches_and_casts(self, backend, chunks, unpatched):
        """What stands between kv_b_proj and the attention kernel, for N chunks.

        Patched: one launch for q, k, v and the cache rows, and for each chunk one to
        gather and one to pack; nothing is cast outside of them. Unpatched: q is cast
        N + 1 times, k and v once each and once for each chunk, and the two parts of
        the cache rows; RoPE, the rows and each gather are launches, beside the copies.
        """
        run = batch_cases.HOOK_RUNS[f"counted-{chunks}"].on(backend)
        env, batch = run.build()
        after = run.how(env, batch).counts
        before = unpatched[f"counted-{chunks}-{backend}"].counts
        dims = env.dims

        def casts(counts, *shape):
            return counts["cast", shape]

        n, h = batch.tokens, dims.heads
        # k of the extension has q's shape, k of a chunk has not.
        assert casts(before, n, h, dims.qk) == (chunks + 1) + 1
        assert casts(before, n, h, dims.v) == 1
        keys = batch.prefix_lens[0] // (chunks or 1)
        assert casts(before, keys, h, dims.qk) == chunks
        assert casts(before, keys, h, dims.v) == chunks
        assert casts(before, n, 1, dims.kv_lora) == casts(before, n, 1, dims.rope) == 1
        assert not [key for key in after if key[0] == "cast"]

        names = [key[1] for key in after if key[0] == "launch"]
        assert after["launch", "_mla_prefill_quantize_fp8_kernel"] == 1
        assert after["launch", "get_mla_kv_buffer_kernel"] == chunks
        assert after["launch", "_mla_kv_pack_quantize_fp8_kernel"] == chunks
        assert "set_mla_kv_buffer_kernel" not in names
        assert "_fp8_quantize_kernel" not in names
        assert before["launch", "set_mla_kv_buffer_kernel"] == 1
        assert before["launch", "get_mla_kv_buffer_kernel"] == chunks
        if not HAS_GPU:
            assert before["apply_rope_with_cos_sin_cache_inplace"] == 1
            assert "apply_rope_with_cos_sin_cache_inplace" not in after


class TestOutputBuffers:
    @pytest.mark.parametrize("switch", ["fused", "off"])
    def test_are_not_filled_before_the_kernel(self, switch):
        run = Run(
            batch={**CHUNKS, "chunks": 2, "pad_rows": 3},
            how=batch_cases.in_nan_memory,
            environ={SWITCH: switch},
        )
        result = run.on("trtllm_mla").run()
        assert len(result.calls) == 3
        for call in result.calls:
            assert call.arguments["out_before"].isnan().all()
        assert result.output.isfinite().all() and (result.output[9:] == 0).all()


class TestRowsWithoutKeys:
    """Requests without a prefix, in a batch where others have one."""

    @on_both
    @pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 10, 16])
    def test_zero_and_minus_infinity(self, heads, backend):
        env = make_env(Dims.tiny(heads), backend)
        env.backend.num_prefill_tokens = 8
        out = torch.randn(10, heads, env.dims.v, device=DEVICE).bfloat16()
        lse = torch.randn(10, heads, device=DEVICE)
        wanted = out.clone(), lse.clone()
        for rows in (slice(3, 5), slice(6, 8)):
            wanted[0][rows], wanted[1][rows] = 0, -torch.inf
        KERNELS.clear()
        env.backend._fixup_zero_kv_rows(
            out,
            lse,
            torch.tensor([4, 0, 2, 0], dtype=torch.int32, device=DEVICE),
            torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32, device=DEVICE),
            3,
        )
        assert same_bits(out, wanted[0]) and same_bits(lse, wanted[1])
        if not HAS_GPU:
            # SGLang's kernel writes four heads at a time, at addresses of 16 bytes.
            assert KERNELS.counts["fixup_zero_kv_rows"] == (heads % 4 == 0)


class NoFp8Pool(memory_pool.MLATokenToKVPool):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.nsa_kv_cache_store_fp8 = True


class TestStartUp:
    def test_tokenspeed_compiles_what_it_runs(self):
        harness.forget_compiled_kernels()
        run = Run(batch={**CHUNKS, "chunks": 2}).on("tokenspeed_mla")
        env, batch = run.build()
        causal_and_lse = [(True, True), (True, False), (False, True)]
        assert [c[3:5] for c in KERNELS.compiled] == causal_and_lse
        assert {c[0] for c in KERNELS.compiled} == {E4M3}
        assert {c[1:3] for c in KERNELS.compiled} == {(env.dims.qk, env.dims.v)}
        no_prefix = harness.make_batch(env, [4])
        for some in (batch, no_prefix):
            assert not harness.run_prefill(env, some).late_compiles
        assert {c.causal for c in harness.run_prefill(env, batch).calls} == {
            True,
            False,
        }

    @pytest.mark.parametrize(
        "producer, wanted",
        [
            ("fused", {}),
            ("composed", {"_fp8_quantize_kernel": 2}),
        ],
    )
    def test_kernels_run_before_the_first_request(
        self, producer, wanted, flashinfer, monkeypatch
    ):
        """On a GPU at start; they are the ones that the requests launch."""
        monkeypatch.setenv(SWITCH, producer)
        env = make_env(FOR_FLASHINFER, "trtllm_mla")
        KERNELS.clear()
        with batch_cases._counted():
            env.backend._compile_prefill_kernels(None)
        launched = {k[1]: n for k, n in KERNELS.counts.items() if k[0] == "launch"}
        assert launched == {
            "_mla_prefill_quantize_fp8_kernel": 1,
            "_mla_kv_pack_quantize_fp8_kernel": 1,
            **wanted,
        }
        if not HAS_GPU:
            ropes = KERNELS.counts["mla_rope_quantize_fp8"]
            assert ropes == (producer == "composed")

    @pytest.mark.parametrize("producer", ["fused", "composed"])
    def test_each_variant_of_the_model(self, producer, flashinfer, monkeypatch):
        monkeypatch.setenv(SWITCH, producer)
        layers = [
            make_env(FOR_FLASHINFER, "trtllm_mla", **env).attn
            for env in (
                dict(rope="default"),
                dict(rope="yarn"),
                dict(rope="default", is_neox=True),
                dict(rope=None),
                dict(rope=None, k_scale=0.5, v_scale=4.0),
            )
        ]
        other = torch.nn.Module()
        other.attn_mha = layers[0].attn_mha
        model = torch.nn.Sequential(other, *layers)
        backend = make_env(FOR_FLASHINFER, "trtllm_mla").backend
        variants = {(False, 1, 1), (True, 1, 1), (None, 1, 1), (None, 2.0, 0.25)}
        assert backend._prefill_variants(model) == variants
        KERNELS.clear()
        with batch_cases._counted():
            backend._compile_prefill_kernels(model)
        launches = KERNELS.counts["launch", "_mla_prefill_quantize_fp8_kernel"]
        assert launches == len(variants)
        if not HAS_GPU:
            ropes = KERNELS.counts["mla_rope_quantize_fp8"]
            assert ropes == 2 * (producer == "composed")

    @pytest.mark.parametrize(
        "layer",
        [
            dict(rope="default"),
            dict(rope="yarn", is_neox=True),
            dict(rope=None),
            dict(k_scale=0.5, v_scale=4.0),
            dict(v_scale=4.0, dtype=torch.float16),
        ],
    )
    def test_requests_launch_what_ran_at_start(self, layer, monkeypatch):
        """All that a kernel is compiled for was seen: its constants and its types."""
        launched = set()

        class Seen(mla_prefill_module.Launcher):
            def __call__(self, num_programs, tensors, numbers):
                types = tuple(
                    None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors
                )
                constants = tuple(self._constexprs.items())
                launched.add((self._kernel.__name__, constants, types))
                return super().__call__(num_programs, tensors, numbers)

        run = Run(env=dict(dims=FOR_FLASHINFER, **layer), batch={**CHUNKS, "chunks": 2})
        env, batch = run.on("trtllm_mla").build()
        for module in (mla_prefill_module, mla_kv_pack_module):
            monkeypatch.setattr(module, "_PLANS", {})
            monkeypatch.setattr(module, "Launcher", Seen)
        env.backend._compile_prefill_kernels(torch.nn.Sequential(env.attn))
        at_start = set(launched)
        assert len(at_start) == 2
        launched.clear()
        for some in (batch, harness.make_batch(env, [1])):
            harness.run_prefill(env, some)
        assert launched == at_start

    def test_a_layer_whose_scales_are_refused(self):
        """The first batch says so; a server with such a checkpoint starts."""
        env = make_env(Dims.tiny(), "tokenspeed_mla", k_scale=0.5)
        model = torch.nn.Sequential(env.attn)
        assert env.backend._prefill_variants(model) == {(False, 1.0, 1.0)}

    @pytest.mark.parametrize(
        "device, environ, skip_prefill, compiled",
        [
            ("cuda", {}, False, 1),
            ("cuda:1", {}, False, 1),
            ("cuda", {SWITCH: "off"}, False, 0),
            ("cuda", {}, True, 0),
            ("cpu", {}, False, 0),
        ],
    )
    def test_when_they_run(self, device, environ, skip_prefill, compiled, monkeypatch):
        env, _ = Run().on("trtllm_mla").build()
        models, env.runner.model = [], object()
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        env.backend._compile_prefill_kernels = models.append
        env.backend.device, env.backend.skip_prefill = device, skip_prefill
        env.backend.init_fp8_prefill(env.runner)
        assert models == [env.runner.model] * compiled

    def lines(self, caplog):
        name = mla_fp8_prefill.__name__
        return [r.getMessage() for r in caplog.records if r.name == name]

    @pytest.fixture
    def log(self, caplog):
        mla_fp8_prefill._log_once.cache_clear()
        with caplog.at_level(logging.INFO):
            yield lambda: self.lines(caplog)
        mla_fp8_prefill._log_once.cache_clear()

    @pytest.mark.parametrize(
        "environ, env, outcome",
        [
            ({}, {}, "with the fused producer"),
            ({SWITCH: "off"}, {}, f"declined, {SWITCH}=off"),
            (
                {SWITCH: "composed"},
                {},
                f"declined, {SWITCH}=composed without FlashInfer",
            ),
            (
                {},
                dict(pool_class=NoFp8Pool),
                "declined, NoFp8Pool takes no FP8 rows",
            ),
            (
                {},
                dict(pool_class=OwnWriterPool),
                "declined, OwnWriterPool without FlashInfer",
            ),
            (
                {},
                dict(cache_dtype=torch.bfloat16),
                "declined, the KV cache is torch.bfloat16, not torch.float8_e4m3fn",
            ),
            (
                {},
                dict(dtype=torch.float32),
                "declined, the model is torch.float32, not bfloat16 or float16",
            ),
            (
                {},
                dict(dims=Dims.deepseek_v3(1), pool_class=batch_cases.nsa_pool),
                "declined, NSATokenToKVPool takes no FP8 rows",
            ),
        ],
    )
    def test_one_line(self, environ, env, outcome, log, no_flashinfer):
        for _ in range(2):
            Run(env=env, environ=environ).on("trtllm_mla").build()
        assert log() == [f"TRTLLMMLABackend: FP8 prefill preparation {outcome}"]

    @pytest.mark.parametrize(
        "environ, env, outcome",
        [
            ({SWITCH: "composed"}, {}, "with the composed producer"),
            ({}, dict(pool_class=OwnWriterPool), "with the composed producer"),
            (
                {},
                dict(pool_class=OwnWriterPool, dims=Dims.odd(3)),
                f"declined, OwnWriterPool {ODD_DIMS}",
            ),
            (
                {SWITCH: "composed"},
                dict(dims=Dims.odd(3)),
                f"declined, {SWITCH}=composed {ODD_DIMS}",
            ),
        ],
    )
    def test_one_line_with_flashinfer(self, environ, env, outcome, log, flashinfer):
        env = {"dims": FOR_FLASHINFER, **env}
        Run(env=env, environ=environ).on("tokenspeed_mla").build()
        (line,) = log()
        assert line == f"TokenspeedMLABackend: FP8 prefill preparation {outcome}"

    def test_a_line_for_each_backend(self, log):
        for backend in BACKENDS:
            make_env(Dims.tiny(), backend)
        assert [line.split(":")[0] for line in log()] == [
            "TokenspeedMLABackend",
            "TRTLLMMLABackend",
        ]

    def test_rank_0_only(self, log, monkeypatch):
        monkeypatch.setattr(
            "sglang.srt.distributed.get_tensor_model_parallel_rank", lambda: 1
        )
        make_env(Dims.tiny(), "trtllm_mla")
        assert log() == []

    def test_none_from_a_backend_without_prefill(self, log):
        """The steps of a draft model decode only."""
        env = make_env(Dims.tiny(), "trtllm_mla")
        mla_fp8_prefill._log_once.cache_clear()
        before = len(log())
        TRTLLMMLABackend(
            env.runner,
            skip_prefill=True,
            kv_indptr_buf=torch.zeros(9, dtype=torch.int32, device=DEVICE),
            q_indptr_decode_buf=torch.zeros(9, dtype=torch.int32, device=DEVICE),
        )
        assert len(log()) == before


class OwnLayoutPool(OwnWriterPool):
    """A buffer whose rows are not slots."""

    def get_key_buffer(self, layer_id):
        return super().get_key_buffer(layer_id)[:1]


class TestIndexCheck:
    @pytest.fixture(autouse=True)
    def check(self, monkeypatch):
        monkeypatch.setenv(CHECK, "1")

    @on_both
    @pytest.mark.parametrize("value", [512, -1])
    def test_position(self, value, backend):
        call = hook_call(backend, max_context=512)
        assert call.env.cos_sin_cache.shape[0] == 512
        call.positions = call.positions.clone()
        call.positions[3], call.positions[6] = value, value
        message = rf"positions\[3\] = {value} is out of range \[0, 512\) in layer 0"
        call.assert_refused(IndexError, message)

    @on_both
    @pytest.mark.parametrize("value", [576, -7])
    def test_cache_slot(self, value, backend):
        call = hook_call(backend, slots=512)
        slots = call.batch.out_cache_loc.clone()
        slots[5], slots[7] = value, value
        call.forward_batch.out_cache_loc = slots
        message = rf"out_cache_loc\[5\] = {value} is out of range \[0, 576\) in layer 0"
        call.assert_refused(IndexError, message)

    @on_both
    @pytest.mark.parametrize("rope", ["default", None])
    def test_valid_indices(self, backend, rope):
        call = hook_call(backend, rope=rope, slots=512, max_context=512)
        call.positions = call.positions.clone()
        call.positions[0] = 511
        slots = call.batch.out_cache_loc.clone()
        slots[0], slots[1] = 575, 0
        call.forward_batch.out_cache_loc = slots
        assert call() is not None

    @pytest.mark.parametrize("dims", [dict(nope=24), dict(rope=8)])
    def test_composed_needs_dimensions_of_16s(self, dims, flashinfer, monkeypatch):
        """FlashInfer's RoPE would write past the rows of others."""
        monkeypatch.setenv(SWITCH, "composed")
        dims = dataclasses.replace(Dims.tiny(), **dims)
        call = hook_call("trtllm_mla", dims=dims)
        assert call() is None
        call.assert_nothing_touched()
        monkeypatch.setenv(SWITCH, "fused")
        call = hook_call("trtllm_mla", dims=dims, pool_class=OwnWriterPool)
        assert call() is None
        assert call.env.backend.prefill_declines == {f"KV pool {ODD_DIMS}": 1}
        call.assert_nothing_touched()

    @pytest.mark.parametrize("value", [512, 3])
    def test_composed_checks_positions(self, value, flashinfer):
        """A pool with its own writer has slots that only it knows."""
        call = hook_call(
            "trtllm_mla",
            dims=FOR_FLASHINFER,
            pool_class=OwnLayoutPool,
            max_context=512,
        )
        call.positions = call.positions.clone()
        call.positions[1] = value
        if value < 512:
            assert call() is not None
            return
        with pytest.raises(IndexError, match=r"positions\[1\] = 512"):
            call()
        assert call.env.pool.writes == 0

    @on_both
    def test_no_positions_without_rope(self, backend):
        call = hook_call(backend, rope=None)
        call.positions = call.positions + 10**6
        assert call() is not None
