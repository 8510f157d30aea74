"""K and V of MLA straight from the latent: ``kv_b_proj`` with FP8 operands as its output."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang.jit_kernel.fp8_common import (
    FP8_DTYPES,
    SCALE_FLOAT,
    SCALE_UNIT,
    Launcher,
    Plan,
    PlanCache,
    as_scale,
    check_device,
    check_head_dims,
    check_input,
    check_output,
    layout_key,
    load_scale,
    rope_dim,
    to_fp8,
    wait_for_inputs,
)

FP8 = torch.float8_e4m3fn
# nope and v.
HEAD_DIM = 128
# Rows and columns of the weight, and columns of the latent, that share a scale in FP8.
SCALE_BLOCK = 128
# Blocks of tokens whose tiles follow one another, so that weights are read from L2.
GROUP = 8


class _Tile(NamedTuple):
    """What a program computes at a time, and how. Fastest of those tried on SM90."""

    tokens: int
    columns: int  # of a head's nope and v
    lora: int
    per_sm: int  # programs
    options: dict[str, int]  # Triton's


_TILE = _Tile(128, 2 * HEAD_DIM, 64, 1, dict(num_warps=8, num_stages=4))
# One of two programs stores while the other's tensor cores work.
_FP8_TILE = _Tile(64, SCALE_BLOCK, SCALE_BLOCK, 2, dict(num_warps=4, num_stages=3))


@triton.jit
def block_and_part(tile, blocks, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """The block of tokens and the part of the weight of a tile, by its number."""
    group = tile // (GROUP * PARTS)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    within = tile % (GROUP * PARTS)
    return group * GROUP + within % size, within // size


@triton.jit(do_not_specialize=["k_scale_inv", "v_scale_inv", "num_tokens"])
def _mla_kv_proj_quantize_fp8_kernel(
    k_pe_ptr,
    kv_a_scale_ptr,
    weight_scale_ptr,
    k_ptr,
    v_ptr,
    kv_a_desc,
    weight_desc,
    k_scale_inv,
    v_scale_inv,
    num_tokens,
    k_pe_token_stride,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_P2: tl.constexpr,
    LORA: tl.constexpr,
    K_SCALE_KIND: tl.constexpr,
    V_SCALE_KIND: tl.constexpr,
    K_PE_IN_FP8: tl.constexpr,
    FP8_DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):
    """Programs take the tiles in turn: BLOCK_T tokens, COLUMNS of k_nope and v."""
    UNIT: tl.constexpr = K_SCALE_KIND == SCALE_UNIT and V_SCALE_KIND == SCALE_UNIT
    SCALE_KIND: tl.constexpr = SCALE_UNIT if UNIT else SCALE_FLOAT
    wait_for_inputs(ENABLE_PDL)
    k_scale = load_scale(k_scale_inv, K_SCALE_KIND)
    v_scale = load_scale(v_scale_inv, V_SCALE_KIND)
    HEAD_PARTS: tl.constexpr = 2 * DIM // COLUMNS
    PARTS: tl.constexpr = NUM_HEADS * HEAD_PARTS
    blocks = tl.cdiv(num_tokens, BLOCK_T)
    tiles = blocks * PARTS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block, part = block_and_part(tile, blocks, PARTS, GROUP)
        t = (block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
        acc = tl.zeros((BLOCK_T, COLUMNS), dtype=tl.float32)
        for i in range(0, LORA, BLOCK_K):
            kv_a = kv_a_desc.load([block * BLOCK_T, i])
            weight = weight_desc.load([part * COLUMNS, i])
            if weight_scale_ptr is None:
                acc = tl.dot(kv_a, weight.T, acc)
            else:
                # A tile has a scale: the tensor cores sum one block, float32 the blocks.
                j = i // BLOCK_K
                scale = tl.load(weight_scale_ptr + part * (LORA // BLOCK_K) + j)
                if kv_a_scale_ptr is not None:
                    ptr = kv_a_scale_ptr + t * (LORA // BLOCK_K) + j
                    scale *= tl.load(ptr, mask=t < num_tokens, other=0.0)
                acc += tl.dot(kv_a, weight.T) * scale

        row = t * NUM_HEADS + part // HEAD_PARTS
        k_row = k_ptr + row * (DIM + ROPE)
        column = tl.arange(0, COLUMNS)[None, :]
        rope = tl.arange(0, ROPE_P2)[None, :]
        mask = t < num_tokens
        has_k = part % HEAD_PARTS == 0
        rope_mask = mask & has_k & (rope < ROPE)
        k_pe = tl.load(k_pe_ptr + t * k_pe_token_stride + rope, mask=rope_mask)
        # In a tile of one of the two a scalar: nothing is chosen for each element.
        is_k = has_k if COLUMNS == DIM else column < DIM
        scale = tl.where(is_k, k_scale, v_scale)
        out = to_fp8(acc, scale, SCALE_KIND, FP8_DTYPE, CONVERSION)
        out_row = tl.where(is_k, k_row, v_ptr + row * DIM)
        tl.store(out_row + column % DIM, out, mask=mask)
        if not K_PE_IN_FP8:
            k_pe = to_fp8(k_pe, k_scale, K_SCALE_KIND, FP8_DTYPE, CONVERSION)
        tl.store(k_row + DIM + rope, k_pe, mask=rope_mask)


def mla_kv_proj_quantize_fp8(
    kv_a: torch.Tensor,
    weight: torch.Tensor,
    k_pe: torch.Tensor,
    k_scale_inv: Union[float, torch.Tensor] = 1.0,
    v_scale_inv: Union[float, torch.Tensor] = 1.0,
    enable_pdl: Optional[bool] = None,
    *,
    kv_a_scale: Optional[torch.Tensor] = None,
    weight_scale: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build the FP8 K and V operands of MLA's multi-head attention out of the latent.

    With (k_nope, v) of each head = ``kv_a @ weight.T``, summed in float32 and not rounded
    before FP8: ``k = fp8(cat(k_nope, broadcast(k_pe)) * k_scale_inv)``,
    ``v = fp8(v * v_scale_inv)``. k_pe is rotated already; in FP8 it is copied.

    A weight in FP8 has a scale for each block of 128 x 128, and so has the latent for each
    128 elements of a token; they are multiplied by in float32, after the tensor cores
    have summed 128 products.

    Args:
        kv_a: [s, lora], bfloat16 or float16, the latent after its norm; here and below
            the last dimension is contiguous. Rows begin at multiples of 16 bytes. With
            weight_scale it is ``torch.float8_e4m3fn``.
        weight: [h * (nope + v), lora], that of ``kv_b_proj``, contiguous, of kv_a's
            dtype; nope and v are 128, lora is a multiple of 16, in FP8 of 128.
        k_pe: [s, 1, rope] or [s, rope], bfloat16 or float16, kv_a's dtype if it is one
            of them, or in ``torch.float8_e4m3fn`` and times k_scale_inv; shared by the
            heads. rope is a multiple of 16.
        k_scale_inv, v_scale_inv: reciprocals of the quantization scales, each a float
            or a float32 tensor of one element on the device, which is read there.
        enable_pdl: launch with programmatic dependent launch. None: where the GPU has
            it. True is ignored on a GPU without it.
        kv_a_scale: [s, lora / 128], float32, contiguous: what kv_a in FP8 is to be
            multiplied by. None: by 1, as rows of the KV cache.
        weight_scale: [h * (nope + v) / 128, lora / 128], float32, contiguous: what a
            weight in FP8 is to be multiplied by.

    Returns:
        (k [s, h, nope + rope], v [s, h, v]), contiguous, in ``torch.float8_e4m3fn``;
        rounding as in ``fp8_common``.

    Raises:
        ValueError: an argument of wrong dtype, shape, layout or device, by its name.
        RuntimeError: the GPU cannot copy tiles by descriptor (before SM90).
    """
    k_kind, k_scale_inv = as_scale("k_scale_inv", k_scale_inv, kv_a)
    v_kind, v_scale_inv = as_scale("v_scale_inv", v_scale_inv, kv_a)
    inputs = (kv_a, weight, k_pe, kv_a_scale, weight_scale)
    settings = (k_kind, v_kind, enable_pdl)
    key = (*layout_key(*inputs), weight.shape[0], *settings)
    plan = _PLANS.find(key, _make_plan, *inputs, *settings)
    s, lora = kv_a.shape
    for name, x in (("k_pe", k_pe), ("kv_a_scale", kv_a_scale)):
        if x is not None and x.shape[0] != s:
            raise ValueError(
                f"{name} must have kv_a's {s} tokens, got shape {tuple(x.shape)}"
            )
    heads = weight.shape[0] // (2 * HEAD_DIM)
    k = kv_a.new_empty((s, heads, HEAD_DIM + k_pe.shape[-1]), dtype=FP8)
    v = kv_a.new_empty((s, heads, HEAD_DIM), dtype=FP8)
    if s > 0:
        tile = _tile(weight_scale)
        kv_a_box, weight_box = [tile.tokens, tile.lora], [tile.columns, tile.lora]
        descriptors = (
            TensorDescriptor(kv_a, [s, lora], [kv_a.stride(0), 1], kv_a_box),
            TensorDescriptor(weight, [*weight.shape], [lora, 1], weight_box),
        )
        plan.launch(
            s,
            (k_pe, kv_a_scale, weight_scale, k, v),
            (*descriptors, k_scale_inv, v_scale_inv, s, *plan.strides),
        )
    return k, v


def rows_are_aligned(x: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as the GPU copies tiles of them."""
    return (x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0


def check_gpu_copies_tiles(x: torch.Tensor) -> None:
    """Raise unless the GPU of x copies tiles by descriptor."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        raise RuntimeError("a projection with FP8 output needs compute capability 9.0")


def check_projected(name: str, x: torch.Tensor, weight: torch.Tensor, row: int) -> None:
    """Raise unless x is [s, lora] and weight [h * row, lora], as tiles of both can be
    copied. Their dtypes and devices are not looked at."""
    lora = x.shape[-1]
    if not rows_are_aligned(x):
        raise ValueError(
            f"{name} must have rows that begin at multiples of 16 bytes, got strides "
            f"{x.stride()} at {x.data_ptr():#x}"
        )
    if weight.dim() != 2 or weight.shape[0] % row or weight.shape[1] != lora:
        raise ValueError(
            f"weight must be [h * {row}, {lora}], got shape {tuple(weight.shape)}"
        )
    if weight.data_ptr() % 16 or not weight.is_contiguous() or weight.shape[0] == 0:
        raise ValueError(
            "weight must be contiguous, aligned to 16 bytes and not empty, got shape "
            f"{tuple(weight.shape)} with strides {weight.stride()}"
        )


def resident_programs(x: torch.Tensor, per_sm: int) -> int:
    """As many programs as the GPU of x runs at a time."""
    if not x.is_cuda:
        return 1
    properties = torch.cuda.get_device_properties(x.device)
    return properties.multi_processor_count * per_sm


_PLANS = PlanCache()


def _tile(weight_scale: Optional[torch.Tensor]) -> _Tile:
    return _TILE if weight_scale is None else _FP8_TILE


def _make_plan(
    kv_a, weight, k_pe, kv_a_scale, weight_scale, k_kind, v_kind, enable_pdl
) -> Plan:
    check_device("kv_a", kv_a)
    check_gpu_copies_tiles(kv_a)
    if kv_a.dim() != 2:
        raise ValueError(f"kv_a must be [s, lora], got shape {tuple(kv_a.shape)}")
    lora, row = kv_a.shape[1], 2 * HEAD_DIM
    if weight_scale is None:
        check_input("kv_a", kv_a)
        check_input("weight", weight, kv_a)
    else:
        check_output("kv_a", kv_a, kv_a.shape, FP8, kv_a.device)
        check_output("weight", weight, weight.shape, FP8, kv_a.device)
    check_head_dims(lora=lora)
    if weight_scale is not None and lora % SCALE_BLOCK:
        raise ValueError(f"lora must be a multiple of {SCALE_BLOCK} in FP8, got {lora}")
    check_projected("kv_a", kv_a, weight, row)
    _check_scales(kv_a, weight, kv_a_scale, weight_scale)
    rope = rope_dim(k_pe)
    check_head_dims(rope=rope)
    if k_pe.dtype == FP8:
        check_output("k_pe", k_pe, k_pe.shape, FP8, kv_a.device)
    else:
        # Of either dtype beside a latent in FP8.
        like = kv_a if weight_scale is None else kv_a.new_empty(0, dtype=k_pe.dtype)
        check_input("k_pe", k_pe, like)
    heads = weight.shape[0] // row
    tile = _tile(weight_scale)
    launcher = Launcher(
        _mla_kv_proj_quantize_fp8_kernel,
        kv_a.device,
        enable_pdl,
        tile.options,
        NUM_HEADS=heads,
        DIM=HEAD_DIM,
        ROPE=rope,
        ROPE_P2=triton.next_power_of_2(rope),
        LORA=lora,
        K_SCALE_KIND=k_kind,
        V_SCALE_KIND=v_kind,
        K_PE_IN_FP8=k_pe.dtype == FP8,
        FP8_DTYPE=FP8_DTYPES[FP8],
        BLOCK_T=tile.tokens,
        COLUMNS=tile.columns,
        BLOCK_K=tile.lora,
        GROUP=GROUP,
    )
    parts = weight.shape[0] // tile.columns
    programs = resident_programs(kv_a, tile.per_sm)
    return Plan(launcher, tile.tokens, parts, (k_pe.stride(0),), programs)


def _check_scales(kv_a, weight, kv_a_scale, weight_scale) -> None:
    """Raise unless there are float32 scales for every block, or none and no FP8."""
    if weight_scale is None:
        if kv_a_scale is not None:
            raise ValueError("kv_a_scale must come with weight_scale")
        return
    blocks = kv_a.shape[1] // SCALE_BLOCK
    for name, scale, shape in (
        ("kv_a_scale", kv_a_scale, (kv_a.shape[0], blocks)),
        ("weight_scale", weight_scale, (weight.shape[0] // SCALE_BLOCK, blocks)),
    ):
        if scale is not None and (
            scale.shape != shape
            or scale.dtype != torch.float32
            or scale.device != kv_a.device
            or not scale.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous torch.float32 of shape {shape} on "
                f"{kv_a.device}, got {scale.dtype} of shape {tuple(scale.shape)} with "
                f"strides {scale.stride()} on {scale.device}"
            )
