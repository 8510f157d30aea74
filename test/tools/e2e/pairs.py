"""Pairs of servers, patched and unpatched, that are asked the same and compared."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import patched_sglang
import torch
from e2e import compare
from e2e.reference import Reference
from e2e.servers import Server, ServerSpec, start_all
from mla_standin.models import VOCAB, make_model

TOKENSPEED, TRTLLM = "tokenspeed_mla", "trtllm_mla"
# Servers that run side by side, each with three processes and a few GB of memory.
SIDE_BY_SIDE = max(2, 3 * (os.cpu_count() or 1) // 4)
# SGLang merges prefix chunks by natural log-sum-exps, trtllm-gen returns base-2 ones;
# natural ones here let errors show that wrong weights would hide.
NATURAL = {"STANDIN_LSE": "natural"}


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
    scenarios: tuple[str, ...] = ("single", "concurrent", "prefix hits", "greedy")
    model: str = "deepseek_v3"
    env: Mapping[str, str] = field(default_factory=dict)
    patched_env: Mapping[str, str] = field(default_factory=dict)
    # None: the first that the run may use.
    gpus: Optional[tuple[int, ...]] = None
    seeds: int = 1
    # Data-parallel ranks have a prefix cache each.
    hits: bool = True
    # Batches must come with rows past those of requests.
    padding: bool = False
    ceiling: float = compare.CEILING


def one_gpu_cases() -> list[Case]:
    prefix_chunks = {"SGLANG_MAX_KV_CHUNK_CAPACITY": "8192"}
    return [
        Case(
            "chunked prefill off",
            TOKENSPEED,
            backend(TOKENSPEED) + chunked(-1),
            seeds=3,
        ),
        Case("chunked prefill off", TRTLLM, backend(TRTLLM) + chunked(-1), env=NATURAL),
        *(
            Case(
                "chunked prefill 2048",
                name,
                backend(name) + chunked(2048),
                env={**prefix_chunks, **NATURAL},
            )
            for name in (TOKENSPEED, TRTLLM)
        ),
        Case(
            "chunked prefill 512",
            TOKENSPEED,
            backend(TOKENSPEED) + chunked(512),
            env=prefix_chunks,
        ),
        Case(
            "chunked prefill 2048, base-2 LSE",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            env=prefix_chunks,
            scenarios=("prefix hits",),
            ceiling=float("inf"),
        ),
        Case(
            "decode by tokenspeed_mla",
            TRTLLM,
            (
                *("--prefill-attention-backend", TRTLLM),
                *("--decode-attention-backend", TOKENSPEED),
                *chunked(512),
            ),
            env=NATURAL,
        ),
        Case(
            "decode by trtllm_mla",
            TOKENSPEED,
            (
                *("--prefill-attention-backend", TOKENSPEED),
                *("--decode-attention-backend", TRTLLM),
                *chunked(2048),
            ),
        ),
        *(
            Case(
                "hook off",
                name,
                backend(name) + chunked(512),
                env=NATURAL,
                patched_env={"SGLANG_MLA_FP8_PREFILL": "off"},
                scenarios=("off",),
            )
            for name in (TOKENSPEED, TRTLLM)
        ),
        Case(
            "composed producer",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            env=NATURAL,
            patched_env={"SGLANG_MLA_FP8_PREFILL": "composed"},
        ),
        Case(
            "K and V scales",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            model="scaled",
            env=NATURAL,
        ),
        Case(
            "V2-Lite", TOKENSPEED, backend(TOKENSPEED) + chunked(2048), model="v2_lite"
        ),
        Case(
            "GLM, 20 heads",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            model="glm",
            env={**NATURAL, "STANDIN_ANY_HEAD_DIM": "1"},
        ),
    ]


def two_gpu_cases(gpus: tuple[int, ...]) -> list[Case]:
    # Peer-to-peer and multicast all-reduce need links that not every host has.
    tp = (
        *("--tp-size", "2"),
        "--disable-custom-all-reduce",
        "--enforce-disable-flashinfer-allreduce-fusion",
    )
    dp = (*tp, "--dp-size", "2", "--enable-dp-attention")
    # Tokens are scattered over the ranks between MLPs, and so padded to an even number.
    by_rank = (*tp, "--moe-dense-tp-size", "1")
    return [
        Case(
            name,
            b,
            (*backend(b), *chunked(2048), *args),
            # References and other servers take unequal parts of the two GPUs.
            env={**NATURAL, "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"},
            gpus=gpus,
            hits="data-parallel" not in name,
            padding="MLP by rank" in name,
        )
        for name, args in (
            ("tensor parallel 2", tp),
            ("tensor parallel 2, MLP by rank", by_rank),
            ("data-parallel attention 2", dp),
        )
        for b in (TOKENSPEED, TRTLLM)
    ]


@dataclass
class Questions:
    """What all pairs are asked, and transformers' answers to it."""

    families: list[compare.Family]
    singles: list[compare.Prompt]
    mixed: list[compare.Prompt]
    more: list[compare.Prompt]  # for cases with more than one seed

    @classmethod
    def make(cls, quick: bool) -> "Questions":
        lengths, prefixes = compare.LENGTHS, compare.PREFIXES
        if quick:
            lengths = tuple(n for n in lengths if n <= 2049)
            prefixes = (64, 100, 200, 512, 700, 1000, 1500, 2048)
        return cls(
            families=compare.shared_prefix(1, VOCAB, prefixes),
            singles=compare.prompts(1, VOCAB, lengths),
            mixed=compare.mixed(1, VOCAB, 64),
            more=[
                *compare.mixed(2, VOCAB, 128),
                *compare.mixed(3, VOCAB, 128),
            ],
        )

    def prompts(self) -> list[compare.Prompt]:
        members = [prompt for family in self.families for prompt in family.prompts]
        return [*self.singles, *self.mixed, *self.more, *members]


class References:
    """transformers' answers, one model at a time, while the servers come up."""

    def __init__(
        self,
        models: Callable[[str], Path],
        questions: Questions,
        device: str = "cuda",
    ):
        self.models, self.questions, self.device = models, questions, device
        self._known: dict[tuple[str, torch.dtype], tuple] = {}
        self._lock = threading.Lock()

    def get(self, kind: str, dtype: torch.dtype):
        """(the reference, its log-probabilities by prompt name)"""
        # The scaled checkpoint has the plain one's weights.
        kind = "deepseek_v3" if kind == "scaled" else kind
        with self._lock:
            if (kind, dtype) not in self._known:
                reference = Reference(self.models(kind), self.device, dtype)
                expected = compare.expected(reference, self.questions.prompts())
                self._known[kind, dtype] = (reference, expected)
            return self._known[kind, dtype]

    def prefetch(self, cases: Sequence[Case]) -> None:
        for case in cases:
            self.get(case.model, torch.bfloat16)
            if case.seeds > 1:
                self.get(case.model, torch.float32)

    def scores(self, kind: str, result: compare.Result):
        reference, _ = self.get(kind, torch.bfloat16)
        with self._lock:
            return compare.scores(reference, result, self.questions.mixed)


@dataclass
class Run:
    """One run of the suite."""

    trees: patched_sglang.Trees
    sglang: str
    folder: Path
    quick: bool
    gpus: tuple[int, ...]
    slots: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(SIDE_BY_SIDE // 2)
    )
    # Ranks of many servers on one GPU wait for each other's turns.
    several: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(3))
    _models: threading.Lock = field(default_factory=threading.Lock)

    def model(self, kind: str) -> Path:
        with self._models:
            return make_model(kind, self.folder / "models" / kind)

    def server(self, case: Case, patched: bool) -> Server:
        site = self.trees.patched if patched else self.trees.unpatched
        env = {**case.env, **(case.patched_env if patched else {})}
        name = f"{case.name}-{case.backend}-{'-'.join(case.scenarios)}"
        gpus = case.gpus or self.gpus[:1]
        model = self.model(case.model)
        spec = ServerSpec(name, patched, site, model, case.args, env, gpus)
        return Server(spec, self.folder / "servers")

    def pair(self, case: Case, stack: ExitStack) -> list[Server]:
        """The unpatched and the patched server of a case, up."""
        servers = [stack.enter_context(self.server(case, p)) for p in (False, True)]
        start_all(servers)
        return servers


def side_by_side(call: Callable[[Server], Any], servers: Sequence[Server]) -> list[Any]:
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(call, servers))


def check_record(server: Server) -> tuple[dict[str, Any], list[str]]:
    """What the stand-ins were handed, and what is wrong with it."""
    record = server.record()
    name = f"{server.spec.name}, {server.spec.side}"
    problems = []
    prefills = [call for call in record["calls"] if "causal" in call]
    if not prefills:
        problems.append(f"{name}: no prefill kernel was called")
    for call in record["calls"]:
        dtypes = {call[f"{x}_dtype"] for x in "qkv"}
        if dtypes != {"float8_e4m3fn"} or not call["contiguous"]:
            problems.append(f"{name}: a kernel was handed {call}")
    nan = {kind: n for kind, n in record["nan"].items() if n}
    if nan:
        problems.append(f"{name}: NaN in {nan}")
    hook_on = server.spec.env.get("SGLANG_MLA_FP8_PREFILL") != "off"
    if server.spec.patched and record["late_compiles"]:
        problems.append(f"{name}: compiled by a request: {record['late_compiles']}")
    said = "FP8 prefill preparation with the" in server.log.read_text(errors="replace")
    if said != (server.spec.patched and hook_on):
        problems.append(f"{name}: the log {'says' if said else 'does not say'} FP8 on")
    return record, problems


def ask(
    server: Server, case: Case, questions: Questions, quick: bool
) -> dict[str, compare.Result]:
    """The answers to a case's scenarios, by name; "alone" are the ones that its
    concurrent answers are compared with."""
    answers = {}
    if "off" in case.scenarios:
        answers["off"] = compare.single(server, questions.singles)
    if "single" in case.scenarios:
        answers["single"] = compare.single(server, questions.singles)
    if "concurrent" in case.scenarios:
        more = questions.more if case.seeds > 1 and not quick else []
        answers["concurrent"] = compare.concurrent(server, questions.mixed + more)
        if case.seeds > 1:
            answers["alone"] = compare.single(server, questions.mixed)
    if "prefix hits" in case.scenarios:
        answers["prefix hits"] = compare.prefix_hits(
            server, questions.families, hits=case.hits
        )
    if "greedy" in case.scenarios:
        answers["greedy"] = compare.greedy(server, questions.mixed)
    return answers


def comparisons_of(
    case: Case,
    name: str,
    patched: Mapping[str, compare.Result],
    unpatched: Mapping[str, compare.Result],
    references: References,
) -> list[compare.Comparison]:
    """The comparisons that the answers to a scenario allow; `patched` and `unpatched`
    are what `ask` returned."""
    p, u = patched[name], unpatched[name]
    common = dict(backend=case.backend, scenario=f"{case.name}: {name}")
    if name == "off":
        return [compare.compare_off(p, u, **{**common, "scenario": case.name})]
    if name == "greedy":
        scores = [references.scores(case.model, side) for side in (p, u)]
        return [compare.compare_greedy(p, u, *scores, **common)]
    if name == "alone":

        mixed = {prompt.name for prompt in references.questions.mixed}

        def only(result: compare.Result) -> compare.Result:
            kept = {k: v for k, v in result["answers"].items() if k in mixed}
            return {**result, "answers": kept}

        crowds = [only(side["concurrent"]) for side in (patched, unpatched)]
        common["scenario"] = f"{case.name}: alone against 64 at once"
        return [compare.compare_consistency(p, crowds[0], u, crowds[1], **common)]
    dtypes = {"bfloat16": torch.bfloat16}
    if case.seeds > 1:
        dtypes["float32"] = torch.float32
    return [
        compare.compare(
            p,
            u,
            references.get(case.model, dtype)[1],
            against=against,
            ceiling=case.ceiling,
            **common,
        )
        for against, dtype in dtypes.items()
    ]


def run_case(run: Run, case: Case, questions: Questions, references: References):
    """A case's comparisons, records and problems."""
    several = run.several if case.gpus and len(case.gpus) > 1 else nullcontext()
    with several, run.slots, ExitStack() as stack:
        started = time.monotonic()
        servers = run.pair(case, stack)
        up = time.monotonic()
        unpatched, patched = side_by_side(
            lambda server: ask(server, case, questions, run.quick), servers
        )
        records = {}
        problems: list[str] = []
        for server in servers:
            record, wrong = check_record(server)
            if case.padding and not any(call.get("padded") for call in record["calls"]):
                wrong.append(f"{case.name}, {case.backend}: no batch was padded")
            records[server.spec.side] = record
            problems += wrong
        driven = time.monotonic()
    comparisons = []
    for name in patched:
        comparisons += comparisons_of(case, name, patched, unpatched, references)
    pooled = ("single", "concurrent", "prefix hits")
    answers = {
        f"{case.backend}, {case.name}: {name}": dict(
            patched=patched[name], unpatched=unpatched[name]
        )
        for name in pooled
        if name in patched and case.ceiling == compare.CEILING
    }
    label = f"{case.name}, {case.backend}"
    return {
        "comparisons": comparisons,
        "answers": {case.model: answers},
        "records": {label: records},
        "problems": problems,
        "seconds": {
            label: {"up": round(up - started, 1), "driven": round(driven - up, 1)}
        },
    }


def pool_answers(
    references: References, model: str, title: str, answers: Mapping[str, Any]
) -> compare.Comparison:
    """One comparison of several runs of servers of one model: {"<backend>, <case>:
    <scenario>": {"patched": …, "unpatched": …}}."""
    expected = references.get(model, torch.bfloat16)[1]
    sides = {}
    for side in ("patched", "unpatched"):
        sides[side] = compare.pooled({run: x[side] for run, x in answers.items()})
    names = sides["patched"]["answers"]
    return compare.compare(
        **sides,
        reference={name: expected[name.split(": ", 2)[2]] for name in names},
        backend="all",
        scenario=f"{model}: {title}",
    )
