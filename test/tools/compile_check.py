"""`make compile-check`: compile the kernels for every GPU family, without a GPU, and
read in the PTX and the machine code what their speed and rounding rest on.

Runs on the patched SGLang first on PYTHONPATH, and without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

# Decides, before Triton is imported, that kernels are compiled and not interpreted.
os.environ["TRITON_INTERPRET"] = "0"
# A cache may hold what another process made of other sources.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile-check-")

import sglang_cpu

sglang_cpu.install()

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang.jit_kernel import fp8_quantize as quantize_module
from sglang.jit_kernel import mla_kv_pack_quantize_fp8 as pack_module
from sglang.jit_kernel import mla_prefill_quantize_fp8 as prefill_module

CUDA = {"sm90": 90, "sm100": 100, "sm103": 103, "sm120": 120}
# FP8 conversion but no PDL.
CUDA_WITHOUT_PDL = {"sm89": 89}
HIP = {"gfx942": "gfx942", "gfx950": "gfx950"}

# name: (heads, nope, rope, v, lora); heads as they occur after tensor parallelism
SHAPES = {
    "DeepSeek-V3": (128, 128, 64, 128, 512),
    "DeepSeek-V3 tp8": (16, 128, 64, 128, 512),
    "GLM-4.7-Flash": (20, 192, 64, 256, 512),
    "GLM-4.7-Flash tp4": (5, 192, 64, 256, 512),
    "Mistral 4": (32, 64, 64, 128, 256),
    "one head": (1, 128, 64, 128, 512),
}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Captured(Exception):
    """Carries what a public function would have launched."""


@dataclass
class Job:
    """One specialization for one target."""

    name: str
    target: str
    pdl: bool
    kernel: str
    shape: tuple
    fp8_dtype: torch.dtype = E4M3
    dtype: torch.dtype = torch.bfloat16
    style: str = "interleaved"
    scale: float = 1.0

    def compile(self):
        """Compile exactly what the public function launches for these inputs."""
        kernel, tensors, numbers, constexprs, warps = self.launch()
        constexprs["ENABLE_PDL"] = self.pdl
        constexprs["CONVERSION"] = {
            **{name: quantize_module.CONVERT_CLAMPED for name in HIP},
            **{
                name: quantize_module.CONVERT_THROUGH_FLOAT16
                for name in CUDA_WITHOUT_PDL
            },
        }.get(self.target, quantize_module.CONVERT_DIRECTLY)
        not_specialized = {
            p.name for p in kernel.params if getattr(p, "do_not_specialize", False)
        }
        signature, attrs = {}, {}
        values = dict(zip(kernel.arg_names, (*tensors, *numbers)))
        for i, name in enumerate(kernel.arg_names):
            if name in constexprs:
                signature[name] = "constexpr"
                continue
            value = values[name]
            if value is None:
                signature[name] = "constexpr"
                constexprs[name] = None
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + POINTERS[value.dtype]
                attrs[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if name not in not_specialized and value % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        if self.target in HIP:
            target = GPUTarget("hip", HIP[self.target], 64)
        else:
            target = GPUTarget("cuda", {**CUDA, **CUDA_WITHOUT_PDL}[self.target], 32)
        source = ASTSource(kernel, signature, constexprs, attrs)
        options = {"num_warps": warps}
        if self.pdl:
            options["launch_pdl"] = True
        return triton.compile(source, target=target, options=options)

    def launch(self):
        """(kernel, tensors, numbers, constexprs, warps) of the public function."""
        heads, nope, rope, v, lora = self.shape
        s = 2
        x = lambda *size: torch.zeros(size, dtype=self.dtype)
        kv = x(s, heads, nope + v)
        if self.kernel == "prefill":
            cos_sin = None if self.style == "none" else torch.zeros(64, rope)
            call = lambda: prefill_module.mla_prefill_quantize_fp8(
                q=x(s, heads, nope + rope),
                kv=kv,
                kv_a=x(s, lora),
                k_pe=x(s, 1, lora + rope)[..., lora:],
                positions=torch.zeros(s, dtype=torch.int64),
                cos_sin_cache=cos_sin,
                is_neox=self.style == "neox",
                qk_nope_head_dim=nope,
                kv_cache=torch.zeros(64, 1, lora + rope, dtype=self.fp8_dtype),
                cache_loc=torch.zeros(s, dtype=torch.int64),
                k_scale_inv=self.scale,
                v_scale_inv=self.scale,
                fp8_dtype=self.fp8_dtype,
            )
        elif self.kernel == "pack":
            call = lambda: pack_module.mla_kv_pack_quantize_fp8(
                kv[..., :nope],
                x(s, 1, rope),
                kv[..., nope:],
                self.scale,
                self.scale,
                fp8_dtype=self.fp8_dtype,
            )
        else:
            call = lambda: quantize_module.fp8_quantize(
                kv[..., nope:], self.scale, fp8_dtype=self.fp8_dtype
            )
        try:
            call()
        except Captured as captured:
            return captured.args[0]
        raise AssertionError(f"{self.name} launched nothing")


POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    E4M3: "fp8e4nv",
    E5M2: "fp8e5",
}


def _capture(launcher, num_programs, tensors, numbers):
    raise Captured(
        (
            launcher._kernel,
            tensors,
            numbers,
            dict(launcher._constexprs),
            launcher._options["num_warps"],
        )
    )


def _no_device_check(name, x):
    """The inputs here are on the CPU and only described to the compiler."""


def prepare_modules() -> None:
    quantize_module.Launcher.__call__ = _capture
    for module in (quantize_module, pack_module, prefill_module):
        module.check_device = _no_device_check


def jobs() -> list[Job]:
    todo = []
    targets = {
        **{t: True for t in CUDA},
        **{t: False for t in (*CUDA_WITHOUT_PDL, *HIP)},
    }
    for target, pdl in targets.items():
        first = target in ("sm90", "sm100")
        for name, shape in SHAPES.items():
            if name != "DeepSeek-V3" and not first:
                continue
            for kernel in ("prefill", "pack", "quantize"):
                todo.append(Job(name, target, pdl, kernel, shape))
        deepseek = SHAPES["DeepSeek-V3"]
        variants = [dict(style="neox"), dict(style="none")] if first else []
        if first:
            variants += [dict(dtype=torch.float16), dict(fp8_dtype=E5M2)]
            variants += [dict(scale=0.5)]
        for variant in variants:
            name = "DeepSeek-V3 " + "".join(str(v) for v in variant.values())
            todo.append(Job(name, target, pdl, "prefill", deepseek, **variant))
    for target in CUDA:
        todo.append(Job("no PDL", target, False, "prefill", SHAPES["DeepSeek-V3"]))
    return todo


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of machine code, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr))
    return {name: int(value) for name, value in found.items()}


def check(job: Job) -> tuple[Job, str, list[str]]:
    """Compile and return (job, summary, what is wrong)."""
    prepare_modules()
    compiled = job.compile()
    wrong = []
    if job.target in HIP:
        return job, f"{len(compiled.asm['hsaco'])} bytes of hsaco", wrong
    ptx = compiled.asm["ptx"]
    count = Counter(
        re.findall(r"\b(?:ld|st)\.global\S*|\bcvt\.rn\S+e[45]m[23]\S+", ptx)
    )
    total = lambda pattern: sum(n for op, n in count.items() if re.search(pattern, op))
    loads16 = total(r"^ld\.global.*\.v4\.b32|^ld\.global.*\.v2\.b64")
    stores16 = total(r"^st\.global.*\.v4\.b32|^st\.global.*\.v2\.b64")
    stores8 = total(r"^st\.global.*\.v2\.b32|^st\.global.*\.b64")
    converts = total(r"^cvt")
    source = "f16x2" if job.target in CUDA_WITHOUT_PDL else "f32"
    saturating = total(rf"^cvt\.rn\.satfinite\..*x2\.{source}")
    if loads16 == 0:
        wrong.append("no 128-bit global load")
    # Packing is fastest with eight elements to a thread: 16 bytes in, 8 bytes out.
    if stores16 + (stores8 if job.kernel == "pack" else 0) == 0:
        wrong.append("no wide global store")
    if saturating == 0 or converts != saturating:
        wrong.append(f"{converts} FP8 conversions, {saturating} saturating and packed")
    if ("griddepcontrol.wait" in ptx) != job.pdl:
        wrong.append("griddepcontrol.wait " + ("missing" if job.pdl else "present"))
    if ("griddepcontrol.launch_dependents" in ptx) != job.pdl:
        wrong.append("griddepcontrol.launch_dependents misplaced")
    if re.search(r"\b(ld|st)\.local", ptx):
        wrong.append("local memory in the PTX")
    usage = resources(compiled.asm["cubin"])
    if usage["STACK"] or usage["LOCAL"]:
        wrong.append(f"registers spill: {usage}")
    summary = f"{usage['REG']:>3} registers, 128-bit: {loads16} loads {stores16} stores"
    return job, summary, wrong


def main() -> int:
    failures = 0
    todo = jobs()
    with ProcessPoolExecutor(2) as pool:
        for job, summary, wrong in pool.map(check, todo):
            what = f"{job.target:<7} {job.kernel:<9} {job.name}"
            print(f"{what:<48} {summary} {'; '.join(wrong) or 'ok'}", flush=True)
            failures += bool(wrong)
    print(f"{len(todo) - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
