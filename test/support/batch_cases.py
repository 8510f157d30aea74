"""Every kind of batch that reaches the MLA prefill path, as one table.

`CASES` is what the tests run and what docs/batches.md is made of:

    python test/support/batch_cases.py > docs/batches.md

A `Run` says how to build a layer and a batch and how to run them, by values and
functions that pickle, so that the unpatched SGLang runs the same in its own process.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import functools
import os
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Optional
from unittest import mock

if __name__ == "__main__":
    # The tests' conftest.py does this for the tests.
    sys.path += [str(Path(__file__).parents[n]) for n in (1, 2)]
    import patched_sglang

    parser = argparse.ArgumentParser(description="Print docs/batches.md.")
    parser.add_argument("--sglang", default="0.5.12.post1")
    trees = patched_sglang.lay_out(parser.parse_args().sglang)
    sys.path.insert(0, str(trees.patched))

import mla_harness as harness
import torch
from mla_harness import KERNELS, Batch, Dims, Env, Result, run_prefill
from mla_standin import kernels
from sglang_cpu import DEVICE, HAS_GPU

from sglang.srt.compilation.piecewise_context_manager import (
    enable_piecewise_cuda_graph,
    set_forward_context,
)
from sglang.srt.layers import radix_attention
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.breakable_cuda_graph.context import (
    enable_breakable_cuda_graph,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)

BACKENDS = ("tokenspeed_mla", "trtllm_mla")
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Run:
    """One run of the layer: what `make_env` and `make_batch` get, and what is special.

    `tune` changes the layer or its pools before the run; `how` runs it; `environ` is
    set while the layer and its backend are built.
    """

    env: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=lambda: dict(extend_lens=[5, 3]))
    how: Callable[[Env, Batch], Result] = run_prefill
    tune: Optional[Callable[[Env], None]] = None
    environ: dict[str, str] = field(default_factory=dict)

    def build(self) -> tuple[Env, Batch]:
        with mock.patch.dict(os.environ, self.environ):
            env = harness.make_env(**{"dims": Dims.tiny(), **self.env})
            if self.tune is not None:
                self.tune(env)
        return env, harness.make_batch(env, **self.batch)

    def run(self) -> Result:
        return self.how(*self.build())

    def on(self, backend: str) -> Run:
        return replace(self, env={**self.env, "backend": backend})


# How a batch runs. Each function takes (env, batch) and gives a Result.


@contextmanager
def lent(module: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes that may not exist yet, for the time of a run."""
    with ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        yield


def join(results: list[Result]) -> Result:
    """One Result of the parts of a batch that ran one after another."""

    def cat(name: str) -> torch.Tensor:
        return torch.cat([getattr(r, name) for r in results])

    return replace(
        results[-1],
        **{name: cat(name) for name in ("q", "k", "v", "attn_output", "output")},
        calls=[call for r in results for call in r.calls],
        late_compiles=[config for r in results for config in r.late_compiles],
        forward_batch=None,
    )


def sibling(env: Env, name: Optional[str] = None):
    """One more backend on the same pools, of the same kind by default."""
    return harness.make_backend(env, name or env.server_args.attention_backend)


def other_name(env: Env) -> str:
    (name,) = set(BACKENDS) - {env.server_args.attention_backend}
    return name


def hybrid(env: Env):
    return harness.wrap_hybrid(env, env.backend, sibling(env, other_name(env)))


def hybrid_of_linear(env: Env):
    decode = harness.wrap_hybrid_linear(sibling(env, other_name(env)))
    return harness.wrap_hybrid(env, harness.wrap_hybrid_linear(env.backend), decode)


def linear(env: Env):
    return harness.wrap_hybrid_linear(env.backend)


def linear_of_hybrid(env: Env):
    return harness.wrap_hybrid_linear(hybrid(env))


def tbo_parent(env: Env):
    return harness.wrap_tbo(env.backend, [sibling(env), sibling(env)])


def tbo_of_linear_of_hybrid(env: Env):
    return harness.wrap_tbo(linear_of_hybrid(env), [])


def hybrid_of_tbo(env: Env):
    return harness.wrap_hybrid(env, tbo_parent(env), sibling(env, other_name(env)))


def wrapped(env: Env, batch: Batch, wrap: Callable[[Env], Any]) -> Result:
    return run_prefill(env, batch, backend=wrap(env))


def overlapped(
    env: Env, batch: Batch, wrap: Callable[[Env], Any] = lambda env: env.backend
) -> Result:
    """The two children of two-batch overlap, each with a bare backend of its own."""
    tbo = harness.wrap_tbo(wrap(env), [sibling(env), sibling(env)])
    return join(harness.run_overlapped(env, batch, tbo))


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


def with_decodes(env: Env, batch: Batch) -> Result:
    """As a scheduler that mixes decodes, of one token, into chunks of prefill."""

    @contextmanager
    def around(forward_batch):
        forward_batch.forward_mode = ForwardMode.MIXED
        yield

    return run_prefill(env, batch, around=around)


def out_of_range(env: Env, batch: Batch, name: str) -> Result:
    """The third of `positions` or `out_cache_loc` far beyond what there is."""

    @contextmanager
    def around(forward_batch):
        indices = getattr(forward_batch, name).clone()
        indices[2] = 10**6
        setattr(forward_batch, name, indices)
        yield

    return run_prefill(env, batch, around=around)


def in_nan_memory(env: Env, batch: Batch) -> Result:
    return run_prefill(env, batch, around=lambda _: harness.nan_memory())


def _unified_attention_with_output(*args, **kwargs) -> None:
    """SGLang's operator, which it registers for a GPU's tensors alone."""
    operator = torch.ops.sglang.unified_attention_with_output.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operator.redispatch(keys, *args, **kwargs)


def in_forward_context(env: Env, batch: Batch, breakable: bool) -> Result:
    """Run as the runners of captured prefills do."""
    attention = dict.fromkeys(
        ("unified_attention_with_output", "bcg_unified_attention_with_output"),
        _unified_attention_with_output,
    )

    @contextmanager
    def around(forward_batch):
        forward_batch.num_token_non_padded_cpu = batch.tokens
        with (
            lent(radix_attention, **({} if HAS_GPU else attention)),
            set_forward_context(forward_batch, [env.attn.attn_mha], None, [], []),
            enable_breakable_cuda_graph() if breakable else nullcontext(),
        ):
            yield

    return run_prefill(env, batch, around=around)


def prepare_only(
    env: Env,
    batch: Batch,
    *,
    around: Callable[[], Any] = nullcontext,
    inside: Callable[[], Any] = nullcontext,
    method: Optional[str] = None,
    mode: Optional[str] = None,
    metadata: bool = True,
) -> Result:
    """Run the prepare step alone, where a GPU is needed for the attention after it.

    `around` gives a context for the metadata too, `inside` for the step alone;
    `method` names the prepare method instead of SGLang's dispatch, and `mode` the
    forward mode that the batch gets once its metadata stands.
    """
    env.activate()
    env.pool.kv_buffer[0].copy_(batch.cache_before)
    forward_batch = harness.make_forward_batch(env, batch)
    KERNELS.clear()
    attn = env.attn
    dispatch = attn.dispatch_attn_forward_method
    if method is not None:
        dispatch = lambda forward_batch: AttnForwardMethod[method]
    with torch.no_grad(), around():
        if metadata:
            env.backend.init_forward_metadata(forward_batch)
        if mode is not None:
            forward_batch.forward_mode = ForwardMode[mode]
        with inside(), lent(attn, dispatch_attn_forward_method=dispatch):
            state = harness.prepare(env, forward_batch, batch.hidden.clone())
    q, k, v = (x.detach().clone() for x in state[3][:3])
    return Result(
        method=state[1].name,
        q=q,
        k=k,
        v=v,
        cache=env.pool.kv_buffer[0].clone(),
        attn_output=None,
        output=q.new_empty(0),
        calls=[],
        late_compiles=[],
        counts=KERNELS.counts,
        forward_batch=forward_batch,
    )


def _count_launchers(stack: ExitStack) -> tuple[str, ...]:
    """Count the launches that go past Triton's dispatch and its hooks; their names."""
    try:
        from sglang.jit_kernel.fp8_quantize import Launcher
    except ImportError:
        return ()  # an unpatched SGLang
    launch = Launcher.__call__

    def counted_launch(self, *args):
        KERNELS.counts["launch", self._kernel.__name__] += 1
        return launch(self, *args)

    stack.enter_context(mock.patch.object(Launcher, "__call__", counted_launch))
    return (
        "_fp8_quantize_kernel",
        "_mla_kv_pack_quantize_fp8_kernel",
        "_mla_prefill_quantize_fp8_kernel",
    )


@contextmanager
def _counted() -> Iterator[None]:
    """Count Triton launches and casts to FP8 outside of them into KERNELS.counts.

    A launch is counted where Triton starts a kernel, by the kernel's name: by its
    launch hook and in our launcher on a GPU, round the interpreter's executor
    elsewhere. A cast is an ATen
    conversion or copy with an FP8 result from another type, by the result's shape.
    """
    import triton
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        within_launch = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
                source = args[-1] if len(args) > 1 else args[0]
                if not self.within_launch and out.dtype == E4M3 != source.dtype:
                    KERNELS.counts["cast", tuple(out.shape)] += 1
            return out

    casts = Casts()
    with ExitStack() as stack:
        if HAS_GPU:
            ours = _count_launchers(stack)

            def enter(metadata) -> None:
                name = metadata.get()["name"]
                KERNELS.counts["launch", name] += name not in ours

            hook = mock.patch.object(triton.knobs.runtime, "launch_enter_hook", enter)
            stack.enter_context(hook)
        else:
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__

            def counted_launch(self, *args, **kwargs):
                KERNELS.counts["launch", self.fn.__name__] += 1
                # The interpreter's own conversions are torch's.
                casts.within_launch = True
                try:
                    return launch(self, *args, **kwargs)
                finally:
                    casts.within_launch = False

            stack.enter_context(
                mock.patch.object(GridExecutor, "__call__", counted_launch)
            )
        stack.enter_context(casts)
        yield


def counted(env: Env, batch: Batch) -> Result:
    """The layer's launches and casts, as they are named in `_counted`."""
    return run_prefill(env, batch, around=lambda _: _counted())


def _noted(kernel):
    """The stand-in for a decode kernel, with its calls in KERNELS.counts."""

    @functools.wraps(kernel)
    def run(*args, **kwargs):
        KERNELS.counts[kernel.__name__] += 1
        return kernel(*args, **kwargs)

    return run


def absorbed(env: Env, batch: Batch, mode: str) -> Result:
    """A decode or speculative batch, through the model's absorbed MLA path."""
    mode = ForwardMode[mode]

    @contextmanager
    def around(forward_batch):
        forward_batch.forward_mode = mode
        if mode.is_target_verify():
            forward_batch.seq_lens = forward_batch.extend_prefix_lens.long()
            forward_batch.seq_lens_cpu = forward_batch.seq_lens.cpu()
            forward_batch.spec_info = SimpleNamespace(
                draft_token_num=batch.extend_lens[0]
            )
        modules = {}
        if HAS_GPU:
            import flashinfer
        else:
            flashinfer = harness.FLASHINFER
            modules = {"flashinfer": flashinfer, "flashinfer.rope": flashinfer.rope}
        trtllm = _noted(kernels.trtllm_batch_decode_with_kv_cache_mla)
        tokenspeed = _noted(kernels.tokenspeed_mla_decode)
        decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache_mla=trtllm)
        with (
            mock.patch.dict(sys.modules, modules),
            lent(flashinfer, decode=decode),
            lent(harness.TOKENSPEED, tokenspeed_mla_decode=tokenspeed),
        ):
            yield

    return run_prefill(env, batch, around=around)


class RaggedBackend(AttentionBackend):
    """Stands in for backends without the hook, whose MHA kernels need a GPU."""

    def init_forward_metadata(self, forward_batch) -> None:
        pass

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs
    ):
        cu_q = cu_kv = harness._cumulate(forward_batch.extend_seq_lens_cpu)
        prefix = bool(forward_batch.attn_attend_prefix_cache)
        if prefix:
            chunk = forward_batch.prefix_chunk_idx
            cu_kv = forward_batch.prefix_chunk_cu_seq_lens[chunk].tolist()
        elif forward_batch.mha_one_shot:
            cu_kv = harness._cumulate(forward_batch.seq_lens.tolist())
        KERNELS.record(
            dict(
                kernel="ragged",
                q=q,
                k=k,
                v=v,
                cu_q=cu_q,
                cu_kv=cu_kv,
                causal=not prefix,
                return_lse=bool(forward_batch.mha_return_lse),
                bmm1_scale=layer.scaling,
                bmm2_scale=1.0,
                arguments=dict(
                    batch_size=len(cu_q) - 1, seq_lens=torch.tensor(cu_kv).diff()
                ),
            )
        )
        out, lse = harness.attention64(
            q, k, v, cu_q, cu_kv, layer.scaling, causal=not prefix
        )
        out, lse = out.to(q.dtype), lse.float()
        return (out, lse) if forward_batch.mha_return_lse else out


def other_prefill_backend(env: Env, batch: Batch) -> Result:
    """Prefill by a backend without the hook, decode by the environment's."""
    wrapper = harness.wrap_hybrid(env, RaggedBackend(), env.backend)
    return run_prefill(env, batch, backend=wrapper)


def own_prepare(env: Env, batch: Batch) -> Result:
    """Sarvam's attention: BF16 q, k, v from a prepare step of its own, and the prefix
    chunks through DeepSeek's."""
    from sglang.srt.models import sarvam_moe

    dims, attn = env.dims, env.attn
    config = SimpleNamespace(
        qk_nope_head_dim=dims.nope,
        qk_rope_head_dim=dims.rope,
        v_head_dim=dims.v,
        q_lora_rank=None,
        kv_lora_rank=dims.kv_lora,
        rms_norm_eps=1e-6,
    )
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(env.dtype)
    try:
        with (
            torch.device(DEVICE),
            lent(sarvam_moe, get_rope=lambda *_, **__: attn.rotary_emb),
        ):
            model = sarvam_moe.SarvamMoEMLAAttention(config, dims.hidden, dims.heads)
    finally:
        torch.set_default_dtype(default_dtype)
    for name, weight in attn.state_dict().items():
        if name in model.state_dict():
            model.state_dict()[name].copy_(weight)
    for name in ("k_scale", "v_scale", "k_scale_float", "v_scale_float"):
        setattr(model.attn_mha, name, getattr(attn.attn_mha, name))
    env.activate()
    env.pool.kv_buffer[0].copy_(batch.cache_before)
    forward_batch = harness.make_forward_batch(env, batch)
    merge = harness.forward_mha.merge_state_v2
    with (
        torch.no_grad(),
        lent(sarvam_moe, merge_state_v2=merge),
        harness.chunk_capacity(batch.chunk_capacity),
    ):
        env.backend.init_forward_metadata(forward_batch)
        KERNELS.clear()
        output = model(forward_batch.positions, batch.hidden.clone(), forward_batch)
    return Result(
        method="own",
        q=None,
        k=None,
        v=None,
        cache=env.pool.kv_buffer[0].clone(),
        attn_output=None,
        output=output,
        calls=KERNELS.calls,
        late_compiles=KERNELS.late_compiles,
        counts=KERNELS.counts,
        forward_batch=None,
    )


# What is special about a layer or its pools.


def absorb_weights(env: Env) -> None:
    """What the absorbed MLA path multiplies by, as the weight loader cuts it."""
    weight = env.attn.kv_b_proj.weight.detach().view(
        env.dims.heads, env.dims.nope + env.dims.v, env.dims.kv_lora
    )
    env.attn.w_kc = weight[:, : env.dims.nope].contiguous()
    env.attn.w_vc = weight[:, env.dims.nope :].transpose(1, 2).contiguous()


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


def new_buffer(env: Env) -> None:
    """The buffer somewhere else, as after a memory saver's release or in a pool of
    memory of one's own: a slice of a larger allocation."""
    old = env.pool.kv_buffer[0]
    larger = torch.zeros(3 * old.shape[0], *old.shape[1:], dtype=old.dtype)
    env.pool.kv_buffer[0] = larger.to(DEVICE)[old.shape[0] : 2 * old.shape[0]]


def late_layer(env: Env) -> None:
    """The layer's number is that of its pool: the fourth layer has the first row."""
    for part in (env.attn, env.attn.attn_mha, env.attn.attn_mqa):
        part.layer_id = 3


def fp4_backend(env: Env) -> None:
    """A backend for an FP4 cache; the pool stays BF16, since FP4's quantizer is for
    GPUs."""
    env.runner.kv_cache_dtype = torch.float4_e2m1fn_x2
    env.backend = sibling(env)


def other_model_dtype(env: Env) -> None:
    """A backend that was told another dtype than the layer has."""
    env.runner.dtype = torch.float16
    env.backend = sibling(env)


def turning_rope(env: Env) -> None:
    """A RoPE of a class that does more than index its table."""
    # SGLang shares one among all layers of the process.
    rotary = env.attn.rotary_emb = copy.copy(env.attn.rotary_emb)

    class Turning(type(rotary)):
        def forward_cuda(self, positions, query, key, *args, **kwargs):
            return super().forward_cuda(positions + 1, query, key, *args, **kwargs)

    rotary.__class__ = Turning
    rotary._forward_method = rotary.forward_cuda


def big_activations(env: Env) -> None:
    """A thousand times the usual size, in one element of each part of each operand."""
    dims, attn = env.dims, env.attn
    attn.q_b_proj.weight.data[0] *= 1000
    attn.q_b_proj.weight.data[dims.qk - 1] *= 1000
    attn.kv_b_proj.weight.data[1] *= 1000
    attn.kv_b_proj.weight.data[dims.nope + 1] *= 1000
    attn.kv_a_layernorm.weight.data[2] *= 1000
    attn.kv_b_proj.weight.data[:, 2] = 0
    attn.fused_qkv_a_proj_with_mqa.weight.data[-1] *= 1000


def inf_and_nan(env: Env) -> None:
    """Infinity and NaN in two elements of V, where they reach nothing else."""
    weight = env.attn.kv_b_proj.weight.data
    weight[env.dims.nope, 0] = torch.inf
    weight[env.dims.nope + 1, 0] = torch.nan


class OwnWriterPool(memory_pool.MLATokenToKVPool):
    """A pool that stores rows its own way."""

    writes = 0

    def set_mla_kv_buffer(self, layer, loc, cache_k_nope, cache_k_rope):
        self.writes += 1
        super().set_mla_kv_buffer(layer, loc, cache_k_nope, cache_k_rope)


def nsa_pool(**kwargs):
    """Rows of FP8 latent, scales and BF16 RoPE part: 656 bytes."""
    return memory_pool.NSATokenToKVPool(
        **kwargs, index_head_dim=128, kv_cache_dim=512 + 512 // 128 * 4 + 64 * 2
    )


class LinearPool(memory_pool.HybridLinearKVPool):
    """With what the harness looks at; the full-attention layer is number 3."""

    @property
    def kv_buffer(self):
        return self.full_kv_pool.kv_buffer

    @property
    def store_dtype(self):
        return self.full_kv_pool.store_dtype


def linear_pool(layer_num: int, **kwargs) -> LinearPool:
    return LinearPool(
        **kwargs,
        head_num=1,
        head_dim=0,
        full_attention_layer_ids=[3],
        enable_kvcache_transpose=False,
        mamba_pool=None,
        use_mla=True,
    )


# What becomes of a batch.


@dataclass(frozen=True)
class Outcome:
    """`kind` is taken, declined, untouched, refused or not applicable."""

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


TAKEN = Outcome("taken")


def declined(reason: str) -> Outcome:
    """`reason` as counted in the backend's prefill_declines, or for all batches."""
    return Outcome("declined", reason)


def untouched(reason: str) -> Outcome:
    """The hook is not asked, since SGLang runs other code for the batch."""
    return Outcome("untouched", reason)


def refused(reason: str) -> Outcome:
    """An error before anything is written; `reason` is found in its message."""
    return Outcome("refused", reason)


def not_applicable(reason: str) -> Outcome:
    return Outcome("not applicable", reason)


@dataclass(frozen=True)
class Case:
    """A kind of batch, how to make it, and what becomes of it on each backend."""

    name: str
    title: str
    run: Run
    tokenspeed_mla: Outcome = TAKEN
    trtllm_mla: Outcome = TAKEN
    # Where the patched SGLang finds FlashInfer's RoPE.
    flashinfer: bool = False

    def outcome(self, backend: str) -> Outcome:
        return getattr(self, backend)

    def test(self, backend: str) -> Optional[str]:
        """The function in test_every_batch.py that runs it on this backend."""
        kind = self.outcome(backend).kind
        return None if kind == "not applicable" else f"test_{kind}"


FP8_ONLY = not_applicable("starts with an fp8_e4m3 cache only")
BF16_ONLY = not_applicable("its kernel gives BF16, whatever the model is")
PREFIX_BY_MHA = {"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1"}
CHUNKS = dict(extend_lens=[5, 1, 3], prefix_lens=[12, 0, 7])
# FlashInfer's kernels are for models' dimensions; its RoPE goes in steps of 16.
FOR_FLASHINFER = Dims.deepseek_v3(2)


def _both(name: str, title: str, run: Run, outcome: Outcome = TAKEN, **kwargs) -> Case:
    return Case(name, title, run, outcome, outcome, **kwargs)


def _dims(name: str, title: str, dims: Dims) -> Case:
    batch = dict(extend_lens=[3, 2], prefix_lens=[4, 0], chunks=1)
    return _both(name, title, Run(env=dict(dims=dims), batch=batch))


def _heads(count: int) -> Case:
    title = f"a tensor-parallel shard with {count} head{'s' * (count > 1)}"
    return _dims(f"heads-{count}", title, Dims.tiny(heads=count))


CASES = [
    # Wrappers round a backend
    _both(
        "hybrid-prefill-decode",
        "different prefill and decode backends, this one for prefill",
        Run(batch=CHUNKS, how=functools.partial(wrapped, wrap=hybrid)),
    ),
    _both(
        "hybrid-decode-only",
        "different prefill and decode backends, this one for decode",
        Run(
            env=dict(prefill_attention_backend="fa4"),
            batch=CHUNKS,
            how=other_prefill_backend,
        ),
        untouched("the prefill backend has no hook"),
    ),
    _both(
        "tbo-parent",
        "two-batch overlap, a batch that is not split",
        Run(batch=CHUNKS, how=functools.partial(wrapped, wrap=tbo_parent)),
    ),
    _both(
        "tbo-children",
        "two-batch overlap, split between requests",
        Run(
            batch=dict(extend_lens=[5, 2, 3], prefix_lens=[4, 0, 6]),
            how=overlapped,
        ),
    ),
    _both(
        "tbo-children-split-request",
        "two-batch overlap, split inside a request",
        Run(batch=dict(extend_lens=[9, 2]), how=overlapped),
    ),
    _both(
        "tbo-children-padded",
        "two-batch overlap of a padded batch",
        Run(
            batch=dict(extend_lens=[4, 2, 2], prefix_lens=[4, 0, 6], pad_rows=1),
            how=overlapped,
        ),
    ),
    _both(
        "hybrid-linear",
        "a full-attention layer of a hybrid-linear model",
        Run(batch=CHUNKS, how=functools.partial(wrapped, wrap=linear)),
    ),
    _both(
        "nested-linear-hybrid",
        "hybrid-linear round different prefill and decode backends",
        Run(batch=CHUNKS, how=functools.partial(wrapped, wrap=linear_of_hybrid)),
    ),
    _both(
        "nested-hybrid-linear",
        "different prefill and decode backends, each hybrid-linear",
        Run(batch=CHUNKS, how=functools.partial(wrapped, wrap=hybrid_of_linear)),
    ),
    _both(
        "nested-tbo-linear-hybrid",
        "two-batch overlap round hybrid-linear round two backends",
        Run(
            batch=CHUNKS,
            how=functools.partial(wrapped, wrap=tbo_of_linear_of_hybrid),
        ),
    ),
    _both(
        "nested-hybrid-tbo",
        "two-batch overlap as the prefill backend of two",
        Run(batch=CHUNKS, how=functools.partial(wrapped, wrap=hybrid_of_tbo)),
    ),
    # Kinds of prefill
    _both(
        "chunked-prefill-first",
        "first chunk of a chunked prefill",
        Run(batch=dict(extend_lens=[16])),
    ),
    _both(
        "chunked-prefill-middle",
        "middle chunk of a chunked prefill",
        Run(batch=dict(extend_lens=[16], prefix_lens=[16], chunks=1)),
    ),
    _both(
        "chunked-prefill-last",
        "last chunk of a chunked prefill, over several prefix chunks",
        Run(batch=dict(extend_lens=[5], prefix_lens=[32], chunks=4)),
    ),
    _both(
        "chunked-prefill-sequence",
        "first, middle and last chunk after one another on one cache",
        Run(
            batch=dict(extend_lens=[19]),
            how=functools.partial(chunk_by_chunk, sizes=(8, 8, 3)),
        ),
    ),
    _both(
        "prefix-cache-hits",
        "prefix-cache hits of different lengths",
        Run(batch=dict(extend_lens=[5, 3, 2], prefix_lens=[16, 3, 9], chunks=2)),
    ),
    _both(
        "prefix-of-some",
        "no prefix in some requests of the batch (rows without keys)",
        Run(batch=dict(extend_lens=[5, 3, 2, 1], prefix_lens=[0, 14, 0, 2], chunks=3)),
    ),
    _both(
        "mixed-lengths",
        "requests of very different lengths",
        Run(batch=dict(extend_lens=[40, 1, 7, 2], prefix_lens=[0, 65, 1, 0])),
    ),
    _both(
        "one-token-requests",
        "requests of one token, with a prefix and without",
        Run(batch=dict(extend_lens=[1, 1, 1], prefix_lens=[0, 8, 5], chunks=2)),
    ),
    _both(
        "one-token",
        "a batch of one token",
        Run(batch=dict(extend_lens=[1])),
    ),
    _both(
        "mixed-chunk",
        "decodes mixed into a chunk of prefill",
        Run(
            batch=dict(extend_lens=[7, 1, 1], prefix_lens=[8, 12, 3], chunks=2),
            how=with_decodes,
        ),
    ),
    _both(
        "idle-rank",
        "empty batch of a data-parallel rank",
        Run(batch=dict(extend_lens=[])),
        untouched("the layer returns before its prepare step"),
    ),
    # Padding and memory
    _both(
        "dp-padding",
        "data-parallel padding, in memory full of NaN",
        Run(batch=dict(extend_lens=[5, 3], pad_rows=5), how=in_nan_memory),
    ),
    _both(
        "dp-padding-prefix",
        "data-parallel padding over prefix chunks, in memory full of NaN",
        Run(batch={**CHUNKS, "chunks": 3, "pad_rows": 4}, how=in_nan_memory),
    ),
    _both(
        "nan-memory",
        "no padding, in memory full of NaN",
        Run(batch={**CHUNKS, "chunks": 2}, how=in_nan_memory),
    ),
    # Switches and graphs of the server
    _both(
        "no-chunked-prefix-cache",
        "chunked prefix cache disabled, no prefix",
        Run(env=dict(disable_chunked_prefix_cache=True)),
    ),
    _both(
        "no-chunked-prefix-cache-prefix",
        "chunked prefix cache disabled, prefix in the batch",
        Run(
            env=dict(dims=FOR_FLASHINFER, disable_chunked_prefix_cache=True),
            batch=CHUNKS,
            how=prepare_only,
            tune=absorb_weights,
        ),
        untouched("MLA path"),
    ),
    _both(
        "piecewise-graph",
        "inside a piecewise CUDA graph",
        Run(
            env=dict(dims=FOR_FLASHINFER),
            how=functools.partial(prepare_only, around=enable_piecewise_cuda_graph),
            tune=absorb_weights,
        ),
        untouched("MLA path"),
    ),
    _both(
        "forward-context",
        "eager, inside the forward context of a captured prefill",
        Run(how=functools.partial(in_forward_context, breakable=False)),
        declined("CUDA graph"),
    ),
    _both(
        "breakable-graph",
        "inside a breakable CUDA graph",
        Run(
            how=functools.partial(in_forward_context, breakable=True),
        ),
        declined("CUDA graph"),
    ),
    # Other attention
    _both(
        "decode",
        "decode",
        Run(
            env=dict(dims=FOR_FLASHINFER),
            batch=dict(extend_lens=[1, 1], prefix_lens=[9, 4]),
            how=functools.partial(absorbed, mode="DECODE"),
            tune=absorb_weights,
        ),
        untouched("MLA path"),
    ),
    _both(
        "target-verify",
        "speculative target-verify",
        Run(
            env=dict(dims=FOR_FLASHINFER, speculative_num_draft_tokens=3),
            batch=dict(extend_lens=[3, 3], prefix_lens=[9, 4]),
            how=functools.partial(absorbed, mode="TARGET_VERIFY"),
            tune=absorb_weights,
        ),
        untouched("MLA path"),
    ),
    _both(
        "draft-extend",
        "speculative draft-extend",
        Run(
            env=dict(dims=FOR_FLASHINFER),
            batch=dict(extend_lens=[3, 2], prefix_lens=[9, 4]),
            how=functools.partial(absorbed, mode="DRAFT_EXTEND"),
            tune=absorb_weights,
        ),
        untouched("MLA path"),
    ),
    _both(
        "mha",
        "MHA of another backend",
        Run(env=dict(prefill_attention_backend="aiter"), how=other_prefill_backend),
        untouched("the prefill backend has no hook"),
    ),
    _both(
        "mha-one-shot",
        "MHA_ONE_SHOT of another backend, over a prefix",
        Run(
            env=dict(prefill_attention_backend="fa3"),
            batch=CHUNKS,
            how=other_prefill_backend,
            environ=PREFIX_BY_MHA,
        ),
        untouched("the prefill backend has no hook"),
    ),
    _both(
        "one-shot-prefix",
        "MHA_ONE_SHOT chosen for this backend, over a prefix",
        Run(
            env=dict(prefill_attention_backend="fa3"),
            batch=dict(extend_lens=[5, 3], prefix_lens=[4, 0]),
            environ=PREFIX_BY_MHA,
        ),
        declined("one-shot attention over a prefix"),
    ),
    _both(
        "one-shot",
        "MHA_ONE_SHOT chosen for this backend, no prefix",
        Run(env=dict(prefill_attention_backend="fa3")),
    ),
    _both(
        "own-prepare",
        "a model with a prepare step of its own (Sarvam), over prefix chunks",
        Run(
            env=dict(dims=replace(Dims.tiny(), q_lora=None))
            | dict(prefill_attention_backend="fa3"),
            batch={**CHUNKS, "chunks": 2},
            how=own_prepare,
        ),
        untouched("BF16 operands are quantized at the kernel call"),
    ),
    Case(
        "own-prepare-scales",
        "the same with k_scale and v_scale",
        Run(
            env=dict(dims=replace(Dims.tiny(), q_lora=None))
            | dict(prefill_attention_backend="fa3", k_scale=0.3, v_scale=1.7),
            batch={**CHUNKS, "chunks": 2},
            how=own_prepare,
        ),
        not_applicable("its kernel takes no scales"),
        untouched("BF16 operands are quantized at the kernel call"),
    ),
    # Models
    _both(
        "deepseek-v3",
        "DeepSeek-V3 dimensions",
        Run(
            env=dict(dims=Dims.deepseek_v3(2)),
            batch=dict(extend_lens=[5, 3], prefix_lens=[8, 0], chunks=1),
        ),
    ),
    _dims("v2-lite", "DeepSeek-V2-Lite dimensions (no q_lora)", Dims.v2_lite(2)),
    _dims("glm", "GLM-4.7-Flash and GLM-5 dimensions", Dims.glm_4_7_flash(5)),
    _dims("mistral-4", "Mistral 4 dimensions", Dims.mistral4(4)),
    _dims("odd-dims", "dimensions that are no powers of two", Dims.odd(3)),
    *(_heads(count) for count in (1, 2, 5, 8, 10, 16)),
    _both(
        "no-rope",
        "a layer without RoPE",
        Run(env=dict(rope=None), batch={**CHUNKS, "chunks": 2}),
    ),
    _both(
        "neox-rope",
        "neox-style RoPE",
        Run(env=dict(is_neox=True), batch={**CHUNKS, "chunks": 2}),
    ),
    _both(
        "yarn-rope",
        "DeepSeek's YaRN RoPE",
        Run(env=dict(rope="yarn"), batch={**CHUNKS, "chunks": 2}),
    ),
    _both(
        "other-rope",
        "a rotary embedding that does more than index its table",
        Run(tune=turning_rope, batch=CHUNKS),
        declined("rotary embedding"),
    ),
    Case(
        "fp16",
        "an FP16 model",
        Run(env=dict(dtype=torch.float16), batch={**CHUNKS, "chunks": 2}),
        BF16_ONLY,
    ),
    Case(
        "fp32",
        "an FP32 model",
        Run(env=dict(dtype=torch.float32)),
        BF16_ONLY,
        declined("the model is torch.float32, not bfloat16 or float16"),
    ),
    Case(
        "scales",
        "k_scale and v_scale in the checkpoint",
        Run(
            env=dict(k_scale=0.3, v_scale=1.7),
            batch={**CHUNKS, "chunks": 2},
        ),
        refused("k_scale_float=0.3 and v_scale_float=1.7"),
    ),
    # The cache
    _both(
        "hicache",
        "HiCache layer-wise loading",
        Run(tune=loading_by_layer, batch={**CHUNKS, "chunks": 2}),
    ),
    _both(
        "moved-buffer",
        "a buffer that a memory saver or a custom memory pool placed",
        Run(tune=new_buffer, batch={**CHUNKS, "chunks": 2}),
    ),
    _both(
        "hybrid-linear-pool",
        "the MLA pool inside a hybrid-linear pool",
        # SGLang reads prefixes from a bare MLA pool only.
        Run(env=dict(pool_class=linear_pool), tune=late_layer),
    ),
    _both(
        "own-writer-pool",
        "a pool that stores rows its own way, with FlashInfer",
        Run(
            env=dict(dims=FOR_FLASHINFER, pool_class=OwnWriterPool),
            batch={**CHUNKS, "chunks": 2},
        ),
        flashinfer=True,
    ),
    _both(
        "own-writer-pool-no-flashinfer",
        "a pool that stores rows its own way, without FlashInfer",
        Run(env=dict(pool_class=OwnWriterPool), batch={**CHUNKS, "chunks": 2}),
        declined("KV pool without FlashInfer"),
    ),
    _both(
        "nsa-pool",
        "a pool of 656-byte sparse-attention rows",
        Run(env=dict(dims=Dims.deepseek_v3(1), pool_class=nsa_pool)),
        declined("KV pool"),
    ),
    Case(
        "bf16-cache",
        "BF16 cache",
        Run(
            env=dict(cache_dtype=torch.bfloat16),
            batch={**CHUNKS, "chunks": 2},
        ),
        FP8_ONLY,
        declined("the KV cache is torch.bfloat16, not torch.float8_e4m3fn"),
    ),
    Case(
        "auto-cache",
        "cache of the model's dtype (auto), FP16",
        Run(
            env=dict(cache_dtype=torch.float16, dtype=torch.float16),
            batch={**CHUNKS, "chunks": 2},
        ),
        FP8_ONLY,
        declined("the KV cache is torch.float16, not torch.float8_e4m3fn"),
    ),
    Case(
        "e5m2-cache",
        "fp8_e5m2 cache",
        Run(
            env=dict(cache_dtype=torch.float8_e5m2),
            batch={**CHUNKS, "chunks": 2},
        ),
        FP8_ONLY,
        declined("the KV cache is torch.float8_e5m2, not torch.float8_e4m3fn"),
    ),
    Case(
        "fp4-cache",
        "FP4 cache",
        Run(env=dict(cache_dtype=torch.bfloat16), tune=fp4_backend),
        FP8_ONLY,
        declined("the KV cache is torch.float4_e2m1fn_x2, not torch.float8_e4m3fn"),
    ),
    # Values
    _both(
        "beyond-448",
        "activations beyond ±448",
        Run(tune=big_activations, batch={**CHUNKS, "chunks": 2}),
    ),
    _both(
        "inf-and-nan",
        "infinity and NaN in the activations",
        Run(tune=inf_and_nan, batch={**CHUNKS, "chunks": 2}),
    ),
    # Switches of the hook
    _both(
        "composed",
        "SGLANG_MLA_FP8_PREFILL=composed, with FlashInfer",
        Run(
            env=dict(dims=FOR_FLASHINFER),
            environ={"SGLANG_MLA_FP8_PREFILL": "composed"},
            batch={**CHUNKS, "chunks": 2},
        ),
        flashinfer=True,
    ),
    _both(
        "composed-no-flashinfer",
        "SGLANG_MLA_FP8_PREFILL=composed, without FlashInfer",
        Run(environ={"SGLANG_MLA_FP8_PREFILL": "composed"}, batch=CHUNKS),
        declined("SGLANG_MLA_FP8_PREFILL=composed without FlashInfer"),
    ),
    _both(
        "position-out-of-range",
        "a position beyond the cosines, SGLANG_MLA_FP8_PREFILL_CHECK=1",
        Run(
            environ={"SGLANG_MLA_FP8_PREFILL_CHECK": "1"},
            how=functools.partial(out_of_range, name="positions"),
        ),
        refused("positions[2] = 1000000 is out of range [0, 512) in layer 0"),
    ),
    _both(
        "slot-out-of-range",
        "a cache slot out of range, SGLANG_MLA_FP8_PREFILL_CHECK=1",
        Run(
            environ={"SGLANG_MLA_FP8_PREFILL_CHECK": "1"},
            how=functools.partial(out_of_range, name="out_cache_loc"),
        ),
        refused("out_cache_loc[2] = 1000000 is out of range [0, 576) in layer 0"),
    ),
    _both(
        "off",
        "SGLANG_MLA_FP8_PREFILL=off",
        Run(
            environ={"SGLANG_MLA_FP8_PREFILL": "off"},
            batch={**CHUNKS, "chunks": 2, "pad_rows": 3},
            how=in_nan_memory,
        ),
        declined("SGLANG_MLA_FP8_PREFILL=off"),
    ),
]
DOCUMENTED = CASES
if HAS_GPU:
    # sgl_kernel's norms take no float32.
    CASES = [case for case in CASES if case.name != "fp32"]


# More runs that test_prefill_hook.py compares with the unpatched SGLang.


HOOK_RUNS: dict[str, Run] = {
    "fallback": Run(
        env=dict(dims=FOR_FLASHINFER, disable_chunked_prefix_cache=True),
        batch=CHUNKS,
        how=functools.partial(prepare_only, method="MHA_CHUNKED_KV"),
    ),
    "piecewise": Run(
        how=functools.partial(
            prepare_only, method="MHA_CHUNKED_KV", inside=enable_piecewise_cuda_graph
        ),
    ),
    "breakable": Run(
        how=functools.partial(
            prepare_only, method="MHA_CHUNKED_KV", inside=enable_breakable_cuda_graph
        ),
    ),
    "no-metadata": Run(
        how=functools.partial(prepare_only, method="MHA_CHUNKED_KV", metadata=False)
    ),
    "speculative": Run(
        how=functools.partial(
            prepare_only, method="MHA_CHUNKED_KV", mode="DRAFT_EXTEND"
        )
    ),
    "activation-dtype": Run(
        tune=other_model_dtype,
        how=functools.partial(prepare_only, method="MHA_CHUNKED_KV"),
    ),
    **{
        f"counted-{chunks}": Run(
            batch=dict(
                extend_lens=[5, 3],
                prefix_lens=[4 * chunks, 0],
                chunks=chunks or None,
            ),
            how=counted,
        )
        for chunks in (0, 1, 4)
    },
}


@functools.cache
def unpatched_results(site: Path, basetemp: Path) -> dict[str, Result]:
    """Every run of this file on the unpatched SGLang in `site`, by name and backend.

    One process runs them all, once for all test workers, whose temporary folders lie
    in one that they share.
    """
    shared = basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp
    target = shared / "unpatched.pt"
    with open(shared / "unpatched.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            runs = {
                f"{case.name}-{backend}": case.run.on(backend)
                for case in CASES
                for backend in BACKENDS
                if case.outcome(backend).kind in ("taken", "declined", "untouched")
            } | {
                f"{name}-{backend}": run.on(backend)
                for name, run in HOOK_RUNS.items()
                for backend in BACKENDS
            }
            results = harness.run_elsewhere(site, list(runs.values()))
            torch.save(dict(zip(runs, results)), target)
    return torch.load(target, weights_only=False, map_location=DEVICE)


# docs/batches.md

INTRODUCTION = """\
# Every kind of batch

*Taken*: the backend's hook prepares Q, K, V and the cache rows in FP8. *Declined*: it
leaves the batch to SGLang's own path, whose every result is then bit-identical to the
unpatched SGLang's; *untouched* is the same where SGLang does not come to the hook at
all, and *refused* an error before anything is written.

Where a batch is taken, Q, K and V without RoPE, V and the latent of the cache row have
the unpatched SGLang's bits; elements with RoPE differ from its by at most one FP8 value
and are never farther from the exact result, since SGLang rounds them to BF16 and then to
FP8, and the hook once; the attention output differs by less than {bound:.0%} (root mean
square). With `k_scale` or `v_scale`, that one FP8 value holds for all of K or V.

Activations beyond ±448, and infinity, become ±448, where the unpatched SGLang's cast
gives NaN on GPUs for everything above 464; NaN stays NaN.

A case's test is `test/unit/test_every_batch.py::TEST[CASE-BACKEND]`, which runs it on SGLang's
own classes, patched and unpatched. The attention kernels, which need SM100, are replaced
by references that take any dimensions: where the real ones do not (trtllm-gen takes Q and
K of 192 with V of 128, or 128 throughout; tokenspeed_mla 192 with 128), as for GLM's, a
case shows the preparation alone.

| case | | tokenspeed_mla | trtllm_mla | test |
|---|---|---|---|---|
"""

# Root mean square difference of the attention outputs, relative; why: test_taken.
OUTPUT_BOUND = 0.03


def batches_document() -> str:
    """The text of docs/batches.md."""
    lines = []
    for case in DOCUMENTED:
        tests = sorted({f"`{t}`" for b in BACKENDS if (t := case.test(b))})
        cells = (
            f"`{case.name}`",
            case.title,
            *(str(case.outcome(backend)) for backend in BACKENDS),
            ", ".join(tests),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION.format(bound=OUTPUT_BOUND) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(batches_document(), end="")
