"""Stand-ins for the kernels that a prefill of SGLang's MLA backends needs and that do
not run here: SM100 kernels anywhere, FlashAttention-3 but for DeepSeek's dimensions on
SM90, CUDA kernels without a GPU. The docstring of each begins with what it stands in for.

Importing this module installs them. Without a GPU the CUDA branches of the model and of
the rotary embedding are taken nevertheless, with their Triton kernels in the interpreter.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import torch
from mla_standin import kernels
from mla_standin.install import tokenspeed_module
from sglang_cpu import DEVICE, HAS_GPU
from sglang_internals import RELEASE, backend_class, fixup_zero_kv, fp8_kernel, jit_rope

from sglang.srt.layers.attention import flashinfer_mla_backend
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.rotary_embedding import base as rotary_base
from sglang.srt.layers.rotary_embedding import rope_variant
from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha


@dataclass
class KernelCall:
    """What an attention kernel was handed, copied before it ran."""

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    contiguous: bool
    data_ptrs: tuple[int, int, int]
    cu_q: list[int]
    cu_kv: list[int]
    causal: bool
    return_lse: bool
    bmm1_scale: float
    bmm2_scale: float
    out_before: Optional[torch.Tensor]

    def real_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v without the rows of data-parallel padding."""
        n, m = self.cu_q[-1], self.cu_kv[-1]
        return self.q[:n], self.k[:m], self.v[:m]


@dataclass
class Kernels:
    """The log of the kernel stand-ins; `counts` has the calls of the kernels that only
    a CPU lacks, by the real one's name."""

    calls: list[KernelCall] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def clear(self) -> None:
        self.calls, self.counts = [], Counter()
        kernels.RECORD.late_compiles = []

    def record(self, handed: dict[str, Any]) -> None:
        operands = [handed[name] for name in "qkv"]
        out = handed["arguments"].get("out")
        same = ("cu_q", "cu_kv", "causal", "return_lse", "bmm1_scale", "bmm2_scale")
        self.calls.append(
            KernelCall(
                handed["kernel"],
                *(x.detach().clone() for x in operands),
                contiguous=all(x.is_contiguous() for x in operands),
                data_ptrs=tuple(x.data_ptr() for x in operands),
                **{name: handed[name] for name in same},
                out_before=None if out is None else out.detach().clone(),
            )
        )


KERNELS = Kernels()
# What the stand-ins have replaced, by name, where it can be imported.
REPLACED: dict[str, Any] = {}
kernels.SETTINGS.listener = KERNELS.record
kernels.SETTINGS.dtype = torch.float64
kernels.SETTINGS.any_head_dim = True
# As the unpatched SGLang merges them; base 2 is in test_lse_base.py.
kernels.SETTINGS.natural_lse = True
TOKENSPEED = tokenspeed_module()


def forget_compiled_kernels() -> None:
    """Let the next tokenspeed backend start as in a fresh process."""
    kernels.compiled_kernels.clear()


class _FlashInferWrapper:
    """Stands in for FlashInfer's attention wrappers, which need its CUDA kernels.

    The MLA backends build several and plan them for every batch; the paths under test
    run none of them.
    """

    def __init__(self, *args, **kwargs):
        pass

    def begin_forward(self, *args, **kwargs) -> None:
        pass

    plan = begin_forward


def _planned_when_run(wrapper: type) -> type:
    """FlashInfer's own wrapper, which compiles its kernel when planned: here only when
    it is run, since the backends plan several that the paths under test never run."""

    class PlannedWhenRun(wrapper):
        def begin_forward(self, *args, **kwargs):
            self._postponed = functools.partial(super().begin_forward, *args, **kwargs)

        def forward(self, *args, **kwargs):
            self._postponed()
            return super().forward(*args, **kwargs)

        def forward_return_lse(self, *args, **kwargs):
            self._postponed()
            return super().forward_return_lse(*args, **kwargs)

    return PlannedWhenRun


def _rotated(x, positions, cos_sin_cache, is_neox) -> torch.Tensor:
    """RoPE in float32."""
    cos, sin = cos_sin_cache[positions.long()].float().unsqueeze(1).chunk(2, dim=-1)
    x = x.float()
    if is_neox:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _rope_in_place(
    q, k, cos_sin_cache, positions, *, is_neox, rope_dim=0, fused_args=None
) -> None:
    """Stands in for SGLang's JIT CUDA RoPE kernel: in place, one rounding."""
    assert fused_args is None and cos_sin_cache.dtype == torch.float32
    KERNELS.counts["apply_rope_with_cos_sin_cache_inplace"] += 1
    for x in (q, k):
        x.copy_(_rotated(x, positions, cos_sin_cache, is_neox))


def _rope_of_other_widths(positions, q, k, head_size, cos_sin_cache, is_neox=True):
    """Stands in for SGLang's JIT CUDA RoPE kernel that takes any width, and cosines in
    the model's dtype."""
    for x in (q, k):
        x.copy_(_rotated(x, positions, cos_sin_cache, is_neox))
    return q, k


def _mla_rope_quantize_fp8(
    q_rope,
    k_rope,
    q_nope,
    k_nope,
    cos_sin_cache,
    pos_ids,
    is_neox=True,
    quantize_dtype=None,
    quant_scale_q=1.0,
    quant_scale_kv=1.0,
    q_rope_out=None,
    k_rope_out=None,
    q_nope_out=None,
    k_nope_out=None,
    enable_pdl=False,
):
    """Stands in for FlashInfer's CUDA kernel of that name: float32, one rounding."""
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache must be float32, not {cos_sin_cache.dtype}")
    KERNELS.counts["mla_rope_quantize_fp8"] += 1
    dtype = quantize_dtype or torch.float8_e4m3fn

    def rotated(x):
        heads = x if x.dim() == 3 else x.unsqueeze(1)
        return _rotated(heads, pos_ids, cos_sin_cache, is_neox).view(x.shape)

    outs = []
    for x, scale, out in (
        (rotated(q_rope), quant_scale_q, q_rope_out),
        (rotated(k_rope), quant_scale_kv, k_rope_out),
        (q_nope.float(), quant_scale_q, q_nope_out),
        (k_nope.float(), quant_scale_kv, k_nope_out),
    ):
        out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
        limit = torch.finfo(dtype).max
        outs.append(out.copy_((x * scale).clamp(-limit, limit).to(dtype)))
    return tuple(outs)


def merge_state(v_a, s_a, v_b, s_b, v_merged, s_merged) -> None:
    """Stands in for sgl_kernel's merge_state_v2, a CUDA kernel: natural log-sum-exps."""
    total = torch.logaddexp(s_a, s_b)
    weight_a, weight_b = (
        torch.exp(s - total).nan_to_num(0.0).unsqueeze(-1) for s in (s_a, s_b)
    )
    v_merged.copy_(v_a.float() * weight_a + v_b.float() * weight_b)
    s_merged.copy_(total)


def _quantize_per_tensor(x, out, scale, is_static) -> None:
    """Stands in for SGLang's JIT CUDA kernel that quantizes by a given scale.

    It clips with fmin and fmax, so that NaN becomes the largest value there.
    """
    assert is_static
    limit = torch.tensor(torch.finfo(out.dtype).max)
    scaled = x.float() * (1.0 / scale)
    out.copy_(scaled.fmin(limit).fmax(-limit).to(out.dtype))


def _quantize_groups(x, group_size, scale_ue8m0=False):
    """Stands in for SGLang's CUDA kernels that quantize by groups of a row."""
    assert x.is_contiguous()
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    return (groups / scale).to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1)


def _block_fp8_linear(
    input, weight, block_size, weight_scale, input_scale=None, bias=None
) -> torch.Tensor:
    """Stands in for SGLang's GEMMs of FP8 with scales of blocks, which need a GPU."""
    x, scale = _quantize_groups(input, block_size[1])
    x = x.double() * scale.repeat_interleave(block_size[1], -1)
    for dim, size in enumerate(block_size):
        weight_scale = weight_scale.repeat_interleave(size, dim)
    return (x @ (weight.double() * weight_scale).T).to(input.dtype)


def _fixup_zero_kv_rows(out, lse, kv_lens, cum_seq_lens, max_seq_len) -> None:
    """Stands in for SGLang's JIT CUDA kernel of that name, which before 0.5.17 writes
    four heads at a time, at addresses of 16 bytes."""
    before = fixup_zero_kv.__name__ == "sglang.jit_kernel.fixup_zero_kv"
    assert not before or lse.shape[1] % 4 == 0, "misaligned address"
    starts = cum_seq_lens.tolist()
    for i, length in enumerate(kv_lens.tolist()):
        if length == 0:
            out[starts[i] : starts[i + 1]] = 0
            lse[starts[i] : starts[i + 1]] = -math.inf


def _sgl_kernel() -> ModuleType:
    """Stands in for sgl_kernel, a package of CUDA kernels: what SGLang's FlashAttention
    backend imports of it. An MLA prefill needs neither attention over a paged cache nor
    the scheduler."""
    package = ModuleType("sgl_kernel", _sgl_kernel.__doc__)
    # Without one, importlib.util.find_spec raises.
    package.__spec__ = ModuleSpec("sgl_kernel", loader=None)
    package.merge_state_v2 = merge_state
    package.flash_attn = ModuleType("sgl_kernel.flash_attn")
    package.flash_attn.flash_attn_varlen_func = kernels.flash_attn_varlen_func
    package.flash_attn.flash_attn_with_kvcache = None
    package.flash_attn.get_scheduler_metadata = None
    return package


def _install_sgl_kernel() -> bool:
    """Let SGLang import sgl_kernel; True where its FlashAttention-3 runs."""
    try:
        importlib.import_module("sgl_kernel.flash_attn")
    except ImportError:
        package = _sgl_kernel()
        sys.modules.setdefault("sgl_kernel", package)
        sys.modules["sgl_kernel.flash_attn"] = package.flash_attn
        return False
    return HAS_GPU and torch.cuda.get_device_capability() == (9, 0)


HAS_FA3 = _install_sgl_kernel()


def runs_fa3(call: KernelCall) -> bool:
    """Whether the call is of FlashAttention-3's own kernel, not of its stand-in."""
    dims = (call.q.shape[-1], call.v.shape[-1])
    return HAS_FA3 and call.name == "flash_attn_varlen_func" and dims == (192, 128)


def _recorded(flash_attn_varlen_func):
    """FlashAttention-3's own kernel where it runs; its stand-in, which checks and records
    what it is handed, everywhere."""

    def recorded(**arguments):
        result = kernels.flash_attn_varlen_func(**arguments)
        if arguments["ver"] == 3 and runs_fa3(KERNELS.calls[-1]):
            result = flash_attn_varlen_func(**arguments)
        return result

    return recorded


# What a CPU has of FlashInfer; also for modules that import it only beside a GPU.
FLASHINFER = SimpleNamespace(
    prefill=SimpleNamespace(
        trtllm_ragged_attention_deepseek=kernels.trtllm_ragged_attention_deepseek
    ),
    decode=SimpleNamespace(
        trtllm_batch_decode_with_kv_cache_mla=(
            kernels.trtllm_batch_decode_with_kv_cache_mla
        )
    ),
    rope=SimpleNamespace(mla_rope_quantize_fp8=_mla_rope_quantize_fp8),
    # Sizes of a buffer that the stand-ins do not use.
    utils=SimpleNamespace(
        get_device_sm_count=lambda device: 1,
        get_trtllm_gen_multi_ctas_kv_counter_bytes=lambda *sizes: 1,
    ),
)


def _unpinned(factory):
    """Stands in for a factory of tensors in pinned memory, which only a GPU's driver has."""
    return lambda *args, pin_memory=False, **kwargs: factory(*args, **kwargs)


def _install_stand_ins() -> None:
    from sglang.srt.layers.attention import flashattention_backend

    REPLACED["flash_attn_varlen_func"] = flashattention_backend.flash_attn_varlen_func
    flashattention_backend.flash_attn_varlen_func = _recorded(
        flashattention_backend.flash_attn_varlen_func
    )
    modules = {sys.modules[backend_class(name).__module__] for name in RELEASE.backends}
    for module in modules:
        if hasattr(module, "is_tokenspeed_mla_available"):
            REPLACED["tokenspeed_mla"] = getattr(module, "tokenspeed_mla", None)
            module.tokenspeed_mla = TOKENSPEED
            module.is_tokenspeed_mla_available = lambda: True
    if HAS_GPU:
        import flashinfer.decode
        import flashinfer.prefill

        for name in ("prefill", "decode"):
            for function, stand_in in vars(getattr(FLASHINFER, name)).items():
                REPLACED[function] = getattr(getattr(flashinfer, name), function)
                setattr(getattr(flashinfer, name), function, stand_in)
        flashinfer_mla_backend.BatchPrefillWithRaggedKVCacheWrapper = _planned_when_run(
            flashinfer_mla_backend.BatchPrefillWithRaggedKVCacheWrapper
        )
        return
    flashattention_backend.get_device_capability = lambda *device: (9, 0)
    torch.zeros = _unpinned(torch.zeros)
    for module in modules:
        module.flashinfer = FLASHINFER
        module.can_use_set_mla_kv_concat_q = lambda *widths: False
        module.can_use_set_mla_kv_concat_q_fp8 = lambda: False
        module._flashinfer_rope = FLASHINFER.rope
    for module in (fixup_zero_kv, *modules):
        module._jit_fixup_module = lambda dtype: SimpleNamespace(
            fixup_zero_kv_rows=_fixup_zero_kv_rows
        )
    fp8_kernel.sgl_per_tensor_quant_fp8 = _quantize_per_tensor
    fp8_kernel.sglang_per_token_group_quant_fp8 = _quantize_groups
    for module in (fp8, fp8_utils):
        module.dispatch_w8a8_block_fp8_linear = (
            lambda *args, **kwargs: _block_fp8_linear
        )
    # The unpatched SGLang has no such module.
    internals = f"{flashattention_backend.__package__}.mla_fp8_prefill_internals"
    if internals in sys.modules:
        sys.modules[internals].sglang_per_token_group_quant_fp8 = _quantize_groups
    flashinfer_mla_backend.BatchMLAPagedAttentionWrapper = _FlashInferWrapper
    flashinfer_mla_backend.BatchPrefillWithRaggedKVCacheWrapper = _FlashInferWrapper
    # The CUDA branches: they write and gather cache rows as servers do, and rotate in
    # place with float32 cosines; the native branches do neither.
    forward_mha._is_cuda = True
    forward_mha.merge_state_v2 = merge_state
    rotary_base._is_cuda = True
    rotary_base.apply_rope_with_cos_sin_cache_inplace = _rope_in_place
    jit_rope.rotary_embedding = _rope_of_other_widths
    rope_variant.get_device = lambda *args: DEVICE


_install_stand_ins()
