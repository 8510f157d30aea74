"""FP8 prefill for MLA attention backends: the hook, its implementation, and the base of
the log-sum-exps that prefix chunks are merged by.

**The hook.** ``DeepseekMHAForwardMixin.forward_normal_prepare`` asks the backend that
will run the batch to take over before RoPE and the KV-cache write::

    backend.prepare_prefill_qkv(
        *, q, q_pe, kv_a, k_pe, positions, layer, forward_batch
    ) -> (q, k, v) | None

- ``q`` [s, h, nope + rope] and ``q_pe``, its view [s, h, rope], before RoPE; ``kv_a``
  [s, lora] after its norm; ``k_pe`` [s, 1, rope], a view, before RoPE, all in the
  model's dtype, or ``q`` in FP8, rotated, where ``project_prefill_q`` has given it;
  ``positions`` [s]; ``layer``, the ``DeepseekV2AttentionMLA``.
- A tuple is the operands as the backend's own prefill kernel takes them, with the
  tokens' rows written to the KV cache; the model returns them as they are.
- None declines the batch. Nothing was touched, the inputs included, and the model goes
  on with RoPE, the cache write and BF16 operands, as for a backend without the method.

A backend that returns FP8 operands also has ``takes_prefill(layer, forward_batch)``,
whether the hook takes the batch, and ``gather_prefix_chunk_kv(kv_indices, layer,
forward_batch) -> (k, v)``, which turns a prefix chunk, by its slots in the cache, into
operands of the same kind.

**The projections.** Where ``kv_b_proj`` has a plain weight, in the model's dtype or in FP8
with scales of blocks, K and V of both are not written in the model's dtype first: one GEMM
of this project's writes them in FP8 (SGLANG_MLA_FP8_PREFILL_GEMM;
``mla_kv_proj_quantize_fp8``). With FP8 weights it takes a prefix chunk's latent as it is in
the cache. Q likewise, with a plain weight of ``q_b_proj`` in the model's dtype: the model
asks ``project_prefill_q(*, q_a, positions, layer, forward_batch) -> q | None`` in place of
``q_b_proj``, and a batch whose Q it gives is one that the hook takes.

**Log-sum-exps.** SGLang merges the results of prefix chunks by natural log-sum-exps;
trtllm-gen's ragged attention returns base-2 ones. With SGLANG_MLA_FP8_PREFILL_LSE=auto
the backend finds the base of its kernel when it starts (``find_lse_base``), and base-2
ones are converted before they go to a merge, whoever prepared the batch.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

import torch

from sglang.jit_kernel.fp8_quantize import fp8_quantize
from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.mla_kv_proj_quantize_fp8 import (
    HEAD_DIM,
    SCALE_BLOCK,
    mla_kv_proj_quantize_fp8,
    rows_are_aligned,
)
from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.jit_kernel.mla_q_proj_quantize_fp8 import (
    NOPE,
    ROPE,
    mla_q_proj_quantize_fp8,
)
from sglang.jit_kernel.utils import cache_once, is_arch_support_pdl, is_hip_runtime
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank
from sglang.srt.environ import envs
from sglang.srt.layers.attention.mla_fp8_prefill_counts import (
    DECLINED,
    TAKEN,
    UNSUPPORTED,
    batch_counts,
)
from sglang.srt.layers.attention.mla_fp8_prefill_internals import (
    attend_to_chunk,
    attention_tp_size,
    attn_backend_of,
    decode_context_parallel,
    disable_prefill_cuda_graphs,
    in_cuda_graph,
    kv_pool_of,
    metrics_model_name,
    per_token_group_quant_fp8,
    prefill_backend_name,
    write_loc,
)
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MLATokenToKVPool
from sglang.srt.utils import is_flashinfer_available, log_info_on_rank0

if is_flashinfer_available():
    import flashinfer.rope

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Values of SGLANG_MLA_FP8_PREFILL. The first two are producers, with the same result:
# one launch for everything, and one composed of FlashInfer's RoPE, fp8_quantize and the
# KV pool's own write, which is also used where the pool's buffer may not be written
# directly.
FUSED, COMPOSED, OFF = "fused", "composed", "off"

# Values of SGLANG_MLA_FP8_PREFILL_GEMM, beside off: auto is on where it was measured, on
# SM90.
ON = "on"

# Backends, as ServerArgs has them, that the hook turns prefill CUDA graphs off for.
GRAPHLESS_BACKENDS = ("trtllm_mla", "tokenspeed_mla")

# SGLANG_MLA_FP8_PREFILL_LSE is auto, or the base of the prefill kernel's log-sum-exps:
# a key here, with the factor that makes them natural.
AUTO = "auto"
LSE_FACTORS = {"2": math.log(2), "e": 1.0}
LSE_TOLERANCE = 0.01
# What auto has found in this process, by backend class; None if the base is neither.
_found_lse_bases: dict[type, Optional[str]] = {}


@cache_once
def _wrapper_types() -> tuple[type, type, type]:
    # These modules import the model runner, which imports the models.
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import (
        HybridLinearAttnBackend,
    )
    from sglang.srt.layers.attention.tbo_backend import TboAttnBackend

    return TboAttnBackend, HybridAttnBackend, HybridLinearAttnBackend


def resolve_attn_backend(
    forward_batch: ForwardBatch, layer_id: int
) -> AttentionBackend:
    """The backend that runs this layer of this batch, out of any nest of wrappers."""
    tbo, hybrid, hybrid_linear = _wrapper_types()
    backend = attn_backend_of(forward_batch)
    while True:
        if isinstance(backend, tbo):
            backend = backend.primary
        elif isinstance(backend, hybrid):
            backend = backend._select_backend(forward_batch.forward_mode)
        elif isinstance(backend, hybrid_linear):
            if layer_id not in backend.full_attn_layers:
                return backend.linear_attn_backend
            backend = backend.full_attn_backend
        else:
            return backend


def q_projection(
    layer: DeepseekV2AttentionMLA, positions: torch.Tensor, forward_batch: ForwardBatch
) -> Callable[[torch.Tensor], tuple]:
    """``q_b_proj``, or in its place what asks the batch's backend before: of the latent
    q_a [s, lora] after its norm, a tuple that begins with q."""
    backend = resolve_attn_backend(forward_batch, layer.layer_id)
    if not (isinstance(backend, MLAFP8PrefillMixin) and backend.prepare_prefill_qkv):
        return layer.q_b_proj

    def project(q_a: torch.Tensor) -> tuple:
        q = backend.project_prefill_q(
            q_a=q_a, positions=positions, layer=layer, forward_batch=forward_batch
        )
        return layer.q_b_proj(q_a) if q is None else (q,)

    return project


def prepare_prefill_qkv(
    layer: DeepseekV2AttentionMLA,
    q: torch.Tensor,
    q_pe: torch.Tensor,
    kv_a: torch.Tensor,
    k_pe: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: ForwardBatch,
) -> Optional[QKV]:
    """Call the batch's backend's hook; None where it has none or declines."""
    backend = resolve_attn_backend(forward_batch, layer.layer_id)
    hook = getattr(backend, "prepare_prefill_qkv", None)
    if hook is None:
        return None
    return hook(
        q=q,
        q_pe=q_pe,
        kv_a=kv_a,
        k_pe=k_pe,
        positions=positions,
        layer=layer,
        forward_batch=forward_batch,
    )


def attend_prefix_chunks(
    layer: DeepseekV2AttentionMLA,
    q: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    forward_batch: ForwardBatch,
) -> Optional[torch.Tensor]:
    """Attention to the new tokens, [s, h, v], merged with that to each chunk of the
    prefix; None where the hook has not taken the batch.

    q is the hook's; output and lse, [s, h], are those of attention to the new tokens.
    """
    if q.dtype != FP8:
        return None
    backend = resolve_attn_backend(forward_batch, layer.layer_id)
    takes = getattr(backend, "takes_prefill", None)
    if takes is None or not takes(layer, forward_batch):
        return None
    # Where there is no GPU, there is no sgl_kernel to import.
    from sglang.srt.layers.attention.merge_state import merge_state

    for i in range(forward_batch.num_prefix_chunks):
        forward_batch.set_prefix_chunk_idx(i)
        kv_indices = forward_batch.prefix_chunk_kv_indices[i]
        k, v = backend.gather_prefix_chunk_kv(kv_indices, layer, forward_batch)
        chunk = attend_to_chunk(layer.attn_mha, q, k, v, forward_batch)
        output, lse = merge_state(*chunk, output, lse)
    return output


@functools.lru_cache(maxsize=None)
def _log_once(message: str) -> None:
    log_info_on_rank0(logger, message)


def _is_plain_rope(rotary_emb: torch.nn.Module, rope_dim: int) -> bool:
    """Whether cos_sin_cache, indexed by the positions, is all there is to this RoPE.

    It is not where SGLang runs another method than RotaryEmbedding's for GPUs or changes
    what it is given, nor where that one uses its fallback, which rounds the shared
    cos_sin_cache to the model's dtype.
    """
    method = getattr(rotary_emb, "_forward_method", None)
    return (
        isinstance(rotary_emb, RotaryEmbedding)
        and type(rotary_emb).forward is RotaryEmbedding.forward
        and getattr(method, "__func__", None) is RotaryEmbedding.forward_cuda
        and not rotary_emb.use_fallback_kernel
        and rotary_emb.rotary_dim == rope_dim
        and rotary_emb.cos_sin_cache.shape[1:] == (rope_dim,)
        and rotary_emb.cos_sin_cache.dtype == torch.float32
    )


def _inherits(pool, base: type, *methods: str) -> bool:
    return isinstance(pool, base) and all(
        getattr(type(pool), method) is getattr(base, method) for method in methods
    )


def _pool_producer(pool) -> Optional[str]:
    """How FP8 rows get into this KV pool: FUSED where its buffer is the plain
    [slots, 1, lora + rope] and may be written directly, COMPOSED where the pool has to
    store them itself, None where it does not take FP8 rows."""
    access = ("get_key_buffer", "set_mla_kv_buffer")
    inner = pool
    if _inherits(pool, HybridLinearKVPool, *access):
        inner = pool.full_kv_pool
    if not hasattr(inner, "set_mla_kv_buffer") or getattr(inner, "dtype", None) != FP8:
        return None
    if not hasattr(inner, "kv_lora_rank"):
        return None  # layers with rows of several kinds
    if inner.kv_cache_dim != inner.kv_lora_rank + inner.qk_rope_head_dim:
        return None  # rows with scales of their own
    plain = _inherits(inner, MLATokenToKVPool, *access, "_create_buffers")
    return FUSED if plain else COMPOSED


def _kv_buffer(pool, layer_id: int) -> torch.Tensor:
    """The layer's rows in a FUSED pool. Unlike get_key_buffer, and like SGLang's own
    writer, this does not wait for HiCache to load the layer's other rows."""
    if isinstance(pool, HybridLinearKVPool):
        layer_id = pool._transfer_full_attention_id(layer_id)
        pool = pool.full_kv_pool
    return pool.kv_buffer[layer_id - pool.start_layer]


def _is_one_shot_over_prefix(forward_batch: ForwardBatch) -> bool:
    return bool(
        forward_batch.mha_one_shot and any(forward_batch.extend_prefix_lens_cpu)
    )


class _Weight(NamedTuple):
    """A weight that is all there is to its projection, but for scales in FP8."""

    data: torch.Tensor
    scale: Optional[torch.Tensor] = None  # of blocks of 128 x 128
    ue8m0_latent: bool = False  # scales of what it multiplies are powers of two


def _plain_weight(proj: torch.nn.Module, dtype: torch.dtype) -> Optional[_Weight]:
    """The projection's weight in this dtype or in FP8 with float32 scales of blocks; None
    with LoRA, quantized otherwise or with a bias."""
    weight = getattr(proj, "weight", None)  # AWQ and others have it by another name
    if (
        type(proj) is not ColumnParallelLinear
        or weight is None
        or type(weight.data) is not torch.Tensor  # --torchao-config has its own
        or not weight.is_contiguous()
        or proj.bias is not None
        or proj.gather_output
    ):
        return None
    method = proj.quant_method
    if type(method) is UnquantizedLinearMethod and weight.dtype == dtype:
        return _Weight(weight)
    if type(method) is not Fp8LinearMethod or weight.dtype != FP8:
        return None
    scale = getattr(proj, "weight_scale_inv", None)
    if (
        scale is None
        or scale.dtype != torch.float32
        or scale.shape != tuple(size // SCALE_BLOCK for size in weight.shape)
        or not scale.is_contiguous()
        or getattr(scale, "format_ue8m0", False)
    ):
        return None
    keywords = getattr(method.w8a8_block_fp8_linear, "keywords", {})
    return _Weight(weight, scale, keywords.get("act_scale_ue8m0", False))


def _attention_layers(
    model: Optional[torch.nn.Module],
) -> Iterator[DeepseekV2AttentionMLA]:
    names = "attn_mha", "kv_b_proj", "rotary_emb"
    for module in model.modules() if model is not None else ():
        if all(hasattr(module, name) for name in names):
            yield module


def _with_aligned_rows(x: torch.Tensor) -> torch.Tensor:
    if rows_are_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _project_kv_fp8(
    weight: _Weight,
    kv_a: torch.Tensor,
    k_pe: torch.Tensor,
    scale_invs: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 (k, v) of the latent kv_a [n, lora], which is quantized as SGLang's linear does
    where the weight is in FP8 and it is not."""
    kv_a_scale = None
    if weight.scale is not None and kv_a.dtype != FP8:
        kv_a, kv_a_scale = per_token_group_quant_fp8(
            kv_a, SCALE_BLOCK, weight.ue8m0_latent
        )
    return mla_kv_proj_quantize_fp8(
        _with_aligned_rows(kv_a),
        weight.data,
        k_pe,
        *scale_invs,
        kv_a_scale=kv_a_scale,
        weight_scale=weight.scale,
    )


def _project_kv(layer: DeepseekV2AttentionMLA, kv_a: torch.Tensor) -> torch.Tensor:
    """k_nope and v, [n, h, nope + v], of the latent kv_a [n, lora]."""
    kv = layer.kv_b_proj(kv_a)[0]
    return kv.view(-1, layer.num_local_heads, layer.qk_nope_head_dim + layer.v_head_dim)


class _BatchDecision(NamedTuple):
    metadata: object
    reason: Optional[str]  # why the batch is declined, or None
    producer: Optional[str]


class MLAFP8PrefillMixin:
    """Gives an MLA backend with FP8 prefill kernels the hook of this module.

    The backend provides ``data_type``, ``q_data_type``, the model's dimensions,
    ``forward_prefill_metadata`` and ``_run_prefill_kernel``, which is handed FP8 operands
    of taken batches and operands in the model's dtype of declined ones. A subclass whose
    kernel takes no FP8 sets ``prepare_prefill_qkv = None``.
    """

    # Whether the kernel attends to prefix and new tokens in one call (mha_one_shot).
    attends_to_prefix_in_one_shot = False
    # Whether the prefill kernel multiplies by v_scale; else its output is multiplied.
    prefill_kernel_has_v_scale = True
    # Tokens times heads from which K and V straight out of kv_b_proj are faster than
    # cuBLAS and a launch, and with a weight in FP8 than DeepGEMM and one; and Q straight
    # out of q_b_proj.
    least_gemm_rows, least_fp8_gemm_rows, least_q_gemm_rows = 20480, 1024, 57344
    # k_scale and v_scale that this layer's K and V are divided by.
    prefill_kv_scales = 1.0, 1.0
    # False: as in SGLang, decode multiplies by k_scale though rows of the KV cache are not
    # divided by it, and tokenspeed_mla's prefill knows no scales (0.5.12: asserts that
    # both are 1).
    corrects_kv_scales = False
    # The base of that kernel's log-sum-exps, 2 or e; None has it found at start.
    prefill_kernel_lse_base: Optional[str] = None
    # Rows of q that belong to requests; data-parallel padding follows them.
    num_prefill_tokens: Optional[int] = 0

    def init_fp8_prefill(self, model_runner: ModelRunner) -> None:
        """Decide what holds for the life of the process, log it, compile the kernels.

        Called at the end of the backend's ``__init__``.

        Raises:
            ValueError: SGLANG_MLA_FP8_PREFILL, SGLANG_MLA_FP8_PREFILL_LSE or
                SGLANG_MLA_FP8_PREFILL_GEMM has no such value.
        """
        self._configured_producer = envs.SGLANG_MLA_FP8_PREFILL.get().lower()
        if self._configured_producer not in (FUSED, COMPOSED, OFF):
            raise ValueError(
                f"SGLANG_MLA_FP8_PREFILL must be {FUSED}, {COMPOSED} or {OFF}, got "
                f"{envs.SGLANG_MLA_FP8_PREFILL.get()!r}"
            )
        self.corrects_kv_scales = self._configured_producer != OFF
        self._lse_base = self._decide_lse_base()
        self._batch = _BatchDecision(self, None, None)
        self._counts = batch_counts(metrics_model_name(model_runner.server_args))
        self._counted_metadata = self
        self._process_reason = self._unsupported_reason()
        model = getattr(model_runner, "model", None)
        self._gemm_reason = self._no_gemm_reason(model)
        if self.skip_prefill:
            return
        pool = getattr(model_runner, "token_to_kv_pool", None)
        reason, producer = self._process_reason, self._configured_producer
        if reason is None and pool is not None:
            reason, producer = self._pool_decision(pool)
        outcome = f"declined: {reason}"
        if reason is None:
            outcome = f"with the {producer} producer"
            variants = self._prefill_variants(model)
            q_weight = self._q_gemm_weight_of(model)
            if torch.device(self.device).type == "cuda":
                weights = self._gemm_weights(model)
                self._compile_prefill_kernels(producer, variants, weights, q_weight)
        _log_once(f"{type(self).__name__}: FP8 prefill preparation {outcome}")
        if reason is None:
            gemm = self._gemm_reason
            dtype = FP8 if gemm is None else f"{self.q_data_type}, not {FP8}: {gemm}"
            _log_once(f"{type(self).__name__}: kv_b_proj writes K and V in {dtype}")
            if q_weight is not None:
                tokens = -(-self.least_q_gemm_rows // self.num_local_heads)
                _log_once(
                    f"{type(self).__name__}: q_b_proj writes Q in {FP8} from {tokens} "
                    "tokens on"
                )
            self._disable_prefill_cuda_graphs(model_runner)

    @staticmethod
    def _disable_prefill_cuda_graphs(model_runner: ModelRunner) -> None:
        """Turn prefill CUDA graphs, piecewise or breakable, off where nothing else keeps
        batches from the hook, unless the user chose them.

        In such a graph attention is absorbed and runs on FlashInfer's kernel, which
        wants the layer's whole KV pool in the model's dtype. The model runner captures
        after its backends are made.
        """
        server_args = model_runner.server_args
        if (
            prefill_backend_name(server_args) not in GRAPHLESS_BACKENDS
            or decode_context_parallel()
            or not any(
                hasattr(module, "forward_normal_prepare")
                for module in model_runner.model.modules()
            )
        ):
            return
        flag = disable_prefill_cuda_graphs(server_args)
        if flag is not None:
            _log_once(
                "Prefill CUDA graphs are turned off for FP8 prefill preparation; "
                f"{flag} keeps them"
            )

    def _decide_lse_base(self) -> Optional[str]:
        """The base of the log-sum-exps that go to a merge, 2 or e; None if it is not
        known or nothing is merged."""
        base = envs.SGLANG_MLA_FP8_PREFILL_LSE.get().lower()
        if base not in (AUTO, *LSE_FACTORS):
            raise ValueError(
                f"SGLANG_MLA_FP8_PREFILL_LSE must be {AUTO}, {' or '.join(LSE_FACTORS)}, "
                f"got {envs.SGLANG_MLA_FP8_PREFILL_LSE.get()!r}"
            )
        if self.prefill_kernel_lse_base is not None:
            return self.prefill_kernel_lse_base
        if base != AUTO:
            return base
        if self.skip_prefill or self.disable_chunked_prefix_cache:
            return None
        backend = type(self)
        if backend in _found_lse_bases:
            return _found_lse_bases[backend]
        try:
            base = self.find_lse_base()
            outcome = "base 2, converted for merges" if base == "2" else "natural"
            _log_once(f"{backend.__name__}: the log-sum-exps are {outcome}")
        except Exception as error:
            base = None
            if get_tensor_model_parallel_rank() == 0:
                logger.error(
                    f"{backend.__name__}: the base of the log-sum-exps was not found; "
                    "none are converted, and answers behind a cached prefix may be wrong "
                    f"unless SGLANG_MLA_FP8_PREFILL_LSE is set to it: {error!r}"
                )
        _found_lse_bases[backend] = base
        return base

    def find_lse_base(self) -> str:
        """The base of the log-sum-exps that ``_run_prefill_kernel`` returns, 2 or e.

        To queries of zero all keys are alike, whatever the scaling: the log-sum-exp is
        the logarithm of the number of keys seen, i + 1 in row i of causal attention.

        Raises:
            ValueError: they have neither base in every row and head, causal and not.
        """
        n, heads = 256, self.num_local_heads
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        q, k, v, out = (
            torch.zeros(n, heads, dim, dtype=self.q_data_type, device=self.device)
            for dim in (qk_head_dim, qk_head_dim, self.v_head_dim, self.v_head_dim)
        )
        cum_seq_lens = torch.tensor([0, n], dtype=torch.int32, device=self.device)
        num_keys = torch.arange(1, n + 1, device=self.device).unsqueeze(1)
        bases, last = set(LSE_FACTORS), []
        for is_causal in (True, False):
            _, lse = self._run_prefill_kernel(
                q=q,
                k=k,
                v=v,
                layer=SimpleNamespace(scaling=1.0),
                batch_size=1,
                cum_seq_lens_q=cum_seq_lens,
                max_q_len=n,
                seq_lens_kv=cum_seq_lens[1:],
                cum_seq_lens_kv=cum_seq_lens,
                max_kv_len=n,
                is_causal=is_causal,
                return_lse=True,
                out_buffer=out,
            )
            wanted = (num_keys if is_causal else num_keys[-1:]).log()
            bases = {
                base
                for base in bases
                if ((lse * LSE_FACTORS[base] - wanted).abs() < LSE_TOLERANCE).all()
            }
            last.append(round(lse[-1, 0].item(), 3))
        if not bases:
            raise ValueError(
                f"{n} equal keys have log-sum-exps like {last} (causal, not causal), "
                f"where 2 would give {math.log2(n):.3f} and e {math.log(n):.3f}"
            )
        return bases.pop()

    def _unsupported_reason(self) -> Optional[str]:
        """Why no batch of this process can be taken, or None."""
        if self._configured_producer == OFF:
            return "SGLANG_MLA_FP8_PREFILL=off"
        if self.data_type != FP8:
            return f"the KV cache is {self.data_type}, not {FP8}"
        if self.q_data_type not in (torch.bfloat16, torch.float16):
            return f"the model is {self.q_data_type}, not bfloat16 or float16"
        dims = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)
        if any(dim % 16 for dim in dims):
            return "head dimensions that are no multiples of 16"
        if self.qk_rope_head_dim == 0:
            return "no rotary dimensions"
        if self._configured_producer == COMPOSED and not is_flashinfer_available():
            return "SGLANG_MLA_FP8_PREFILL=composed without FlashInfer"
        return None

    def _no_gemm_reason(self, model: Optional[torch.nn.Module]) -> Optional[str]:
        """Why kv_b_proj runs by itself, in the model's dtype, or None."""
        setting = envs.SGLANG_MLA_FP8_PREFILL_GEMM.get().lower()
        if setting not in (AUTO, ON, OFF):
            raise ValueError(
                f"SGLANG_MLA_FP8_PREFILL_GEMM must be {AUTO}, {ON} or {OFF}, got "
                f"{envs.SGLANG_MLA_FP8_PREFILL_GEMM.get()!r}"
            )
        if setting == OFF:
            return "SGLANG_MLA_FP8_PREFILL_GEMM=off"
        if (self.qk_nope_head_dim, self.v_head_dim) != (HEAD_DIM, HEAD_DIM):
            return f"head dimensions other than {HEAD_DIM}"
        capability = None
        if torch.device(self.device).type == "cuda":
            capability = torch.cuda.get_device_capability()
            if is_hip_runtime() or capability[0] not in (9, 10):
                return "needs SM90 or SM100"
        if setting == AUTO and (capability is None or capability[0] != 9):
            return "measured on SM90 only: SGLANG_MLA_FP8_PREFILL_GEMM=on"
        if model is not None and not self._plain_kv_weights(model):
            return "its weight is not plain"
        return None

    def _plain_kv_weights(self, model: Optional[torch.nn.Module]) -> list[_Weight]:
        """One for each dtype among the plain weights of the model's kv_b_proj."""
        weights = (
            _plain_weight(layer.kv_b_proj, self.q_data_type)
            for layer in _attention_layers(model)
        )
        return [*{one.data.dtype: one for one in weights if one is not None}.values()]

    def _gemm_weights(self, model: Optional[torch.nn.Module]) -> list[_Weight]:
        """Those that this project's GEMM multiplies by."""
        return self._plain_kv_weights(model) if self._gemm_reason is None else []

    def _q_gemm_weight_of(
        self, model: Optional[torch.nn.Module]
    ) -> Optional[torch.Tensor]:
        """A layer's weight of q_b_proj that this project's GEMM multiplies by."""
        weights = map(self._q_gemm_weight, _attention_layers(model))
        return next((weight for weight in weights if weight is not None), None)

    def _gemm_weight(
        self, proj: torch.nn.Module, num_tokens: float
    ) -> Optional[_Weight]:
        """The projection's weight, where it is this project's GEMM that multiplies by it."""
        rows = num_tokens * self.num_local_heads
        least, least_fp8 = self.least_gemm_rows, self.least_fp8_gemm_rows
        if self._gemm_reason is not None or rows < min(least, least_fp8):
            return None
        weight = _plain_weight(proj, self.q_data_type)
        if weight is None or rows < (least if weight.scale is None else least_fp8):
            return None
        return weight

    def _q_gemm_weight(
        self, layer: DeepseekV2AttentionMLA, num_tokens: float = math.inf
    ) -> Optional[torch.Tensor]:
        """q_b_proj's weight, where this project's GEMMs multiply by it and by kv_b_proj's,
        in a batch of so many tokens."""
        rotary_emb = layer.rotary_emb
        if (
            num_tokens * self.num_local_heads < self.least_q_gemm_rows
            or (self.qk_nope_head_dim, self.qk_rope_head_dim) != (NOPE, ROPE)
            or rotary_emb is None
            or rotary_emb.is_neox_style
            or self._gemm_weight(layer.kv_b_proj, num_tokens) is None
        ):
            return None
        # A model without Q's latent has no q_b_proj.
        proj = getattr(layer, "q_b_proj", None)
        weight = _plain_weight(proj, self.q_data_type)
        return None if weight is None or weight.scale is not None else weight.data

    def _pool_decision(self, pool) -> tuple[Optional[str], Optional[str]]:
        """(why no row can be written to this KV pool, or None; its producer)."""
        producer = _pool_producer(pool)
        if producer is None:
            return f"{type(pool).__name__} takes no FP8 rows", None
        if producer == COMPOSED and not is_flashinfer_available():
            return f"{type(pool).__name__} without FlashInfer", None
        return None, COMPOSED if producer == COMPOSED else self._configured_producer

    def _prefill_variants(self, model: Optional[torch.nn.Module]) -> set[tuple]:
        """(is_neox or None without RoPE, 1 / k_scale, 1 / v_scale) in the model's
        attention layers."""
        return {
            (
                getattr(layer.rotary_emb, "is_neox_style", None),
                *self._prefill_scale_invs(layer.attn_mha),
            )
            for layer in _attention_layers(model)
        } or {(False, 1.0, 1.0)}

    def _compile_prefill_kernels(
        self,
        producer: str,
        variants: set[tuple],
        weights: list[_Weight],
        q_weight: Optional[torch.Tensor],
    ) -> None:
        """Run one token through the kernels so that no request waits for a compiler.

        weights and q_weight: of kv_b_proj and q_b_proj, for this project's GEMMs.
        """
        nope, rope = self.qk_nope_head_dim, self.qk_rope_head_dim
        heads, lora = self.num_local_heads, self.kv_lora_rank
        zeros = functools.partial(
            torch.zeros, dtype=self.q_data_type, device=self.device
        )
        q, kv = zeros(1, heads, nope + rope), zeros(1, heads, nope + self.v_head_dim)
        kv_a, k_pe = zeros(1, lora), zeros(1, 1, rope)
        index = zeros(1, dtype=torch.int64)
        for is_neox, *scale_invs in variants:
            table = None if is_neox is None else zeros(1, rope, dtype=torch.float32)
            inputs = dict(
                q=q,
                kv=kv,
                kv_a=kv_a,
                k_pe=k_pe,
                positions=index,
                cos_sin_cache=table,
                is_neox=bool(is_neox),
            )
            k_pe_fp8 = zeros(1, rope, dtype=FP8)
            without_kv = [None] if self.attends_to_prefix_in_one_shot else []
            if weights:
                without_kv.append(k_pe_fp8)
            given = [(q, kv, None), *((q, None, out) for out in without_kv)]
            if q_weight is not None and is_neox is False:
                # --cpu-offload-gb leaves it on the host until its layer runs.
                q_weight = q_weight.to(self.device)
                q_a = zeros(1, q_weight.shape[1])
                mla_q_proj_quantize_fp8(q_a, q_weight, index, table)
                given += ((q[:, :0], None, out) for out in without_kv)
            for weight in weights:
                for rotated in (k_pe, k_pe_fp8):
                    _project_kv_fp8(weight, kv_a, rotated, scale_invs)
                if weight.scale is not None:
                    _project_kv_fp8(weight, kv_a.to(FP8), k_pe_fp8, scale_invs)
            if producer == FUSED:
                for q_given, kv_given, k_pe_out in given:
                    mla_prefill_quantize_fp8(
                        **{**inputs, "q": q_given, "kv": kv_given},
                        qk_nope_head_dim=nope,
                        kv_cache=zeros(1, 1, lora + rope, dtype=FP8),
                        cache_loc=index,
                        k_pe_out=k_pe_out,
                        k_scale_inv=scale_invs[0],
                        v_scale_inv=scale_invs[1],
                    )
            else:
                self._prepare_composed(**inputs, scale_invs=scale_invs)
            mla_kv_pack_quantize_fp8(kv[..., :nope], k_pe, kv[..., nope:], *scale_invs)

    def _prefill_scale_invs(self, layer: RadixAttention) -> tuple[float, float]:
        """(1 / k_scale, 1 / v_scale) of the checkpoint."""
        k_scale, v_scale = layer.k_scale_float, layer.v_scale_float
        return (
            1.0 if k_scale is None else 1.0 / k_scale,
            1.0 if v_scale is None else 1.0 / v_scale,
        )

    def _decide(self, forward_batch: ForwardBatch) -> _BatchDecision:
        """What becomes of the batch that the metadata stands for; decided once for all
        layers."""
        metadata = self._batch_metadata()
        if self._batch.metadata is not metadata:
            reason, producer = self._batch_reason(metadata, forward_batch), None
            if reason is None:
                reason, producer = self._pool_decision(kv_pool_of(forward_batch))
            if producer == COMPOSED and _is_one_shot_over_prefix(forward_batch):
                reason = "one-shot attention over a prefix with the composed producer"
            self._batch = _BatchDecision(metadata, reason, producer)
        return self._batch

    def _batch_metadata(self):
        """What the backend made of the batch at hand, another object for each batch."""
        return self.forward_prefill_metadata

    def _batch_reason(self, metadata, forward_batch: ForwardBatch) -> Optional[str]:
        """Why SGLang's own path has to run this batch, or None."""
        if metadata is None:
            return "no prefill metadata"
        if getattr(metadata, "fallback_to_flashinfer_impl", False):
            return "FlashInfer's own prefill runs the batch"
        if in_cuda_graph():
            return "CUDA graph"
        if decode_context_parallel():
            return "decode context parallelism"
        if (
            _is_one_shot_over_prefix(forward_batch)
            and not self.attends_to_prefix_in_one_shot
        ):
            return "one-shot attention over a prefix"
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return "speculative batch"
        return None

    def _decline_reason(
        self, layer: DeepseekV2AttentionMLA, forward_batch: ForwardBatch
    ) -> Optional[str]:
        """Why SGLang's own path has to run this layer of the batch, or None."""
        if self._process_reason is not None:
            return self._process_reason
        rotary_emb, reason = layer.rotary_emb, self._decide(forward_batch).reason
        if reason is None and not (
            rotary_emb is None or _is_plain_rope(rotary_emb, self.qk_rope_head_dim)
        ):
            reason = "rotary embedding"
        return reason

    def _count_batch(self, reason: Optional[str]) -> None:
        """Count the batch by what becomes of its first layer; its others say the same."""
        metadata = self._batch_metadata()
        if self._counted_metadata is metadata:
            return
        self._counted_metadata = metadata
        if self._process_reason is not None:
            outcome = UNSUPPORTED
        else:
            outcome = TAKEN if reason is None else DECLINED
        self._counts.add(outcome, reason)

    def takes_prefill(
        self, layer: DeepseekV2AttentionMLA, forward_batch: ForwardBatch
    ) -> bool:
        """Whether the hook takes this layer of the batch."""
        return self._decline_reason(layer, forward_batch) is None

    def project_prefill_q(
        self,
        *,
        q_a: torch.Tensor,
        positions: torch.Tensor,
        layer: DeepseekV2AttentionMLA,
        forward_batch: ForwardBatch,
    ) -> Optional[torch.Tensor]:
        """q [s, h, nope + rope] in FP8, rotated, of its latent q_a [s, lora] after the
        norm; None where ``q_b_proj`` has to project it."""
        weight = self._q_gemm_weight(layer, q_a.shape[0])
        if (
            weight is None
            or self._decline_reason(layer, forward_batch) is not None
            or self._batch.producer != FUSED
        ):
            return None
        return mla_q_proj_quantize_fp8(
            _with_aligned_rows(q_a), weight, positions, layer.rotary_emb.cos_sin_cache
        )

    def prepare_prefill_qkv(
        self,
        *,
        q: torch.Tensor,
        q_pe: torch.Tensor,
        kv_a: torch.Tensor,
        k_pe: torch.Tensor,
        positions: torch.Tensor,
        layer: DeepseekV2AttentionMLA,
        forward_batch: ForwardBatch,
    ) -> Optional[QKV]:
        """The hook of this module: FP8 (q, k, v), contiguous, and FP8 cache rows.

        K and V are divided by the checkpoint's k_scale and v_scale; q and the cache
        rows are unscaled. Rows past the batch's real tokens are prepared like any, but
        not written to a cache that the kernel writes.
        """
        self.prefill_kv_scales = 1.0, 1.0
        reason = self._decline_reason(layer, forward_batch)
        self._count_batch(reason)
        if reason is not None:
            name = type(self).__name__
            if self._process_reason is None:  # else logged at start
                _log_once(f"{name}: FP8 prefill preparation declines a batch: {reason}")
            return None
        attn, rotary_emb = layer.attn_mha, layer.rotary_emb
        pool, cache_loc = kv_pool_of(forward_batch), forward_batch.out_cache_loc
        scale_invs = self._prefill_scale_invs(attn)
        self.prefill_kv_scales = attn.k_scale_float or 1.0, attn.v_scale_float or 1.0
        fused = self._batch.producer == FUSED
        over_prefix = _is_one_shot_over_prefix(forward_batch)
        weight = kv = k_pe_fp8 = None
        if not over_prefix:
            if fused:
                weight = self._gemm_weight(layer.kv_b_proj, kv_a.shape[0])
            if weight is not None:
                k_pe_fp8 = q.new_empty((q.shape[0], q_pe.shape[-1]), dtype=FP8)
            else:
                kv = _project_kv(layer, kv_a)
        projected_q = None
        if q.dtype == FP8:  # from project_prefill_q
            projected_q, q = q, kv_a.new_empty((q.shape[0], 0, q.shape[2]))
        inputs = dict(
            q=q,
            kv=kv,
            kv_a=kv_a,
            k_pe=k_pe,
            positions=positions,
            cos_sin_cache=None if rotary_emb is None else rotary_emb.cos_sin_cache,
            is_neox=rotary_emb is not None and rotary_emb.is_neox_style,
        )
        if fused:
            q, k, v = mla_prefill_quantize_fp8(
                **inputs,
                qk_nope_head_dim=layer.qk_nope_head_dim,
                kv_cache=_kv_buffer(pool, attn.layer_id),
                cache_loc=cache_loc[: self.num_prefill_tokens],
                k_pe_out=k_pe_fp8,
                k_scale_inv=scale_invs[0],
                v_scale_inv=scale_invs[1],
            )
            if over_prefix:
                kv_indices = forward_batch.fetch_mha_one_shot_kv_indices()
                k, v = self.gather_prefix_chunk_kv(kv_indices, layer, forward_batch)
            elif weight is not None:
                k, v = _project_kv_fp8(weight, kv_a, k_pe_fp8, scale_invs)
            return q if projected_q is None else projected_q, k, v
        *qkv, latent, k_pe = self._prepare_composed(**inputs, scale_invs=scale_invs)
        num_cached = cache_loc.shape[0]
        pool.set_mla_kv_buffer(
            attn, write_loc(forward_batch), latent[:num_cached], k_pe[:num_cached]
        )
        return tuple(qkv)

    def _prepare_composed(
        self, q, kv, kv_a, k_pe, positions, cos_sin_cache, is_neox, scale_invs
    ) -> tuple[torch.Tensor, ...]:
        """FP8 q, k, v and the cache rows' latent [s, 1, lora] and k_pe [s, 1, rope], of
        the arguments of ``mla_prefill_quantize_fp8``."""
        k_scale_inv, v_scale_inv = scale_invs
        nope = self.qk_nope_head_dim
        k_nope, v = kv[..., :nope], kv[..., nope:]
        latent_fp8 = fp8_quantize(kv_a).unsqueeze(1)
        if cos_sin_cache is None:
            packed = mla_kv_pack_quantize_fp8(k_nope, k_pe, v, k_scale_inv, v_scale_inv)
            return fp8_quantize(q), *packed, latent_fp8, fp8_quantize(k_pe)
        rope = (cos_sin_cache, positions, is_neox)
        q_fp8, k_fp8 = self._fused_rope_fp8_quantize(
            q, k_nope, k_pe, *rope, k_scale_inv
        )
        # The cache wants k_pe rotated and unscaled, as any head of an unscaled K has it.
        k_unscaled = k_fp8
        if k_scale_inv != 1.0:
            _, k_unscaled = self._fused_rope_fp8_quantize(
                q[:, :1], k_nope[:, :1], k_pe, *rope
            )
        v_fp8 = fp8_quantize(v, v_scale_inv)
        return q_fp8, k_fp8, v_fp8, latent_fp8, k_unscaled[:, :1, nope:]

    def _fused_rope_fp8_quantize(
        self,
        q: torch.Tensor,
        k_nope: torch.Tensor,
        k_pe: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        positions: torch.Tensor,
        is_neox: bool,
        k_scale_inv: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FlashInfer's RoPE and quantization, straight into packed FP8 q and k.

        q [s, h, nope + rope], k_nope [s, h, nope], k_pe [s, 1, rope], shared by the
        heads; returns q and k, [s, h, nope + rope], k times k_scale_inv.
        """
        q_fp8 = q.new_empty(q.shape, dtype=FP8)
        k_fp8 = torch.empty_like(q_fp8)
        if q.shape[0] == 0:  # FlashInfer would launch a grid of no blocks
            return q_fp8, k_fp8
        parts = [k_nope.shape[-1], k_pe.shape[-1]]
        q_nope, q_pe = q.split(parts, dim=-1)
        q_nope_fp8, q_pe_fp8 = q_fp8.split(parts, dim=-1)
        k_nope_fp8, k_pe_fp8 = k_fp8.split(parts, dim=-1)
        flashinfer.rope.mla_rope_quantize_fp8(
            q_pe,
            k_pe.expand_as(q_pe),
            q_nope,
            k_nope,
            cos_sin_cache,
            positions,
            is_neox=is_neox,
            quantize_dtype=FP8,
            quant_scale_q=1.0,
            quant_scale_kv=k_scale_inv,
            q_nope_out=q_nope_fp8,
            q_rope_out=q_pe_fp8,
            k_nope_out=k_nope_fp8,
            k_rope_out=k_pe_fp8,
            enable_pdl=is_arch_support_pdl(),
        )
        return q_fp8, k_fp8

    def gather_prefix_chunk_kv(
        self,
        kv_indices: torch.Tensor,
        layer: DeepseekV2AttentionMLA,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 (k, v), contiguous, of tokens in the KV cache, such as those of a prefix
        chunk, by their slots kv_indices [n].

        k and v are divided by the layer's k_scale and v_scale.
        """
        scale_invs = self._prefill_scale_invs(layer.attn_mha)
        weight = self._gemm_weight(layer.kv_b_proj, kv_indices.shape[0])
        # As it is in the cache, where nothing has to be multiplied by a scale.
        as_cached = (
            weight is not None
            and weight.scale is not None
            and scale_invs[0] == 1.0
            and self._batch.producer == FUSED
        )
        kv_a, k_pe = layer._get_mla_kv_buffer(
            kv_indices, FP8 if as_cached else self.q_data_type, forward_batch
        )
        if weight is not None:
            return _project_kv_fp8(weight, kv_a, k_pe, scale_invs)
        kv = _project_kv(layer, kv_a)
        k_nope, v = kv.split([layer.qk_nope_head_dim, layer.v_head_dim], dim=-1)
        return mla_kv_pack_quantize_fp8(k_nope, k_pe, v, *scale_invs)

    def _run_padded_prefill_kernel(self, *, layer: RadixAttention, **kwargs):
        """``_run_prefill_kernel``, with natural log-sum-exps [s, h] where base 2 was
        found, and its output times v_scale where the kernel has none.

        The kernel leaves the rows of data-parallel padding unwritten; they read as zero
        afterwards, whatever the allocator handed out.
        """
        result = self._run_prefill_kernel(layer=layer, **kwargs)
        tensors = result if isinstance(result, tuple) else (result,)
        v_scale = self.prefill_kv_scales[1]
        if not self.prefill_kernel_has_v_scale and v_scale != 1:
            tensors[0].mul_(v_scale)
        if self._lse_base == "2" and len(tensors) > 1:
            tensors[1].mul_(LSE_FACTORS["2"])
        for rows in tensors:
            if rows.shape[0] > self.num_prefill_tokens:
                rows[self.num_prefill_tokens :].zero_()
        return result


class FA3FP8PrefillMixin(MLAFP8PrefillMixin):
    """The hook for ``FlashAttentionBackend``, where it runs MLA with FlashAttention-3.

    Its ``forward_extend`` casts q, k and v to the KV cache's dtype, and leaves what has
    it already. It divides by no scale of K and V.
    """

    attends_to_prefix_in_one_shot = True
    # Whether it hands the kernel k_scale and v_scale, to multiply by.
    prefill_kernel_has_kv_scales = False
    prefill_kernel_lse_base = "e"
    # Not counted: rows of padding are written too, to slot 0.
    num_prefill_tokens: Optional[int] = None

    def init_fp8_prefill(self, model_runner: ModelRunner) -> None:
        config = model_runner.model_config
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        # MiniCPM3 has other attention, and not all of them.
        dims = {name: getattr(config, name, None) for name in names}
        if not self.use_mla or self.fa_impl_ver != 3 or None in dims.values():
            self.prepare_prefill_qkv = self.takes_prefill = None
            return
        vars(self).update(dims)
        self.data_type = self.kv_cache_dtype
        self.q_data_type = model_runner.dtype
        self.num_local_heads = config.num_attention_heads // attention_tp_size()
        super().init_fp8_prefill(model_runner)

    def _unsupported_reason(self) -> Optional[str]:
        reason = super()._unsupported_reason()
        if reason is not None:
            return reason
        if self.kv_cache_dtype_str == "mxfp8":
            return "no MXFP8"
        if self.kv_cache_dtype_str == "auto":
            return "--kv-cache-dtype auto keeps attention in the model's dtype"
        if self.attn_cp_size > 1:
            return "context parallelism"
        head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        if head_dim > 256:
            return f"no FP8 kernel for head dimension {head_dim}"
        return None

    def _batch_metadata(self):
        return self.forward_metadata

    def _prefill_scale_invs(self, layer: RadixAttention) -> tuple[float, float]:
        if self.prefill_kernel_has_kv_scales and layer.k_scale is not None:
            return super()._prefill_scale_invs(layer)
        return 1.0, 1.0
