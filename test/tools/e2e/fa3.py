"""Prefill by FlashAttention-3 on a Hopper GPU, with its own kernels: launches and GPU time
of preparation and attention from SGLang's profiler, and time to first token over HTTP.

Five servers side by side, asked in turn: unpatched, patched, unpatched once more, whose
distance from the first is the host's noise, unpatched with a BF16 cache, and patched with
the projections by cuBLAS.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from e2e import profiles
from e2e.pairs import Case, Run, fa3_case
from e2e.servers import Server, kill_all, start_all
from gpu_trace import GPU_WORK
from resampling import ratio_of_medians

SIDES = ("unpatched", "patched", "unpatched again", "BF16 cache", "GEMM off")
ATTENTION = ("flashattnfwd", "prepare_varlen_num_blocks")
MORE = ("--max-prefill-tokens", "16384", "--sleep-on-idle")
MODELS = ("deepseek_v3_wide", "deepseek_v3_tp8")
# (prompts at once, tokens of each, cached tokens before them)
SHAPES = (
    *((8, 1024, 0), (1, 1024, 0), (1, 2048, 0), (1, 8192, 0), (1, 32768, 0)),
    *((1, 2048, 8192), (1, 8192, 8192)),
)
QUICK_SHAPES = (SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[5])


def times_of(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds and launches of attention and of the preparation in a trace, and the
    microseconds of all kernels."""
    attention, preparation, others = [], [], []
    for event in events:
        if event.get("cat") in GPU_WORK:
            name = event["name"].lower()
            if any(part in name for part in ATTENTION):
                attention.append(event["dur"])
            elif profiles.prepares(name):
                preparation.append(event["dur"])
            else:
                others.append(event["dur"])
    if not attention:
        return {}
    return {
        "attention_us": round(sum(attention), 1),
        "preparation_us": round(sum(preparation), 1),
        "preparation_launches": len(preparation),
        "all_us": round(sum(attention + preparation + others), 1),
    }


def ask(server: Server, shape: tuple[int, int, int], seed: int) -> float:
    """Seconds until the last of the prompts has its token."""
    count, size, prefix = shape
    requests = [profiles.prompt(8 * seed + i, size, prefix) for i in range(count)]
    answers = server.generate_all(requests, concurrency=count)
    for answer in answers:
        if answer.error is not None or answer.cached_tokens < prefix:
            raise RuntimeError(f"{server.name}: {answer.error}, {answer.cached_tokens}")
    return max(answer.seconds for answer in answers)


@contextmanager
def only_cached(server: Server, prefix: int) -> Iterator[None]:
    """With the prefix cached and nothing else, and the GPU's memory given back after it:
    what a prompt of 32768 tokens takes, the allocators of five servers cannot keep."""
    profiles.forget(server, prefix)
    yield
    server.flush_cache()


def prefill_times(server: Server, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The median over rounds of what one round of the shape takes on the GPU."""
    rounds = []
    for seed in range(3):
        round_ = functools.partial(ask, server, shape, 100 + seed)
        with only_cached(server, shape[2]):
            rounds.append(profiles.profile(server, round_, times_of))
    return {key: statistics.median(x[key] for x in rounds) for key in rounds[0]}


def measure(
    servers: Sequence[Server], shapes: Sequence[tuple[int, int, int]], times: int
) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        count, size, prefix = shape
        for server in servers:
            for seed in (0, 1):
                with only_cached(server, prefix):
                    ask(server, shape, seed)
        gpu = {s: prefill_times(x, shape) for s, x in zip(SIDES, servers)}

        def seconds(server: Server, i: int) -> float:
            with only_cached(server, prefix):
                return ask(server, shape, 1000 + i)

        http = profiles.in_turn(servers, seconds, times, warm=2)
        yield {
            "prompts": count,
            "tokens": size,
            "prefix": prefix,
            "gpu": gpu,
            "http_ms": [round(1e3 * statistics.median(x), 3) for x in http],
            # Of the other servers to the unpatched one, with intervals.
            "ratios": [
                [round(r, 4) for r in ratio_of_medians(x, http[0])] for x in http[1:]
            ],
            "problems": problems(shape, gpu),
        }


def problems(shape: tuple[int, int, int], gpu: dict[str, Any]) -> list[str]:
    """Where the patched server prepares in no less launches, or preparation and attention
    take longer than the unpatched server's or than with a BF16 cache, or all kernels
    longer than with the projections by cuBLAS (2% are the clock's)."""
    found = []
    total = {s: x["preparation_us"] + x["attention_us"] for s, x in gpu.items()}
    launches = {s: x["preparation_launches"] for s, x in gpu.items()}
    if launches["patched"] >= launches["unpatched"]:
        found.append(f"fa3, {shape}: launches {launches}")
    for other in ("unpatched", "BF16 cache"):
        if total["patched"] > total[other]:
            found.append(f"fa3, {shape}: us {total}")
    if gpu["patched"]["all_us"] > 1.02 * gpu["GEMM off"]["all_us"]:
        found.append(f"fa3, {shape}: us of all kernels {gpu}")
    return found


def run_time(run: Run, gpu: int) -> Iterable[dict[str, Any]]:
    for model in MODELS:
        case = fa3_case("time", model=model, chunk=16384, more=MORE)
        bf16 = replace(
            case, name="BF16 cache", more=(*MORE, "--kv-cache-dtype", "auto")
        )
        again = replace(case, name="again")
        no_gemm = {**case.env, "SGLANG_MLA_FP8_PREFILL_GEMM": "off"}
        order: list[tuple[Case, str]] = [
            *((case, "unpatched"), (case, "patched")),
            *((again, "unpatched"), (bf16, "unpatched")),
            (replace(case, name="GEMM off", env=no_gemm), "patched"),
        ]
        with ExitStack() as stack:
            servers = [
                stack.enter_context(run.server(case, side, (gpu,)))
                for case, side in order
            ]
            stack.callback(kill_all)
            start_all(servers)
            shapes, times = (QUICK_SHAPES, 6) if run.quick else (SHAPES, 30)
            for row in measure(servers, shapes, times):
                yield {"model": model, **row}
