"""Load and faults: what a server does under pressure, against what it does when idle.

Every function drives one `Server` and returns (figures, problems). A problem names its
request by the rid that `workload` gave it; `workload(n, seed, vocab)[index]` makes that
request again.
"""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
from e2e.servers import Answer, Request, Server, faults

# For a server that must retract: 64 pages, and a scheduler that reserves room for few
# of the tokens that a request will still generate. The pool fits in one prefill chunk,
# since SGLang does not look for room before the later chunks of a prompt.
SMALL_POOL = 4096
SMALL_POOL_CASE = {
    "chunk": SMALL_POOL,
    "more": (
        *("--max-total-tokens", str(SMALL_POOL)),
        *("--schedule-conservativeness", "0.1"),
    ),
    "env": {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"},
}

LOG_FAULT = re.compile(
    r"Traceback \(most recent call last\)"
    r"|\b\w*(?:Error|ERROR|Exception)\b"
    r"|(?i:\bnan\b|memory leak|illegal memory access)"
)
# A mean over tokens: an answer under load moves by 0.05, another request's is 2 to 4 off.
WRONG = 1.0
MIB = 1 << 20
MEMORY_TOLERANCE = 64 * MIB
SETTLES_WITHIN = 20.0  # seconds
MOST_PROBLEMS = 40

Answers = list[Answer]


def workload(n: int, seed: int, vocab: int) -> list[Request]:
    """`n` requests of about 600 tokens on average and 3000 at most.

    Nine in ten belong to a family that shares a prefix; few families are popular and
    many are rare. One in twenty repeats an earlier prompt word for word. All ask for
    the log-probabilities of their output and of the last tokens of their prompt, one in
    twenty for those of all of it.
    """
    rng = random.Random(f"load {seed}")

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    prefixes = [tokens(int(16 * 150 ** rng.random())) for _ in range(max(1, n // 20))]
    popularity = [1 / (rank + 1) for rank in range(len(prefixes))]
    requests: list[Request] = []
    for index in range(n):
        draw = rng.random()
        if index and draw < 0.05:
            prompt = rng.choice(requests).input_ids
        elif draw < 0.15:
            prompt = tokens(int(3000 ** rng.random()))
        else:
            (prefix,) = rng.choices(prefixes, popularity)
            prompt = prefix + tokens(int(600 ** rng.random()))
        start = 0 if rng.random() < 0.05 else max(0, len(prompt) - 17)
        rid = f"load-{seed}-{index:06d}"
        requests.append(Request(prompt, rng.randint(1, 16), start, rid))
    return requests


def outgrowing(n: int, seed: int, vocab: int) -> list[Request]:
    """`n` requests whose outputs outgrow a pool of SMALL_POOL tokens together, though
    each alone takes an eighth of it at most."""
    rng = random.Random(f"outgrowing {seed}")
    requests = []
    for index in range(n):
        prompt = [
            rng.randrange(vocab) for _ in range(rng.randint(32, SMALL_POOL // 32))
        ]
        new = rng.randint(SMALL_POOL // 32, SMALL_POOL // 14)
        rid = f"outgrowing-{seed}-{index:06d}"
        requests.append(Request(prompt, new, len(prompt) - 1, rid))
    return requests


def storm(
    server: Server,
    requests: Sequence[Request],
    aborts: Mapping[int, float] = {},
    waves: int = 1,
    concurrency: int = 200,
) -> tuple[dict[str, Any], list[str], Answers]:
    """All requests at high concurrency, in waves; `aborts` are seconds after which
    requests, by index, are aborted. Within a wave the cache is flushed, which SGLang
    refuses while requests run; after it the pool is looked at, since a flush would hide
    a leak, and the cache is flushed."""
    began = time.monotonic()
    server.flush_cache()
    answers: Answers = []
    problems: list[str] = []
    for wave in np.array_split(np.arange(len(requests)), waves):
        sent = _send(
            server,
            [requests[i] for i in wave],
            [aborts.get(i) for i in wave],
            concurrency,
        )
        sent[len(wave) // 2].result()
        status = server.post("/flush_cache").status_code
        if status not in (200, 400):
            problems.append(f"a cache flush under load was answered with {status}")
        answers += [future.result() for future in sent]
        if not server.alive():
            problems.append("the server is down")
            break
        problems += held(server)
        server.flush_cache()
    for index, (request, answer) in enumerate(zip(requests, answers)):
        wrong = faults(request, answer, may_abort=index in aborts)
        problems += [f"{request.rid}: {fault}" for fault in wrong]
    aborted = sum(answer.finish == "abort" for answer in answers)
    if aborts and not aborted:
        problems.append(f"none of {len(aborts)} aborts took effect")
    figures = {
        "requests": len(requests),
        "complete": sum(answer.finish == "length" for answer in answers),
        "aborted": aborted,
        "flushes": waves,
        "retractions": sum(answer.retractions for answer in answers),
        "seconds": round(time.monotonic() - began, 1),
    }
    return figures, _few(problems), answers


def random_aborts(
    count: int, seed: int, share: float = 0.05, within: float = 3.0
) -> dict[int, float]:
    """Which requests a storm aborts, and after how many seconds each."""
    rng = random.Random(f"aborts {seed}")
    return {
        i: rng.uniform(0, within)
        for i in rng.sample(range(count), round(share * count))
    }


def abort_prefills(
    server: Server, vocab: int, times: int = 16, tokens: int = 8192
) -> tuple[dict[str, Any], list[str]]:
    """Prompts of several chunks aborted at a random part of their prefill, each with
    four short requests behind it that must be answered in full.

    A storm's aborts find their requests in the queue; here little is queued.
    """
    rng = random.Random("prefills")

    def request(name: str, length: int) -> Request:
        prompt = [rng.randrange(vocab) for _ in range(length)]
        return Request(prompt, 4, length - 1, f"prefill-{name}")

    lone = [server.generate(request(f"lone-{i}", tokens)) for i in range(3)]
    takes = min(answer.seconds for answer in lone)
    problems: list[str] = []
    found_in_prefill = 0
    for i in range(times):
        requests = [request(f"{i:03d}-0", tokens)]
        requests += [request(f"{i:03d}-{k}", rng.randint(2, 300)) for k in range(1, 5)]
        after = [rng.uniform(0.1, 0.9) * takes, None, None, None, None]
        answers = [future.result() for future in _send(server, requests, after, 5)]
        for k, (one, answer) in enumerate(zip(requests, answers)):
            wrong = faults(one, answer, may_abort=k == 0)
            problems += [f"{one.rid}: {fault}" for fault in wrong]
        # SGLang ends a request that has started with the next token that it gets.
        aborted = answers[0].finish == "abort"
        found_in_prefill += aborted and len(answers[0].output_ids) == 1
        problems += held(server)
    if not found_in_prefill:
        problems.append(f"none of {times} aborts found its request in prefill")
    return {"prefills": times, "aborted_in_prefill": found_in_prefill}, _few(problems)


def lone(server: Server, requests: Sequence[Request]) -> tuple[Answers, list[str]]:
    """One request at a time, each on a flushed cache, so that an answer depends on its
    request alone."""
    answers, problems = [], []
    for request in requests:
        server.flush_cache()
        answers.append(server.generate(request))
        problems += [f"{request.rid}: {x}" for x in faults(request, answers[-1])]
    return answers, _few(problems)


def compare_answers(
    requests: Sequence[Request], loaded: Sequence[Answer], alone: Sequence[Answer]
) -> tuple[dict[str, Any], list[str]]:
    """How far answers under load are from those to the same requests alone. Outputs may
    differ, since the shape of a batch changes how its matrix products are rounded."""
    problems, first_tokens, same, compared = [], [], 0, 0
    for request, a, b in zip(requests, loaded, alone):
        if faults(request, a) or faults(request, b):
            continue
        compared += 1
        same += a.output_ids == b.output_ids
        values = [[*x.input_logprobs, x.output_logprobs[0]] for x in (a, b)]
        off = np.abs(np.subtract(*values))
        first_tokens.append(off[-1])
        if not off.mean() <= WRONG:
            problems.append(
                f"{request.rid}: {off.mean():.2g} a token from the answer it gets alone"
            )
    if 2 * compared < len(requests):
        problems.append(f"only {compared} of {len(requests)} answers can be compared")
    figures: dict[str, Any] = {"compared": compared, "same": same}
    if first_tokens:
        figures["first_token_off"] = round(statistics.fmean(first_tokens), 5)
    return figures, _few(problems)


def held(server: Server) -> list[str]:
    """What an idle server should not hold: requests, or tokens of its pool other than
    cached prefixes."""
    deadline = time.monotonic() + SETTLES_WITHIN
    while True:
        pool = server.pool()
        kept = {name: pool[name] for name in ("requests", "used") if pool[name]}
        if not kept or time.monotonic() > deadline:
            return [f"idle, the server holds {kept}"] if kept else []
        time.sleep(0.05)


class Watch:
    """What a storm may not leave behind: memory on the GPU, faults in the log. Made of
    a server that has been warmed up. A flush gives unused memory back to the GPU."""

    def __init__(self, server: Server):
        self.server = server
        server.flush_cache()
        self.memory = server.gpu_memory()
        self.log = len(server.log_since(0).encode())

    def report(self) -> tuple[dict[str, Any], list[str]]:
        server, problems = self.server, []
        if server.get("/health_generate").status_code != 200:
            problems.append("the server is not healthy")
        held = server.pool()["used"]
        server.flush_cache()
        memory = server.gpu_memory()
        if not self.memory:
            problems.append("no figure of the server's GPU memory: cannot tell a leak")
        elif memory - self.memory > MEMORY_TOLERANCE:
            problems.append(
                f"GPU memory grew by {(memory - self.memory) / MIB:.0f} MiB"
            )
        lines = server.log_since(self.log).splitlines()
        problems += [f"log: {x.strip()[:300]}" for x in lines if LOG_FAULT.search(x)]
        figures = {
            "pool_tokens_held": held,
            "memory_growth_mib": round((memory - self.memory) / MIB),
        }
        return figures, _few(problems)


def kill_scheduler(
    server: Server,
    requests: Sequence[Request],
    start_fresh: Callable[[], Server],
    sample: int = 8,
    down_within: float = 60,
) -> tuple[dict[str, Any], list[str]]:
    """SIGKILL to a scheduler in mid-batch: SGLang must take the whole server down, and a
    fresh one must answer as the old one did, bit for bit."""
    asked = requests[:sample]
    before, problems = lone(server, asked)
    victim, processes = server.schedulers()[0], server.processes()
    sent = _send(server, requests, [None] * len(requests), 64)
    futures.wait(sent, timeout=60, return_when=futures.FIRST_COMPLETED)
    victim.kill()
    killed = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=down_within)
    seconds = time.monotonic() - killed
    if alive:
        problems.append(f"{len(alive)} processes outlive the kill by {down_within:g} s")
    server.stop()
    answers = [future.result() for future in sent]
    complete = sum(answer.error is None for answer in answers)
    if complete == len(requests):
        problems.append("every request was answered: the kill came too late to test it")
    for request, answer in zip(requests, answers):
        if answer.error is None:
            problems += [f"{request.rid}: {x}" for x in faults(request, answer)]
    after, wrong = lone(start_fresh(), asked)
    equal = sum(
        replace(a, seconds=0) == replace(b, seconds=0) for a, b in zip(before, after)
    )
    if equal < sample:
        problems.append(f"the fresh server gives {equal} of {sample} answers as before")
    figures = {
        "requests": len(requests),
        "complete": complete,
        "seconds_until_down": round(seconds, 1),
        "equal": equal,
        "compared": sample,
    }
    return figures, _few(problems + wrong)


def _send(
    server: Server,
    requests: Sequence[Request],
    aborts: Sequence[float | None],
    concurrency: int,
) -> list[futures.Future]:
    def send(request: Request, abort_after: float | None) -> Answer:
        if abort_after is None:
            return server.generate(request)
        timer = threading.Timer(abort_after, server.abort, [request.rid])
        timer.start()
        try:
            return server.generate(request)
        finally:
            timer.cancel()

    pool = futures.ThreadPoolExecutor(concurrency)
    sent = [pool.submit(send, *one) for one in zip(requests, aborts)]
    pool.shutdown(wait=False)
    return sent


def _few(problems: list[str]) -> list[str]:
    """A server that died does not list 2000 of them."""
    more = len(problems) - MOST_PROBLEMS
    return problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
