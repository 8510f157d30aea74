"""The prefill kernels for SM100 themselves, as far as a machine without such a GPU goes:
compiled, and called up to the launch."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

import torch
from patched_sglang import run_python

from prefill_patch.target import cache_folder

LAUNCHED = "launched"
# How a launch ends without a GPU.
_LAUNCH_FAILED = rf"{LAUNCHED}|cudaErrorInsufficientDriver|cudaErrorNoDevice"
_CUDA = (2, 0)  # the first GPU, as DLPack has it

# What a kernel's package imports. This CuTe DSL compiles in seconds; 4.5.1, which SGLang
# 0.5.12 pins, takes minutes.
_DEPENDENCIES = {
    "tokenspeed_mla_prefill": (
        "nvidia-cutlass-dsl==4.8.1",
        "nvidia-cutlass-dsl-libs-base==4.8.1",
        "nvidia-cutlass-dsl-libs-core==4.8.1",
        "nvidia-cutlass-dsl-libs-cu12==4.8.1",
        "cuda-bindings==13.5.0",
        "cuda-pathfinder==1.9.1",
    ),
    "trtllm_ragged_attention_deepseek": ("nvidia-ml-py==13.615.71", "cuda-tile==1.7.0"),
}


def outcomes(
    kernel: str, package: str, calls: dict[str, dict[str, Any]], work: Path
) -> dict[str, str]:
    """What becomes of each call of a kernel, a function below, of a version of its
    package: LAUNCHED, or why not."""
    folder, dependencies = _fetch(package), _fetch(*_DEPENDENCIES[kernel])
    torch.save(calls, work / "calls.pt")
    arguments = ("-m", "real_kernels", kernel, str(work / "calls.pt"))
    printed = run_python(folder, *arguments, str(dependencies))
    return json.loads(printed.splitlines()[-1])


def _fetch(*requirements: str) -> Path:
    """Packages of the package index, installed into a folder of their own in the cache."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / requirements[0].replace("==", "-")
    with open(cache / ".packages.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as work:
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
            command += ["--only-binary=:all:", f"--target={work}/site", *requirements]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"pip could not get {requirements}:\n{done.stderr}")
            Path(work, "site").rename(folder)
    return folder


class _OnGPU:
    """A tensor for DLPack, said to be on a GPU; nothing reads it before the launch."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA

    def __dlpack__(self, **options):
        capsule = self._tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        pointer.restype = ctypes.c_void_p
        # A DLTensor: the address of the data, then the device.
        device = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        (2 * ctypes.c_int32).from_address(device)[:] = _CUDA
        return capsule


def tokenspeed_mla_prefill() -> Callable:
    """Compiles for SM100. The code that CuTe DSL generates for the host compares the
    operands with what the kernel was compiled for, then calls the driver."""
    os.environ["CUTE_DSL_ARCH"] = "sm_100a"
    import tvm_ffi
    from tokenspeed_mla import mla_prefill

    from_dlpack = mla_prefill.from_dlpack
    mla_prefill.from_dlpack = lambda x, **options: from_dlpack(_OnGPU(x), **options)
    torch.Tensor.cuda = lambda x: x
    tvm_ffi.use_torch_stream = contextlib.nullcontext
    return mla_prefill.tokenspeed_mla_prefill


def trtllm_ragged_attention_deepseek() -> Callable:
    """FlashInfer's checks in Python. Its launcher takes nvcc, and cubins, to build."""
    from flashinfer import prefill

    def launcher():
        raise RuntimeError(LAUNCHED)

    prefill.get_trtllm_gen_fmha_module = launcher
    return prefill.trtllm_ragged_attention_deepseek


def main(kernel: str, calls: str, dependencies: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    site.addsitedir(dependencies)
    run, results = globals()[kernel](), {}
    for name, arguments in torch.load(calls, map_location="cpu").items():
        try:
            run(**arguments)
        except Exception as error:
            launched = re.search(_LAUNCH_FAILED, str(error))
            results[name] = LAUNCHED if launched else f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
