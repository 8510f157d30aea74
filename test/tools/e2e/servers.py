"""Starts, drives and ends real SGLang servers on the stand-ins of `mla_standin`."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import psutil
import requests
from mla_standin.kernels import RECORD_EVERY

TEST = Path(__file__).resolve().parents[2]

# What makes servers comparable and quick to start, and what the stand-ins need: they
# read lengths on the host, which a CUDA graph cannot.
COMMON = (
    "--skip-tokenizer-init",
    *("--kv-cache-dtype", "fp8_e4m3"),
    *("--page-size", "64"),
    "--disable-cuda-graph",
    "--disable-piecewise-cuda-graph",
    *("--sampling-backend", "pytorch"),
    *("--max-total-tokens", "65536"),
    *("--mem-fraction-static", "0.85"),
    *("--random-seed", "0"),
    *("--log-level", "info"),
)


@dataclass(frozen=True)
class ServerSpec:
    """One server: the SGLang it runs, its model, arguments and environment."""

    name: str
    patched: bool
    site: Path
    model: Path
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[int, ...] = (0,)

    @property
    def side(self) -> str:
        return "patched" if self.patched else "unpatched"


@dataclass
class Request:
    """One greedy request. `logprob_start` None asks for no log-probabilities, 0 for
    those of the whole prompt and of the output."""

    input_ids: list[int]
    max_new_tokens: int = 0
    logprob_start: Optional[int] = None
    rid: Optional[str] = None

    def body(self) -> dict[str, Any]:
        body = {
            "input_ids": self.input_ids,
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": max(self.max_new_tokens, 1),
                "ignore_eos": True,
            },
        }
        if self.logprob_start is not None:
            body["return_logprob"] = True
            body["logprob_start_len"] = self.logprob_start
        if self.rid is not None:
            body["rid"] = self.rid
        return body


@dataclass
class Answer:
    """What a server said. Entry i of `input_logprobs` is
    log p(input_ids[logprob_start + 1 + i] | everything before it)."""

    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    finish: str = ""
    seconds: float = 0.0
    error: Optional[str] = None

    @classmethod
    def read(cls, request: Request, body: dict[str, Any], seconds: float) -> "Answer":
        meta = body["meta_info"]
        reason = meta.get("finish_reason") or {}
        answer = cls(
            output_ids=list(body.get("output_ids") or [])[: request.max_new_tokens],
            cached_tokens=meta.get("cached_tokens", 0),
            finish=reason.get("type", ""),
            seconds=seconds,
        )
        if reason.get("type") == "abort" and reason.get("message"):
            answer.error = str(reason["message"])
        if request.logprob_start is None:
            return answer
        outputs = meta.get("output_token_logprobs") or []
        answer.output_logprobs = [x[0] for x in outputs[: request.max_new_tokens]]
        if answer.error is None:
            # The first has nothing before it in what was asked for. An aborted request
            # may have some of the others only.
            inputs = meta.get("input_token_logprobs") or []
            answer.input_logprobs = [x[0] for x in inputs[1:]]
        return answer


# What SGLang calls an abort that was asked for, of a request that ran or waited.
ABORTED = ("Aborted", "Abort in waiting queue")


def is_logprob(value: Optional[float]) -> bool:
    # NaN and infinity arrive as null: JSON has neither.
    return value is not None and math.isfinite(value) and value <= 1e-3


def faults(
    request: Request, answer: Optional[Mapping[str, Any]], may_abort: bool = False
) -> list[str]:
    """What is wrong with one answer, given by its fields. An aborted one may be short,
    but not wrong."""
    if answer is None:
        return ["no answer"]
    aborted = may_abort and answer["finish"] == "abort"
    aborted = aborted and answer["error"] in (None, *ABORTED)
    if answer["error"] is not None and not aborted:
        return [f"error: {' '.join(answer['error'].split())[:300]}"]
    found = []
    for kind in ("output_logprobs", "input_logprobs"):
        bad = [i for i, value in enumerate(answer[kind]) if not is_logprob(value)]
        if bad:
            found.append(
                f"{len(bad)} of {len(answer[kind])} {kind} are NaN, infinite or "
                f"positive; the first, at {bad[0]}, is {answer[kind][bad[0]]}"
            )
    if aborted:
        return found
    if answer["finish"] != "length":
        found.append(f"finished with {answer['finish']!r} where 'length' is right")
    asked = request.max_new_tokens
    lengths = {"output_ids": asked}
    if request.logprob_start is not None:
        lengths["output_logprobs"] = asked
        prompt = len(request.input_ids) - 1 - request.logprob_start
        lengths["input_logprobs"] = max(0, prompt)
    for kind, length in lengths.items():
        if len(answer[kind]) != length:
            found.append(f"{len(answer[kind])} {kind} where {length} were asked for")
    return found


_ports = itertools.count(20000 + 100 * random.randrange(100), 50)


def free_port() -> int:
    """A port nobody listens on, far from those that other servers here were given.

    The next one is free too, for NCCL. SGLang derives more from it: 10000 above, and
    with data-parallel attention 233 to 245 above. None of them meets another server's.
    """
    for port in _ports:
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue


# Servers that were started and not stopped.
_running: set["Server"] = set()


def start_all(servers: Sequence["Server"]) -> None:
    """Until all of them, coming up side by side, answer."""
    for server in servers:
        server.start()
    for server in servers:
        server.wait()


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


def kill_all() -> None:
    """SIGKILL to every process of every server here."""
    _kill([process for server in list(_running) for process in server.processes()])


class Server:
    """A server process. `folder` takes its log and the stand-ins' records."""

    def __init__(self, spec: ServerSpec, folder: Path):
        self.spec = spec
        slug = "".join(c if c.isalnum() else "-" for c in f"{spec.name}-{spec.side}")
        self.folder = Path(folder, slug)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log"
        self.process: Optional[subprocess.Popen] = None
        self.url = ""
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=512)
        self._session.mount("http://", adapter)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; several may come up side by side."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        for path in self.folder.glob("record-*.json"):
            path.unlink()
        paths = [str(self.spec.site), str(TEST), os.environ.get("PYTHONPATH", "")]
        command = [
            sys.executable,
            *("-m", "mla_standin.launch_server"),
            *("--model-path", str(self.spec.model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            # SGLang's own choice may be taken by the time it listens.
            *("--nccl-port", str(port + 1)),
            *COMMON,
            *self.spec.args,
        ]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in self.spec.gpus),
            "STANDIN_RECORD": str(self.folder),
            # The session keeps connections: none may close as a request comes in.
            "SGLANG_TIMEOUT_KEEP_ALIVE": "3600",
            **self.spec.env,
        }
        with open(self.log, "a") as log:
            log.write(f"{' '.join(command)}\n{dict(self.spec.env)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.folder,
                start_new_session=True,
            )
        _running.add(self)

    def _tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def wait(self, seconds: float = 420) -> None:
        """Until the server answers; raises with the end of its log if it ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.spec.name} ended:\n{self._tail()}")
            try:
                if self.get("/health_generate", timeout=20).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.3)
        raise TimeoutError(f"{self.spec.name}: not up in {seconds} s:\n{self._tail()}")

    def get(self, path: str, timeout: float = 60) -> requests.Response:
        return self._session.get(self.url + path, timeout=timeout)

    def post(self, path: str, json: Any = None, timeout: float = 600):
        return self._session.post(self.url + path, json=json, timeout=timeout)

    def generate(self, request: Request) -> Answer:
        started = time.monotonic()
        try:
            response = self.post("/generate", request.body())
            seconds = time.monotonic() - started
            if response.status_code != 200:
                error = f"{response.status_code}: {response.text[:500]}"
                return Answer(seconds=seconds, error=error)
            return Answer.read(request, response.json(), seconds)
        except (requests.RequestException, ValueError) as e:
            error = f"{type(e).__name__}: {e}"
            return Answer(seconds=time.monotonic() - started, error=error)

    def submit(
        self, requests: Sequence[Request], concurrency: int = 64
    ) -> list["Future[Answer]"]:
        pool = ThreadPoolExecutor(concurrency)
        try:
            return [pool.submit(self.generate, request) for request in requests]
        finally:
            pool.shutdown(wait=False)

    def generate_all(
        self, requests: Sequence[Request], concurrency: int = 64
    ) -> list[Answer]:
        return [future.result() for future in self.submit(requests, concurrency)]

    def flush_cache(self) -> None:
        response = self.post("/flush_cache?timeout=30")
        if response.status_code != 200:
            raise RuntimeError(f"{self.spec.name}: {response.text}")

    def abort(self, rid: Optional[str] = None) -> None:
        """Abort one request, or all."""
        self.post("/abort_request", {"rid": rid or "", "abort_all": rid is None})

    def pool_tokens(self) -> dict[str, int]:
        """Tokens of the KV pool: "total" and "used" (cached prefixes aside), over all
        data-parallel ranks."""
        loads = self.get("/v1/loads?include=core").json()["loads"]
        return {
            "total": sum(load["max_total_num_tokens"] for load in loads),
            "used": sum(load["num_used_tokens"] for load in loads),
            "requests": sum(
                load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads
            ),
        }

    def processes(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def worker_pids(self) -> list[int]:
        """The schedulers, which hold the model."""
        pids = []
        for process in self.processes():
            try:
                if "scheduler" in " ".join(process.cmdline()):
                    pids.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return pids

    def gpu_memory(self) -> int:
        """Bytes of GPU memory that this server's processes hold."""
        query = [
            "--query-compute-apps=pid,used_memory",
            "--format=csv,noheader,nounits",
        ]
        lines = subprocess.check_output(["nvidia-smi", *query], text=True).splitlines()
        mine = {process.pid for process in self.processes()}
        used = dict(line.split(", ") for line in lines if ", " in line)
        return sum(int(mib) << 20 for pid, mib in used.items() if int(pid) in mine)

    def record(self) -> dict[str, Any]:
        """The stand-ins' records of all processes, added up."""
        if self.alive():
            # What the last half second left unwritten goes with another call, to each
            # of two data-parallel ranks in turn.
            time.sleep(1.2 * RECORD_EVERY)
            for _ in range(2):
                self.get("/health_generate")
        merged: dict[str, Any] = {
            "calls": {},
            "nan": {},
            "compiled": [],
            "late_compiles": [],
        }
        for path in sorted(self.folder.glob("record-*.json")):
            content = json.loads(path.read_text())
            for call in content["calls"]:
                count, tokens = call.pop("count"), call.pop("tokens")
                known = merged["calls"].setdefault(tuple(call.items()), [0, 0])
                known[0] += count
                known[1] += tokens
            for kind, n in content["nan"].items():
                merged["nan"][kind] = merged["nan"].get(kind, 0) + n
            merged["compiled"] += content["compiled"]
            merged["late_compiles"] += content["late_compiles"]
        merged["calls"] = [
            {**dict(call), "count": count, "tokens": tokens}
            for call, (count, tokens) in merged["calls"].items()
        ]
        return merged

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self, pid: Optional[int] = None) -> None:
        """SIGKILL one process of the server, or all."""
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            return
        _kill(self.processes())

    def stop(self) -> None:
        if self.process is None:
            return
        processes = self.processes()
        self.process.terminate()
        psutil.wait_procs(processes, timeout=2)
        _kill(processes)
        self.process.wait(timeout=30)
        _running.discard(self)
