"""FP8 prefill for MLA attention backends: the hook, and its implementation.

**The hook.** ``DeepseekMHAForwardMixin.forward_normal_prepare`` asks the backend that
will run the batch to take over before RoPE and the KV-cache write::

    backend.prepare_prefill_qkv(
        *, q, q_pe, kv_a, k_pe, positions, layer, forward_batch
    ) -> (q, k, v) | None

- ``q`` [s, h, nope + rope] and ``q_pe``, its view [s, h, rope], before RoPE; ``kv_a``
  [s, lora] after its norm; ``k_pe`` [s, 1, rope], a view, before RoPE; ``positions``
  [s]; ``layer``, the ``DeepseekV2AttentionMLA``. All in the model's dtype.
- A tuple is the operands as the backend's own prefill kernel takes them, with the
  tokens' rows written to the KV cache; the model returns them as they are.
- None declines the batch. Nothing was touched, the inputs included, and the model goes
  on with RoPE, the cache write and BF16 operands, as for a backend without the method.

A backend that returns FP8 operands also has ``pack_prefix_chunk_kv(k_nope, k_pe, v,
layer) -> (k, v)``, which turns a prefix chunk, gathered from the cache and projected in
the model's dtype, into operands of the same kind; ``layer`` is the ``RadixAttention``.
``q_data_type`` of the backend is that dtype.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Callable, Optional

import torch

from sglang.jit_kernel.fixup_zero_kv import fixup_zero_kv_rows
from sglang.jit_kernel.fp8_quantize import fp8_quantize
from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.jit_kernel.utils import is_arch_support_pdl
from sglang.srt.compilation.piecewise_context_manager import (
    get_forward_context,
    is_in_piecewise_cuda_graph,
)
from sglang.srt.environ import envs
from sglang.srt.model_executor.breakable_cuda_graph.context import (
    is_in_breakable_cuda_graph,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode
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

# Values of SGLANG_MLA_FP8_PREFILL.
FUSED, COMPOSED, OFF = "fused", "composed", "off"


@functools.lru_cache(maxsize=None)
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
    backend = forward_batch.attn_backend
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


def prefix_chunk_packing(
    q: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
) -> tuple[torch.dtype, Optional[Callable]]:
    """How to build K and V of the prefix chunks that q attends to.

    Returns:
        (dtype to gather and project the latent in, ``pack(k_nope, k_pe, v) -> (k, v)``
        or None where the model concatenates them itself).
    """
    if q.dtype != FP8:
        return q.dtype, None
    backend = resolve_attn_backend(forward_batch, layer.layer_id)
    return (
        backend.q_data_type,
        functools.partial(backend.pack_prefix_chunk_kv, layer=layer),
    )


@functools.lru_cache(maxsize=None)
def _log_once(message: str) -> None:
    log_info_on_rank0(logger, message)


def _is_plain_rope(rotary_emb: torch.nn.Module, rope_dim: int) -> bool:
    """Whether cos_sin_cache, indexed by the positions, is all there is to this RoPE."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    return (
        isinstance(rotary_emb, RotaryEmbedding)
        and type(rotary_emb).forward_cuda is RotaryEmbedding.forward_cuda
        and rotary_emb.rotary_dim == rope_dim
        and rotary_emb.cos_sin_cache.shape[1:] == (rope_dim,)
    )


def _inherits(pool, base: type, *methods: str) -> bool:
    return isinstance(pool, base) and all(
        getattr(type(pool), method) is getattr(base, method) for method in methods
    )


def _pool_producer(pool) -> Optional[str]:
    """How FP8 rows get into this KV pool: FUSED where its key buffer is the plain
    [slots, 1, lora + rope] and may be written directly, COMPOSED where the pool has to
    store them itself, None where it does not take FP8 rows."""
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MLATokenToKVPool

    access = ("get_key_buffer", "set_mla_kv_buffer")
    inner = pool
    if _inherits(pool, HybridLinearKVPool, *access):
        inner = pool.full_kv_pool
    if not hasattr(inner, "set_mla_kv_buffer") or getattr(inner, "dtype", None) != FP8:
        return None
    if getattr(inner, "nsa_kv_cache_store_fp8", False):
        return None
    plain = _inherits(inner, MLATokenToKVPool, *access, "_create_buffers")
    return FUSED if plain else COMPOSED


def _check_indices(name: str, index: torch.Tensor, limit: int, layer_id: int) -> None:
    bad = ((index < 0) | (index >= limit)).nonzero()
    if bad.numel() > 0:
        token = int(bad[0, 0])
        raise IndexError(
            f"{name}[{token}] = {int(index[token])} is out of range [0, {limit}) in "
            f"layer {layer_id}"
        )


class MLAFP8PrefillMixin:
    """Gives an MLA backend with FP8 prefill kernels the hook of this module.

    Two producers with the same result: one launch for everything (the default), and one
    composed of FlashInfer's RoPE, ``fp8_quantize`` and the pool's own cache write,
    used where the pool's buffer may not be written directly or where
    ``SGLANG_MLA_FP8_PREFILL=composed`` asks for it. ``SGLANG_MLA_FP8_PREFILL=off``
    declines everything.

    The backend provides ``data_type``, ``q_data_type``, the model's dimensions,
    ``forward_prefill_metadata`` and ``_run_prefill_kernel``, which is handed FP8 operands
    of taken batches and operands in the model's dtype of declined ones. A subclass whose
    kernel takes no FP8 sets ``prepare_prefill_qkv = None``.
    """

    # Whether _run_prefill_kernel gives k_scale and v_scale back to its kernel.
    prefill_kernel_has_kv_scales = True
    # Rows of q that belong to requests; data-parallel padding follows them.
    num_prefill_tokens = 0

    def init_fp8_prefill(self, model_runner: ModelRunner) -> None:
        """Decide what holds for the life of the process, say it, compile the kernels.

        Called at the end of the backend's ``__init__``.
        """
        # Batches left to SGLang's own path, by reason.
        self.prefill_declines: Counter = Counter()
        self._declined: object = self
        self._plain_rope: dict[torch.nn.Module, bool] = {}
        self._pool_checked: tuple = (None, None)
        self._check_prefill_indices = envs.SGLANG_MLA_FP8_PREFILL_CHECK.get()
        self._prefill_producer = envs.SGLANG_MLA_FP8_PREFILL.get().lower()
        if self._prefill_producer not in (FUSED, COMPOSED, OFF):
            raise ValueError(
                f"SGLANG_MLA_FP8_PREFILL must be {FUSED}, {COMPOSED} or {OFF}, got "
                f"{envs.SGLANG_MLA_FP8_PREFILL.get()!r}"
            )
        self._prefill_off = self._process_decline()
        if self.skip_prefill:
            return
        pool = getattr(model_runner, "token_to_kv_pool", None)
        producer = FUSED if pool is None else _pool_producer(pool)
        if self._prefill_off is not None:
            outcome = f"declined, {self._prefill_off}"
        elif producer is None:
            outcome = f"declined, {type(pool).__name__} takes no FP8 rows"
        elif producer == COMPOSED and (lack := self._composed_lack()):
            outcome = f"declined, {type(pool).__name__} {lack}"
        elif COMPOSED in (producer, self._prefill_producer):
            outcome = f"with the {COMPOSED} producer"
        else:
            outcome = f"with the {FUSED} producer"
        _log_once(f"{type(self).__name__}: FP8 prefill preparation {outcome}")
        if self._prefill_off is None and torch.device(self.device).type == "cuda":
            self._compile_prefill_kernels(getattr(model_runner, "model", None))

    def _process_decline(self) -> Optional[str]:
        """Why no batch of this process can be taken, or None."""
        if self._prefill_producer == OFF:
            return "SGLANG_MLA_FP8_PREFILL=off"
        if self.data_type != FP8:
            return f"the KV cache is {self.data_type}, not {FP8}"
        if self.q_data_type not in (torch.bfloat16, torch.float16):
            return f"the model is {self.q_data_type}, not bfloat16 or float16"
        if self._prefill_producer == COMPOSED and (lack := self._composed_lack()):
            return f"SGLANG_MLA_FP8_PREFILL=composed {lack}"
        return None

    def _composed_lack(self) -> Optional[str]:
        """What the composed producer lacks in this process, or None."""
        if not is_flashinfer_available():
            return "without FlashInfer"
        # FlashInfer's RoPE stores 16 elements at a time, also past the end of a row.
        if self.qk_nope_head_dim % 16 or self.qk_rope_head_dim % 16:
            return "with head dimensions that are no multiples of 16"
        return None

    def _compile_prefill_kernels(self, model: Optional[torch.nn.Module]) -> None:
        """Run one token through the kernels so that no request waits for a compiler."""
        nope, rope = self.qk_nope_head_dim, self.qk_rope_head_dim
        heads, lora = self.num_local_heads, self.kv_lora_rank
        zeros = functools.partial(
            torch.zeros, dtype=self.q_data_type, device=self.device
        )
        q, kv = zeros(1, heads, nope + rope), zeros(1, heads, nope + self.v_head_dim)
        kv_a, k_pe = zeros(1, lora), zeros(1, 1, rope)
        index = torch.zeros(1, dtype=torch.int64, device=self.device)
        cos_sin = torch.zeros(1, rope, device=self.device)
        for is_neox, k_scale_inv, v_scale_inv in self._prefill_variants(model):
            mla_prefill_quantize_fp8(
                q=q,
                kv=kv,
                kv_a=kv_a,
                k_pe=k_pe,
                positions=index,
                cos_sin_cache=None if is_neox is None else cos_sin,
                is_neox=bool(is_neox),
                qk_nope_head_dim=nope,
                kv_cache=torch.zeros(1, 1, lora + rope, dtype=FP8, device=self.device),
                cache_loc=index,
                k_scale_inv=k_scale_inv,
                v_scale_inv=v_scale_inv,
            )
            mla_kv_pack_quantize_fp8(
                kv[..., :nope], k_pe, kv[..., nope:], k_scale_inv, v_scale_inv
            )
            if self._prefill_producer == COMPOSED:
                fp8_quantize(kv[..., nope:], v_scale_inv)
                fp8_quantize(kv_a)
                if is_neox is not None:
                    self._fused_rope_fp8_quantize(
                        q, kv[..., :nope], k_pe, cos_sin, index, is_neox, k_scale_inv
                    )

    def _prefill_variants(self, model: Optional[torch.nn.Module]) -> set[tuple]:
        """(is_neox or None without RoPE, 1 / k_scale, 1 / v_scale) in the model's
        attention layers."""
        layers = [
            module
            for module in (model.modules() if model is not None else ())
            if hasattr(module, "attn_mha") and hasattr(module, "rotary_emb")
        ]
        variants = set()
        for layer in layers:
            is_neox = getattr(layer.rotary_emb, "is_neox_style", None)
            try:
                variants.add((is_neox, *self._prefill_scale_invs(layer.attn_mha)))
            except AssertionError:
                # The first batch says so, as it did before.
                continue
        return variants or {(False, 1.0, 1.0)}

    def _batch_decline(
        self,
        q: torch.Tensor,
        positions: torch.Tensor,
        rotary_emb: Optional[torch.nn.Module],
        cos_sin_cache: Optional[torch.Tensor],
        forward_batch: ForwardBatch,
    ) -> Optional[str]:
        """Why this batch cannot be taken, or None."""
        metadata = self.forward_prefill_metadata
        if metadata is None:
            return "no prefill metadata"
        if metadata.fallback_to_flashinfer_impl:
            return "FlashInfer's own prefill runs the batch"
        # RadixAttention allocates its output in q's dtype under a forward context.
        if (
            get_forward_context() is not None
            or is_in_piecewise_cuda_graph()
            or is_in_breakable_cuda_graph()
        ):
            return "CUDA graph"
        if forward_batch.mha_one_shot and any(forward_batch.extend_prefix_lens_cpu):
            return "one-shot attention over a prefix"
        mode = forward_batch.forward_mode
        if mode is not ForwardMode.EXTEND and not mode.is_extend_without_speculative():
            return "speculative batch"
        if q.dtype != self.q_data_type:
            return "activation dtype"
        if forward_batch.out_cache_loc.shape[0] > q.shape[0]:
            return "more cache slots than tokens"
        if positions.shape != q.shape[:1]:
            return "positions that are not one for each token"
        if rotary_emb is not None:
            plain = self._plain_rope.get(rotary_emb)
            if plain is None:
                plain = _is_plain_rope(rotary_emb, self.qk_rope_head_dim)
                self._plain_rope[rotary_emb] = plain
            if not plain:
                return "rotary embedding"
            if cos_sin_cache.dtype != torch.float32:
                return "cosines not in float32"
        pool = forward_batch.token_to_kv_pool
        if self._pool_checked[0] is not pool:
            self._pool_checked = (pool, _pool_producer(pool))
        producer = self._pool_checked[1]
        if producer is None:
            return "KV pool"
        if producer == COMPOSED and (lack := self._composed_lack()):
            return f"KV pool {lack}"
        return None

    def _prefill_scale_invs(self, layer: RadixAttention) -> tuple[float, float]:
        """(1 / k_scale, 1 / v_scale) of the checkpoint."""
        k_scale, v_scale = layer.k_scale_float, layer.v_scale_float
        k_scale = 1.0 if k_scale is None else k_scale
        v_scale = 1.0 if v_scale is None else v_scale
        if k_scale == 1.0 and v_scale == 1.0:
            return 1.0, 1.0
        if not self.prefill_kernel_has_kv_scales:
            # An AssertionError as from the kernel call, but before anything is written.
            raise AssertionError(
                f"{type(self).__name__}: the prefill kernel takes no K or V scale, but "
                f"layer {layer.layer_id} has k_scale_float={k_scale} and "
                f"v_scale_float={v_scale}; both must be 1.0, or choose "
                "--attention-backend trtllm_mla"
            )
        return 1.0 / k_scale, 1.0 / v_scale

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
        rows are unscaled. Rows past the batch's real tokens are prepared like any.
        """
        if self._prefill_off is not None:
            return None
        rotary_emb = layer.rotary_emb
        cos_sin_cache = getattr(rotary_emb, "cos_sin_cache", None)
        reason = self._batch_decline(
            q, positions, rotary_emb, cos_sin_cache, forward_batch
        )
        if reason is not None:
            # Once for all layers of the batch.
            if self._declined is not self.forward_prefill_metadata:
                self._declined = self.forward_prefill_metadata
                self.prefill_declines[reason] += 1
            return None
        attn = layer.attn_mha
        k_scale_inv, v_scale_inv = self._prefill_scale_invs(attn)
        pool, producer = self._pool_checked
        is_neox = rotary_emb is not None and rotary_emb.is_neox_style
        cache_loc = forward_batch.out_cache_loc
        if self._check_prefill_indices:
            if producer == FUSED:
                slots = pool.get_key_buffer(attn.layer_id).shape[0]
                _check_indices("out_cache_loc", cache_loc, slots, attn.layer_id)
            if cos_sin_cache is not None:
                limit = cos_sin_cache.shape[0]
                _check_indices("positions", positions, limit, attn.layer_id)

        nope = layer.qk_nope_head_dim
        kv = layer.kv_b_proj(kv_a)[0]
        kv = kv.view(-1, layer.num_local_heads, nope + layer.v_head_dim)
        if producer == FUSED and self._prefill_producer == FUSED:
            return mla_prefill_quantize_fp8(
                q=q,
                kv=kv,
                kv_a=kv_a,
                k_pe=k_pe,
                positions=positions,
                cos_sin_cache=cos_sin_cache,
                is_neox=is_neox,
                qk_nope_head_dim=nope,
                # The accessor waits for a layer that HiCache is still loading.
                kv_cache=pool.get_key_buffer(attn.layer_id),
                cache_loc=cache_loc,
                k_scale_inv=k_scale_inv,
                v_scale_inv=v_scale_inv,
            )

        k_nope, v = kv[..., :nope], kv[..., nope:]
        if cos_sin_cache is None:
            q_fp8 = fp8_quantize(q)
            k_fp8, v_fp8 = mla_kv_pack_quantize_fp8(
                k_nope, k_pe, v, k_scale_inv, v_scale_inv
            )
            k_pe_fp8 = fp8_quantize(k_pe)
        else:
            rope = (cos_sin_cache, positions, is_neox)
            q_fp8, k_fp8 = self._fused_rope_fp8_quantize(
                q, k_nope, k_pe, *rope, k_scale_inv
            )
            v_fp8 = fp8_quantize(v, v_scale_inv)
            # The cache wants k_pe rotated and unscaled, as any head of an unscaled K has
            # it.
            k_cached = k_fp8
            if k_scale_inv != 1.0:
                _, k_cached = self._fused_rope_fp8_quantize(
                    q[:, :1], k_nope[:, :1], k_pe, *rope
                )
            k_pe_fp8 = k_cached[:, :1, nope:]
        num_cached = cache_loc.shape[0]
        pool.set_mla_kv_buffer(
            attn,
            cache_loc,
            fp8_quantize(kv_a[:num_cached]).unsqueeze(1),
            k_pe_fp8[:num_cached],
        )
        return q_fp8, k_fp8, v_fp8

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
        if q.shape[0] == 0:
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

    def pack_prefix_chunk_kv(
        self, k_nope, k_pe, v, layer: Optional[RadixAttention] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 (k, v), contiguous, of a prefix chunk; k_pe is rotated already.

        k_nope [n, h, nope], k_pe [n, 1, rope], v [n, h, v]; k and v are divided by the
        layer's k_scale and v_scale.
        """
        scale_invs = (1.0, 1.0) if layer is None else self._prefill_scale_invs(layer)
        return mla_kv_pack_quantize_fp8(k_nope, k_pe, v, *scale_invs)

    def _fixup_zero_kv_rows(self, out, lse, kv_lens, cum_seq_lens, max_seq_len):
        """``fixup_zero_kv_rows`` for any number of heads: out = 0 and lse = -inf in the
        rows of requests without keys. Its 16-byte writes of lse fault on head counts
        that are no multiple of four."""
        if lse.shape[1] % 4 == 0:
            fixup_zero_kv_rows(out, lse, kv_lens, cum_seq_lens, max_seq_len)
            return
        rows = torch.repeat_interleave(
            kv_lens == 0, cum_seq_lens.diff(), output_size=self.num_prefill_tokens
        )
        out[: rows.shape[0]].masked_fill_(rows[:, None, None], 0)
        lse[: rows.shape[0]].masked_fill_(rows[:, None], -torch.inf)

    def _run_padded_prefill_kernel(self, **kwargs):
        """``_run_prefill_kernel``, which leaves the rows of data-parallel padding
        unwritten; they read as zero afterwards, whatever the allocator handed out."""
        result = self._run_prefill_kernel(**kwargs)
        for rows in result if isinstance(result, tuple) else (result,):
            if rows.shape[0] > self.num_prefill_tokens:
                rows[self.num_prefill_tokens :].zero_()
        return result
