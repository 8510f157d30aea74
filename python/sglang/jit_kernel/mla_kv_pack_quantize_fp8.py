"""K and V of MLA prefix chunks, packed and quantized to FP8 in one launch."""

from __future__ import annotations

from typing import Optional, Union

import torch
import triton
import triton.language as tl

from sglang.jit_kernel.fp8_common import (
    FP8_DTYPES,
    Launcher,
    Plan,
    PlanCache,
    as_scale,
    block_shape,
    check_device,
    check_fp8_dtype,
    check_head_dims,
    check_input,
    check_output,
    layout_key,
    load_scale,
    rope_dim,
    to_fp8,
    wait_for_inputs,
)

# (token, head) rows a program takes: enough 16-byte loads in flight for each thread,
# and small batches still spread over the GPU.
_PROGRAM_ROWS = 8


@triton.jit(do_not_specialize=["num_tokens", "k_scale_inv", "v_scale_inv"])
def _mla_kv_pack_quantize_fp8_kernel(
    k_nope_ptr,
    k_pe_ptr,
    v_ptr,
    k_ptr,
    v_fp8_ptr,
    k_scale_inv,
    v_scale_inv,
    num_tokens,
    k_nope_token_stride,
    k_nope_head_stride,
    k_pe_token_stride,
    v_token_stride,
    v_head_stride,
    k_token_stride,
    k_head_stride,
    v_fp8_token_stride,
    v_fp8_head_stride,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_P2: tl.constexpr,
    ROPE_P2: tl.constexpr,
    V_P2: tl.constexpr,
    K_SCALE_KIND: tl.constexpr,
    V_SCALE_KIND: tl.constexpr,
    FP8_DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    HEAD_BLOCKS: tl.constexpr = NUM_HEADS // BLOCK_H
    t = (pid // HEAD_BLOCKS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = (pid % HEAD_BLOCKS).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = t[:, None, None]
    h = h[None, :, None]
    nope = tl.arange(0, NOPE_P2)[None, None, :]
    rope = tl.arange(0, ROPE_P2)[None, None, :]
    dim_v = tl.arange(0, V_P2)[None, None, :]
    live = t < num_tokens
    nope_mask = live & (nope < NOPE)
    rope_mask = live & (rope < ROPE)
    v_mask = live & (dim_v < V)

    wait_for_inputs(ENABLE_PDL)

    k_nope_row = k_nope_ptr + t * k_nope_token_stride + h * k_nope_head_stride
    k_nope = tl.load(k_nope_row + nope, mask=nope_mask)
    v = tl.load(v_ptr + t * v_token_stride + h * v_head_stride + dim_v, mask=v_mask)
    k_pe = tl.load(k_pe_ptr + t * k_pe_token_stride + rope, mask=rope_mask)
    k_scale = load_scale(k_scale_inv, K_SCALE_KIND)
    v_scale = load_scale(v_scale_inv, V_SCALE_KIND)

    k_nope = to_fp8(k_nope, k_scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
    k_pe = to_fp8(k_pe, k_scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
    v = to_fp8(v, v_scale, V_SCALE_KIND, FP8_DTYPE, CONVERSION)

    k_row = k_ptr + t * k_token_stride + h * k_head_stride
    v_fp8_row = v_fp8_ptr + t * v_fp8_token_stride + h * v_fp8_head_stride
    tl.store(k_row + nope, k_nope, mask=nope_mask)
    k_pe = tl.broadcast_to(k_pe, (BLOCK_T, BLOCK_H, ROPE_P2))
    tl.store(k_row + NOPE + rope, k_pe, mask=rope_mask)
    tl.store(v_fp8_row + dim_v, v, mask=v_mask)


def mla_kv_pack_quantize_fp8(
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    v: torch.Tensor,
    k_scale_inv: Union[float, torch.Tensor] = 1.0,
    v_scale_inv: Union[float, torch.Tensor] = 1.0,
    k_out: Optional[torch.Tensor] = None,
    v_out: Optional[torch.Tensor] = None,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    enable_pdl: Optional[bool] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build the FP8 K and V operands of MLA's multi-head attention in one launch.

    ``k = fp8(cat(k_nope, broadcast(k_pe)) * k_scale_inv)``, ``v = fp8(v * v_scale_inv)``.
    k_pe is taken as it is, already rotated.

    Args:
        k_nope: [s, h, nope], bfloat16 or float16. Here and below the last dimension is
            contiguous and a multiple of 16, and the other strides are free.
        k_pe: [s, 1, rope] or [s, rope], of k_nope's dtype; shared by the heads.
        v: [s, h, v], of k_nope's dtype.
        k_scale_inv, v_scale_inv: reciprocals of the quantization scales, each a float
            or a float32 tensor of one element on the device, which is read there.
        k_out: FP8 [s, h, nope + rope] to write; allocated contiguous by default.
        v_out: FP8 [s, h, v] to write; allocated contiguous by default.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        enable_pdl: launch with programmatic dependent launch. None: where the GPU has
            it. True is ignored on a GPU without it.

    Returns:
        (k, v) in FP8; rounding as in ``fp8_common``.

    Raises:
        ValueError: an argument of wrong dtype, shape, layout or device, by its name.
        RuntimeError: the GPU has no FP8 conversion (before SM89).
    """
    s = k_nope.shape[0] if k_nope.dim() > 0 else 0
    k_kind, k_scale_inv = as_scale("k_scale_inv", k_scale_inv, k_nope)
    v_kind, v_scale_inv = as_scale("v_scale_inv", v_scale_inv, k_nope)
    settings = (k_kind, v_kind, fp8_dtype, enable_pdl)
    inputs = (k_nope, k_pe, v)
    key = (*layout_key(*inputs, k_out, v_out), *settings)
    plan = _PLANS.find(key, _make_plan, *inputs, *settings)
    for name, x in (("k_pe", k_pe), ("v", v)):
        if x.shape[0] != s:
            raise ValueError(
                f"{name} must have k_nope's {s} tokens, got shape {tuple(x.shape)}"
            )
    k_shape = (*k_nope.shape[:2], k_nope.shape[2] + k_pe.shape[-1])
    if k_out is None:
        k_out = v.new_empty(k_shape, dtype=fp8_dtype)
    else:
        check_output("k_out", k_out, k_shape, fp8_dtype, v.device)
    if v_out is None:
        v_out = v.new_empty(v.shape, dtype=fp8_dtype)
    else:
        check_output("v_out", v_out, v.shape, fp8_dtype, v.device)
    if s > 0:
        plan.launch(
            s,
            (*inputs, k_out, v_out),
            (
                k_scale_inv,
                v_scale_inv,
                s,
                *plan.strides,
                *k_out.stride()[:2],
                *v_out.stride()[:2],
            ),
        )
    return k_out, v_out


_PLANS = PlanCache()


def _make_plan(k_nope, k_pe, v, k_kind, v_kind, fp8_dtype, enable_pdl) -> Plan:
    check_fp8_dtype(fp8_dtype)
    check_device("k_nope", k_nope)
    if k_nope.dim() != 3 or k_nope.shape[1] == 0:
        raise ValueError(f"k_nope must be [s, h, nope], got {tuple(k_nope.shape)}")
    h, nope = k_nope.shape[1:]
    rope = rope_dim(k_pe)
    if v.dim() != 3 or v.shape[1] != h:
        raise ValueError(f"v must be [s, {h}, v], got shape {tuple(v.shape)}")
    check_head_dims(nope=nope, rope=rope, v=v.shape[2])
    check_input("k_nope", k_nope)
    check_input("k_pe", k_pe, k_nope)
    check_input("v", v, k_nope)
    block_t, block_h = block_shape(h, _PROGRAM_ROWS)
    launcher = Launcher(
        _mla_kv_pack_quantize_fp8_kernel,
        v.device,
        enable_pdl,
        NUM_HEADS=h,
        NOPE=nope,
        ROPE=rope,
        V=v.shape[2],
        NOPE_P2=triton.next_power_of_2(nope),
        ROPE_P2=triton.next_power_of_2(rope),
        V_P2=triton.next_power_of_2(v.shape[2]),
        K_SCALE_KIND=k_kind,
        V_SCALE_KIND=v_kind,
        FP8_DTYPE=FP8_DTYPES[fp8_dtype],
        BLOCK_T=block_t,
        BLOCK_H=block_h,
    )
    strides = (*k_nope.stride()[:2], k_pe.stride(0), *v.stride()[:2])
    return Plan(launcher, block_t, h // block_h, strides)
