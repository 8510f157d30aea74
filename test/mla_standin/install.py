"""Stands in for tokenspeed_mla and trtllm-gen in a process that runs SGLang: puts the
functions of `mla_standin.kernels` where SGLang finds the real ones, and opens the checks
for a Blackwell GPU that come before them. Everything else stays the real one."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from mla_standin import kernels


def tokenspeed_module() -> ModuleType:
    """The part of the package tokenspeed_mla 0.1.1 that SGLang uses."""
    package = ModuleType("tokenspeed_mla", kernels.__doc__)
    # Without one, importlib.util.find_spec raises.
    package.__spec__ = ModuleSpec("tokenspeed_mla", loader=None)
    prefill = package.mla_prefill = ModuleType("tokenspeed_mla.mla_prefill")
    prefill._compiled_kernels = kernels.compiled_kernels
    prefill._compile_prefill_kernel = kernels.compile_prefill_kernel
    prefill._enable_ex2_emulation = lambda: False
    package.tokenspeed_mla_prefill = kernels.tokenspeed_mla_prefill
    package.tokenspeed_mla_decode = kernels.tokenspeed_mla_decode
    # Only the size of a workspace, which the stand-in does not use, depends on it.
    package.get_num_sm = lambda device: 1
    return package


def install() -> None:
    """Must run in every process of the server before SGLang loads its backends: at the
    top level of the main module, which SGLang's workers, being spawned, import too."""
    package = tokenspeed_module()
    sys.modules["tokenspeed_mla"] = package
    sys.modules["tokenspeed_mla.mla_prefill"] = package.mla_prefill

    import flashinfer.decode
    import flashinfer.prefill

    flashinfer.prefill.trtllm_ragged_attention_deepseek = (
        kernels.trtllm_ragged_attention_deepseek
    )
    flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla = (
        kernels.trtllm_batch_decode_with_kv_cache_mla
    )

    import sglang.srt.server_args
    import sglang.srt.utils
    import sglang.srt.utils.common

    sglang.srt.server_args.is_blackwell_supported = lambda *args: True
    for module in (sglang.srt.utils, sglang.srt.utils.common):
        module.is_tokenspeed_mla_available = lambda: True
