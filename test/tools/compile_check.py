"""`make compile-check`: compile the kernels for every GPU family, without a GPU, and read
in the machine code what their speed and rounding rest on.

The public functions are called on the CPU; where they would launch, Triton compiles for
the target what it would compile for that launch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional
from unittest import mock

# Decides, before Triton is imported, that kernels are compiled and not interpreted.
os.environ["TRITON_INTERPRET"] = "0"
# On a GPU host too, nothing here is for that GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A cache may hold what another process made of other sources.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile-check-")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import sglang_cpu

sglang_cpu.install()

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm103": GPUTarget("cuda", 103, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
PDL_TARGETS = ("sm90", "sm100", "sm103", "sm120")
# Models and heads a rank; None is all of them.
SHAPES = [
    ("deepseek-v3", None),
    ("deepseek-v3", 16),
    ("deepseek-v3", 1),
    ("glm-4.7-flash", None),
    ("glm-4.7-flash", 5),
    ("mistral-4", None),
]
PREFILL_OPTIONS = [
    dict(is_neox=True),
    dict(is_neox=None),
    dict(dtype=torch.float16),
    dict(fp8_dtype=torch.float8_e5m2),
    dict(scale=0.5),
    dict(scale=torch.tensor(0.5)),
    dict(kv=None),
    dict(kv=None, k_pe_out=True),
    dict(q=None, kv=None, k_pe_out=True),
]
PROJECT_OPTIONS = [
    {},
    dict(k_pe_in_fp8=True),
    dict(dtype=torch.float16),
    dict(scale=0.5),
    dict(weight_in_fp8=True),
    dict(weight_in_fp8=True, kv_a_scale=None, k_pe_in_fp8=True),
]


class Job(NamedTuple):
    """One specialization for one target."""

    target: str
    operation: str
    pdl: bool
    model: str = "deepseek-v3"
    heads: Optional[int] = None
    options: dict = {}

    def __str__(self) -> str:
        parts = [self.target, self.operation, self.model]
        parts += [f"{self.heads} heads"] if self.heads else []
        parts += [f"{name}={value!r}" for name, value in self.options.items()]
        return " ".join(parts) + ("" if self.pdl else ", no PDL")


class Compiled(Exception):
    """Carries the kernel out of the function that would launch it."""


def jobs() -> list[Job]:
    todo = []
    for target in TARGETS:
        pdl = target in PDL_TARGETS
        full = target in ("sm90", "sm100")
        for model, heads in SHAPES if full else SHAPES[:1]:
            todo.append(Job(target, "prefill", pdl, model, heads))
            todo.append(Job(target, "pack", pdl, model, heads))
        todo.append(Job(target, "quantize", pdl))
        if full:
            for options in PREFILL_OPTIONS:
                todo.append(Job(target, "prefill", pdl, options=options))
            for options in PROJECT_OPTIONS:
                todo.append(Job(target, "project", pdl, options=options))
            for heads in (None, 1):
                todo.append(Job(target, "project q", pdl, heads=heads))
        if pdl:
            todo.append(Job(target, "prefill", pdl=False))
    return todo


def call(job: Job) -> None:
    """Call the public function as SGLang does."""
    from sglang.jit_kernel.fp8_quantize import fp8_quantize
    from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
    from sglang.jit_kernel.mla_kv_proj_quantize_fp8 import mla_kv_proj_quantize_fp8
    from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
    from sglang.jit_kernel.mla_q_proj_quantize_fp8 import mla_q_proj_quantize_fp8
    from sglang.jit_kernel.tests.fp8_reference import MODELS, prefill_inputs

    dims = MODELS[job.model]
    dims = dims._replace(heads=job.heads or dims.heads)
    options = dict(job.options)
    fp8_dtype = options.pop("fp8_dtype", torch.float8_e4m3fn)
    scale = options.pop("scale", 1.0)
    k_pe_in_fp8 = options.pop("k_pe_in_fp8", False)
    weight_in_fp8 = options.pop("weight_in_fp8", False)
    given = {
        name: options.pop(name) for name in ("q", "kv", "kv_a_scale") if name in options
    }
    if options.pop("k_pe_out", False):
        given["k_pe_out"] = torch.zeros(2, dims.rope).to(fp8_dtype)
    x = prefill_inputs(dims, tokens=2, **options)
    x.update({name: x[name].contiguous() for name in ("q", "kv", "kv_a")})
    if "q" in given:
        given["q"] = x["q"][:, :0]
    k_nope, v = x["kv"][..., : dims.nope], x["kv"][..., dims.nope :]
    # Decided when a kernel is defined; of a call, only whether the CPU is accepted.
    triton.knobs.runtime.interpret = True
    if job.operation == "prefill":
        x["kv_cache"] = x["kv_cache"].view(fp8_dtype)
        mla_prefill_quantize_fp8(
            **{**x, **given},
            k_scale_inv=scale,
            v_scale_inv=scale,
            fp8_dtype=fp8_dtype,
        )
    elif job.operation == "pack":
        mla_kv_pack_quantize_fp8(k_nope, x["k_pe"], v)
    elif job.operation == "project":
        weight = x["kv_a"].new_empty(dims.heads * 256, dims.lora)
        k_pe = x["k_pe"].to(fp8_dtype) if k_pe_in_fp8 else x["k_pe"]
        kv_a = x["kv_a"]
        if weight_in_fp8:
            kv_a, weight = kv_a.to(fp8_dtype), weight.to(fp8_dtype)
            blocks = dims.lora // 128
            given.setdefault("kv_a_scale", torch.ones(len(kv_a), blocks))
            given["weight_scale"] = torch.ones(dims.heads * 2, blocks)
        mla_kv_proj_quantize_fp8(kv_a, weight, k_pe, scale, scale, **given)
    elif job.operation == "project q":
        q_a = x["kv_a"].new_empty(2, 1536)
        weight = q_a.new_empty(dims.heads * (dims.nope + dims.rope), 1536)
        mla_q_proj_quantize_fp8(q_a, weight, x["positions"], x["cos_sin_cache"])
    else:
        fp8_quantize(v)


def compile_job(job: Job):
    """Triton's compiled kernel for what the job's call launches."""
    from sglang.jit_kernel import fp8_common

    target = TARGETS[job.target]
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
    )
    hip = target.backend == "hip"
    with mock.patch.object(fp8_common, "is_hip_runtime", lambda: hip):
        capability = None if hip else divmod(target.arch, 10)
        with mock.patch("torch.cuda.get_device_capability", lambda device: capability):
            conversion = fp8_common.fp8_conversion(torch.device("cuda"))
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        options.update(CONVERSION=conversion, ENABLE_PDL=job.pdl)
        if job.pdl:
            options["launch_pdl"] = True
        raise Compiled(run(kernel, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(driver)
    with mock.patch.object(JITFunction, "run", compile_only):
        try:
            call(job)
        except Compiled as compiled:
            return compiled.args[0]
    raise AssertionError(f"{job} launched nothing")


def read_ptx(job: Job, compiled) -> tuple[str, list[str]]:
    """(a summary, what is wrong) of code for an NVIDIA GPU."""
    ptx, wrong = compiled.asm["ptx"], []

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    loads = count(r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)")
    stores = count(r"\bst\.global\S*\.(?:v4\.b32|v2\.b64)")
    # Packing is fastest with eight elements a thread: 16 bytes in, 8 bytes out.
    narrower = count(r"\bst\.global\S*\.(?:v2\.b32|b64)") * (job.operation == "pack")
    if loads == 0 or stores + narrower == 0:
        wrong.append(f"{loads} loads and {stores} stores of 128 bits")
    conversions = count(r"\bcvt\.rn\S+e[45]m[23]")
    # SM89 has no conversion from two float32 that rounds to nearest even.
    source = "f16x2" if job.target == "sm89" else "f32"
    packed = count(rf"\bcvt\.rn\.satfinite\.e[45]m[23]x2\.{source}")
    if conversions == 0 or conversions != packed:
        wrong.append(f"{packed} of {conversions} conversions saturate and are packed")
    if "cvt.rz.f16.f32" in ptx and "-65536" not in ptx:
        wrong.append("float32 is truncated to float16 without rounding to odd before")
    for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
        if (instruction in ptx) != job.pdl:
            wrong.append(f"{instruction} {'missing' if job.pdl else 'present'}")
    usage = cubin_usage(compiled.asm["cubin"])
    if usage["STACK"] or usage["LOCAL"] or count(r"\b(?:ld|st)\.local"):
        wrong.append(f"registers spill: {usage}")
    shared = compiled.metadata.shared
    if shared > (99 if job.target in ("sm89", "sm120") else 227) * 1024:
        wrong.append(f"{shared} bytes of shared memory, more than the GPU has")
    summary = f"{usage['REG']} registers, 128-bit: {loads} loads, {stores} stores"
    return summary, wrong


def cubin_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output.stdout + output.stderr)
    return {name: int(value) for name, value in found}


def read_amdgcn(job: Job, compiled) -> tuple[str, list[str]]:
    """The same of code for an AMD GPU."""
    code, wrong = compiled.asm["amdgcn"], []
    loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx[24]\b", code))
    if loads == 0:
        wrong.append("no load of 64 or 128 bits")
    if "0x43e00000" not in code:
        wrong.append("no clamp to 448.0")
    registers, spills = (
        int(re.search(rf"\.vgpr_{name}: +(\d+)", code)[1])
        for name in ("count", "spill_count")
    )
    if spills:
        wrong.append(f"{spills} registers spill")
    return f"{registers} registers, {loads} wide loads", wrong


def check(job: Job) -> tuple[str, list[str]]:
    compiled = compile_job(job)
    read = read_amdgcn if TARGETS[job.target].backend == "hip" else read_ptx
    return read(job, compiled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sglang", default="0.5.12.post1")
    options = parser.parse_args()
    import patched_sglang

    sys.path.insert(0, str(patched_sglang.lay_out(options.sglang).patched))
    todo = jobs()
    failures = 0
    with ProcessPoolExecutor(2) as pool:
        for job, (summary, wrong) in zip(todo, pool.map(check, todo)):
            print(f"{job}: {summary}: {'; '.join(wrong) or 'ok'}", flush=True)
            failures += bool(wrong)
    print(f"{len(todo) - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
