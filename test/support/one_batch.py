"""The hook on the classes of whichever release is imported: one batch, with all that a
release may have elsewhere or do otherwise.

    python one_batch.py trtllm_mla_backend:TRTLLMMLABackend...

Real are the model's MHA methods, the KV pools, the rotary embedding, the backends'
classes, forward mode and contexts; weights and what needs a GPU are made up. Ends with
an AssertionError, or prints the pools that the kernel would write to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from types import ModuleType, SimpleNamespace

import sglang_cpu
import torch
from patched_sglang import ROOT

sglang_cpu.install()
# In 0.5.15 it imports a package for GPUs; nothing here uses it.
_LOGITS = ModuleType("sglang.jit_kernel.dsa.cutedsl_paged_mqa_logits")
_LOGITS.__getattr__ = lambda name: None
sys.modules[_LOGITS.__name__] = _LOGITS
sys.path.append(str(ROOT / "python/sglang/jit_kernel/tests"))

import fp8_reference as reference

from sglang.srt import server_args
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.attention import mla_fp8_prefill as hook
from sglang.srt.layers.attention import mla_fp8_prefill_internals as internals
from sglang.srt.layers.attention import trtllm_mla_backend
from sglang.srt.layers.rotary_embedding import base as rotary_base
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha

DIMS = reference.MLADims(heads=4, nope=16, rope=64, v=16, lora=32)
TOKENS, PADDING, SLOTS, PAGE = 7, 3, 192, 64
FP8 = torch.float8_e4m3fn
SCALES = 0.5, 4.0
# What SGLang's own packing of a prefix chunk gives.
OWN_CHUNK = torch.empty(0), torch.empty(0)


BESIDE_A_HOOK = hasattr(hook, "prepare_fp8_prefill")


class Layer(forward_mha.DeepseekMHAForwardMixin):
    """The MHA methods of SGLang's attention layer, and the projections as given."""

    q_lora_rank, layer_id, dcp_size, use_dsa, use_nsa = None, 0, 1, False, False
    kv_lora_rank, qk_rope_head_dim = DIMS.lora, DIMS.rope
    qk_nope_head_dim, v_head_dim, num_local_heads = DIMS.nope, DIMS.v, DIMS.heads
    qk_head_dim = DIMS.nope + DIMS.rope

    def __init__(self, inputs: dict, rotary_emb, attn_mha):
        latent = torch.cat([inputs["kv_a"], inputs["k_pe"][:, 0]], dim=-1)
        self.rotary_emb, self.attn_mha = rotary_emb, attn_mha
        self.q_proj = lambda hidden: (inputs["q"].flatten(1), None)
        self.kv_a_proj_with_mqa = lambda hidden: (latent, None)
        self.kv_a_layernorm = torch.clone
        self.kv_b_proj = lambda kv_a: (inputs["kv"].flatten(1), None)


class Stop(Exception):
    """Raised where a test has seen enough."""


def stop(*args, **kwargs):
    raise Stop(*args)


class Attention(SimpleNamespace):
    __call__ = staticmethod(stop)


def rotary_embedding() -> rotary_base.RotaryEmbedding:
    """As it is on a GPU."""
    rotary_base._is_cuda = True
    width = DIMS.rope
    rotary = rotary_base.RotaryEmbedding(width, width, 64, 10000, False, torch.bfloat16)
    rotary._forward_method = rotary.forward_cuda
    return rotary


def kv_pool(pool_class=memory_pool.MLATokenToKVPool):
    return pool_class(
        size=SLOTS - PAGE,
        page_size=PAGE,
        dtype=FP8,
        kv_lora_rank=DIMS.lora,
        qk_rope_head_dim=DIMS.rope,
        layer_num=1,
        device=sglang_cpu.DEVICE,
        enable_memory_saver=False,
    )


class Batch:
    """One layer and one batch with rows of data-parallel padding, on one backend."""

    def __init__(self, backend: type, producer="fused", scales=(None, None), **changes):
        self.pool = kv_pool()
        rotary = None if producer == "composed" else rotary_embedding()
        self.inputs = reference.prefill_inputs(DIMS, TOKENS + PADDING, max_position=64)
        self.inputs["cos_sin_cache"] = rotary and rotary.cos_sin_cache
        slots = torch.arange(PAGE, PAGE + TOKENS).flip(0)
        self.slots = torch.cat([slots, slots.new_zeros(PADDING)])
        attn = Attention(
            layer_id=0, scaling=0.25, k_scale_float=scales[0], v_scale_float=scales[1]
        )
        self.layer = Layer(self.inputs, rotary, attn)
        self.backend = backend.__new__(backend)
        self.is_fa3 = isinstance(self.backend, hook.FA3FP8PrefillMixin)
        vars(self.backend).update(
            data_type=FP8,
            q_data_type=torch.bfloat16,
            qk_nope_head_dim=DIMS.nope,
            qk_rope_head_dim=DIMS.rope,
            v_head_dim=DIMS.v,
            kv_lora_rank=DIMS.lora,
            num_local_heads=DIMS.heads,
            device="cpu",
            skip_prefill=False,
            disable_chunked_prefix_cache=True,
            token_to_kv_pool=self.pool,
            forward_prefill_metadata=SimpleNamespace(fallback_to_flashinfer_impl=False),
            num_prefill_tokens=TOKENS,
            workspace_buffer=None,
        )
        if self.is_fa3:
            vars(self.backend).update(
                use_mla=True,
                fa_impl_ver=3,
                kv_cache_dtype=FP8,
                kv_cache_dtype_str="fp8_e4m3",
                attn_cp_size=1,
                forward_metadata=object(),
            )
        vars(self.backend).update(changes)
        # SGLang's own path: its hook, where it has one, or RoPE by itself.
        self.has_own_hook = BESIDE_A_HOOK and hasattr(backend, "prepare_prefill_qkv")
        if self.has_own_hook:
            self.backend.prepare_prefill_qkv = stop
            self.backend.pack_prefix_chunk_kv = lambda k_nope, k_pe, v: OWN_CHUNK
        if rotary is not None:
            rotary.register_forward_pre_hook(stop)
        self.forward_batch = SimpleNamespace(
            attn_backend=self.backend,
            token_to_kv_pool=self.pool,
            out_cache_loc=self.slots,
            out_cache_loc_is_physical=True,
            extend_prefix_lens_cpu=[0],
            mha_one_shot=False,
            forward_mode=ForwardMode.EXTEND,
            num_prefix_chunks=1,
            set_prefix_chunk_idx=lambda chunk: None,
            prefix_chunk_kv_indices=[None],
            prefix_chunk_seq_lens_cpu=[None],
            prefix_chunk_starts_cpu=[None],
        )
        os.environ[hook.envs.SGLANG_MLA_FP8_PREFILL.name] = producer
        config = SimpleNamespace(
            num_attention_heads=DIMS.heads,
            kv_lora_rank=DIMS.lora,
            qk_nope_head_dim=DIMS.nope,
            qk_rope_head_dim=self.backend.qk_rope_head_dim,
            v_head_dim=DIMS.v,
        )
        self.backend.init_fp8_prefill(
            SimpleNamespace(
                token_to_kv_pool=self.pool,
                model_config=config,
                dtype=torch.bfloat16,
                server_args=SimpleNamespace(get_attention_backends=lambda: ["none"]),
            )
        )

    def __call__(self):
        """What the model makes of it: q, k, v."""
        if internals.forward_context is not None:
            context = internals.forward_context.ForwardContext
            internals.forward_context.set_forward_context(
                context(attn_backend=self.backend)
            )
        *qkv, forward_batch = self.layer.forward_normal_prepare(
            self.inputs["positions"], None, self.forward_batch, None
        )
        assert forward_batch is self.forward_batch
        return qkv

    def chunk(self, q: torch.Tensor) -> tuple:
        """The dtype in which the model gathers a prefix chunk, and its K and V."""
        gathered = []

        def get_mla_kv_buffer(indices, dtype, forward_batch):
            gathered.append(dtype)
            return self.inputs["kv_a"], self.inputs["k_pe"]

        self.layer._get_mla_kv_buffer = get_mla_kv_buffer
        try:
            self.layer._chunked_prefix_attn_mha(q, None, None, self.forward_batch)
        except Stop as seen:
            return *gathered, *seen.args[1:3]

    def declines(self) -> bool:
        """Whether SGLang's own path runs the batch; then nothing was touched."""
        self.backend.forward_prefill_metadata = SimpleNamespace(
            fallback_to_flashinfer_impl=False
        )
        self.backend.forward_metadata = object()
        before = self.pool.kv_buffer[0].clone()
        takes = self.backend.takes_prefill
        takes = takes and takes(self.layer, self.forward_batch)
        try:
            self()
        except Stop:
            assert not takes and torch.equal(self.pool.kv_buffer[0], before)
            return True
        assert takes
        return False

    def expected(self) -> reference.PrefillResult:
        scale_invs = [1 / (scale or 1.0) for scale in self.scales()]
        if self.is_fa3:
            scale_invs = 1.0, 1.0
        return reference.expected_prefill(self.inputs, *scale_invs)

    def scales(self):
        return self.layer.attn_mha.k_scale_float, self.layer.attn_mha.v_scale_float


def check_names(backend: type) -> None:
    """The patch's methods hide none of SGLang's, nor these the patch's."""
    mixins = hook.MLAFP8PrefillMixin, hook.FA3FP8PrefillMixin
    ours = {name for one in mixins for name in vars(one) if not name.startswith("__")}
    # Set by the patch itself, in these classes.
    allowed = {"prefill_kernel_has_v_scale", "prefill_kernel_lse_base"}
    if not BESIDE_A_HOOK:
        allowed.add("prepare_prefill_qkv")
    for base in backend.__mro__:
        assert base in mixins or vars(base).keys() & ours <= allowed, base


def check_taken(batch: Batch, slot_0_stays: bool) -> None:
    before = batch.pool.kv_buffer[0].clone()
    q, k, v = batch()
    exact = batch.expected()
    for actual, wanted in zip((q, k, v), exact):
        reference.assert_fp8(actual, wanted)
    after = batch.pool.kv_buffer[0]
    rows = batch.slots[:TOKENS]
    reference.assert_fp8(after[rows, 0].view(FP8), exact.rows[:TOKENS])
    others = torch.ones(len(after), dtype=torch.bool)
    others[rows] = False
    others[0] = slot_0_stays
    assert torch.equal(after[others], before[others])


def check_chunks(batch: Batch) -> None:
    """A taken batch has the patch's, a declined one SGLang's own."""
    q, *_ = batch()
    kv, k_pe = batch.inputs["kv"], batch.inputs["k_pe"].expand(-1, DIMS.heads, -1)
    gathered, k, v = batch.chunk(q)
    assert gathered == torch.bfloat16
    reference.assert_fp8(k, torch.cat([kv[..., : DIMS.nope], k_pe], dim=-1).double())
    reference.assert_fp8(v, kv[..., DIMS.nope :].double())
    batch.backend._process_reason = "off"
    gathered, k, v = batch.chunk(batch.inputs["q"])
    assert gathered == torch.bfloat16
    if batch.has_own_hook:
        assert (k, v) == OWN_CHUNK == batch.chunk(q)[1:]
    else:
        assert k.dtype == v.dtype == torch.bfloat16


def run_kernel(batch: Batch, **operands) -> dict:
    """What the backend hands to its prefill kernel, and the `result` of both."""
    handed = {}

    def kernel(**kwargs):
        handed.update(kwargs)
        return torch.ones(TOKENS, DIMS.heads, DIMS.v)

    names = "batch_size cum_seq_lens_q max_q_len seq_lens_kv cum_seq_lens_kv max_kv_len"
    rest = dict.fromkeys([*names.split(), "is_causal", "return_lse", "out_buffer"], 1)
    trtllm_mla_backend.flashinfer = SimpleNamespace(
        prefill=SimpleNamespace(trtllm_ragged_attention_deepseek=kernel)
    )
    module = sys.modules[type(batch.backend).__module__]
    if hasattr(module, "is_arch_support_pdl"):
        module.is_arch_support_pdl = lambda: False
    if hasattr(module, "TokenspeedMLABackend"):
        module.tokenspeed_mla = SimpleNamespace(tokenspeed_mla_prefill=kernel)
    result = batch.backend._run_padded_prefill_kernel(
        layer=batch.layer.attn_mha, **operands, **rest
    )
    return handed | {"result": result}


def check_scales(backend: type) -> None:
    """What the hook has divided by is multiplied by, in the kernel or after it."""
    batch = Batch(backend, scales=SCALES)
    q, k, v = batch()
    handed = run_kernel(batch, q=q, k=k, v=v)
    assert handed["query"].dtype == handed["key"].dtype == FP8
    scaling = batch.layer.attn_mha.scaling
    if backend.prefill_kernel_has_v_scale:
        assert handed["bmm1_scale"] == SCALES[0] * scaling
        assert handed["bmm2_scale"] == SCALES[1] and handed["result"].eq(1).all()
    else:
        assert handed["softmax_scale"] == SCALES[0] * scaling
        assert handed["result"].eq(SCALES[1]).all()
    if batch.has_own_hook:
        # SGLang's own divides by none, and tokenspeed_mla's kernel knows none.
        batch.backend._process_reason = "off"
        with contextlib.suppress(Stop):
            batch()
        assert batch.backend.prefill_kv_scales == (1.0, 1.0)
        handed = run_kernel(batch, q=q, k=k, v=v)
        assert handed.get("softmax_scale", scaling) == scaling
        assert handed["result"].eq(1).all()


def check_decode_scale(backend: type) -> None:
    """No row of the KV cache has been divided by k_scale; off, SGLang's own result."""
    for producer, k_scale in (("fused", 1.0), ("off", SCALES[0])):
        batch = Batch(backend, producer, scales=SCALES)
        attn = batch.layer.attn_mha
        scale = batch.backend._compute_decode_bmm1_scale(attn)
        assert scale == k_scale * attn.scaling
        module = sys.modules[backend.__module__]
        if not hasattr(module, "TokenspeedMLABackend"):
            continue
        handed = {}
        module.tokenspeed_mla = SimpleNamespace(tokenspeed_mla_decode=handed.update)
        module.is_arch_support_pdl = lambda: False
        batch.backend._ensure_workspace = lambda device: None
        batch.backend._tokenspeed_workspace = None
        query, lens = batch.inputs["q"], torch.ones(1, dtype=torch.int32)
        batch.backend._run_decode_kernel(query, query, None, lens, 1, attn)
        assert handed["softmax_scale"] == k_scale * attn.scaling
        assert handed["output_scale"] == k_scale


def check_one_shot(backend: type) -> None:
    """FlashAttention-3 attends to prefix and new tokens at once."""
    batch = Batch(backend)
    inputs = batch.inputs
    batch.forward_batch.mha_one_shot = True
    batch.forward_batch.extend_prefix_lens_cpu = [3]
    batch.forward_batch.fetch_mha_one_shot_kv_indices = lambda: None
    batch.layer._get_mla_kv_buffer = lambda indices, dtype, forward_batch: (
        inputs["kv_a"],
        inputs["k_pe"],
    )
    q, k, v = batch()
    reference.assert_fp8(q, batch.expected().q)
    kv, k_pe = inputs["kv"], inputs["k_pe"].expand(-1, DIMS.heads, -1)
    reference.assert_fp8(k, torch.cat([kv[..., : DIMS.nope], k_pe], dim=-1).double())
    reference.assert_fp8(v, kv[..., DIMS.nope :].double())
    others = Batch(backend)
    others.backend.fa_impl_ver = 4
    others.backend.init_fp8_prefill(None)
    assert others.declines()


def graph_contexts():
    """The contexts in which this release captures or replays a prefill."""
    with contextlib.suppress(ImportError):
        from sglang.srt.model_executor.runner_utils import prefill_graph

        yield prefill_graph.prefill_graph_scope(full_graph=True)
    home = sys.modules[internals.is_in_breakable_cuda_graph.__module__]
    yield home.enable_breakable_cuda_graph()
    home = sys.modules[internals.get_tc_piecewise_forward_context.__module__]
    piecewise = "tc_piecewise" if "tc_piecewise" in home.__name__ else "piecewise"
    yield getattr(home, f"enable_{piecewise}_cuda_graph")()
    name = "set_tc_piecewise_forward_context"
    set_context = getattr(home, name, None) or home.set_forward_context
    yield set_context(None, [], None, [], [])


@contextlib.contextmanager
def decode_context_parallel():
    parallel = internals.get_parallel()
    if hasattr(parallel, "dcp_enabled"):
        with parallel.override(dcp_enabled=True):
            yield
    else:
        real, internals.dcp.dcp_enabled = internals.dcp.dcp_enabled, lambda: True
        yield
        internals.dcp.dcp_enabled = real


def check_declined(backend: type) -> None:
    contexts = list(graph_contexts())
    if internals.dcp is not None:
        contexts.append(decode_context_parallel())
    batch = Batch(backend)
    for context in contexts:
        assert not batch.declines()
        with context:
            assert batch.declines(), context
    assert not batch.declines()
    bare = Batch(backend, "composed", qk_rope_head_dim=0)
    assert not bare.backend.takes_prefill(bare.layer, bare.forward_batch)
    assert Batch(backend, producer="off").declines()


def check_pools() -> list[str]:
    """Into a pool that has methods of its own, the kernel does not write."""
    for module in ("unified_memory_pool", "page_interleave_pool"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"sglang.srt.mem_cache.{module}")
    base = memory_pool.MLATokenToKVPool
    todo, found = [base], []
    while todo:
        one = todo.pop()
        todo += one.__subclasses__()
        pool = one.__new__(one)
        vars(pool).update(
            dtype=FP8,
            kv_lora_rank=DIMS.lora,
            qk_rope_head_dim=DIMS.rope,
            kv_cache_dim=DIMS.lora + DIMS.rope,
        )
        if hook._pool_producer(pool) == "fused":
            found.append(one.__name__)
        pool.kv_cache_dim += 4
        assert hook._pool_producer(pool) is None
    return found


def check_prefill_graphs() -> None:
    """In the release's own arguments, but where the user has asked for them."""

    def turned_off(**chosen) -> bool:
        args = server_args.ServerArgs(model_path="dummy", device="cpu", **chosen)
        if hasattr(args, "enforce_piecewise_cuda_graph"):  # before 0.5.14
            flag = internals.disable_piecewise_prefill_graphs(args)
            disabled = args.disable_piecewise_cuda_graph
        else:
            from sglang.srt.model_executor import cuda_graph_config

            args._parse_cuda_graph_config()  # not done for this model
            flag = internals.disable_piecewise_prefill_graphs(args)
            server_args.set_global_server_args_for_scheduler(args)
            disabled = cuda_graph_config.check_cuda_graph_backend("prefill", "disabled")
        assert disabled == (flag is not None)
        assert internals.disable_piecewise_prefill_graphs(args) is None
        return disabled

    assert turned_off()
    names = {field.name for field in dataclasses.fields(server_args.ServerArgs)}
    if "cuda_graph_backend_prefill" in names:
        assert not turned_off(cuda_graph_backend_prefill="tc_piecewise")
    else:
        assert not turned_off(enforce_piecewise_cuda_graph=True)


def main(backends: list[str], graphs_off: str) -> None:
    args = server_args.ServerArgs(model_path="dummy", device="cpu")
    server_args.set_global_server_args_for_scheduler(args)
    # SGLang imports it in the method, from 0.5.20 on, for a CUDA kernel.
    sys.modules["sglang.srt.layers.attention.merge_state"] = SimpleNamespace(
        merge_state=None
    )
    # For GPUs; the backends import them and nothing here calls them.
    for name in ("sgl_kernel", "sgl_kernel.flash_attn"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__getattr__ = lambda name: None
    parallel_state._ATTN_TP = SimpleNamespace(world_size=1)
    hook.is_flashinfer_available = lambda: True  # for `composed`, which needs no RoPE
    for name in backends:
        module, name = name.split(":")
        module = importlib.import_module(f"sglang.srt.layers.attention.{module}")
        backend = getattr(module, name)
        check_names(backend)
        is_fa3 = issubclass(backend, hook.FA3FP8PrefillMixin)
        check_taken(Batch(backend), slot_0_stays=not is_fa3)
        composed = Batch(backend, "composed")
        # As some pools do, from 0.5.22 on.
        composed.pool.requires_physical_write_loc = True
        check_taken(composed, slot_0_stays=False)
        check_chunks(Batch(backend))
        if is_fa3:
            check_one_shot(backend)
        else:
            check_scales(backend)
            check_decode_scale(backend)
        check_declined(backend)
    if graphs_off == "graphs off":
        check_prefill_graphs()
    print(*sorted(check_pools()))


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1])
