"""The patched SGLang in a process of its own, since a broken one may take it down.

    python prefill_patch/selftest.py gpus            what torch sees, as JSON
    python prefill_patch/selftest.py kernels TREE    import, run and time the kernels

TREE is the folder that holds the patched `sglang`. `kernels` prints a line a check and
returns 0 if all of them are ok.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

if not __package__:
    # Run by its path: the modules beside this one must not hide others by their names.
    _HERE = Path(__file__).resolve().parent
    _OTHERS = [path for path in sys.path if Path(path).resolve() != _HERE]
    sys.path = [str(_HERE.parent), *_OTHERS]

import torch

from prefill_patch import SOURCE
from prefill_patch.doctor import BACKENDS, FAIL, OK, UNKNOWN, Check

FP8 = torch.float8_e4m3fn

# Float32 arithmetic may fall on the other side of a tie than the float64 reference.
MAX_DIFFERING_SHARE, MAX_ULPS = 1e-4, 1
GOOD_SHARE, BAD_SHARE = 0.9, 0.5

_NO_MEMORY = (
    "not run, too little GPU memory is free (5 GiB are enough): stop what else runs on "
    "the GPU and run this again"
)
_REPAIR = "repair this Python's packages"
_OFF = "Set SGLANG_MLA_FP8_PREFILL=off, or revert the patch, until it is understood"


class Dims(NamedTuple):
    """The attention of a model; by default DeepSeek-V3's."""

    heads: int = 128
    nope: int = 128
    rope: int = 64
    v: int = 128
    lora: int = 512


class Kernels(NamedTuple):
    prefill: Callable
    pack: Callable
    quantize: Callable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The patched SGLang's self-test.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gpus")
    commands.add_parser("kernels").add_argument("tree", type=Path)
    args = parser.parse_args(argv)
    if args.command == "gpus":
        print(json.dumps(visible_gpus()))
        return 0
    sys.path.insert(0, str(args.tree))
    passed = True
    for check in run(args.tree):
        print(check, flush=True)
        passed = passed and check.mark == OK
    return 0 if passed else 1


def visible_gpus() -> dict:
    """The GPUs as torch, and so a server in this Python, sees them."""
    gpus, problem = [], None
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append([gpu.name, [gpu.major, gpu.minor], gpu.total_memory])
    except Exception as error:
        problem = _brief(error)
    return {
        "gpus": gpus,
        "problem": problem,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
    }


def run(tree: Path, dims: Dims = Dims(), tokens: int = 333) -> Iterator[Check]:
    """Every check of the patched SGLang in `tree`, as far as it gets."""
    try:
        kernels = load_kernels(tree)
        reference = load_reference()
    except Exception as error:
        text = f"{_brief(error)}; a server would stop the same way: {_REPAIR}"
        yield Check(FAIL, "kernels", text)
        return
    yield check_backends()
    # A rank of a tensor-parallel group has a part of the heads, and other launches.
    for heads in sorted({dims.heads, max(dims.heads // 8, 1)}, reverse=True):
        shard = dims._replace(heads=heads)
        for name, launch in LAUNCHES.items():
            subject = f"{name} kernel, {heads} heads"
            check = check_exactness(subject, launch, kernels, reference, tokens, shard)
            yield check
            if check.mark != OK:
                # What an error leaves of the GPU's context makes the rest fail too.
                return
    yield from check_bandwidth(kernels, reference, dims)


def load_kernels(tree: Path) -> Kernels:
    import sglang

    found = sglang.__file__ and Path(sglang.__file__).resolve().parent
    if found != (tree / "sglang").resolve():
        raise ImportError(f"sglang comes from {found}, not from {tree / 'sglang'}")
    from sglang.jit_kernel.fp8_quantize import fp8_quantize
    from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
    from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8

    return Kernels(mla_prefill_quantize_fp8, mla_kv_pack_quantize_fp8, fp8_quantize)


def load_reference() -> ModuleType:
    """The float64 definitions that the kernels' own tests use."""
    path = SOURCE / "jit_kernel/tests/fp8_reference.py"
    spec = importlib.util.spec_from_file_location("fp8_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    return reference


def check_backends() -> Check:
    """Whether the patched modules import, and the backends have the hook."""
    attention = "sglang.srt.layers.attention"
    try:
        hook = importlib.import_module(f"{attention}.mla_fp8_prefill")
        for backend, name in BACKENDS.items():
            module = importlib.import_module(f"{attention}.{backend}_backend")
            if not issubclass(getattr(module, name), hook.MLAFP8PrefillMixin):
                raise TypeError(f"{name} is without MLAFP8PrefillMixin")
        importlib.import_module(
            "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mha"
        )
    except Exception as error:
        text = f"{_brief(error)}; a server would stop the same way: {_REPAIR}"
        return Check(FAIL, "backends", text)
    return Check(OK, "backends", f"{' and '.join(BACKENDS)} import with the hook")


class Output(NamedTuple):
    """What a launch wrote, and the float64 result before rounding."""

    name: str
    actual: torch.Tensor
    wanted: torch.Tensor


def launch_prefill(
    kernels: Kernels, reference: ModuleType, tokens: int, dims: Dims
) -> list[Output]:
    inputs = prefill_inputs(reference, tokens, dims)
    q, kv, kv_a, k_pe = (inputs[name] for name in ("q", "kv", "kv_a", "k_pe"))
    k_nope, v = kv[..., : dims.nope], kv[..., dims.nope :]
    plant_specials(q, k_nope, v, kv_a, k_pe)
    with poisoned_allocations():
        q_fp8, k_fp8, v_fp8 = kernels.prefill(**inputs)
    rope = inputs["positions"], inputs["cos_sin_cache"], inputs["is_neox"]
    q_nope, q_pe = q[..., : dims.nope], reference.rotate(q[..., dims.nope :], *rope)
    k_pe = reference.rotate(k_pe, *rope)
    cache, slots = inputs["kv_cache"][:, 0], inputs["cache_loc"]
    free = torch.ones(cache.shape[0], dtype=torch.bool, device=cache.device)
    free[slots] = False
    # Indexing is not there for every FP8 type on every device.
    bits = cache.view(torch.uint8)
    rows, others = bits[slots].view(FP8), bits[free].view(FP8)
    return [
        Output("q", q_fp8, _cat(q_nope, q_pe)),
        Output("k", k_fp8, _cat(k_nope, k_pe.expand(-1, dims.heads, -1))),
        Output("v", v_fp8, v.double()),
        Output("cache rows", rows, _cat(kv_a, k_pe[:, 0])),
        Output("free cache rows", others, torch.full_like(others.double(), torch.nan)),
    ]


def launch_pack(
    kernels: Kernels, reference: ModuleType, tokens: int, dims: Dims
) -> list[Output]:
    inputs = prefill_inputs(reference, tokens, dims)
    kv, k_pe = inputs["kv"], inputs["k_pe"]
    k_nope, v = kv[..., : dims.nope], kv[..., dims.nope :]
    plant_specials(k_nope, k_pe, v)
    k_out = reference.poison((tokens, dims.heads, dims.nope + dims.rope), FP8)
    v_out = reference.poison((tokens, dims.heads, dims.v), FP8)
    # Powers of two, so that scaling itself does not round.
    kernels.pack(k_nope, k_pe, v, 0.5, 0.25, k_out=k_out, v_out=v_out)
    k = _cat(k_nope, k_pe.expand(-1, dims.heads, -1))
    return [Output("k", k_out, k * 0.5), Output("v", v_out, v.double() * 0.25)]


def launch_quantize(
    kernels: Kernels, reference: ModuleType, tokens: int, dims: Dims
) -> list[Output]:
    x = reference.slice_of(tokens, dims.heads, dims.v)
    plant_specials(x)
    out = reference.poison(x.shape, FP8)
    kernels.quantize(x, out=out)
    return [Output("out", out, x.double())]


LAUNCHES = {
    "prefill": launch_prefill,
    "pack": launch_pack,
    "quantize": launch_quantize,
}


def compare(reference: ModuleType, subject: str, outputs: list[Output]) -> Check:
    """Judge what a launch wrote: nearly all bit for bit, the rest one step off."""
    elements, differing, wrong = 0, 0, []
    for name, actual, wanted in outputs:
        off = reference.ulps_off(actual, reference.round_to_fp8(wanted, actual.dtype))
        count, worst = int((off != 0).sum()), int(off.max())
        elements += off.numel()
        differing += count
        if worst > MAX_ULPS or count > max(off.numel() * MAX_DIFFERING_SHARE, 1):
            at = (off == worst).nonzero()[0].tolist()
            by = "NaN or unwritten" if worst > 0xFF else f"{worst} steps off"
            wrong.append(
                f"{count} of {off.numel()} elements of {name} differ from the float64 "
                f"reference, {name}{at} is {by}"
            )
    if wrong:
        return Check(FAIL, subject, f"{'; '.join(wrong)}. {_OFF}")
    text = f"all {elements} elements equal the float64 reference bit for bit"
    if differing:
        text = f"{differing} of {elements} elements one step off the float64 reference"
        text += ", as float32 arithmetic may be; the others equal it bit for bit"
    return Check(OK, subject, text)


def check_bandwidth(
    kernels: Kernels, reference: ModuleType, dims: Dims, tokens: int = 8192
) -> Iterator[Check]:
    """Each kernel's share of what a device copy of as many bytes reaches."""
    if reference.DEVICE != "cuda":
        yield Check(UNKNOWN, "bandwidth", "torch sees no GPU")
        return
    try:
        yield from _bandwidth(kernels, reference, dims, tokens)
    except torch.cuda.OutOfMemoryError:
        yield Check(UNKNOWN, "bandwidth", _NO_MEMORY)


def _bandwidth(
    kernels: Kernels, reference: ModuleType, dims: Dims, tokens: int
) -> Iterator[Check]:
    inputs = prefill_inputs(reference, tokens, dims)
    kv, k_pe = inputs["kv"], inputs["k_pe"]
    k_nope, v = kv[..., : dims.nope], kv[..., dims.nope :]
    k_out = torch.empty_like(inputs["q"], dtype=FP8)
    v_out = torch.empty(v.shape, dtype=FP8, device=kv.device)
    # Every input once and every output once; q's and k's outputs are of one size.
    inputs_read = _bytes(inputs["q"], kv, inputs["kv_a"], k_pe)
    written = 2 * _bytes(k_out) + _bytes(v_out) + tokens * (dims.lora + dims.rope)
    runs = {
        "prefill": (
            inputs_read + written,
            lambda: kernels.prefill(**inputs),
        ),
        "pack": (
            _bytes(kv, k_pe, k_out, v_out),
            lambda: kernels.pack(k_nope, k_pe, v, k_out=k_out, v_out=v_out),
        ),
        "quantize": (
            _bytes(v, v_out),
            lambda: kernels.quantize(v, out=v_out),
        ),
    }
    for name, (moved, launch) in runs.items():
        source = torch.ones(moved // 2, dtype=torch.uint8, device=kv.device)
        target = torch.empty_like(source)
        copied, taken = median_times(lambda: target.copy_(source), launch)
        del source, target
        yield judge_bandwidth(name, tokens, dims.heads, moved, copied, taken)


def judge_bandwidth(
    name: str, tokens: int, heads: int, moved: int, copied: float, taken: float
) -> Check:
    """The verdict on a kernel that took `taken` ms where a copy took `copied` ms."""
    share = copied / taken
    text = (
        f"{share:.2f} of copy bandwidth: {taken * 1e3:.0f} us for {tokens} tokens, "
        f"{heads} heads; the copy reaches {moved / copied / 1e6:.0f} GB/s"
    )
    if share < BAD_SHARE:
        text += f". Far below the {GOOD_SHARE} expected: is the GPU shared? Else {_OFF}"
        return Check(FAIL, f"{name} bandwidth", text)
    if share < GOOD_SHARE:
        text += f". Below the {GOOD_SHARE} expected, but correct"
    return Check(OK, f"{name} bandwidth", text)


def median_times(*launches: Callable, repeats: int = 50) -> list[float]:
    """Median milliseconds of each, taken in turns so that clocks treat them alike."""
    times = [[] for _ in launches]
    for turn in range(repeats + 5):
        for launch, taken in zip(launches, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch()
            end.record()
            # The first turns compile, allocate and warm up.
            if turn >= 5:
                taken.append((start, end))
    torch.cuda.synchronize()
    return [
        statistics.median(start.elapsed_time(end) for start, end in taken)
        for taken in times
    ]


def prefill_inputs(reference: ModuleType, tokens: int, dims: Dims) -> dict:
    """Random arguments of the prefill kernel, as views where SGLang passes views."""
    torch.manual_seed(0)
    positions, slots = 4096, tokens + 64
    exponent = torch.arange(0, dims.rope, 2, device=reference.DEVICE) / dims.rope
    angle = torch.outer(
        torch.arange(positions, device=reference.DEVICE).float(), 1e4**-exponent
    )
    return dict(
        q=reference.slice_of(
            tokens, dims.heads, dims.nope + dims.rope, before=0, after=0
        ),
        kv=reference.slice_of(
            tokens, dims.heads, dims.nope + dims.v, before=0, after=0
        ),
        kv_a=reference.slice_of(tokens, dims.lora, before=0, after=0),
        k_pe=reference.slice_of(tokens, 1, dims.rope, before=dims.lora, after=0),
        positions=torch.randint(0, positions, (tokens,), device=reference.DEVICE),
        cos_sin_cache=torch.cat([angle.cos(), angle.sin()], dim=-1),
        is_neox=False,
        qk_nope_head_dim=dims.nope,
        kv_cache=reference.poison((slots, 1, dims.lora + dims.rope), FP8),
        cache_loc=torch.randperm(slots, device=reference.DEVICE)[:tokens],
    )


def plant_specials(*tensors: torch.Tensor) -> None:
    """What has to saturate or to stay NaN, in the first tokens of each."""
    for x in tensors:
        for token, value in enumerate((float("inf"), float("nan"), -1e4)):
            if token < x.shape[0]:
                x[token, ..., token] = value


@contextmanager
def poisoned_allocations():
    """Memory that a kernel allocates holds NaN, so that what it leaves out shows."""
    fill = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = before[2]


def check_exactness(
    subject: str, launch: Callable, kernels: Kernels, reference: ModuleType, *shape
) -> Check:
    try:
        return compare(reference, subject, launch(kernels, reference, *shape))
    except torch.cuda.OutOfMemoryError:
        return Check(UNKNOWN, subject, _NO_MEMORY)
    except Exception as error:
        return Check(FAIL, subject, f"{_brief(error)}. {_OFF}")


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0].strip()}" if lines else name


def _cat(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.double() for x in tensors], dim=-1)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


if __name__ == "__main__":
    sys.exit(main())
