"""What the FP8 kernels must return, in float64 from the definitions, and the shapes,
inputs and memory that tests and tools check them on."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Iterator, NamedTuple, Optional, Sequence

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
# (exponent bits, mantissa bits, codes from here on are not finite)
_FORMATS = {torch.float8_e4m3fn: (4, 3, 0x7F), torch.float8_e5m2: (5, 2, 0x7C)}
_NAN = 0x7F


class MLADims(NamedTuple):
    """Dimensions of an MLA attention layer: heads (of a tensor-parallel rank), then
    elements a head, and of the latent."""

    heads: int
    nope: int
    rope: int
    v: int
    lora: int


MODELS = {
    "deepseek-v3": MLADims(128, 128, 64, 128, 512),  # and R1
    "kimi-k2": MLADims(64, 128, 64, 128, 512),  # and LongCat-Flash
    "deepseek-v2-lite": MLADims(16, 128, 64, 128, 512),
    "glm-5": MLADims(64, 192, 64, 256, 512),
    "glm-4.7-flash": MLADims(20, 192, 64, 256, 512),
    "mistral-4": MLADims(32, 64, 64, 128, 256),
}


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


class Fp8Difference(NamedTuple):
    """How FP8 values differ from the float64 results, rounded once."""

    elements: int
    differing: int
    max_ulps: int
    worst: tuple[int, ...]  # index of the element that is farthest off

    @property
    def within_bounds(self) -> bool:
        """One step off at most, and bit for bit on 99.99% of the elements: float32
        arithmetic may fall on the other side of a tie."""
        return self.max_ulps <= 1 and self.differing <= max(self.elements * 1e-4, 1)

    def __str__(self) -> str:
        if self.differing == 0:
            return f"all {self.elements} elements equal float64 rounded once"
        worst = "NaN" if self.max_ulps > 0xFF else f"{self.max_ulps} steps off"
        return (
            f"{self.differing} of {self.elements} elements differ from float64 rounded "
            f"once; {list(self.worst)} is {worst}"
        )


def fp8_difference(
    actual: torch.Tensor, wanted: torch.Tensor, slack: float = 0.0
) -> Fp8Difference:
    """Compare FP8 values with the unrounded float64 results; NaN equals only NaN.

    slack: what a result may be off before it is rounded, as sums of FP8 products on
    SM90's tensor cores are, which keep some 14 bits of the largest.
    """
    off = ulps_off(actual, round_to_fp8(wanted - slack, actual.dtype))
    if slack > 0:
        low, high = (round_to_fp8(wanted + d, actual.dtype) for d in (-slack, slack))
        off_high = ulps_off(actual, high)
        between = off.int() + off_high.int() == ulps_off(low, high).int()
        off = torch.where(between, 0, torch.minimum(off, off_high))
    if off.numel() == 0:
        return Fp8Difference(0, 0, 0, ())
    worst = torch.unravel_index(off.argmax(), off.shape)
    return Fp8Difference(
        off.numel(),
        int((off != 0).sum()),
        int(off.max()),
        tuple(int(i) for i in worst),
    )


def assert_fp8(actual: torch.Tensor, wanted: torch.Tensor, slack: float = 0.0) -> None:
    difference = fp8_difference(actual, wanted, slack)
    assert difference.within_bounds, str(difference)


def quantize_blocks(
    x: torch.Tensor, rows: int, columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, k] in FP8 and the float32 scales of its blocks, whose largest is 448."""
    blocks = x.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-10) / 448
    scaled = (blocks / scale[:, None, :, None]).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).view(x.shape), scale


def times_scales(x: torch.Tensor, scale: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Values in float64, in FP8 times the scales of their blocks, if they have any."""
    if scale is None:
        return x.double()
    for dim, size in enumerate(x.shape):
        scale = scale.repeat_interleave(size // scale.shape[dim], dim)
    return x.double() * scale.double()


def poison(shape, dtype: torch.dtype, device: str = DEVICE) -> torch.Tensor:
    """FP8 or uint8 memory full of NaN bytes."""
    return torch.full(shape, 0xFF, dtype=torch.uint8, device=device).view(dtype)


@contextmanager
def nan_memory() -> Iterator[None]:
    """Memory that is allocated inside and not written holds NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


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
    row = before + shape[-1] + after
    wide = torch.randn(*shape[:-1], row, dtype=dtype, device=DEVICE).mul_(3)
    return wide[..., before : before + shape[-1]]


def make_cos_sin_cache(max_position: int, rope: int) -> torch.Tensor:
    """[max_position, rope] float32 as SGLang has it, of angles of no pattern."""
    angle = torch.rand(max_position, rope // 2, device=DEVICE) * 6.3
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def prefill_inputs(
    dims: MLADims,
    tokens: int,
    is_neox: Optional[bool] = False,
    dtype: torch.dtype = torch.bfloat16,
    max_position: int = 4096,
    free_slots: int = 64,
) -> dict:
    """Random arguments of ``mla_prefill_quantize_fp8``, with views where SGLang passes
    views and NaN in the cache. is_neox None: no RoPE."""
    rope, row = dims.rope, dims.lora + dims.rope
    slots = tokens + free_slots
    return dict(
        q=slice_of(tokens, dims.heads, dims.nope + rope, dtype=dtype, before=0),
        kv=slice_of(tokens, dims.heads, dims.nope + dims.v, dtype=dtype, before=0),
        kv_a=slice_of(tokens, dims.lora, dtype=dtype, before=0),
        k_pe=slice_of(tokens, 1, rope, dtype=dtype, before=dims.lora, after=0),
        positions=torch.randint(0, max_position, (tokens,), device=DEVICE),
        cos_sin_cache=(
            None if is_neox is None else make_cos_sin_cache(max_position, rope)
        ),
        is_neox=bool(is_neox),
        qk_nope_head_dim=dims.nope,
        kv_cache=poison((slots, 1, row), torch.float8_e4m3fn),
        cache_loc=torch.randperm(slots, device=DEVICE)[:tokens],
    )


class PrefillResult(NamedTuple):
    """q, k, v and cache rows of a prefill; of the definition, in float64."""

    q: torch.Tensor
    k: Optional[torch.Tensor]
    v: Optional[torch.Tensor]
    rows: torch.Tensor


def expected_prefill(
    inputs: dict, k_scale_inv: float = 1.0, v_scale_inv: float = 1.0
) -> PrefillResult:
    """The unrounded results of ``mla_prefill_quantize_fp8`` on these arguments; `rows`
    are those of the cached tokens, in their order."""
    q, kv, nope = inputs["q"], inputs["kv"], inputs["qk_nope_head_dim"]
    rope = inputs["positions"], inputs["cos_sin_cache"], inputs["is_neox"]
    k_pe = rotate(inputs["k_pe"].flatten(1)[:, None], *rope)
    k = v = None
    if kv is not None:
        k_nope, v = kv[..., :nope].double(), kv[..., nope:].double() * v_scale_inv
        k = torch.cat([k_nope, k_pe.expand(-1, q.shape[1], -1)], dim=-1) * k_scale_inv
    cached = 0 if inputs["cache_loc"] is None else len(inputs["cache_loc"])
    rows = torch.cat([inputs["kv_a"].double(), k_pe[:, 0]], dim=-1)
    return PrefillResult(
        torch.cat([q[..., :nope].double(), rotate(q[..., nope:], *rope)], dim=-1),
        k,
        v,
        rows[:cached],
    )


def expected_q_proj(
    q_a: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
) -> torch.Tensor:
    """The unrounded result of ``mla_q_proj_quantize_fp8``."""
    q = (q_a.double() @ weight.double().T).unflatten(1, (-1, 192))
    q_pe = rotate(q[..., 128:], positions, cos_sin_cache, False)
    return torch.cat([q[..., :128], q_pe], dim=-1)


def expected_kv_proj(
    kv_a: torch.Tensor,
    weight: torch.Tensor,
    k_pe: torch.Tensor,
    scale_invs: Sequence[float] = (1.0, 1.0),
    kv_a_scale: Optional[torch.Tensor] = None,
    weight_scale: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The unrounded results of ``mla_kv_proj_quantize_fp8``."""
    kv = times_scales(kv_a, kv_a_scale) @ times_scales(weight, weight_scale).T
    kv = kv.unflatten(1, (-1, 256))
    k_pe = k_pe.double().flatten(1)[:, None].expand(-1, kv.shape[1], -1)
    k = torch.cat([kv[..., :128], k_pe], dim=-1)
    return k * scale_invs[0], kv[..., 128:] * scale_invs[1]
