"""One attention layer of one side, in its process: how far from float64, and how fast.

The layer, its backend and its batches are SGLang's own (mla_harness.py). The attention
kernel is the backend's own where this GPU has it, and else a stand-in; the float64
values come from the definition, with q_b_proj and kv_b_proj in float64 for every setting.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import gpu_stand_ins
import machine
import mla_harness as harness
import torch
from gpu_trace import launched
from mla_harness import Batch, Env, reference
from mla_standin import kernels
from sglang_internals import backend_class, has_own_hook, running
from trial.layer_cases import CASES, PARTS

from prefill_patch.doctor import GEMM_SWITCH, SWITCH
from prefill_patch.releases import FA3
from prefill_patch.selftest import runs_attention, visible_gpus

SETTINGS = {
    "unpatched": {},
    "GEMM off": {SWITCH: "fused", GEMM_SWITCH: "off"},
    "GEMM on": {SWITCH: "fused", GEMM_SWITCH: "on"},
    "auto": {SWITCH: "fused", GEMM_SWITCH: "auto"},
}
ATTENTION, OTHER = (f"trial.{part}" for part in PARTS[1:])
LAYERS, WARM = 4, 2
# DeepSeek-V3's, for all of its heads: of a dense layer, and of the experts that a token
# meets in another.
MLP_WIDTH = 18432

_range = torch.autograd.profiler.record_function


class Attention:
    """The prefill attention kernel of a backend, in a profiler range."""

    def __init__(self, backend: str):
        module = sys.modules[backend_class(backend).__module__]
        replaced, real = gpu_stand_ins.REPLACED, None
        sm100 = runs_attention(visible_gpus()[0])
        if backend == FA3:
            holder, self.name = module, "flash_attn_varlen_func"
            if gpu_stand_ins.HAS_FA3:
                real = replaced[self.name]
        elif backend == "tokenspeed_mla":
            holder, self.name = gpu_stand_ins.TOKENSPEED, "tokenspeed_mla_prefill"
            if sm100 and replaced.get(backend) is not None:
                holder = module.tokenspeed_mla = replaced[backend]
                real = getattr(holder, self.name)
        else:
            self.name = "trtllm_ragged_attention_deepseek"
            holder = gpu_stand_ins.FLASHINFER.prefill
            if harness.HAS_GPU:
                holder = sys.modules["flashinfer.prefill"]
            if sm100:
                real = replaced[self.name]
        self.real: Callable | None = real
        self.stand_in: Callable = getattr(kernels, self.name)
        self.returned: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._records = False
        setattr(holder, self.name, self)

    def __call__(self, **arguments):
        if self._records or self.real is None:
            result = self._run(self.stand_in, arguments)
        if self.real is not None:
            result = self._run(self.real, arguments)
        if self._records:
            out, lse, *_ = result if isinstance(result, tuple) else (result, None)
            self.returned.append((out.clone(), None if lse is None else lse.clone()))
        return result

    @staticmethod
    def _run(kernel: Callable, arguments: dict[str, Any]):
        with _range(ATTENTION):
            return kernel(**arguments)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In this context the stand-in runs too: it refuses what the kernel would not
        take, and keeps what the kernel is handed."""
        self.returned, self._records = [], True
        kernels.SETTINGS.compute = True
        try:
            yield
        finally:
            self._records = False
            kernels.SETTINGS.compute = False


class Layer:
    """The layer on one SGLang, for the settings that are asked for.

    `dims` are of one rank; `divisor` makes batches smaller, for a machine without a GPU.
    """

    def __init__(
        self,
        backend: str,
        heads: int,
        dims: Sequence[int] = reference.MODELS["deepseek-v3"],
        hidden: int = 7168,
        q_lora: int = 1536,
        slots: int = 40960,
        divisor: int = 1,
    ):
        self.backend, self.divisor = backend, divisor
        self.dims = reference.MLADims(*dims)._replace(heads=heads)
        self.sizes = dict(hidden=hidden, q_lora=q_lora, slots=slots, max_context=slots)
        self.attention = Attention(backend)
        self._envs: dict[str, Env] = {}
        self._timed: dict[str, tuple] = {}

    def env(self, setting: str) -> Env:
        if setting not in self._envs:
            # Where SGLang would absorb a shorter prefix on fa3.
            environ = {"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1"}
            with mock.patch.dict(os.environ, {**environ, **SETTINGS[setting]}):
                kernels.SETTINGS.compute = True  # for what backends ask at start
                env = harness.make_env(self.dims, self.backend, **self.sizes)
                kernels.SETTINGS.compute = False
            env.exact_projection = True
            self._envs[setting] = env
        return self._envs[setting]

    def describe(self, setting: str) -> dict[str, Any]:
        """The machine, whose kernel attends, whether SGLang has a hook of its own on this
        backend, and what the patch's GEMM says of this layer."""
        env = self.env(setting)
        return {
            "machine": machine.describe(),
            "kernel": self.attention.name,
            "real": self.attention.real is not None,
            "own_hook": has_own_hook(env.backend),
            "declined": getattr(env.backend, "_process_reason", None),
            "no_gemm": getattr(env.backend, "_gemm_reason", None),
        }

    def compare(self, setting: str, case: str) -> dict[str, Any]:
        """How the operands, the cache rows, the attention output and the log-sum-exps of
        a batch of CASES differ from float64."""
        env = self.env(setting)
        fields = dict(CASES[case])
        for name in ("extend_lens", "prefix_lens"):
            lens = fields.get(name, ())
            fields[name] = [n and max(1, n // self.divisor) for n in lens] or None
        batch = harness.make_batch(env, **fields)
        memory = reference.nan_memory if "NaN" in case else nullcontext
        with self.attention.recording():
            result = harness.run_prefill(env, batch, around=lambda _: memory())
        n = batch.tokens
        wanted = harness.expected_attention(env, batch, result, rounded=False)
        output, padding = result.attn_output[:n], result.attn_output[n:]
        return {
            "operands": self._operands(env, batch, result),
            "attention": harness.relative_error(output, wanted),
            "finite": bool(output.isfinite().all()),
            "padding": bool(padding.isfinite().all()),
            "kernel": self._kernel(result.calls),
        }

    def _operands(self, env: Env, batch: Batch, result) -> dict[str, list[int]]:
        """By operand: elements, those that are not the float64 value rounded once, and the
        most steps that one is off."""
        pairs: dict[str, list] = {"q": [], "k": [], "v": []}
        causal = [call.real_rows() for call in result.calls if call.causal]
        chunks = [call.real_rows()[1:] for call in result.calls if not call.causal]
        for some in zip(causal, harness.expected_causal(env, batch, result)):
            for name, *pair in zip("qkv", *some):
                pairs[name].append(pair)
        if result.method != "MHA_ONE_SHOT":
            for some in zip(chunks, harness.expected_chunks(env, batch), strict=True):
                for name, *pair in zip("kv", *some):
                    pairs[name].append(pair)
        slots = batch.out_cache_loc[: batch.tokens]
        rows = result.cache[slots, 0].view(env.pool.dtype)
        exact = harness.expected(env, batch).rows[: batch.tokens]
        pairs["cache row"] = [[rows, exact]]
        found = {}
        for name, some in pairs.items():
            differences = [reference.fp8_difference(*pair) for pair in some]
            found[name] = [
                sum(x.elements for x in differences),
                sum(x.differing for x in differences),
                max(x.max_ulps for x in differences),
            ]
        return found

    def _kernel(self, calls: Sequence) -> dict[str, Any]:
        """The worst of the kernel's calls against float64 attention of what they were
        handed: the output's error, that of the log-sum-exps in nats, and their base."""
        errors, off = [], {"e": [], "2": []}
        for call, (out, lse) in zip(calls, self.attention.returned, strict=True):
            wanted, wanted_lse = kernels.ragged_attention(
                *call.real_rows(),
                call.cu_q,
                call.cu_kv,
                call.bmm1_scale,
                call.causal,
                torch.float64,
            )
            seen = wanted_lse.isfinite()
            out = out[: len(wanted)][seen]
            errors.append(harness.relative_error(out, wanted[seen] * call.bmm2_scale))
            if lse is None:
                continue
            if self.backend == FA3:
                lse = lse.T
            lse = lse[: len(wanted)].double()[seen]
            for base, unit in (("e", 1.0), ("2", math.log(2))):
                off[base].append((lse * unit - wanted_lse[seen]).abs().max().item())
        found: dict[str, Any] = {"error": max(errors)}
        if off["e"]:
            base = min(off, key=lambda base: max(off[base]))
            found |= {"lse": max(off[base]), "base": base}
        return found

    def load(self, setting: str, tokens: int, prefix: int) -> None:
        """Make the batch that `time` runs, and run it before anything counts."""
        self._timed.pop(setting, None)
        env = self.env(setting)
        batch = harness.make_batch(env, [tokens], [prefix])
        forward_batch = harness.start_batch(env, batch)
        with running(env.backend):
            env.backend.init_forward_metadata(forward_batch)
        self._timed[setting] = (env, batch, forward_batch, self._mlp())
        self._run(setting, WARM)

    def _mlp(self) -> list[torch.Tensor]:
        """The weights of the MLP, as this rank has them."""
        full = reference.MODELS["deepseek-v3"].heads
        width = MLP_WIDTH * self.dims.heads // full // self.divisor
        hidden = self.sizes["hidden"]
        shapes = ((2 * width, hidden), (hidden, width))
        options = dict(dtype=torch.bfloat16, device=harness.DEVICE)
        return [torch.randn(shape, **options) * shape[1] ** -0.5 for shape in shapes]

    def _run(self, setting: str, layers: int) -> None:
        env, batch, forward_batch, (up, down) = self._timed[setting]
        env.activate()
        with torch.no_grad(), running(env.backend), _parts(env.attn):
            for _ in range(layers):
                state = harness.prepare(env, forward_batch, batch.hidden)
                output = env.attn.forward_core(state)
                with _range(OTHER):
                    inner = torch.nn.functional.linear(output, up)[:, : down.shape[1]]
                    torch.nn.functional.linear(inner, down)
        if harness.HAS_GPU:
            torch.cuda.synchronize()

    def time(self, setting: str) -> dict[str, float]:
        """GPU microseconds of a layer by part, and the launches of its preparation, of
        the batch that was loaded."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as done:
            self._run(setting, LAYERS)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            done.export_chrome_trace(str(trace))
            found = parts_of(json.loads(trace.read_text())["traceEvents"])
        if not found["preparation"]:
            raise RuntimeError("the profiler sees no kernels")
        return {part: value / LAYERS for part, value in found.items()}

    def unload(self) -> None:
        self._timed.clear()
        if harness.HAS_GPU:
            torch.cuda.empty_cache()


@contextmanager
def _parts(attn: torch.nn.Module) -> Iterator[None]:
    """The layer's projections and norms but q_b_proj and kv_b_proj, which may be one with
    the preparation, in a profiler range of their own."""
    ranges, handles = [], []

    def enter(module, inputs):
        ranges.append(_range(OTHER))
        ranges[-1].__enter__()

    def leave(module, inputs, output):
        ranges.pop().__exit__(None, None, None)

    for name, module in attn.named_children():
        prepares = name in ("q_b_proj", "kv_b_proj")
        if ("proj" in name or "norm" in name) and not prepares:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts_of(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of a profiler's trace by part, and the launches of the preparation:
    all that was launched outside the ranges of attention and of other work."""
    complete = [e for e in events if e.get("ph") == "X" and "cat" in e]
    ranges = [
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in complete
        if not e["cat"].startswith("gpu") and e["name"] in (ATTENTION, OTHER)
    ]
    found = dict.fromkeys((*PARTS, "launches"), 0.0)
    for call, e in launched(complete):
        names = [name for start, end, name in ranges if start <= call["ts"] <= end]
        part = names[0].partition(".")[2] if names else "preparation"
        found[part] += e["dur"]
        found["launches"] += part == "preparation"
    return found
