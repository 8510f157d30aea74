"""Real servers, patched against unpatched: `make e2e`.

    python -m e2e --sglang 0.5.12.post1 --out e2e-results

Starts SGLang servers on the stand-ins of `standin`, drives them over HTTP and ends
them. Writes results.json and README.md to the output folder, prints the table, and
exits 1 where something is not ok. Sections: compare, load, kill, profile and, with two
GPUs (`--gpus 0,1`), parallel.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import patched_sglang
import torch
from e2e import compare, load, profiles, report
from e2e.models import VOCAB, make_model
from e2e.reference import Reference
from e2e.servers import Server, ServerSpec

from prefill_patch.target import open_target

SECTIONS = ("compare", "load", "kill", "profile", "parallel")
# Servers that run side by side, each with three processes and a few GB of memory.
SIDE_BY_SIDE = max(2, 3 * (os.cpu_count() or 1) // 4)
TOKENSPEED, TRTLLM = "tokenspeed_mla", "trtllm_mla"
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
        Case(
            "chunked prefill 2048",
            TOKENSPEED,
            backend(TOKENSPEED) + chunked(2048),
            env=prefix_chunks,
        ),
        Case(
            "chunked prefill 2048",
            TRTLLM,
            backend(TRTLLM) + chunked(2048),
            env={**prefix_chunks, **NATURAL},
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
    return [
        Case(
            name,
            b,
            (*backend(b), *chunked(2048), *args),
            env=NATURAL,
            gpus=gpus,
            hits=hits,
        )
        for name, args, hits in (
            ("tensor parallel 2", tp, True),
            ("data-parallel attention 2", dp, False),
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

    def __init__(self, models: Callable[[str], Path], questions: Questions):
        self.models, self.questions = models, questions
        self._known: dict[tuple[str, torch.dtype], tuple] = {}
        self._lock = threading.Lock()

    def get(self, kind: str, dtype: torch.dtype):
        """(the reference, its log-probabilities by prompt name)"""
        # The scaled checkpoint has the plain one's weights.
        kind = "deepseek_v3" if kind == "scaled" else kind
        with self._lock:
            if (kind, dtype) not in self._known:
                reference = Reference(self.models(kind), "cuda", dtype)
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
        for server in servers:
            server.start()
        for server in servers:
            server.wait(420)
        return servers


def side_by_side(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def check_record(server: Server) -> tuple[dict[str, Any], list[str]]:
    """What the stand-ins were handed, and what is wrong with it."""
    record = server.record()
    name = f"{server.spec.name}, {'patched' if server.spec.patched else 'unpatched'}"
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


def run_case(run: Run, case: Case, questions: Questions, references: References):
    """A case's comparisons, records and problems."""
    with run.slots, ExitStack() as stack:
        started = time.monotonic()
        unpatched, patched = servers = run.pair(case, stack)
        up = time.monotonic()
        more = questions.more if case.seeds > 1 and not run.quick else []

        def ask(server: Server) -> dict[str, compare.Result]:
            answers = {}
            if "off" in case.scenarios:
                answers["off"] = compare.single(server, questions.singles)
            if "single" in case.scenarios:
                answers["single"] = compare.single(server, questions.singles)
            if "concurrent" in case.scenarios:
                mixed = questions.mixed + more
                answers["concurrent"] = compare.concurrent(server, mixed)
                if case.seeds > 1:
                    answers["alone"] = compare.single(server, questions.mixed)
            if "prefix hits" in case.scenarios:
                answers["prefix hits"] = compare.prefix_hits(
                    server, questions.families, hits=case.hits
                )
            if "greedy" in case.scenarios:
                answers["greedy"] = compare.greedy(server, questions.mixed)
            return answers

        u, p = side_by_side(lambda: ask(unpatched), lambda: ask(patched))
        records = {}
        problems: list[str] = []
        for server in servers:
            record, wrong = check_record(server)
            records["patched" if server.spec.patched else "unpatched"] = record
            problems += wrong
        driven = time.monotonic()
    comparisons = []
    answers: dict[str, dict[str, compare.Result]] = {}
    common = dict(backend=case.backend)
    for name in p:
        title = f"{case.name}: {name}"
        if name == "off":
            comparisons.append(
                compare.compare_off(p[name], u[name], scenario=case.name, **common)
            )
        elif name == "greedy":
            comparisons.append(
                compare.compare_greedy(
                    p[name],
                    u[name],
                    references.scores(case.model, p[name]),
                    references.scores(case.model, u[name]),
                    scenario=title,
                    **common,
                )
            )
        elif name == "alone":
            mixed = {prompt.name for prompt in questions.mixed}

            def only(result: compare.Result) -> compare.Result:
                kept = {k: v for k, v in result["answers"].items() if k in mixed}
                return {**result, "answers": kept}

            comparisons.append(
                compare.compare_consistency(
                    p["alone"],
                    only(p["concurrent"]),
                    u["alone"],
                    only(u["concurrent"]),
                    scenario=f"{case.name}: alone against 64 at once",
                    **common,
                )
            )
        else:
            dtypes = [(torch.bfloat16, "bfloat16")]
            if case.seeds > 1:
                dtypes.append((torch.float32, "float32"))
            for dtype, against in dtypes:
                expected = references.get(case.model, dtype)[1]
                comparisons.append(
                    compare.compare(
                        p[name],
                        u[name],
                        expected,
                        scenario=title,
                        against=against,
                        ceiling=case.ceiling,
                        **common,
                    )
                )
            if case.ceiling == compare.CEILING:
                answers[f"{case.backend}, {title}"] = dict(
                    patched=p[name], unpatched=u[name]
                )
    return {
        "comparisons": comparisons,
        "answers": {case.model: answers},
        "records": {f"{case.name}, {case.backend}": records},
        "problems": problems,
        "seconds": {
            f"{case.name}, {case.backend}": {
                "up": round(up - started, 1),
                "driven": round(driven - up, 1),
            }
        },
    }


def run_load(run: Run, name: str) -> dict[str, Any]:
    """A storm on both servers of a backend, and what is left of it."""
    count, sample = (300, 40) if run.quick else (2000, 150)
    case = Case("load", name, backend(name) + chunked(2048), (), env=NATURAL)
    results: dict[str, Any] = {}
    reference = None
    with run.slots, ExitStack() as stack:
        servers = run.pair(case, stack)
        requests = load.workload(count, 1, VOCAB)
        warm = load.workload(200, 2, VOCAB)

        def drive(server: Server) -> dict[str, Any]:
            first = load.storm(server, warm, seed=2, abort_share=0, flushes=1)
            before = load.snapshot(server)
            stormed = load.storm(server, requests, seed=1)
            after = load.leaks(server, before)
            alone = load.quiet(server, requests, sample=sample)
            return dict(first=first, storm=stormed, leaks=after, quiet=alone)

        driven = side_by_side(*(lambda s=s: drive(s) for s in servers))
        problems = []
        for server, parts in zip(servers, driven):
            side = "patched" if server.spec.patched else "unpatched"
            parts["answers"] = load.compare_answers(
                parts["storm"], parts["quiet"], reference
            )
            reference = reference or parts["answers"]
            for part, result in parts.items():
                problems += [
                    f"load, {name}, {side}, {part}: {problem}"
                    for problem in result["problems"]
                ]
            problems += check_record(server)[1]
            results[side] = {k: load.summary(v) for k, v in parts.items()}
    return {"load": {name: results}, "problems": problems}


def run_retractions(run: Run, name: str) -> dict[str, Any]:
    args = (*backend(name), *load.RETRACTION_ARGS)
    env = {**NATURAL, **load.RETRACTION_ENV}
    case = Case("retractions", name, args, (), env=env)
    with run.slots, run.server(case, True) as server:
        server.start()
        server.wait(420)
        result = load.retractions(server, vocab=VOCAB)
        problems = check_record(server)[1]
    problems += [f"retractions, {name}: {problem}" for problem in result["problems"]]
    return {"retractions": {name: load.summary(result)}, "problems": problems}


def run_kill(run: Run) -> dict[str, Any]:
    case = Case("kill", TRTLLM, backend(TRTLLM) + chunked(2048), (), env=NATURAL)
    with run.server(case, True) as server, run.server(case, True) as fresh:
        server.start()
        server.wait(420)

        def start() -> Server:
            fresh.start()
            fresh.wait(420)
            return fresh

        result = load.kill_worker(server, load.workload(200, 3, VOCAB), start)
    problems = [f"kill: {problem}" for problem in result["problems"]]
    return {"kill": load.summary(result), "problems": problems}


def run_profile(run: Run) -> dict[str, Any]:
    """Launches, preparation time, time to first token and throughput."""
    sizes = (64, 1024) if run.quick else (64, 1024, 8192)
    prefixes = () if run.quick else (8192,)
    # No radix cache between timed prompts; chunks as large as the prompts.
    args = (*chunked(16384), "--max-prefill-tokens", "16384")
    env = {"STANDIN_COMPUTE": "none", "SGLANG_MAX_KV_CHUNK_CAPACITY": "2048"}
    result: dict[str, Any] = {}
    vocab = 512
    with ExitStack() as stack:
        pairs = {}
        for kind in ("deepseek_v3_wide", "deepseek_v3_tp8"):
            for name in (TOKENSPEED, TRTLLM):
                what = (kind, name, backend(name) + args, ("profile",))
                case = Case(*what, model=kind, env=env)
                pairs[kind, name] = [
                    stack.enter_context(run.server(case, patched))
                    for patched in (False, True)
                ]
        servers = [server for pair in pairs.values() for server in pair]
        for server in servers:
            server.start()
        for server in servers:
            server.wait(420)
        for (kind, name), pair in pairs.items():
            layers = [
                profiles.profiles(server, vocab, sizes, prefixes) for server in pair
            ]
            repeats = 5 if run.quick else 12
            first = {
                str(size): profiles.time_to_first_token(pair, vocab, size, repeats)
                for size in sizes
            }
            rate = profiles.throughput(pair, vocab, sizes[-1] // 4, 16, 3)
            sides = ("unpatched", "patched")
            result.setdefault(kind, {})[name] = {
                "layers": dict(zip(sides, layers)),
                "time_to_first_token": {
                    size: dict(zip(sides, seconds)) for size, seconds in first.items()
                },
                "throughput": dict(zip(sides, rate)),
                "throughput_prompt": sizes[-1] // 4,
            }
    return {"profile": result, "problems": profiles.problems(result)}


def failures(result: Mapping[str, Any]) -> list[str]:
    """Single scenarios may be undecided, what they add up to may not."""
    found = compare.failures(result.get("comparisons", []), decided=True)
    return found + compare.failures(result.get("pooled", []))


def machine(run: Run) -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "sglang": run.sglang,
        "quick": run.quick,
    }


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        elif isinstance(value, list) and isinstance(into.get(key), list):
            into[key] += value
        else:
            into[key] = value


def run_all(run: Run, sections: Sequence[str]) -> dict[str, Any]:
    """Results by section."""
    questions = Questions.make(run.quick)
    references = References(run.model, questions)
    together: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    cases = []
    taken = zip(one_gpu_cases(), itertools.cycle(run.gpus))
    for section, of_section in (
        ("compare", [replace(case, gpus=(gpu,)) for case, gpu in taken]),
        ("parallel", two_gpu_cases(run.gpus)),
    ):
        for case in of_section if section in sections else ():
            job = functools.partial(run_case, run, case, questions, references)
            together.append((section, f"{case.name}, {case.backend}", job))
            cases.append(case)
    if "load" in sections:
        for name in (TOKENSPEED, TRTLLM):
            for what, job in (("load", run_load), ("retractions", run_retractions)):
                job = functools.partial(job, run, name)
                together.append(("load", f"{what}, {name}", job))
    # What watches the whole GPU, or is timed, has it for itself.
    alone = [
        (section, section, functools.partial(job, run))
        for section, job in (("kill", run_kill), ("profile", run_profile))
        if section in sections
    ]
    results: dict[str, Any] = {
        section: {"problems": [], "comparisons": [], "machine": machine(run)}
        for section in sections
    }

    def call(label: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started = time.monotonic()
        try:
            result = job()
        except Exception as e:
            traceback.print_exc()
            result = {"problems": [f"{label}: {type(e).__name__}: {e}"]}
        failed = result["problems"] + failures(result)
        seconds = time.monotonic() - started
        print(f"{label}: {'NOT OK' if failed else 'ok'} ({seconds:.0f} s)", flush=True)
        return result

    if together:
        with ThreadPoolExecutor(len(together) + 1) as pool:
            # While the first servers come up.
            pool.submit(references.prefetch, cases)
            futures = [pool.submit(call, label, job) for _, label, job in together]
            for (section, _, _), future in zip(together, futures):
                merge(results[section], future.result())
    for result in results.values():
        answers = result.pop("answers", {})
        result["pooled"] = [pool_answers(references, *item) for item in answers.items()]
    for section, label, job in alone:
        merge(results[section], call(label, job))
    return results


def pool_answers(
    references: References, model: str, answers: Mapping[str, Any]
) -> compare.Comparison:
    """One comparison of everything that servers of one model were asked."""
    expected = references.get(model, torch.bfloat16)[1]
    sides = {}
    for side in ("patched", "unpatched"):
        sides[side] = compare.pooled({run: x[side] for run, x in answers.items()})
    names = sides["patched"]["answers"]
    return compare.compare(
        **sides,
        reference={name: expected[name.split(": ", 2)[2]] for name in names},
        backend="all",
        scenario=f"{model}: everything above",
    )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument(
        "--trees",
        nargs=2,
        type=Path,
        metavar=("UNPATCHED", "PATCHED"),
        help="folders that hold two SGLang packages, instead of --sglang",
    )
    parser.add_argument("--out", type=Path, default=Path("e2e-results"))
    parser.add_argument("--gpus", default="0", help="0, or two such as 0,1")
    parser.add_argument("--only", choices=SECTIONS, nargs="+")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter prompts"
    )
    parser.add_argument("--work", type=Path, help="keep models and logs here")
    args = parser.parse_args(arguments)
    gpus = tuple(int(gpu) for gpu in args.gpus.split(","))
    if not torch.cuda.is_available() or torch.cuda.device_count() <= max(gpus):
        print(
            f"needs GPU {args.gpus}; `make test` is what runs without", file=sys.stderr
        )
        return 2
    sections = args.only or [s for s in SECTIONS if s != "parallel" or len(gpus) > 1]
    if "parallel" in sections and len(gpus) != 2:
        parser.error("the section parallel needs two GPUs, as in --gpus 0,1")
    if args.trees:
        trees = patched_sglang.Trees(*args.trees)
    else:
        trees = patched_sglang.lay_out(args.sglang)
    sglang = open_target(str(trees.unpatched)).version
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.work or Path(scratch)).resolve()
        new = run_all(Run(trees, sglang, folder, args.quick, gpus), sections)
    # The sections that ran take the place of their last run; others stay.
    results |= new
    file.write_text(json.dumps(results, indent=1))
    text = report.markdown(results)
    (args.out / "README.md").write_text(text)
    print(text)
    failed = [
        problem
        for result in new.values()
        for problem in result["problems"] + failures(result)
    ]
    for problem in failed:
        print(f"NOT OK: {problem}")
    print(f"{'NOT OK' if failed else 'ok'}: {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
