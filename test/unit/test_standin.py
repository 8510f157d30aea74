"""The stand-ins for the attention kernels, against attention one row at a time."""

import ast
import importlib.util
import inspect
import json
import math
from pathlib import Path

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


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ragged() -> dict:
    """q with two rows of padding, k and v, and their cumulated lengths."""
    shapes = dict(q=(10, HEADS, QK), k=(11, HEADS, QK), v=(11, HEADS, V))
    operands = {
        name: torch.randn(shape, device=DEVICE).to(E4M3)
        for name, shape in shapes.items()
    }
    return {**operands, "cu_q": int32([0, 3, 4, 8]), "cu_kv": int32([0, 5, 5, 11])}


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


def naive_ragged(q, k, v, causal, **lens):
    requests = zip(q[:8].split(Q_LENS), k.split(KV_LENS), v.split(KV_LENS))
    parts = [naive_attention(*request, 0.1, causal) for request in requests]
    return tuple(torch.cat(x) for x in zip(*parts))


def prefill(name, *, q, k, v, cu_q, cu_kv, max_q=4, max_kv=6, causal=True, **more):
    arguments = dict(
        query=q,
        key=k,
        value=v,
        seq_lens=cu_kv.diff(),
        cum_seq_lens_q=cu_q,
        batch_size=3,
        is_causal=causal,
        return_lse=True,
        enable_pdl=False,
    )
    if name == "fa3":
        arguments = dict(
            **dict(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_kv),
            **dict(max_seqlen_q=max_q, max_seqlen_k=max_kv, softmax_scale=0.1),
            **dict(causal=causal, return_softmax_lse=True),
        )
        out, lse = kernels.flash_attn_varlen_func(**arguments, **more)
        return out, lse.T
    if name == "tokenspeed":
        lens = dict(cum_seq_lens=cu_kv, max_seq_len=max_kv, max_seq_len_q=max_q)
        arguments |= dict(**lens, softmax_scale=0.1)
        return kernels.tokenspeed_mla_prefill(**{**arguments, **more})
    lens = dict(cum_seq_lens_kv=cu_kv, max_kv_len=max_kv, max_q_len=max_q)
    arguments |= dict(**lens, bmm1_scale=0.1, bmm2_scale=3.0, o_sf_scale=1.0)
    arguments |= dict(workspace_buffer=None, window_left=-1)
    return kernels.trtllm_ragged_attention_deepseek(**{**arguments, **more})


NAMES = ("tokenspeed", "trtllm")
BOTH = pytest.mark.parametrize("name", NAMES)
EACH = pytest.mark.parametrize("name", (*NAMES, "fa3"))
CAUSAL = pytest.mark.parametrize("causal", [False, True])
CLOSE = dict(rtol=1e-5, atol=1e-5)
CLOSE_BF16 = dict(rtol=8e-3, atol=1e-5)


@CAUSAL
@pytest.mark.parametrize("name", ["tokenspeed", "fa3"])
def test_attention_with_zeros_in_rows_without_keys(name, causal):
    operands = ragged()
    out, lse = prefill(name, **operands, causal=causal)
    wanted, wanted_lse = naive_ragged(**operands, causal=causal)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out[:8].cpu(), wanted.bfloat16(), **CLOSE_BF16)
    torch.testing.assert_close(lse[:8].cpu(), wanted_lse.float(), **CLOSE)
    assert out[8:].isnan().all() and lse[8:].isnan().all()


@CAUSAL
@pytest.mark.parametrize("natural", [False, True])
def test_trtllm_is_scaled_attention_with_nan_in_rows_without_keys(
    causal, natural, settings
):
    settings.natural_lse = natural
    operands = ragged()
    given = torch.full((10, HEADS, V), 7.0, device=DEVICE)
    out, lse = prefill("trtllm", **operands, causal=causal, out=given)
    wanted, wanted_lse = naive_ragged(**operands, causal=causal)
    wanted_lse = wanted_lse if natural else wanted_lse / math.log(2)
    assert out is given
    actual = out[HAS_KEYS].cpu(), lse[HAS_KEYS].cpu()
    torch.testing.assert_close(actual[0], (3 * wanted).float()[HAS_KEYS], **CLOSE)
    torch.testing.assert_close(actual[1], wanted_lse.float()[HAS_KEYS], **CLOSE)
    assert out[3].isnan().all() and lse[3].isnan().all()
    assert (out[8:] == 7).all() and lse[8:].isnan().all()


def test_fa3_writes_the_callers_output_in_bf16_or_the_operands_dtype():
    batch = ragged()
    given = torch.full((10, HEADS, V), 7.0, device=DEVICE, dtype=torch.bfloat16)
    assert prefill("fa3", **batch, out=given)[0] is given
    assert (given[8:] == 7).all() and given[:8].equal(prefill("fa3", **batch)[0][:8])
    with pytest.raises(ValueError, match="out of torch.float8"):
        prefill("fa3", **batch, out=given.to(E4M3))
    wide = {name: batch[name].to(torch.float16) for name in "qkv"}
    assert prefill("fa3", **{**batch, **wide})[0].dtype == torch.float16
    with pytest.raises(ValueError, match="out of torch.bfloat16"):
        prefill("fa3", **{**batch, **wide}, out=given)


@pytest.mark.parametrize("dtype, ver", [(torch.float8_e5m2, 3), (E4M3, 4)])
def test_fa3_refuses_e5m2_and_fa4_all_fp8(dtype, ver):
    batch = ragged()
    batch |= {name: batch[name].to(dtype) for name in "qkv"}
    with pytest.raises(ValueError, match=f"{dtype} in FlashAttention-{ver}"):
        prefill("fa3", **batch, ver=ver)


def test_long_rows_come_in_blocks_and_float64_is_exact(monkeypatch):
    q, k, v = (torch.randn(40, 3, d, device=DEVICE).double() for d in (16, 16, 8))
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 7 * 3 * 40 * 8)
    # More queries than keys: the first rows see none.
    for keys in (40, 33):
        out = kernels.ragged_attention(
            *(q, k[:keys], v[:keys], [0, 40], [0, keys], 0.3, True, torch.float64)
        )
        wanted = naive_attention(q, k[:keys], v[:keys], 0.3, True)
        for a, b in zip(out, wanted):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


@EACH
def test_a_request_does_not_depend_on_its_batch(name):
    batch = ragged()
    out, lse = prefill(name, **batch)
    last = {name: batch[name][i:] for name, i in dict(k=5, v=5).items()}
    last |= dict(q=batch["q"][4:8], cu_q=int32([0, 4]), cu_kv=int32([0, 6]))
    size = {} if name == "fa3" else dict(batch_size=1)
    alone, lse_alone = prefill(name, **last, **size)
    assert alone.equal(out[4:8]) and lse_alone.equal(lse[4:8])


def slice_of(width: int, first: int = 0) -> torch.Tensor:
    wide = torch.zeros(10, HEADS, width, device=DEVICE).to(E4M3)
    return wide[..., first : first + QK]


# What the real kernels refuse or misread, by what the stand-ins say of it.
WRONG = {
    "bfloat16": lambda q, k, v: dict(v=v.bfloat16()),
    "query of shape": lambda q, k, v: dict(q=q.flatten(1)),
    "query at .* strides": lambda q, k, v: dict(q=slice_of(QK + 16, 1)),
    r"query at .* strides \(400, 200": lambda q, k, v: dict(q=slice_of(QK + 8)),
    "value with last stride 2": lambda q, k, v: dict(v=v.repeat(1, 1, 2)[..., ::2]),
    "shapes": lambda q, k, v: dict(k=k[:9]),
    "batch of 2": lambda q, k, v: dict(batch_size=2),
    r"\[0, 6, 5, 11\] for a batch of 3": lambda q, k, v: dict(
        cu_kv=int32([0, 6, 5, 11])
    ),
    "cum_seq_lens_kv that ends at 11": lambda q, k, v: dict(k=k[:9], v=v[:9]),
    "cum_seq_lens_q that ends at 8": lambda q, k, v: dict(q=q[:7]),
    "longest request of 3": lambda q, k, v: dict(max_q=3),
    "longest request of 5": lambda q, k, v: dict(max_kv=5),
    "head dimensions": lambda q, k, v: dict(v=v[..., :64].contiguous()),
}


# Of tokenspeed_mla's: test_real_kernel.py.
@pytest.mark.parametrize(
    "name, message",
    [
        *(("trtllm", message) for message in WRONG),
        # It is told no size of the batch.
        *(("fa3", message) for message in WRONG if message != "batch of 2"),
    ],
)
def test_a_prefill_refuses(name, message):
    batch = ragged()
    change = WRONG[message](batch["q"], batch["k"], batch["v"])
    with pytest.raises(ValueError, match=message):
        prefill(name, **{**batch, **change})


@EACH
def test_a_prefill_takes_any_head_dimension_on_demand(name, settings):
    batch = ragged()
    settings.any_head_dim = True
    prefill(name, **{**batch, "v": batch["v"][..., :64].contiguous()})


def test_head_dimensions_of_128_are_trtllms_alone():
    batch = ragged()
    batch |= {name: batch[name][..., :V].contiguous() for name in "qkv"}
    prefill("trtllm", **batch)
    with pytest.raises(ValueError, match="head dimensions"):
        prefill("tokenspeed", **batch)


# It takes slices of k.
@pytest.mark.parametrize("name", ["trtllm", "fa3"])
def test_the_record_says_what_was_handed_and_counts_nan_of_real_rows(name):
    batch = ragged()
    batch["q"][8:] = math.nan  # padding
    prefill(name, **batch)
    prefill(name, **batch)
    batch["k"] = batch["k"].repeat(1, 1, 2)[..., :QK]
    batch["k"][10, 0, 0] = math.nan
    prefill(name, **batch, causal=False)
    record = recorded()
    first, second = record["calls"]
    assert (first["count"], first["tokens"], first["causal"]) == (2, 16, True)
    assert first["q_dtype"] == first["v_dtype"] == "float8_e4m3fn"
    assert first["contiguous"] and first["padded"] and first["requests_without_keys"]
    assert (second["count"], second["causal"]) == (1, False)
    assert not second["contiguous"]
    # The NaN's request has 4 rows, and one head sees it.
    assert record["nan"] == {"q": 0, "k": 1, "v": 0, "out": 4 * V}


def test_kernels_that_a_request_had_to_compile_are_recorded():
    config = (E4M3, QK, V, True, True, False, False)
    module = install.tokenspeed_module().mla_prefill
    module._compiled_kernels[config] = module._compile_prefill_kernel(*config)
    prefill("tokenspeed", **ragged())
    assert not kernels.RECORD.late_compiles
    prefill("tokenspeed", **ragged(), causal=False)
    prefill("tokenspeed", **ragged(), causal=False)
    assert [c[3] for c in kernels.RECORD.late_compiles] == [False]


def test_the_listener_hears_before_the_checks(settings):
    heard = []
    settings.listener = heard.append
    batch = ragged()
    with pytest.raises(ValueError):
        prefill("tokenspeed", **{**batch, "v": batch["v"].bfloat16()})
    assert heard[0]["v"].dtype == torch.bfloat16 and heard[0]["cu_q"] == [0, 3, 4, 8]


@EACH
def test_without_computing_nothing_is_written(name, settings):
    settings.compute = False
    out, lse = prefill(name, **ragged())
    assert out.shape == (10, HEADS, V) and lse.shape == (10, HEADS)
    assert not kernels.RECORD.calls


def test_without_computing_the_callers_output_stays(settings):
    settings.compute = False
    given = torch.full((10, HEADS, V), 7.0, device=DEVICE)
    assert prefill("trtllm", **ragged(), out=given)[0].eq(7).all()


LORA, ROPE, PAGE = 512, 64, 32
SEQ_LENS = [70, 0, 33]


def decode_inputs(queries: int = 2) -> dict:
    query = torch.randn(3, queries, 4, LORA + ROPE, device=DEVICE).to(E4M3)
    cache = torch.randn(9, 1, PAGE, LORA + ROPE, device=DEVICE).to(E4M3)
    tables = int32([[4, 1, 7, 0], [0, 0, 0, 0], [8, 2, 0, 0]])
    lens = int32(SEQ_LENS)
    return dict(query=query, kv_cache=cache, block_tables=tables, seq_lens=lens)


def decode(name, inputs, **changes):
    arguments = dict(
        **inputs,
        workspace_buffer=torch.empty(16, dtype=torch.int8, device=DEVICE),
        kv_lora_rank=LORA,
        qk_rope_head_dim=ROPE,
        max_seq_len=128,
    )
    if name == "tokenspeed":
        arguments |= dict(softmax_scale=0.05, output_scale=2.0, enable_pdl=False)
        return kernels.tokenspeed_mla_decode(**{**arguments, **changes})
    arguments |= dict(qk_nope_head_dim=128, bmm1_scale=0.05)
    return kernels.trtllm_batch_decode_with_kv_cache_mla(**{**arguments, **changes})


@BOTH
@pytest.mark.parametrize("queries", [1, 2])
def test_decode_is_attention_over_the_pages_of_a_request(name, queries):
    inputs = decode_inputs(queries)
    out = decode(name, inputs)
    assert out.shape == (3, queries, 4, LORA) and out.dtype == torch.bfloat16
    assert out[1].isnan().all()
    scale = 2 if name == "tokenspeed" else 1
    for i in (0, 2):
        pages = inputs["kv_cache"][inputs["block_tables"][i].long()].float()
        rows = pages.reshape(-1, 1, LORA + ROPE)[: SEQ_LENS[i]].expand(-1, 4, -1)
        query = inputs["query"][i]
        wanted, _ = naive_attention(query, rows, rows[..., :LORA], 0.05, True)
        actual = out[i].cpu().double()
        torch.testing.assert_close(actual, scale * wanted, **CLOSE_BF16)
    record = recorded()
    assert record["calls"][0]["tokens"] == 3
    # The request without keys is padding.
    assert record["nan"] == {"q": 0, "out": 0}


@BOTH
def test_decode_counts_nan(name):
    inputs = decode_inputs()
    inputs["kv_cache"][8, 0, 5, 7] = math.nan
    decode(name, inputs)
    # All of a request that sees it: two queries of four heads.
    assert recorded()["nan"] == {"q": 0, "out": 2 * 4 * LORA}


WRONG_DECODES = {
    "bfloat16": lambda x: dict(query=x["query"].bfloat16()),
    "query and cache of shapes": lambda x: dict(query=x["query"][0]),
    "block_tables of": lambda x: dict(block_tables=x["block_tables"].long()),
    "3 seq_lens of": lambda x: dict(seq_lens=x["seq_lens"].long()),
    "2 seq_lens of": lambda x: dict(seq_lens=x["seq_lens"][:2]),
    "kv_lora_rank 448": lambda x: dict(kv_lora_rank=448, qk_rope_head_dim=128),
    r"rows of 448 \+ 64": lambda x: dict(kv_lora_rank=448),
    "a request of 70": lambda x: dict(max_seq_len=69),
    "132 heads": lambda x: dict(query=x["query"].repeat(1, 1, 33, 1)),
    "pages of 128": lambda x: dict(kv_cache=x["kv_cache"].repeat(1, 1, 4, 1)),
    "strides": lambda x: dict(kv_cache=x["kv_cache"].repeat(1, 2, 1, 1)[:, :1]),
}
WRONG_DECODES_OF_ONE = {
    ("tokenspeed", "a workspace of"): lambda x: dict(workspace_buffer=int32([0])),
    ("trtllm", "a multiple of 128"): lambda x: dict(
        block_tables=x["block_tables"][:, :3]
    ),
}


@pytest.mark.parametrize(
    "name, message, change",
    [
        *((name, *wrong) for name in NAMES for wrong in WRONG_DECODES.items()),
        *((*key, change) for key, change in WRONG_DECODES_OF_ONE.items()),
    ],
)
def test_a_decode_refuses(name, message, change):
    inputs = decode_inputs()
    with pytest.raises(ValueError, match=message):
        decode(name, inputs, **change(inputs))


@pytest.mark.parametrize(
    "backend, name",
    [
        ("tokenspeed", "tokenspeed_mla_prefill"),
        ("tokenspeed", "tokenspeed_mla_decode"),
        ("trtllm", "trtllm_ragged_attention_deepseek"),
        ("trtllm", "trtllm_batch_decode_with_kv_cache_mla"),
    ],
)
def test_a_stand_in_takes_what_sglang_passes(backend, name):
    package = Path(importlib.util.find_spec("sglang").origin).parent
    source = package / f"srt/layers/attention/{backend}_mla_backend.py"
    calls = [
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == name
    ]
    assert calls
    for call in calls:
        passed = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(getattr(kernels, name)).bind(*call.args, **passed)
