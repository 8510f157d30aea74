"""Stands in for the attention kernels of tokenspeed_mla 0.1.1 and for FlashInfer's two
trtllm-gen MLA entry points, which run on SM100 GPUs only, and for FlashAttention-3's
prefill, on SM90 only: in plain torch, from the definition of attention.

What the real kernels would reject or misread (dtype, layout, alignment, shape) is
refused; what they leave unwritten holds NaN; what they were handed is recorded. One
request is computed at a time, so that its result does not depend on its batch. The
signatures are of what SGLang passes, by keyword; any other argument is a TypeError.

Environment, read at import:
    STANDIN_RECORD   folder for record-<pid>.json, see `Record`
    STANDIN_LSE      "natural": trtllm-gen's log-sum-exp in base e, as SGLang merges it,
                     instead of the base 2 that the kernel returns
    STANDIN_COMPUTE  "none": leave the output as it is, unchecked, without a wait for the
                     device: to time everything but attention
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
RECORD_EVERY = 0.5
# Logits held at a time.
BLOCK_BYTES = 1 << 30
# Names of the profiler ranges that the stand-ins run in.
RANGE = "standin"
CAUSAL, PREFIX_CHUNK, DECODE = (
    f"{RANGE}.{part}" for part in ("causal", "prefix_chunk", "decode")
)
_range = torch.autograd.profiler.record_function


@dataclass
class Settings:
    """How the stand-ins behave in this process."""

    compute: bool = os.environ.get("STANDIN_COMPUTE") != "none"
    natural_lse: bool = os.environ.get("STANDIN_LSE") == "natural"
    # Accept head dimensions that the real kernels have no code for.
    any_head_dim: bool = False
    # float64 for references; float32 is exact about FP8 products and fast enough.
    dtype: torch.dtype = torch.float32
    # Called with a dict of everything a prefill kernel was handed, before it is checked.
    listener: Optional[Callable[[dict[str, Any]], None]] = None


SETTINGS = Settings()


class Record:
    """How often the kernels were handed what, and how many NaN, as a JSON file.

    {"calls": [{"kernel", "q_dtype", …, "count", "tokens"}, …],
     "nan": {"q": n, "k": n, "v": n, "out": n},  elements of real tokens
     "late_compiles": […]}  by a request, not at start

    Written when something new is seen, and at a call more than RECORD_EVERY seconds after
    the last writing, without that call's own NaN.
    """

    def __init__(self, folder: Optional[str]):
        self.path = folder and Path(folder, f"record-{os.getpid()}.json")
        self.calls: dict[tuple, list[int]] = {}
        self.late_compiles: list[tuple] = []
        self._nan: dict[str, torch.Tensor] = {}
        self._written = 0.0

    def add(self, tokens: int, **what) -> None:
        key = tuple(what.items())
        new = key not in self.calls
        total = self.calls.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += tokens
        if new or time.monotonic() - self._written > RECORD_EVERY:
            self.write()

    def count_nan(self, **tensors: torch.Tensor) -> None:
        for kind, x in tensors.items():
            if x.dtype in FP8_DTYPES:
                limit = 0x7F if x.dtype == torch.float8_e4m3fn else 0x7D
                found = (x.view(torch.uint8) & 0x7F) >= limit
            else:
                found = x.isnan()
            # Stays on the device: no wait.
            self._nan[kind] = self._nan.get(kind, 0) + found.sum()

    def write(self) -> None:
        self._written = time.monotonic()
        if not self.path:
            return
        content = {
            "calls": [
                {**dict(key), "count": count, "tokens": tokens}
                for key, (count, tokens) in self.calls.items()
            ],
            "nan": {kind: int(count) for kind, count in self._nan.items()},
            "late_compiles": [[str(x) for x in c] for c in self.late_compiles],
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.replace(self.path)


RECORD = Record(os.environ.get("STANDIN_RECORD"))


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: Sequence[int],
    cu_kv: Sequence[int],
    scale: float,
    causal: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ragged requests, computed in `dtype`.

    q [tokens, h, d], k [kv tokens, h, d], v [kv tokens, h, d_v]; request i has rows
    cu_q[i]:cu_q[i + 1] and keys cu_kv[i]:cu_kv[i + 1]. Causal is aligned to the bottom
    right.

    Returns:
        (output [cu_q[-1], h, d_v], natural log-sum-exp [cu_q[-1], h]); 0 and minus
        infinity in rows that see no key.
    """
    heads = q.shape[1]
    out = q.new_zeros(cu_q[-1], heads, v.shape[2], dtype=dtype)
    lse = q.new_full((cu_q[-1], heads), -math.inf, dtype=dtype)
    for i in range(len(cu_q) - 1):
        n_q, n_kv = cu_q[i + 1] - cu_q[i], cu_kv[i + 1] - cu_kv[i]
        if n_q == 0 or n_kv == 0:
            continue
        keys = k[cu_kv[i] : cu_kv[i + 1]].to(dtype).permute(1, 2, 0)
        values = v[cu_kv[i] : cu_kv[i + 1]].to(dtype).transpose(0, 1)
        step = max(1, BLOCK_BYTES // (heads * n_kv * dtype.itemsize))
        for first in range(0, n_q, step):
            rows = slice(cu_q[i] + first, min(cu_q[i] + first + step, cu_q[i + 1]))
            logits = q[rows].to(dtype).transpose(0, 1) @ keys
            logits *= scale
            if causal:
                size = logits.shape[1]
                seen = torch.ones(size, n_kv, dtype=torch.bool, device=q.device)
                seen = seen.tril_(n_kv - n_q + first)
                logits.masked_fill_(~seen, -math.inf)
            total = torch.logsumexp(logits, dim=-1)
            weights = logits.sub_(total.unsqueeze(-1)).exp_()
            if causal and n_q > n_kv:
                weights = weights.nan_to_num_(0.0)
            out[rows] = (weights @ values).transpose(0, 1)
            lse[rows] = total.T
    return out, lse


def _new(like: torch.Tensor, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """An output nobody has written yet."""
    if not SETTINGS.compute:
        return like.new_empty(shape, dtype=dtype)
    return like.new_full(shape, math.nan, dtype=dtype)


def _dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, str]:
    return {
        f"{label}_dtype": str(x.dtype).removeprefix("torch.")
        for label, x in zip("qkv", (q, k, v))
    }


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"the real kernel would not take {otherwise}")


def _check_operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head_dims: Sequence[tuple],
    packed: Sequence[str],
) -> None:
    # It reads all as q's type: other bytes would pass for it.
    dtypes = f"{q.dtype}, {k.dtype}, {v.dtype}"
    _require(q.dtype == k.dtype == v.dtype, f"query, key and value of {dtypes}")
    for label, x in (("query", q), ("key", k), ("value", v)):
        shape, strides = tuple(x.shape), x.stride()
        _require(x.dim() == 3, f"{label} of shape {shape}: [tokens, h, d]")
        if x.numel() == 0:
            continue
        _require(strides[2] == 1, f"{label} with last stride {strides[2]}: 1")
        # Its tiles are read by TMA, which wants 16-byte addresses and strides. Head
        # dimensions that the kernel has no code for may make odd strides.
        steps = [s * x.element_size() for n, s in zip(shape[:2], strides) if n > 1]
        even = SETTINGS.any_head_dim or not any(step % 16 for step in steps)
        aligned = even and x.data_ptr() % 16 == 0
        _require(aligned, f"{label} at {x.data_ptr():#x}, strides {strides}")
        dense = label not in packed or x.is_contiguous()
        _require(dense, f"{label} with strides {strides}: packed")
    fit = k.shape[:2] == v.shape[:2] and q.shape[1:] == k.shape[1:]
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    _require(fit, f"query, key and value of shapes {shapes}")
    dims = (q.shape[2], v.shape[2])
    known = SETTINGS.any_head_dim or dims in head_dims
    _require(known, f"head dimensions {dims}: {head_dims}")


def _check_lens(
    label: str, cu: list[int], rows: int, batch_size: int, longest: int
) -> None:
    lens = [b - a for a, b in zip(cu, cu[1:])]
    rising = len(lens) == batch_size and cu[0] == 0 and min(lens, default=0) >= 0
    _require(rising, f"{label} {cu} for a batch of {batch_size}")
    _require(cu[-1] <= rows, f"{label} that ends at {cu[-1]} with {rows} rows")
    enough = longest >= max(lens, default=0)
    _require(enough, f"a longest request of {longest} for {label} {cu}")


def _prefill(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    *,
    head_dims: Sequence[tuple],
    packed: Sequence[str] = (),
    batch_size: int,
    max_q: int,
    max_kv: int,
    causal: bool,
    bmm1_scale: float,
    bmm2_scale: float,
    return_lse: bool,
    out: Optional[torch.Tensor] = None,
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    """Records, checks and computes one call of a prefill kernel: output and natural
    log-sum-exp of the real rows, or None where nothing is to be computed.

    `packed` has those of query, key and value whose strides the kernel does not ask for.
    """
    if not SETTINGS.compute:
        return None
    sizes = len(cum_seq_lens_q), len(cum_seq_lens_kv)
    _require(sizes[0] == sizes[1], f"cumulated lengths of {sizes} values")
    # One wait for the device, for all of what has to be known here.
    cu_q, cu_kv = torch.stack([cum_seq_lens_q, cum_seq_lens_kv]).tolist()
    n, n_kv = cu_q[-1], cu_kv[-1]
    RECORD.add(
        n,
        kernel=kernel,
        **_dtypes(q, k, v),
        contiguous=all(x.is_contiguous() for x in (q, k, v)),
        causal=causal,
        bmm2_scale=bmm2_scale,
        padded=q.shape[0] > n,
        requests_without_keys=any(a == b for a, b in zip(cu_kv, cu_kv[1:])),
    )
    if SETTINGS.listener is not None:
        SETTINGS.listener(
            dict(
                kernel=kernel,
                q=q,
                k=k,
                v=v,
                cu_q=cu_q,
                cu_kv=cu_kv,
                causal=causal,
                return_lse=return_lse,
                bmm1_scale=bmm1_scale,
                bmm2_scale=bmm2_scale,
                arguments={"out": out},
            )
        )
    _check_operands(q, k, v, head_dims, packed)
    _check_lens("cum_seq_lens_q", cu_q, len(q), batch_size, max_q)
    _check_lens("cum_seq_lens_kv", cu_kv, len(k), batch_size, max_kv)
    RECORD.count_nan(q=q[:n], k=k[:n_kv], v=v[:n_kv])
    result, lse = ragged_attention(
        q, k, v, cu_q, cu_kv, bmm1_scale, causal, SETTINGS.dtype
    )
    result *= bmm2_scale
    RECORD.count_nan(out=result)
    return result, lse


# The tokenspeed kernels that are built, by what they are specialized for.
compiled_kernels: dict[tuple, tuple] = {}


def compile_prefill_kernel(
    q_dtype, qk, v, causal, return_lse, use_pdl, enable_ex2_emulation
):
    """Stands in for a compilation, which takes the real package minutes."""
    return (q_dtype, qk, v, causal, return_lse, use_pdl, enable_ex2_emulation)


def tokenspeed_mla_prefill(
    *,
    query,
    key,
    value,
    seq_lens,
    cum_seq_lens,
    max_seq_len,
    batch_size,
    softmax_scale,
    is_causal,
    return_lse,
    cum_seq_lens_q,
    max_seq_len_q,
    enable_pdl,
):
    """Stands in for tokenspeed_mla's ragged prefill.

    BF16 output, allocated here; natural log-sum-exp; 0 and minus infinity in rows
    without keys; rows past the real ones left alone.
    """
    with _range(CAUSAL if is_causal else PREFIX_CHUNK):
        computed = _prefill(
            "tokenspeed_mla_prefill",
            query,
            key,
            value,
            cum_seq_lens_q,
            cum_seq_lens,
            head_dims=[(192, 128)],
            packed=("query", "key", "value"),
            batch_size=batch_size,
            max_q=max_seq_len_q,
            max_kv=max_seq_len,
            causal=is_causal,
            return_lse=return_lse,
            bmm1_scale=softmax_scale,
            bmm2_scale=1.0,
        )
        dims = (query.shape[2], value.shape[2])
        config = (query.dtype, *dims, is_causal, return_lse, enable_pdl, False)
        if config not in compiled_kernels:
            compiled_kernels[config] = compile_prefill_kernel(*config)
            RECORD.late_compiles.append(config)
            RECORD.write()
        shape = (query.shape[0], query.shape[1], value.shape[2])
        out = _new(query, shape, torch.bfloat16)
        lse = _new(query, shape[:2], torch.float32)
        if computed is not None:
            n = len(computed[0])
            out[:n], lse[:n] = computed
        return (out, lse) if return_lse else out


def trtllm_ragged_attention_deepseek(
    *,
    query,
    key,
    value,
    workspace_buffer,
    seq_lens,
    max_q_len,
    max_kv_len,
    bmm1_scale,
    bmm2_scale,
    o_sf_scale,
    batch_size,
    window_left,
    cum_seq_lens_q,
    cum_seq_lens_kv,
    enable_pdl,
    is_causal,
    return_lse,
    skip_softmax_threshold_scale_factor=None,
    out=None,
):
    """Stands in for FlashInfer's entry point of trtllm-gen's ragged prefill.

    The caller's `out`, if given; base-2 log-sum-exp; rows past the real ones left
    alone, and NaN in rows without keys, which the caller has to repair.
    """
    if window_left != -1:
        raise NotImplementedError("trtllm_ragged_attention_deepseek: a window")
    with _range(CAUSAL if is_causal else PREFIX_CHUNK):
        computed = _prefill(
            "trtllm_ragged_attention_deepseek",
            query,
            key,
            value,
            cum_seq_lens_q,
            cum_seq_lens_kv,
            head_dims=[(192, 128), (128, 128)],
            packed=("query",),
            batch_size=batch_size,
            max_q=max_q_len,
            max_kv=max_kv_len,
            causal=is_causal,
            return_lse=return_lse,
            bmm1_scale=float(bmm1_scale),
            bmm2_scale=float(bmm2_scale),
            out=out,
        )
        shape = (query.shape[0], query.shape[1], value.shape[2])
        if out is None:
            dtype = torch.bfloat16 if query.dtype in FP8_DTYPES else query.dtype
            out = _new(query, shape, dtype)
        fits = tuple(out.shape) == shape and out.dtype not in FP8_DTYPES
        _require(fits, f"out of {out.dtype}, shape {tuple(out.shape)}")
        lse = _new(query, shape[:2], torch.float32)
        if computed is not None:
            real_out, real_lse = computed
            n = len(real_out)
            empty = real_lse.isinf()
            out[:n] = real_out.masked_fill_(empty.unsqueeze(-1), math.nan)
            lse[:n] = real_lse.masked_fill_(empty, math.nan)
            if not SETTINGS.natural_lse:
                lse[:n] /= math.log(2)
        return (out, lse) if return_lse else out


def _scale(descale: Optional[torch.Tensor]) -> float:
    """Of a tensor [requests, heads] that has one scale for all."""
    return 1.0 if descale is None else descale.flatten()[0].item()


def flash_attn_varlen_func(
    *,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    return_softmax_lse=False,
    out=None,
    ver=3,
    k_descale=None,
    v_descale=None,
):
    """Stands in for sgl_kernel's FlashAttention-3 over ragged requests, and for
    FlashAttention-4, which takes no FP8.

    The caller's `out`, if given; of FP8 operands it is BF16; natural log-sum-exp
    [heads, tokens]; 0 and minus infinity in rows without keys; rows past the real ones
    left alone.
    """
    fp8 = q.dtype in FP8_DTYPES
    known = q.dtype != torch.float8_e5m2 and not (fp8 and ver == 4)
    _require(known, f"query of {q.dtype} in FlashAttention-{ver}")
    with _range(CAUSAL if causal else PREFIX_CHUNK):
        computed = _prefill(
            "flash_attn_varlen_func",
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            head_dims=[(192, 128), *((d, d) for d in (64, 96, 128, 192, 256))],
            batch_size=len(cu_seqlens_q) - 1,
            max_q=max_seqlen_q,
            max_kv=max_seqlen_k,
            causal=causal,
            return_lse=return_softmax_lse,
            bmm1_scale=softmax_scale * _scale(k_descale),
            bmm2_scale=_scale(v_descale),
            out=out,
        )
        shape = (q.shape[0], q.shape[1], v.shape[2])
        dtype = torch.bfloat16 if fp8 else q.dtype
        if out is None:
            out = _new(q, shape, dtype)
        fits = tuple(out.shape) == shape and out.dtype == dtype
        _require(fits, f"out of {out.dtype}, shape {tuple(out.shape)}")
        lse = _new(q, (shape[1], shape[0]), torch.float32)
        if computed is not None:
            n = len(computed[0])
            out[:n], lse[:, :n] = computed[0], computed[1].T
        return (out, lse) if return_softmax_lse else out


def _check_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    lora: int,
    rope: int,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    lens: list[int],
    max_seq_len: int,
) -> None:
    _require(query.dtype == cache.dtype, f"query of {query.dtype} on {cache.dtype}")
    shapes = f"query and cache of shapes {tuple(query.shape)}, {tuple(cache.shape)}"
    _require(query.dim() == 4 and cache.dim() == 3, shapes)
    batch, _, heads, width = query.shape
    page = cache.shape[1]
    fits = width == cache.shape[2] == lora + rope
    _require(fits, f"{shapes} for rows of {lora} + {rope}")
    known = (lora, rope) == (512, 64) or SETTINGS.any_head_dim
    _require(known, f"kv_lora_rank {lora} and rope {rope}")
    _require(page in (32, 64), f"pages of {page} tokens: 32 or 64")
    _require(heads <= 128, f"{heads} heads: at most 128")
    dense = cache.is_contiguous() and query.stride(-1) == 1
    _require(dense, f"strides {query.stride()} and {cache.stride()}")
    for label, x in (("block_tables", block_tables), ("seq_lens", seq_lens)):
        fits = x.dtype == torch.int32 and len(x) == batch
        _require(fits, f"{len(x)} {label} of {x.dtype}: {batch} of int32")
    longest, pages = max(lens, default=0), block_tables.shape[1]
    _require(
        longest <= min(max_seq_len, pages * page),
        f"a request of {longest} tokens: max_seq_len {max_seq_len}, {pages} pages",
    )


def _decode(
    kernel: str,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    lora: int,
    rope: int,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    scale: float,
    out_scale: float,
) -> torch.Tensor:
    """Latent attention over a paged cache: query [b, n, h, lora + rope], cache [pages,
    (1,) page size, lora + rope]; the n queries of a request are its last n positions.
    BF16 [b, n, h, lora], NaN in requests without keys."""
    if not SETTINGS.compute:
        return _new(query, (*query.shape[:3], lora), torch.bfloat16)
    cache = kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache
    lens = seq_lens.tolist()
    RECORD.add(
        len(lens),
        kernel=kernel,
        **_dtypes(query, cache, cache),
        contiguous=query.is_contiguous() and cache.is_contiguous(),
    )
    _check_decode(query, cache, lora, rope, block_tables, seq_lens, lens, max_seq_len)
    _, n, heads, width = query.shape
    out = query.new_full((*query.shape[:3], lora), math.nan, dtype=SETTINGS.dtype)
    # Requests without keys are padding, and hold anything.
    real = [i for i, length in enumerate(lens) if length > 0]
    for i in real:
        pages = block_tables[i, : -(-lens[i] // cache.shape[1])].long()
        # All heads see the same keys: they are rows of one head here.
        keys = cache[pages].reshape(-1, 1, width)
        for j in range(n):
            seen = max(0, lens[i] - n + 1 + j)
            k, v = keys[:seen], keys[:seen, :, :lora]
            rows, _ = ragged_attention(
                query[i, j].unsqueeze(1),
                k,
                v,
                [0, heads],
                [0, seen],
                scale,
                causal=False,
                dtype=SETTINGS.dtype,
            )
            out[i, j] = rows.squeeze(1)
    RECORD.count_nan(q=query[real], out=out[real])
    return (out * out_scale).to(torch.bfloat16)


def tokenspeed_mla_decode(
    *,
    query,
    kv_cache,
    workspace_buffer,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    softmax_scale,
    output_scale,
    enable_pdl,
    return_lse=False,
    causal_seqs=None,
    cp_world=1,
    cp_rank=0,
):
    """Stands in for tokenspeed_mla's decode, on one rank."""
    if return_lse or cp_world > 1:
        raise NotImplementedError("tokenspeed_mla_decode: return_lse or cp_world")
    dtype = workspace_buffer.dtype
    _require(dtype == torch.int8, f"a workspace of {dtype}: int8")
    with _range(DECODE):
        return _decode(
            "tokenspeed_mla_decode",
            query,
            kv_cache,
            kv_lora_rank,
            qk_rope_head_dim,
            block_tables,
            seq_lens,
            max_seq_len,
            softmax_scale,
            output_scale,
        )


def trtllm_batch_decode_with_kv_cache_mla(
    *,
    query,
    kv_cache,
    workspace_buffer,
    qk_nope_head_dim,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    bmm1_scale,
    skip_softmax_threshold_scale_factor=None,
    enable_pdl=None,
    multi_ctas_kv_counter_buffer=None,
    return_lse=False,
):
    """Stands in for FlashInfer's entry point of trtllm-gen's MLA decode."""
    if return_lse:
        raise NotImplementedError("trtllm_batch_decode_with_kv_cache_mla: return_lse")
    tokens = block_tables.shape[-1] * kv_cache.shape[-2]
    _require(tokens % 128 == 0, f"tables of {tokens} tokens: a multiple of 128")
    with _range(DECODE):
        return _decode(
            "trtllm_batch_decode_with_kv_cache_mla",
            query,
            kv_cache,
            kv_lora_rank,
            qk_rope_head_dim,
            block_tables,
            seq_lens,
            max_seq_len,
            bmm1_scale,
            out_scale=1.0,
        )
