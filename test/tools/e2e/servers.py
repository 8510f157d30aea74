"""Starts, asks and ends real SGLang servers, those of SM100 backends on the stand-ins of
`mla_standin`.

SGLang's own `popen_launch_server` runs the program `sglang` of PATH and waits for it;
these servers import one of two trees, run another main module and come up side by side.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
    *("--sampling-backend", "pytorch"),
    *("--max-total-tokens", "65536"),
    *("--mem-fraction-static", "0.85"),
    *("--random-seed", "0"),
    *("--log-level", "info"),
)
# What SGLang calls an abort that was asked for, of a request that ran or waited.
ABORTED = ("Aborted", "Abort in waiting queue")


@dataclass
class Request:
    """One greedy request. `logprob_start` None asks for no log-probabilities, n for
    those of the output and of the prompt's tokens from n + 1 on."""

    input_ids: list[int]
    max_new_tokens: int = 1
    logprob_start: Optional[int] = None
    rid: Optional[str] = None

    def body(self) -> dict[str, Any]:
        sampling = {
            "temperature": 0.0,
            "max_new_tokens": self.max_new_tokens,
            "ignore_eos": True,
        }
        body = {"input_ids": self.input_ids, "sampling_params": sampling}
        if self.logprob_start is not None:
            body |= {"return_logprob": True, "logprob_start_len": self.logprob_start}
        return body if self.rid is None else {**body, "rid": self.rid}


@dataclass
class Answer:
    """Entry i of `input_logprobs` is
    log p(input_ids[logprob_start + 1 + i] | everything before it)."""

    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    retractions: int = 0
    finish: str = ""
    seconds: float = 0.0
    error: Optional[str] = None

    @classmethod
    def read(cls, request: Request, body: Mapping[str, Any]) -> "Answer":
        meta = body["meta_info"]
        reason = meta.get("finish_reason") or {}
        answer = cls(
            output_ids=list(body.get("output_ids") or []),
            cached_tokens=meta.get("cached_tokens", 0),
            retractions=meta.get("num_retractions", 0),
            finish=reason.get("type", ""),
        )
        message = reason.get("message")
        if answer.finish == "abort" and message not in (None, *ABORTED):
            answer.error = str(message)
        if request.rid is not None and meta.get("id") != request.rid:
            answer.error = f"the answer is to {meta.get('id')!r}"
        if request.logprob_start is not None:
            outputs = meta.get("output_token_logprobs") or []
            answer.output_logprobs = [x[0] for x in outputs]
            if answer.finish != "abort":  # which may have some of the prompt's only
                inputs = meta.get("input_token_logprobs") or []
                answer.input_logprobs = [x[0] for x in inputs[1:]]
        return answer


def faults(request: Request, answer: Answer, may_abort: bool = False) -> list[str]:
    """What is wrong with an answer. An aborted one may be short, but not wrong."""
    if answer.error is not None:
        return [f"error: {' '.join(answer.error.split())[:300]}"]
    found = []
    for kind in ("output_logprobs", "input_logprobs"):
        # NaN and infinity arrive as null: JSON has neither.
        values = [math.nan if x is None else x for x in getattr(answer, kind)]
        bad = [i for i, x in enumerate(values) if not -math.inf < x <= 1e-3]
        if bad:
            found.append(
                f"{len(bad)} of {len(values)} {kind} are NaN, infinite or positive, "
                f"the first at {bad[0]}"
            )
    if answer.finish == "abort" and may_abort:
        return found
    if answer.finish != "length":
        found.append(f"finished by {answer.finish!r}, not by its length")
    lengths = {"output_ids": request.max_new_tokens}
    if request.logprob_start is not None:
        lengths["output_logprobs"] = request.max_new_tokens
        lengths["input_logprobs"] = len(request.input_ids) - 1 - request.logprob_start
    for kind, length in lengths.items():
        if len(getattr(answer, kind)) != length:
            found.append(f"{len(getattr(answer, kind))} {kind}, not {length}")
    return found


_ports = itertools.count(20000 + 100 * random.randrange(100), 50)


def free_port() -> int:
    """A port nobody listens on, nor on the next, which is for NCCL.

    SGLang derives more from it: 10000 above, and with data-parallel attention 233 to
    245 above. None of them meets another server's.
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


def kill_all() -> None:
    """SIGKILL to every process of every server here."""
    _kill([process for server in list(_running) for process in server.processes()])


def leave_no_server(signum: int, frame: Any) -> None:
    """Handles a signal that ends the suite."""
    kill_all()
    os._exit(128 + signum)


def _session(pid: int) -> Optional[int]:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _kill(processes: Sequence[psutil.Process]) -> None:
    killed = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                killed.append(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(killed, timeout=30)


class Server:
    """One server process. `site` is the folder of the SGLang that it imports; `folder`,
    which names it, takes its log and the records of stand-ins, where it runs on them.
    """

    def __init__(
        self,
        folder: Path,
        site: Path,
        model: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] = {},
        gpus: Sequence[int] = (0,),
        standin: bool = True,
    ):
        self.name = folder.name
        self.standin = standin
        self.folder, self.site, self.model = folder, site, model
        self.args, self.env, self.gpus = args, env, gpus
        self.log, self.cwd = folder / "log", folder
        self.process: Optional[subprocess.Popen] = None
        self.url = ""
        folder.mkdir(parents=True, exist_ok=True)
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=512)
        self._session.mount("http://", adapter)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def command(self, port: int) -> list[str]:
        package = "mla_standin" if self.standin else "sglang"
        return [
            *(sys.executable, "-m", f"{package}.launch_server"),
            *("--model-path", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            # SGLang's own choice may be taken by the time it listens.
            *("--nccl-port", str(port + 1)),
            *COMMON,
            *self.args,
        ]

    def environment(self) -> dict[str, str]:
        paths = [str(self.site), str(TEST), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus)),
            "STANDIN_RECORD": str(self.folder),
            # The session keeps connections: none may close as a request comes in.
            "SGLANG_TIMEOUT_KEEP_ALIVE": "3600",
            **self.env,
        }

    def start(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = self.command(port)
        with open(self.log, "a") as log:
            log.write(f"{' '.join(command)}\n{dict(self.env)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=self.environment(),
                cwd=self.cwd,
                start_new_session=True,
            )
        _running.add(self)

    def wait(self, seconds: float = 420) -> None:
        """Until the server answers; raises with the end of its log if it does not."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            try:
                if self.get("/health_generate", timeout=20).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.3)
        what = f"not up in {seconds} s" if self.alive() else "ended"
        raise RuntimeError(f"{self.name} {what}:\n{self.end_of_log()}")

    def get(self, path: str, timeout: float = 60) -> requests.Response:
        return self._session.get(self.url + path, timeout=timeout)

    def post(self, path: str, json: Any = None, timeout: float = 300):
        return self._session.post(self.url + path, json=json, timeout=timeout)

    def generate(self, request: Request, timeout: float = 300) -> Answer:
        """Never raises: what went wrong is the answer's `error`."""
        started = time.monotonic()
        try:
            response = self.post("/generate", request.body(), timeout)
            if response.status_code == 200:
                answer = Answer.read(request, response.json())
            else:
                answer = Answer(error=f"{response.status_code}: {response.text[:500]}")
        except (requests.RequestException, ValueError) as e:
            answer = Answer(error=f"{type(e).__name__}: {e}")
        answer.seconds = time.monotonic() - started
        return answer

    def generate_all(
        self, requests: Sequence[Request], concurrency: int = 64
    ) -> list[Answer]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(self.generate, requests))

    def flush_cache(self) -> None:
        """Once the server is idle."""
        self.post("/flush_cache?timeout=30").raise_for_status()

    def abort(self, rid: str) -> None:
        self.post("/abort_request", {"rid": rid, "abort_all": False})

    def pool(self) -> dict[str, int]:
        """Tokens of the KV pool, "total" and "used" (cached prefixes aside), and
        "requests" that run or wait."""
        loads = self.get("/v1/loads?include=core").json()["loads"]
        counts = {
            "total": ("max_total_num_tokens",),
            "used": ("num_used_tokens",),
            "requests": ("num_running_reqs", "num_waiting_reqs"),
        }
        return {
            name: sum(load[key] for load in loads for key in keys)
            for name, keys in counts.items()
        }

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Its process and those that come from it, also those that have outlived it."""
        found = {
            p for p in psutil.process_iter() if _session(p.pid) == self.process.pid
        }
        try:
            parent = psutil.Process(self.process.pid)
            found |= {parent, *parent.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
        return sorted(found, key=lambda process: process.pid != self.process.pid)

    def schedulers(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        return [p for p in self.processes() if "scheduler" in " ".join(p.cmdline())]

    def gpu_memory(self) -> int:
        """Bytes of GPU memory that this server's processes hold."""
        query = "--query-compute-apps=pid,used_memory"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        lines = subprocess.check_output(command, text=True).splitlines()
        mine = {process.pid for process in self.processes()}
        used = [line.split(", ") for line in lines if ", " in line]
        return sum(int(mib) << 20 for pid, mib in used if int(pid) in mine)

    def log_since(self, start: int) -> str:
        with open(self.log, "rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def end_of_log(self) -> str:
        return self.log_since(0)[-3000:]

    def record(self) -> dict[str, Any]:
        """The stand-ins' records of all processes: lists joined, NaN added up."""
        if self.alive():
            # What the last half second left unwritten goes with another call, to each
            # of two data-parallel ranks in turn.
            time.sleep(1.2 * RECORD_EVERY)
            for _ in range(2):
                self.get("/health_generate")
        merged: dict[str, Any] = {"calls": [], "nan": 0, "late_compiles": []}
        for path in sorted(self.folder.glob("record-*.json")):
            content = json.loads(path.read_text())
            merged["calls"] += content["calls"]
            merged["nan"] += sum(content["nan"].values())
            merged["late_compiles"] += content["late_compiles"]
        return merged

    def stop(self) -> None:
        if self.process is None:
            return
        processes = self.processes()
        self.process.terminate()
        psutil.wait_procs(processes, timeout=2)
        _kill(processes)
        self.process.wait(timeout=30)
        for _ in range(3):
            _kill(self.processes())  # what those have started meanwhile
        _running.discard(self)
