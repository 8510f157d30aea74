"""Every kind of batch that reaches the MLA prefill path, as one table.

`CASES` is what the tests run and what docs/batches.md is made of:

    python test/support/batch_cases.py > docs/batches.md
"""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

if __name__ == "__main__":
    # The tests' conftest.py does this for the tests.
    sys.path += [str(Path(__file__).parents[n]) for n in (1, 2)]
    import patched_sglang

    parser = argparse.ArgumentParser(description="Print docs/batches.md.")
    parser.add_argument("--sglang", default="0.5.12.post1")
    trees = patched_sglang.lay_out(parser.parse_args().sglang)
    sys.path.insert(0, str(trees.patched))

import batch_runs as runs
import torch
from batch_runs import BACKENDS
from mla_harness import TINY, MLADims, Scenario, reference
from sglang_cpu import HAS_GPU
from sglang_internals import (
    DRAFT_EXTEND,
    RELEASE,
    backend_class,
    decode_context_parallel,
    enable_breakable_cuda_graph,
    enable_piecewise_cuda_graph,
    has_own_hook,
)

from prefill_patch.releases import FA3, RELEASES, Release, ordered


@dataclass(frozen=True)
class Outcome:
    """`kind` is taken, declined, untouched, corrected or n/a."""

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


def declined(reason: str) -> Outcome:
    """`reason` as it is logged."""
    return Outcome("declined", reason)


def untouched(reason: str) -> Outcome:
    """The hook is not called, since SGLang runs other code for the batch."""
    return Outcome("untouched", reason)


def corrected(reason: str) -> Outcome:
    """SGLang's own path, which is wrong for the batch, or raises, without the patch."""
    return Outcome("corrected", reason)


def not_applicable(reason: str) -> Outcome:
    return Outcome("n/a", reason)


@dataclass(frozen=True)
class Since:
    """Another outcome from a release on."""

    version: str
    outcome: Outcome
    before: Outcomes


Outcomes = Union[Outcome, Since]
TAKEN = Outcome("taken")


@dataclass(frozen=True)
class Case:
    """A kind of batch, how to make it, and what becomes of it on each backend."""

    name: str
    title: str
    scenario: Scenario
    tokenspeed_mla: Outcomes
    cutedsl_mla: Outcomes
    trtllm_mla: Outcomes
    fa3: Outcomes
    producer: str
    # Whether the patched SGLang finds FlashInfer's RoPE; None: as the machine has it.
    flashinfer: Optional[bool]

    def outcome(self, backend: str, release: Release = RELEASE) -> Outcome:
        found = getattr(self, backend)
        while isinstance(found, Since):
            is_later = ordered(release.version) >= ordered(found.version)
            found = found.outcome if is_later else found.before
        return found

    def test(self, backend: str) -> Optional[str]:
        """The function in test_every_batch.py that runs it on this backend."""
        kind = self.outcome(backend).kind
        return None if kind == "n/a" else f"test_{kind}"


def case(
    name: str,
    title: str,
    outcome: Outcomes = TAKEN,
    *,
    tokenspeed_mla: Optional[Outcomes] = None,
    cutedsl_mla: Optional[Outcomes] = None,
    fa3: Optional[Outcomes] = None,
    producer: str = "fused",
    flashinfer: Optional[bool] = None,
    **scenario: Any,
) -> Case:
    """A case with one outcome, or another on some backends."""
    return Case(
        name,
        title,
        Scenario(**scenario),
        tokenspeed_mla or outcome,
        cutedsl_mla or outcome,
        outcome,
        fa3 or outcome,
        producer,
        flashinfer,
    )


CHUNKS = dict(extend_lens=[5, 1, 3], prefix_lens=[12, 0, 7], chunks=2)
ONE_CHUNK = dict(extend_lens=[3, 2], prefix_lens=[4, 0], chunks=1)
DECODES = dict(extend_lens=[1, 1], prefix_lens=[9, 4], paged=True)
# FlashInfer's kernels, on a GPU, are for models' dimensions.
DEEPSEEK = reference.MODELS["deepseek-v3"]._replace(heads=4)
SCALES = dict(k_scale=0.3, v_scale=1.7)
ABSORBED = dict(dims=DEEPSEEK, modify_layer=runs.absorb_weights)
VERIFY_ENV = dict(**ABSORBED, speculative_num_draft_tokens=3)
DECODES_ALONE = not_applicable("another class decodes")
DECODE = dict(
    cutedsl_mla=DECODES_ALONE,
    batch=DECODES,
    how=functools.partial(runs.absorbed, mode=runs.ForwardMode.DECODE),
)
VERIFY = dict(
    cutedsl_mla=DECODES_ALONE,
    batch={**DECODES, "extend_lens": [3, 3]},
    how=functools.partial(runs.absorbed, mode=runs.ForwardMode.TARGET_VERIFY),
)
GEMM = {"SGLANG_MLA_FP8_PREFILL_GEMM": "on"}
COMPOSED = {"SGLANG_MLA_FP8_PREFILL": "composed"}

BF16_ONLY = not_applicable("its kernel gives BF16, whatever the model is")
FP8_ONLY = not_applicable("starts with an fp8_e4m3 cache only")
NO_SUCH_TYPE = not_applicable("its kernel takes no such type")
NOT_YET = not_applicable("not in SGLang yet")
FA3_ONLY = not_applicable("fa3's own")
WRAPPER_RAISES = not_applicable("SGLang's wrapper calls the backend wrongly and raises")
FP8_OUTPUT = not_applicable("SGLang's hook makes its output FP8 there, and it raises")
WRITES_FP8 = not_applicable("SGLang's hook writes FP8, and this pool quantizes BF16")
NSA_ROWS, DSA_ROWS = (
    declined(f"{kind}TokenToKVPool takes no FP8 rows") for kind in ("NSA", "DSA")
)
MLA_PATH = untouched("MLA path")
NO_HOOK = untouched("the prefill backend has no hook")
OWN_OPERANDS = untouched("BF16 operands are quantized at the kernel call")
BF16_BESIDE_FP8 = not_applicable(
    "SGLang hands its kernel a BF16 Q beside an FP8 prefix"
)
ASSERTS_ONE = corrected("SGLang asserts scales of 1")
UNDIVIDED_ROWS = corrected("SGLang multiplies undivided rows by k_scale")

CASES = [
    # Wrappers round a backend
    case(
        "hybrid-prefill-decode",
        "different prefill and decode backends, this one for prefill",
        batch=CHUNKS,
        how=runs.wrapped(runs.hybrid),
    ),
    case(
        "hybrid-decode-only",
        "different prefill and decode backends, this one for decode",
        NO_HOOK,
        env=dict(prefill_attention_backend="fa4"),
        batch=CHUNKS,
        how=runs.other_prefill_backend,
    ),
    case(
        "tbo-parent",
        "two-batch overlap, a batch that is not split",
        batch=CHUNKS,
        how=runs.wrapped(runs.tbo),
    ),
    case(
        "tbo-children",
        "two-batch overlap, split between requests",
        batch=dict(extend_lens=[5, 2, 3], prefix_lens=[4, 0, 6]),
        how=runs.overlapped,
    ),
    case(
        "tbo-children-split-request",
        "two-batch overlap, split inside a request",
        batch=dict(extend_lens=[9, 2]),
        how=runs.overlapped,
    ),
    case(
        "tbo-children-padded",
        "two-batch overlap of a padded batch",
        batch=dict(extend_lens=[4, 2, 2], prefix_lens=[4, 0, 6], pad_rows=1),
        how=runs.overlapped,
    ),
    case(
        "hybrid-linear",
        "a full-attention layer of a hybrid-linear model",
        Since("0.5.16", TAKEN, before=Since("0.5.13", WRAPPER_RAISES, before=TAKEN)),
        fa3=TAKEN,
        batch=CHUNKS,
        how=runs.wrapped(runs.linear),
    ),
    case(
        "nested-tbo-linear-hybrid",
        "two-batch overlap round hybrid-linear round two backends",
        batch=CHUNKS,
        how=runs.wrapped(runs.tbo_of_linear_of_hybrid),
    ),
    case(
        "nested-hybrid-tbo",
        "two-batch overlap as the prefill backend of two",
        batch=CHUNKS,
        how=runs.wrapped(runs.hybrid_of_tbo),
    ),
    # Kinds of prefill
    case(
        "chunked-prefill",
        "first, middle and last chunk after one another on one cache",
        batch=dict(extend_lens=[19]),
        how=functools.partial(runs.chunk_by_chunk, sizes=(8, 8, 3)),
    ),
    case(
        "prefix-cache-hits",
        "prefix-cache hits of different lengths",
        batch=dict(extend_lens=[5, 3, 2], prefix_lens=[16, 3, 9], chunks=2),
    ),
    case(
        "prefix-of-some",
        "no prefix in some requests of the batch (rows without keys)",
        batch=dict(extend_lens=[5, 3, 2, 1], prefix_lens=[0, 14, 0, 2], chunks=3),
    ),
    case(
        "mixed-lengths",
        "requests of very different lengths",
        batch=dict(extend_lens=[20, 1, 7, 2], prefix_lens=[0, 33, 1, 0]),
    ),
    case(
        "one-token-requests",
        "requests of one token, with a prefix and without",
        batch=dict(extend_lens=[1, 1, 1], prefix_lens=[0, 8, 5], chunks=2),
    ),
    case("one-token", "a batch of one token", batch=dict(extend_lens=[1])),
    case(
        "mixed-chunk",
        "decodes mixed into a chunk of prefill",
        batch=dict(extend_lens=[7, 1, 1], prefix_lens=[8, 12, 3], chunks=2),
        how=runs.with_decodes,
    ),
    case(
        "idle-rank",
        "empty batch of a data-parallel rank",
        untouched("the layer returns before its prepare step"),
        batch=dict(extend_lens=[]),
    ),
    # Padding and memory
    case(
        "dp-padding",
        "data-parallel padding, in memory full of NaN",
        batch=dict(extend_lens=[5, 3], pad_rows=5),
        how=runs.in_nan_memory,
    ),
    case(
        "dp-padding-prefix",
        "data-parallel padding over prefix chunks, in memory full of NaN",
        batch={**CHUNKS, "chunks": 3, "pad_rows": 4},
        how=runs.in_nan_memory,
    ),
    # Switches and graphs of the server
    case(
        "no-chunked-prefix-cache",
        "chunked prefix cache disabled, no prefix",
        env=dict(disable_chunked_prefix_cache=True),
    ),
    case(
        "no-chunked-prefix-cache-prefix",
        "chunked prefix cache disabled, prefix in the batch",
        MLA_PATH,
        env=dict(
            dims=DEEPSEEK,
            disable_chunked_prefix_cache=True,
            modify_layer=runs.absorb_weights,
        ),
        batch=CHUNKS,
        how=runs.prepare_only,
    ),
    case(
        "piecewise-graph",
        "inside a piecewise CUDA graph (`--enforce-piecewise-cuda-graph`)",
        MLA_PATH,
        env=ABSORBED,
        how=runs.in_piecewise_graph,
    ),
    case(
        "forward-context",
        "eager, inside the forward context of a captured prefill",
        declined("CUDA graph"),
        tokenspeed_mla=Since(
            "0.5.16",
            declined("CUDA graph"),
            before=Since("0.5.13", FP8_OUTPUT, before=declined("CUDA graph")),
        ),
        how=functools.partial(runs.in_forward_context, breakable=False),
    ),
    case(
        "breakable-graph",
        "inside a breakable CUDA graph (the same, `--enable-breakable-cuda-graph`)",
        Since("0.5.17", MLA_PATH, before=declined("CUDA graph")),
        env=ABSORBED,
        how=functools.partial(runs.in_forward_context, breakable=True),
    ),
    # Other attention
    case(
        "decode",
        "decode",
        MLA_PATH,
        env=ABSORBED,
        **DECODE,
    ),
    case(
        "target-verify",
        "speculative target-verify",
        MLA_PATH,
        env=VERIFY_ENV,
        **VERIFY,
    ),
    case(
        "draft-extend",
        "speculative draft-extend",
        MLA_PATH,
        cutedsl_mla=DECODES_ALONE,
        env=ABSORBED,
        batch={**DECODES, "extend_lens": [3, 2]},
        how=functools.partial(runs.absorbed, mode=DRAFT_EXTEND),
    ),
    case(
        "mha",
        "MHA of another backend",
        NO_HOOK,
        env=dict(prefill_attention_backend="aiter"),
        how=runs.other_prefill_backend,
    ),
    case(
        "mha-one-shot",
        "MHA_ONE_SHOT of another backend, over a prefix",
        NO_HOOK,
        env=dict(prefill_attention_backend="flashinfer"),
        batch=ONE_CHUNK,
        how=runs.other_prefill_backend,
    ),
    case(
        "one-shot-prefix",
        "MHA_ONE_SHOT chosen for this backend, over a prefix",
        declined("one-shot attention over a prefix"),
        fa3=TAKEN,
        env=dict(prefill_attention_backend="fa3"),
        batch=dict(extend_lens=[5, 3], prefix_lens=[4, 0]),
    ),
    case(
        "one-shot-prefix-padding",
        "the same with data-parallel padding, in memory full of NaN",
        FA3_ONLY,
        fa3=TAKEN,
        batch=dict(extend_lens=[5, 1, 3], prefix_lens=[12, 0, 7], pad_rows=4),
        how=runs.in_nan_memory,
    ),
    case(
        "prefix-below-threshold",
        "a prefix below SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD (8192 tokens)",
        FA3_ONLY,
        fa3=MLA_PATH,
        env=ABSORBED,
        batch=CHUNKS,
        environ={"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "8192"},
        how=runs.prepare_only,
    ),
    case(
        "deterministic",
        "deterministic inference",
        FA3_ONLY,
        fa3=MLA_PATH,
        env=dict(
            dims=DEEPSEEK,
            enable_deterministic_inference=True,
            modify_layer=runs.absorb_weights,
        ),
        how=runs.prepare_only,
    ),
    case(
        "context-parallel",
        "attention context parallelism",
        FA3_ONLY,
        fa3=declined("context parallelism"),
        batch=CHUNKS,
        change=runs.context_parallel,
    ),
    case(
        "fa4",
        "FlashAttention-4, run by the same class",
        FA3_ONLY,
        fa3=untouched("FlashAttention-4 takes no FP8"),
        env=dict(prefill_attention_backend="fa4"),
        batch=CHUNKS,
        change=runs.flash_attention_4,
    ),
    case(
        "one-shot",
        "MHA_ONE_SHOT chosen for this backend, no prefix",
        env=dict(prefill_attention_backend="fa3"),
    ),
    case(
        "own-prepare",
        "a model with a prepare step of its own (Sarvam), over prefix chunks",
        OWN_OPERANDS,
        tokenspeed_mla=Since("0.5.13", BF16_BESIDE_FP8, before=OWN_OPERANDS),
        env=dict(q_lora=None, prefill_attention_backend="fa3"),
        batch=CHUNKS,
        how=runs.own_prepare,
    ),
    case(
        "own-prepare-scales",
        "the same with k_scale and v_scale",
        OWN_OPERANDS,
        tokenspeed_mla=Since("0.5.13", BF16_BESIDE_FP8, before=ASSERTS_ONE),
        env=dict(**SCALES, q_lora=None, prefill_attention_backend="fa3"),
        batch=CHUNKS,
        how=runs.own_prepare,
    ),
    # Models
    case(
        "deepseek-v3",
        "DeepSeek-V3 dimensions",
        env=dict(dims=DEEPSEEK),
        batch=dict(extend_lens=[5, 3], prefix_lens=[8, 0], chunks=1),
    ),
    case(
        "deepseek-v2-lite",
        "DeepSeek-V2-Lite dimensions (no q_lora)",
        env=dict(dims=DEEPSEEK, q_lora=None),
        batch=ONE_CHUNK,
    ),
    case(
        "glm",
        "GLM-4.7-Flash and GLM-5 dimensions",
        env=dict(dims=reference.MODELS["glm-4.7-flash"]._replace(heads=5)),
        batch=ONE_CHUNK,
    ),
    case(
        "mistral-4",
        "Mistral 4 dimensions",
        env=dict(dims=reference.MODELS["mistral-4"]._replace(heads=4)),
        batch=ONE_CHUNK,
    ),
    case(
        "odd-dims",
        "dimensions that are no powers of two",
        env=dict(dims=MLADims(heads=3, nope=48, rope=64, v=80, lora=64)),
        batch=ONE_CHUNK,
    ),
    case(
        "dims-not-16",
        "dimensions that are no multiples of 16",
        declined("head dimensions that are no multiples of 16"),
        env=dict(dims=TINY._replace(nope=24)),
    ),
    case(
        "head-dim-272",
        "Q and K of more than 256",
        FA3_ONLY,
        fa3=declined("no FP8 kernel for head dimension 272"),
        env=dict(dims=TINY._replace(nope=208)),
        batch=CHUNKS,
    ),
    *(
        case(
            f"heads-{heads}",
            f"a tensor-parallel shard with {heads} head{'s' * (heads > 1)}",
            env=dict(dims=TINY._replace(heads=heads)),
            batch=ONE_CHUNK,
        )
        for heads in (1, 5, 16)
    ),
    case(
        "rope-0",
        "a model without rotary dimensions",
        Since("0.5.20", declined("no rotary dimensions"), before=NOT_YET),
        env=dict(dims=TINY._replace(rope=0), rope=None),
    ),
    case("no-rope", "a layer without RoPE", env=dict(rope=None), batch=CHUNKS),
    case("neox-rope", "neox-style RoPE", env=dict(is_neox=True), batch=CHUNKS),
    case("yarn-rope", "DeepSeek's YaRN RoPE", env=dict(rope="yarn"), batch=CHUNKS),
    case(
        "other-rope",
        "a rotary embedding that does more than index its table",
        declined("rotary embedding"),
        env=dict(modify_layer=runs.rope_of_another_class),
        batch=CHUNKS,
    ),
    case(
        "native-rope",
        "a rotary embedding with another method on the instance (rl_on_policy_target)",
        declined("rotary embedding"),
        env=dict(modify_layer=runs.native_rope),
    ),
    case(
        "fallback-rope",
        "RoPE of a width for which SGLang has its fallback kernel, which turns the "
        "cosines into BF16; two batches",
        declined("rotary embedding"),
        env=dict(dims=TINY._replace(rope=32)),
        how=runs.twice,
    ),
    case(
        "fp16",
        "an FP16 model",
        tokenspeed_mla=BF16_ONLY,
        fa3=BF16_ONLY,
        env=dict(dtype=torch.float16),
        batch=CHUNKS,
    ),
    case(
        "fp32",
        "an FP32 model",
        declined("the model is torch.float32, not bfloat16 or float16"),
        tokenspeed_mla=BF16_ONLY,
        cutedsl_mla=not_applicable("SGLang's hook asserts BF16 or FP16"),
        fa3=BF16_ONLY,
        env=dict(dtype=torch.float32),
    ),
    case(
        "scales",
        "k_scale and v_scale in the checkpoint",
        env=SCALES,
        batch={**CHUNKS, "pad_rows": 2},
    ),
    case(
        "k-scale",
        "k_scale alone in the checkpoint",
        fa3=not_applicable("it raises without a v_scale beside it"),
        env=dict(k_scale=0.3),
        batch=CHUNKS,
    ),
    case("v-scale", "v_scale alone in the checkpoint", env=dict(v_scale=1.7)),
    case(
        "scales-chunked-prefill",
        "k_scale and v_scale, chunks of one prompt after one another",
        env=SCALES,
        batch=dict(extend_lens=[19]),
        how=functools.partial(runs.chunk_by_chunk, sizes=(8, 8, 3)),
    ),
    case(
        "scales-one-shot",
        "k_scale and v_scale, MHA_ONE_SHOT chosen for this backend, no prefix",
        env=dict(**SCALES, prefill_attention_backend="fa3"),
    ),
    case(
        "scales-declined",
        "k_scale and v_scale, a rotary embedding that the hook declines",
        declined("rotary embedding"),
        tokenspeed_mla=Since(
            "0.5.13", declined("rotary embedding"), before=ASSERTS_ONE
        ),
        env=dict(**SCALES, modify_layer=runs.native_rope),
        batch={**CHUNKS, "pad_rows": 2},
    ),
    case(
        "scales-decode",
        "k_scale and v_scale, decode",
        UNDIVIDED_ROWS,
        fa3=MLA_PATH,
        env=dict(**SCALES, **ABSORBED),
        **DECODE,
    ),
    case(
        "scales-target-verify",
        "k_scale and v_scale, speculative target-verify",
        UNDIVIDED_ROWS,
        fa3=MLA_PATH,
        env=dict(**SCALES, **VERIFY_ENV),
        **VERIFY,
    ),
    case(
        "scales-decode-off",
        "k_scale and v_scale, decode, SGLANG_MLA_FP8_PREFILL=off",
        MLA_PATH,
        env=dict(**SCALES, **ABSORBED),
        environ={"SGLANG_MLA_FP8_PREFILL": "off"},
        **DECODE,
    ),
    # The cache
    case(
        "hicache",
        "HiCache layer-wise loading",
        batch=CHUNKS,
        change=runs.loading_by_layer,
    ),
    case(
        "moved-buffer",
        "a buffer that a memory saver or a custom memory pool placed",
        batch=CHUNKS,
        change=runs.new_buffer,
    ),
    case(
        "hybrid-linear-pool",
        "the MLA pool inside a hybrid-linear pool",
        # SGLang reads prefixes from a bare MLA pool only.
        env=dict(pool_class=runs.linear_pool, modify_layer=runs.fourth_layer),
    ),
    case(
        "unified-pool",
        "a pool of unified memory, which stores the rows, with FlashInfer",
        Since("0.5.17", TAKEN, before=NOT_YET),
        env=dict(dims=DEEPSEEK, pool_class=runs.unified_pool),
        batch=CHUNKS,
        how=runs.at_physical_slots,
        producer="composed",
        flashinfer=True,
    ),
    case(
        "own-writer-pool",
        "a pool that stores rows its own way, with FlashInfer",
        env=dict(dims=DEEPSEEK, pool_class=runs.OwnWriterPool),
        batch=CHUNKS,
        producer="composed",
        flashinfer=True,
    ),
    case(
        "own-writer-pool-no-flashinfer",
        "a pool that stores rows its own way, without FlashInfer",
        declined("OwnWriterPool without FlashInfer"),
        env=dict(pool_class=runs.OwnWriterPool),
        batch=CHUNKS,
        flashinfer=False,
    ),
    case(
        "dsa-pool",
        "a pool of 656-byte sparse-attention rows",
        Since("0.5.13", DSA_ROWS, before=NSA_ROWS),
        tokenspeed_mla=Since("0.5.13", WRITES_FP8, before=NSA_ROWS),
        cutedsl_mla=WRITES_FP8,
        env=dict(dims=DEEPSEEK, pool_class=runs.dsa_pool),
    ),
    *(
        case(
            f"{name}-cache",
            title,
            declined(f"the KV cache is {cache}, not torch.float8_e4m3fn"),
            tokenspeed_mla=FP8_ONLY,
            cutedsl_mla=FP8_ONLY,
            fa3=NO_SUCH_TYPE if name in ("e5m2", "fp4") else None,
            batch=CHUNKS,
            **scenario,
        )
        for name, title, cache, scenario in (
            (
                "bf16",
                "BF16 cache",
                "torch.bfloat16",
                dict(env=dict(cache_dtype=torch.bfloat16)),
            ),
            (
                "auto",
                "cache of the model's dtype (auto), FP16",
                "torch.float16",
                dict(env=dict(cache_dtype=torch.float16, dtype=torch.float16)),
            ),
            (
                "e5m2",
                "fp8_e5m2 cache",
                "torch.float8_e5m2",
                dict(env=dict(cache_dtype=torch.float8_e5m2)),
            ),
            (
                "fp4",
                "FP4 cache",
                "torch.float4_e2m1fn_x2",
                dict(env=dict(cache_dtype=torch.bfloat16), change=runs.fp4_backend),
            ),
        )
    ),
    case(
        "auto-fp8-cache",
        "an FP8 cache that the checkpoint chose (auto)",
        FA3_ONLY,
        fa3=declined("--kv-cache-dtype auto keeps attention in the model's dtype"),
        env=dict(kv_cache_dtype="auto"),
        batch=CHUNKS,
    ),
    # Values
    case(
        "beyond-448",
        "activations beyond ±448",
        env=dict(modify_layer=runs.big_activations),
        batch=CHUNKS,
    ),
    case(
        "inf-and-nan",
        "infinity and NaN in the activations",
        env=dict(modify_layer=runs.inf_and_nan),
        batch=CHUNKS,
    ),
    # Switches of the hook
    case(
        "composed",
        "SGLANG_MLA_FP8_PREFILL=composed, with FlashInfer",
        env=dict(dims=DEEPSEEK),
        environ=COMPOSED,
        batch={**CHUNKS, "pad_rows": 2},
        producer="composed",
        flashinfer=True,
    ),
    case(
        "composed-no-rope",
        "the same without RoPE",
        env=dict(dims=DEEPSEEK, rope=None),
        environ=COMPOSED,
        producer="composed",
        flashinfer=True,
    ),
    case(
        "composed-scales",
        "the same with k_scale and v_scale",
        env=dict(**SCALES, dims=DEEPSEEK, is_neox=True),
        environ=COMPOSED,
        batch=CHUNKS,
        producer="composed",
        flashinfer=True,
    ),
    case(
        "composed-one-shot-prefix",
        "the same over a prefix in one shot",
        FA3_ONLY,
        fa3=declined("one-shot attention over a prefix with the composed producer"),
        env=dict(dims=DEEPSEEK),
        environ=COMPOSED,
        batch=dict(extend_lens=[5, 3], prefix_lens=[4, 0]),
        flashinfer=True,
    ),
    case(
        "composed-no-flashinfer",
        "SGLANG_MLA_FP8_PREFILL=composed, without FlashInfer",
        declined("SGLANG_MLA_FP8_PREFILL=composed without FlashInfer"),
        environ=COMPOSED,
        flashinfer=False,
    ),
    case(
        "gemm",
        "SGLANG_MLA_FP8_PREFILL_GEMM=on: Q, K and V in FP8 out of their projections, with scales",
        env=dict(dims=DEEPSEEK, **SCALES),
        batch={**CHUNKS, "pad_rows": 2},
        change=runs.any_batch_is_large,
        environ=GEMM,
    ),
    case(
        "gemm-fp8-weight",
        "the same with a weight in FP8, the latent of chunks as it is in the cache",
        env=dict(dims=DEEPSEEK),
        batch={**CHUNKS, "pad_rows": 2},
        change=runs.kv_b_proj_in_fp8,
        environ=GEMM,
    ),
    case(
        "gemm-fp8-weight-scales",
        "the same with scales: the latent of chunks is quantized again",
        env=dict(dims=DEEPSEEK, **SCALES),
        batch=CHUNKS,
        change=runs.kv_b_proj_in_fp8,
        environ=GEMM,
    ),
    case(
        "gemm-one-shot-prefix",
        "the same over a prefix in one shot",
        FA3_ONLY,
        fa3=TAKEN,
        env=dict(dims=DEEPSEEK),
        batch=dict(extend_lens=[5, 3], prefix_lens=[4, 0]),
        change=runs.any_batch_is_large,
        environ=GEMM,
    ),
    case(
        "off",
        "SGLANG_MLA_FP8_PREFILL=off",
        declined("SGLANG_MLA_FP8_PREFILL=off"),
        environ={"SGLANG_MLA_FP8_PREFILL": "off"},
        batch={**CHUNKS, "pad_rows": 3},
        how=runs.in_nan_memory,
    ),
]

# Prepare steps that SGLang's dispatch does not choose for the batch, chosen all the same.
FORCED = [
    case(
        "forced-fallback",
        "FlashInfer's own prefill planned for the batch",
        declined("FlashInfer's own prefill runs the batch"),
        fa3=not_applicable("it has no such fallback"),
        env=dict(dims=DEEPSEEK, disable_chunked_prefix_cache=True),
        batch=CHUNKS,
        how=runs.forced,
    ),
    case(
        "forced-piecewise",
        "a piecewise CUDA graph begun after the metadata",
        declined("CUDA graph"),
        how=functools.partial(
            runs.forced, inside=lambda _: enable_piecewise_cuda_graph()
        ),
    ),
    case(
        "forced-breakable",
        "a breakable CUDA graph begun after the metadata",
        declined("CUDA graph"),
        how=functools.partial(
            runs.forced, inside=lambda _: enable_breakable_cuda_graph()
        ),
    ),
    case(
        "forced-prefill-graph",
        "a prefill captured whole",
        Since("0.5.23", declined("CUDA graph"), before=NOT_YET),
        how=functools.partial(runs.forced, inside=lambda _: runs.full_prefill_graph()),
    ),
    case(
        "forced-decode-context-parallel",
        "decode context parallelism, whose slots are those of several ranks",
        Since("0.5.15", declined("decode context parallelism"), before=NOT_YET),
        how=functools.partial(runs.forced, inside=lambda _: decode_context_parallel()),
    ),
    case(
        "forced-no-metadata",
        "no metadata of a prefill",
        declined("no prefill metadata"),
        how=runs.without_metadata,
    ),
    case(
        "forced-speculative",
        "a speculative batch",
        declined("speculative batch"),
        how=functools.partial(
            runs.forced,
            inside=lambda forward_batch: runs.mock.patch.object(
                forward_batch, "forward_mode", DRAFT_EXTEND
            ),
        ),
    ),
]


def case_named(name: str) -> Case:
    (found,) = (case for case in CASES + FORCED if case.name == name)
    return found


# Taken cases that are compared with the unpatched SGLang too.
COMPARED = [
    "deepseek-v3",
    "no-rope",
    "neox-rope",
    "yarn-rope",
    "fp16",
    "scales",
    "beyond-448",
]


def runnable(case: Case, backend: str) -> bool:
    if not HAS_GPU:
        return True
    # SGLang's own hook writes with FlashInfer's kernel, at addresses of 16 bytes.
    misaligned = has_own_hook(backend_class(backend)) and case.name == "dims-not-16"
    # sgl_kernel's norms take no float32.
    return case.name != "fp32" and not misaligned


def run_unpatched(target: str) -> None:
    """Run what is compared bit for bit, and COMPARED, on an unpatched SGLang: into the
    file `target`, by case and backend, a Result or what went wrong."""
    results = {}
    for case in CASES + FORCED:
        for backend in BACKENDS:
            if not runnable(case, backend):
                continue
            kind = case.outcome(backend).kind
            if kind in ("declined", "untouched", "corrected") or (
                kind == "taken" and case.name in COMPARED
            ):
                try:
                    try:
                        result = case.scenario.on(backend).run()
                    finally:
                        if HAS_GPU:
                            torch.cuda.synchronize()
                except Exception as error:
                    if "CUDA error" in str(error):  # and of all that follows
                        raise RuntimeError(f"{case.name} on {backend}") from error
                    result = traceback.format_exc()
                results[case.name, backend] = result
    torch.save(results, target)


# docs/batches.md

INTRODUCTION = """\
# Every kind of batch

*Taken*: the backend's hook prepares Q, K, V and the cache rows in FP8. *Declined*: it
leaves the batch to SGLang's own path (on `tokenspeed_mla` from 0.5.13 on and on
`cutedsl_mla`, SGLang's own hook), whose every result is then bit-identical to the
unpatched SGLang's, and the reason is logged once; *untouched* is the same where SGLang
does not come to the hook at all. *Corrected*: SGLang's own path too, which is wrong for
the batch or raises without the patch, and right with it ([scales](scales.md)). Whichever
it is, log-sum-exps in base 2, as trtllm-gen's, are converted before SGLang merges prefix
chunks (`SGLANG_MLA_FP8_PREFILL_LSE`); those of the kernels here are natural.

Where a batch is taken, Q, K, V and the cache rows are the exact results rounded once (at
most one element in 10,000 is the next FP8 value). Against the unpatched SGLang, Q and K
without RoPE, V and the latent of the cache row have its bits; elements with RoPE differ
from its by at most one FP8 value and are never farther from the exact result, since
SGLang rounds them to BF16 and then to FP8, and the hook once. With `k_scale` or
`v_scale`, that one FP8 value holds for all of K or V.

Activations beyond ±448, and infinity, become ±448, where the unpatched SGLang has what
torch's cast makes of them: NaN beyond ±464 before torch 2.13, ±448 since. NaN stays NaN.

A case's test is `test_every_batch.py::test_OUTCOME[CASE-BACKEND]`, which runs it on
SGLang's own classes; `make test-releases` runs it on every release, and `make docs` writes
this table when all have passed. An outcome without releases is that of all of them
(`tokenspeed_mla`: to 0.5.22; `cutedsl_mla`, the class that prefills beside it: 0.5.23). Cases
with `forced` in their names are prepared as chunked prefills though SGLang's dispatch
chooses another path. The attention kernels, which need SM100, or SM90 for fa3, are
replaced by references that take any dimensions: where the real ones do not (trtllm-gen
takes Q and K of 192 with V of 128, or 128 throughout; tokenspeed_mla 192 with 128), as for
GLM's, a case shows the preparation alone. On a Hopper GPU fa3 runs its own kernel for
DeepSeek's dimensions.

On fa3, SGLang attends to prefixes of 8192 tokens and more in FP8, up to 131,072 tokens a
batch in one call with the new ones (one-shot), beyond that in chunks. A one-shot K and V
are projected from the cache's FP8 rows, those of the new tokens too, as SGLang does it;
here prefixes are short, and that threshold 1. Before 0.5.16 `k_scale` and `v_scale` have no
part in fa3's attention. It leaves the rows of padding unwritten, patched or not.

"""


def _spans(case: Case, backend: str) -> str:
    """The outcome on a backend, with the releases of each where they differ."""
    spans: list[tuple[str, list[str]]] = []
    for release in RELEASES:
        if backend in (*release.backends, FA3):
            outcome = str(case.outcome(backend, release))
            if not spans or spans[-1][0] != outcome:
                spans.append((outcome, []))
            spans[-1][1].append(release.version)
    if len(spans) == 1:
        return spans[0][0]
    return "; ".join(
        f"{' to '.join(dict.fromkeys((them[0], them[-1])))}: {outcome}"
        for outcome, them in spans
    )


def batches_document() -> str:
    """The text of docs/batches.md."""
    names = ("tokenspeed_mla", "cutedsl_mla", "trtllm_mla", FA3)
    lines = [f"| case | | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for case in CASES + FORCED:
        cells = f"`{case.name}`", case.title, *(_spans(case, name) for name in names)
        lines.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(batches_document(), end="")
