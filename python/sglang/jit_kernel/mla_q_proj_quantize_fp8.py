"""Q of MLA straight from its latent: ``q_b_proj`` with a rotated FP8 operand as its output."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang.jit_kernel.fp8_common import (
    FP8_DTYPES,
    SCALE_UNIT,
    Launcher,
    Plan,
    PlanCache,
    check_device,
    check_head_dims,
    check_index,
    check_input,
    index_key,
    layout_key,
    to_fp8,
    wait_for_inputs,
)
from sglang.jit_kernel.mla_kv_proj_quantize_fp8 import (
    GROUP,
    block_and_part,
    check_gpu_copies_tiles,
    check_projected,
    resident_programs,
)
from sglang.jit_kernel.mla_prefill_quantize_fp8 import (
    ROPE_INTERLEAVED,
    check_cos_sin_cache,
    load_cos_sin,
    rotate,
)

FP8 = torch.float8_e4m3fn
NOPE, ROPE = 128, 64
# Tokens, heads of nope and elements of lora of a tile. A tile of rope is as wide, and of
# twice as many heads. One program an SM: of eight shapes tried on SM90 the fastest.
_BLOCK_T, _HEADS, _BLOCK_K = 128, 2, 64
_OPTIONS = dict(num_warps=8, num_stages=4)


@triton.jit
def _project_tiles(
    positions_ptr,
    cos_sin_ptr,
    q_ptr,
    q_a_desc,
    weight_desc,
    first,
    num_tokens,
    cos_sin_row_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    OFFSET: tl.constexpr,
    ROW: tl.constexpr,
    LORA: tl.constexpr,
    ROTATED: tl.constexpr,
    FP8_DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The tiles from `first` on that are this program's: BLOCK_T tokens, DIM elements
    from OFFSET on in the rows of HEADS heads. Returns how many all programs have."""
    COLUMNS: tl.constexpr = HEADS * DIM
    PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    HALF: tl.constexpr = DIM // 2
    blocks = tl.cdiv(num_tokens, BLOCK_T)
    tiles = blocks * PARTS
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
        block, part = block_and_part(tile, blocks, PARTS, GROUP)
        tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        acc = tl.zeros((BLOCK_T, COLUMNS), dtype=tl.float32)
        for i in range(0, LORA, BLOCK_K):
            q_a = q_a_desc.load([block * BLOCK_T, i])
            weight = weight_desc.load([part * HEADS, OFFSET, i])
            acc = tl.dot(q_a, weight.reshape(COLUMNS, BLOCK_K).T, acc)

        if ROTATED:
            t = tokens[:, None, None]
            cos, sin = load_cos_sin(
                positions_ptr,
                cos_sin_ptr,
                cos_sin_row_stride,
                t,
                t < num_tokens,
                HALF,
                HALF,
                ROPE_INTERLEAVED,
            )
            x, y = tl.split(acc.reshape(BLOCK_T, HEADS, HALF, 2))
            x, y = rotate(x, y, cos, sin, ROPE_INTERLEAVED)
            acc = tl.join(x, y).reshape(BLOCK_T, COLUMNS)
        out = to_fp8(acc, 1.0, SCALE_UNIT, FP8_DTYPE, CONVERSION)
        t = tokens[:, None]
        column = tl.arange(0, COLUMNS)[None, :]
        head = part * HEADS + column // DIM
        row = q_ptr + (t * NUM_HEADS + head) * ROW + OFFSET
        mask = (t < num_tokens) & (head < NUM_HEADS)
        tl.store(row + column % DIM, out, mask=mask)
    return tiles


@triton.jit(
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions_ptr"]
)
def _mla_q_proj_quantize_fp8_kernel(
    positions_ptr,
    cos_sin_ptr,
    q_ptr,
    q_a_desc,
    nope_desc,
    rope_desc,
    num_tokens,
    cos_sin_row_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LORA: tl.constexpr,
    FP8_DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):
    """Programs take the tiles of nope in turn, then those of rope."""
    ROPE_HEADS: tl.constexpr = HEADS * NOPE // ROPE
    wait_for_inputs(ENABLE_PDL)
    first = tl.program_id(0)
    nope_tiles = _project_tiles(
        positions_ptr,
        cos_sin_ptr,
        q_ptr,
        q_a_desc,
        nope_desc,
        first,
        num_tokens,
        cos_sin_row_stride,
        NUM_HEADS,
        HEADS,
        NOPE,
        0,
        NOPE + ROPE,
        LORA,
        False,
        FP8_DTYPE,
        CONVERSION,
        BLOCK_T,
        BLOCK_K,
        GROUP,
    )
    # The turn goes on with the program after the one that had nope's last tile.
    programs = tl.num_programs(0)
    first = (first + programs - nope_tiles % programs) % programs
    _project_tiles(
        positions_ptr,
        cos_sin_ptr,
        q_ptr,
        q_a_desc,
        rope_desc,
        first,
        num_tokens,
        cos_sin_row_stride,
        NUM_HEADS,
        ROPE_HEADS,
        ROPE,
        NOPE,
        NOPE + ROPE,
        LORA,
        True,
        FP8_DTYPE,
        CONVERSION,
        BLOCK_T,
        BLOCK_K,
        GROUP,
    )


def mla_q_proj_quantize_fp8(
    q_a: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """Build the FP8 Q operand of MLA's multi-head attention out of Q's latent.

    With (q_nope, q_pe) of each head = ``q_a @ weight.T``, summed in float32 and not
    rounded before FP8: ``q = fp8(cat(q_nope, R(q_pe)))``, unscaled. R, the rotary
    embedding at a token's position, is that of ``mla_prefill_quantize_fp8`` with
    interleaved pairs.

    Args:
        q_a: [s, lora], bfloat16 or float16, the latent after its norm; the last
            dimension is contiguous, rows begin at multiples of 16 bytes.
        weight: [h * (nope + rope), lora], that of ``q_b_proj``, contiguous, of q_a's
            dtype; nope is 128 and rope 64, lora is a multiple of 16.
        positions: [s], int32 or int64, each below cos_sin_cache's length (not checked).
        cos_sin_cache: [max_position, rope] float32, cosines in the first half of a row
            and sines in the second.
        enable_pdl: launch with programmatic dependent launch. None: where the GPU has
            it. True is ignored on a GPU without it.

    Returns:
        q [s, h, nope + rope], contiguous, in ``torch.float8_e4m3fn``; rounding as in
        ``fp8_common``.

    Raises:
        ValueError: an argument of wrong dtype, shape, layout or device, by its name.
        RuntimeError: the GPU cannot copy tiles by descriptor (before SM90).
    """
    laid_out = (q_a, weight, cos_sin_cache)
    key = (*layout_key(*laid_out), weight.shape[0], *index_key(positions), enable_pdl)
    plan = _PLANS.find(key, _make_plan, *laid_out, positions, enable_pdl)
    s, lora = q_a.shape
    if positions.shape[0] != s:
        raise ValueError(
            f"positions must have q_a's {s} tokens, got shape {tuple(positions.shape)}"
        )
    row = NOPE + ROPE
    q = q_a.new_empty((s, weight.shape[0] // row, row), dtype=FP8)
    if s > 0:
        by_head = [q.shape[1], row, lora], [row * lora, lora, 1]
        rope_heads = _HEADS * NOPE // ROPE
        descriptors = (
            TensorDescriptor(q_a, [s, lora], [q_a.stride(0), 1], [_BLOCK_T, _BLOCK_K]),
            TensorDescriptor(weight, *by_head, [_HEADS, NOPE, _BLOCK_K]),
            TensorDescriptor(weight, *by_head, [rope_heads, ROPE, _BLOCK_K]),
        )
        tensors = (positions, cos_sin_cache, q)
        plan.launch(s, tensors, (*descriptors, s, *plan.strides))
    return q


_PLANS = PlanCache()


def _make_plan(q_a, weight, cos_sin_cache, positions, enable_pdl) -> Plan:
    check_device("q_a", q_a)
    check_gpu_copies_tiles(q_a)
    if q_a.dim() != 2:
        raise ValueError(f"q_a must be [s, lora], got shape {tuple(q_a.shape)}")
    check_input("q_a", q_a)
    check_input("weight", weight, q_a)
    check_head_dims(lora=q_a.shape[1])
    check_projected("q_a", q_a, weight, NOPE + ROPE)
    check_index("positions", positions, q_a.device)
    check_cos_sin_cache(cos_sin_cache, ROPE, q_a.device)
    heads = weight.shape[0] // (NOPE + ROPE)
    launcher = Launcher(
        _mla_q_proj_quantize_fp8_kernel,
        q_a.device,
        enable_pdl,
        _OPTIONS,
        NUM_HEADS=heads,
        HEADS=_HEADS,
        NOPE=NOPE,
        ROPE=ROPE,
        LORA=q_a.shape[1],
        FP8_DTYPE=FP8_DTYPES[FP8],
        BLOCK_T=_BLOCK_T,
        BLOCK_K=_BLOCK_K,
        GROUP=GROUP,
    )
    parts = -(-heads // _HEADS) - (-heads // (_HEADS * NOPE // ROPE))
    strides = (cos_sin_cache.stride(0),)
    return Plan(launcher, _BLOCK_T, parts, strides, resident_programs(q_a, 1))
