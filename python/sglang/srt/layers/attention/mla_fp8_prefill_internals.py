"""What the FP8 prefill uses of SGLang that is not in the same place in every release.

Only this file knows: ``mla_fp8_prefill`` is the same for all of them.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Optional, Union

import torch

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache import memory_pool

try:
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        is_in_breakable_cuda_graph,
    )
    from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph import (
        get_tc_piecewise_forward_context,
        is_in_tc_piecewise_cuda_graph,
    )
except ModuleNotFoundError:  # before 0.5.14
    from sglang.srt.compilation.piecewise_context_manager import (
        get_forward_context as get_tc_piecewise_forward_context,
    )
    from sglang.srt.compilation.piecewise_context_manager import (
        is_in_piecewise_cuda_graph as is_in_tc_piecewise_cuda_graph,
    )
    from sglang.srt.model_executor.breakable_cuda_graph.context import (
        is_in_breakable_cuda_graph,
    )

try:
    from sglang.srt.model_executor.runner_utils.prefill_graph import (
        is_in_prefill_graph_scope,
    )
except ModuleNotFoundError:  # before 0.5.23

    def is_in_prefill_graph_scope() -> bool:
        return False


try:
    from sglang.kernels.ops.quantization.fp8_kernel import (
        sglang_per_token_group_quant_fp8,
    )
except ModuleNotFoundError:  # before 0.5.16
    from sglang.srt.layers.quantization.fp8_kernel import (
        sglang_per_token_group_quant_fp8,
    )

try:
    from sglang.srt.layers import dcp
    from sglang.srt.runtime_context import get_parallel
except ImportError:  # before 0.5.15
    dcp = None

try:
    from sglang.srt.layers.dp_attention import get_attention_tp_size
except ImportError:  # from 0.5.16 on
    get_attention_tp_size = None

try:
    from sglang.srt.model_executor import forward_context
except ImportError:  # before 0.5.13
    forward_context = None

try:
    from sglang.srt.runtime_context import attention_backends, get_exec
except ImportError:  # before 0.5.18
    get_exec = None

try:
    from sglang.srt.runtime_context import get_observability, get_serving
except ImportError:  # before 0.5.17
    get_observability = get_serving = None

# From 0.5.17 on RadixAttention takes K to have q's number of rows, unless it is told.
_COUNTS_KEYS = "key_value_num_tokens" in signature(RadixAttention.forward).parameters

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.server_args import ServerArgs


def in_cuda_graph() -> bool:
    """Whether a prefill is captured in a CUDA graph, or replays one in parts."""
    # RadixAttention allocates its output in q's dtype under such a context.
    return (
        get_tc_piecewise_forward_context() is not None
        or is_in_tc_piecewise_cuda_graph()
        or is_in_breakable_cuda_graph()
        or is_in_prefill_graph_scope()
    )


def decode_context_parallel() -> bool:
    """Whether out_cache_loc counts the slots of several ranks."""
    if dcp is None:
        return False
    parallel = get_parallel()
    if hasattr(parallel, "dcp_enabled"):
        return parallel.dcp_enabled
    return dcp.dcp_enabled()  # 0.5.15


def prefill_backend_name(server_args: ServerArgs) -> str:
    """The attention backend of prefills, as the user or SGLang chose it."""
    if get_exec is None:
        return server_args.get_attention_backends()[0]
    return attention_backends()[0]


def metrics_model_name(server_args: ServerArgs) -> Optional[str]:
    """The label model_name of SGLang's metrics, or None where they are off."""
    metrics = server_args if get_observability is None else get_observability()
    serving = server_args if get_serving is None else get_serving()
    return serving.served_model_name if metrics.enable_metrics else None


def disable_prefill_cuda_graphs(server_args: ServerArgs) -> Optional[str]:
    """Turn prefill CUDA graphs off and return the flag that keeps them, or None where
    they are off already or the user chose them."""
    if hasattr(server_args, "enforce_piecewise_cuda_graph"):  # before 0.5.14
        if (
            server_args.disable_piecewise_cuda_graph
            or server_args.enforce_piecewise_cuda_graph
        ):
            return None
        server_args.disable_piecewise_cuda_graph = True
        return "--enforce-piecewise-cuda-graph"
    # What the model runner reads, from 0.5.19 on not in server_args.
    args = server_args if get_exec is None else get_exec().graph
    prefill = args.cuda_graph_config.prefill
    backend = prefill.backend
    chosen = ("prefill", "backend") in server_args._cuda_graph_config_locked
    if chosen or backend == "disabled":
        return None
    prefill.backend = "disabled"
    return f"--cuda-graph-backend-prefill={backend}"


def attention_tp_size() -> int:
    """The number of ranks that share the heads of attention."""
    if get_attention_tp_size is None:
        return get_parallel().attn_tp_size
    return get_attention_tp_size()


def attn_backend_of(forward_batch: ForwardBatch) -> AttentionBackend:
    """The backend of the whole model, which may be a wrapper."""
    if forward_context is None:
        return forward_batch.attn_backend
    return forward_context.get_attn_backend()


def kv_pool_of(forward_batch: ForwardBatch) -> memory_pool.KVCache:
    if forward_context is None:
        return forward_batch.token_to_kv_pool
    return forward_context.get_token_to_kv_pool()


def attend_to_chunk(
    attn: RadixAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forward_batch: ForwardBatch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to a chunk of the prefix, with as many keys as the chunk has, and its
    log-sum-exps."""
    keys = {"key_value_num_tokens": k.shape[0]} if _COUNTS_KEYS else {}
    return attn(q, k, v, forward_batch, save_kv_cache=False, **keys)


def per_token_group_quant_fp8(
    x: torch.Tensor, group_size: int, scale_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, k] as SGLang's linears in FP8 quantize their input: FP8 and float32 scales
    [n, k / group_size], contiguous; with scale_ue8m0 powers of two."""
    return sglang_per_token_group_quant_fp8(
        x.contiguous(), group_size, scale_ue8m0=scale_ue8m0
    )


def write_loc(
    forward_batch: ForwardBatch,
) -> Union[torch.Tensor, memory_pool.KVWriteLoc]:
    """Where the batch's rows go, as a KV pool's set_mla_kv_buffer takes it."""
    # From 0.5.22 on not every pool takes the bare slots.
    for_batch = getattr(getattr(memory_pool, "KVWriteLoc", None), "for_batch", None)
    return (
        forward_batch.out_cache_loc if for_batch is None else for_batch(forward_batch)
    )
