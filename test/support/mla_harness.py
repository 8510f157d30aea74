"""Drives SGLang's own DeepSeek MHA prefill path, with or without a GPU.

Everything here is SGLang's: the attention module with its linears, norms and rotary
embedding, the KV pool, the request pool, the forward batch, the backends built by
their own `__init__`, the wrappers round them. What cannot run has a stand-in, see
gpu_stand_ins.py.

    env = make_env(MODELS["deepseek-v3"]._replace(heads=4), "tokenspeed_mla")
    batch = make_batch(env, extend_lens=[5, 3], prefix_lens=[8, 0], chunks=4)
    result = run_prefill(env, batch)

Nothing here asks whether the imported SGLang is patched.
"""

from __future__ import annotations

import bisect
import os
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Optional, Sequence
from unittest import mock

import sglang_internals
import torch
from gpu_stand_ins import KERNELS, KernelCall
from mla_standin import kernels
from patched_sglang import ROOT
from sglang_cpu import DEVICE, HAS_GPU
from sglang_internals import fp8_kernel, parse_graph_config, running

# The unpatched SGLang has no fp8_reference.
sys.path.append(str(ROOT / "python/sglang/jit_kernel/tests"))

import fp8_reference as reference
from fp8_reference import MLADims
from transformers import PretrainedConfig

from sglang.srt import server_args as server_args_module
from sglang.srt.batch_overlap.two_batch_overlap import (
    TboForwardBatchPreparer,
    compute_split_seq_index,
)
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.distributed import parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.hybrid_linear_attn_backend import (
    HybridLinearAttnBackend,
)
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

CACHE_DTYPE_NAMES = {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.bfloat16: "bf16",
    torch.float16: "auto",
}
# Small, with the RoPE of every model, as SGLang's kernel takes it.
TINY = MLADims(heads=4, nope=16, rope=64, v=16, lora=32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (so NaN equals the same NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8),
        b.contiguous().flatten().view(torch.uint8),
    )


@dataclass
class Env:
    """One attention layer with its pools, its backend and its server arguments."""

    dims: MLADims
    attn: DeepseekV2AttentionMLA = field(repr=False)
    runner: SimpleNamespace = field(repr=False)
    backend: Any = field(repr=False, default=None)
    # Whether what is expected of kv_b_proj is float64's, whoever multiplies.
    exact_projection: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

    @property
    def pool(self) -> MLATokenToKVPool:
        return self.runner.token_to_kv_pool

    @property
    def server_args(self):
        return self.runner.server_args

    @property
    def scales(self) -> tuple[float, float]:
        """k_scale and v_scale of the checkpoint, where SGLang gives them to fa3's kernel."""
        attn = self.attn.attn_mha
        if self.server_args.attention_backend == "fa3" and not (
            sglang_internals.FA3_HAS_KV_SCALES and attn.k_scale is not None
        ):
            return 1.0, 1.0
        scales = attn.k_scale_float, attn.v_scale_float
        return tuple(1.0 if scale is None else scale for scale in scales)

    @property
    def cos_sin_cache(self) -> Optional[torch.Tensor]:
        rotary = self.attn.rotary_emb
        return None if rotary is None else rotary.cos_sin_cache

    @property
    def is_neox(self) -> bool:
        return getattr(self.attn.rotary_emb, "is_neox_style", False)

    def activate(self) -> None:
        """Make this environment's server arguments the process's."""
        sglang_internals.publish(self.server_args)


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


def make_server_args(backend: str, **overrides):
    """Real ServerArgs; the model path "dummy" skips only its checks of a model."""
    args = server_args_module.ServerArgs(model_path="dummy", device=DEVICE)
    settings = dict(
        attention_backend=backend,
        # SGLang's name of the backend that prefills where cutedsl_mla decodes.
        prefill_attention_backend=(
            "trtllm_mla" if backend == "cutedsl_mla" else backend
        ),
        decode_attention_backend=backend,
    )
    if hasattr(args, "disable_piecewise_cuda_graph"):  # before 0.5.14
        settings["disable_piecewise_cuda_graph"] = True
    for name, value in {**settings, **overrides}.items():
        if not hasattr(args, name):
            raise AttributeError(f"ServerArgs has no field {name!r}")
        setattr(args, name, value)
    parse_graph_config(args)
    return args


def make_attention(
    dims: MLADims,
    dtype: torch.dtype,
    rope: Optional[str],
    is_neox: bool,
    max_position: int,
    q_lora: Optional[int],
    hidden: int,
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
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(DEVICE):
            attn = DeepseekV2AttentionMLA(
                config=config,
                hidden_size=hidden,
                num_heads=dims.heads,
                qk_nope_head_dim=dims.nope,
                qk_rope_head_dim=dims.rope,
                v_head_dim=dims.v,
                q_lora_rank=q_lora,
                kv_lora_rank=dims.lora,
                rope_scaling=scaling,
                max_position_embeddings=max_position,
                reduce_results=False,
                layer_id=0,
                skip_rope=rope is None,
            )
    finally:
        torch.set_default_dtype(default_dtype)
    if attn.rotary_emb is not None:
        # SGLang shares one among all layers of the process, and its choice without a
        # GPU is another method.
        attn.rotary_emb._forward_method = attn.rotary_emb.forward_cuda
    generator = torch.Generator().manual_seed(0)
    for name, weight in attn.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if "layernorm" in name:
            values = 1 + 0.1 * values
        else:
            values = values * weight.shape[-1] ** -0.5
        weight.data.copy_(values.to(weight.dtype))
    return attn.eval()


def make_env(
    dims: MLADims,
    backend: str = "tokenspeed_mla",
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype = torch.float8_e4m3fn,
    rope: Optional[str] = "default",
    is_neox: bool = False,
    k_scale: Optional[float] = None,
    v_scale: Optional[float] = None,
    q_lora: Optional[int] = 64,
    hidden: int = 128,
    slots: int = 512,
    page_size: int = 64,
    max_requests: int = 8,
    max_context: int = 512,
    pool_class: Callable[..., Any] = MLATokenToKVPool,
    modify_layer: Callable[[torch.nn.Module], None] = lambda attn: None,
    **server_args,
) -> Env:
    """Build the layer, its pools and its backend, each by its own `__init__`."""
    server_args = dict(
        page_size=page_size,
        **{"kv_cache_dtype": CACHE_DTYPE_NAMES[cache_dtype], **server_args},
    )
    # For the layer a GPU's, as "cpu" allows no other RoPE than yarn.
    args = make_server_args(backend, **server_args, device="cuda")
    sglang_internals.publish(args)
    _init_distributed()
    attn = make_attention(dims, dtype, rope, is_neox, max_context, q_lora, hidden)
    args = make_server_args(backend, **server_args)
    sglang_internals.publish(args)
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is not None:
            scale = torch.tensor(value, dtype=torch.float32, device=DEVICE)
            for layer in (attn.attn_mha, attn.attn_mqa):
                setattr(layer, name, scale)
                setattr(layer, f"{name}_float", value)
    modify_layer(attn)
    pool = pool_class(
        size=slots,
        page_size=page_size,
        dtype=cache_dtype,
        kv_lora_rank=dims.lora,
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
        attention_arch=AttentionArch.MLA,
        is_encoder_decoder=False,
        is_local_attention_model=False,
        hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]),
        hf_text_config=SimpleNamespace(num_attention_heads=dims.heads),
        num_attention_heads=dims.heads,
        get_num_kv_heads=lambda tp_size: dims.heads // tp_size,
        head_dim=dims.nope + dims.rope,
        kv_lora_rank=dims.lora,
        qk_nope_head_dim=dims.nope,
        qk_rope_head_dim=dims.rope,
        v_head_dim=dims.v,
        scaling=attn.scaling,
        context_len=max_context,
        hidden_size=hidden,
        dtype=dtype,
    )
    sglang_internals.call(
        initialize_dp_attention, server_args=args, model_config=model_config
    )
    runner = SimpleNamespace(
        is_draft_worker=False,
        kv_cache_dtype_str=args.kv_cache_dtype,
        kv_index_translator=sglang_internals.kv_index_translator(
            req_to_token=req_to_token_pool.req_to_token,
            token_to_kv_pool_allocator=None,
            token_to_kv_pool=pool,
            page_size=page_size,
            device=DEVICE,
        ),
        max_running_requests=max_requests,
        token_to_kv_pool_allocator=None,
        model=attn,
        model_config=model_config,
        device=DEVICE,
        dtype=dtype,
        kv_cache_dtype=cache_dtype,
        page_size=page_size,
        tp_size=1,
        attn_cp_size=1,
        # From 0.5.15 on the sizes are here.
        ps=SimpleNamespace(attn_cp_size=1, tp_size=1),
        sliding_window_size=None,
        req_to_token_pool=req_to_token_pool,
        token_to_kv_pool=pool,
        server_args=args,
    )
    env = Env(dims, attn, runner)
    env.backend = runner.attn_backend = make_backend(env, backend)
    return env


def make_backend(env: Env, name: str):
    """Another backend on the same pools, as two-batch overlap builds its children."""
    env.activate()
    return sglang_internals.backend_class(name)(env.runner)


def wrap_tbo(primary, children: Sequence[Any]) -> TboAttnBackend:
    return TboAttnBackend(primary, list(children))


def wrap_hybrid(env: Env, prefill, decode) -> HybridAttnBackend:
    return HybridAttnBackend(env.runner, prefill_backend=prefill, decode_backend=decode)


class _LinearBackend(AttentionBackend):
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

    def chunk_lens(self) -> list[list[int]]:
        """Keys per chunk and request, as SGLang splits the prefixes."""
        longest = max(self.prefix_lens, default=0)
        if longest == 0:
            return []
        size = longest
        if self.chunk_capacity is not None:
            size = self.chunk_capacity // len(self.prefix_lens)
        return [
            [min(max(p - start, 0), size) for p in self.prefix_lens]
            for start in range(0, longest, size)
        ]


def cumulate(lens: Sequence[int]) -> list[int]:
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
    paged: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch with shuffled slots and a cache full of random rows.

    `paged` gives each request one page, as the absorbed path reads them; `chunks` forces the longest prefix into that many chunks; `pad_rows` adds the rows
    of data-parallel padding. No requests make the idle batch of a rank without work.
    """
    extend_lens = list(extend_lens)
    prefix_lens = list(prefix_lens or [0] * len(extend_lens))
    if len(prefix_lens) != len(extend_lens):
        raise ValueError(f"{len(extend_lens)} extend_lens, {len(prefix_lens)} prefixes")
    generator = torch.Generator().manual_seed(seed)
    pool, page = env.pool, env.pool.page_size
    tokens, hidden_size = sum(extend_lens), env.runner.model_config.hidden_size
    needed = tokens + sum(prefix_lens)
    if needed > pool.size:
        raise ValueError(f"{needed} tokens do not fit in {pool.size} slots")
    slots = page + torch.randperm(pool.size, generator=generator)[:needed]
    new, *old = slots.split([tokens, *prefix_lens])
    if paged:
        pages = (page * (i + 1) + torch.arange(page) for i in range(len(extend_lens)))
        spans = [*zip(pages, prefix_lens, extend_lens)]
        old = [slots[:p] for slots, p, _ in spans]
        new = torch.cat([slots[p : p + n] for slots, p, n in spans])
    rows = torch.randn(pool.kv_buffer[0].shape, generator=generator)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    # What data-parallel padding holds is arbitrary: ones, so that nothing cancels.
    hidden = torch.cat([hidden, torch.ones(pad_rows, hidden_size)])
    positions = [torch.arange(p, p + n) for p, n in zip(prefix_lens, extend_lens)]
    positions.append(torch.zeros(pad_rows, dtype=torch.int64))
    capacity = None
    if chunks is not None and any(prefix_lens):
        capacity = -(-max(prefix_lens) // chunks) * len(prefix_lens)
    return Batch(
        extend_lens=extend_lens,
        prefix_lens=prefix_lens,
        pad_rows=pad_rows,
        chunk_capacity=capacity,
        hidden=hidden.to(env.dtype).to(DEVICE),
        positions=torch.cat(positions).to(DEVICE),
        out_cache_loc=torch.cat([new, new.new_zeros(pad_rows)]).to(DEVICE),
        prefix_slots=[some.to(DEVICE) for some in old],
        cache_before=rows.to(pool.dtype).view(pool.store_dtype).to(DEVICE),
    )


def make_forward_batch(env: Env, batch: Batch, backend: Any = None) -> ForwardBatch:
    """A fresh real ForwardBatch, padded by SGLang's own padding."""
    bs = len(batch.extend_lens)
    ids = torch.arange(1, bs + 1)
    new = batch.out_cache_loc[: batch.tokens].split(batch.extend_lens)
    req_to_token_pool = env.runner.req_to_token_pool
    for i in range(bs):
        row = torch.cat([batch.prefix_slots[i], new[i]]).to(torch.int32)
        req_to_token_pool.req_to_token[i + 1, : row.numel()] = row
    seq_lens = torch.tensor(
        [p + n for p, n in zip(batch.prefix_lens, batch.extend_lens)],
        dtype=torch.int64,
    )

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    forward_batch = sglang_internals.call(
        ForwardBatch,
        forward_mode=ForwardMode.EXTEND if bs else ForwardMode.IDLE,
        batch_size=bs,
        input_ids=torch.zeros(batch.tokens, dtype=torch.int64, device=DEVICE),
        req_pool_indices=ids.to(DEVICE),
        seq_lens=seq_lens.to(DEVICE),
        seq_lens_cpu=seq_lens,
        seq_lens_sum=int(seq_lens.sum()),
        out_cache_loc=batch.out_cache_loc[: batch.tokens],
        out_cache_loc_is_physical=True,
        positions=batch.positions[: batch.tokens],
        extend_num_tokens=batch.tokens,
        extend_seq_lens=int32(batch.extend_lens),
        extend_prefix_lens=int32(batch.prefix_lens),
        extend_start_loc=int32(cumulate(batch.extend_lens)[:-1]),
        extend_prefix_lens_cpu=list(batch.prefix_lens),
        extend_seq_lens_cpu=list(batch.extend_lens),
        extend_logprob_start_lens_cpu=[0] * bs,
        lora_ids=[None] * bs,
        req_to_token_pool=req_to_token_pool,
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

    Empty where there is none: an idle batch has neither q, k, v nor an attention output.
    """

    cache: torch.Tensor
    output: Optional[torch.Tensor]
    calls: list[KernelCall]
    late_compiles: list[tuple]
    counts: Counter
    method: str = ""
    q: Optional[torch.Tensor] = None
    k: Optional[torch.Tensor] = None
    v: Optional[torch.Tensor] = None
    attn_output: Optional[torch.Tensor] = None


def result_of(env: Env, output: Optional[torch.Tensor], **parts) -> Result:
    """With what the stand-ins saw since they were cleared."""
    return Result(
        cache=env.pool.kv_buffer[0].clone(),
        output=output,
        calls=KERNELS.calls,
        late_compiles=kernels.RECORD.late_compiles,
        counts=KERNELS.counts,
        **parts,
    )


@contextmanager
def chunk_capacity(tokens: Optional[int]) -> Iterator[None]:
    """SGLang's own limit of prefix tokens in one chunk, for the time of a run."""
    name = envs.SGLANG_MAX_KV_CHUNK_CAPACITY.name
    with mock.patch.dict(os.environ, {} if tokens is None else {name: str(tokens)}):
        yield


def prepare(env: Env, forward_batch: ForwardBatch, hidden: torch.Tensor):
    """The layer's prepare step, chosen by SGLang's own dispatch."""
    context = sglang_internals.layer_boundary.get_attn_tp_context()
    context.init_context(env.attn.q_lora_rank, False)
    with context.maybe_input_scattered(forward_batch):
        context.set_attn_inputs(
            sglang_internals.layer_boundary.AttentionInputs(
                hidden, forward_batch, env.attn.prepare_qkv_latent
            )
        )
        return env.attn.forward_prepare(
            positions=forward_batch.positions,
            hidden_states=hidden,
            forward_batch=forward_batch,
            zero_allocator=None,
        )


def start_batch(env: Env, batch: Batch, backend: Any = None) -> ForwardBatch:
    """The process and the cache as the batch finds them."""
    env.activate()
    env.pool.kv_buffer[0].copy_(batch.cache_before)
    return make_forward_batch(env, batch, backend)


def run_prefill(
    env: Env,
    batch: Batch,
    *,
    backend: Any = None,
    around: Callable[[ForwardBatch], Any] = lambda forward_batch: nullcontext(),
    inside: Callable[[ForwardBatch], Any] = lambda forward_batch: nullcontext(),
    attention: bool = True,
) -> Result:
    """Run the whole attention layer, as the model runner and the model do.

    `backend` may be a wrapper. `around` may give a context manager to run within (a
    graph context, a switch, memory full of NaN), `inside` one for what follows the
    backend's metadata; without `attention` the prepare step alone runs.
    """
    backend = backend or env.backend
    forward_batch = start_batch(env, batch, backend)
    with (
        running(backend),
        chunk_capacity(batch.chunk_capacity),
        around(forward_batch),
    ):
        if forward_batch.batch_size > 0:
            backend.init_forward_metadata(forward_batch)
        with inside(forward_batch):
            return run_layer(env, forward_batch, batch.hidden, attention)


def run_overlapped(env: Env, batch: Batch, backend: TboAttnBackend) -> list[Result]:
    """Run the two halves of a batch, split where SGLang's scheduler splits it."""
    parent = start_batch(env, batch, backend)
    parent.tbo_split_seq_index = compute_split_seq_index(
        parent.forward_mode, batch.rows, batch.extend_lens, None
    )
    results = []
    with chunk_capacity(batch.chunk_capacity), running(backend):
        TboForwardBatchPreparer.prepare(parent)
        backend.init_forward_metadata(parent)
        for own, child in zip(backend.children, parent.tbo_children):
            rows = slice(*child.tbo_parent_token_range)
            with running(own):
                results.append(run_layer(env, child, batch.hidden[rows]))
    return results


def run_layer(
    env: Env, forward_batch: ForwardBatch, hidden: torch.Tensor, attention: bool = True
) -> Result:
    """Run the layer on a forward batch whose metadata stands."""
    KERNELS.clear()
    seen = []
    handle = env.attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().clone())
    )
    try:
        with torch.no_grad():
            state = prepare(env, forward_batch, hidden.clone())
            inner, parts = state[3], {}
            if inner:
                q, k, v = (x if x is None else x.detach().clone() for x in inner[:3])
                parts = dict(method=state[1].name, q=q, k=k, v=v)
            output = (
                env.attn.forward_core(state).detach().clone() if attention else None
            )
    finally:
        handle.remove()
    if seen:
        parts["attn_output"] = seen[0].view(-1, env.dims.heads, env.dims.v)
    return result_of(env, output, **parts)


@dataclass(frozen=True)
class Scenario:
    """One run: what `make_env` and `make_batch` get, and what is special.

    `how` runs it; `change` changes the layer's pools or backend before; `environ` is set
    while the layer and its backend are built. A prefix of one token is enough for fa3 to
    attend by MHA, as one of 8192 tokens in a server.
    """

    env: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=lambda: dict(extend_lens=[5, 3]))
    how: Callable[[Env, Batch], Result] = run_prefill
    change: Optional[Callable[[Env], None]] = None
    environ: dict[str, str] = field(default_factory=dict)

    def on(self, backend: str) -> Scenario:
        return replace(self, env={**self.env, "backend": backend})

    def build(self) -> tuple[Env, Batch]:
        threshold = {"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1"}
        with mock.patch.dict(os.environ, {**threshold, **self.environ}):
            env = make_env(**{"dims": TINY, **self.env})
            if self.change is not None:
                self.change(env)
        return env, make_batch(env, **self.batch)

    def run(self) -> Result:
        return self.how(*self.build())


def _q_b_proj(env: Env, q_a: torch.Tensor) -> torch.Tensor:
    """[n, h * (nope + rope)], likewise: in float64 where the backend takes the weight."""
    proj = env.attn.q_b_proj
    if (
        env.exact_projection
        or env.backend._q_gemm_weight(env.attn, len(q_a)) is not None
    ):
        return (
            q_a.double()
            @ reference.times_scales(
                proj.weight, getattr(proj, "weight_scale_inv", None)
            ).T
        )
    return proj(q_a)[0]


def _kv_b_proj(env: Env, kv_a: torch.Tensor, cached: bool = False) -> torch.Tensor:
    """[n, h, nope + v]: the layer's own, in its dtype, or where the backend takes the
    weight for its GEMM, in float64, of the latent as SGLang quantizes it for a weight in
    FP8, or as it is in the cache."""
    proj = env.attn.kv_b_proj
    scale = getattr(proj, "weight_scale_inv", None)
    if not env.exact_projection and not env.backend._gemm_weight(proj, len(kv_a)):
        kv = proj(kv_a)[0]
    else:
        if scale is not None and (not cached or env.scales[0] != 1):
            quantize = fp8_kernel.sglang_per_token_group_quant_fp8
            kv_a = reference.times_scales(*quantize(kv_a, 128))
        kv = kv_a.double() @ reference.times_scales(proj.weight, scale).T
    return kv.view(-1, env.dims.heads, env.dims.nope + env.dims.v)


def layer_inputs(env: Env, batch: Batch) -> dict[str, Any]:
    """The arguments of `mla_prefill_quantize_fp8` for every row of the batch, but for
    the cache, from the layer's own linears and norms."""
    attn, dims = env.attn, env.dims
    with torch.no_grad():
        if attn.q_lora_rank is None:
            q = attn.q_proj(batch.hidden)[0]
            latent = attn.kv_a_proj_with_mqa(batch.hidden)[0]
        else:
            latent = attn.fused_qkv_a_proj_with_mqa(batch.hidden)[0]
            q, latent = latent.split([attn.q_lora_rank, dims.lora + dims.rope], dim=-1)
            q = _q_b_proj(env, attn.q_a_layernorm(q))
        kv_a, k_pe = latent.split([dims.lora, dims.rope], dim=-1)
        kv_a = attn.kv_a_layernorm(kv_a)
        kv = _kv_b_proj(env, kv_a)
    return dict(
        q=q.view(-1, dims.heads, dims.nope + dims.rope),
        kv=kv,
        kv_a=kv_a,
        k_pe=k_pe.unsqueeze(1),
        positions=batch.positions,
        cos_sin_cache=env.cos_sin_cache,
        is_neox=env.is_neox,
        qk_nope_head_dim=dims.nope,
        cache_loc=batch.out_cache_loc,
    )


def _scale_invs(env: Env) -> list[float]:
    """As the kernels get them: in float32."""
    return torch.tensor([1 / scale for scale in env.scales]).tolist()


def expected(env: Env, batch: Batch) -> reference.PrefillResult:
    """q, k, v and the cache rows by definition, in float64, for every row of the batch;
    k and v are divided by their scales."""
    return reference.expected_prefill(layer_inputs(env, batch), *_scale_invs(env))


def _cached_kv(
    env: Env, cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of cached rows, in float64, by the layer's own projection; divided by their
    scales."""
    dims, (k_scale_inv, v_scale_inv) = env.dims, _scale_invs(env)
    rows = cache.view(env.pool.dtype)[slots, 0].to(env.dtype)
    latent, k_pe = rows.split([dims.lora, dims.rope], dim=-1)
    with torch.no_grad():
        kv = _kv_b_proj(env, latent.contiguous(), cached=True)
    k_nope, v = kv.split([dims.nope, dims.v], dim=-1)
    k_pe = k_pe.unsqueeze(1).expand(-1, dims.heads, -1)
    k = torch.cat([k_nope, k_pe], dim=-1).double()
    return k * k_scale_inv, v.double() * v_scale_inv


def expected_chunks(env: Env, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """k and v of each prefix chunk, of what the cache holds before the batch."""
    done, chunks = [0] * len(batch.prefix_lens), []
    for lens in batch.chunk_lens():
        slots = [s[d : d + n] for s, d, n in zip(batch.prefix_slots, done, lens)]
        done = [d + n for d, n in zip(done, lens)]
        chunks.append(_cached_kv(env, batch.cache_before, torch.cat(slots)))
    return chunks


def expected_causal(
    env: Env, batch: Batch, result: Result
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v of each causal call of the kernel, in float64.

    q is of the call's tokens. So are k and v, but where MHA_ONE_SHOT attends to a prefix
    in the same call: they are then of all that the requests have in the cache afterwards.
    """
    exact, starts, calls, row = expected(env, batch), cumulate(batch.extend_lens), [], 0
    new = batch.out_cache_loc[: batch.tokens].split(batch.extend_lens)
    slots = [torch.cat(both) for both in zip(batch.prefix_slots, new)]
    for call in result.calls:
        if not call.causal:
            continue
        ends = [row + n for n in call.cu_q]
        q, k, v = (x[row : ends[-1]] for x in exact[:3])
        cached = []
        for first, end in zip(ends, ends[1:]):
            i = bisect.bisect(starts, first) - 1
            cached.append(slots[i][: batch.prefix_lens[i] + end - starts[i]])
        cached = torch.cat(cached)
        if result.method == "MHA_ONE_SHOT" and len(cached) > len(q):
            k, v = _cached_kv(env, result.cache, cached)
        calls.append((q, k, v))
        row = ends[-1]
    return calls


def expected_attention(
    env: Env, batch: Batch, result: Result, rounded: bool = True
) -> torch.Tensor:
    """Attention of the real tokens over prefix and extension, in float64, of operands
    rounded to FP8 or, with `rounded` False, as they are before."""
    k_scale, v_scale = env.scales

    def operand(x: torch.Tensor) -> torch.Tensor:
        return reference.round_to_fp8(x, torch.float8_e4m3fn) if rounded else x

    def attention(q, k, v, cu_q, cu_kv) -> torch.Tensor:
        out, _ = kernels.ragged_attention(
            *map(operand, (q, k, v)),
            cu_q,
            cu_kv,
            env.attn.scaling * k_scale,
            causal=True,
            dtype=torch.float64,
        )
        return out * v_scale

    if result.method == "MHA_ONE_SHOT":
        calls = [call for call in result.calls if call.causal]
        parts = zip(expected_causal(env, batch, result), calls)
        return torch.cat([attention(*x, call.cu_q, call.cu_kv) for x, call in parts])
    exact, n = expected(env, batch), batch.tokens
    keys = [[] for _ in batch.prefix_lens]
    values = [[] for _ in batch.prefix_lens]
    parts = [*zip(expected_chunks(env, batch), batch.chunk_lens())]
    parts.append(((exact.k[:n], exact.v[:n]), batch.extend_lens))
    for (k, v), lens in parts:
        for i, (some_k, some_v) in enumerate(zip(k.split(lens), v.split(lens))):
            keys[i].append(some_k)
            values[i].append(some_v)
    cu_kv = cumulate([sum(map(len, request)) for request in keys])
    k, v = torch.cat(sum(keys, [])), torch.cat(sum(values, []))
    return attention(exact.q[:n], k, v, cumulate(batch.extend_lens), cu_kv)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square error over root mean square."""
    actual, wanted = actual.double(), wanted.double()
    return ((actual - wanted).norm() / wanted.norm()).item()
