"""Elementwise BF16/FP16 to FP8 quantization, and what the FP8 kernels beside it share.

Rounding, for every kernel that uses ``_to_fp8``: the value is scaled in float32 and
rounded once, to nearest even; beyond the largest finite FP8 value, infinity included,
it saturates; NaN stays NaN.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import triton
import triton.language as tl

from sglang.jit_kernel.utils import cache_once, is_arch_support_pdl, is_hip_runtime

FP8_DTYPES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
_INPUT_DTYPES = (torch.bfloat16, torch.float16)

# How a scale reaches a kernel. UNIT removes the multiply at compile time.
SCALE_UNIT, SCALE_FLOAT, SCALE_TENSOR = 0, 1, 2


@triton.jit
def _load_scale(scale, KIND: tl.constexpr):
    if KIND == 2:
        return tl.load(scale)
    else:
        return scale


@triton.jit
def _to_fp8(
    x, scale, KIND: tl.constexpr, FP8_DTYPE: tl.constexpr, CONVERSION: tl.constexpr
):
    """``fp8(x * scale)``, rounded once to nearest even and saturated; NaN is kept."""
    y = x.to(tl.float32)
    if KIND != 0:
        y = y * scale
    if CONVERSION == 1:
        LIMIT: tl.constexpr = 448.0 if FP8_DTYPE == tl.float8e4nv else 57344.0
        y = tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if CONVERSION == 2:
        # Round to odd, to seven bits of mantissa: the truncation to float16 that follows
        # is then exact, down to FP8's subnormals, and the rounding to FP8 the only one.
        bits = y.to(tl.int32, bitcast=True)
        odd = (bits & ~0xFFFF) | tl.where((bits & 0xFFFF) != 0, 0x10000, 0)
        y = odd.to(tl.float32, bitcast=True)
    return y.to(FP8_DTYPE)


@triton.jit(do_not_specialize=["num_tiles"])
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

    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
        # The next kernel waits for this one's completion, so it may be launched now.
        tl.extra.cuda.gdc_launch_dependents()

    x = tl.load(x_ptr + row[:, None] * x_row_stride + column, mask=mask)
    scale = _load_scale(scale_inv, SCALE_KIND)
    y = _to_fp8(x, scale, SCALE_KIND, FP8_DTYPE, CONVERSION)
    tl.store(out_ptr + row[:, None] * out_row_stride + column, y, mask=mask)


@cache_once
def _check_gpu(device_index: int) -> None:
    if is_hip_runtime():
        return
    major, minor = torch.cuda.get_device_capability(device_index)
    if (major, minor) < (8, 9):
        raise RuntimeError(
            f"FP8 conversion needs compute capability 8.9 or later, but cuda:"
            f"{device_index} has {major}.{minor}; keep BF16 attention on this GPU"
        )


def check_device(name: str, x: torch.Tensor) -> None:
    """Raise unless Triton can launch an FP8 kernel on x's device."""
    if x.is_cuda:
        _check_gpu(x.device.index)
    elif not triton.knobs.runtime.interpret:
        raise ValueError(f"{name} must be on a GPU, got a tensor on {x.device}")


def check_input(name: str, x: torch.Tensor, like: Optional[torch.Tensor] = None):
    """Raise unless x is BF16/FP16 with a contiguous last dimension (and as `like`)."""
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as the other inputs, got "
            f"{x.dtype} on {x.device}"
        )
    if x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"{name} must be bfloat16 or float16, got {x.dtype}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )


def check_fp8_dtype(fp8_dtype: torch.dtype) -> None:
    if fp8_dtype not in FP8_DTYPES:
        raise ValueError(
            f"fp8_dtype must be one of {[str(d) for d in FP8_DTYPES]}, got {fp8_dtype}"
        )


def check_output(
    name: str, out: torch.Tensor, shape: tuple, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless `out` can take a result of this shape, each element once."""
    if out.shape != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {device}, got "
            f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if out.dim() > 0 and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension, got strides {out.stride()}"
        )
    extent = 1
    for size, stride in sorted(
        (pair for pair in zip(out.shape, out.stride()) if pair[0] > 1),
        key=lambda pair: pair[1],
    ):
        if stride < extent:
            raise ValueError(
                f"{name} must not overlap itself, got shape {tuple(out.shape)} with "
                f"strides {out.stride()}"
            )
        extent = stride * (size - 1) + extent


def as_scale(
    name: str, scale: Union[float, torch.Tensor], x: torch.Tensor
) -> tuple[int, Union[float, torch.Tensor]]:
    """(how `scale` reaches the kernel, what is passed); a tensor stays on the device,
    without a sync."""
    if not isinstance(scale, torch.Tensor):
        return SCALE_UNIT if scale == 1.0 else SCALE_FLOAT, float(scale)
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} must be a float or a float32 tensor of one element, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}"
        )
    if scale.device != x.device:
        raise ValueError(
            f"{name} must be on {x.device} as the inputs, got {scale.device}"
        )
    return SCALE_TENSOR, scale


def resolve_pdl(enable_pdl: Optional[bool]) -> bool:
    """Whether to launch with PDL: asked for (None: yes) and supported by this GPU."""
    return enable_pdl is not False and is_arch_support_pdl()


# How float32 becomes FP8: in one instruction that rounds to nearest even and saturates;
# with the saturation left to the kernel; or through a truncation to float16.
CONVERT_DIRECTLY, CONVERT_CLAMPED, CONVERT_THROUGH_FLOAT16 = 0, 1, 2


def fp8_conversion(device: torch.device) -> int:
    """What Triton does on this device."""
    if is_hip_runtime():
        return CONVERT_CLAMPED
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return CONVERT_THROUGH_FLOAT16
    return CONVERT_DIRECTLY


# Releases whose compiled kernels are known to launch as Launcher does.
_DIRECT_LAUNCH = triton.__version__.startswith(("3.5.", "3.6."))


class Launcher:
    """One specialization of a Triton kernel, launched past the JIT's dispatch.

    The dispatch looks at every argument of every call, which for a kernel of twenty
    arguments takes longer than the rest of the launch. A caller keeps a Launcher for
    each combination of what the kernel is specialized on: the constexprs, and of the
    other arguments the dtypes, the alignment of pointers to 16 bytes, and the integers
    not exempted from specialization.
    """

    def __init__(
        self,
        kernel,
        device: torch.device,
        constexprs: dict,
        num_warps: int,
        enable_pdl: bool,
    ):
        """`constexprs` are the kernel's last parameters, in its order."""
        self._kernel = kernel
        self._device_index = device.index
        self._constexprs = constexprs
        self._options = {"num_warps": num_warps}
        if enable_pdl:
            # The HIP compiler rejects options that it does not know.
            self._options["launch_pdl"] = True
        self._run = None

    def __call__(self, num_programs: int, tensors: tuple, numbers: tuple) -> None:
        """Launch on `tensors` (or None) and `numbers`, the kernel's first parameters."""
        index = self._device_index
        if self._run is None or index != torch.cuda.current_device():
            return self._dispatch(num_programs, tensors, numbers)
        self._run(
            num_programs,
            1,
            1,
            torch._C._cuda_getCurrentRawStream(index),
            *self._head,
            # An address spares the launcher a driver call for each tensor.
            *[None if x is None else x.data_ptr() for x in tensors],
            *numbers,
            *self._tail,
        )

    def _dispatch(self, num_programs: int, tensors: tuple, numbers: tuple) -> None:
        index = self._device_index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(num_programs, tensors, numbers)
        compiled = self._kernel[(num_programs,)](
            *tensors, *numbers, **self._constexprs, **self._options
        )
        # The interpreter compiles nothing.
        if _DIRECT_LAUNCH and hasattr(compiled, "packed_metadata"):
            no_hooks = (None, None, None)
            self._head = (compiled.function, compiled.packed_metadata, *no_hooks)
            self._tail = tuple(self._constexprs.values())
            self._run = compiled.run


def layout_key(*tensors: Optional[torch.Tensor]) -> tuple:
    """What a kernel and its checks depend on in these tensors, but for the lengths of
    their first dimensions.

    A stride means nothing in a dimension of length one: where a check exempts that
    length, the caller's key tells it from others.
    """
    key = []
    misaligned = 0
    for x in tensors:
        if x is None:
            key.append(None)
            continue
        misaligned |= x.data_ptr()
        key += x.dtype, x.shape[1:], x.stride(), x.get_device()
    if misaligned & 15:
        key += [x is not None and x.data_ptr() & 15 for x in tensors]
    return tuple(key)


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
        The FP8 tensor of x's shape; rounding as the module docstring says.

    Raises:
        ValueError: an argument of wrong dtype, shape, layout or device, by its name.
        RuntimeError: the GPU has no FP8 conversion (before SM89).
    """
    check_fp8_dtype(fp8_dtype)
    check_device("x", x)
    if x.dtype not in _INPUT_DTYPES:
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
    pdl = x.is_cuda and resolve_pdl(enable_pdl)
    launch = Launcher(
        _fp8_quantize_kernel,
        x.device,
        dict(
            N=length,
            WIDTH=width,
            BLOCK=block,
            SCALE_KIND=kind,
            FP8_DTYPE=FP8_DTYPES[fp8_dtype],
            CONVERSION=fp8_conversion(x.device),
            ENABLE_PDL=pdl,
        ),
        num_warps=4,
        enable_pdl=pdl,
    )
    launch(
        triton.cdiv(num_tiles, block),
        (x, out),
        (scale_inv, num_tiles, x_row_stride, out_row_stride),
    )
    return out
