"""Load and faults: what a server does under pressure, against what it does in quiet.

Every function drives one `Server` and returns a JSON-able dict whose `problems` is
empty when it passed. A problem names its request by the rid that `workload` gave it,
`load-<seed>-<index>`; `workload(n, seed, vocab)[index]` makes that request again.
"""

import contextlib
import math
import os
import queue
import random
import re
import statistics
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import psutil
from e2e.servers import Answer, Request, faults, is_logprob

# For a server that must retract: 64 pages, and a scheduler that reserves room for
# few of the tokens that a request will still generate. The pool fits in one prefill
# chunk, since SGLang does not look for room before the later chunks of a prompt.
RETRACTION_ARGS = (
    "--max-total-tokens",
    "4096",
    "--chunked-prefill-size",
    "4096",
    "--schedule-conservativeness",
    "0.1",
)
RETRACTION_ENV = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}

LOG_FAULT = re.compile(
    r"Traceback \(most recent call last\)"
    r"|\b\w*(?:Error|ERROR|Exception)\b"
    r"|(?i:\bnan\b|memory leak|illegal memory access)"
)
FATES = ("in_queue", "in_prefill", "in_decode", "too_late", "lost")
RETRACTED = re.compile(r"KV cache pool is full\. Retract.*#retracted_reqs: (\d+)")

MIB = 1 << 20
MOST_PROBLEMS = 40


def workload(n: int, seed: int, vocab: int) -> list[Request]:
    """`n` requests of about 600 tokens on average and 3000 at most.

    Nine in ten belong to a family that shares a prefix; few families are popular and
    many are rare. One in twenty repeats an earlier prompt word for word. Half ask for
    the log-probabilities of their output, one in twenty for those of the prompt too.
    """
    rng = random.Random(f"load {seed}")

    def tokens(count):
        return [rng.randrange(vocab) for _ in range(count)]

    # Golden-ratio steps spread long and short prefixes evenly over the popular
    # families, so that the total hardly depends on the seed.
    quantiles = [(0.75 + 0.618034 * rank) % 1.0 for rank in range(max(1, n // 20))]
    prefixes = [tokens(int(16 * 150**quantile)) for quantile in quantiles]
    popularity = [1 / (rank + 1) for rank in range(len(prefixes))]

    requests = []
    for index in range(n):
        draw = rng.random()
        if index and draw < 0.05:
            prompt = rng.choice(requests).input_ids
        elif draw < 0.15:
            prompt = tokens(int(3000 ** rng.random()))
        else:
            (prefix,) = rng.choices(prefixes, popularity)
            prompt = prefix + tokens(int(600 ** rng.random()))
        draw = rng.random()
        start = 0 if draw < 0.05 else len(prompt) - 1 if draw < 0.5 else None
        requests.append(
            Request(
                input_ids=list(prompt),
                max_new_tokens=rng.randint(1, 16),
                logprob_start=start,
                rid=f"load-{seed}-{index:06d}",
            )
        )
    return requests


def storm(
    server,
    requests: Sequence[Request],
    concurrency: int = 200,
    seed: int = 0,
    abort_share: float = 0.05,
    flushes: int = 4,
    patience: float = 180.0,
) -> dict:
    """All requests at high concurrency, with aborts and cache flushes in between.

    The requests come in `flushes` + 1 waves. Within a wave a flush is tried, which
    SGLang refuses while requests run; after each wave but the last the server drains,
    the pool is counted, since a flush would hide a leak, and the cache is flushed. A
    server that gives no answer for `patience` seconds is taken to have lost those
    that are missing.
    """
    problems = _Problems()
    rng = random.Random(f"storm {seed}")
    began = time.monotonic()
    aborts = _StormAborts(server, requests, abort_share, rng)
    sent = _with_run(requests, "storm")
    answers = [None] * len(requests)
    tally = {"at_lulls": 0, "refused": 0, "done_under_load": 0}

    pool = _empty_pool(server, problems, "before the storm")

    def flush_under_load():
        status = server.post("/flush_cache").status_code
        if status == 200:
            tally["done_under_load"] += 1
        elif status == 400:
            tally["refused"] += 1
        else:
            problems.add(f"a cache flush under load was answered with {status}")

    waves = np.array_split(np.arange(len(requests)), flushes + 1)
    for number, wave in enumerate(waves):
        if not len(wave):
            continue
        drive = _Drive(server, [sent[i] for i in wave], concurrency)
        drive.around = lambda k, rid, send, wave=wave: aborts.around(wave[k], rid, send)
        if flushes:
            drive.after[len(wave) // 2] = flush_under_load
        for i, answer in zip(wave, drive.run(patience)):
            answers[i] = answer
        problems.extend(drive.problems)
        if not server.alive():
            problems.add(f"the server is down in wave {number + 1} of {flushes + 1}")
            break
        if number < flushes:
            where = f"after wave {number + 1} of {flushes + 1}"
            _drain_to(pool, server, problems, where)
            tally["at_lulls"] += _flush(server, problems, where)

    fates = dict.fromkeys(FATES, 0)
    complete = 0
    for i, (request, answer) in enumerate(zip(requests, answers)):
        asked = i in aborts.chosen
        complete += _check(problems, request, i, answer, may_abort=asked)
        if asked:
            fates[_fate(answer)] += 1
    if aborts.chosen and not sum(fates[fate] for fate in FATES[:3]):
        problems.add(
            f"none of {len(aborts.chosen)} aborts took effect: the storm is too small "
            "or too short to test them; use more requests or a larger abort_share"
        )
    problems.extend(aborts.problems)
    seconds = time.monotonic() - began
    return {
        "requests": len(requests),
        "complete": complete,
        "aborts": {"asked": len(aborts.chosen), "sent": aborts.sent, **fates},
        "flushes": tally,
        "prompt_tokens": sum(len(r.input_ids) for r in requests),
        "cached_tokens": sum(a["cached_tokens"] for a in answers if a),
        "output_tokens": sum(len(a["output_ids"]) for a in answers if a),
        "seconds": round(seconds, 3),
        "seed": seed,
        "indices": list(range(len(requests))),
        "answers": answers,
        "problems": problems.listed(),
    }


def abort_prefills(
    server,
    vocab: int,
    tokens: int = 8192,
    times: int = 16,
    seed: int = 0,
    patience: float = 60.0,
) -> dict:
    """Prompts of several chunks aborted at a random part of their prefill, each with
    four short requests behind it that must be answered in full.

    A storm's aborts find their requests in the queue; here little is queued. What the
    prefill takes is measured first, and again with each abort that came too late.
    """
    problems = _Problems()
    rng = random.Random(f"prefills {seed}")

    def request(index, length):
        return Request(
            input_ids=[rng.randrange(vocab) for _ in range(length)],
            max_new_tokens=4,
            logprob_start=length - 1,
            rid=f"prefill-{seed}-{index:06d}",
        )

    began = time.monotonic()
    pool = _empty_pool(server, problems, "before the aborted prefills")
    taken = math.inf
    for index in range(3):
        alone = request(index, tokens)
        answer = _generate(server, _with_run([alone], "alone")[0])
        taken = min(taken, answer["seconds"])
        _check(problems, alone, index, answer)
    fates, sent, asked = dict.fromkeys(FATES, 0), 0, 0
    for index in range(10, 10 + 10 * times, 10):
        if not server.alive():
            problems.add("the server is down")
            break
        requests = [request(index, tokens)]
        requests += [request(index + k, rng.randint(1, 300)) for k in range(1, 5)]
        aborts = _Aborts(server, {0: rng.uniform(0.1, 0.9) * taken})
        drive = _Drive(server, _with_run(requests, "abort"), len(requests))
        drive.around = aborts.around
        answers = drive.run(patience)
        problems.extend(drive.problems + aborts.problems)
        for k, (one, answer) in enumerate(zip(requests, answers)):
            _check(problems, one, index + k, answer, may_abort=k == 0)
        asked, sent = asked + 1, sent + aborts.sent
        fate = _fate(answers[0])
        fates[fate] += 1
        if fate == "too_late":
            taken = min(taken, answers[0]["seconds"])
        _drain_to(pool, server, problems, f"after {requests[0].rid}")
    if not fates["in_prefill"]:
        problems.add(
            f"none of {asked} aborts found its request in prefill: {fates}; the "
            "prompts are too short for this GPU"
        )
    return {
        "requests": 5 * asked,
        "tokens": tokens,
        "aborts": {"asked": asked, "sent": sent, **fates},
        "prefill_seconds": round(taken, 3),
        "seconds": round(time.monotonic() - began, 3),
        "seed": seed,
        "problems": problems.listed(),
    }


def quiet(
    server, requests: Sequence[Request], sample: int | None = 150, seed: int = 0
) -> dict:
    """`sample` of the requests (None: all) one at a time, each on a flushed cache, so
    that an answer depends on its request alone."""
    problems = _Problems()
    indices = list(range(len(requests)))
    if sample is not None and sample < len(indices):
        indices = sorted(random.Random(f"quiet {seed}").sample(indices, sample))
    sent = _with_run([requests[i] for i in indices], "quiet")
    answers = []
    began = time.monotonic()
    for i, request in zip(indices, sent):
        _flush(server, problems, f"before {_name(requests[i], i)}")
        answers.append(_generate(server, request))
        _check(problems, requests[i], i, answers[-1])
    return {
        "requests": len(indices),
        "seconds": round(time.monotonic() - began, 3),
        "seed": seed,
        "indices": indices,
        "answers": answers,
        "problems": problems.listed(),
    }


def compare_answers(
    storm: dict,
    quiet: dict,
    reference: dict | None = None,
    floor: float = 0.01,
    outlier: float = 3.0,
) -> dict:
    """How far answers under load are from those in quiet.

    Greedy outputs may differ, since the shape of a batch changes how its matrix
    products are rounded. `reference` is this function's result on the unpatched
    server, for the same requests. Against it:
    - the mean difference of the first token's log-probability may not be larger, in
      a one-sided permutation test at 0.1%, nor may any be larger than `outlier` times
      the reference's largest; differences below `floor` always pass;
    - the share of identical outputs may not be lower by more than three standard
      errors of the difference of two shares.
    """
    problems = _Problems()
    loaded = dict(zip(storm["indices"], storm["answers"]))
    compared, identical, differences = 0, 0, {}
    for i, alone in zip(quiet["indices"], quiet["answers"]):
        under_load = loaded.get(i)
        if not _finished(alone) or not _finished(under_load):
            continue
        compared += 1
        identical += alone["output_ids"] == under_load["output_ids"]
        if not alone["output_logprobs"] or not under_load["output_logprobs"]:
            continue
        first, first_alone = (a["output_logprobs"][0] for a in (under_load, alone))
        if not is_logprob(first) or not is_logprob(first_alone):
            problems.add(
                f"request {i}: the first token's log-probability is {first} under load "
                f"and {first_alone} in quiet"
            )
            continue
        differences[i] = abs(first - first_alone)
    if 2 * compared < len(quiet["indices"]):
        problems.add(
            f"only {compared} of {len(quiet['indices'])} requests finished both under "
            "load and in quiet"
        )
    if compared and not differences:
        problems.add("no compared request asked for log-probabilities")

    sizes = np.array(list(differences.values()))
    result = {
        "compared": compared,
        "identical": identical,
        "share_identical": identical / compared if compared else None,
        "first_token": _spread(sizes),
        "differences": {str(i): value for i, value in differences.items()},
    }
    if reference is not None and compared and len(sizes):
        result |= _against(reference, result, problems, floor, outlier)
    result["problems"] = problems.listed()
    return result


def gpu_used(gpus: Sequence[int]) -> int:
    """Bytes in use on these GPUs, by whomever."""
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    which = ["-i", ",".join(map(str, gpus))]
    lines = subprocess.check_output(["nvidia-smi", *query, *which], text=True)
    return sum(int(line) * MIB for line in lines.split())


def snapshot(server, gpu_used: Callable[[Sequence[int]], int] = gpu_used) -> dict:
    """What `leaks` compares with: taken of a drained and flushed server, after a first
    storm has warmed it up."""
    problems = _Problems()
    return {
        "pool": _empty_pool(server, problems, "for the snapshot"),
        "memory": _memory(server, gpu_used),
        "log": log_size(server),
        "problems": problems.listed(),
    }


def leaks(
    server,
    before: dict,
    tolerance: int = 64 * MIB,
    gpu_used: Callable[[Sequence[int]], int] = gpu_used,
) -> dict:
    """Nothing is left of a storm: no request, no pool token, no GPU memory beyond
    `tolerance` bytes, and no fault in what the log has gained since `before`.

    GPU memory is that of the server's processes, or of the whole GPU where the driver
    does not tell processes apart, as in some containers.
    """
    problems = _Problems()
    problems.extend(before["problems"])
    result = {}
    with problems.catching("looking for leaks"):
        status = server.get("/health_generate").status_code
        if status != 200:
            problems.add(f"/health_generate answers with {status}")
        _drain_to(before["pool"], server, problems, "after the storm")
        _flush(server, problems, "after the storm")
        pool = _pool(server, problems, "after the last flush")
        _same_pool(before["pool"], pool, problems, "after the last flush")
        memory = _memory(server, gpu_used)
        result |= {"pool": pool, "memory": memory, "memory_before": before["memory"]}
        known = [x for x in memory if min(memory[x], before["memory"][x]) > 0]
        whose = result["memory_of"] = known[0] if known else None
        if whose is None:
            problems.add("no figure of the GPU's memory: cannot tell a leak")
        elif memory[whose] - before["memory"][whose] > tolerance:
            problems.add(
                f"GPU memory of the {whose} grew from "
                f"{before['memory'][whose] / MIB:.0f} MiB to "
                f"{memory[whose] / MIB:.0f} MiB, by more than "
                f"{tolerance / MIB:.0f} MiB"
            )
    if not server.alive():
        problems.add("the server is down")
    faulty = log_faults(server, before["log"])
    result["log_faults"] = len(faulty)
    problems.extend(f"log: {line}" for line in faulty)
    result["problems"] = problems.listed()
    return result


def retractions(
    server, seed: int = 0, vocab: int = 4096, patience: float = 180.0
) -> dict:
    """Requests whose outputs outgrow the pool: SGLang must retract some of them while
    they decode, and every one must come back complete.

    For a server started with RETRACTION_ARGS and RETRACTION_ENV. Each request alone
    fits in an eighth of the pool; together they need three times the pool.
    """
    total = server.pool_tokens()["total"]
    if not 1024 <= total <= 16384:
        raise ValueError(
            f"the KV pool has {total} tokens; this test needs 1024 to 16384 for "
            "requests to outgrow it in seconds: start the server with RETRACTION_ARGS "
            "and RETRACTION_ENV"
        )
    problems = _Problems()
    rng = random.Random(f"retractions {seed}")
    requests, tokens = [], 0
    while tokens < 3 * total:
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(32, total // 32))]
        requests.append(
            Request(
                input_ids=prompt,
                max_new_tokens=rng.randint(total // 32, total // 14),
                logprob_start=len(prompt) - 1 if rng.random() < 0.5 else None,
                rid=f"retract-{seed}-{len(requests):06d}",
            )
        )
        tokens += len(prompt) + requests[-1].max_new_tokens

    began, start = time.monotonic(), log_size(server)
    pool = _empty_pool(server, problems, "before the retractions")
    drive = _Drive(server, _with_run(requests, "run"), len(requests))
    answers = drive.run(patience)
    problems.extend(drive.problems)
    complete = 0
    for i, (request, answer) in enumerate(zip(requests, answers)):
        complete += _check(problems, request, i, answer)
    _drain_to(pool, server, problems, "after the retractions")
    problems.extend(f"log: {line}" for line in log_faults(server, start))
    events = [int(count) for count in RETRACTED.findall(_log(server, start))]
    if not sum(events):
        problems.add(
            f"no request was retracted, though {len(requests)} requests asked for "
            f"{tokens} tokens of a pool of {total}: was the server started with "
            "RETRACTION_ARGS and RETRACTION_ENV?"
        )
    return {
        "requests": len(requests),
        "complete": complete,
        "pool": pool,
        "tokens_asked": tokens,
        "retractions": len(events),
        "requests_retracted": sum(events),
        "seconds": round(time.monotonic() - began, 3),
        "seed": seed,
        "indices": list(range(len(requests))),
        "answers": answers,
        "problems": problems.listed(),
    }


def kill_worker(
    server,
    requests: Sequence[Request],
    start: Callable[[], object],
    sample: int = 8,
    seed: int = 0,
    concurrency: int = 64,
    down_within: float = 60.0,
    gpu_used: Callable[[Sequence[int]], int] = gpu_used,
) -> dict:
    """SIGKILL to a scheduler while it runs a batch; SGLang's watchdog must take the
    whole server down, and a fresh one must answer as the old one did, bit for bit.

    `start` makes, starts and returns the fresh `Server` once it is healthy; the caller
    stops it. Requests whose answer one server does not give twice alike are left out
    of the comparison. Nothing else may start or stop on the GPU meanwhile: what the
    server held must be free before the fresh one starts.
    """
    problems = _Problems()
    before = quiet(server, requests, sample, seed)
    again = quiet(server, requests, sample, seed)
    problems.extend(before["problems"] + again["problems"])
    stable = [_same_answer(a, b) for a, b in zip(before["answers"], again["answers"])]
    if not any(stable):
        problems.add("no request was answered twice alike before the kill")

    processes, workers = server.processes(), server.worker_pids()
    memory = _memory(server, gpu_used)
    if not workers:
        problems.add("the server names no worker process to kill")
        return {"requests": len(requests), "problems": problems.listed()}
    victim = psutil.Process(workers[0])
    victim_title = _title(victim)

    drive = _Drive(server, _with_run(requests, "kill"), concurrency)
    drive.start()
    running = _until(lambda: _requests_held(server)[0] > 0 and drive.answered, 60, 0.02)
    killed = time.monotonic()
    server.kill(victim.pid)
    if not running:
        problems.add("no batch was running within 60 s: the kill hit an idle server")
    down = _until(lambda: not server.alive(), down_within, 0.1)
    seconds_down = time.monotonic() - killed
    if not down:
        problems.add(
            f"the server is still up {down_within:g} s after SIGKILL to its worker "
            f"{victim.pid} ({victim_title})"
        )
        server.kill()
    answers = drive.finish(30)
    complete = 0
    for i, (request, answer) in enumerate(zip(requests, answers)):
        if answer is None:
            problems.add(f"{_name(request, i)}: hangs after the kill")
        elif answer["error"] is None:
            complete += 1
            for fault in faults(request, answer):
                problems.add(f"{_name(request, i)}: {fault}, and no error, at the kill")
    if complete == len(requests):
        problems.add("every request was answered: the kill came too late to test it")

    if not _until(lambda: not any(map(_lives, processes)), 30, 0.1):
        left = [f"{p.pid} ({_title(p)})" for p in processes if _lives(p)]
        problems.add(f"processes outlive the server: {', '.join(left)}")

    def freed_on_gpu():
        return memory["whole GPU"] - _memory(server, gpu_used)["whole GPU"]

    # A CUDA context and the weights take this much at least.
    held = memory["server"] or 320 * MIB
    _until(lambda: freed_on_gpu() >= held - 64 * MIB, 10, 0.2)
    freed = freed_on_gpu()
    if freed < held - 64 * MIB:
        problems.add(
            f"the server's end freed {freed / MIB:.0f} MiB on the GPU, where it had "
            f"held {held / MIB:.0f} MiB at least"
        )
    server.stop()

    result = {
        "requests": len(requests),
        "killed": victim_title,
        "complete_before_kill": complete,
        "failed_by_kill": sum(
            a is not None and a["error"] is not None for a in answers
        ),
        "seconds_until_down": round(seconds_down, 3),
        "gpu_memory_before": memory,
        "gpu_memory_freed": freed,
        "compared": sum(stable),
        "seed": seed,
    }
    with problems.catching("starting a fresh server"):
        after = quiet(start(), requests, sample, seed)
        problems.extend(after["problems"])
        equal = 0
        rows = zip(before["indices"], before["answers"], after["answers"], stable)
        for i, old, new, comparable in rows:
            if comparable and not _same_answer(old, new):
                problems.add(
                    f"{_name(requests[i], i)}: the fresh server answers otherwise than "
                    "the killed one did"
                )
            equal += comparable and _same_answer(old, new)
        result["equal_after_restart"] = equal
    result["problems"] = problems.listed()
    return result


def summary(result: dict) -> dict:
    """The result without the lists that only `compare_answers` reads."""
    bulk = ("answers", "indices", "differences")
    return {key: value for key, value in result.items() if key not in bulk}


def log_size(server) -> int:
    return os.path.getsize(server.log) if os.path.exists(server.log) else 0


def log_faults(server, start: int) -> list[str]:
    """Lines from byte `start` of the log on that tell of a fault."""
    lines = _log(server, start).splitlines()
    return [line.strip()[:300] for line in lines if LOG_FAULT.search(line)]


def _log(server, start):
    with open(server.log, "rb") as log:
        log.seek(start)
        return log.read().decode(errors="replace")


class _Problems:
    """Problems in the order found; a server that died does not list 2000 of them."""

    def __init__(self):
        self._found = []
        self._lock = threading.Lock()

    def add(self, problem):
        with self._lock:
            self._found.append(problem)

    def extend(self, problems):
        for problem in problems:
            self.add(problem)

    def listed(self):
        more = len(self._found) - MOST_PROBLEMS
        tail = [f"and {more} more"] if more > 0 else []
        return self._found[:MOST_PROBLEMS] + tail

    def catching(self, doing):
        return _Catching(self, doing)


class _Catching:
    """Makes a problem of an exception: a dead server's table row is wanted too."""

    def __init__(self, problems, doing):
        self._problems, self._doing = problems, doing

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if error is None or not isinstance(error, Exception):
            return False
        self._problems.add(f"{self._doing}: {type(error).__name__}: {error}")
        return True


class _Drive:
    """Sends requests from daemon threads, so that an answer that never comes stalls
    neither the test nor the end of the process."""

    def __init__(self, server, requests, concurrency):
        self.problems = []
        # Called around each request: (index, rid, send) -> answer.
        self.around = lambda index, rid, send: send()
        # Called by the thread that gives the k-th answer.
        self.after = {}
        self.answered = 0
        self._server = server
        self._requests = requests
        self._answers = [None] * len(requests)
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._left = queue.SimpleQueue()
        for index in range(len(requests)):
            self._left.put(index)
        self._threads = min(concurrency, len(requests))

    def run(self, patience):
        self.start()
        return self.finish(patience)

    def start(self):
        for _ in range(self._threads):
            threading.Thread(target=self._work, daemon=True).start()

    def finish(self, patience):
        """All answers, once complete or once none has come for `patience` seconds."""
        with self._lock:
            while self.answered < len(self._requests):
                seen = self.answered
                self._progress.wait(patience)
                if self.answered == seen:
                    break
            # Nothing more is sent for requests that no thread has taken up.
            with contextlib.suppress(queue.Empty):
                while True:
                    self._left.get_nowait()
            missing = len(self._requests) - self.answered
            answers = list(self._answers)
        if missing and self._server.alive():
            self.problems.append(
                f"{missing} requests had no answer when none had come for "
                f"{patience:g} s"
            )
            try:
                self._server.abort(None)
            except Exception as error:
                self.problems.append(f"aborting them: {type(error).__name__}: {error}")
        return answers

    def _work(self):
        while True:
            try:
                index = self._left.get_nowait()
            except queue.Empty:
                return
            request = self._requests[index]
            answer = self.around(
                index, request.rid, lambda: _generate(self._server, request)
            )
            with self._lock:
                self._answers[index] = answer
                self.answered += 1
                then = self.after.pop(self.answered, None)
                self._progress.notify_all()
            if then is not None:
                try:
                    then()
                except Exception as error:
                    self.problems.append(f"{type(error).__name__}: {error}")


class _Aborts:
    """Aborts requests, by index, so many seconds after they are sent."""

    def __init__(self, server, after):
        self.sent = 0
        self.problems = []
        self._server = server
        self._after = after
        self._lock = threading.Lock()

    def seconds(self, index):
        return self._after.get(index)

    def around(self, index, rid, send):
        after = self.seconds(index)
        if after is None:
            return send()
        timer = threading.Timer(after, self._abort, [rid])
        timer.daemon = True
        timer.start()
        answer = send()
        timer.cancel()
        return answer

    def _abort(self, rid):
        try:
            self._server.abort(rid)
            with self._lock:
                self.sent += 1
        except Exception as error:
            self.problems.append(f"abort of {rid}: {type(error).__name__}: {error}")


class _StormAborts(_Aborts):
    """Aborts a share of the requests: half of them among the longest tenth, whose
    prefill is long; half after at most 80 ms, when little is queued before them, and
    half at a random part of the time that requests have been taking."""

    def __init__(self, server, requests, share, rng):
        super().__init__(server, {})
        count = round(share * len(requests))
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].input_ids))
        longest = order[: max(len(order) // 10, count)]
        chosen = set(rng.sample(longest, count // 2))
        others = [i for i in order if i not in chosen]
        chosen |= set(rng.sample(others, count - len(chosen)))
        self.chosen = {i: (rng.random(), rng.random() < 0.5) for i in sorted(chosen)}
        self._recent = deque([0.1], maxlen=50)

    def seconds(self, index):
        if index not in self.chosen:
            return None
        part, early = self.chosen[index]
        with self._lock:
            longest = 0.08 if early else 0.8 * statistics.median(self._recent)
        return max(0.005, part * longest)

    def around(self, index, rid, send):
        began = time.monotonic()
        answer = super().around(index, rid, send)
        if index not in self.chosen:
            with self._lock:
                self._recent.append(time.monotonic() - began)
        return answer


def _fate(answer):
    if answer is None or (answer["error"] and answer["finish"] != "abort"):
        return "lost"
    if answer["finish"] != "abort":
        return "too_late"
    # SGLang ends a request that has started with the next token that it gets.
    return FATES[min(len(answer["output_ids"]), 2)]


def _with_run(requests, kind):
    """Copies under rids of this run. All have the same length: SGLang aborts every
    request whose rid begins with the one given."""
    run = uuid.uuid4().hex[:8]
    return [
        replace(request, rid=f"{_name(request, i)}.{kind}-{run}")
        for i, request in enumerate(requests)
    ]


def _name(request, index):
    return request.rid or f"request-{index:06d}"


def _generate(server, request):
    try:
        return asdict(server.generate(request))
    except Exception as error:
        return asdict(Answer(error=f"{type(error).__name__}: {error}"))


def _finished(answer):
    return (
        answer is not None and answer["error"] is None and answer["finish"] != "abort"
    )


def _check(problems, request, index, answer, may_abort=False):
    """Whether a request came back complete; what is wrong with it is a problem."""
    found = faults(request, answer, may_abort)
    problems.extend(f"{_name(request, index)}: {fault}" for fault in found)
    return _finished(answer) and not found


def _same_answer(a, b):
    keys = ("output_ids", "output_logprobs", "input_logprobs")
    return _finished(a) and _finished(b) and all(a[key] == b[key] for key in keys)


def _spread(sizes):
    if not len(sizes):
        return None
    return {
        "n": len(sizes),
        "mean": float(sizes.mean()),
        "p95": float(np.quantile(sizes, 0.95)),
        "max": float(sizes.max()),
    }


def _against(reference, result, problems, floor, outlier):
    ours = np.array(list(result["differences"].values()))
    theirs = np.array(list(reference["differences"].values()))
    if not len(theirs) or not reference["compared"]:
        problems.add("the reference compared nothing: it cannot be compared with")
        return {}
    p = _larger_mean(ours, theirs)
    if p < 0.001 and ours.mean() > floor:
        problems.add(
            "under load the first token's log-probability moves by "
            f"{ours.mean():.4g} on average, {theirs.mean():.4g} unpatched "
            f"(p = {p:.2g} in a permutation test)"
        )
    allowed = max(floor, outlier * theirs.max())
    for i, value in result["differences"].items():
        if value > allowed:
            problems.add(
                f"request {i}: under load the first token's log-probability moves by "
                f"{value:.4g}; unpatched none moves by more than {theirs.max():.4g}"
            )
    n, m = result["compared"], reference["compared"]
    pooled = (result["identical"] + reference["identical"]) / (n + m)
    tolerance = 3 * math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    lowest = reference["share_identical"] - tolerance
    if result["share_identical"] < lowest:
        problems.add(
            f"{result['share_identical']:.1%} of the outputs under load equal those in "
            f"quiet; unpatched {reference['share_identical']:.1%}, so at least "
            f"{lowest:.1%} were expected"
        )
    return {
        "p_larger_difference": p,
        "largest_difference_allowed": float(allowed),
        "lowest_share_allowed": lowest,
    }


def _larger_mean(ours, theirs, rounds=20_000):
    """Chance of a mean difference this large if both came from one distribution."""
    rng = np.random.default_rng(0)
    both = np.concatenate([ours, theirs])
    order = rng.permuted(np.tile(both, (rounds, 1)), axis=1)
    means = order[:, : len(ours)].mean(1) - order[:, len(ours) :].mean(1)
    observed = ours.mean() - theirs.mean()
    return float((1 + (means >= observed - 1e-15).sum()) / (1 + rounds))


def _requests_held(server):
    """Requests that run and that wait, over all data-parallel ranks."""
    loads = server.get("/v1/loads?include=core").json()["loads"]
    return tuple(
        sum(load[key] for load in loads)
        for key in ("num_running_reqs", "num_waiting_reqs")
    )


def _until(condition, seconds, every):
    """Whether the condition comes true; a request that fails counts as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return True
        except Exception:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(every)


def _drain(server, problems, where, seconds=30.0):
    def settled():
        return not server.alive() or not sum(_requests_held(server))

    _until(settled, seconds, 0.05)
    with problems.catching(f"{where}, counting requests"):
        running, waiting = _requests_held(server)
        if not running + waiting:
            return True
        problems.add(f"{where}: {running} requests still run and {waiting} wait")
    return False


def _flush(server, problems, where):
    """Whether the cache was flushed; SGLang waits up to 30 s to be idle for it."""
    with problems.catching(f"{where}, flushing the cache"):
        response = server.post("/flush_cache?timeout=30")
        if response.status_code == 200:
            return True
        problems.add(
            f"{where}: the cache was not flushed: {response.status_code} "
            f"{response.text.strip()}"
        )
    return False


def _pool(server, problems, where):
    with problems.catching(f"{where}, counting pool tokens"):
        return dict(server.pool_tokens())
    return None


def _empty_pool(server, problems, where):
    """The pool's tokens of a server that was drained and flushed."""
    if _drain(server, problems, where):
        _flush(server, problems, where)
    return _pool(server, problems, where)


def _drain_to(before, server, problems, where):
    """Drain the server, and find the pool as it was before."""
    _drain(server, problems, where)
    _same_pool(before, _pool(server, problems, where), problems, where)


def _same_pool(before, now, problems, where):
    """An idle server holds no token outside the free list and the prefix cache."""
    if not before or not now:
        return
    had, has = (pool["total"] - pool["used"] for pool in (before, now))
    if had != has:
        problems.add(
            f"{where}: {has} pool tokens are available, {had} were at the start"
        )


def _memory(server, gpu_used):
    """Bytes by the server's processes and on its whole GPUs; 0 where unknown."""
    figures = {}
    for whose, read in {
        "server": server.gpu_memory,
        "whole GPU": lambda: gpu_used(server.spec.gpus),
    }.items():
        try:
            figures[whose] = read()
        except (OSError, ValueError, subprocess.CalledProcessError):
            figures[whose] = 0
    return figures


def _title(process):
    try:
        return " ".join(process.cmdline())[:80] or process.name()
    except psutil.Error:
        return "gone"


def _lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
