"""All that stands between MLA's projections and an FP8 prefill kernel, in one launch:
RoPE, FP8 Q, K and V, and the FP8 row of the KV cache.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import triton
import triton.language as tl

from sglang.jit_kernel.fp8_common import (
    FP8_DTYPES,
    SCALE_UNIT,
    Launcher,
    Plan,
    PlanCache,
    as_scale,
    block_shape,
    check_device,
    check_fp8_dtype,
    check_head_dims,
    check_index,
    check_input,
    check_output,
    index_key,
    layout_key,
    load_scale,
    rope_dim,
    to_fp8,
    wait_for_inputs,
)

# (token, head) rows a program takes: enough 16-byte loads in flight for each thread,
# few enough registers, and small batches still spread over the GPU.
_PROGRAM_ROWS = 16
_PROGRAM_ROWS_OF_WIDE_HEADS = 8  # nope + v beyond 256, as GLM's
_PROGRAM_CACHE_ROWS = 4  # where there are no heads

ROPE_NONE: tl.constexpr = tl.constexpr(0)
ROPE_INTERLEAVED: tl.constexpr = tl.constexpr(1)
ROPE_NEOX: tl.constexpr = tl.constexpr(2)


@triton.jit
def _load_pairs(
    row, live, HALF: tl.constexpr, HALF_P2: tl.constexpr, NEOX: tl.constexpr
):
    """Both members, in float32, of the HALF rotary pairs that lie at `row`.

    `row` is [T, H, 1]; the members are [T, H, HALF_P2].
    """
    if NEOX:
        i = tl.arange(0, HALF_P2)[None, None, :]
        mask = live & (i < HALF)
        x = tl.load(row + i, mask=mask)
        y = tl.load(row + HALF + i, mask=mask)
    else:
        i = tl.arange(0, 2 * HALF_P2)[None, None, :]
        both = tl.load(row + i, mask=live & (i < 2 * HALF))
        x, y = tl.split(both.reshape(both.shape[0], both.shape[1], HALF_P2, 2))
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def _store_pairs(
    row, live, x, y, HALF: tl.constexpr, HALF_P2: tl.constexpr, NEOX: tl.constexpr
):
    if NEOX:
        i = tl.arange(0, HALF_P2)[None, None, :]
        mask = live & (i < HALF)
        tl.store(row + i, x, mask=mask)
        tl.store(row + HALF + i, y, mask=mask)
    else:
        i = tl.arange(0, 2 * HALF_P2)[None, None, :]
        both = tl.join(x, y).reshape(x.shape[0], x.shape[1], 2 * HALF_P2)
        tl.store(row + i, both, mask=live & (i < 2 * HALF))


@triton.jit
def load_cos_sin(
    positions_ptr,
    cos_sin_ptr,
    cos_sin_row_stride,
    t,
    live,
    HALF: tl.constexpr,
    HALF_P2: tl.constexpr,
    ROPE_STYLE: tl.constexpr,
):
    """cos and sin, [T, 1, HALF_P2] each, at the positions of tokens t."""
    if ROPE_STYLE == ROPE_NONE:
        return 1.0, 0.0
    else:
        position = tl.load(positions_ptr + t, mask=live, other=0).to(tl.int64)
        i = tl.arange(0, HALF_P2)[None, None, :]
        mask = live & (i < HALF)
        row = cos_sin_ptr + position * cos_sin_row_stride
        return tl.load(row + i, mask=mask), tl.load(row + HALF + i, mask=mask)


@triton.jit
def rotate(x, y, cos, sin, ROPE_STYLE: tl.constexpr):
    if ROPE_STYLE == ROPE_NONE:
        return x, y
    else:
        return x * cos - y * sin, y * cos + x * sin


# Two-batch overlap slices positions and slots at any token, aligned or not.
@triton.jit(
    do_not_specialize=["k_scale_inv", "v_scale_inv", "num_tokens", "num_cache_rows"],
    do_not_specialize_on_alignment=["positions_ptr", "cache_loc_ptr"],
)
def _mla_prefill_quantize_fp8_kernel(
    q_ptr,
    kv_ptr,
    kv_a_ptr,
    k_pe_ptr,
    cos_sin_ptr,
    kv_cache_ptr,
    positions_ptr,
    cache_loc_ptr,
    q_fp8_ptr,
    k_fp8_ptr,
    v_fp8_ptr,
    k_pe_out_ptr,
    k_scale_inv,
    v_scale_inv,
    num_tokens,
    num_cache_rows,
    q_token_stride,
    q_head_stride,
    kv_token_stride,
    kv_head_stride,
    kv_a_token_stride,
    k_pe_token_stride,
    cos_sin_row_stride,
    kv_cache_slot_stride,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    LORA: tl.constexpr,
    K_PE_OUT: tl.constexpr,
    NOPE_P2: tl.constexpr,
    HALF_P2: tl.constexpr,
    V_P2: tl.constexpr,
    LORA_P2: tl.constexpr,
    ROPE_STYLE: tl.constexpr,
    K_SCALE_KIND: tl.constexpr,
    V_SCALE_KIND: tl.constexpr,
    FP8_DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):
    """A program prepares BLOCK_T tokens of BLOCK_H heads, without K and V where V is 0;
    where there is a cache, one more program for each block of tokens writes the cache
    rows, the only one where NUM_HEADS is 0."""
    HEAD_BLOCKS: tl.constexpr = NUM_HEADS // BLOCK_H
    PARTS: tl.constexpr = HEAD_BLOCKS + (1 if LORA > 0 else 0)
    HALF: tl.constexpr = ROPE // 2
    NEOX: tl.constexpr = ROPE_STYLE == ROPE_NEOX
    pid = tl.program_id(0)
    part = pid % PARTS
    t = (pid // PARTS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t = t[:, None, None]
    live = t < num_tokens

    wait_for_inputs(ENABLE_PDL)

    k_pe_row = k_pe_ptr + t * k_pe_token_stride
    if HEAD_BLOCKS > 0:
        if part < HEAD_BLOCKS:
            h = (part.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
            nope = tl.arange(0, NOPE_P2)[None, None, :]
            nope_mask = live & (nope < NOPE)

            # The large loads first: the short ones depend on one another.
            q_row = q_ptr + t * q_token_stride + h * q_head_stride
            q_nope = tl.load(q_row + nope, mask=nope_mask)
            if V > 0:
                kv_row = kv_ptr + t * kv_token_stride + h * kv_head_stride
                dim_v = tl.arange(0, V_P2)[None, None, :]
                v_mask = live & (dim_v < V)
                k_nope = tl.load(kv_row + nope, mask=nope_mask)
                v = tl.load(kv_row + NOPE + dim_v, mask=v_mask)
            q_x, q_y = _load_pairs(q_row + NOPE, live, HALF, HALF_P2, NEOX)
            if V > 0:
                k_x, k_y = _load_pairs(k_pe_row, live, HALF, HALF_P2, NEOX)
            cos, sin = load_cos_sin(
                positions_ptr,
                cos_sin_ptr,
                cos_sin_row_stride,
                t,
                live,
                HALF,
                HALF_P2,
                ROPE_STYLE,
            )

            q_x, q_y = rotate(q_x, q_y, cos, sin, ROPE_STYLE)
            if V > 0:
                k_x, k_y = rotate(k_x, k_y, cos, sin, ROPE_STYLE)
            q_nope_fp8 = to_fp8(q_nope, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
            q_x_fp8 = to_fp8(q_x, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
            q_y_fp8 = to_fp8(q_y, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
            if V > 0:
                k_scale = load_scale(k_scale_inv, K_SCALE_KIND)
                v_scale = load_scale(v_scale_inv, V_SCALE_KIND)
                k_nope_fp8 = to_fp8(
                    k_nope, k_scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION
                )
                k_x_fp8 = to_fp8(k_x, k_scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
                k_y_fp8 = to_fp8(k_y, k_scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
                v_fp8 = to_fp8(v, v_scale, V_SCALE_KIND, FP8_DTYPE, CONVERSION)

            row = t * NUM_HEADS + h
            q_out_row = q_fp8_ptr + row * (NOPE + ROPE)
            tl.store(q_out_row + nope, q_nope_fp8, mask=nope_mask)
            _store_pairs(q_out_row + NOPE, live, q_x_fp8, q_y_fp8, HALF, HALF_P2, NEOX)
            if V > 0:
                k_out_row = k_fp8_ptr + row * (NOPE + ROPE)
                tl.store(k_out_row + nope, k_nope_fp8, mask=nope_mask)
                k_x_fp8 = tl.broadcast_to(k_x_fp8, (BLOCK_T, BLOCK_H, HALF_P2))
                k_y_fp8 = tl.broadcast_to(k_y_fp8, (BLOCK_T, BLOCK_H, HALF_P2))
                _store_pairs(
                    k_out_row + NOPE, live, k_x_fp8, k_y_fp8, HALF, HALF_P2, NEOX
                )
                tl.store(v_fp8_ptr + row * V + dim_v, v_fp8, mask=v_mask)
    if LORA > 0:
        if part >= HEAD_BLOCKS:
            cached = t < num_cache_rows
            rotated = live if K_PE_OUT else cached
            lora = tl.arange(0, LORA_P2)[None, None, :]
            lora_mask = cached & (lora < LORA)
            latent = tl.load(kv_a_ptr + t * kv_a_token_stride + lora, mask=lora_mask)
            slot = tl.load(cache_loc_ptr + t, mask=cached, other=0).to(tl.int64)
            x, y = _load_pairs(k_pe_row, rotated, HALF, HALF_P2, NEOX)
            cos_t, sin_t = load_cos_sin(
                positions_ptr,
                cos_sin_ptr,
                cos_sin_row_stride,
                t,
                rotated,
                HALF,
                HALF_P2,
                ROPE_STYLE,
            )
            x, y = rotate(x, y, cos_t, sin_t, ROPE_STYLE)
            if K_PE_OUT:
                scale = load_scale(k_scale_inv, K_SCALE_KIND)
                k_x_out = to_fp8(x, scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
                k_y_out = to_fp8(y, scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
                row_out = k_pe_out_ptr + t * ROPE
                _store_pairs(row_out, live, k_x_out, k_y_out, HALF, HALF_P2, NEOX)
            latent_fp8 = to_fp8(latent, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
            x_fp8 = to_fp8(x, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
            y_fp8 = to_fp8(y, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
            cache_row = kv_cache_ptr + slot * kv_cache_slot_stride
            tl.store(cache_row + lora, latent_fp8, mask=lora_mask)
            _store_pairs(cache_row + LORA, cached, x_fp8, y_fp8, HALF, HALF_P2, NEOX)


def mla_prefill_quantize_fp8(
    *,
    q: torch.Tensor,
    kv: Optional[torch.Tensor],
    kv_a: torch.Tensor,
    k_pe: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: Optional[torch.Tensor],
    is_neox: bool,
    qk_nope_head_dim: int,
    kv_cache: Optional[torch.Tensor] = None,
    cache_loc: Optional[torch.Tensor] = None,
    k_pe_out: Optional[torch.Tensor] = None,
    k_scale_inv: Union[float, torch.Tensor] = 1.0,
    v_scale_inv: Union[float, torch.Tensor] = 1.0,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    enable_pdl: Optional[bool] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Prepare the FP8 operands of an MLA prefill and write the KV cache in one launch.

    With R the rotary embedding at a token's position, for each token and head:
    ``q = fp8(cat(q_nope, R(q_pe)))``, ``k = fp8(cat(k_nope, R(k_pe)) * k_scale_inv)``,
    ``v = fp8(v * v_scale_inv)``, and for each cached token
    ``kv_cache[cache_loc] = fp8(cat(kv_a, R(k_pe)))``, unscaled. R rotates pair i,
    (x, y), to (x cos - y sin, y cos + x sin) in float32, where cos and sin are elements
    i and rope/2 + i of the position's row of cos_sin_cache (Su et al., RoFormer, 2021).

    Args:
        q: [s, h, nope + rope], bfloat16 or float16. Here and below the last dimension
            is contiguous and the other strides are free; no input is modified. nope,
            rope and v are multiples of 16. With h = 0 it only says what they are, and
            there is a kv_cache and no kv.
        kv: [s, h, nope + v], the output of ``kv_b_proj``, of q's dtype; None to prepare
            neither k nor v.
        kv_a: [s, lora], the latent after its norm, of q's dtype.
        k_pe: [s, 1, rope] or [s, rope], before RoPE, of q's dtype.
        positions: [s], int32 or int64, each below cos_sin_cache's length (not checked).
        cos_sin_cache: [max_position, rope] float32, cosines in the first half of a row
            and sines in the second; None for no RoPE.
        is_neox: pair i is elements (i, rope/2 + i); otherwise (2i, 2i + 1).
        qk_nope_head_dim: nope.
        kv_cache: [slots, 1, lora + rope] or [slots, lora + rope], fp8_dtype or uint8,
            or None to write no cache.
        cache_loc: [n], int32 or int64, n <= s: the slots of the first n tokens, each
            in range (not checked). Given with kv_cache.
        k_pe_out: [s, rope], contiguous, fp8_dtype, to write ``fp8(R(k_pe) *
            k_scale_inv)`` of all tokens to; with kv_cache only.
        k_scale_inv, v_scale_inv: reciprocals of the quantization scales, each a float
            or a float32 tensor of one element on the device, which is read there.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        enable_pdl: launch with programmatic dependent launch. None: where the GPU has
            it. True is ignored on a GPU without it.

    Returns:
        (q [s, h, nope + rope], k [s, h, nope + rope], v [s, h, v]), contiguous, in FP8;
        rounding as in ``fp8_common``; k and v are None without kv.

    Raises:
        ValueError: an argument of wrong dtype, shape, layout or device, by its name.
        RuntimeError: the GPU has no FP8 conversion (before SM89).
    """
    if kv_cache is not None and kv_cache.dtype == torch.uint8:
        kv_cache = kv_cache.view(fp8_dtype)
    k_kind, k_scale_inv = as_scale("k_scale_inv", k_scale_inv, q)
    v_kind, v_scale_inv = as_scale("v_scale_inv", v_scale_inv, q)
    settings = (is_neox, qk_nope_head_dim, k_kind, v_kind, fp8_dtype, enable_pdl)
    laid_out = (q, kv, kv_a, k_pe, cos_sin_cache, kv_cache)
    given = (*laid_out, k_pe_out)
    indices = (positions, cache_loc)
    key = layout_key(*given) + index_key(*indices)
    plan = _PLANS.find((*key, *settings), _make_plan, *given, *indices, *settings)
    s = q.shape[0]
    kv_tokens = s if kv is None else kv.shape[0]
    if not s == kv_tokens == kv_a.shape[0] == k_pe.shape[0] == positions.shape[0]:
        raise ValueError(
            "q, kv, kv_a, k_pe and positions must have the same number of tokens, got "
            f"{s}, {kv_tokens}, {kv_a.shape[0]}, {k_pe.shape[0]} and "
            f"{positions.shape[0]}"
        )
    if k_pe_out is not None and k_pe_out.shape[0] != s:
        raise ValueError(
            f"k_pe_out must have q's {s} tokens, got shape {tuple(k_pe_out.shape)}"
        )
    num_cache_rows = 0 if cache_loc is None else cache_loc.shape[0]
    if num_cache_rows > s:
        raise ValueError(
            f"cache_loc must have at most one slot for each of q's {s} tokens, got "
            f"{num_cache_rows}"
        )
    contiguous = torch.contiguous_format
    q_out = torch.empty_like(q, dtype=fp8_dtype, memory_format=contiguous)
    k_out = v_out = None
    if kv is not None:
        k_out = torch.empty_like(q_out)
        v_shape = (*q.shape[:2], kv.shape[2] - qk_nope_head_dim)
        v_out = q.new_empty(v_shape, dtype=fp8_dtype)
    if s > 0:
        plan.launch(
            s,
            (*laid_out, positions, cache_loc, q_out, k_out, v_out, k_pe_out),
            (k_scale_inv, v_scale_inv, s, num_cache_rows, *plan.strides),
        )
    return q_out, k_out, v_out


_PLANS = PlanCache()


def _make_plan(
    q,
    kv,
    kv_a,
    k_pe,
    cos_sin_cache,
    kv_cache,
    k_pe_out,
    positions,
    cache_loc,
    is_neox,
    nope,
    k_kind,
    v_kind,
    fp8_dtype,
    enable_pdl,
) -> Plan:
    check_fp8_dtype(fp8_dtype)
    check_device("q", q)
    if q.dim() != 3 or not 0 < nope < q.shape[2]:
        raise ValueError(
            f"q must be [s, h, nope + rope] with qk_nope_head_dim={nope}, got shape "
            f"{tuple(q.shape)}"
        )
    h, rope = q.shape[1], q.shape[2] - nope
    if h == 0 and (kv is not None or kv_cache is None):
        raise ValueError("q must have heads unless it is for a kv_cache alone")
    if kv is not None and (kv.dim() != 3 or kv.shape[1] != h or kv.shape[2] <= nope):
        raise ValueError(
            f"kv must be [s, {h}, {nope} + v], got shape {tuple(kv.shape)}"
        )
    if kv_a.dim() != 2:
        raise ValueError(f"kv_a must be [s, lora], got shape {tuple(kv_a.shape)}")
    if rope_dim(k_pe) != rope:
        raise ValueError(
            f"k_pe must have q's rope dimension, {rope}, got shape {tuple(k_pe.shape)}"
        )
    check_head_dims(nope=nope, rope=rope)
    check_input("q", q)
    dim_v = 0
    if kv is not None:
        dim_v = kv.shape[2] - nope
        check_head_dims(v=dim_v)
        check_input("kv", kv, q)
    check_input("kv_a", kv_a, q)
    check_input("k_pe", k_pe, q)
    check_index("positions", positions, q.device)
    style = ROPE_NONE
    if cos_sin_cache is not None:
        style = ROPE_NEOX if is_neox else ROPE_INTERLEAVED
        check_cos_sin_cache(cos_sin_cache, rope, q.device)
    if (kv_cache is None) != (cache_loc is None):
        raise ValueError("kv_cache and cache_loc must be given together")
    lora = 0
    if kv_cache is not None:
        lora = kv_a.shape[1]
        check_index("cache_loc", cache_loc, q.device)
        _check_kv_cache(kv_cache, lora + rope, fp8_dtype, q.device)
    if k_pe_out is not None:
        if kv_cache is None:
            raise ValueError("k_pe_out must be given with kv_cache only")
        shape = (k_pe_out.shape[0], rope)
        check_output("k_pe_out", k_pe_out, shape, fp8_dtype, q.device)
        if not k_pe_out.is_contiguous():
            raise ValueError(
                f"k_pe_out must be contiguous, got strides {k_pe_out.stride()}"
            )

    wide = nope + dim_v > 256
    program_rows = _PROGRAM_ROWS_OF_WIDE_HEADS if wide else _PROGRAM_ROWS
    block_t, block_h = _PROGRAM_CACHE_ROWS, 1
    if h > 0:
        block_t, block_h = block_shape(h, program_rows)
    launcher = Launcher(
        _mla_prefill_quantize_fp8_kernel,
        q.device,
        enable_pdl,
        NUM_HEADS=h,
        NOPE=nope,
        ROPE=rope,
        V=dim_v,
        LORA=lora,
        K_PE_OUT=k_pe_out is not None,
        NOPE_P2=triton.next_power_of_2(nope),
        HALF_P2=triton.next_power_of_2(rope // 2),
        V_P2=triton.next_power_of_2(max(dim_v, 1)),
        LORA_P2=triton.next_power_of_2(max(lora, 1)),
        ROPE_STYLE=style.value,
        K_SCALE_KIND=k_kind,
        V_SCALE_KIND=v_kind,
        FP8_DTYPE=FP8_DTYPES[fp8_dtype],
        BLOCK_T=block_t,
        BLOCK_H=block_h,
    )
    strides = (
        *q.stride()[:2],
        *((0, 0) if kv is None else kv.stride()[:2]),
        kv_a.stride(0),
        k_pe.stride(0),
        0 if cos_sin_cache is None else cos_sin_cache.stride(0),
        0 if kv_cache is None else kv_cache.stride(0),
    )
    return Plan(launcher, block_t, h // block_h + (lora > 0), strides)


def check_cos_sin_cache(cache: torch.Tensor, rope: int, device: torch.device) -> None:
    if (
        cache.dim() != 2
        or cache.shape[1] != rope
        or cache.dtype != torch.float32
        or cache.stride(1) != 1
        or cache.device != device
    ):
        raise ValueError(
            f"cos_sin_cache must be float32 [max_position, {rope}] on {device} with a "
            f"contiguous last dimension, got {cache.dtype} of shape "
            f"{tuple(cache.shape)} on {cache.device}"
        )


def _check_kv_cache(
    cache: torch.Tensor, row: int, fp8_dtype: torch.dtype, device: torch.device
) -> None:
    if (
        cache.shape[1:] not in ((1, row), (row,))
        or cache.dtype != fp8_dtype
        or cache.stride(-1) != 1
        or cache.device != device
    ):
        raise ValueError(
            f"kv_cache must be {fp8_dtype} or uint8 [slots, 1, {row}] on {device} with "
            f"a contiguous last dimension, got {cache.dtype} of shape "
            f"{tuple(cache.shape)} on {cache.device}"
        )
