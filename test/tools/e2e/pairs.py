"""The pairs of servers, patched and unpatched, that are asked the same and compared."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import patched_sglang
from mla_standin.models import VOCAB, make_model

from e2e import compare
from e2e.reference import Reference
from e2e.servers import Server, start_all

TOKENSPEED, TRTLLM = "tokenspeed_mla", "trtllm_mla"
SIDES = ("unpatched", "patched")
OFF = {"SGLANG_MLA_FP8_PREFILL": "off"}
# SGLang merges prefix chunks by natural log-sum-exps, trtllm-gen returns base-2 ones;
# natural ones here let errors show that wrong weights would hide.
NATURAL = {"STANDIN_LSE": "natural"}
SMALL_PREFIX_CHUNKS = {"SGLANG_MAX_KV_CHUNK_CAPACITY": "8192"}
# Servers that run side by side, each with three processes and a few GB of memory.
SIDE_BY_SIDE = max(2, 3 * (os.cpu_count() or 1) // 4)


def backend(name: str) -> tuple[str, ...]:
    return ("--attention-backend", name)


def chunked(tokens: int) -> tuple[str, ...]:
    return ("--chunked-prefill-size", str(tokens))


@dataclass(frozen=True)
class Case:
    """A pair of servers, and what they are asked."""

    name: str
    backend: str
    args: tuple[str, ...]
    model: str = "deepseek_v3"
    env: Mapping[str, str] = field(default_factory=lambda: NATURAL)
    patched_env: Mapping[str, str] = field(default_factory=dict)
    scenarios: tuple[str, ...] = ("alone", "at once", "behind prefixes")
    # A third server, patched but with the hook off, must equal the unpatched one.
    off: bool = False
    # Data-parallel ranks have a prefix cache each.
    hits: bool = True
    # Batches must come with rows past those of requests.
    padding: bool = False
    # Among what --quick runs.
    quick: bool = False


def one_gpu_cases() -> list[Case]:
    both = (TOKENSPEED, TRTLLM)
    hybrid = ("--prefill-attention-backend", "--decode-attention-backend")
    composed = {"SGLANG_MLA_FP8_PREFILL": "composed"}
    return [
        *(
            Case(
                "chunks of 2048",
                b,
                backend(b) + chunked(2048),
                env={**SMALL_PREFIX_CHUNKS, **NATURAL},
                off=True,
                quick=True,
            )
            for b in both
        ),
        *(Case("not chunked", b, backend(b) + chunked(-1)) for b in both),
        Case(
            "chunks of 512",
            TOKENSPEED,
            backend(TOKENSPEED) + chunked(512),
            env=SMALL_PREFIX_CHUNKS,
        ),
        Case(
            "chunks of 2048, base-2 LSE",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            env=SMALL_PREFIX_CHUNKS,
            scenarios=("behind prefixes",),
        ),
        Case(
            "decode by tokenspeed_mla",
            TRTLLM,
            (hybrid[0], TRTLLM, hybrid[1], TOKENSPEED, *chunked(512)),
        ),
        Case(
            "decode by trtllm_mla",
            TOKENSPEED,
            (hybrid[0], TOKENSPEED, hybrid[1], TRTLLM, *chunked(2048)),
        ),
        Case(
            "composed producer",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            patched_env=composed,
        ),
        Case("K and V scales", TRTLLM, backend(TRTLLM) + chunked(2048), model="scaled"),
        Case(
            "V2-Lite", TOKENSPEED, backend(TOKENSPEED) + chunked(2048), model="v2_lite"
        ),
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
    env = {**NATURAL, "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    return [
        case
        for b in (TOKENSPEED, TRTLLM)
        for case in (
            Case("tensor parallel 2", b, (*backend(b), *chunked(2048), *tp), env=env),
            Case(
                "tensor parallel 2, MLP by rank",
                b,
                (*backend(b), *chunked(2048), *by_rank),
                env=env,
                padding=True,
            ),
            Case(
                "data-parallel attention 2",
                b,
                (*backend(b), *chunked(2048), *dp),
                env=env,
                hits=False,
            ),
        )
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

    def server(
        self,
        name: str,
        side: str,
        args: Sequence[str],
        env: Mapping[str, str],
        model: str = "deepseek_v3",
        gpus: Sequence[int] = (0,),
    ) -> Server:
        slug = "".join(c if c.isalnum() else "-" for c in f"{name}-{side}")
        site = self.trees.unpatched if side == "unpatched" else self.trees.patched
        folder = self.folder / "servers" / slug
        return Server(folder, site, self.model(model), args, env, gpus)

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


def side_by_side(call: Callable[[Server], Any], servers: Sequence[Server]) -> list[Any]:
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(call, servers))


def check_record(
    server: Server, hook_on: bool
) -> tuple[dict[str, list[int]], list[str]]:
    """What reached the attention kernels, {"<kernel>, <kind>": [calls, of them padded,
    of them with requests without keys, tokens]}, and what is wrong with it."""
    record = server.record()
    kinds = {True: "causal", False: "prefix chunk", None: "decode"}
    totals: dict[str, list[int]] = {}
    problems = []
    for call in record["calls"]:
        dtypes = {call[f"{x}_dtype"] for x in "qkv"}
        if dtypes != {"float8_e4m3fn"} or not call["contiguous"]:
            problems.append(f"a kernel was handed {call}")
        name = f"{call['kernel']}, {kinds[call.get('causal')]}"
        count = call["count"]
        padded, keyless = call.get("padded", 0), call.get("requests_without_keys", 0)
        more = [count, count * padded, count * keyless, call["tokens"]]
        totals[name] = [a + b for a, b in zip(totals.get(name, [0] * 4), more)]
    if not any("causal" in name for name in totals):
        problems.append("no prefill kernel was called")
    if record["nan"]:
        problems.append(f"{record['nan']} NaN went into the kernels or came out")
    if hook_on and record["late_compiles"]:
        problems.append(f"compiled by a request: {record['late_compiles']}")
    if hook_on != ("FP8 prefill preparation with the" in server.log_since(0)):
        problems.append(f"the log {'does not say' if hook_on else 'says'} FP8 on")
    return totals, [f"{server.name}: {problem}" for problem in problems]


def run_pair(run: Run, case: Case, gpus: Sequence[int]) -> dict[str, Any]:
    """A row of results: distances by scenario, kernels, and problems."""
    expected = run.expected(case.model)
    sides = {"unpatched": case.env, "patched": {**case.env, **case.patched_env}}
    if case.off:
        sides["off"] = {**case.env, **OFF}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                run.server(
                    f"{case.name}, {case.backend}",
                    side,
                    case.args,
                    env,
                    case.model,
                    gpus,
                )
            )
            for side, env in sides.items()
        ]
        start_all(servers)

        def drive(server: Server) -> tuple[dict[str, compare.Answers], list[str]]:
            answers, problems = {}, []
            off = server.env.get("SGLANG_MLA_FP8_PREFILL") == "off"
            for scenario in ("alone",) if off else case.scenarios:
                prompts = run.questions[scenario]
                answers[scenario], wrong = compare.ask(
                    server, scenario, prompts, case.hits
                )
                problems += [f"{server.name}: {fault}" for fault in wrong]
            return answers, problems

        answers, problems = zip(*side_by_side(drive, servers))
        records = [
            check_record(server, side == "patched")
            for server, side in zip(servers, sides)
        ]
    row: dict[str, Any] = {"pair": case.name, "backend": case.backend}
    row["problems"] = [p for some in problems for p in some]
    row["problems"] += [p for _, some in records for p in some]
    row["kernels"] = dict(zip(sides, records))["patched"][0]
    if case.padding and not any(padded for _, padded, *_ in row["kernels"].values()):
        row["problems"].append(f"{case.name}, {case.backend}: no batch was padded")
    distances = {
        scenario: compare.distances(
            run.questions[scenario],
            [side[scenario] for side in answers[:2]],
            expected.result(),
        )
        for scenario in case.scenarios
    }
    distances["all"] = {k: v for some in distances.values() for k, v in some.items()}
    for scenario, found in distances.items():
        where = f"{case.name}, {case.backend}, {scenario}"
        if len(found) < 2:
            row["problems"].append(f"{where}: nothing to compare")
            continue
        row[scenario] = compare.ratio(found)
        row["problems"] += compare.problems_of(where, row[scenario])
    if case.off:
        row["off"] = compare.bit_equal(answers[2]["alone"], answers[0]["alone"])
        if row["off"]["differing"] or not row["off"]["values"]:
            row["problems"].append(
                f"{case.name}, {case.backend}: hook off: {row['off']}"
            )
    return row
