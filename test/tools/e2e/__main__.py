"""Real servers, patched against unpatched: `make e2e`.

    python -m e2e --sglang 0.5.12.post1 --out e2e-results

Starts SGLang servers, on the stand-ins of `mla_standin` but for fa3's, drives them over
HTTP and ends them. Writes results.json, one row a line, and README.md to the output folder, prints the
page, and exits 1 where something is not ok. Sections that do not run keep their rows.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

import patched_sglang
import torch
from e2e import fa3, load, page, profiles
from e2e.pairs import (
    FA3,
    SIDE_BY_SIDE,
    SIDES,
    TOKENSPEED,
    TRTLLM,
    Case,
    Run,
    base_2_case,
    check_record,
    fa3_case,
    fa3_cases,
    one_gpu_cases,
    run_pair,
    side_by_side,
    two_gpu_cases,
)
from e2e.servers import Server, kill_all, leave_no_server, start_all
from mla_standin.models import VOCAB

SECTIONS = (
    *("compare", "lse", "parallel", "load", "profile", "graphs"),
    *("fa3", "fa3 time"),
)
# A job makes rows of results; their "problems" are what is not ok.
Job = Callable[[], Iterable[dict[str, Any]]]


def run_load(run: Run, name: str, gpu: int, kill: bool) -> Iterable[dict[str, Any]]:
    """A storm on both servers of a backend and what is left of it; then a kill."""
    case = fa3_case("load") if name == FA3 else Case("load", name)
    count, step, times = (300, 8, 4) if run.quick else (2000, 13, 16)
    requests = load.workload(count, 1, VOCAB)
    aborts = load.random_aborts(count, 1)

    def drive(server: Server, side: str) -> dict[str, Any]:
        _, problems, _ = load.storm(server, load.workload(200, 2, VOCAB))
        watch = load.Watch(server)
        figures, wrong, loaded = load.storm(server, requests, aborts, waves=5)
        parts = [(figures, wrong), load.abort_prefills(server, VOCAB, times)]
        parts.append(watch.report())
        alone, wrong = load.lone(server, requests[::step])
        parts.append(load.compare_answers(requests[::step], loaded[::step], alone))
        parts += [({}, wrong), ({}, check_record(server, side == "patched")[1])]
        row: dict[str, Any] = {"load": name, "side": side}
        for figures, wrong in parts:
            row |= figures
            problems += wrong
        return {**row, "problems": [f"{server.name}: {p}" for p in problems]}

    with ExitStack() as stack:
        servers = [stack.enter_context(run.server(case, s, (gpu,))) for s in SIDES]
        start_all(servers)
        yield from side_by_side(drive, servers, SIDES)
        if not kill:
            return
        fresh = stack.enter_context(run.server(case, "fresh", (gpu,)))

        def start_fresh() -> Server:
            start_all([fresh])
            return fresh

        requests = load.workload(200, 3, VOCAB)
        figures, problems = load.kill_scheduler(servers[1], requests, start_fresh)
        problems = [f"kill, {name}: {problem}" for problem in problems]
        yield {"kill": name, **figures, "problems": problems}


def run_small_pool(run: Run, name: str, gpu: int) -> Iterable[dict[str, Any]]:
    """A storm whose requests outgrow the pool, so that SGLang must retract some."""
    case = Case("small pool", name, **load.SMALL_POOL_CASE)
    with run.server(case, "patched", (gpu,)) as server:
        start_all([server])
        requests = load.outgrowing(48, 1, VOCAB)
        figures, problems, _ = load.storm(server, requests, concurrency=len(requests))
        if not figures["retractions"]:
            problems.append("no request was retracted")
        problems += check_record(server, True)[1]
        problems = [f"small pool, {name}: {problem}" for problem in problems]
        yield {"small pool": name, **figures, "problems": problems}


def run_profile(
    run: Run, gpu: int, cases: Sequence[Case], measure: Callable
) -> Iterable[dict[str, Any]]:
    """What `measure` finds of each case's pair of servers, one pair after another."""
    with ExitStack() as stack:
        pairs = [
            [stack.enter_context(run.server(case, side, (gpu,))) for side in SIDES]
            for case in cases
        ]
        stack.callback(kill_all)  # all at once; one by one they take seconds to end
        start_all([server for pair in pairs for server in pair])
        for case, pair in zip(cases, pairs):
            for row in measure(pair, case.model, run.quick):
                yield {"model": case.model, "backend": case.backend, **row}


class Results:
    """Rows in a file that always holds what is done."""

    def __init__(self, file: Path, sections: Sequence[str], machine: str):
        self.file = file
        old = json.loads(file.read_text()) if file.is_file() else []
        self.rows = [row for row in old if row["section"] not in sections]
        self.rows += [{"section": section, "machine": machine} for section in sections]
        self._lock = threading.Lock()

    def add(self, section: str, row: dict[str, Any]) -> None:
        with self._lock:
            self.rows.append({"section": section, **row})
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            part = self.file.with_suffix(".part")
            part.write_text(f"[\n{lines}\n]\n")
            part.replace(self.file)

    def run(self, section: str, label: str, job: Job) -> None:
        started = time.monotonic()
        failed = False
        try:
            for row in job():
                failed |= bool(row["problems"])
                self.add(section, row)
        except Exception as e:
            traceback.print_exc()
            failed = True
            self.add(section, {"problems": [f"{label}: {type(e).__name__}: {e}"]})
        seconds = time.monotonic() - started
        print(f"{label}: {'NOT OK' if failed else 'ok'} ({seconds:.0f} s)", flush=True)


def run_sections(
    run: Run, sections: Sequence[str], gpus: Sequence[int], results: Results
) -> None:
    def pair(case: Case, gpus: Sequence[int]) -> Job:
        return lambda: [run_pair(run, case, gpus)]

    together: list[tuple[str, str, Job]] = []
    for gpu, name in zip(itertools.cycle(gpus), (TRTLLM, TOKENSPEED)):
        if name == TRTLLM or not run.quick:
            job = functools.partial(run_load, run, name, gpu, kill=name == TRTLLM)
            together.append(("load", f"load, {name}", job))
            job = functools.partial(run_small_pool, run, name, gpu)
            together.append(("load", f"small pool, {name}", job))
    for gpu, case in zip(itertools.cycle(gpus), one_gpu_cases()):
        if case.quick or not run.quick:
            label = f"{case.name}, {case.backend}"
            together.append(("compare", label, pair(case, (gpu,))))
    parallel = [
        (
            "fa3" if case.backend == FA3 else "parallel",
            f"{case.name}, {case.backend}",
            pair(case, gpus),
        )
        for case in (two_gpu_cases() if len(gpus) > 1 else ())
    ]
    job = functools.partial(run_load, run, FA3, gpus[0], kill=True)
    together.append(("fa3", "load, fa3", job))
    case = base_2_case()
    together.append(("lse", f"{case.name}, {case.backend}", pair(case, gpus[:1])))
    for case in fa3_cases():
        if case.quick or not run.quick:
            together.append(("fa3", f"{case.name}, fa3", pair(case, gpus[:1])))
    profiled = [
        Case(model, name, model=model, **profiles.CASE)
        for model, name in (profiles.QUICK_PAIRS if run.quick else profiles.PAIRS)
    ]
    graphs = Case("graphs", TRTLLM, model=page.PROJECTED, **profiles.GRAPHS_CASE)
    timed = [
        (name, name, functools.partial(run_profile, run, gpus[0], cases, measure))
        for name, cases, measure in (
            ("profile", profiled, profiles.measure),
            ("graphs", [graphs], profiles.measure_graphs),
        )
    ]
    timed.append(
        ("fa3 time", "fa3 time", functools.partial(fa3.run_time, run, gpus[0]))
    )
    # Ranks of many servers on one GPU wait for each other's turns; what is timed has
    # the machine for itself.
    for jobs, at_once in ((together, SIDE_BY_SIDE // 2), (parallel, 3), (timed, 1)):
        chosen = [job for job in jobs if job[0] in sections]
        with ThreadPoolExecutor(at_once) as pool:
            done = [pool.submit(results.run, *job) for job in chosen]
        for job in done:
            job.result()


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument("--out", type=Path, default=Path("e2e-results"))
    parser.add_argument("--gpus", default="0", help="0, or two such as 0,1")
    parser.add_argument("--only", choices=SECTIONS, nargs="+")
    parser.add_argument(
        "--quick", action="store_true", help="fewer servers and prompts"
    )
    parser.add_argument("--work", type=Path, help="keep models and logs here")
    args = parser.parse_args(arguments)
    gpus = tuple(int(gpu) for gpu in args.gpus.split(","))
    if not torch.cuda.is_available() or torch.cuda.device_count() <= max(gpus):
        print(
            f"needs GPU {args.gpus}; `make test` is what runs without", file=sys.stderr
        )
        return 2
    hopper = torch.cuda.get_device_capability()[0] == 9
    sections = args.only or [
        section
        for section in SECTIONS
        if (section != "parallel" or len(gpus) > 1)
        and (not section.startswith("fa3") or hopper)
    ]
    if "parallel" in sections and len(gpus) != 2:
        parser.error("the section parallel needs two GPUs, as in --gpus 0,1")
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, leave_no_server)
    started = time.monotonic()
    trees = patched_sglang.lay_out(args.sglang)
    describe = "import machine; print(machine.describe())"
    machine = patched_sglang.run_python(trees.unpatched, "-c", describe).strip()
    args.out.mkdir(parents=True, exist_ok=True)
    quick = "; `--quick`" if args.quick else ""
    results = Results(args.out / "results.json", sections, machine + quick)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(trees, (args.work or Path(scratch)).resolve(), args.quick)
        run_sections(run, sections, gpus, results)
    text = page.markdown(results.rows)
    (args.out / "README.md").write_text(text)
    print(text)
    failed = page.problems(results.rows, sections)
    for problem in failed:
        print(f"NOT OK: {problem}")
    print(f"{'NOT OK' if failed else 'ok'}: {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
