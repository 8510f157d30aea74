"""Elementwise BF16/FP16 to FP8 quantization."""

from __future__ import annotations

from typing import Optional, Union

import torch
import triton
import triton.language as tl

from sglang.jit_kernel.fp8_common import (
    FP8_DTYPES,
    INPUT_DTYPES,
    Launcher,
    as_scale,
    check_device,
    check_fp8_dtype,
    check_output,
    load_scale,
    to_fp8,
    wait_for_inputs,
)


@triton.jit(do_not_specialize=["scale_inv", "num_tiles"])
def _fp8_quantize_kernel(
    x_ptr,
    out_ptr,
    scale_inv,
    num_tiles,
    x_row_stride,
    out_row_stride,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    FP8_DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):
    """A row of N elements is cut into tiles of WIDTH; a program takes BLOCK tiles."""
    TILES_PER_ROW: tl.constexpr = (N + WIDTH - 1) // WIDTH
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tile // TILES_PER_ROW
    column = ((tile % TILES_PER_ROW) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    mask = (tile < num_tiles)[:, None]
    if N % WIDTH != 0:
        mask = mask & (column < N)

    wait_for_inputs(ENABLE_PDL)

    x = tl.load(x_ptr + row[:, None] * x_row_stride + column, mask=mask)
    scale = load_scale(scale_inv, SCALE_KIND)
    y = to_fp8(x, scale, SCALE_KIND, FP8_DTYPE, CONVERSION)
    tl.store(out_ptr + row[:, None] * out_row_stride + column, y, mask=mask)


def _flatten_to_2d(x: torch.Tensor) -> tuple[int, int, int]:
    """Fold the leading dimensions of x onto one row stride, without a copy.

    Returns:
        (rows, row length, row stride in elements).

    Raises:
        ValueError: the last dimension is not contiguous, or no single row stride
            reaches every row.
    """
    if x.dim() == 0:
        return 1, 1, 1
    length = x.shape[-1]
    if length > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"x must have a contiguous last dimension, got shape {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    # A dimension of size one takes no part in addressing, whatever its stride.
    leading = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1]) if n != 1]
    if x.numel() == 0 or not leading:
        return x.numel() // max(length, 1), length, length
    for (_, outer), (size, inner) in zip(leading, leading[1:]):
        if outer != size * inner:
            raise ValueError(
                f"x of shape {tuple(x.shape)} with strides {x.stride()} has no single "
                "row stride; pass x.contiguous() or a slice of the last dimension"
            )
    return x.numel() // length, length, leading[-1][1]


def _tile_width(row_length: int) -> int:
    """The widest power of two, up to 512, that divides a row, or else covers it."""
    divisor = min(row_length & -row_length, 512)
    return divisor if divisor >= 16 else min(triton.next_power_of_2(row_length), 512)


# Elements a program quantizes: two 16-byte loads in flight for each of 128 threads.
_PROGRAM_ELEMENTS = 2048


def fp8_quantize(
    x: torch.Tensor,
    scale_inv: Union[float, torch.Tensor] = 1.0,
    out: Optional[torch.Tensor] = None,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """Quantize x to FP8 elementwise: ``fp8(x * scale_inv)``.

    Args:
        x: bfloat16 or float16, any rank and size. The last dimension is contiguous and
            the leading ones fold onto one row stride (a contiguous tensor, or a slice
            of one along the last dimension).
        scale_inv: reciprocal of the quantization scale, a float or a float32 tensor of
            one element on x's device, which is read there. 1.0 costs nothing.
        out: FP8 tensor of x's shape to write, under the same layout rule; allocated
            contiguous by default.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        enable_pdl: launch with programmatic dependent launch. None: where the GPU has
            it. True is ignored on a GPU without it.

    Returns:
        The FP8 tensor of x's shape; rounding as in ``fp8_common``.

    Raises:
        ValueError: an argument of wrong dtype, shape, layout or device, by its name.
        RuntimeError: the GPU has no FP8 conversion (before SM89).
    """
    check_fp8_dtype(fp8_dtype)
    check_device("x", x)
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x must be bfloat16 or float16, got {x.dtype}")
    kind, scale_inv = as_scale("scale_inv", scale_inv, x)
    rows, length, x_row_stride = _flatten_to_2d(x)
    if out is None:
        out = torch.empty(x.shape, dtype=fp8_dtype, device=x.device)
        out_row_stride = length
    else:
        check_output("out", out, x.shape, fp8_dtype, x.device)
        try:
            _, _, out_row_stride = _flatten_to_2d(out)
        except ValueError as error:
            raise ValueError(f"out: {error}") from None
    if x.numel() == 0:
        return out

    if x_row_stride == length and out_row_stride == length:
        # Without gaps between rows the row length is free: take one that tiles well.
        total = rows * length
        divisor = min(total & -total, 512)
        if divisor >= 16:
            rows, length = total // divisor, divisor
            x_row_stride = out_row_stride = divisor

    width = _tile_width(length)
    num_tiles = rows * triton.cdiv(length, width)
    block = _PROGRAM_ELEMENTS // width
    launcher = Launcher(
        _fp8_quantize_kernel,
        x.device,
        enable_pdl,
        N=length,
        WIDTH=width,
        BLOCK=block,
        SCALE_KIND=kind,
        FP8_DTYPE=FP8_DTYPES[fp8_dtype],
    )
    numbers = (scale_inv, num_tiles, x_row_stride, out_row_stride)
    launcher(triton.cdiv(num_tiles, block), (x, out), numbers)
    return out
