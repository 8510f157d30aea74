"""The pairs of servers, patched and unpatched, that are asked the same and compared."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import patched_sglang
from e2e import compare
from e2e.reference import Reference
from e2e.servers import Server, start_all
from mla_standin.models import VOCAB, make_model

TOKENSPEED, TRTLLM, FA3 = "tokenspeed_mla", "trtllm_mla", "fa3"
SIDES = ("unpatched", "patched")
# trtllm-gen returns base-2 log-sum-exps, which the patch converts and SGLang merges as
# natural ones; natural ones, to the unpatched server, let errors show that wrong weights
# would hide.
NATURAL = {"STANDIN_LSE": "natural"}
OFF = {"SGLANG_MLA_FP8_PREFILL": "off", "SGLANG_MLA_FP8_PREFILL_LSE": "e"}
SMALL_PREFIX_CHUNKS = {"SGLANG_MAX_KV_CHUNK_CAPACITY": "8192"}
# Servers that run side by side, each with three processes and a few GB of memory.
SIDE_BY_SIDE = max(2, 3 * (os.cpu_count() or 1) // 4)


def no_prefill_graphs(site: Path) -> str:
    """The flag that turns SGLang's prefill CUDA graphs off; from 0.5.20 on, the second."""
    flags = "--disable-piecewise-cuda-graph", "--disable-prefill-cuda-graph"
    known = (site / "sglang/srt/server_args.py").read_text()
    return flags[0] if f'"{flags[0]}"' in known else flags[1]


@dataclass(frozen=True)
class Case:
    """A pair of servers, and what they are asked."""

    name: str
    backend: str
    chunk: int = 2048
    decode: str = ""  # another backend for decoding
    more: tuple[str, ...] = ()
    model: str = "deepseek_v3"
    unpatched_model: str = ""  # the same weights, where SGLang refuses the model
    env: Mapping[str, str] = field(default_factory=dict)
    patched_env: Mapping[str, str] = field(default_factory=dict)
    scenarios: tuple[str, ...] = ("alone", "at once", "behind prefixes")
    # Whether the unpatched server gets natural log-sum-exps; without, it is to be worse.
    natural: bool = True
    # A third server, patched but switched off, must equal the unpatched one.
    off: bool = False
    # Data-parallel ranks have a prefix cache each.
    hits: bool = True
    # Batches must come with rows past those of requests.
    padding: bool = False
    # SGLang's own choice of prefill CUDA graphs, which run FlashInfer's kernel and none of
    # the stand-ins.
    prefill_graphs: bool = False
    # Among what --quick runs.
    quick: bool = False
    # Whether attention kernels are stood in for.
    standin: bool = True

    def arguments(self, site: Path) -> list[str]:
        backends = ["--attention-backend", self.backend]
        if self.decode:
            backends = ["--prefill-attention-backend", self.backend]
            backends += ["--decode-attention-backend", self.decode]
        if not self.prefill_graphs:
            backends += [no_prefill_graphs(site)]
        return [*backends, "--chunked-prefill-size", str(self.chunk), *self.more]


def one_gpu_cases() -> list[Case]:
    plain = [
        case
        for b in (TOKENSPEED, TRTLLM)
        for case in (
            Case("chunks of 2048", b, env=SMALL_PREFIX_CHUNKS, off=True, quick=True),
            Case("not chunked", b, chunk=-1),
        )
    ]
    composed = {"SGLANG_MLA_FP8_PREFILL": "composed"}
    return [
        *plain,
        Case("chunks of 512", TOKENSPEED, chunk=512, env=SMALL_PREFIX_CHUNKS),
        Case("decode by tokenspeed_mla", TRTLLM, chunk=512, decode=TOKENSPEED),
        Case("decode by trtllm_mla", TOKENSPEED, decode=TRTLLM),
        Case("composed producer", TRTLLM, patched_env=composed),
        Case("K and V scales", TRTLLM, model="scaled"),
        Case(
            "K and V scales",
            TOKENSPEED,
            model="scaled",
            unpatched_model="deepseek_v3",
        ),
        Case("V2-Lite", TOKENSPEED, model="v2_lite"),
    ]


def base_2_case() -> Case:
    """Unpatched too, the kernel returns base-2 log-sum-exps, as trtllm-gen."""
    return Case(
        "chunks of 2048, base-2 LSE",
        TRTLLM,
        env=SMALL_PREFIX_CHUNKS,
        scenarios=("behind prefixes",),
        natural=False,
        quick=True,
    )


def fa3_case(name: str, env: Mapping[str, str] = {}, **fields) -> Case:
    """Prefill by FlashAttention-3, as MHA behind any prefix."""
    env = {"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1", **env}
    return Case(name, FA3, decode="triton", env=env, standin=False, **fields)


def fa3_cases() -> list[Case]:
    # Batches of more tokens attend to their prefixes in chunks.
    chunks = {"SGLANG_MAX_KV_CHUNK_CAPACITY": "2048"}
    return [
        fa3_case("prefix in one shot", off=True, quick=True),
        fa3_case("prefix in chunks of 2048", chunks, quick=True),
        fa3_case("K and V scales", model="scaled"),
    ]


def two_gpu_cases() -> list[Case]:
    # Peer-to-peer and multicast all-reduce need links that not every host has.
    tp = (
        *("--tp-size", "2"),
        "--disable-custom-all-reduce",
        "--enforce-disable-flashinfer-allreduce-fusion",
    )
    dp = (*tp, "--dp-size", "2", "--enable-dp-attention")
    # Tokens are scattered over the ranks between MLPs, and so padded to an even number.
    by_rank = (*tp, "--moe-dense-tp-size", "1")
    # References and other servers take unequal parts of the two GPUs.
    env = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    return [
        case
        for b in (TOKENSPEED, TRTLLM)
        for case in (
            Case("tensor parallel 2", b, more=tp, env=env),
            Case(
                "tensor parallel 2, MLP by rank", b, more=by_rank, env=env, padding=True
            ),
            Case("data-parallel attention 2", b, more=dp, env=env, hits=False),
        )
    ] + [
        fa3_case("tensor parallel 2", env, more=tp),
        fa3_case("data-parallel attention 2", env, more=dp, hits=False),
    ]


class Run:
    """One run of the suite: its two SGLangs, its models and transformers' answers."""

    def __init__(self, trees: patched_sglang.Trees, folder: Path, quick: bool):
        self.trees, self.folder, self.quick = trees, folder, quick
        self.questions = compare.questions(VOCAB, quick)
        self._making = threading.Lock()
        # One at a time, while the servers come up.
        self._pool = ThreadPoolExecutor(1)
        self._expected: dict[str, Future] = {}

    def model(self, kind: str) -> Path:
        with self._making:
            return make_model(kind, self.folder / "models" / kind)

    def server(self, case: Case, side: str, gpus: Sequence[int]) -> Server:
        """`side` is "unpatched", "off" (patched, but switched off) or "patched"."""
        site = self.trees.unpatched if side == "unpatched" else self.trees.patched
        model = case.model
        if side == "unpatched":
            model = case.unpatched_model or model
        env = {**case.env, **(case.patched_env if side == "patched" else {})}
        if case.natural and side != "patched":
            env |= NATURAL
        if side == "off":
            env |= OFF
        name = f"{case.name}-{case.backend}-{side}".replace(", ", "-").replace(" ", "-")
        folder = self.folder / "servers" / name
        arguments = case.arguments(site)
        return Server(
            folder, site, self.model(model), arguments, env, gpus, case.standin
        )

    def expected(self, kind: str) -> Future:
        """Will be transformers' log-probabilities of all prompts, by name."""
        # The scaled checkpoint has the plain one's weights.
        kind = "deepseek_v3" if kind == "scaled" else kind
        with self._making:
            if kind not in self._expected:
                self._expected[kind] = self._pool.submit(self._reference, kind)
            return self._expected[kind]

    def _reference(self, kind: str) -> dict[str, list[float]]:
        reference = Reference(self.model(kind))
        prompts = [p for some in self.questions.values() for p in some]
        return {p.name: reference.logprobs(p.input_ids) for p in prompts}


def side_by_side(call: Callable, servers: Sequence[Server], *more: Sequence) -> list:
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(call, servers, *more))


def check_record(
    server: Server, hook_on: bool
) -> tuple[dict[str, list[int]], list[str]]:
    """What reached the attention kernels, {"<kernel>, <kind>": [calls, of them padded,
    of them with requests without keys, tokens]}, and what is wrong with it, or with what
    the log says."""
    log = server.log_since(0)
    problems = []
    if hook_on != ("FP8 prefill preparation with the" in log):
        problems.append(f"the log {'does not say' if hook_on else 'says'} FP8 on")
    declined = re.search("FP8 prefill preparation declines a batch.*", log)
    if hook_on and declined:
        problems.append(declined[0])
    if not server.standin:
        return {}, problems
    record = server.record()
    kinds = {True: "causal", False: "prefix chunk", None: "decode"}
    totals: dict[str, list[int]] = {}
    for call in record["calls"]:
        dtypes = {call[f"{x}_dtype"] for x in "qkv"}
        if dtypes != {"float8_e4m3fn"} or not call["contiguous"]:
            problems.append(f"a kernel was handed {call}")
        name = f"{call['kernel']}, {kinds[call.get('causal')]}"
        count = call["count"]
        padded, keyless = call.get("padded", 0), call.get("requests_without_keys", 0)
        more = [count, count * padded, count * keyless, call["tokens"]]
        totals[name] = [a + b for a, b in zip(totals.get(name, [0] * 4), more)]
    # The base of the log-sum-exps is found by a call in each of one or two processes.
    if not any("causal" in name and calls > 2 for name, (calls, *_) in totals.items()):
        problems.append("no prefill kernel was called")
    if record["nan"]:
        problems.append(f"{record['nan']} NaN went into the kernels or came out")
    if hook_on and record["late_compiles"]:
        problems.append(f"compiled by a request: {record['late_compiles']}")
    return totals, problems


def run_pair(run: Run, case: Case, gpus: Sequence[int]) -> dict[str, Any]:
    """A row of results: distances by scenario, kernels, and problems."""
    expected = run.expected(case.model)
    problems: list[str] = []
    sides = (*SIDES, "off") if case.off else SIDES
    with ExitStack() as stack:
        servers = [stack.enter_context(run.server(case, s, gpus)) for s in sides]
        start_all(servers)

        def drive(server: Server, side: str) -> dict[str, compare.Answers]:
            answers = {}
            for scenario in ("alone",) if side == "off" else case.scenarios:
                prompts = run.questions[scenario]
                found = compare.ask(server, scenario, prompts, case.hits)
                answers[scenario], wrong = found
                problems.extend(f"{server.name}: {fault}" for fault in wrong)
            return answers

        answers = dict(zip(sides, side_by_side(drive, servers, sides)))
        kernels = {}
        for server, side in zip(servers, sides):
            kernels[side], wrong = check_record(server, side == "patched")
            problems += [f"{server.name}: {fault}" for fault in wrong]
    row: dict[str, Any] = {"pair": case.name, "backend": case.backend}
    where = f"{case.name}, {case.backend}"
    row["kernels"] = kernels["patched"]
    if case.padding and not any(
        padded for _, padded, *_ in kernels["patched"].values()
    ):
        problems.append(f"{where}: no batch was padded")
    distances: dict[str, dict] = {"all": {}}
    for scenario in case.scenarios:
        both = [answers[side][scenario] for side in SIDES]
        prompts = run.questions[scenario]
        distances[scenario] = compare.distances(prompts, both, expected.result())
        distances["all"] |= distances[scenario]
    for scenario, found in distances.items():
        if len(found) < 2:
            problems.append(f"{where}, {scenario}: nothing to compare")
            continue
        row[scenario] = compare.ratio(found)
        problems += compare.problems_of(where, scenario, row[scenario])
    if not case.natural and not row["all"]["ratio"][2] < 1:
        problems.append(f"{where}: no nearer to transformers than with wrong weights")
    if case.off:
        off, unpatched = (answers[side]["alone"] for side in ("off", "unpatched"))
        row["off"] = compare.bit_equal(off, unpatched)
        if row["off"]["differing"] or not row["off"]["values"]:
            problems.append(f"{where}, hook off: {row['off']}")
    return {**row, "problems": problems}
