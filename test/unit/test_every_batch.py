"""Every kind of batch of batch_cases.py: exact where it is taken or corrected, else the
unpatched SGLang's bits."""

import contextlib
import importlib
from collections import Counter
from pathlib import Path

import batch_cases
import batch_runs
import mla_harness as harness
import pytest
import torch
from batch_cases import BACKENDS, CASES, COMPARED, FORCED
from gpu_stand_ins import forget_compiled_kernels, runs_fa3
from mla_harness import reference, same_bits
from sglang_internals import (
    FA3_HAS_KV_SCALES,
    RELEASE,
    DSATokenToKVPool,
    backend_class,
    has_own_hook,
)

from prefill_patch.releases import ordered
from sglang.srt.layers.attention import mla_fp8_prefill
from sglang.srt.layers.attention.mla_fp8_prefill import MLAFP8PrefillMixin
from sglang.srt.layers.attention.mla_fp8_prefill_counts import BatchCounts
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

DOCUMENT = Path(__file__).parents[2] / "docs/batches.md"
E4M3 = torch.float8_e4m3fn
KERNEL = {
    "tokenspeed_mla": "tokenspeed_mla_prefill",
    "cutedsl_mla": "trtllm_ragged_attention_deepseek",
    "trtllm_mla": "trtllm_ragged_attention_deepseek",
    "fa3": "flash_attn_varlen_func",
}
# BF16 rounding of the attention output, and three FP8 operands, rounded twice where a
# part of the batch reads from the cache what another has written, or the weights too, by
# FlashAttention-3.
BF16_NOISE, FP8_NOISE = 0.01, 0.06
REREADING = ("tbo-children-split-request", "chunked-prefill", "scales-chunked-prefill")


# What SGLang itself raises on, or gets wrong. tokenspeed_mla asserts that scales are 1, or
# its hook divides by none, and before 0.5.20 wants RoPE; cutedsl_mla's gathers prefixes of
# an FP16 model in BF16; fa3's kernel multiplies by scales that nothing has divided by.
NOT_COMPARED = {
    "tokenspeed_mla": ["scales"],
    "cutedsl_mla": ["scales", "fp16"],
    "fa3": ["scales"] if FA3_HAS_KV_SCALES else [],
}
if ordered("0.5.13") <= ordered(RELEASE.version) < ordered("0.5.20"):
    NOT_COMPARED["tokenspeed_mla"].append("no-rope")


def cases_of(test: str, among=CASES):
    """The cases and backends that this test is named for in the table."""
    return pytest.mark.parametrize(
        "case, backend",
        [
            pytest.param(case, backend, id=f"{case.name}-{backend}")
            for case in among
            for backend in BACKENDS
            if case.test(backend) == test and batch_cases.runnable(case, backend)
        ],
    )


class HookCalls:
    """What went through the hook."""

    def __init__(self, batch_counts):
        self.batch_counts = batch_counts
        # For every call, whether it took the batch.
        self.taken: list[bool] = []
        # The addresses of the operands that it made for each call of the kernel.
        self.operands: list[tuple[int, ...]] = []
        # The dtypes of what was written through the pool's own method.
        self.written: list[list[torch.dtype]] = []

    @property
    def counted(self) -> Counter[tuple[str, str]]:
        """The batches, by (outcome, reason)."""
        return self.batch_counts(None).by_outcome


@pytest.fixture
def hook(monkeypatch) -> HookCalls:
    batch_counts = mla_fp8_prefill.cache_once(BatchCounts)
    monkeypatch.setattr(mla_fp8_prefill, "batch_counts", batch_counts)
    calls = HookCalls(batch_counts)
    prepare_name = RELEASE.renamed("prepare_prefill_qkv")
    prepare = getattr(MLAFP8PrefillMixin, prepare_name)
    gather = MLAFP8PrefillMixin.gather_prefix_chunk_kv
    write = MLATokenToKVPool.set_mla_kv_buffer

    def prepare_prefill_qkv(self, **kwargs):
        before = len(calls.operands)
        qkv = prepare(self, **kwargs)
        # What it has gathered itself is among its own.
        del calls.operands[before:]
        calls.taken.append(qkv is not None)
        if qkv is not None:
            calls.operands.append(tuple(x.data_ptr() for x in qkv))
        return qkv

    def gather_prefix_chunk_kv(self, *args, **kwargs):
        kv = gather(self, *args, **kwargs)
        q = calls.operands[-1][:1] if calls.operands else ()
        calls.operands.append((*q, *(x.data_ptr() for x in kv)))
        return kv

    def set_mla_kv_buffer(pool, layer, loc, *parts):
        calls.written.append([x.dtype for x in parts])
        return write(pool, layer, loc, *parts)

    monkeypatch.setattr(MLAFP8PrefillMixin, prepare_name, prepare_prefill_qkv)
    monkeypatch.setattr(
        MLAFP8PrefillMixin, "gather_prefix_chunk_kv", gather_prefix_chunk_kv
    )
    monkeypatch.setattr(MLATokenToKVPool, "set_mla_kv_buffer", set_mla_kv_buffer)
    return calls


@pytest.fixture
def run(flashinfer):
    """Run a case on this process's SGLang: (env, batch, result)."""

    def run(case, backend: str):
        if case.flashinfer is not None:
            flashinfer(case.flashinfer)
        forget_compiled_kernels()
        env, batch = case.scenario.on(backend).build()
        return env, batch, case.scenario.how(env, batch)

    return run


def new_rows(result, batch) -> torch.Tensor:
    return result.cache[batch.out_cache_loc[: batch.tokens], 0].view(E4M3)


@cases_of("test_taken")
def test_taken(case, backend, run, hook, log):
    """Operands and cache rows are the float64 results rounded once, and what the
    attention kernel gets; the layer's output is the attention of these operands."""
    env, batch, result = run(case, backend)
    n, exact = batch.tokens, harness.expected(env, batch)
    start = f"{type(env.backend).__name__}: FP8 prefill preparation"
    assert f"{start} with the {case.producer} producer" in log()
    assert not [line for line in log() if "decline" in line]
    assert not [line for line in log("log-sum-exps") if "not found" in line]
    assert hook.taken and all(hook.taken)
    assert hook.counted == {("taken", ""): len(hook.taken)}

    if case.name == "beyond-448":
        assert all(x.abs().max() > 448 for x in exact)

    causal = [call.real_rows() for call in result.calls if call.causal]
    wanted_causal = harness.expected_causal(env, batch, result)
    sums_fp8 = env.attn.kv_b_proj.weight.dtype == E4M3
    slack = 2**-7 if sums_fp8 and harness.HAS_GPU else 0.0
    for parts, wanted in zip(zip(*causal), zip(*wanted_causal)):
        reference.assert_fp8(torch.cat(parts), torch.cat(wanted), slack)
    if len(causal) == 1:  # else each part of the batch has chunks of its own
        chunks = [call.real_rows() for call in result.calls if not call.causal]
        one_shot = result.method == "MHA_ONE_SHOT"
        wanted_chunks = [] if one_shot else harness.expected_chunks(env, batch)
        assert len(chunks) == len(wanted_chunks)
        for (_, *kv), wanted in zip(chunks, wanted_chunks):
            reference.assert_fp8(kv[0], wanted[0], slack)
            reference.assert_fp8(kv[1], wanted[1], slack)
    assert [call.data_ptrs for call in result.calls] == hook.operands
    for call in result.calls:
        assert call.name == KERNEL[backend] and call.contiguous
        k_scale, v_scale = env.scales
        assert call.bmm1_scale == pytest.approx(k_scale * env.attn.scaling)
        # tokenspeed_mla's kernel has none: its output is multiplied.
        assert call.bmm2_scale == pytest.approx(
            v_scale if env.backend.prefill_kernel_has_v_scale else 1.0
        )
    assert not result.late_compiles

    reference.assert_fp8(new_rows(result, batch), exact.rows[:n])
    others = torch.ones(len(result.cache), dtype=torch.bool, device=harness.DEVICE)
    others[batch.out_cache_loc[:n]] = False
    # Where padding is written, by the pool's own method and on fa3.
    others[0] &= case.producer == "fused" and backend != "fa3"
    assert same_bits(result.cache[others], batch.cache_before[others])
    through_the_pool = case.producer == "composed"
    assert hook.written == [[E4M3, E4M3]] * len(causal) * through_the_pool

    attention = result.attn_output[:n]
    wanted = harness.expected_attention(env, batch, result)
    assert wanted.isnan().any() == (case.name == "inf-and-nan")
    assert attention.isnan().equal(wanted.isnan())
    in_fp8 = case.name in REREADING or any(map(runs_fa3, result.calls))
    noise = FP8_NOISE if in_fp8 else BF16_NOISE
    error = harness.relative_error(attention.nan_to_num(0), wanted.nan_to_num(0))
    assert error < noise
    if backend != "fa3":
        assert (result.attn_output[n:] == 0).all() and (result.output[n:] == 0).all()


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_farther_from_exact_than_unpatched(name, backend, run, unpatched):
    """What has no RoPE is BF16 on both sides and rounded once: equal bits; scales are
    divided by in float32, by reciprocals that may differ in their last bit. RoPE is
    float32 on both sides; the unpatched one rounds its result to BF16 and that to FP8.
    The middle between two FP8 values is a BF16 value, so rounding to BF16 can move a
    value onto it, never across: one FP8 value, and never to a nearer one."""
    case = batch_cases.case_named(name)
    if case.test(backend) != "test_taken":
        pytest.skip(case.outcome(backend).reason)
    if name in NOT_COMPARED.get(backend, ()):
        pytest.skip("SGLang's own is wrong")
    env, batch, after = run(case, backend)
    before, n = unpatched(case, backend), batch.tokens
    exact, dims = harness.expected(env, batch), env.dims
    (causal,) = harness.expected_causal(env, batch, after)
    assert after.method == before.method
    assert [c.cu_kv for c in after.calls] == [c.cu_kv for c in before.calls]
    scaled = env.scales != (1.0, 1.0)
    for i, (ours, theirs) in enumerate(zip(after.calls, before.calls)):
        pairs = [*zip(ours.real_rows(), theirs.real_rows(), causal, "qkv")]
        if i == 0:
            rows = new_rows(after, batch), new_rows(before, batch)
            pairs.append((*rows, exact.rows[:n], "rows"))
        for a, b, wanted, operand in pairs:
            # An overflow may be NaN without the patch.
            kept = ~b.float().isnan()
            steps = reference.ulps_off(a, b) * kept
            assert steps.max() <= 1, operand
            plain = {"v": dims.v, "rows": dims.lora}.get(operand, dims.nope)
            if not scaled or operand in ("q", "rows"):
                assert not steps[..., :plain].any(), operand
            if ours.causal:
                limited = wanted.clamp(-448, 448)
                error, error_before = ((x.double() - limited).abs() for x in (a, b))
                nearer = error <= error_before + 1e-6 * limited.abs()
                assert (nearer | ~kept).all(), operand


def assert_identical(after, before, tokens: int, backend: str) -> None:
    """Equal bits everywhere, in the rows of real tokens.

    Rows of padding are what the allocator handed out without the patch, and with it but
    on fa3, zero.
    """
    assert after.method == before.method
    for name in ("q", "k", "v", "cache", "attn_output", "output"):
        ours, theirs = getattr(after, name), getattr(before, name)
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        if name in ("attn_output", "output"):
            assert backend == "fa3" or (ours[tokens:] == 0).all()
            ours, theirs = ours[:tokens], theirs[:tokens]
        assert same_bits(ours, theirs), name
    assert len(after.calls) == len(before.calls)
    for ours, theirs in zip(after.calls, before.calls):
        for name in ("q", "k", "v"):
            assert same_bits(getattr(ours, name), getattr(theirs, name)), name
        for name in ("name", "cu_q", "cu_kv", "causal", "bmm1_scale", "bmm2_scale"):
            assert getattr(ours, name) == getattr(theirs, name), name


@cases_of("test_declined", CASES + FORCED)
def test_declined(case, backend, run, hook, log, unpatched):
    """The hook says no, the log says why, once, and the bits are the unpatched ones."""
    env, batch, result = run(case, backend)
    assert hook.taken and not any(hook.taken)
    start = f"{type(env.backend).__name__}: FP8 prefill preparation"
    reason = case.outcome(backend).reason
    lines = [line for line in log() if line.endswith(f": {reason}")]
    wanted = {f"{start} declined: {reason}", f"{start} declines a batch: {reason}"}
    assert lines and wanted.issuperset(lines) and len(lines) == len(set(lines))
    assert sum(hook.counted.values()) == len(hook.taken)
    assert {said for _, said in hook.counted} == {reason}
    assert_identical(result, unpatched(case, backend), batch.tokens, backend)


@cases_of("test_untouched")
def test_untouched(case, backend, run, hook, unpatched):
    _, batch, result = run(case, backend)
    assert not hook.taken
    assert_identical(result, unpatched(case, backend), batch.tokens, backend)


@cases_of("test_corrected")
def test_corrected(case, backend, run, hook, unpatched_results):
    """SGLang's own path attends rightly, which without the patch it does not."""
    env, batch, result = run(case, backend)
    assert not any(hook.taken)
    with torch.no_grad():
        attention = harness.expected_attention(env, batch, result)
        wanted = env.attn.o_proj(attention.flatten(1).to(env.dtype))[0]
    n = batch.tokens
    assert harness.relative_error(result.output[:n], wanted) < FP8_NOISE
    assert (result.output[n:] == 0).all()
    before = unpatched_results[case.name, backend]
    if isinstance(before, str):
        assert (
            "AssertionError: tokenspeed_mla prefill kernel has no per-tensor" in before
        )
    else:
        assert harness.relative_error(before.output[:n], wanted) > 5 * FP8_NOISE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hicache", "hybrid-linear-pool", "one-shot-prefix"])
def test_only_the_gather_of_a_prefix_waits_for_a_layer_in_transfer(name, backend, run):
    """As in SGLang: the new rows are in the cache before anything is waited for."""
    case = batch_cases.case_named(name)
    env, batch = case.scenario.on(backend).build()
    if case.test(backend) != "test_taken" and has_own_hook(env.backend):
        pytest.skip("SGLang's hook reads no prefix in one shot")
    batch_runs.loading_by_layer(env)
    result = case.scenario.how(env, batch)
    waits = env.pool.layer_transfer_counter.waits
    assert len(waits) == len(batch.chunk_lens())
    for layer, cache in waits:
        assert layer == 0 and same_bits(cache, result.cache)


# Pools whose rows are [lora + rope] and that add to MLATokenToKVPool for other layers.
PLAIN_POOLS = {memory_pool.MLATokenToKVPool, DSATokenToKVPool}


def test_the_kernel_writes_into_no_pool_with_methods_of_its_own():
    """As those of unified memory and of interleaved pages, where there are."""
    for module in ("unified_memory_pool", "page_interleave_pool"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"sglang.srt.mem_cache.{module}")
    sglang = subclasses(memory_pool.MLATokenToKVPool)
    for one in filter(lambda one: one.__module__.startswith("sglang."), sglang):
        pool = one.__new__(one)
        vars(pool).update(dtype=E4M3, kv_lora_rank=32, qk_rope_head_dim=64)
        pool.kv_cache_dim = 96
        plain = mla_fp8_prefill._pool_producer(pool) == "fused"
        assert plain == (one in PLAIN_POOLS), one
        pool.kv_cache_dim = 100
        assert mla_fp8_prefill._pool_producer(pool) is None


def subclasses(one: type) -> set[type]:
    return {one}.union(*map(subclasses, one.__subclasses__()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_patch_hides_no_method_of_sglang_nor_the_other_way_round(backend):
    mixins = {MLAFP8PrefillMixin, mla_fp8_prefill.FA3FP8PrefillMixin}
    ours = {name for one in mixins for name in vars(one) if not name.startswith("__")}
    # The patch sets them in SGLang's classes itself.
    ours -= {name for name in ours if name.startswith("prefill_kernel_")}
    if RELEASE.renamed("prepare_prefill_qkv") == "prepare_prefill_qkv":
        ours.remove("prepare_prefill_qkv")
    for base in set(backend_class(backend).__mro__) - mixins:
        assert not vars(base).keys() & ours, base


def test_names_are_unique():
    names = [case.name for case in CASES + FORCED]
    assert len(names) == len(set(names))


def test_document_is_generated_from_the_table():
    """`python test/support/batch_cases.py > docs/batches.md` writes it."""
    assert DOCUMENT.read_text() == batch_cases.batches_document()
