"""What the FP8 kernels must return, in float64 from the definitions."""

from __future__ import annotations

import functools
from typing import Optional

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
# (exponent bits, mantissa bits, codes from here on are not finite)
_FORMATS = {torch.float8_e4m3fn: (4, 3, 0x7F), torch.float8_e5m2: (5, 2, 0x7C)}
_NAN = 0x7F


@functools.lru_cache(maxsize=None)
def finite_values(dtype: torch.dtype) -> torch.Tensor:
    """The non-negative finite values of an FP8 format in order; code i is entry i."""
    exponent_bits, mantissa_bits, end = _FORMATS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(end):
        exponent, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0:
            values.append(fraction * 2.0 ** (1 - bias))
        else:
            values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return torch.tensor(values, dtype=torch.float64)


def round_to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (float64) to the nearest FP8 value: ties to the even code, saturated, NaN kept."""
    values = finite_values(dtype).to(x.device)
    magnitude = x.abs().clamp(max=values[-1].item()).nan_to_num(0.0)
    above = torch.searchsorted(values, magnitude.contiguous())
    above = above.clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = values[above] - magnitude, magnitude - values[below]
    even = torch.where(above % 2 == 0, above, below)
    code = torch.where(to_above < to_below, above, below)
    code = torch.where(to_above == to_below, even, code)
    code = torch.where(values[above] == magnitude, above, code)
    code = torch.where(x.isnan(), torch.full_like(code, _NAN), code)
    code = code + 0x80 * torch.signbit(x)
    return code.to(torch.uint8).view(dtype)


def ulps_off(actual: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Steps between two FP8 tensors on the format's number line; NaN only equals NaN."""
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape

    def order(x):
        code = x.contiguous().view(torch.uint8).to(torch.int16)
        return torch.where(code >= 0x80, 0x80 - code, code)

    distance = (order(actual) - order(wanted)).abs()
    nan = actual.float().isnan(), wanted.float().isnan()
    distance[nan[0] & nan[1]] = 0
    distance[nan[0] ^ nan[1]] = 0x7FFF
    return distance


def assert_fp8(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare with the unrounded float64 result.

    Bit for bit on 99.99% of the elements and one step off at most: float32 arithmetic
    may fall on the other side of a tie.
    """
    off = ulps_off(actual, round_to_fp8(wanted, actual.dtype))
    assert off.max().item() <= 1 if off.numel() else True, "elements wrong or unwritten"
    assert (off != 0).sum().item() <= max(off.numel() * 1e-4, 1)


def poison(shape, dtype: torch.dtype, device: str = DEVICE) -> torch.Tensor:
    """FP8 or uint8 memory full of NaN bytes."""
    return torch.full(shape, 0xFF, dtype=torch.uint8, device=device).view(dtype)


def is_poison(x: torch.Tensor) -> bool:
    return bool((x.view(torch.uint8) == 0xFF).all())


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: Optional[torch.Tensor],
    neox: bool,
) -> torch.Tensor:
    """RoPE of x [s, h, rope] in float64; pair i turns by the angle of its position."""
    x = x.double()
    if cos_sin is None:
        return x
    cos, sin = cos_sin.double()[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    first = slice(0, half) if neox else slice(0, None, 2)
    second = slice(half, None) if neox else slice(1, None, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def slice_of(
    *shape: int, dtype: torch.dtype = torch.bfloat16, before: int = 8, after: int = 24
) -> torch.Tensor:
    """Random values of this shape in a slice of wider rows, as SGLang passes views."""
    wide = torch.randn(*shape[:-1], before + shape[-1] + after, device=DEVICE)
    return (wide * 3).to(dtype)[..., before : before + shape[-1]]
