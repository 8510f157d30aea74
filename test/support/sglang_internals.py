"""What the tests use of SGLang that is not in the same place in every release.

Only this file knows: the cases, what runs them and the stand-ins are the same for all.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from contextlib import contextmanager, nullcontext, suppress
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, ContextManager, Iterator
from unittest import mock

import sglang_cpu

from prefill_patch.releases import BACKENDS, candidates, ordered, stated

sglang_cpu.install()

from sglang.srt.distributed import parallel_state
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.version import __version__


def _module(*homes: str) -> ModuleType:
    """The first of these modules that this SGLang has."""
    for home in homes[:-1]:
        try:
            return importlib.import_module(f"sglang.{home}")
        except ModuleNotFoundError as error:
            if not f"sglang.{home}.".startswith(f"{error.name}."):
                raise
    return importlib.import_module(f"sglang.{homes[-1]}")


# What this SGLang is, or was taken for by the patch.
RELEASE = next(candidates(stated(__version__)))

if RELEASE.version == "0.5.15" and not sglang_cpu.HAS_GPU:
    # It imports cutlass, for a kernel that nothing here calls.
    _kernel = ModuleType("sglang.jit_kernel.dsa.cutedsl_paged_mqa_logits")
    _kernel.__getattr__ = lambda name: None
    sys.modules[_kernel.__name__] = _kernel

# Whether fa3's kernel is handed k_scale and v_scale in a prefill of MLA.
FA3_HAS_KV_SCALES = ordered(RELEASE.version) >= ordered("0.5.16")

fixup_zero_kv = _module(
    "kernels.ops.attention.fixup_zero_kv", "jit_kernel.fixup_zero_kv"
)
fp8_kernel = _module(
    "kernels.ops.quantization.fp8_kernel", "srt.layers.quantization.fp8_kernel"
)
jit_rope = _module("kernels.ops.attention.rope", "jit_kernel.rope")
layer_boundary = _module("srt.layers.layer_boundary", "srt.layers.communicator")
_graphs = "srt.model_executor.runner_backend_utils"
_piecewise = _module(
    f"{_graphs}.tc_piecewise_cuda_graph", "srt.compilation.piecewise_context_manager"
)
enable_breakable_cuda_graph = _module(
    f"{_graphs}.breakable_cuda_graph", "srt.model_executor.breakable_cuda_graph.context"
).enable_breakable_cuda_graph
if hasattr(_piecewise, "enable_tc_piecewise_cuda_graph"):
    enable_piecewise_cuda_graph = _piecewise.enable_tc_piecewise_cuda_graph
    set_piecewise_forward_context = _piecewise.set_tc_piecewise_forward_context
else:
    enable_piecewise_cuda_graph = _piecewise.enable_piecewise_cuda_graph
    set_piecewise_forward_context = _piecewise.set_forward_context

if hasattr(memory_pool, "DSATokenToKVPool"):
    DSATokenToKVPool = memory_pool.DSATokenToKVPool
else:  # before 0.5.13
    DSATokenToKVPool = memory_pool.NSATokenToKVPool
if hasattr(ForwardMode, "DRAFT_EXTEND"):
    DRAFT_EXTEND = ForwardMode.DRAFT_EXTEND
else:  # from 0.5.14 on
    DRAFT_EXTEND = ForwardMode.DRAFT_EXTEND_V2


def parse_graph_config(args: Any) -> None:
    """What SGLang makes of the flags for CUDA graphs, before it looks at GPU and model."""
    if hasattr(args, "_parse_cuda_graph_config"):
        args._parse_cuda_graph_config()
        return
    with suppress(ImportError):  # before 0.5.14, the flags are all there is
        from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config

        parse_cuda_graph_config(args)


def publish(server_args: Any) -> None:
    """Make these the process's, as a scheduler of one rank does."""
    try:
        from sglang.srt.runtime_context import SpawnRanks, publish
    except ImportError:  # before 0.5.21
        from sglang.srt.server_args import set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(server_args)
    else:
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0))


def kv_index_translator(**parts: Any) -> Any:
    """What backends ask for the slots to read, from 0.5.20 on."""
    try:
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    except ImportError:
        return None
    return KVIndexTranslator(**parts)


def backend_class(name: str) -> type:
    """The class of an attention backend, as ServerArgs names it."""
    module, name = {**BACKENDS, **RELEASE.backends}[name].split(":")
    return getattr(_module(f"srt.layers.attention.{module}"), name)


def has_own_hook(backend: Any) -> bool:
    """Whether the patch's is beside one of SGLang's."""
    name = "prepare_prefill_qkv"
    return RELEASE.renamed(name) != name and hasattr(backend, name)


def running(backend: Any) -> ContextManager:
    """In this context the model's attention runs on that backend."""
    try:
        from sglang.srt.model_executor import forward_context
    except ImportError:  # before 0.5.13, where the batch says so
        return nullcontext()
    context = forward_context.ForwardContext(attn_backend=backend)
    return forward_context.forward_context(context)


def attention_context_parallel(ranks: int) -> ContextManager:
    """In this context that many ranks share a prompt, as backends are told."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:  # before 0.5.14, where the runner says so
        return nullcontext()
    parallel = type(get_parallel())
    return mock.patch.object(parallel, "attn_cp_size", ranks, create=True)


@contextmanager
def decode_context_parallel() -> Iterator[None]:
    """In this context ranks share the slots of the KV pool, and this is the first."""
    from sglang.srt.layers import dcp
    from sglang.srt.runtime_context import get_parallel

    if hasattr(get_parallel(), "dcp_enabled"):
        enabled = get_parallel().override(dcp_enabled=True)
    else:  # 0.5.15
        enabled = mock.patch.object(dcp, "dcp_enabled", lambda: True)
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    with enabled, mock.patch.object(parallel_state, "_DCP", group):
        yield


def call(function: Callable, **arguments: Any) -> Any:
    """With those arguments that it takes in this release."""
    taken = inspect.signature(function).parameters
    return function(**{name: arguments[name] for name in arguments if name in taken})
