"""The SGLang releases that the patch is for, and all in which they differ for it.

A new release is a row of the table. Where its files need other edits, a section of an
edit file says so (edits.py); where modules or names of the patch have to be elsewhere,
`names` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# From 0.5.13 on SGLang has a hook and kernels of its own, which other backends use too:
# they stay, and the patch's have other names and a folder for themselves.
_BESIDE_A_HOOK = {
    "prepare_prefill_qkv": "prepare_fp8_prefill",
    "_fused_rope_fp8_quantize": "_rope_quantize_qk_to_fp8",
    "sglang.jit_kernel": "sglang.jit_kernel.mla_fp8",
    "sglang.jit_kernel.benchmark.utils": "sglang.jit_kernel.benchmark.utils",
    "sglang.jit_kernel.rope": "sglang.jit_kernel.rope",
    "sglang.jit_kernel.utils": "sglang.jit_kernel.utils",
    "stage-b-kernel-unit-1-gpu-large": "base-b-kernel-unit-1-gpu-large",
    "stage-b-kernel-benchmark-1-gpu-large": "base-b-kernel-benchmark-1-gpu-large",
}
_SUITES_RENAMED = _BESIDE_A_HOOK | {
    "stage-b-kernel-unit-1-gpu-large": "base-b-kernel-unit-test-1-gpu-large",
    "stage-b-kernel-benchmark-1-gpu-large": "base-b-kernel-benchmark-test-1-gpu-large",
}
_KERNELS_MOVED = _SUITES_RENAMED | {
    "sglang.jit_kernel": "sglang.kernels.ops.mla_fp8",
    "sglang.jit_kernel.benchmark.utils": "sglang.kernels.jit.benchmark.utils",
    "sglang.jit_kernel.rope": "sglang.kernels.ops.attention.rope",
    "sglang.jit_kernel.utils": "sglang.kernels.jit.utils",
}

# Where SGLang's CI takes test_*.py and bench_*.py of kernels from, where that is not
# beside them; relative to its package.
_BESIDE_OTHERS = {
    "test": "jit_kernel/tests/mla_fp8",
    "bench": "jit_kernel/benchmark/mla_fp8",
}
_IN_REGISTERED = {
    "test": "../../test/registered/jit/mla_fp8",
    "bench": "../../test/registered/jit/benchmark/mla_fp8",
}
_IN_REGISTERED_KERNELS = {
    "test": "../../test/registered/kernels/ops/mla_fp8",
    "bench": "../../test/registered/kernels/benchmark/mla_fp8",
}

_BACKENDS = {
    "trtllm_mla": "trtllm_mla_backend:TRTLLMMLABackend",
    "tokenspeed_mla": "tokenspeed_mla_backend:TokenspeedMLABackend",
}
# Where `tokenspeed_mla` is another name for this.
_CUTEDSL_BACKENDS = {
    "trtllm_mla": "trtllm_mla_backend:TRTLLMMLABackend",
    "cutedsl_mla": "cutedsl_mla_backend:CuteDslMLAPrefillBackend",
}


@dataclass(frozen=True)
class Release:
    """One release.

    `names` are dotted names of the patch's sources and what they are here; a file of the
    patch moves with its module. `backends` are the attention backends with the hook that
    need SM100, and `module:Class` of each. `kernel_tests` is where the kernels' own tests
    go, and `tests` says whether a checkout gets the tests of servers for SGLang's CI.
    `digest` is of the files as published that the patch edits (plugin.py).
    """

    version: str
    digest: str
    names: Mapping[str, str] = field(default_factory=dict)
    kernel_tests: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=lambda: _BACKENDS)
    tests: bool = False

    def renamed(self, code: str) -> str:
        """Code of the patch with the names of this release, imports in isort's order."""
        if not self.names:
            return code
        longest_first = sorted(self.names, key=len, reverse=True)
        pattern = rf"\b({'|'.join(map(re.escape, longest_first))})\b"
        code = re.sub(pattern, lambda found: self.names[found[0]], code)
        return _IMPORTS.sub(lambda run: "".join(_by_module(run[0])), code)

    def path(self, path: str) -> str:
        """Where a file of the patch goes, relative to SGLang's package."""
        name = path.rpartition("/")[2]
        folder = self.kernel_tests.get(name.partition("_")[0])
        if folder:
            return f"{folder}/{name}"
        module, dot, suffix = path.replace("/", ".").rpartition(".")
        renamed = self.renamed(f"sglang.{module}").removeprefix("sglang.")
        return renamed.replace(".", "/") + dot + suffix


_IMPORT = r"from sglang\.\S+ import (?:\([^)]*\)|[^(\n]*)\n"
_IMPORTS = re.compile(rf"^(?:{_IMPORT}){{2,}}", re.MULTILINE)


def _by_module(run: str) -> list[str]:
    return sorted(re.findall(_IMPORT, run), key=lambda stmt: stmt.split()[1])


RELEASES = (
    Release("0.5.12", "c22aa5d430f17d58", tests=True),
    Release("0.5.12.post1", "c22aa5d430f17d58", tests=True),
    Release("0.5.13", "b09d35244cec90d0", _BESIDE_A_HOOK, _BESIDE_OTHERS),
    Release("0.5.13.post1", "b09d35244cec90d0", _BESIDE_A_HOOK, _BESIDE_OTHERS),
    Release("0.5.14", "254453047374a7bd", _BESIDE_A_HOOK, _IN_REGISTERED),
    Release("0.5.15", "4fbf0b0ef5988ff3", _SUITES_RENAMED, _IN_REGISTERED),
    Release("0.5.15.post1", "ebd3a00b231c60ba", _SUITES_RENAMED, _IN_REGISTERED),
    Release("0.5.16", "798125359bebb739", _SUITES_RENAMED, _IN_REGISTERED),
    Release("0.5.17", "7946584c24b05093", _KERNELS_MOVED, _IN_REGISTERED_KERNELS),
    Release("0.5.18", "85a5e5c4b00e2bef", _KERNELS_MOVED, _IN_REGISTERED_KERNELS),
    Release("0.5.19", "59b62b05bf11a47a", _KERNELS_MOVED, _IN_REGISTERED_KERNELS),
    Release("0.5.20", "20e13b2eb3947acb", _KERNELS_MOVED, _IN_REGISTERED_KERNELS),
    Release("0.5.21", "833b0913d62eb0d3", _KERNELS_MOVED, _IN_REGISTERED_KERNELS),
    Release("0.5.22", "ee850bb77cc6a1ca", _KERNELS_MOVED, _IN_REGISTERED_KERNELS),
    Release(
        "0.5.23",
        "f54be04177f3ff98",
        _KERNELS_MOVED,
        _IN_REGISTERED_KERNELS,
        _CUTEDSL_BACKENDS,
    ),
)

# The backends of all of them, which need SM100, and Hopper's, which all of them have.
FA3 = "fa3"
BACKENDS = {name: one.backends[name] for one in RELEASES for name in one.backends}
BACKENDS[FA3] = "flashattention_backend:FlashAttentionBackend"
# What the patch's sources are written for.
BASE = RELEASES[1]


def ordered(version: str) -> tuple[int, ...]:
    """A key that sorts versions; before a release come its pre- and dev-releases."""
    numbers, kind, number = re.match(
        r"(\d+(?:\.\d+)*)(?:\.?(a|b|rc|dev|post)(\d+))?", version
    ).groups()
    stage = {None: 0, "post": 1}.get(kind, -1)
    return (*map(int, numbers.split(".")), stage, int(number or 0))


def stated(version: str) -> str:
    """The release that a version is of: `git describe` says X-N-gCOMMIT of N commits on
    X, and what is local to a tree follows a `+`."""
    return re.sub(r"-\d+-g[0-9a-f]+$|\+.*", "", version)


def candidates(version: str) -> Iterator[Release]:
    """What a tree of a version can be taken for, likeliest first: a release for itself,
    another tree for what it comes after, then for any release, from the newest on."""
    known = {one.version: one for one in RELEASES}.get(version.partition("+")[0])
    if known:
        yield known
        return
    newest_first = list(RELEASES[::-1])
    if re.match(r"\d+(\.\d+)+", version):
        before = [
            one for one in newest_first if ordered(one.version) <= ordered(version)
        ]
        yield from before[:1]
        newest_first = [one for one in newest_first if one not in before[:1]]
    yield from newest_first
