"""What the prefill of a running server launches and how long it takes.

Launches come from SGLang's own profiler (`/start_profile`). The stand-ins run in
profiler ranges of their own, so that what they launch is told from what SGLang
launches. Times are of servers started with STANDIN_COMPUTE=none, whose attention
kernels do nothing, asked in turn (ABBA), so that both see the same machine; SGLang's
bench_serving has one server run after the other, and needs a tokenizer, which these
checkpoints lack.
"""

from __future__ import annotations

import bisect
import functools
import gzip
import json
import shutil
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from e2e.servers import Request, Server
from gpu_trace import launched
from mla_standin.kernels import CAUSAL, RANGE
from mla_standin.models import KINDS
from resampling import ratio_of_medians

PAIRS = tuple(
    (model, backend)
    for model in ("deepseek_v3_wide", "deepseek_v3_tp8")
    for backend in ("tokenspeed_mla", "trtllm_mla")
)
QUICK_PAIRS = (PAIRS[0], PAIRS[-1])  # each model and each backend once
VOCAB = 512
PASSES = 3
# Chunks as large as the prompts; idle schedulers would take the CPU from the one that
# is timed. Kernels that do nothing have no base of log-sum-exps to find.
CASE = {
    "chunk": 16384,
    "more": ("--max-prefill-tokens", "16384", "--sleep-on-idle"),
    "env": {
        "STANDIN_COMPUTE": "none",
        "SGLANG_MAX_KV_CHUNK_CAPACITY": "2048",
        "SGLANG_MLA_FP8_PREFILL_LSE": "2",
        # As on SM100, whose backends these are.
        "SGLANG_MLA_FP8_PREFILL_GEMM": "off",
    },
}

# What a prefill in a piecewise CUDA graph pays for is the size of the pool.
GRAPHS_SIZES = (64, 512, 2048)
GRAPHS_POOL = 400_000
GRAPHS_CASE = {
    **CASE,
    "prefill_graphs": True,
    "more": (
        *CASE["more"],
        *("--max-total-tokens", str(GRAPHS_POOL)),
        # Instead of fifty sizes, which take longer to capture.
        *("--piecewise-cuda-graph-tokens", *map(str, GRAPHS_SIZES)),
    ),
}
FLASHINFER_MLA, TORCH_COPY = "BatchMLAPage", "copy_kernel"

# Kernels of a layer that the patch has no part in, by parts of their names. cuBLAS
# clears its workspace by memset; nothing else in a layer does.
OTHER_WORK = (
    *("gemm", "nvjet", "cutlass", "splitk", "xmma", "cublas", "memset"),
    *("mla_q_proj_quantize", "mla_kv_proj_quantize"),
    *("norm", "silu", "act_and_mul", "activation"),
    *("nccl", "all_reduce", "allreduce"),
)
OURS = "mla_prefill_quantize"

Work = list[tuple[str, float]]  # names and microseconds


def prepares(kernel: str) -> bool:
    """Whether it prepares q, k, v and the cache row, packs prefix chunks or merges their
    results: all that is no projection, norm, activation or communication."""
    return not any(part in kernel.lower() for part in OTHER_WORK)


def layers_of(events: Iterable[dict[str, Any]]) -> list[Work]:
    """GPU work from one causal attention call to the next, without that of the
    stand-ins.

    `events` are a trace's. What lies between the last call of one forward pass and the
    first of the next is in the list too; see `usual_layer`.
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
    starts = [e["ts"] for e in ranges]

    def in_standin(ts: float) -> bool:
        i = bisect.bisect_right(starts, ts) - 1
        return i >= 0 and ts <= ranges[i]["ts"] + ranges[i]["dur"]

    work = sorted(
        (call["ts"], e["name"], e["dur"])
        for call, e in launched(complete)
        if call["tid"] == ranges[0]["tid"]
    )
    work = [(ts, name, us) for ts, name, us in work if not in_standin(ts)]
    times = [ts for ts, _, _ in work]
    causal = [e for e in ranges if e["name"] == CAUSAL]
    layers = []
    for one, other in zip(causal, causal[1:]):
        first = bisect.bisect_left(times, one["ts"] + one["dur"])
        last = bisect.bisect_left(times, other["ts"])
        layers.append([(name, us) for _, name, us in work[first:last]])
    return layers


def usual_layer(layers: Sequence[Work]) -> dict[str, Any]:
    """Launches and median GPU time of the usual layer and of its preparation.

    Between the last layer of a pass and the first of the next come sampling, scheduling
    and embedding; the layers inside passes, which are more, all launch the same kernels.
    """
    if not layers:
        return {}
    shapes = Counter(tuple(name for name, _ in layer) for layer in layers)
    shape, _ = shapes.most_common(1)[0]
    usual = [x for x in layers if tuple(name for name, _ in x) == shape]

    def median(of: Callable[[str], bool]) -> float:
        sums = (sum(us for name, us in layer if of(name)) for layer in usual)
        return round(statistics.median(sums), 3)

    return {
        "launches": len(shape),
        "us": median(lambda name: True),
        "preparation_launches": sum(map(prepares, shape)),
        "preparation_us": median(prepares),
        "ours": any(OURS in name for name in shape),
    }


def forward_pass(
    events: Iterable[dict[str, Any]], passes: int, layers: int
) -> dict[str, Any]:
    """The mean of a trace's forward passes: host calls that launch work, graphs among
    them, and microseconds of GPU time by layer: all but FlashInfer's attention, torch's
    copies outside graphs, which are part of it, and that attention."""
    us = Counter()
    calls = {}
    for call, e in launched(events):
        calls[call["args"]["correlation"]] = call["name"]
        captured = "GraphLaunch" in call["name"]
        if FLASHINFER_MLA in e["name"]:
            us["attention_us"] += e["dur"]
            continue
        us["us"] += e["dur"]
        if TORCH_COPY in e["name"] and not captured:
            us["copies_us"] += e["dur"]
    if not calls:
        return {}
    parts = ("us", "copies_us", "attention_us")
    return {
        "launches": round(len(calls) / passes),
        "graphs": round(sum("GraphLaunch" in x for x in calls.values()) / passes),
        **{part: round(us[part] / passes / layers, 3) for part in parts},
    }


def usual_layer_of(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    layers = layers_of(events)
    return usual_layer(layers) if layers else {}


def profile(
    server: Server,
    ask: Callable[[], object],
    read: Callable[[list[dict[str, Any]]], dict[str, Any]] = usual_layer_of,
    seconds: float = 60,
) -> dict[str, Any]:
    """What `read` finds in SGLang's trace of what is asked."""
    folder = Path(server.folder, "profile")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    body = {"output_dir": str(folder), "activities": ["CPU", "GPU"]}
    # SGLang's defaults, which make large traces that say no more of launches.
    body |= {"with_stack": False, "record_shapes": False}
    server.post("/start_profile", body).raise_for_status()
    ask()
    server.post("/stop_profile").raise_for_status()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in sorted(folder.rglob("*.gz")):
            try:
                with gzip.open(path) as f:
                    found = read(json.load(f)["traceEvents"])
            except (EOFError, OSError, ValueError, zlib.error):
                continue  # still being written
            if found:
                return found
        time.sleep(0.5)
    raise TimeoutError(f"{server.name}: no trace of the requests in {folder}")


def profiles_of(
    pair: Sequence[Server], size: int, prefix: int, read: Callable = usual_layer_of
) -> dict[str, dict[str, Any]]:
    """What `read` finds of both servers, each asked PASSES prompts one by one."""
    found = {}
    for side, server in zip(("unpatched", "patched"), pair):
        server.flush_cache()
        for seed in (0, 1):  # the second finds the prefix
            seconds_of(server, prompt(seed, size, prefix))

        def ask() -> None:
            for i in range(PASSES):
                seconds_of(server, prompt(10 + i, size, prefix), prefix)

        found[side] = profile(server, ask, read)
    return found


def prompt(seed: int, size: int, prefix: int) -> Request:
    """`size` random tokens behind the same `prefix` ones."""
    head = np.random.default_rng([0, 7]).integers(VOCAB, size=prefix)
    tail = np.random.default_rng([1, seed]).integers(VOCAB, size=size)
    return Request([*head.tolist(), *tail.tolist()])


def seconds_of(server: Server, request: Request, prefix: int = 0) -> float:
    answer = server.generate(request)
    if answer.error is not None:
        raise RuntimeError(f"{server.name}: {answer.error}")
    if answer.cached_tokens < prefix:
        cached = answer.cached_tokens
        raise RuntimeError(f"{server.name}: {cached} cached tokens behind {prefix}")
    return answer.seconds


def forget(server: Server, prefix: int) -> None:
    """Flush the server's cache, but for the prefix, which it computes anew."""
    server.flush_cache()
    if prefix:
        server.generate(prompt(0, 1, prefix))


def in_turn(
    servers: Sequence[Server],
    measure: Callable[[Server, int], float],
    times: int,
    warm: int,
) -> list[list[float]]:
    """Measurements of each server, alternating in ABBA order, after `warm` that do not
    count."""
    found: list[list[float]] = [[] for _ in servers]
    for i in range(warm + times):
        for j, server in list(enumerate(servers))[:: -1 if i % 2 else 1]:
            value = measure(server, i)
            if i >= warm:
                found[j].append(value)
    return found


def time_to_first_token(
    servers: Sequence[Server], size: int, prefix: int, times: int
) -> list[list[float]]:
    """Seconds that one prompt takes alone, behind a cached prefix or an empty cache."""

    def measure(server: Server, i: int) -> float:
        if not prefix:
            server.flush_cache()  # or a full pool makes room in what is timed
        return seconds_of(server, prompt(1000 + i, size, prefix), prefix)

    for server in servers:
        forget(server, prefix)
    return in_turn(servers, measure, times, warm=2)


def throughput(
    servers: Sequence[Server], size: int, count: int, times: int
) -> list[list[float]]:
    """Prompt tokens a second of `count` prompts at once."""

    def measure(server: Server, i: int) -> float:
        server.flush_cache()
        requests = [prompt(count * i + k, size, 0) for k in range(count)]
        started = time.monotonic()
        answers = server.generate_all(requests, concurrency=count)
        seconds = time.monotonic() - started
        errors = [answer.error for answer in answers if answer.error is not None]
        if errors:
            raise RuntimeError(f"{server.name}: {errors[0]}")
        return size * count / seconds

    return in_turn(servers, measure, times, warm=1)


def ratio_row(
    old: Sequence[float], new: Sequence[float], best: Callable
) -> dict[str, Any]:
    """Medians, their ratio with its interval, and the best of each side."""
    sides = (old, new)
    return {
        "medians": [round(statistics.median(x), 7) for x in sides],
        "ratio": [round(x, 5) for x in ratio_of_medians(new, old)],
        "best": [round(best(x), 7) for x in sides],
    }


def problems(
    where: str, unpatched: dict[str, Any], patched: dict[str, Any]
) -> list[str]:
    """Where a patched server does not launch this project's kernel, or does not launch
    less, or takes longer to prepare."""
    found = []
    if not patched["ours"]:
        found.append(f"{where}: {OURS}_fp8 was not launched")
    for key in ("launches", "preparation_launches", "preparation_us"):
        if patched[key] >= unpatched[key]:
            found.append(f"{where}: {key} {patched[key]}, unpatched {unpatched[key]}")
    return found


def measure(
    pair: Sequence[Server], model: str, quick: bool
) -> Iterator[dict[str, Any]]:
    """Rows of results of an unpatched and a patched server."""
    shapes = [(size, 0) for size in ((64, 2048) if quick else (64, 1024, 8192))]
    shapes.append((shapes[-1][0], 8192))
    times, storms = (6, 3) if quick else (40, 10)
    for size, prefix in shapes:
        layers = profiles_of(pair, size, prefix)
        seconds = time_to_first_token(pair, size, prefix, times)
        yield {
            "tokens": size,
            "prefix": prefix,
            "layer": layers,
            "first_token": ratio_row(*seconds, min),
            "problems": problems(f"{model}, {size} tokens behind {prefix}", **layers),
        }
    size, count = shapes[-1][0] // 4, 16
    rates = ratio_row(*throughput(pair, size, count, storms), max)
    yield dict(tokens=size, prompts=count, throughput=rates, problems=[])


def graph_problems(
    where: str, unpatched: dict[str, Any], patched: dict[str, Any]
) -> list[str]:
    """Where only the patched server may do without graphs, and has to take less time."""
    found = []
    if not unpatched["graphs"] or not unpatched["attention_us"]:
        found.append(f"{where}: the unpatched server's prefills ran in no graph")
    if patched["graphs"]:
        found.append(f"{where}: the patched server's prefills ran in a graph")
    if patched["us"] >= unpatched["us"]:
        found.append(f"{where}: {patched['us']} us, unpatched {unpatched['us']}")
    return found


def measure_graphs(
    pair: Sequence[Server], model: str, quick: bool
) -> Iterator[dict[str, Any]]:
    """Rows of results of an unpatched server with prefill graphs and a patched one."""
    layers = KINDS[model]["num_hidden_layers"]
    read = functools.partial(forward_pass, passes=PASSES, layers=layers)
    for size in GRAPHS_SIZES:
        found = profiles_of(pair, size, 0, read)
        seconds = time_to_first_token(pair, size, 0, 10 if quick else 40)
        yield {
            "tokens": size,
            "layers": layers,
            "layer": found,
            "first_token": ratio_row(*seconds, min),
            "problems": graph_problems(f"{size} tokens", **found),
        }
