"""What the prefill of a running server launches and how long it takes.

Launches come from SGLang's own profiler (`/start_profile`). The stand-ins run in
profiler ranges of their own, so that what they launch is told from what SGLang
launches. Times are of servers started with STANDIN_COMPUTE=none, whose attention
kernels do nothing.
"""

from __future__ import annotations

import bisect
import gzip
import json
import shutil
import statistics
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np
from e2e.servers import Request, Server
from mla_standin.kernels import CAUSAL, RANGE

# Kernels of a layer that the patch has no part in, by parts of their names.
OTHER_WORK = {
    # cuBLAS clears its workspace by memset; nothing else in a layer does.
    "projections": ("gemm", "nvjet", "cutlass", "splitk", "xmma", "cublas", "memset"),
    "norms": ("norm",),
    "MLP activation": ("silu", "act_and_mul", "activation"),
    "communication": ("nccl", "all_reduce", "allreduce"),
}
PREPARATION = "preparation"


def kind_of(kernel: str) -> str:
    """Which part of a layer a kernel belongs to; what is no other work prepares q, k, v
    and the cache row, packs prefix chunks or merges their results."""
    name = kernel.lower()
    for kind, parts in OTHER_WORK.items():
        if any(part in name for part in parts):
            return kind
    return PREPARATION


def _short(kernel: str) -> str:
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = name.split("(")[0]
    return name if len(name) <= 100 else name[:97] + "..."


def layers_of(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """GPU work from one causal attention call to the next, without that of the
    stand-ins: [{"name", "us"}, …] for each.

    `events` are a trace's. What lies between the last call of one forward pass and the
    first of the next is in the list too; see `per_layer`.
    """
    complete = [e for e in events if e.get("ph") == "X" and "cat" in e]
    # The profiler repeats ranges on the GPU's side; the host's are wanted.
    ranges = [
        e
        for e in complete
        if e["name"].startswith(RANGE) and not e["cat"].startswith("gpu")
    ]
    ranges.sort(key=lambda e: e["ts"])
    if not ranges:
        return []
    tid = ranges[0]["tid"]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in complete
        if e["cat"] in ("cuda_runtime", "cuda_driver")
        and e["tid"] == tid
        and "correlation" in e.get("args", {})
    }
    starts = [e["ts"] for e in ranges]

    def in_standin(ts: float) -> bool:
        i = bisect.bisect_right(starts, ts) - 1
        return i >= 0 and ts <= ranges[i]["ts"] + ranges[i]["dur"]

    work = sorted(
        (launched[e["args"]["correlation"]], e["name"], e["dur"])
        for e in complete
        if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")
        and e.get("args", {}).get("correlation") in launched
    )
    work = [(ts, name, us) for ts, name, us in work if not in_standin(ts)]
    times = [ts for ts, _, _ in work]
    causal = [e for e in ranges if e["name"] == CAUSAL]
    layers = []
    for one, other in zip(causal, causal[1:]):
        first = bisect.bisect_left(times, one["ts"] + one["dur"])
        last = bisect.bisect_left(times, other["ts"])
        layers.append([dict(name=name, us=us) for _, name, us in work[first:last]])
    return layers


def per_layer(layers: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The usual layer: launches and GPU time of its parts, and its kernels.

    Between the last layer of a pass and the first of the next come sampling, scheduling
    and embedding; the layers inside passes, which are more, all launch the same kernels.
    """
    if not layers:
        raise ValueError("the trace holds no two causal attention calls in a row")
    shapes = Counter(tuple(work["name"] for work in layer) for layer in layers)
    shape, count = shapes.most_common(1)[0]
    usual = [x for x in layers if tuple(work["name"] for work in x) == shape]
    launches: Counter = Counter(kind_of(name) for name in shape)
    microseconds = {
        kind: statistics.median(
            sum(work["us"] for work in layer if kind_of(work["name"]) == kind)
            for layer in usual
        )
        for kind in launches
    }
    return {
        "layers": count,
        "launches": len(shape),
        "preparation_launches": launches[PREPARATION],
        "preparation_us": microseconds.get(PREPARATION, 0.0),
        "launches_by_part": dict(launches),
        "us_by_part": microseconds,
        "us": sum(microseconds.values()),
        "preparation_kernels": dict(
            Counter(_short(name) for name in shape if kind_of(name) == PREPARATION)
        ),
    }


def profile(
    server: Server, requests: Sequence[Request], seconds: float = 60
) -> dict[str, Any]:
    """Serve the requests, one after another, under SGLang's profiler."""
    folder = Path(server.folder, "profile")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    body = {"output_dir": str(folder), "activities": ["CPU", "GPU"]}
    # SGLang's defaults, which make large traces that say no more of launches.
    body |= {"with_stack": False, "record_shapes": False}
    server.post("/start_profile", body).raise_for_status()
    for request in requests:
        answer = server.generate(request)
        if answer.error:
            raise RuntimeError(f"{server.spec.name}: {answer.error}")
    server.post("/stop_profile").raise_for_status()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in sorted(folder.rglob("*.gz")):
            try:
                with gzip.open(path) as f:
                    events = json.load(f)["traceEvents"]
            except (EOFError, OSError, ValueError, zlib.error):
                continue  # still being written
            layers = layers_of(events)
            if layers:
                return per_layer(layers)
        time.sleep(0.5)
    raise TimeoutError(f"{server.spec.name}: no trace with attention in {folder}")


def tokens(seed: int, n: int, vocab: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


def profiles(
    server: Server, vocab: int, sizes: Sequence[int], prefixes: Sequence[int]
) -> dict[str, Any]:
    """Per layer for prompts of `sizes` tokens, and for the last size behind each of
    `prefixes` cached tokens; keys "8192" and "8192 behind 4096"."""
    result = {}
    for size in sizes:
        server.flush_cache()
        prompts = [Request(tokens(i, size, vocab), 1) for i in range(4)]
        server.generate(prompts[0])
        result[str(size)] = profile(server, prompts[1:])
    for prefix in prefixes:
        server.flush_cache()
        head = tokens(7, prefix, vocab)
        server.generate(Request(head, 1))
        server.generate(Request(head + tokens(8, sizes[-1], vocab), 1))
        requests = [
            Request(head + tokens(9 + i, sizes[-1], vocab), 1) for i in range(3)
        ]
        result[f"{sizes[-1]} behind {prefix}"] = profile(server, requests)
    return result


def _in_turn(i: int, servers: Sequence[Server]) -> list[tuple[int, Server]]:
    """The servers by index, every other time backwards: ABBA."""
    return list(enumerate(servers))[:: -1 if i % 2 else 1]


def ratio_of_medians(
    a: Sequence[float], b: Sequence[float], resamples: int = 10_000
) -> tuple[float, float, float]:
    """median(b) / median(a) and its 95% percentile bootstrap interval."""
    rng = np.random.default_rng(0)
    medians = [
        np.median(rng.choice(np.asarray(x), (resamples, len(x))), axis=1)
        for x in (a, b)
    ]
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return statistics.median(b) / statistics.median(a), float(low), float(high)


def time_to_first_token(
    servers: Sequence[Server], vocab: int, size: int, repeats: int, prefix: int = 0
) -> list[list[float]]:
    """Seconds for one new token of a prompt of `size` tokens behind `prefix` cached
    ones, alone, for each server in turn, so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in servers]
    head = tokens(7, prefix, vocab)
    if prefix:
        for server in servers:
            server.generate(Request(head, 1))
    for i in range(repeats + 2):
        for j, server in _in_turn(i, servers):
            if not prefix:
                server.flush_cache()  # or a full pool makes room in what is timed
            prompt = head + tokens(1000 + i, size, vocab)
            answer = server.generate(Request(prompt, 1))
            if answer.error:
                raise RuntimeError(f"{server.spec.name}: {answer.error}")
            if answer.cached_tokens != prefix:
                raise RuntimeError(
                    f"{server.spec.name}: {answer.cached_tokens} cached tokens of a "
                    f"prompt behind {prefix}"
                )
            if i >= 2:
                seconds[j].append(answer.seconds)
    for server in servers:
        server.flush_cache()
    return seconds


def throughput(
    servers: Sequence[Server], vocab: int, size: int, count: int, repeats: int
) -> list[list[float]]:
    """Prompt tokens a second of `count` requests of `size` tokens at once, for each
    server in turn."""
    rates: list[list[float]] = [[] for _ in servers]
    for i in range(repeats + 1):
        for j, server in _in_turn(i, servers):
            server.flush_cache()
            seeds = range(100 * i, 100 * i + count)
            requests = [Request(tokens(seed, size, vocab), 1) for seed in seeds]
            started = time.monotonic()
            answers = server.generate_all(requests, concurrency=count)
            seconds = time.monotonic() - started
            errors = [answer.error for answer in answers if answer.error]
            if errors:
                raise RuntimeError(f"{server.spec.name}: {errors[0]}")
            if i >= 1:
                rates[j].append(size * count / seconds)
    return rates


def problems(where: str, layers: dict[str, dict[str, Any]]) -> list[str]:
    """Where a patched server does not launch less, or not the kernel of this project, or
    takes longer to prepare.

    `layers` is {"unpatched": …, "patched": …} of what `profiles` returned.
    """
    found = []
    for size, patched in layers["patched"].items():
        kernels = patched["preparation_kernels"]
        if not any("mla_prefill_quantize" in name for name in kernels):
            found.append(
                f"{where}, {size} tokens: mla_prefill_quantize_fp8 was not launched"
            )
        unpatched = layers["unpatched"][size]
        a, b = patched["launches"], unpatched["launches"]
        if a >= b:
            found.append(f"{where}, {size} tokens: {a} launches a layer, unpatched {b}")
        a, b = patched["preparation_us"], unpatched["preparation_us"]
        if a >= b:
            found.append(
                f"{where}, {size} tokens: the preparation takes {a:.1f} us a layer, "
                f"unpatched {b:.1f}"
            )
    return found
