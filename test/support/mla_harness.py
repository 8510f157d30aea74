"""Drives SGLang's own DeepSeek MHA prefill path, with or without a GPU.

Everything here is SGLang's: the attention module with its linears, norms and rotary
embedding, the KV pool, the request pool, the forward batch, the backends built by
their own `__init__`, the wrappers round them. What cannot run (SM100 kernels
anywhere; CUDA kernels without a GPU) has a stand-in, whose docstring begins with what
it stands in for. Without a GPU the CUDA branches of the model and of the rotary
embedding are taken nevertheless, with their Triton kernels in the interpreter.

    env = make_env(Dims.deepseek_v3(heads=2), backend="tokenspeed_mla")
    batch = make_batch(env, extend_lens=[5, 3], prefix_lens=[8, 0], chunks=4)
    result = run_prefill(env, batch)

Nothing here asks whether the imported SGLang is patched; `run_elsewhere` runs the
same scenarios on the SGLang of another folder, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Optional, Sequence

import sglang_cpu
import torch
from mla_standin import kernels
from mla_standin.install import tokenspeed_module
from patched_sglang import call_elsewhere
from sglang_cpu import DEVICE, HAS_GPU

sglang_cpu.install()

from transformers import PretrainedConfig

from prefill_patch.selftest import load_reference
from sglang.srt import server_args as server_args_module
from sglang.srt.batch_overlap.two_batch_overlap import (
    TboForwardBatchPreparer,
    compute_split_seq_index,
)
from sglang.srt.distributed import parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers import dp_attention
from sglang.srt.layers.attention import (
    flashinfer_mla_backend,
    tokenspeed_mla_backend,
    trtllm_mla_backend,
)
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.hybrid_linear_attn_backend import (
    HybridLinearAttnBackend,
)
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.layers.attention.triton_ops.merge_state import merge_state_triton
from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context
from sglang.srt.layers.quantization import fp8_kernel
from sglang.srt.layers.rotary_embedding import base as rotary_base
from sglang.srt.layers.rotary_embedding import rope_variant
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CACHE_DTYPE_NAMES = {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.bfloat16: "bf16",
    torch.float16: "auto",
}


@dataclass(frozen=True)
class Dims:
    """Dimensions of one attention layer on one rank."""

    heads: int
    nope: int
    rope: int
    v: int
    kv_lora: int
    q_lora: Optional[int] = None
    hidden: int = 128

    @property
    def qk(self) -> int:
        return self.nope + self.rope

    @property
    def row(self) -> int:
        return self.kv_lora + self.rope

    @classmethod
    def deepseek_v3(cls, heads: int = 2) -> "Dims":
        return cls(heads, nope=128, rope=64, v=128, kv_lora=512, q_lora=1536)

    @classmethod
    def v2_lite(cls, heads: int = 2) -> "Dims":
        return cls(heads, nope=128, rope=64, v=128, kv_lora=512)

    @classmethod
    def glm_4_7_flash(cls, heads: int = 20) -> "Dims":
        return cls(heads, nope=192, rope=64, v=256, kv_lora=512, q_lora=768)

    @classmethod
    def mistral4(cls, heads: int = 4) -> "Dims":
        return cls(heads, nope=64, rope=64, v=128, kv_lora=256, q_lora=1024)

    @classmethod
    def tiny(cls, heads: int = 3) -> "Dims":
        """The least that SGLang's and FlashInfer's own kernels take."""
        return cls(heads, nope=16, rope=16, v=16, kv_lora=32, q_lora=24, hidden=32)

    @classmethod
    def odd(cls, heads: int = 5) -> "Dims":
        """No power of two but where SGLang's gather from the cache needs one."""
        return cls(heads, nope=24, rope=16, v=40, kv_lora=64, q_lora=56, hidden=48)


# From its file: the unpatched SGLang has none.
_reference = load_reference()
fp8_values = _reference.finite_values
fp8_ulps = _reference.ulps_off
rope64 = _reference.rotate


def round_fp8(x: torch.Tensor, dtype: torch.dtype = FP8_DTYPES[0]) -> torch.Tensor:
    """Nearest FP8 value, ties to even, saturating (infinity too), NaN kept."""
    return _reference.round_to_fp8(x.double(), dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (so NaN equals the same NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8),
        b.contiguous().flatten().view(torch.uint8),
    )


# Ragged attention in float64: output and natural log-sum-exp, see the function itself.
attention64 = functools.partial(kernels.ragged_attention, dtype=torch.float64)


def merge64(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two partial attentions by natural log-sum-exps."""
    total = torch.logaddexp(lse_a, lse_b)
    weight_a = torch.exp(lse_a - total).nan_to_num(0.0).unsqueeze(-1)
    weight_b = torch.exp(lse_b - total).nan_to_num(0.0).unsqueeze(-1)
    return out_a * weight_a + out_b * weight_b, total


@dataclass
class KernelCall:
    """What an attention kernel was handed, copied before it ran."""

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    contiguous: tuple[bool, bool, bool]
    data_ptrs: tuple[int, int, int]
    cu_q: list[int]
    cu_kv: list[int]
    causal: bool
    return_lse: bool
    bmm1_scale: float
    bmm2_scale: float
    arguments: dict[str, Any]


@dataclass
class Kernels:
    """The log of all kernel stand-ins.

    `counts` has the calls of the kernels that only a CPU lacks, by the real one's name.
    """

    calls: list[KernelCall] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @property
    def compiled(self) -> list[tuple]:
        """The tokenspeed kernels built since `forget_compiled_kernels`."""
        return kernels.RECORD.compiled

    @property
    def late_compiles(self) -> list[tuple]:
        """Those that a call needed and start-up had not built (minutes on the real
        thing)."""
        return kernels.RECORD.late_compiles

    def clear(self) -> None:
        self.calls, self.counts = [], Counter()
        kernels.RECORD.late_compiles = []

    def record(self, handed: dict[str, Any]) -> None:
        operands = [handed[name] for name in "qkv"]
        arguments = dict(handed["arguments"])
        arguments["seq_lens"] = arguments["seq_lens"].tolist()
        if "out" in arguments:
            out = arguments.pop("out")
            arguments["out_before"] = None if out is None else out.detach().clone()
        same = ("cu_q", "cu_kv", "causal", "return_lse", "bmm1_scale", "bmm2_scale")
        self.calls.append(
            KernelCall(
                handed["kernel"],
                *(x.detach().clone() for x in operands),
                dtypes=tuple(x.dtype for x in operands),
                strides=tuple(x.stride() for x in operands),
                contiguous=tuple(x.is_contiguous() for x in operands),
                data_ptrs=tuple(x.data_ptr() for x in operands),
                **{name: handed[name] for name in same},
                arguments=arguments,
            )
        )


KERNELS = Kernels()
kernels.SETTINGS.listener = KERNELS.record
kernels.SETTINGS.dtype = torch.float64
kernels.SETTINGS.any_head_dim = True


def forget_compiled_kernels() -> None:
    """Let the next tokenspeed backend start as in a fresh process."""
    kernels.compiled_kernels.clear()
    kernels.RECORD.compiled.clear()


TOKENSPEED = tokenspeed_module()


class _FlashInferWrapper:
    """Stands in for FlashInfer's attention wrappers, which need its CUDA kernels.

    The MLA backends build several and plan them for every batch; the paths under test
    run none of them, so running one is an error.
    """

    def __init__(self, *args, **kwargs):
        self.plans = []

    def begin_forward(self, *args, **kwargs) -> None:
        self.plans.append((args, kwargs))

    plan = begin_forward

    def _not_here(self, *args, **kwargs):
        raise NotImplementedError("FlashInfer's attention wrappers need a GPU")

    forward = forward_return_lse = run = _not_here


def _rope_in_place(
    q, k, cos_sin_cache, positions, *, is_neox, rope_dim=0, fused_args=None
) -> None:
    """Stands in for SGLang's JIT CUDA RoPE kernel: in place, one rounding."""
    assert fused_args is None and cos_sin_cache.dtype == torch.float32
    KERNELS.counts["apply_rope_with_cos_sin_cache_inplace"] += 1
    for x in (q, k):
        x.copy_(_rope32(x, positions, cos_sin_cache, is_neox))


def _rope32(x, positions, cos_sin_cache, is_neox) -> torch.Tensor:
    cos, sin = cos_sin_cache[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    x = x.float()
    if is_neox:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def mla_rope_quantize_fp8(
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

    def rotate(x):
        heads = x if x.dim() == 3 else x.unsqueeze(1)
        return _rope32(heads, pos_ids, cos_sin_cache, is_neox).view(x.shape)

    outs = []
    for x, scale, out in (
        (rotate(q_rope), quant_scale_q, q_rope_out),
        (rotate(k_rope), quant_scale_kv, k_rope_out),
        (q_nope.float(), quant_scale_q, q_nope_out),
        (k_nope.float(), quant_scale_kv, k_nope_out),
    ):
        out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
        limit = torch.finfo(dtype).max
        outs.append(out.copy_((x * scale).clamp(-limit, limit).to(dtype)))
    return tuple(outs)


def _concat_mla_k(k, k_nope, k_rope) -> None:
    """Stands in for sgl_kernel's concat_mla_k, a CUDA kernel."""
    KERNELS.counts["concat_mla_k"] += 1
    k.copy_(torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1)], dim=-1))


def _merge_state(v_a, s_a, v_b, s_b, v_merged=None, s_merged=None):
    """Stands in for sgl_kernel's merge_state_v2: SGLang's Triton kernel instead."""
    KERNELS.counts["merge_state_v2"] += 1
    return merge_state_triton(v_a, s_a, v_b, s_b, v_merged, s_merged)


def _quantize_per_tensor(x, out, scale, is_static) -> None:
    """Stands in for SGLang's JIT CUDA kernel that quantizes by a given scale.

    It clips with fmin and fmax, so that NaN becomes the largest value there.
    """
    assert is_static
    KERNELS.counts["sgl_per_tensor_quant_fp8"] += 1
    limit = torch.tensor(torch.finfo(out.dtype).max)
    scaled = x.float() * (1.0 / scale)
    out.copy_(scaled.fmin(limit).fmax(-limit).to(out.dtype))


def _fixup_zero_kv_rows(out, lse, kv_lens, cum_seq_lens, max_seq_len) -> None:
    """Stands in for SGLang's JIT CUDA kernel of that name."""
    KERNELS.counts["fixup_zero_kv_rows"] += 1
    starts = cum_seq_lens.tolist()
    for i, length in enumerate(kv_lens.tolist()):
        if length == 0:
            out[starts[i] : starts[i + 1]] = 0
            lse[starts[i] : starts[i + 1]] = -math.inf


def _fixup_where_it_faults(fixup: Callable) -> Callable:
    """Stands in for SGLang's JIT CUDA kernel where it writes to misaligned addresses,
    which ends an unpatched SGLang's process: with heads that are no multiple of 4."""

    @functools.wraps(fixup)
    def run(out, lse, *lens):
        (_fixup_zero_kv_rows if lse.shape[1] % 4 else fixup)(out, lse, *lens)

    return run


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


# What a CPU has of FlashInfer; also for modules that import it only beside a GPU.
FLASHINFER = SimpleNamespace(
    prefill=SimpleNamespace(
        trtllm_ragged_attention_deepseek=kernels.trtllm_ragged_attention_deepseek
    ),
    rope=SimpleNamespace(mla_rope_quantize_fp8=mla_rope_quantize_fp8),
)


def _install_stand_ins() -> None:
    tokenspeed_mla_backend.tokenspeed_mla = TOKENSPEED
    tokenspeed_mla_backend.is_tokenspeed_mla_available = lambda: True
    if HAS_GPU:
        import flashinfer.prefill

        flashinfer.prefill.trtllm_ragged_attention_deepseek = (
            kernels.trtllm_ragged_attention_deepseek
        )
        fixup = trtllm_mla_backend.fixup_zero_kv_rows
        trtllm_mla_backend.fixup_zero_kv_rows = _fixup_where_it_faults(fixup)
        flashinfer_mla_backend.BatchPrefillWithRaggedKVCacheWrapper = _planned_when_run(
            flashinfer_mla_backend.BatchPrefillWithRaggedKVCacheWrapper
        )
        return
    trtllm_mla_backend.flashinfer = FLASHINFER
    for name in ("trtllm_mla_backend", "mla_fp8_prefill"):
        module = sys.modules.get(f"sglang.srt.layers.attention.{name}")
        if module is not None:
            module.fixup_zero_kv_rows = _fixup_zero_kv_rows
    fp8_kernel.sgl_per_tensor_quant_fp8 = _quantize_per_tensor
    flashinfer_mla_backend.BatchMLAPagedAttentionWrapper = _FlashInferWrapper
    flashinfer_mla_backend.BatchPrefillWithRaggedKVCacheWrapper = _FlashInferWrapper
    # The CUDA branches: they write and gather cache rows as servers do, and rotate in
    # place with float32 cosines; the native branches do neither.
    forward_mha._is_cuda = True
    forward_mha.merge_state_v2 = _merge_state
    forward_mha.concat_mla_k = _concat_mla_k
    rotary_base._is_cuda = True
    rotary_base.apply_rope_with_cos_sin_cache_inplace = _rope_in_place
    rope_variant.get_device = lambda *args: DEVICE


_install_stand_ins()


@dataclass
class Env:
    """One attention layer with its pools, its backend and its server arguments."""

    dims: Dims
    dtype: torch.dtype
    attn: DeepseekV2AttentionMLA = field(repr=False)
    pool: MLATokenToKVPool = field(repr=False)
    req_to_token_pool: ReqToTokenPool = field(repr=False)
    runner: SimpleNamespace = field(repr=False)
    backend: Any = field(repr=False)
    server_args: Any = field(repr=False)

    @property
    def is_fp8(self) -> bool:
        return self.pool.dtype in FP8_DTYPES

    @property
    def k_scale(self) -> float:
        scale = self.attn.attn_mha.k_scale_float
        return 1.0 if scale is None else scale

    @property
    def v_scale(self) -> float:
        scale = self.attn.attn_mha.v_scale_float
        return 1.0 if scale is None else scale

    @property
    def cos_sin_cache(self) -> Optional[torch.Tensor]:
        rotary = self.attn.rotary_emb
        return None if rotary is None else rotary.cos_sin_cache

    @property
    def is_neox(self) -> bool:
        return getattr(self.attn.rotary_emb, "is_neox_style", False)

    def activate(self) -> None:
        """Make this environment's server arguments the process's."""
        server_args_module.set_global_server_args_for_scheduler(self.server_args)


def _init_distributed() -> None:
    if parallel_state.model_parallel_is_initialized():
        return
    store = torch.distributed.HashStore()
    backend = "nccl" if HAS_GPU else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, backend=backend
    )
    parallel_state.initialize_model_parallel()


def make_server_args(backend: str = "tokenspeed_mla", **overrides):
    """Real ServerArgs; the model path "dummy" skips only its checks of a model."""
    args = server_args_module.ServerArgs(model_path="dummy", device=DEVICE)
    settings = dict(
        attention_backend=backend,
        prefill_attention_backend=backend,
        decode_attention_backend=backend,
        disable_piecewise_cuda_graph=True,
        page_size=64,
    )
    for name, value in {**settings, **overrides}.items():
        if not hasattr(args, name):
            raise AttributeError(f"ServerArgs has no field {name!r}")
        setattr(args, name, value)
    return args


def make_attention(
    dims: Dims,
    dtype: torch.dtype,
    rope: Optional[str],
    is_neox: bool,
    max_position: int,
    seed: int,
    layer_id: int = 0,
) -> DeepseekV2AttentionMLA:
    """The real attention module with random weights of the usual magnitude."""
    config = PretrainedConfig(
        architectures=["DeepseekV3ForCausalLM"],
        rms_norm_eps=1e-6,
        rope_interleave=not is_neox,
    )
    scaling = None
    if rope == "yarn":
        scaling = dict(
            rope_type="deepseek_yarn",
            factor=4.0,
            original_max_position_embeddings=max_position // 4,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=0.7,
        )
    elif rope not in ("default", None):
        raise ValueError(f'rope must be "default", "yarn" or None, not {rope!r}')
    args = server_args_module.get_global_server_args()
    device, args.device = args.device, "cuda"  # "cpu" allows no other RoPE than yarn
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(DEVICE):
            attn = DeepseekV2AttentionMLA(
                config=config,
                hidden_size=dims.hidden,
                num_heads=dims.heads,
                qk_nope_head_dim=dims.nope,
                qk_rope_head_dim=dims.rope,
                v_head_dim=dims.v,
                q_lora_rank=dims.q_lora,
                kv_lora_rank=dims.kv_lora,
                rope_scaling=scaling,
                max_position_embeddings=max_position,
                reduce_results=False,
                layer_id=layer_id,
                skip_rope=rope is None,
            )
    finally:
        torch.set_default_dtype(default_dtype)
        args.device = device
    if attn.rotary_emb is not None:
        # Other RoPE dimensions than 64 and its doubles would go to a kernel that
        # rounds the cosines to the model's type.
        attn.rotary_emb.use_fallback_kernel = False
        attn.rotary_emb._forward_method = attn.rotary_emb.forward_cuda
    generator = torch.Generator().manual_seed(seed)
    for name, weight in attn.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if "layernorm" in name:
            values = 1 + 0.1 * values
        else:
            values = values * weight.shape[-1] ** -0.5
        weight.data.copy_(values.to(weight.dtype))
    return attn.eval()


def make_env(
    dims: Dims,
    backend: str = "tokenspeed_mla",
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype = torch.float8_e4m3fn,
    rope: Optional[str] = "default",
    is_neox: bool = False,
    k_scale: Optional[float] = None,
    v_scale: Optional[float] = None,
    slots: int = 512,
    page_size: int = 64,
    max_requests: int = 8,
    max_context: int = 512,
    seed: int = 0,
    pool_class: type = MLATokenToKVPool,
    **server_args,
) -> Env:
    """Build the layer, its pools and its backend, each by its own `__init__`."""
    args = make_server_args(
        backend,
        page_size=page_size,
        kv_cache_dtype=CACHE_DTYPE_NAMES[cache_dtype],
        **server_args,
    )
    server_args_module.set_global_server_args_for_scheduler(args)
    _init_distributed()
    attn = make_attention(dims, dtype, rope, is_neox, max_context, seed)
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is not None:
            scale = torch.tensor(value, dtype=torch.float32, device=DEVICE)
            setattr(attn.attn_mha, name, scale)
            setattr(attn.attn_mha, f"{name}_float", value)
    pool = pool_class(
        size=slots,
        page_size=page_size,
        dtype=cache_dtype,
        kv_lora_rank=dims.kv_lora,
        qk_rope_head_dim=dims.rope,
        layer_num=1,
        device=DEVICE,
        enable_memory_saver=False,
    )
    req_to_token_pool = ReqToTokenPool(
        size=max_requests,
        max_context_len=max_context,
        device=DEVICE,
        enable_memory_saver=False,
    )
    model_config = SimpleNamespace(
        num_attention_heads=dims.heads,
        get_num_kv_heads=lambda tp_size: dims.heads // tp_size,
        kv_lora_rank=dims.kv_lora,
        qk_nope_head_dim=dims.nope,
        qk_rope_head_dim=dims.rope,
        v_head_dim=dims.v,
        scaling=attn.scaling,
        context_len=max_context,
        hidden_size=dims.hidden,
        dtype=dtype,
    )
    dp_attention.initialize_dp_attention(args, model_config)
    runner = SimpleNamespace(
        model_config=model_config,
        device=DEVICE,
        dtype=dtype,
        kv_cache_dtype=cache_dtype,
        page_size=page_size,
        req_to_token_pool=req_to_token_pool,
        token_to_kv_pool=pool,
        server_args=args,
    )
    env = Env(dims, dtype, attn, pool, req_to_token_pool, runner, None, args)
    env.backend = runner.attn_backend = make_backend(env, backend)
    return env


def make_backend(env: Env, name: str):
    """Another backend on the same pools, as two-batch overlap builds its children."""
    env.activate()
    classes = {
        "tokenspeed_mla": tokenspeed_mla_backend.TokenspeedMLABackend,
        "trtllm_mla": trtllm_mla_backend.TRTLLMMLABackend,
        "flashinfer": flashinfer_mla_backend.FlashInferMLAAttnBackend,
    }
    return classes[name](env.runner)


def wrap_tbo(primary, children: Sequence[Any]) -> TboAttnBackend:
    return TboAttnBackend(primary, list(children))


def wrap_hybrid(env: Env, prefill, decode) -> HybridAttnBackend:
    return HybridAttnBackend(env.runner, prefill_backend=prefill, decode_backend=decode)


class _LinearBackend:
    """Stands in for a linear-attention backend, which needs a Mamba state pool."""

    def init_forward_metadata(self, forward_batch) -> None:
        pass


def wrap_hybrid_linear(full, layers: Sequence[int] = (0,)) -> HybridLinearAttnBackend:
    return HybridLinearAttnBackend(full, _LinearBackend(), list(layers))


@dataclass
class Batch:
    """One prefill batch: its requests, its slots and what the cache holds before."""

    extend_lens: list[int]
    prefix_lens: list[int]
    pad_rows: int
    chunk_capacity: Optional[int]
    hidden: torch.Tensor
    positions: torch.Tensor
    out_cache_loc: torch.Tensor
    prefix_slots: list[torch.Tensor]
    cache_before: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(self.extend_lens)

    @property
    def rows(self) -> int:
        return self.tokens + self.pad_rows

    @property
    def cu_q(self) -> list[int]:
        return _cumulate(self.extend_lens)

    @property
    def chunk_len(self) -> Optional[int]:
        if self.chunk_capacity is None or not any(self.prefix_lens):
            return None
        return self.chunk_capacity // len(self.prefix_lens)

    def chunk_lens(self) -> list[list[int]]:
        """Keys per chunk and request, as SGLang splits the prefixes."""
        if not any(self.prefix_lens):
            return []
        size = self.chunk_len or max(self.prefix_lens)
        count = -(-max(self.prefix_lens) // size)
        return [
            [min(max(p - i * size, 0), size) for p in self.prefix_lens]
            for i in range(count)
        ]


def _cumulate(lens: Sequence[int]) -> list[int]:
    total = [0]
    for n in lens:
        total.append(total[-1] + n)
    return total


def make_batch(
    env: Env,
    extend_lens: Sequence[int],
    prefix_lens: Optional[Sequence[int]] = None,
    *,
    pad_rows: int = 0,
    chunks: Optional[int] = None,
    seed: int = 0,
    hidden: Optional[torch.Tensor] = None,
) -> Batch:
    """A batch with shuffled slots and a cache full of random rows.

    `chunks` forces the longest prefix into that many chunks; `pad_rows` adds the rows
    of data-parallel padding. No requests make the idle batch of a rank without work.
    """
    extend_lens = list(extend_lens)
    prefix_lens = list(prefix_lens or [0] * len(extend_lens))
    if len(prefix_lens) != len(extend_lens):
        raise ValueError(f"{len(extend_lens)} extend_lens, {len(prefix_lens)} prefixes")
    generator = torch.Generator().manual_seed(seed)
    pool, page = env.pool, env.pool.page_size
    needed = sum(extend_lens) + sum(prefix_lens)
    if needed > pool.size:
        raise ValueError(f"{needed} tokens do not fit in {pool.size} slots")
    slots = page + torch.randperm(pool.size, generator=generator)[:needed]
    new, old = slots.split([sum(extend_lens), sum(prefix_lens)])
    buffer = pool.kv_buffer[0]
    rows = torch.randn(buffer.shape, generator=generator)
    before = rows.to(pool.dtype).view(pool.store_dtype).to(DEVICE)
    if hidden is None:
        tokens = sum(extend_lens)
        hidden = torch.randn(tokens, env.dims.hidden, generator=generator)
    hidden = hidden.to(env.dtype)
    # What data-parallel padding holds is arbitrary: ones, so that nothing cancels.
    hidden = torch.cat([hidden, hidden.new_ones(pad_rows, env.dims.hidden)])
    positions = [torch.arange(p, p + n) for p, n in zip(prefix_lens, extend_lens)]
    ends = _cumulate(prefix_lens)
    capacity = None
    if chunks is not None and any(prefix_lens):
        capacity = -(-max(prefix_lens) // chunks) * len(prefix_lens)
    return Batch(
        extend_lens=extend_lens,
        prefix_lens=prefix_lens,
        pad_rows=pad_rows,
        chunk_capacity=capacity,
        hidden=hidden.to(DEVICE),
        positions=torch.cat([*positions, torch.zeros(pad_rows, dtype=torch.int64)]).to(
            DEVICE
        ),
        out_cache_loc=torch.cat([new, new.new_zeros(pad_rows)]).to(DEVICE),
        prefix_slots=[old[a:b].to(DEVICE) for a, b in zip(ends, ends[1:])],
        cache_before=before,
    )


def make_forward_batch(env: Env, batch: Batch, backend: Any = None) -> ForwardBatch:
    """A fresh real ForwardBatch, padded by SGLang's own padding."""
    bs = len(batch.extend_lens)
    ids = torch.arange(1, bs + 1)
    new = batch.out_cache_loc[: batch.tokens].split(batch.extend_lens)
    table = env.req_to_token_pool.req_to_token
    for i in range(bs):
        row = torch.cat([batch.prefix_slots[i], new[i]]).to(torch.int32)
        table[i + 1, : row.numel()] = row
    seq_lens = torch.tensor(
        [p + n for p, n in zip(batch.prefix_lens, batch.extend_lens)],
        dtype=torch.int64,
    )
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND if bs else ForwardMode.IDLE,
        batch_size=bs,
        input_ids=torch.zeros(batch.tokens, dtype=torch.int64, device=DEVICE),
        req_pool_indices=ids.to(DEVICE),
        seq_lens=seq_lens.to(DEVICE),
        seq_lens_cpu=seq_lens,
        seq_lens_sum=int(seq_lens.sum()),
        out_cache_loc=batch.out_cache_loc[: batch.tokens],
        positions=batch.positions[: batch.tokens],
        extend_num_tokens=batch.tokens,
        extend_seq_lens=torch.tensor(
            batch.extend_lens, dtype=torch.int32, device=DEVICE
        ),
        extend_prefix_lens=torch.tensor(
            batch.prefix_lens, dtype=torch.int32, device=DEVICE
        ),
        extend_start_loc=torch.tensor(
            batch.cu_q[:-1], dtype=torch.int32, device=DEVICE
        ),
        extend_prefix_lens_cpu=list(batch.prefix_lens),
        extend_seq_lens_cpu=list(batch.extend_lens),
        extend_logprob_start_lens_cpu=[0] * bs,
        lora_ids=[None] * bs,
        req_to_token_pool=env.req_to_token_pool,
        token_to_kv_pool=env.pool,
        attn_backend=backend or env.backend,
    )
    if batch.pad_rows:
        forward_batch._pad_inputs_to_size(env.runner, batch.rows, bs)
        forward_batch.extend_num_tokens = batch.rows
    return forward_batch


@dataclass
class Result:
    """What the prepare step returned, and what the layer did with it.

    An idle batch has neither q, k, v nor an attention output.
    """

    method: str
    q: Optional[torch.Tensor]
    k: Optional[torch.Tensor]
    v: Optional[torch.Tensor]
    cache: torch.Tensor
    attn_output: Optional[torch.Tensor]
    output: torch.Tensor
    calls: list[KernelCall]
    late_compiles: list[tuple]
    counts: Counter
    forward_batch: Optional[ForwardBatch]

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """The cache rows at these slots."""
        return self.cache[slots.long(), 0]


@contextmanager
def nan_memory() -> Iterator[None]:
    """Every allocation that leaves memory as it is gets it full of NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was)


@contextmanager
def chunk_capacity(tokens: Optional[int]) -> Iterator[None]:
    """SGLang's own limit of prefix tokens in one chunk, for the time of a run."""
    variable = envs.SGLANG_MAX_KV_CHUNK_CAPACITY
    if tokens is None:
        yield
        return
    before = os.environ.get(variable.name)
    variable.set(tokens)
    try:
        yield
    finally:
        if before is None:
            variable.clear()
        else:
            os.environ[variable.name] = before


def prepare(env: Env, forward_batch: ForwardBatch, hidden: torch.Tensor):
    """The layer's prepare step, chosen by SGLang's own dispatch."""
    context = get_attn_tp_context()
    context.init_context(env.dims.q_lora, is_nsa=False)
    with context.maybe_input_scattered(forward_batch):
        context.set_attn_inputs(
            AttentionInputs(hidden, forward_batch, env.attn.prepare_qkv_latent)
        )
        return env.attn.forward_prepare(
            positions=forward_batch.positions,
            hidden_states=hidden,
            forward_batch=forward_batch,
            zero_allocator=None,
        )


def run_prefill(
    env: Env,
    batch: Batch,
    *,
    backend: Any = None,
    around: Callable[[ForwardBatch], Any] = lambda forward_batch: nullcontext(),
) -> Result:
    """Run the whole attention layer, as the model runner and the model do.

    `backend` may be a wrapper; `around` may give a context manager to run within (a
    graph context, a switch, `nan_memory`).
    """
    env.activate()
    env.pool.kv_buffer[0].copy_(batch.cache_before)
    forward_batch = make_forward_batch(env, batch, backend)
    with chunk_capacity(batch.chunk_capacity), around(forward_batch):
        if forward_batch.batch_size > 0:
            forward_batch.attn_backend.init_forward_metadata(forward_batch)
        return run_layer(env, forward_batch, batch.hidden)


def run_overlapped(env: Env, batch: Batch, backend: TboAttnBackend) -> list[Result]:
    """Run the two halves of a batch, split where SGLang's scheduler splits it."""
    env.activate()
    env.pool.kv_buffer[0].copy_(batch.cache_before)
    parent = make_forward_batch(env, batch, backend)
    parent.tbo_split_seq_index = compute_split_seq_index(
        parent.forward_mode, batch.rows, batch.extend_lens, None
    )
    results = []
    with chunk_capacity(batch.chunk_capacity):
        TboForwardBatchPreparer.prepare(parent)
        backend.init_forward_metadata(parent)
        for child in parent.tbo_children:
            rows = slice(*child.tbo_parent_token_range)
            results.append(run_layer(env, child, batch.hidden[rows]))
    return results


def run_layer(env: Env, forward_batch: ForwardBatch, hidden: torch.Tensor) -> Result:
    """Run the layer on a forward batch whose metadata stands."""
    KERNELS.clear()
    seen = []
    handle = env.attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().clone())
    )
    try:
        with torch.no_grad():
            state = prepare(env, forward_batch, hidden.clone())
            inner = state[3]
            q, k, v = inner[:3] if inner else (None, None, None)
            q, k, v = (x if x is None else x.detach().clone() for x in (q, k, v))
            output = env.attn.forward_core(state)
    finally:
        handle.remove()
    return Result(
        method=state[1].name if inner else "",
        q=q,
        k=k,
        v=v,
        cache=env.pool.kv_buffer[0].clone(),
        attn_output=seen[0].view(-1, env.dims.heads, env.dims.v) if seen else None,
        output=output.detach().clone(),
        calls=KERNELS.calls,
        late_compiles=KERNELS.late_compiles,
        counts=KERNELS.counts,
        forward_batch=forward_batch,
    )


@dataclass(frozen=True)
class Scenario:
    """One run, described by the arguments of `make_env` and `make_batch`."""

    env: dict[str, Any]
    batch: dict[str, Any]

    def run(self) -> Result:
        env = make_env(**self.env)
        return run_prefill(env, make_batch(env, **self.batch))


def run_elsewhere(site: Path, scenarios: Sequence[Scenario]) -> list[Result]:
    """Run scenarios on the SGLang in the folder `site`, in a process of its own."""
    if not Path(site, "sglang", "__init__.py").is_file():
        raise ValueError(f"{site} holds no sglang package; give the folder it lies in")
    return call_elsewhere(site, "mla_harness", list(scenarios))


def serve(source: str, target: str) -> None:
    """The other end of `run_elsewhere`."""
    results = [scenario.run() for scenario in torch.load(source, weights_only=False)]
    torch.save([dataclasses.replace(r, forward_batch=None) for r in results], target)


@dataclass
class LayerInputs:
    """What the prepare step starts from, in the model's dtype, before RoPE."""

    q: torch.Tensor
    kv: torch.Tensor
    kv_a: torch.Tensor
    k_pe: torch.Tensor


@dataclass
class Expected:
    """Unrounded float64 results of the definition."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor


def layer_inputs(env: Env, batch: Batch) -> LayerInputs:
    """Run the layer's own linears and norms, and nothing after them."""
    attn, dims = env.attn, env.dims
    with torch.no_grad():
        if dims.q_lora is None:
            q = attn.q_proj(batch.hidden)[0]
            latent = attn.kv_a_proj_with_mqa(batch.hidden)[0]
        else:
            latent = attn.fused_qkv_a_proj_with_mqa(batch.hidden)[0]
            q, latent = latent.split([dims.q_lora, dims.row], dim=-1)
            q = attn.q_b_proj(attn.q_a_layernorm(q))[0]
        kv_a, k_pe = latent.split([dims.kv_lora, dims.rope], dim=-1)
        kv_a = attn.kv_a_layernorm(kv_a)
        kv = attn.kv_b_proj(kv_a)[0]
    return LayerInputs(
        q=q.view(-1, dims.heads, dims.qk),
        kv=kv.view(-1, dims.heads, dims.nope + dims.v),
        kv_a=kv_a,
        k_pe=k_pe.unsqueeze(1),
    )


def expected(env: Env, batch: Batch) -> Expected:
    """q, k, v and the cache rows by definition, for every row of the batch."""
    inputs, dims = layer_inputs(env, batch), env.dims

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return rope64(x, batch.positions, env.cos_sin_cache, env.is_neox)

    k_pe = rotate(inputs.k_pe)
    q = inputs.q.double()
    kv = inputs.kv.double()
    return Expected(
        q=torch.cat([q[..., : dims.nope], rotate(q[..., dims.nope :])], dim=-1),
        k=torch.cat([kv[..., : dims.nope], k_pe.expand(-1, dims.heads, -1)], dim=-1),
        v=kv[..., dims.nope :],
        rows=torch.cat([inputs.kv_a.double(), k_pe.squeeze(1)], dim=-1),
    )


def prefix_kv64(env: Env, batch: Batch, request: int) -> tuple[torch.Tensor, ...]:
    """K and V of one request's cached prefix, in float64 from the cache's values."""
    dims = env.dims
    cache = batch.cache_before.view(env.pool.dtype)
    rows = cache[batch.prefix_slots[request], 0].double()
    latent, k_pe = rows.split([dims.kv_lora, dims.rope], dim=-1)
    kv = latent @ env.attn.kv_b_proj.weight.double().T
    kv = kv.view(-1, dims.heads, dims.nope + dims.v)
    k_pe = k_pe.unsqueeze(1).expand(-1, dims.heads, -1)
    return torch.cat([kv[..., : dims.nope], k_pe], dim=-1), kv[..., dims.nope :]


def expected_attention(
    env: Env,
    batch: Batch,
    *,
    lse_base: float = math.e,
    quantize: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """Float64 attention of the real tokens over prefix and extension.

    SGLang merges prefix chunks by natural log-sum-exps. `lse_base=2` gives what comes
    out when the kernel returns base-2 ones, as trtllm-gen does; with the default the
    result is plain softmax attention. `quantize` is applied to q, and to k and v over
    their scales.
    """
    exact, n = expected(env, batch), batch.tokens

    def operand(x: torch.Tensor, scale: float) -> torch.Tensor:
        return quantize(x / scale).double() * scale

    q = operand(exact.q[:n], 1.0)
    k, v = operand(exact.k[:n], env.k_scale), operand(exact.v[:n], env.v_scale)
    scale, cu_q = env.attn.scaling, batch.cu_q
    factor = 1 / math.log(lse_base)
    out, lse = attention64(q, k, v, cu_q, cu_q, scale, causal=True)
    lse = lse * factor
    prefixes = [prefix_kv64(env, batch, i) for i in range(len(batch.prefix_lens))]
    done = [0] * len(prefixes)
    for lens in batch.chunk_lens():
        parts = []
        for i, size in enumerate(lens):
            parts.append([x[done[i] : done[i] + size] for x in prefixes[i]])
            done[i] += size
        k, v = (torch.cat(x) for x in zip(*parts))
        k, v = operand(k, env.k_scale), operand(v, env.v_scale)
        part = attention64(q, k, v, cu_q, _cumulate(lens), scale, causal=False)
        out, lse = merge64(part[0], part[1] * factor, out, lse)
    return out


def expected_output(env: Env, attention: torch.Tensor) -> torch.Tensor:
    """The layer's output for an attention output, in float64."""
    return attention.flatten(1) @ env.attn.o_proj.weight.double().T


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square error over root mean square."""
    actual, wanted = actual.double(), wanted.double()
    return ((actual - wanted).norm() / wanted.norm()).item()
