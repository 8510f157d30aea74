"""Stands in for the attention kernels of tokenspeed_mla 0.1.1 and for FlashInfer's two
trtllm-gen MLA entry points, which run on SM100 GPUs only: their call signatures, in
plain torch, from the definition of attention.

What the real kernels would reject or misread (dtype, layout, alignment, shape) is
refused; what they leave unwritten holds NaN; what they were handed is recorded. One
request is computed at a time, so that its result does not depend on its batch.

Environment, read at import:
    STANDIN_RECORD        folder for record-<pid>.json, see `Record`
    STANDIN_ANY_HEAD_DIM  "1": accept head dimensions that the real kernels have no
                          code for
    STANDIN_LSE           "natural": trtllm-gen's log-sum-exp in base e, as SGLang
                          merges it, instead of the base 2 that the kernel returns
    STANDIN_COMPUTE       "none": leave the output as it is, unchecked, without a
                          wait for the device: to time everything but attention
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field
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


@dataclass
class Settings:
    """How the stand-ins behave in this process."""

    compute: bool = os.environ.get("STANDIN_COMPUTE") != "none"
    any_head_dim: bool = os.environ.get("STANDIN_ANY_HEAD_DIM") == "1"
    natural_lse: bool = os.environ.get("STANDIN_LSE") == "natural"
    # float64 for references; float32 is exact about FP8 products and fast enough.
    dtype: torch.dtype = torch.float32
    poison: float = math.nan
    # Called with a dict of everything a prefill kernel was handed, before it runs.
    listener: Optional[Callable[[dict[str, Any]], None]] = None


SETTINGS = Settings()


class Record:
    """How often the kernels were handed what, and how many NaN, as a JSON file.

    {"calls": [{"kernel", "q_dtype", …, "count", "tokens"}, …],
     "nan": {"q": n, "k": n, "v": n, "out": n},  elements of real tokens
     "compiled": […], "late_compiles": […]}

    Written when something new is seen, and at a call more than RECORD_EVERY seconds after
    the last writing, without that call's own NaN.
    """

    def __init__(self, folder: Optional[str]):
        self.path = folder and Path(folder, f"record-{os.getpid()}.json")
        self.calls: Counter = Counter()
        self.tokens: Counter = Counter()
        self.compiled: list[tuple] = []
        self.late_compiles: list[tuple] = []
        self._nan: Optional[torch.Tensor] = None
        self._written = 0.0

    NAN_KINDS = ("q", "k", "v", "out")

    def add(self, tokens: int, **what) -> None:
        key = tuple(what.items())
        new = key not in self.calls
        self.calls[key] += 1
        self.tokens[key] += tokens
        if new or time.monotonic() - self._written > RECORD_EVERY:
            self.write()

    def count_nan(self, **tensors: torch.Tensor) -> None:
        for kind, x in tensors.items():
            if self._nan is None:
                n = len(self.NAN_KINDS)
                self._nan = torch.zeros(n, dtype=torch.int64, device=x.device)
            if x.dtype in FP8_DTYPES:
                limit = 0x7F if x.dtype == torch.float8_e4m3fn else 0x7D
                found = (x.view(torch.uint8) & 0x7F) >= limit
            else:
                found = x.isnan()
            self._nan[self.NAN_KINDS.index(kind)] += found.sum()

    def write(self) -> None:
        self._written = time.monotonic()
        if not self.path:
            return
        nan = [0] * len(self.NAN_KINDS) if self._nan is None else self._nan.tolist()
        content = {
            "calls": [
                {**dict(key), "count": n, "tokens": self.tokens[key]}
                for key, n in self.calls.items()
            ],
            "nan": dict(zip(self.NAN_KINDS, nan)),
            "compiled": [[str(x) for x in config] for config in self.compiled],
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


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: Sequence[int],
    kv_lora_rank: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Latent attention over a paged cache, computed in `dtype`.

    query [b, n, h, lora + rope], cache [pages, page_size, lora + rope]; the n queries
    of a request are its last n positions. Returns [b, n, h, lora]; rows without keys
    hold the poison.
    """
    b, n, heads, width = query.shape
    shape = (b, n, heads, kv_lora_rank)
    out = query.new_full(shape, SETTINGS.poison, dtype=dtype)
    page_size = cache.shape[1]
    for i, length in enumerate(seq_lens):
        if length <= 0:
            continue
        pages = block_tables[i, : -(-length // page_size)].long()
        rows = cache[pages].reshape(-1, width)[:length].to(dtype)
        logits = query[i].to(dtype).reshape(n * heads, width) @ rows.T
        logits = logits.view(n, heads, length).mul_(scale)
        if n > 1:
            seen = torch.ones(n, length, dtype=torch.bool, device=query.device)
            seen = seen.tril_(length - n)
            logits.masked_fill_(~seen.unsqueeze(1), -math.inf)
        out[i] = torch.softmax(logits, dim=-1) @ rows[:, :kv_lora_rank]
    return out


_range = torch.autograd.profiler.record_function


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _new(like: torch.Tensor, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """An output nobody has written yet."""
    if not SETTINGS.compute:
        return like.new_empty(shape, dtype=dtype)
    return like.new_full(shape, SETTINGS.poison, dtype=dtype)


def _refuse(kernel: str, what: str) -> None:
    raise ValueError(f"{kernel}: the real kernel would not take {what}")


def _check_operands(
    kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{kernel}: the real kernel reads all operands as q's type and would take "
            f"other bytes for it: got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for label, x in (("query", q), ("key", k), ("value", v)):
        if x.dim() != 3:
            _refuse(kernel, f"{label} of shape {tuple(x.shape)}, not [tokens, h, d]")
        if x.numel() == 0:
            continue
        if x.stride(-1) != 1:
            _refuse(kernel, f"{label} with stride {x.stride(-1)} in its last dimension")
        # Its tiles are read by TMA, which wants 16-byte addresses and strides.
        steps = [s * x.element_size() for n, s in zip(x.shape, x.stride()) if n > 1]
        # Head dimensions that the kernel has no code for may make odd strides.
        uneven = any(step % 16 for step in steps[:-1]) and not SETTINGS.any_head_dim
        if x.data_ptr() % 16 or uneven:
            _refuse(kernel, f"{label} at {x.data_ptr():#x}, strides {x.stride()}")
    if k.shape[:2] != v.shape[:2] or q.shape[1:] != k.shape[1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        _refuse(kernel, f"query, key and value of shapes {shapes}")


def _check_lens(
    kernel: str, q, k, cu_q: list[int], cu_kv: list[int], batch_size: int, max_q, max_kv
) -> None:
    for label, cu, rows, longest in (
        ("cum_seq_lens_q", cu_q, q.shape[0], max_q),
        ("cum_seq_lens_kv", cu_kv, k.shape[0], max_kv),
    ):
        lens = [b - a for a, b in zip(cu, cu[1:])]
        if len(lens) != batch_size or cu[0] != 0 or min(lens, default=0) < 0:
            _refuse(kernel, f"{label} {cu} for a batch of {batch_size}")
        if cu[-1] > rows:
            _refuse(kernel, f"{label} that ends at {cu[-1]} with {rows} rows")
        if longest < max(lens, default=0):
            _refuse(kernel, f"a longest request of {longest} for {label} {cu}")


@dataclass
class _Prefill:
    """One call of a prefill kernel, checked and recorded."""

    kernel: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cum_seq_lens_q: torch.Tensor
    cum_seq_lens_kv: torch.Tensor
    batch_size: int
    max_q: int
    max_kv: int
    causal: bool
    return_lse: bool
    bmm1_scale: float
    bmm2_scale: float
    arguments: dict[str, Any]
    cu_q: list[int] = field(init=False)
    cu_kv: list[int] = field(init=False)

    def __post_init__(self):
        if not SETTINGS.compute:
            return
        q, k, v = self.q, self.k, self.v
        # One wait for the device, for all of what has to be known here.
        cu = torch.stack([self.cum_seq_lens_q, self.cum_seq_lens_kv]).tolist()
        self.cu_q, self.cu_kv = cu
        lens = [b - a for a, b in zip(self.cu_kv, self.cu_kv[1:])]
        RECORD.add(
            self.cu_q[-1],
            kernel=self.kernel,
            q_dtype=_name(q.dtype),
            k_dtype=_name(k.dtype),
            v_dtype=_name(v.dtype),
            contiguous=all(x.is_contiguous() for x in (q, k, v)),
            heads=q.shape[1],
            causal=self.causal,
            return_lse=self.return_lse,
            bmm2_scale=self.bmm2_scale,
            padded=q.shape[0] > self.cu_q[-1],
            requests_without_keys=0 in lens,
        )
        if SETTINGS.listener is not None:
            SETTINGS.listener({name: getattr(self, name) for name in self.__dict__})
        _check_operands(self.kernel, q, k, v)
        _check_lens(
            self.kernel,
            q,
            k,
            self.cu_q,
            self.cu_kv,
            self.batch_size,
            self.max_q,
            self.max_kv,
        )

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and natural log-sum-exp of the real rows."""
        n, n_kv = self.cu_q[-1], self.cu_kv[-1]
        RECORD.count_nan(q=self.q[:n], k=self.k[:n_kv], v=self.v[:n_kv])
        out, lse = ragged_attention(
            self.q,
            self.k,
            self.v,
            self.cu_q,
            self.cu_kv,
            self.bmm1_scale,
            self.causal,
            SETTINGS.dtype,
        )
        out *= self.bmm2_scale
        RECORD.count_nan(out=out)
        return out, lse


# The tokenspeed kernels that are built, by what they are specialized for.
compiled_kernels: dict[tuple, tuple] = {}


def compile_prefill_kernel(
    q_dtype, qk, v, causal, return_lse, use_pdl=False, enable_ex2_emulation=True
):
    """Notes what the real function would compile, which takes it minutes."""
    config = (q_dtype, qk, v, causal, return_lse, use_pdl, enable_ex2_emulation)
    RECORD.compiled.append(config)
    RECORD.write()
    return config


def tokenspeed_mla_prefill(
    query,
    key,
    value,
    seq_lens,
    cum_seq_lens,
    max_seq_len,
    batch_size,
    softmax_scale,
    is_causal=True,
    return_lse=False,
    cum_seq_lens_q=None,
    max_seq_len_q=None,
    enable_pdl=False,
):
    """BF16 output, allocated here; natural log-sum-exp; 0 and minus infinity in rows
    without keys; rows past the real ones left alone."""
    with _range(CAUSAL if is_causal else PREFIX_CHUNK):
        call = _Prefill(
            "tokenspeed_mla_prefill",
            query,
            key,
            value,
            cum_seq_lens if cum_seq_lens_q is None else cum_seq_lens_q,
            cum_seq_lens,
            batch_size,
            max_seq_len if max_seq_len_q is None else max_seq_len_q,
            max_seq_len,
            is_causal,
            return_lse,
            float(softmax_scale),
            1.0,
            dict(
                seq_lens=seq_lens,
                batch_size=batch_size,
                max_seq_len=max_seq_len,
                max_seq_len_q=max_seq_len_q,
                enable_pdl=enable_pdl,
            ),
        )
        dims = (query.shape[2], value.shape[2])
        if dims != (192, 128) and not SETTINGS.any_head_dim:
            _refuse(call.kernel, f"head dimensions {dims}: only (192, 128)")
        config = (query.dtype, *dims, is_causal, return_lse, enable_pdl, False)
        if config not in compiled_kernels:
            compiled_kernels[config] = compile_prefill_kernel(*config)
            RECORD.late_compiles.append(config)
        shape = (query.shape[0], query.shape[1], value.shape[2])
        out = _new(query, shape, torch.bfloat16)
        lse = _new(query, shape[:2], torch.float32)
        if SETTINGS.compute:
            real_out, real_lse = call.compute()
            out[: call.cu_q[-1]] = real_out
            lse[: call.cu_q[-1]] = real_lse
        return (out, lse) if return_lse else out


def trtllm_ragged_attention_deepseek(
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
    attention_sinks=None,
    skip_softmax_threshold_scale_factor=None,
    out=None,
    lse=None,
):
    """The caller's `out`, if given; base-2 log-sum-exp; rows past the real ones left
    alone, and NaN in rows without keys, which the caller has to repair."""
    with _range(CAUSAL if is_causal else PREFIX_CHUNK):
        call = _Prefill(
            "trtllm_ragged_attention_deepseek",
            query,
            key,
            value,
            cum_seq_lens_q,
            cum_seq_lens_kv,
            batch_size,
            max_q_len,
            max_kv_len,
            is_causal,
            return_lse,
            float(bmm1_scale),
            float(bmm2_scale),
            dict(
                seq_lens=seq_lens,
                batch_size=batch_size,
                enable_pdl=enable_pdl,
                o_sf_scale=o_sf_scale,
                out=out,
            ),
        )
        if attention_sinks is not None or window_left != -1:
            raise NotImplementedError(f"{call.kernel}: sinks and windows")
        dims = (query.shape[2], value.shape[2])
        if dims not in ((192, 128), (128, 128)) and not SETTINGS.any_head_dim:
            _refuse(call.kernel, f"head dimensions {dims}: (192, 128) or (128, 128)")
        shape = (query.shape[0], query.shape[1], value.shape[2])
        if out is None:
            dtype = torch.bfloat16 if query.dtype in FP8_DTYPES else query.dtype
            out = _new(query, shape, dtype)
        if tuple(out.shape) != shape or out.dtype in FP8_DTYPES:
            _refuse(call.kernel, f"out of {out.dtype}, shape {tuple(out.shape)}")
        if lse is None:
            lse = _new(query, shape[:2], torch.float32)
        if SETTINGS.compute:
            n = call.cu_q[-1]
            real_out, real_lse = call.compute()
            empty = real_lse.isinf()
            real_out.masked_fill_(empty.unsqueeze(-1), SETTINGS.poison)
            real_lse.masked_fill_(empty, SETTINGS.poison)
            out[:n] = real_out
            lse[:n] = real_lse if SETTINGS.natural_lse else real_lse / math.log(2)
        return (out, lse) if return_lse else out


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
    if not SETTINGS.compute:
        return _new(query, (*query.shape[:3], lora), torch.bfloat16)
    cache = kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache
    lens = seq_lens.tolist()
    RECORD.add(
        len(lens),
        kernel=kernel,
        q_dtype=_name(query.dtype),
        k_dtype=_name(cache.dtype),
        v_dtype=_name(cache.dtype),
        contiguous=query.is_contiguous() and cache.is_contiguous(),
        heads=query.shape[2],
    )
    if query.dtype != cache.dtype:
        raise TypeError(
            f"{kernel}: query is {query.dtype}, the cache {cache.dtype}; the real "
            "kernel takes one type"
        )
    width = lora + rope
    if query.dim() != 4 or query.shape[3] != width or cache.shape[2] != width:
        shapes = f"{tuple(query.shape)} and {tuple(cache.shape)}"
        _refuse(kernel, f"query and cache of shapes {shapes} for {width} wide rows")
    if (lora, rope) != (512, 64) and not SETTINGS.any_head_dim:
        _refuse(kernel, f"kv_lora_rank {lora} and rope {rope}")
    if cache.shape[1] not in (32, 64):
        _refuse(kernel, f"pages of {cache.shape[1]} tokens: 32 or 64")
    if query.shape[2] > 128:
        _refuse(kernel, f"{query.shape[2]} heads: at most 128")
    if not cache.is_contiguous() or query.stride(-1) != 1:
        _refuse(kernel, f"strides {query.stride()} and {cache.stride()}")
    if block_tables.dtype != torch.int32 or block_tables.shape[0] != query.shape[0]:
        what = f"{block_tables.dtype} {tuple(block_tables.shape)}"
        _refuse(kernel, f"block_tables {what} for a batch of {query.shape[0]}")
    if seq_lens.dtype != torch.int32 or len(lens) != query.shape[0]:
        _refuse(kernel, f"{len(lens)} seq_lens of {seq_lens.dtype}")
    longest = max(lens, default=0)
    if longest > max_seq_len or longest > block_tables.shape[1] * cache.shape[1]:
        what = f"max_seq_len {max_seq_len} and {block_tables.shape[1]} pages"
        _refuse(kernel, f"a request of {longest} tokens with {what}")
    out = paged_attention(query, cache, block_tables, lens, lora, scale, SETTINGS.dtype)
    # Rows of requests; those of padding have no keys and hold anything.
    real = [i for i, length in enumerate(lens) if length > 0]
    if len(real) == len(lens):
        RECORD.count_nan(q=query, out=out)
    elif real:
        RECORD.count_nan(q=query[real], out=out[real])
    return (out * out_scale).to(torch.bfloat16)


def tokenspeed_mla_decode(
    query,
    kv_cache,
    workspace_buffer,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    softmax_scale,
    output_scale=1.0,
    out=None,
    is_var_seq=True,
    causal_mask=True,
    enable_pdl=False,
):
    """BF16 output [b, n, h, lora]."""
    with _range(DECODE):
        kernel = "tokenspeed_mla_decode"
        if workspace_buffer.dtype != torch.int8:
            _refuse(kernel, f"a workspace of {workspace_buffer.dtype}: int8")
        if out is not None or not causal_mask:
            raise NotImplementedError(f"{kernel}: out and causal_mask=False")
        return _decode(
            kernel,
            query,
            kv_cache,
            kv_lora_rank,
            qk_rope_head_dim,
            block_tables,
            seq_lens,
            max_seq_len,
            float(softmax_scale),
            float(output_scale),
        )


def trtllm_batch_decode_with_kv_cache_mla(
    query,
    kv_cache,
    workspace_buffer,
    qk_nope_head_dim,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    sparse_mla_top_k=0,
    out=None,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    sinks=None,
    skip_softmax_threshold_scale_factor=None,
    enable_pdl=None,
    backend="auto",
    is_var_seq=True,
    uses_shared_paged_kv_idx=True,
):
    """BF16 output [b, n, h, lora]."""
    with _range(DECODE):
        kernel = "trtllm_batch_decode_with_kv_cache_mla"
        if sparse_mla_top_k or sinks is not None or out is not None:
            raise NotImplementedError(f"{kernel}: sparse attention, sinks and out")
        page_size = kv_cache.shape[-2]
        if block_tables.shape[-1] * page_size % 128:
            what = f"{block_tables.shape[-1]} pages of {page_size} in a table"
            _refuse(kernel, f"{what}: together a multiple of 128 tokens")
        return _decode(
            kernel,
            query,
            kv_cache,
            kv_lora_rank,
            qk_rope_head_dim,
            block_tables,
            seq_lens,
            max_seq_len,
            float(bmm1_scale),
            float(bmm2_scale),
        )
