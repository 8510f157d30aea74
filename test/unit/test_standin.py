"""The stand-ins for the attention kernels, against attention one row at a time."""

import ast
import inspect
import json
import math

import pytest
import torch
from mla_standin import install, kernels
from sglang_cpu import DEVICE

E4M3 = torch.float8_e4m3fn
Q_LENS, KV_LENS = [3, 1, 4], [5, 0, 6]
HAS_KEYS = [0, 1, 2, 4, 5, 6, 7]
HEADS, QK, V = 2, 192, 128


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """The stand-ins as a server has them, whoever set them otherwise before."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "SETTINGS", kernels.Settings())
    monkeypatch.setattr(kernels, "RECORD", kernels.Record(str(tmp_path)))
    monkeypatch.setattr(kernels, "compiled_kernels", {})
    return kernels.SETTINGS


def recorded() -> dict:
    kernels.RECORD.write()
    return json.loads(kernels.RECORD.path.read_text())


def ragged(dtype=E4M3):
    """q with two rows of padding, k and v, and their cumulated lengths."""
    shapes = [(sum(Q_LENS) + 2, HEADS, QK), (11, HEADS, QK), (11, HEADS, V)]
    operands = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
    cu_q = torch.tensor([0, 3, 4, 8], dtype=torch.int32, device=DEVICE)
    cu_kv = torch.tensor([0, 5, 5, 11], dtype=torch.int32, device=DEVICE)
    return *operands, cu_q, cu_kv


def naive_attention(q, k, v, scale, causal):
    """One request, one row and one head at a time, in float64."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    q, k, v = (x.double().cpu() for x in (q, k, v))
    for i in range(q.shape[0]):
        visible = k.shape[0] - q.shape[0] + i + 1 if causal else k.shape[0]
        if visible <= 0:
            continue
        for h in range(q.shape[1]):
            weights = (scale * (k[:visible, h] @ q[i, h])).exp()
            out[i, h] = weights @ v[:visible, h] / weights.sum()
            lse[i, h] = weights.sum().log()
    return out, lse


def naive_ragged(q, k, v, scale, causal):
    q, k, v = q[: sum(Q_LENS)].split(Q_LENS), k.split(KV_LENS), v.split(KV_LENS)
    parts = [naive_attention(*x, scale, causal) for x in zip(q, k, v)]
    return tuple(torch.cat(x) for x in zip(*parts))


def tokenspeed(q, k, v, cu_q, cu_kv, *, causal=True, **changes):
    arguments = dict(
        query=q,
        key=k,
        value=v,
        seq_lens=cu_kv.diff(),
        cum_seq_lens=cu_kv,
        max_seq_len=6,
        batch_size=3,
        softmax_scale=0.1,
        is_causal=causal,
        return_lse=True,
        cum_seq_lens_q=cu_q,
        max_seq_len_q=4,
    )
    return kernels.tokenspeed_mla_prefill(**{**arguments, **changes})


def trtllm(q, k, v, cu_q, cu_kv, *, causal=True, **changes):
    arguments = dict(
        query=q,
        key=k,
        value=v,
        workspace_buffer=None,
        seq_lens=cu_kv.diff(),
        max_q_len=4,
        max_kv_len=6,
        bmm1_scale=0.1,
        bmm2_scale=3.0,
        o_sf_scale=1.0,
        batch_size=3,
        window_left=-1,
        cum_seq_lens_q=cu_q,
        cum_seq_lens_kv=cu_kv,
        enable_pdl=False,
        is_causal=causal,
        return_lse=True,
    )
    return kernels.trtllm_ragged_attention_deepseek(**{**arguments, **changes})


BOTH = pytest.mark.parametrize("prefill", [tokenspeed, trtllm])
CAUSAL = pytest.mark.parametrize("causal", [False, True])
CLOSE = dict(rtol=1e-5, atol=1e-5)


@CAUSAL
def test_tokenspeed(causal):
    operands = ragged()
    out, lse = tokenspeed(*operands, causal=causal)
    wanted, wanted_lse = naive_ragged(*operands[:3], 0.1, causal)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out[:8].cpu(), wanted.bfloat16(), rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(lse[:8].cpu(), wanted_lse.float(), **CLOSE)
    assert (out[3] == 0).all() and (lse[3] == -math.inf).all()
    assert out[8:].isnan().all() and lse[8:].isnan().all()


@CAUSAL
@pytest.mark.parametrize("natural", [False, True])
def test_trtllm(causal, natural, settings):
    settings.natural_lse = natural
    operands = ragged()
    given = torch.full((10, HEADS, V), 7.0, device=DEVICE)
    out, lse = trtllm(*operands, causal=causal, out=given)
    wanted, wanted_lse = naive_ragged(*operands[:3], 0.1, causal)
    wanted_lse = wanted_lse if natural else wanted_lse / math.log(2)
    assert out is given
    actual = out[HAS_KEYS].cpu(), lse[HAS_KEYS].cpu()
    torch.testing.assert_close(actual[0], (3 * wanted).float()[HAS_KEYS], **CLOSE)
    torch.testing.assert_close(actual[1], wanted_lse.float()[HAS_KEYS], **CLOSE)
    assert out[3].isnan().all() and lse[3].isnan().all()
    assert (out[8:] == 7).all() and lse[8:].isnan().all()


def test_long_rows_come_in_blocks(monkeypatch):
    q, k, v = (torch.randn(40, 3, d, device=DEVICE) for d in (16, 16, 8))
    whole = kernels.ragged_attention(q, k, v, [0, 40], [0, 40], 0.3, True)
    # Seven rows of logits.
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 7 * 3 * 40 * 4)
    blocks = kernels.ragged_attention(q, k, v, [0, 40], [0, 40], 0.3, True)
    wanted = naive_attention(q, k, v, 0.3, True)
    for a, b, c in zip(whole, blocks, wanted):
        torch.testing.assert_close(b, a, **CLOSE)
        torch.testing.assert_close(b.cpu(), c.float(), **CLOSE)


@BOTH
def test_a_request_does_not_depend_on_its_batch(prefill):
    q, k, v, cu_q, cu_kv = ragged()
    out, lse = prefill(q, k, v, cu_q, cu_kv)
    alone = dict(batch_size=1)
    last = [x[i:].contiguous() for x, i in ((q[:8], 4), (k, 5), (v, 5))]
    starts = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (4, 6)]
    out_alone, lse_alone = prefill(*last, *starts, **alone)
    assert out_alone.equal(out[4:8]) and lse_alone.equal(lse[4:8])


@BOTH
def test_operands_that_a_real_kernel_refuses_or_misreads(prefill, settings):
    q, k, v, cu_q, cu_kv = ragged()
    with pytest.raises(TypeError, match="bfloat16"):
        prefill(q, k, v.bfloat16(), cu_q, cu_kv)
    wide = torch.zeros(10, HEADS, QK + 16, device=DEVICE).to(E4M3)
    prefill(wide[..., :QK], k, v, cu_q, cu_kv)
    with pytest.raises(ValueError, match="query at"):
        prefill(wide[..., 1 : QK + 1], k, v, cu_q, cu_kv)
    uneven = torch.zeros(10, HEADS, QK + 8, device=DEVICE).to(E4M3)
    with pytest.raises(ValueError, match="query at"):
        prefill(uneven[..., :QK], k, v, cu_q, cu_kv)
    with pytest.raises(ValueError, match="last dimension"):
        backwards = v.transpose(1, 2).contiguous().transpose(1, 2)
        prefill(q, k, backwards, cu_q, cu_kv)
    with pytest.raises(ValueError, match="shapes"):
        prefill(q, k[:9], v, cu_q, cu_kv)
    with pytest.raises(ValueError, match="batch of 2"):
        prefill(q, k, v, cu_q, cu_kv, batch_size=2)
    with pytest.raises(ValueError, match="ends at 11"):
        prefill(q, k[:9], v[:9], cu_q, cu_kv)
    longest = "max_seq_len" if prefill is tokenspeed else "max_kv_len"
    with pytest.raises(ValueError, match="longest request of 5"):
        prefill(q, k, v, cu_q, cu_kv, **{longest: 5})
    with pytest.raises(ValueError, match="head dimensions"):
        prefill(q, k, v[..., :64].contiguous(), cu_q, cu_kv)
    settings.any_head_dim = True
    prefill(q, k, v[..., :64].contiguous(), cu_q, cu_kv)


def test_trtllm_refuses_an_fp8_output():
    operands = ragged()
    with pytest.raises(ValueError, match="out of torch.float8"):
        trtllm(*operands, out=torch.empty(10, HEADS, V, device=DEVICE).to(E4M3))


@BOTH
def test_record(prefill):
    q, k, v, cu_q, cu_kv = ragged()
    prefill(q, k, v, cu_q, cu_kv)
    prefill(q, k, v, cu_q, cu_kv)
    k[10, 0, 0] = math.nan
    wide = torch.zeros(10, HEADS, QK + 16, device=DEVICE).to(E4M3)
    prefill(wide[..., :QK], k, v, cu_q, cu_kv, causal=False)
    record = recorded()
    first, second = record["calls"]
    assert (first["count"], first["tokens"], first["causal"]) == (2, 16, True)
    assert first["q_dtype"] == first["v_dtype"] == "float8_e4m3fn"
    assert first["contiguous"] and first["padded"] and first["requests_without_keys"]
    assert (second["count"], second["causal"], second["contiguous"]) == (
        1,
        False,
        False,
    )
    # The NaN's request has 4 rows, and one head sees it.
    assert record["nan"] == {"q": 0, "k": 1, "v": 0, "out": 4 * V}


def test_padding_may_hold_nan():
    q, k, v, cu_q, cu_kv = ragged()
    q[8:] = math.nan
    tokenspeed(q, k, v, cu_q, cu_kv)
    assert not any(recorded()["nan"].values())


def test_compiled_late():
    operands = ragged()
    config = (E4M3, QK, V, True, True, False, False)
    package = install.tokenspeed_module()
    package.mla_prefill._compiled_kernels[config] = (
        package.mla_prefill._compile_prefill_kernel(*config)
    )
    tokenspeed(*operands)
    assert kernels.RECORD.compiled == [config] and not kernels.RECORD.late_compiles
    tokenspeed(*operands, causal=False)
    tokenspeed(*operands, causal=False)
    assert [c[3] for c in kernels.RECORD.late_compiles] == [False]


def test_listener_hears_before_the_checks(settings):
    heard = []
    settings.listener = heard.append
    q, k, v, cu_q, cu_kv = ragged()
    with pytest.raises(TypeError):
        tokenspeed(q, k, v.bfloat16(), cu_q, cu_kv)
    assert heard[0]["v"].dtype == torch.bfloat16 and heard[0]["cu_q"] == [0, 3, 4, 8]


@BOTH
def test_without_computing_nothing_is_written(prefill, settings):
    settings.compute = False
    q, k, v, cu_q, cu_kv = ragged()
    out, lse = prefill(q, k, v, cu_q, cu_kv)
    assert out.shape == (10, HEADS, V) and lse.shape == (10, HEADS)
    given = torch.full((10, HEADS, V), 7.0, device=DEVICE)
    if prefill is trtllm:
        assert trtllm(q, k, v, cu_q, cu_kv, out=given)[0].eq(7).all()


LORA, ROPE, PAGE = 512, 64, 32
SEQ_LENS = [70, 0, 33]


def decode_inputs(queries=2, heads=4):
    query = torch.randn(3, queries, heads, LORA + ROPE, device=DEVICE).to(E4M3)
    cache = torch.randn(9, 1, PAGE, LORA + ROPE, device=DEVICE).to(E4M3)
    tables = torch.tensor([[4, 1, 7, 0], [0, 0, 0, 0], [8, 2, 0, 0]])
    lens = torch.tensor(SEQ_LENS, dtype=torch.int32, device=DEVICE)
    return query, cache, tables.int().to(DEVICE), lens


def decode(name, *inputs, scale=0.05, out_scale=2.0, **changes):
    query, cache, tables, lens = inputs
    workspace = torch.empty(16, dtype=torch.int8, device=DEVICE)
    arguments = dict(
        query=query,
        kv_cache=cache,
        workspace_buffer=workspace,
        kv_lora_rank=LORA,
        qk_rope_head_dim=ROPE,
        block_tables=tables,
        seq_lens=lens,
        max_seq_len=128,
    )
    if name == "tokenspeed":
        arguments |= dict(softmax_scale=scale, output_scale=out_scale)
        return kernels.tokenspeed_mla_decode(**{**arguments, **changes})
    arguments |= dict(qk_nope_head_dim=128, bmm1_scale=scale, bmm2_scale=out_scale)
    return kernels.trtllm_batch_decode_with_kv_cache_mla(**{**arguments, **changes})


DECODES = pytest.mark.parametrize("name", ["tokenspeed", "trtllm"])


@DECODES
@pytest.mark.parametrize("queries", [1, 2])
def test_decode(name, queries):
    query, cache, tables, lens = decode_inputs(queries)
    out = decode(name, query, cache, tables, lens)
    assert out.shape == (3, queries, 4, LORA) and out.dtype == torch.bfloat16
    assert out[1].isnan().all()
    for i in (0, 2):
        pages = [cache[page, 0] for page in tables[i].tolist()]
        rows = torch.cat([page.float() for page in pages])[: SEQ_LENS[i]]
        rows = rows[:, None].expand(-1, 4, -1)
        wanted, _ = naive_attention(query[i], rows, rows[..., :LORA], 0.05, True)
        actual = out[i].cpu().double()
        torch.testing.assert_close(actual, 2 * wanted, rtol=8e-3, atol=1e-5)
    record = recorded()
    assert record["calls"][0]["tokens"] == 3
    # The request without keys is padding.
    assert not any(record["nan"].values())


@DECODES
def test_decode_counts_nan(name):
    query, cache, tables, lens = decode_inputs()
    cache[8, 0, 5, 7] = math.nan
    decode(name, query, cache, tables, lens)
    # All of a request that sees it: two queries of four heads.
    assert recorded()["nan"] == {"q": 0, "k": 0, "v": 0, "out": 2 * 4 * LORA}


@DECODES
def test_decode_refuses(name):
    query, cache, tables, lens = decode_inputs()
    for match, changes in {
        "bfloat16": dict(query=query.bfloat16()),
        "block_tables": dict(block_tables=tables.long()),
        "seq_lens": dict(seq_lens=lens.long()),
        "kv_lora_rank 448": dict(kv_lora_rank=448, qk_rope_head_dim=128),
        "wide rows": dict(kv_lora_rank=448),
        "a request of 70": dict(max_seq_len=69),
        "pages of 16": dict(kv_cache=cache.view(18, 1, 16, LORA + ROPE)),
        "strides": dict(kv_cache=cache.repeat(1, 2, 1, 1)[:, :1]),
    }.items():
        if match == "pages of 16":
            changes["block_tables"] = tables.repeat(1, 2)
        with pytest.raises((TypeError, ValueError), match=match):
            decode(name, query, cache, tables, lens, **changes)


def test_odd_page_tables():
    query, cache, tables, lens = decode_inputs()
    with pytest.raises(ValueError, match="multiple of 128"):
        decode("trtllm", query, cache, tables[:, :3].contiguous(), lens)
    decode("tokenspeed", query, cache, tables[:, :3].contiguous(), lens)
    workspace = torch.empty(16, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="workspace"):
        decode("tokenspeed", *decode_inputs(), workspace_buffer=workspace)


def test_signatures_take_what_sglang_passes():
    """Every argument in SGLang's calls exists, by SGLang's own source."""
    from sglang.srt.layers.attention import tokenspeed_mla_backend, trtllm_mla_backend

    sources = inspect.getsource(tokenspeed_mla_backend)
    sources += inspect.getsource(trtllm_mla_backend)
    for name in (
        "tokenspeed_mla_prefill",
        "tokenspeed_mla_decode",
        "trtllm_ragged_attention_deepseek",
        "trtllm_batch_decode_with_kv_cache_mla",
    ):
        calls = sources.split(f".{name}(")[1:]
        assert calls, f"SGLang does not call {name}"
        parameters = inspect.signature(getattr(kernels, name)).parameters
        for call in calls:
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(call[end], 0)
                end += 1
            parsed = ast.parse(f"f({call[:end]}", mode="eval").body
            passed = {keyword.arg for keyword in parsed.keywords}
            assert not parsed.args and passed <= parameters.keys()
