"""How the batches of batch_cases.py are run, and what is special about their layers and
pools. A function that runs one takes (env, batch) and gives a Result."""

from __future__ import annotations

import copy
import importlib
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Callable, ContextManager, Iterator
from unittest import mock

import mla_harness as harness
import torch
from gpu_stand_ins import FLASHINFER, KERNELS, merge_state
from mla_harness import Batch, Env, Result, run_prefill
from mla_standin import kernels
from sglang_cpu import DEVICE, HAS_GPU
from sglang_internals import (
    RELEASE,
    DSATokenToKVPool,
    attention_context_parallel,
    call,
    enable_breakable_cuda_graph,
    enable_piecewise_cuda_graph,
    running,
    set_piecewise_forward_context,
)

from sglang.srt.layers import radix_attention
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)

BACKENDS = (*sorted(RELEASE.backends), "fa3")


# Wrappers round a backend


def sibling(env: Env):
    """One more backend of the same kind on the same pools."""
    return harness.make_backend(env, env.server_args.attention_backend)


def other(env: Env):
    """A backend of another kind on the same pools."""
    own = env.server_args.attention_backend
    name = next(name for name in BACKENDS if name not in (own, "fa3"))
    return harness.make_backend(env, name)


def hybrid(env: Env):
    return harness.wrap_hybrid(env, env.backend, other(env))


def linear(env: Env):
    return harness.wrap_hybrid_linear(env.backend)


def tbo(env: Env):
    return harness.wrap_tbo(env.backend, [sibling(env), sibling(env)])


def tbo_of_linear_of_hybrid(env: Env):
    return harness.wrap_tbo(harness.wrap_hybrid_linear(hybrid(env)), [])


def hybrid_of_tbo(env: Env):
    return harness.wrap_hybrid(env, tbo(env), other(env))


def wrapped(wrap: Callable[[Env], Any]) -> Callable[[Env, Batch], Result]:
    return lambda env, batch: run_prefill(env, batch, backend=wrap(env))


# A batch in parts


def join(results: list[Result]) -> Result:
    """One Result of the parts of a batch that ran one after another."""

    def cat(name: str) -> torch.Tensor:
        return torch.cat([getattr(r, name) for r in results])

    return replace(
        results[-1],
        **{name: cat(name) for name in ("q", "k", "v", "attn_output", "output")},
        calls=[call for r in results for call in r.calls],
        late_compiles=[config for r in results for config in r.late_compiles],
    )


def overlapped(env: Env, batch: Batch) -> Result:
    """The two children of two-batch overlap, each with a backend of its own."""
    return join(harness.run_overlapped(env, batch, tbo(env)))


def chunk_by_chunk(env: Env, batch: Batch, sizes: tuple[int, ...]) -> Result:
    """One request prefilled in chunks, each over the cache that the last one left."""
    results, start, cache = [], 0, batch.cache_before
    for size in sizes:
        rows = slice(start, start + size)
        part = replace(
            batch,
            extend_lens=[size],
            prefix_lens=[start],
            hidden=batch.hidden[rows],
            positions=batch.positions[rows],
            out_cache_loc=batch.out_cache_loc[rows],
            prefix_slots=[batch.out_cache_loc[:start]],
            cache_before=cache,
        )
        results.append(run_prefill(env, part))
        start, cache = start + size, results[-1].cache
    assert start == batch.tokens
    return join(results)


def twice(env: Env, batch: Batch) -> Result:
    """A second batch, after what the first one may have left behind."""
    run_prefill(env, batch)
    return run_prefill(env, batch)


# What surrounds a batch


def with_decodes(env: Env, batch: Batch) -> Result:
    """As a scheduler that mixes decodes, of one token, into chunks of prefill."""
    mixed = lambda forward_batch: mock.patch.object(
        forward_batch, "forward_mode", ForwardMode.MIXED
    )
    return run_prefill(env, batch, around=mixed)


def in_nan_memory(env: Env, batch: Batch) -> Result:
    return run_prefill(
        env, batch, around=lambda forward_batch: harness.reference.nan_memory()
    )


def _unified_attention_with_output(*args, **kwargs) -> None:
    """SGLang's operator, which it registers for a GPU's tensors alone."""
    operator = torch.ops.sglang.unified_attention_with_output.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operator.redispatch(keys, *args, **kwargs)


def in_forward_context(env: Env, batch: Batch, breakable: bool) -> Result:
    """Run as the runners of captured prefills do."""
    names = ("unified_attention_with_output", "bcg_unified_attention_with_output")
    attention = nullcontext()
    if not HAS_GPU:
        operators = dict.fromkeys(names, _unified_attention_with_output)
        attention = mock.patch.multiple(radix_attention, create=True, **operators)

    @contextmanager
    def around(forward_batch):
        forward_batch.num_token_non_padded_cpu = batch.tokens
        with (
            attention,
            set_piecewise_forward_context(
                forward_batch, [env.attn.attn_mha], None, [], []
            ),
            enable_breakable_cuda_graph() if breakable else nullcontext(),
        ):
            yield

    # From 0.5.15 on a breakable graph is on the absorbed path, which needs a GPU.
    return run_prefill(env, batch, around=around, attention=not breakable)


def full_prefill_graph() -> ContextManager:
    """Where SGLang captures a prefill whole, from 0.5.23 on."""
    from sglang.srt.model_executor.runner_utils import prefill_graph

    return prefill_graph.prefill_graph_scope(full_graph=True)


def in_piecewise_graph(env: Env, batch: Batch) -> Result:
    """The prepare step alone: a GPU is needed for the attention after it."""
    piecewise = lambda forward_batch: enable_piecewise_cuda_graph()
    return run_prefill(env, batch, around=piecewise, attention=False)


def prepare_only(env: Env, batch: Batch) -> Result:
    return run_prefill(env, batch, attention=False)


def forced(
    env: Env,
    batch: Batch,
    inside: Callable[[Any], Any] = lambda forward_batch: nullcontext(),
) -> Result:
    """The prepare step of chunked prefills where SGLang's dispatch chooses another."""

    @contextmanager
    def chunked(forward_batch):
        dispatch = lambda forward_batch: AttnForwardMethod.MHA_CHUNKED_KV
        with (
            mock.patch.object(env.attn, "dispatch_attn_forward_method", dispatch),
            inside(forward_batch),
        ):
            yield

    return run_prefill(env, batch, inside=chunked, attention=False)


def without_metadata(env: Env, batch: Batch) -> Result:
    name = "forward_prefill_metadata"
    if env.server_args.attention_backend == "fa3":
        name = "forward_metadata"
    missing = mock.patch.object(env.backend, name, None)
    return forced(env, batch, inside=lambda forward_batch: missing)


def absorbed(env: Env, batch: Batch, mode: ForwardMode) -> Result:
    """A decode or speculative batch, through the model's absorbed MLA path; on fa3 its
    prepare step alone, since FlashAttention's absorbed kernel has no stand-in."""
    modules = {"flashinfer": FLASHINFER}
    modules["flashinfer.rope"] = FLASHINFER.rope

    @contextmanager
    def around(forward_batch):
        forward_batch.forward_mode = mode
        if mode.is_target_verify():
            forward_batch.seq_lens = forward_batch.extend_prefix_lens.long()
            forward_batch.seq_lens_cpu = forward_batch.seq_lens.cpu()
            forward_batch.spec_info = SimpleNamespace(
                draft_token_num=batch.extend_lens[0], ragged_verify_layout=None
            )
        with mock.patch.dict(sys.modules, {} if HAS_GPU else modules):
            yield

    attention = env.server_args.attention_backend != "fa3"
    return run_prefill(env, batch, around=around, attention=attention)


class RaggedBackend(AttentionBackend):
    """Stands in for backends without the hook, whose MHA kernels need a GPU."""

    def init_forward_metadata(self, forward_batch) -> None:
        pass

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs
    ):
        cu_q = cu_kv = harness.cumulate(forward_batch.extend_seq_lens_cpu)
        prefix = bool(forward_batch.attn_attend_prefix_cache)
        return_lse = bool(forward_batch.mha_return_lse)
        if prefix:
            chunk = forward_batch.prefix_chunk_idx
            cu_kv = forward_batch.prefix_chunk_cu_seq_lens[chunk].tolist()
        elif forward_batch.mha_one_shot:
            cu_kv = harness.cumulate(forward_batch.seq_lens.tolist())
        KERNELS.record(
            dict(
                kernel="ragged",
                q=q,
                k=k,
                v=v,
                cu_q=cu_q,
                cu_kv=cu_kv,
                causal=not prefix,
                return_lse=return_lse,
                bmm1_scale=layer.scaling,
                bmm2_scale=1.0,
                arguments={},
            )
        )
        out, lse = kernels.ragged_attention(
            q, k, v, cu_q, cu_kv, layer.scaling, not prefix, torch.float64
        )
        out, lse = out.to(q.dtype), lse.float()
        return (out, lse) if return_lse else out


def other_prefill_backend(env: Env, batch: Batch) -> Result:
    """Prefill by a backend without the hook, decode by the environment's."""
    wrapper = harness.wrap_hybrid(env, RaggedBackend(), env.backend)
    return run_prefill(env, batch, backend=wrapper)


def own_prepare(env: Env, batch: Batch) -> Result:
    """Sarvam's attention: BF16 q, k, v from a prepare step of its own, and the prefix
    chunks through DeepSeek's."""
    from sglang.srt.models import sarvam_moe

    dims, attn = env.dims, env.attn
    hidden = env.runner.model_config.hidden_size
    config = SimpleNamespace(
        qk_nope_head_dim=dims.nope,
        qk_rope_head_dim=dims.rope,
        v_head_dim=dims.v,
        q_lora_rank=None,
        kv_lora_rank=dims.lora,
        rms_norm_eps=1e-6,
    )
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(env.dtype)
    try:
        with (
            torch.device(DEVICE),
            mock.patch.object(sarvam_moe, "get_rope", lambda *_, **__: attn.rotary_emb),
        ):
            model = sarvam_moe.SarvamMoEMLAAttention(config, hidden, dims.heads)
    finally:
        torch.set_default_dtype(default_dtype)
    for name, weight in attn.state_dict().items():
        if name in model.state_dict():
            model.state_dict()[name].copy_(weight)
    for name in ("k_scale", "v_scale", "k_scale_float", "v_scale_float"):
        setattr(model.attn_mha, name, getattr(attn.attn_mha, name))
    forward_batch = harness.start_batch(env, batch)
    merge = nullcontext()
    if not HAS_GPU:
        merge = mock.patch.object(
            sarvam_moe, "merge_state_v2", merge_state, create=True
        )
    with (
        torch.no_grad(),
        merge,
        running(env.backend),
        harness.chunk_capacity(batch.chunk_capacity),
    ):
        env.backend.init_forward_metadata(forward_batch)
        KERNELS.clear()
        output = model(forward_batch.positions, batch.hidden.clone(), forward_batch)
    return harness.result_of(env, output)


# Layers


def absorb_weights(attn: torch.nn.Module) -> None:
    """What the absorbed MLA path multiplies by, as the weight loader cuts it."""
    nope, v = attn.qk_nope_head_dim, attn.v_head_dim
    weight = attn.kv_b_proj.weight.detach().view(-1, nope + v, attn.kv_lora_rank)
    attn.w_kc = weight[:, :nope].contiguous()
    attn.w_vc = weight[:, nope:].transpose(1, 2).contiguous()


def fourth_layer(attn: torch.nn.Module) -> None:
    for part in (attn, attn.attn_mha, attn.attn_mqa):
        part.layer_id = 3


def own_rope(attn: torch.nn.Module) -> torch.nn.Module:
    """The layer's rotary embedding, which it no longer shares with other layers."""
    rotary = attn.rotary_emb = copy.copy(attn.rotary_emb)
    # nn.Module keeps its buffers in a dictionary that copy shares.
    rotary._buffers = dict(rotary._buffers)
    return rotary


def rope_of_another_class(attn: torch.nn.Module) -> None:
    rotary = own_rope(attn)

    class NextPosition(type(rotary)):
        def forward_cuda(self, positions, query, key, *args, **kwargs):
            return super().forward_cuda(positions + 1, query, key, *args, **kwargs)

    rotary.__class__ = NextPosition
    rotary._forward_method = rotary.forward_cuda


def native_rope(attn: torch.nn.Module) -> None:
    """As SGLang chooses for this instance alone under rl_on_policy_target."""
    rotary = own_rope(attn)
    rotary._forward_method = rotary.forward_native


def big_activations(attn: torch.nn.Module) -> None:
    """A thousand times the usual size, in one element of each part of each operand."""
    nope = attn.qk_nope_head_dim
    attn.q_b_proj.weight.data[0] *= 1000
    attn.q_b_proj.weight.data[attn.qk_head_dim - 1] *= 1000
    attn.kv_b_proj.weight.data[1] *= 1000
    attn.kv_b_proj.weight.data[nope + 1] *= 1000
    attn.kv_a_layernorm.weight.data[2] *= 1000
    attn.kv_b_proj.weight.data[:, 2] = 0
    attn.fused_qkv_a_proj_with_mqa.weight.data[-1] *= 1000


def inf_and_nan(attn: torch.nn.Module) -> None:
    """Infinity and NaN in two elements of V, where they reach nothing else."""
    weight = attn.kv_b_proj.weight.data
    weight[attn.qk_nope_head_dim, 0] = torch.inf
    weight[attn.qk_nope_head_dim + 1, 0] = torch.nan


# Pools


class TransferCounter:
    """What HiCache registers on a pool: notes the layers waited for, and the cache as
    it was then."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer = buffer
        self.waits: list[tuple[int, torch.Tensor]] = []

    def wait_until(self, layer: int) -> None:
        self.waits.append((layer, self.buffer.clone()))


def loading_by_layer(env: Env) -> None:
    counter = TransferCounter(env.pool.kv_buffer[0])
    env.pool.register_layer_transfer_counter(counter)


def any_batch_is_large(env: Env) -> None:
    """Enough for Q out of q_b_proj, and K and V out of kv_b_proj, in FP8."""
    for name in ("least_gemm_rows", "least_fp8_gemm_rows", "least_q_gemm_rows"):
        setattr(env.backend, name, 0)


def kv_b_proj_in_fp8(env: Env) -> None:
    """And any batch large enough."""
    any_batch_is_large(env)
    weight_in_fp8(env, "kv_b_proj")


def weight_in_fp8(env: Env, name: str) -> None:
    """With scales of blocks, as in DeepSeek's checkpoints."""
    old = getattr(env.attn, name)
    config = Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
    )
    proj = ColumnParallelLinear(
        old.input_size, old.output_size, bias=False, quant_config=config
    ).to(DEVICE)
    weight, scale = harness.reference.quantize_blocks(old.weight.detach(), 128)
    proj.weight.data.copy_(weight)
    proj.weight_scale_inv.data.copy_(scale)
    if HAS_GPU:
        proj.quant_method.process_weights_after_loading(proj)
    setattr(env.attn, name, proj)


def new_buffer(env: Env) -> None:
    """The buffer somewhere else, as after a memory saver's release or in a pool of
    memory of one's own: a slice of a larger allocation."""
    old = env.pool.kv_buffer[0]
    larger = torch.zeros(3 * old.shape[0], *old.shape[1:], dtype=old.dtype)
    env.pool.kv_buffer[0] = larger.to(DEVICE)[old.shape[0] : 2 * old.shape[0]]


def fp4_backend(env: Env) -> None:
    """A backend for an FP4 cache; the pool stays BF16, since FP4's quantizer is for
    GPUs."""
    env.runner.kv_cache_dtype = torch.float4_e2m1fn_x2
    env.backend = sibling(env)


def context_parallel(env: Env) -> None:
    env.runner.attn_cp_size = env.runner.ps.attn_cp_size = 2
    with attention_context_parallel(2):
        env.backend = type(env.backend)(env.runner)


def flash_attention_4(env: Env) -> None:
    env.backend = type(env.backend)(env.runner, fa_impl_ver=4)


class OwnWriterPool(memory_pool.MLATokenToKVPool):
    """A pool that stores rows its own way; notes the dtypes of what it is given."""

    def set_mla_kv_buffer(self, layer, loc, *parts):
        self.written = [*getattr(self, "written", []), *(x.dtype for x in parts)]
        super().set_mla_kv_buffer(layer, loc, *parts)


def dsa_pool(**kwargs):
    """Rows of FP8 latent, scales and BF16 RoPE part: 656 bytes."""
    return DSATokenToKVPool(
        **kwargs, index_head_dim=128, kv_cache_dim=512 + 512 // 128 * 4 + 64 * 2
    )


def unified_pool(
    size: int,
    page_size: int,
    dtype: torch.dtype,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    device: str,
    **kwargs,
) -> memory_pool.MLATokenToKVPool:
    """Of a buffer that it shares with another pool. Where slots are physical token ids,
    from 0.5.22 on, rows of two layers follow one another."""
    unified = importlib.import_module("sglang.srt.mem_cache.unified_memory_pool")
    pool_class = unified.UnifiedMLATokenToKVPool
    physical = getattr(pool_class, "requires_physical_write_loc", False)
    mla = unified.MLASubPoolSpec(
        name="mla",
        layer_num=1 + physical,
        grow_direction="up",
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        store_dtype=torch.uint8,
    )
    other = unified.MHASubPoolSpec(
        name="other",
        layer_num=1,
        grow_direction="down",
        head_num=1,
        head_dim=64,
        store_dtype=torch.bfloat16,
    )
    buffer = unified.UnifiedKVPool(
        total_bytes=2 * (size + page_size) * mla.entry_bytes(),
        sub_pool_specs=[mla, other],
        device=device,
        enable_memory_saver=False,
        page_size=page_size,
    )
    return pool_class(
        unified_buffer=buffer,
        sub_pool_name="mla",
        kv_cache_dtype=dtype,
        page_size=page_size,
    )


def at_physical_slots(env: Env, batch: Batch) -> Result:
    """As the plan of a batch marks them, which a unified pool wants from 0.5.22 on."""

    def mark(forward_batch) -> ContextManager:
        forward_batch.out_cache_loc_is_physical = True
        return nullcontext()

    return run_prefill(env, batch, around=mark)


class LinearPool(memory_pool.HybridLinearKVPool):
    """With what the harness looks at; the full-attention layer is number 3."""

    @property
    def kv_buffer(self):
        return self.full_kv_pool.kv_buffer

    @property
    def store_dtype(self):
        return self.full_kv_pool.store_dtype


def linear_pool(layer_num: int, **kwargs) -> LinearPool:
    return call(
        LinearPool,
        **kwargs,
        head_num=1,
        head_dim=0,
        full_attention_layer_ids=[3],
        enable_kvcache_transpose=False,
        mamba_pool=None,
        use_mla=True,
    )


# Counts


@contextmanager
def counting(counts: Counter) -> Iterator[None]:
    """Count ("launch", kernel) of Triton and ("cast", shape of the result) to FP8
    outside of them: ATen conversions and copies with an FP8 result of another type."""
    import triton
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        within_launch = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
                source = args[-1] if len(args) > 1 else args[0]
                if not self.within_launch:
                    if out.dtype == torch.float8_e4m3fn != source.dtype:
                        counts["cast", tuple(out.shape)] += 1
            return out

    casts = Casts()
    if HAS_GPU:

        def enter(metadata) -> None:
            counts["launch", metadata.get()["name"]] += 1

        hook = mock.patch.object(triton.knobs.runtime, "launch_enter_hook", enter)
    else:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def counted_launch(self, *args, **kwargs):
            counts["launch", self.fn.__name__] += 1
            # The interpreter's own conversions are torch's.
            casts.within_launch = True
            try:
                return launch(self, *args, **kwargs)
            finally:
                casts.within_launch = False

        hook = mock.patch.object(GridExecutor, "__call__", counted_launch)
    with hook, casts:
        yield
