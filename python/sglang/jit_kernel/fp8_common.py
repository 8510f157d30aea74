"""What the FP8 quantization kernels share: rounding, scales, argument checks, launches.

Rounding: a value is scaled in float32 and rounded once, to nearest even; beyond the
largest finite FP8 value, infinity included, it saturates; NaN stays NaN.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Union

import torch
import triton
import triton.language as tl

from sglang.jit_kernel.utils import cache_once, is_arch_support_pdl, is_hip_runtime

FP8_DTYPES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
INPUT_DTYPES = (torch.bfloat16, torch.float16)

# How a scale reaches a kernel. UNIT removes the multiply at compile time.
SCALE_UNIT: tl.constexpr = tl.constexpr(0)
SCALE_FLOAT: tl.constexpr = tl.constexpr(1)
SCALE_TENSOR: tl.constexpr = tl.constexpr(2)

# How float32 becomes FP8: in one instruction that rounds to nearest even and saturates;
# with the saturation left to the kernel; or through a truncation to float16.
CONVERT_DIRECT: tl.constexpr = tl.constexpr(0)
CONVERT_CLAMPED: tl.constexpr = tl.constexpr(1)
CONVERT_VIA_FLOAT16: tl.constexpr = tl.constexpr(2)


@triton.jit
def wait_for_inputs(ENABLE_PDL: tl.constexpr):
    """Wait for the kernel before this one, where it need not have ended."""
    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
        # The next kernel waits for this one's completion, so it may be launched now.
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_scale(scale, KIND: tl.constexpr):
    if KIND == SCALE_TENSOR:
        return tl.load(scale)
    else:
        return scale


@triton.jit
def to_fp8(
    x, scale, KIND: tl.constexpr, FP8_DTYPE: tl.constexpr, CONVERSION: tl.constexpr
):
    """``fp8(x * scale)``, rounded as the module docstring says."""
    y = x.to(tl.float32)
    if KIND != SCALE_UNIT:
        y = y * scale
    if CONVERSION == CONVERT_CLAMPED:
        LIMIT: tl.constexpr = 448.0 if FP8_DTYPE == tl.float8e4nv else 57344.0
        y = tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if CONVERSION == CONVERT_VIA_FLOAT16:
        # Round to odd, to seven bits of mantissa: the truncation to float16 that follows
        # is then exact, down to FP8's subnormals, and the rounding to FP8 the only one.
        bits = y.to(tl.int32, bitcast=True)
        odd = (bits & ~0xFFFF) | tl.where((bits & 0xFFFF) != 0, 0x10000, 0)
        y = odd.to(tl.float32, bitcast=True)
    return y.to(FP8_DTYPE)


def fp8_conversion(device: torch.device) -> int:
    """The CONVERT_* that Triton needs on this device."""
    if is_hip_runtime():
        return CONVERT_CLAMPED.value
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return CONVERT_VIA_FLOAT16.value
    return CONVERT_DIRECT.value


class Launcher:
    """One specialization of an FP8 kernel of this package.

    From the second call on it launches through Triton's ``compiled[grid]``, with
    addresses for tensors: the JIT's dispatch, which looks at every argument of every
    call, takes longer than all the rest. So the caller keeps a Launcher for
    each combination of what the kernel is specialized on: its constexprs, and of the
    other arguments what ``layout_key`` gives.
    """

    def __init__(
        self,
        kernel,
        device: torch.device,
        enable_pdl: Optional[bool],
        options: dict[str, int] = {"num_warps": 4},
        **constexprs,
    ):
        """enable_pdl: None, with programmatic dependent launch where the GPU has it;
        True is ignored where it has not. options: Triton's."""
        on_gpu = device.type == "cuda"
        pdl = on_gpu and enable_pdl is not False and is_arch_support_pdl()
        self._kernel = kernel
        self._device_index = device.index
        self._constexprs = dict(
            constexprs, CONVERSION=fp8_conversion(device), ENABLE_PDL=pdl
        )
        self._options = dict(options)
        if pdl:
            # The HIP compiler rejects options that it does not know.
            self._options["launch_pdl"] = True
        self._compiled = None

    def __call__(self, num_programs: int, tensors: tuple, numbers: tuple) -> None:
        """Launch on `tensors` (or None) and `numbers`, the kernel's first parameters."""
        index = self._device_index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(num_programs, tensors, numbers)
        if self._compiled is not None:
            addresses = [None if x is None else x.data_ptr() for x in tensors]
            self._compiled[(num_programs, 1, 1)](*addresses, *numbers, *self._tail)
            return
        # The interpreter compiles nothing, and returns None.
        self._compiled = self._kernel[(num_programs,)](
            *tensors, *numbers, **self._constexprs, **self._options
        )
        last = self._kernel.arg_names[len(tensors) + len(numbers) :]
        self._tail = [self._constexprs[name] for name in last]


class Plan(NamedTuple):
    """What calls of one layout share: checked once, with the kernel compiled for it."""

    launcher: Launcher
    tokens: int  # of a program
    parts: int  # programs for each block of tokens
    strides: tuple[int, ...]
    most_programs: int = 2**31 - 1

    def launch(self, num_tokens: int, tensors: tuple, numbers: tuple) -> None:
        blocks = -(-num_tokens // self.tokens)
        programs = min(blocks * self.parts, self.most_programs)
        self.launcher(programs, tensors, numbers)


class PlanCache(dict):
    """Plans by layout. A layout with a stride that depends on the length is a new one
    for each length: when there are too many, all are forgotten."""

    def find(self, key: tuple, make: Callable[..., Plan], *args) -> Plan:
        plan = self.get(key)
        if plan is None:
            if len(self) >= 256:
                self.clear()
            plan = self[key] = make(*args)
        return plan


def layout_key(*tensors: Optional[torch.Tensor]) -> list:
    """What a kernel and its checks depend on in these tensors, but for the lengths of
    their first dimensions: dtype, shape, strides, device, alignment to 16 bytes."""
    key = []
    misaligned = 0
    for x in tensors:
        if x is None:
            key.append(None)
            continue
        misaligned |= x.data_ptr()
        start = len(key)
        key += x.shape
        key[start : start + 1] = [x.dtype]  # in place of the first length
        key += x.stride()
        key.append(x.get_device())
    if misaligned & 15:
        key += [x is not None and x.data_ptr() & 15 for x in tensors]
    return key


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
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"{name} must be bfloat16 or float16, got {x.dtype}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )


def check_head_dims(**dims: int) -> None:
    """Raise unless each is a positive multiple of 16."""
    for name, size in dims.items():
        if size <= 0 or size % 16 != 0:
            raise ValueError(f"{name} must be a positive multiple of 16, got {size}")


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


def index_key(*indices: Optional[torch.Tensor]) -> list:
    """What `check_index` depends on. Alignment is not among it: kernels do not
    specialize on that of indices, which two-batch overlap slices at any token."""
    key = []
    for x in indices:
        if x is None:
            key.append(None)
        else:
            key += x.dtype, x.dim(), x.get_device(), x.is_contiguous()
    return key


def check_index(name: str, index: torch.Tensor, device: torch.device) -> None:
    """Raise unless `index` is a contiguous int32 or int64 vector on `device`."""
    if (
        index.dim() != 1
        or index.dtype not in (torch.int32, torch.int64)
        or index.device != device
        or not index.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be a contiguous int32 or int64 vector on {device}, got "
            f"{index.dtype} of shape {tuple(index.shape)} with strides "
            f"{index.stride()} on {index.device}"
        )


def as_scale(
    name: str, scale: Union[float, torch.Tensor], x: torch.Tensor
) -> tuple[int, Union[float, torch.Tensor]]:
    """(the SCALE_* of `scale`, what is passed); a tensor stays on the device, without a
    sync."""
    if not isinstance(scale, torch.Tensor):
        kind = SCALE_UNIT if scale == 1.0 else SCALE_FLOAT
        return kind.value, float(scale)
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} must be a float or a float32 tensor of one element, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}"
        )
    if scale.device != x.device:
        raise ValueError(
            f"{name} must be on {x.device} as the inputs, got {scale.device}"
        )
    return SCALE_TENSOR.value, scale


def block_shape(num_heads: int, program_rows: int) -> tuple[int, int]:
    """(tokens, heads) of a program of so many rows, without a lane on a missing head."""
    block_h = min(num_heads & -num_heads, program_rows)
    return program_rows // block_h, block_h


def rope_dim(k_pe: torch.Tensor) -> int:
    """rope of k_pe [s, 1, rope] or [s, rope]; either has the token stride first."""
    shape = k_pe.shape
    if len(shape) not in (2, 3) or shape[1:-1] not in ((), (1,)):
        raise ValueError(
            f"k_pe must be [s, 1, rope] or [s, rope], got shape {tuple(shape)}"
        )
    return shape[-1]
