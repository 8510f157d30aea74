"""Set-up that lets the real SGLang run on a machine without a GPU.

Import this module (or call `install()`) before anything of SGLang or any Triton
kernel is imported. With a GPU it changes nothing, so the same tests run there on
the real kernels and the real rounding.
"""

from __future__ import annotations

import os

import numpy as np
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

_FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
_torchvision = None


def install() -> bool:
    """Prepare this process; True when it runs without a GPU. Idempotent."""
    if HAS_GPU:
        return False
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Tensors are small here, and test workers as many as cores.
    torch.set_num_threads(1)
    _define_torchvision_ops()
    if os.environ["TRITON_INTERPRET"] == "1":
        _fix_interpreter()
    return True


def _define_torchvision_ops() -> None:
    """Stands in for torchvision's compiled operators, absent beside a CPU torch.

    `import torchvision` registers fake kernels for them and fails when they are not
    defined; nothing here calls them.
    """
    global _torchvision
    if _torchvision is not None or torch.version.cuda is not None:
        return
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            getattr(torch.ops.torchvision, name)
        except AttributeError:
            _torchvision.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def _to_float32(data: np.ndarray, name: str) -> torch.Tensor:
    if name in _FP8:
        bits = torch.from_numpy(np.array(data, dtype=np.uint8, copy=True))
        return bits.view(_FP8[name]).float()
    if name == "bf16":
        wide = data.astype(np.uint32) << 16
        return torch.from_numpy(wide.view(np.float32))
    return torch.from_numpy(np.array(data, dtype=np.float32, copy=True))


def _from_float32(x: torch.Tensor, name: str) -> np.ndarray:
    if name in _FP8:
        dtype = _FP8[name]
        limit = torch.finfo(dtype).max
        # clamp keeps NaN. Past the limit a GPU's conversion gives the largest finite
        # value, torch's cast NaN or infinity, depending on its release and the type.
        return x.clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
    if name == "bf16":
        return x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if name == "fp16":
        return x.to(torch.float16).numpy()
    if name == "fp64":
        return x.double().numpy()
    return x.numpy()


def _fix_interpreter() -> None:
    """Stands in for the parts of Triton's interpreter that differ from a GPU.

    Triton 3.6 to 3.9 round float32 to FP8 without ties to even and let it wrap on
    overflow, cut float32 off to BF16 where a GPU rounds, widen FP8 NaN and infinity
    to ordinary numbers, multiply matrices of BF16 as if their bits were integers, and
    take min and max with NumPy's NaN rule where a GPU returns the other operand. PDL
    instructions, inline assembly there, are dropped, and loop bounds, arrays of one
    element there, are read in a way that NumPy 2.4 still allows.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter._convert_float, "rounds_as_gpu", False):
        return
    ir = interpreter._ir
    original_convert = interpreter._convert_float
    original_cast = interpreter.InterpreterBuilder.cast_impl
    original_patch = interpreter._patch_lang_tensor
    special = {"bf16", *_FP8}

    def convert_float(data, src, dst, rounding_mode):
        named = {src.name, dst.name}
        if not named & special or rounding_mode == ir.ROUNDING_MODE.RTZ:
            return original_convert(data, src, dst, rounding_mode)
        out = _from_float32(_to_float32(data, src.name), dst.name)
        bits = getattr(np, f"uint{dst.primitive_bitwidth}")
        return np.ascontiguousarray(out).view(bits).reshape(np.shape(data))

    def cast_impl(self, src, dst_type):
        from_type, to_type = src.dtype.scalar, dst_type.scalar
        if not {from_type.name, to_type.name} & special:
            return original_cast(self, src, dst_type)
        wide = _to_float32(src.data, from_type.name)
        if to_type.is_floating():
            data = _from_float32(wide, to_type.name)
        else:
            data = wide.numpy().astype(interpreter._get_np_dtype(to_type))
        return interpreter.TensorHandle(data.reshape(np.shape(src.data)), to_type)

    def clampf(self, x, low, high, propagate_nans):
        if propagate_nans == ir.PROPAGATE_NAN.ALL:
            return self.ternary_op(x, low, high, np.clip)
        return self.ternary_op(
            x, low, high, lambda v, lo, hi: np.fmin(np.fmax(v, lo), hi)
        )

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (_to_float32(x.data, x.dtype.scalar.name).numpy() for x in (a, b))
        return interpreter.TensorHandle(np.matmul(a, b) + d.data, d.dtype.scalar)

    def patch_lang_tensor(tensor, scope):
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.item()))

    convert_float.rounds_as_gpu = True
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float = convert_float
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = cast_impl
    builder.create_clampf = clampf
    builder.create_dot = dot
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

    def no_pdl(_semantic=None):
        return None

    tl.extra.cuda.gdc_wait = no_pdl
    tl.extra.cuda.gdc_launch_dependents = no_pdl


install()
