"""Every kind of batch of batch_cases.py, patched against unpatched.

The unpatched SGLang runs all of them once, in a process of its own.
"""

import re
from pathlib import Path

import batch_cases
import mla_harness as harness
import pytest
import torch
from batch_cases import BACKENDS, CASES, E4M3, OUTPUT_BOUND, Case
from mla_harness import fp8_ulps, round_fp8, same_bits

from sglang.srt.layers.attention import mla_fp8_prefill
from sglang.srt.layers.attention.mla_fp8_prefill import MLAFP8PrefillMixin

DOCUMENT = Path(__file__).parents[2] / "docs/batches.md"


def cases_of(test: str):
    """The cases and backends that this test is named for in the table."""
    return pytest.mark.parametrize(
        "case, backend",
        [
            pytest.param(case, backend, id=f"{case.name}-{backend}")
            for case in CASES
            for backend in BACKENDS
            if case.test(backend) == test
        ],
    )


@pytest.fixture
def unpatched(unpatched_sglang, tmp_path_factory):
    basetemp = tmp_path_factory.getbasetemp()
    return batch_cases.unpatched_results(unpatched_sglang, basetemp)


@pytest.fixture
def asked(monkeypatch) -> list[bool]:
    """For every time the hook is asked, whether it took the batch."""
    answers = []
    hook = MLAFP8PrefillMixin.prepare_prefill_qkv

    def prepare_prefill_qkv(self, **kwargs):
        answer = hook(self, **kwargs)
        answers.append(answer is not None)
        return answer

    monkeypatch.setattr(MLAFP8PrefillMixin, "prepare_prefill_qkv", prepare_prefill_qkv)
    return answers


@pytest.fixture
def run(monkeypatch):
    """Run a case on this process's SGLang, with or without FlashInfer as it says."""

    def run(case: Case, backend: str):
        available = case.flashinfer or (
            harness.HAS_GPU and not case.name.endswith("no-flashinfer")
        )
        monkeypatch.setattr(
            mla_fp8_prefill, "is_flashinfer_available", lambda: available
        )
        if not harness.HAS_GPU:
            monkeypatch.setattr(
                mla_fp8_prefill, "flashinfer", harness.FLASHINFER, raising=False
            )
        env, batch = case.run.on(backend).build()
        return env, batch, case.run.how(env, batch)

    return run


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(E4M3)


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def assert_within(after, before, ulps: int, what: str) -> None:
    """At most so many FP8 values apart, but for what overflow made NaN before."""
    kept = ~before.float().isnan()
    distance = fp8_ulps(after, before)[kept]
    assert distance.numel() == 0 or distance.max() <= ulps, what


def real_rows(call) -> tuple[torch.Tensor, ...]:
    n, m = call.cu_q[-1], call.cu_kv[-1]
    return call.q[:n], call.k[:m], call.v[:m]


@cases_of("test_taken")
def test_taken(case, backend, run, asked, unpatched):
    """Against the unpatched SGLang, and both against float64.

    - What has no RoPE is BF16 on both sides and rounded once, to nearest: equal bits.
      k_scale and v_scale are divided by in float32 on both sides, but by reciprocals
      that may differ in their last bit: one FP8 value.
    - RoPE is float32 on both sides; the unpatched side rounds its result to BF16 and
      that to FP8, the hook once. The middle between two FP8 values is a BF16 value, so
      rounding to BF16 can move a value onto it, never across: one FP8 value, and never
      to a nearer one.
    - BF16 lies 16 times as dense as FP8, so 1 in 16 results is moved onto a middle, and
      half of those are then rounded the other way, by one FP8 value, 2^-4 to 2^-3 of
      them: 1.6% of the root mean square of the elements with RoPE, less of all of q and
      k. The output follows the logits: OUTPUT_BOUND is twice that.
    """
    env, batch, after = run(case, backend)
    before = unpatched[f"{case.name}-{backend}"]
    dims, n = env.dims, batch.tokens
    assert asked and all(asked)
    assert not env.backend.prefill_declines
    assert after.method == before.method
    assert after.q.dtype == after.k.dtype == after.v.dtype == E4M3
    assert not after.late_compiles

    exact = harness.expected(env, batch)
    wanted = dict(
        q=exact.q[:n],
        k=exact.k[:n] * float32(1 / env.k_scale),
        v=exact.v[:n] * float32(1 / env.v_scale),
    )
    causal = [real_rows(call) for call in after.calls if call.causal]
    causal_before = [real_rows(call) for call in before.calls if call.causal]
    for i, (name, value) in enumerate(wanted.items()):
        ours = torch.cat([rows[i] for rows in causal])
        theirs = torch.cat([rows[i] for rows in causal_before])
        off = fp8_ulps(ours, round_fp8(value))
        assert off.max() <= 1 and (off == 0).double().mean() >= 0.9999, name
        limited = value.clamp(-448, 448)
        error, error_before = ((x.double() - limited).abs() for x in (ours, theirs))
        nearer = error <= error_before + 1e-6 * limited.abs()
        assert (nearer | error_before.isnan()).all(), name

    assert len(after.calls) == len(before.calls)
    scaled = (0, int(env.k_scale != 1.0), int(env.v_scale != 1.0))
    for ours, theirs in zip(after.calls, before.calls):
        for name in ("name", "cu_q", "cu_kv", "causal", "return_lse"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.dtypes == (E4M3,) * 3 and all(ours.contiguous)
        assert ours.bmm1_scale == theirs.bmm1_scale
        assert ours.bmm2_scale == theirs.bmm2_scale
        pairs = zip(("q", "k", "v"), real_rows(ours), real_rows(theirs), scaled)
        for name, a, b, ulps in pairs:
            nope = dims.v if name == "v" else dims.nope
            assert_within(a[..., :nope], b[..., :nope], ulps, name)
            assert_within(a[..., nope:], b[..., nope:], 1, f"{name} with RoPE")

    slots = batch.out_cache_loc[:n]
    rows, rows_before = fp8(after.rows(slots)), fp8(before.rows(slots))
    off = fp8_ulps(rows, round_fp8(exact.rows[:n]))
    assert off.max() <= 1 and (off == 0).double().mean() >= 0.9999
    lora = dims.kv_lora
    assert_within(rows[:, :lora], rows_before[:, :lora], 0, "latent")
    assert_within(rows[:, lora:], rows_before[:, lora:], 1, "rotated k_pe")
    others = torch.ones(after.cache.shape[0], dtype=torch.bool, device=harness.DEVICE)
    others[batch.out_cache_loc] = False
    assert same_bits(after.cache[others], batch.cache_before[others])

    if case.name != "inf-and-nan":
        assert after.attn_output.isfinite().all() and after.output.isfinite().all()
        assert (after.attn_output[n:] == 0).all() and (after.output[n:] == 0).all()
    if before.attn_output[:n].isfinite().all():
        difference = harness.relative_error(
            after.attn_output[:n], before.attn_output[:n]
        )
        assert difference < OUTPUT_BOUND


def assert_identical(after, before, tokens: int) -> None:
    """Equal bits everywhere, in the rows of real tokens.

    Rows of padding are what the allocator handed out without the patch, and zero with
    it.
    """
    assert after.method == before.method
    for name in ("q", "k", "v", "cache", "attn_output", "output"):
        ours, theirs = getattr(after, name), getattr(before, name)
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        if name in ("attn_output", "output"):
            assert (ours[tokens:] == 0).all()
            ours, theirs = ours[:tokens], theirs[:tokens]
        assert same_bits(ours, theirs), name
    assert len(after.calls) == len(before.calls)
    for ours, theirs in zip(after.calls, before.calls):
        for name in ("q", "k", "v"):
            assert same_bits(getattr(ours, name), getattr(theirs, name)), name
        for name in ("name", "cu_q", "cu_kv", "causal", "bmm1_scale", "bmm2_scale"):
            assert getattr(ours, name) == getattr(theirs, name), name


@cases_of("test_declined")
def test_declined(case, backend, run, asked, unpatched):
    """Asked, refused for the reason in the table, and bit-identical."""
    env, batch, after = run(case, backend)
    assert asked and not any(asked)
    reason = case.outcome(backend).reason
    if env.backend._prefill_off is not None:
        assert env.backend._prefill_off == reason
        assert not env.backend.prefill_declines
    else:
        assert env.backend.prefill_declines == {reason: 1}
    assert_identical(after, unpatched[f"{case.name}-{backend}"], batch.tokens)


@cases_of("test_untouched")
def test_untouched(case, backend, run, asked, unpatched):
    """Never asked, and bit-identical."""
    env, batch, after = run(case, backend)
    assert not asked
    assert_identical(after, unpatched[f"{case.name}-{backend}"], batch.tokens)


@cases_of("test_refused")
def test_refused(case, backend, asked):
    """The error names what is wrong, and comes before anything is computed."""
    env, batch = case.run.on(backend).build()
    projected = []
    env.attn.kv_b_proj.register_forward_pre_hook(lambda *_: projected.append(1))
    message = re.escape(case.outcome(backend).reason)
    with pytest.raises((AssertionError, IndexError), match=message):
        case.run.how(env, batch)
    assert not projected and not asked
    assert same_bits(env.pool.kv_buffer[0], batch.cache_before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hicache", "hybrid-linear-pool"])
def test_a_layer_in_transfer_is_waited_for(name, backend, run):
    """Before the direct write, by the number that the pool counts layers with."""
    (case,) = [case for case in CASES if case.name == name]
    env, batch = case.run.on(backend).build()
    batch_cases.loading_by_layer(env)
    case.run.how(env, batch)
    (layer, cache), *_ = env.pool.layer_transfer_counter.waits
    assert layer == env.attn.layer_id
    assert same_bits(cache, batch.cache_before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_saturates(backend, run, unpatched):
    """Without the patch it is what torch's cast makes of it: NaN on a GPU."""
    (case,) = [case for case in CASES if case.name == "beyond-448"]
    env, batch, after = run(case, backend)
    before = unpatched[f"{case.name}-{backend}"]
    n, exact = batch.tokens, harness.expected(env, batch)
    cast = torch.tensor(1e4, device=harness.DEVICE).to(E4M3).float()
    ours = *real_rows(after.calls[0]), fp8(after.rows(batch.out_cache_loc[:n]))
    theirs = *real_rows(before.calls[0]), fp8(before.rows(batch.out_cache_loc[:n]))
    wanted = exact.q[:n], exact.k[:n], exact.v[:n], exact.rows[:n]
    for a, b, value in zip(ours, theirs, wanted):
        overflow = value.abs() > 500
        assert overflow.any()
        assert a.float()[overflow].equal(448 * value[overflow].sign().float())
        unpatched_made = b.float()[overflow].abs()
        assert unpatched_made.allclose(cast, rtol=0, atol=0, equal_nan=True)
        assert a.float().isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_saturates_and_nan_stays(backend, run):
    (case,) = [case for case in CASES if case.name == "inf-and-nan"]
    env, batch, after = run(case, backend)
    for call in after.calls:
        _, k, v = (x.float() for x in real_rows(call))
        assert (v[:, 0, 0].abs() == 448).all() and v[:, 0, 1].isnan().all()
        v[:, 0, 1] = 0
        assert v.isfinite().all() and k.isfinite().all()
    attention = after.attn_output
    assert attention[:, 0, 1].isnan().all()
    attention[:, 0, 1] = 0
    assert attention.isfinite().all()


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_document_is_generated_from_the_table():
    """`python test/support/batch_cases.py > docs/batches.md` writes it."""
    assert DOCUMENT.read_text() == batch_cases.batches_document()
