"""Real servers, patched against unpatched: `make e2e`.

    python -m e2e --sglang 0.5.12.post1 --out e2e-results

Starts SGLang servers on the stand-ins of `mla_standin`, drives them over HTTP and ends
them. Writes results.json, as they come, and README.md to the output folder, prints the
table, and exits 1 where something is not ok. Sections: compare, load, kill, profile
and, with two GPUs (`--gpus 0,1`), parallel.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import patched_sglang
import torch
from e2e import compare, load, profiles, report
from e2e.pairs import (
    NATURAL,
    TOKENSPEED,
    TRTLLM,
    Case,
    Questions,
    References,
    Run,
    backend,
    check_record,
    chunked,
    one_gpu_cases,
    pool_answers,
    run_case,
    side_by_side,
    two_gpu_cases,
)
from e2e.servers import Server, kill_all, start_all
from mla_standin.models import KINDS, VOCAB

from prefill_patch.target import open_target

SECTIONS = ("compare", "parallel", "load", "kill", "profile")
Job = Callable[[], Any]
POOLED = "everything together"


def run_load(run: Run, name: str) -> dict[str, Any]:
    """A storm on both servers of a backend, and what is left of it."""
    count, sample, times = (300, 40, 4) if run.quick else (2000, 150, 16)
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
            prefills = load.abort_prefills(server, VOCAB, times=times)
            after = load.leaks(server, before)
            alone = load.quiet(server, requests, sample=sample)
            parts = dict(first=first, storm=stormed, prefills=prefills)
            return {**parts, "leaks": after, "quiet": alone}

        problems = []
        for server, parts in zip(servers, side_by_side(drive, servers)):
            side = server.spec.side
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
        start_all([server])
        result = load.retractions(server, vocab=VOCAB)
        problems = check_record(server)[1]
    problems += [f"retractions, {name}: {problem}" for problem in result["problems"]]
    return {"retractions": {name: load.summary(result)}, "problems": problems}


def run_kill(run: Run) -> dict[str, Any]:
    case = Case("kill", TRTLLM, backend(TRTLLM) + chunked(2048), (), env=NATURAL)
    with run.server(case, True) as server, run.server(case, True) as fresh:
        start_all([server])

        def start() -> Server:
            start_all([fresh])
            return fresh

        result = load.kill_worker(server, load.workload(200, 3, VOCAB), start)
    problems = [f"kill: {problem}" for problem in result["problems"]]
    return {"kill": load.summary(result), "problems": problems}


def run_profile(run: Run) -> Iterator[dict[str, Any]]:
    """Launches, preparation time, time to first token and throughput, by pair."""
    sizes = (64, 1024) if run.quick else (64, 1024, 8192)
    prefixes = () if run.quick else (8192,)
    # Chunks as large as the prompts.
    args = (*chunked(16384), "--max-prefill-tokens", "16384")
    # Idle schedulers would take the CPU from the one that is timed.
    args += ("--sleep-on-idle",)
    env = {"STANDIN_COMPUTE": "none", "SGLANG_MAX_KV_CHUNK_CAPACITY": "2048"}
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
        stack.callback(kill_all)  # all at once; one by one they take seconds to end
        start_all(servers)
        for (kind, name), pair in pairs.items():
            layers = [
                profiles.profiles(server, vocab, sizes, prefixes) for server in pair
            ]
            repeats, storms = (5, 3) if run.quick else (40, 10)
            timed = {str(size): (size, repeats) for size in sizes}
            for prefix in prefixes:
                timed[f"{sizes[-1]} behind {prefix}"] = (sizes[-1], repeats, prefix)
            first = {
                size: profiles.time_to_first_token(pair, vocab, *what)
                for size, what in timed.items()
            }
            rate = profiles.throughput(pair, vocab, sizes[-1] // 4, 16, storms)
            sides = ("unpatched", "patched")
            result = {
                "layers": dict(zip(sides, layers)),
                "time_to_first_token": {
                    size: dict(zip(sides, seconds)) for size, seconds in first.items()
                },
                "throughput": dict(zip(sides, rate)),
                "model_layers": KINDS[kind]["num_hidden_layers"],
                "throughput_prompt": sizes[-1] // 4,
            }
            problems = profiles.problems(f"{kind}, {name}", result["layers"])
            yield {"profile": {kind: {name: result}}, "problems": problems}


def failures(section: Mapping[str, Any]) -> list[str]:
    """What is not ok. Single scenarios may be undecided, what they add up to may not."""
    found = list(section["problems"])
    found += compare.failures(section.get("comparisons", []), decided=True)
    found += compare.failures(section.get("pooled", []))
    return found + [f"{label}: not done" for label in section.get("waiting", [])]


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


class Results:
    """Sections' results in a file that always holds what is done, and which of the
    sections' jobs are not. Sections that do not run keep their last results."""

    def __init__(self, file: Path, jobs: Mapping[str, Sequence[str]], machine: dict):
        self.file = file
        self.sections = json.loads(file.read_text()) if file.is_file() else {}
        for section, labels in jobs.items():
            self.sections[section] = {
                "machine": machine,
                "problems": [],
                "comparisons": [],
                "waiting": list(labels),
            }
        # What results hold that nobody reads in a file.
        self.answers: dict[str, dict[str, Any]] = {section: {} for section in jobs}
        self._lock = threading.Lock()

    def add(self, section: str, result: Mapping[str, Any], done: str = "") -> None:
        """Part of a section's results; `done` names a job that this is the last of."""
        with self._lock:
            result = dict(result)
            merge(self.answers[section], result.pop("answers", {}))
            merge(self.sections[section], result)
            if done:
                self.sections[section]["waiting"].remove(done)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.sections, indent=1))
            part.replace(self.file)

    def run(self, section: str, label: str, job: Job) -> None:
        """One job: a function of no arguments, or a generator of parts of its result."""
        started = time.monotonic()
        failed: list[str] = []
        try:
            parts = job()
            for part in parts if inspect.isgenerator(parts) else (parts,):
                failed += failures(part)
                self.add(section, part)
        except Exception as e:
            traceback.print_exc()
            failed.append(f"{label}: {type(e).__name__}: {e}")
            self.add(section, {"problems": failed[-1:]})
        self.add(section, {}, done=label)
        seconds = time.monotonic() - started
        print(f"{label}: {'NOT OK' if failed else 'ok'} ({seconds:.0f} s)", flush=True)


def jobs_of(
    run: Run, sections: Sequence[str], questions: Questions, references: References
) -> tuple[list[tuple[str, str, Job]], list[tuple[str, str, Job]]]:
    """(section, label, job) of what may run side by side, and of what watches the whole
    GPU, or is timed, and has it for itself."""
    together: list[tuple[str, str, Job]] = []
    taken = zip(one_gpu_cases(), itertools.cycle(run.gpus))
    for section, cases in (
        ("parallel", two_gpu_cases(run.gpus)),
        ("compare", [replace(case, gpus=(gpu,)) for case, gpu in taken]),
    ):
        for case in cases:
            job = functools.partial(run_case, run, case, questions, references)
            together.append((section, f"{case.name}, {case.backend}", job))
    for name in (TOKENSPEED, TRTLLM):
        for what, job in (("load", run_load), ("retractions", run_retractions)):
            job = functools.partial(job, run, name)
            together.append(("load", f"{what}, {name}", job))
    alone = [
        (section, section, functools.partial(job, run))
        for section, job in (("kill", run_kill), ("profile", run_profile))
    ]
    chosen = [[job for job in jobs if job[0] in sections] for jobs in (together, alone)]
    return chosen[0], chosen[1]


def pool_all(references: References, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Of each model everything together and by scenario, which must be decided, so
    that an error in one scenario is not lost among the others; and by case."""
    pooled, cases = [], []
    for model, runs in answers.items():
        scenarios: dict[str, dict[str, Any]] = {}
        pairs: dict[str, dict[str, Any]] = {}
        for run, sides in runs.items():
            pair, scenario = run.split(": ")
            scenarios.setdefault(scenario, {})[run] = sides
            pairs.setdefault(pair, {})[run] = sides
        for pair, some in pairs.items():
            cases.append(pool_answers(references, model, pair, some))
        if len(pairs) > 1:
            for scenario, some in scenarios.items():
                title = f"all {scenario}"
                pooled.append(pool_answers(references, model, title, some))
            title = "everything above"
            pooled.append(pool_answers(references, model, title, runs))
        else:
            pooled.append(cases.pop())
    return {"comparisons": cases, "pooled": pooled, "problems": []}


def run_all(run: Run, sections: Sequence[str], file: Path) -> dict[str, Any]:
    """Results by section, also of those that ran before."""
    questions = Questions.make(run.quick)
    references = References(run.model, questions)
    together, alone = jobs_of(run, sections, questions, references)
    labels: dict[str, list[str]] = {section: [] for section in sections}
    for section, label, _ in together + alone:
        labels[section].append(label)
    compared = [section for section in ("compare", "parallel") if section in sections]
    for section in compared:
        labels[section].append(POOLED)
    results = Results(file, labels, machine(run))
    if together:
        with ThreadPoolExecutor(len(together) + 1) as pool:
            # While the first servers come up.
            cases = [job.args[1] for _, _, job in together if job.func is run_case]
            pool.submit(references.prefetch, cases)
            for job in together:
                pool.submit(results.run, *job)
        for section in compared:
            answers = results.answers[section]
            job = functools.partial(pool_all, references, answers)
            results.run(section, POOLED, job)
    for job in alone:
        results.run(*job)
    return results.sections


def end(signum: int, frame: Any) -> None:
    """Leave no server behind."""
    kill_all()
    os._exit(128 + signum)


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
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, end)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.work or Path(scratch)).resolve()
        run = Run(trees, sglang, folder, args.quick, gpus)
        results = run_all(run, sections, file)
    text = report.markdown(results)
    (args.out / "README.md").write_text(text)
    print(text)
    failed = [problem for name in sections for problem in failures(results[name])]
    for problem in failed:
        print(f"NOT OK: {problem}")
    print(f"{'NOT OK' if failed else 'ok'}: {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
