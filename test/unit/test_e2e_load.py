"""The load tests of `e2e.load` find each fault that is put into a server."""

import hashlib
import importlib.util
import itertools
import json
import math
import random
import statistics
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from e2e import load, report
from e2e.servers import ABORTED, Answer, Request, faults

VOCAB = 4096


class LoadedServer:
    """Stands in for `e2e.servers.Server`, whose processes need a GPU: answers from
    threads what SGLang would answer over HTTP, and ends as a process tree would, with
    a real child process to kill. `fault` names what is wrong with it."""

    spec = SimpleNamespace(gpus=(0,))
    slots = 12

    def __init__(self, folder, fault="", total=65536):
        self.log = folder / "log"
        self.log.write_text("ServerArgs(enable_nan_detection=False) at start\n")
        self.fault = fault
        self.total = total
        self.cached = set()
        self.leaked = 0
        self.memory = 900 * load.MIB
        self.retracted = 0
        self.live = {}
        self.running = 0
        self.most_running = 0
        self.lock = threading.Condition()
        then = "exec sleep 60" if fault == "stays up" else "kill $$"
        self.process = subprocess.Popen(
            ["sh", "-c", f"sleep 60 & echo $!; wait $!; {then}"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.worker = int(self.process.stdout.readline())

    def say(self, line):
        with open(self.log, "a") as log:
            log.write(f"[2026-11-20 10:00:00] {line}\n")

    def generate(self, request):
        with self.lock:
            assert request.rid not in self.live
            self.live[request.rid] = aborted = threading.Event()
        began = time.monotonic()
        try:
            answer = self._generate(request, aborted)
            answer.seconds = time.monotonic() - began
            return answer
        finally:
            with self.lock:
                del self.live[request.rid]
                self.lock.notify_all()

    def _generate(self, request, aborted):
        with self.lock:
            while self.running >= self.slots and not aborted.is_set():
                self.lock.wait(0.01)
            if aborted.is_set():
                return self._aborted("Abort in waiting queue", [])
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            if self.fault == "drops" and "000007" in request.rid:
                aborted.wait(20)
            # Long enough for an abort to find others.
            least = 0.02 if self.fault == "aborts others" else 0.001
            self._work(least + len(request.input_ids) * 2e-6)
            if aborted.is_set():
                if self.fault == "leaks":
                    self.leaked += 64
                return self._aborted("Aborted", [0])
            return self._answer(request)
        except ConnectionError as error:
            return Answer(error=str(error))
        finally:
            with self.lock:
                self.running -= 1
                prompt = tuple(request.input_ids[:16])
                self.cached.add(prompt)

    def _work(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ConnectionError("connection reset")
            time.sleep(min(0.005, seconds))

    def _aborted(self, message, output):
        return Answer(output_ids=output, finish="abort", error=message)

    def _answer(self, request):
        text = json.dumps(request.input_ids).encode()
        rng = random.Random(hashlib.sha256(text).digest())
        count = request.max_new_tokens
        alone = self.running == 1
        self._work(count * 2e-4)
        outputs = [rng.randrange(VOCAB) for _ in range(count)]
        logprobs = [-rng.random() for _ in range(count)]
        prompt = [-rng.random() for _ in request.input_ids]
        if not alone:
            # As the real one, whose rounding depends on the shape of the batch.
            logprobs = [p - random.random() * 0.004 for p in logprobs]
        if self.fault == "shifts" and not alone:
            logprobs = [p - 0.2 for p in logprobs]
        if self.fault == "other tokens" and not alone:
            outputs[-1] = (outputs[-1] + 1) % VOCAB
        if self.fault == "restart differs":
            outputs[0] = (outputs[0] + 1) % VOCAB
        if self.fault == "nan" and "000011" in request.rid:
            logprobs[0] = None
        if self.fault == "prompt nan" and request.logprob_start == 0:
            prompt[-1] = math.nan
        if self.fault == "short" and "000011" in request.rid:
            outputs = outputs[:-1]
        with self.lock:
            hit = tuple(request.input_ids[:16]) in self.cached
        if self.total < 20000 and self.running > 4 and self.fault != "never retracts":
            if rng.random() < 0.2:
                self.say("KV cache pool is full. Retract requests. #retracted_reqs: 2")
        answer = Answer(outputs, [], [], 64 if hit else 0, "length")
        if request.logprob_start is not None:
            answer.output_logprobs = logprobs
            answer.input_logprobs = prompt[request.logprob_start + 1 :]
        return answer

    def post(self, path, json=None, timeout=600):
        path, _, wait = path.partition("?timeout=")
        assert path == "/flush_cache"
        until = time.monotonic() + float(wait or 0)
        with self.lock:
            while self.live and time.monotonic() < until:
                self.lock.wait(0.05)
            if self.live or self.fault == "does not flush":
                return SimpleNamespace(status_code=400, text="Flush cache failed.")
            self.cached.clear()
            return SimpleNamespace(status_code=200, text="Cache flushed.")

    def get(self, path):
        if self.process.poll() is not None:
            raise ConnectionError("connection refused")
        if path == "/health_generate":
            return SimpleNamespace(status_code=503 if self.fault == "ill" else 200)
        assert path == "/v1/loads?include=core"
        with self.lock:
            held = {
                "num_running_reqs": self.running + (self.fault == "keeps running"),
                "num_waiting_reqs": len(self.live) - self.running,
            }
        return SimpleNamespace(json=lambda: {"loads": [held]})

    def abort(self, rid=None):
        with self.lock:
            for name, aborted in self.live.items():
                # SGLang takes the rid for the beginning of one.
                if rid is None or name.startswith(rid):
                    aborted.set()
                elif self.fault == "aborts others" and rid[:12] == name[:12]:
                    aborted.set()

    def pool_tokens(self):
        return {"total": self.total, "used": self.leaked}

    def gpu_memory(self):
        return self.memory if self.alive() else 0

    def gpu_used(self, gpus):
        kept = self.fault == "keeps memory"
        return 2000 * load.MIB + (self.memory if kept else self.gpu_memory())

    def worker_pids(self):
        return [self.worker]

    def processes(self):
        return [load.psutil.Process(p) for p in (self.process.pid, self.worker)]

    def alive(self):
        return self.process.poll() is None

    def kill(self, pid=None):
        if pid is not None:
            assert pid == self.worker
            load.psutil.Process(pid).kill()
            return
        self.process.kill()
        self.process.wait()

    def stop(self):
        for pid in (self.worker, self.process.pid):
            try:
                load.psutil.Process(pid).kill()
            except load.psutil.NoSuchProcess:
                pass
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def make(fault="", **kw):
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(LoadedServer(folder, fault, **kw))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


REQUESTS = load.workload(240, seed=5, vocab=VOCAB)


def small_storm(server, **kw):
    return load.storm(
        server, REQUESTS, **{"concurrency": 40, "seed": 1, "flushes": 2, **kw}
    )


def found(result, *words):
    """Some problem, and one that says all of `words`."""
    text = "\n".join(result["problems"])
    assert any(all(w in p for w in words) for p in result["problems"]), text
    return True


@pytest.mark.parametrize("seed", range(3))
def test_workload_is_what_its_docstring_says(seed):
    requests = load.workload(2000, seed, VOCAB)
    lengths = [len(r.input_ids) for r in requests]
    assert requests == load.workload(2000, seed, VOCAB)
    assert requests != load.workload(2000, seed + 1, VOCAB)
    assert 1_000_000 <= sum(lengths) <= 1_500_000
    assert min(lengths) == 1 and 2000 < max(lengths) <= 3000
    assert statistics.median(lengths) < 600
    assert {r.max_new_tokens for r in requests} == set(range(1, 17))
    assert all(0 <= t < VOCAB for r in requests[:50] for t in r.input_ids)
    starts = [r.logprob_start for r in requests]
    assert 0.4 < sum(s is not None for s in starts) / 2000 < 0.6
    heads = [tuple(r.input_ids[:16]) for r in requests]
    counts = sorted((heads.count(h) for h in set(heads)), reverse=True)
    assert counts[0] > 200 and counts.count(1) > 100
    assert len({tuple(r.input_ids) for r in requests}) < 1950


def test_rids_are_never_the_beginning_of_another():
    sent = [r.rid for r in load._with_run(REQUESTS, "storm")]
    sent += [r.rid for r in load._with_run(REQUESTS, "quiet")]
    assert not any(a != b and b.startswith(a) for a in sent for b in sent)


def test_a_sound_server_passes(serve):
    server = serve()
    assert small_storm(server)["problems"] == []
    before = load.snapshot(server, server.gpu_used)
    result = small_storm(server, seed=2)
    assert result["problems"] == []
    assert server.most_running == server.slots
    aborts, flushes = result["aborts"], result["flushes"]
    assert aborts["asked"] == 12 and aborts["lost"] == 0
    assert sum(aborts[fate] for fate in load.FATES) == 12
    assert aborts["in_queue"] + aborts["in_prefill"] > 0
    assert result["complete"] == 240 - aborts["in_queue"] - aborts["in_prefill"]
    assert flushes == {"at_lulls": 2, "refused": 3, "done_under_load": 0}
    assert result["cached_tokens"] > 0
    alone = load.quiet(server, REQUESTS, sample=60, seed=3)
    assert alone["problems"] == [] and len(alone["indices"]) == 60
    assert not any(a["cached_tokens"] for a in alone["answers"])
    spread = load.compare_answers(result, alone)
    assert spread["problems"] == [] and spread["share_identical"] == 1
    assert 0 < spread["first_token"]["max"] <= 0.004
    assert load.compare_answers(result, alone, spread)["problems"] == []
    assert load.leaks(server, before, gpu_used=server.gpu_used)["problems"] == []
    json.dumps([result, alone, spread, before], allow_nan=False)
    assert "answers" not in load.summary(result)


def test_a_nan_is_reported_with_its_request(serve):
    server = serve("nan")
    index = next(i for i, r in enumerate(REQUESTS) if r.rid.endswith("000011"))
    count = REQUESTS[index].max_new_tokens
    assert REQUESTS[index].logprob_start is not None
    result = load.storm(server, REQUESTS, 40, abort_share=0, flushes=0)
    assert len(result["problems"]) == 1
    assert found(result, "load-5-000011", f"1 of {count} output_logprobs are NaN")


def test_a_nan_in_the_prompt_is_reported(serve):
    assert found(small_storm(serve("prompt nan")), "input_logprobs are NaN")


def test_a_dropped_request_is_reported(serve):
    began = time.monotonic()
    result = small_storm(serve("drops"), patience=0.5, abort_share=0)
    assert found(result, "load-5-000007", "no answer")
    assert found(result, "1 requests had no answer")
    assert time.monotonic() - began < 15


def test_a_short_answer_is_reported(serve):
    result = small_storm(serve("short"), abort_share=0)
    assert found(result, "load-5-000011", "output_ids where")


def test_an_abort_that_hits_others_is_reported(serve):
    result = small_storm(serve("aborts others"), abort_share=0.1)
    assert found(result, "load-5-", "error: Abort")


def test_aborts_without_effect_are_reported(serve):
    server = serve()
    server.abort = lambda rid=None: None
    assert found(small_storm(server), "none of 12 aborts took effect")


def test_aborts_partway_through_a_prefill(serve):
    result = load.abort_prefills(serve(), VOCAB, times=6, seed=3)
    assert result["problems"] == []
    assert result["aborts"]["in_prefill"] >= 4 and result["aborts"]["asked"] == 6
    assert result["requests"] == 30 and result["prefill_seconds"] > 0.01


def test_what_goes_wrong_at_an_abort_in_prefill_is_reported(serve):
    result = load.abort_prefills(serve("leaks"), VOCAB, times=3)
    assert found(result, "after prefill-0-000010", "pool tokens are available")
    result = load.abort_prefills(serve("nan"), VOCAB, times=3)
    assert found(result, "prefill-0-000011: 1 of 4 output_logprobs are NaN")
    result = load.abort_prefills(serve("aborts others"), VOCAB, times=5)
    assert found(result, "prefill-0-0000", "error: Abort")
    server = serve()
    server.abort = lambda rid=None: None
    result = load.abort_prefills(server, VOCAB, times=2)
    assert found(result, "none of 2 aborts found its request in prefill")
    assert result["aborts"]["too_late"] == 2
    server, generate = serve(), server.generate

    def unfinished(request):
        answer = generate(request)
        return replace(answer, output_ids=[]) if "alone" in request.rid else answer

    server.generate = unfinished
    result = load.abort_prefills(server, VOCAB, times=1)
    assert found(result, "prefill-0-000002: 0 output_ids where 4 were asked for")


@pytest.mark.parametrize("message", ABORTED)
def test_only_an_abort_that_was_asked_for_is_no_fault(message):
    request = Request([1, 2, 3], 4, logprob_start=2, rid="load-5-000000")

    def answer(message):
        reason = {"type": "abort", "message": message}
        body = {"output_ids": [], "meta_info": {"finish_reason": reason}}
        read = Answer.read(request, body, 0.1)
        return load._generate(SimpleNamespace(generate=lambda r: read), request)

    assert faults(request, answer(message), may_abort=True) == []
    assert faults(request, answer(message)) == [f"error: {message}"]
    assert faults(request, answer("Out of memory"), may_abort=True) == [
        "error: Out of memory"
    ]


def test_an_answer_over_http_is_checked_as_sglang_writes_it():
    request = Request([1, 2, 3], 2, logprob_start=0, rid="load-5-000000")

    def found_in(prompt, output):
        meta = {
            "finish_reason": {"type": "length", "length": 2},
            "cached_tokens": 0,
            "input_token_logprobs": [[p, 1, None] for p in prompt],
            "output_token_logprobs": [[p, 1, None] for p in output],
        }
        read = Answer.read(request, {"output_ids": [7, 8], "meta_info": meta}, 0.1)
        answer = load._generate(SimpleNamespace(generate=lambda r: read), request)
        return faults(request, answer)

    assert found_in([None, -1.0, -2.0], [-0.5, -0.1]) == []
    # JSON has no NaN: SGLang writes null.
    assert "output_logprobs are NaN" in found_in([None, -1.0, -2.0], [-0.5, None])[0]
    assert "or positive" in found_in([None, -1.0, -2.0], [0.5, -0.1])[0]
    assert "input_logprobs are NaN" in found_in([None, None, -2.0], [-0.5, -1.0])[0]
    assert found_in([None, -1.0], [-0.5, -0.1]) == [
        "1 input_logprobs where 2 were asked for"
    ]


def test_a_leaked_token_is_reported_before_a_flush_can_hide_it(serve):
    server = serve("leaks")
    before = load.snapshot(server, server.gpu_used)
    result = small_storm(server, abort_share=0.3)
    assert result["aborts"]["in_prefill"] > 0
    assert found(result, "after wave", "pool tokens are available, 65536 were")
    left = load.leaks(server, before, gpu_used=server.gpu_used)
    assert found(left, "after the storm", "65536 were")


def test_a_flush_that_fails_is_reported(serve):
    assert found(small_storm(serve("does not flush")), "not flushed: 400")


def test_a_death_under_load_is_reported_shortly(serve):
    server = serve()
    calls, generate = itertools.count(), server.generate

    def dying(request):
        if next(calls) == 60:  # of the first wave's 80
            server.kill()
        return generate(request)

    server.generate = dying
    began = time.monotonic()
    result = small_storm(server)
    assert found(result, "server is down in wave")
    assert found(result, "load-5-", "connection reset")
    assert len(result["problems"]) <= load.MOST_PROBLEMS + 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        "RuntimeError: CUDA driver error",
        "Detected errors during sampling! NaN in the logits.",
        "pool memory leak detected! ...",
    ],
)
def test_faults_in_the_log_are_reported(serve, line):
    server = serve()
    server.say(f"from before: {line}")
    before = load.snapshot(server, server.gpu_used)
    server.say("Cache not flushed because there are pending requests.")
    assert load.leaks(server, before, gpu_used=server.gpu_used)["problems"] == []
    server.say(line)
    assert found(load.leaks(server, before, gpu_used=server.gpu_used), "log:", line)


def test_growing_gpu_memory_is_reported(serve):
    server = serve()
    before = load.snapshot(server, server.gpu_used)
    server.memory += 60 * load.MIB
    assert load.leaks(server, before, gpu_used=server.gpu_used)["problems"] == []
    server.memory += 10 * load.MIB
    result = load.leaks(server, before, gpu_used=server.gpu_used)
    assert found(result, "GPU memory of the server grew from 900 MiB to 970 MiB")


def test_growth_is_seen_where_processes_cannot_be_told_apart(serve):
    server = serve()
    memory = [5000 * load.MIB]
    server.gpu_memory = lambda: 0
    before = load.snapshot(server, lambda gpus: memory[0])
    assert load.leaks(server, before, gpu_used=lambda gpus: memory[0])["problems"] == []
    memory[0] += 100 * load.MIB
    result = load.leaks(server, before, gpu_used=lambda gpus: memory[0])
    assert found(result, "GPU memory of the whole GPU grew")
    before = load.snapshot(server, lambda gpus: 0)
    result = load.leaks(server, before, gpu_used=lambda gpus: 0)
    assert found(result, "cannot tell a leak")


def test_memory_that_can_no_longer_be_read_is_no_growth_of_zero(serve):
    server = serve()
    before = load.snapshot(server, server.gpu_used)
    server.gpu_memory = lambda: 0
    grown = load.leaks(server, before, gpu_used=lambda gpus: 40 << 30)
    assert grown["memory_of"] == "whole GPU" and found(grown, "whole GPU grew")
    unknown = load.leaks(server, before, gpu_used=lambda gpus: 0)
    assert found(unknown, "cannot tell a leak")


def test_an_aborted_answer_may_be_short_but_not_nan():
    request = Request([1, 2, 3], max_new_tokens=4, logprob_start=0, rid="r")

    def found_in(**meta):
        reason = {"type": "abort", "message": "Aborted"}
        body = {"output_ids": [5], "meta_info": {"finish_reason": reason, **meta}}
        return faults(request, vars(Answer.read(request, body, 0.1)), may_abort=True)

    assert found_in() == []
    # Without a prompt's log-probabilities that its chunks had not come to.
    prompt = [[None, 1, None], [None, 2, None]]
    output = [[-1.0, 5, None]]
    assert found_in(input_token_logprobs=prompt, output_token_logprobs=output) == []
    (fault,) = found_in(output_token_logprobs=[[None, 5, None]])
    assert "1 of 1 output_logprobs are NaN" in fault


@pytest.mark.parametrize(
    "fault, words", [("ill", "503"), ("keeps running", "1 requests still run")]
)
def test_an_ill_server_is_reported(serve, fault, words, monkeypatch):
    drain = load._drain
    monkeypatch.setattr(load, "_drain", lambda *a: drain(*a, seconds=0.2))
    server = serve()
    before = load.snapshot(server, server.gpu_used)
    server.fault = fault
    assert found(load.leaks(server, before, gpu_used=server.gpu_used), words)


def compared(serve, fault):
    server = serve(fault)
    loaded = load.storm(server, REQUESTS, 40, abort_share=0, flushes=0)
    return load.compare_answers, loaded, load.quiet(server, REQUESTS, 60)


def test_answers_that_change_under_load_are_reported(serve):
    compare, *sound = compared(serve, "")
    reference = compare(*sound)
    compare, *shifted = compared(serve, "shifts")
    assert found(compare(*shifted, reference), "on average", "permutation test")
    assert found(compare(*shifted, reference), "request ", "none moves by more")
    assert compare(*shifted, compare(*shifted))["problems"] == []
    compare, *other = compared(serve, "other tokens")
    assert found(compare(*other, reference), "outputs under load equal those in quiet")


def answers(logprobs, outputs=None):
    return {
        "indices": list(range(len(logprobs))),
        "answers": [
            {
                "output_ids": outputs[i] if outputs else [1],
                "output_logprobs": [p],
                "input_logprobs": [],
                "finish": "length",
                "error": None,
            }
            for i, p in enumerate(logprobs)
        ],
    }


def judged(ours, theirs, ours_equal=100, theirs_equal=100):
    def result(differences, equal):
        n = len(differences)
        outputs = [[1] if i < equal else [2] for i in range(n)]
        alone = answers([-1.0] * n)
        return answers([-1.0 - d for d in differences], outputs), alone

    reference = load.compare_answers(*result(theirs, theirs_equal))
    return load.compare_answers(*result(ours, ours_equal), reference)


def test_the_spread_decides():
    rng = random.Random(0)
    theirs = [abs(rng.gauss(0, 0.05)) for _ in range(100)]
    ours = [abs(rng.gauss(0, 0.05)) for _ in range(100)]
    assert judged(ours, theirs)["problems"] == []
    assert found(judged([2 * d for d in ours], theirs), "on average")
    assert found(judged([*ours[:99], 4 * max(theirs)], theirs), "request 99")
    # Too small to matter, though three times as large.
    assert judged([0.003] * 100, [0.001] * 100)["problems"] == []
    assert judged(ours, theirs, 55, 70)["problems"] == []
    assert found(judged(ours, theirs, 45, 70), "45.0% of the outputs", "70.0%")


def test_nothing_to_compare_is_a_problem():
    none = answers([None] * 4)
    assert found(load.compare_answers(none, answers([-1.0] * 4)), "None under load")
    for answer in none["answers"]:
        answer["finish"] = "abort"
    assert found(load.compare_answers(none, answers([-1.0] * 4)), "only 0 of 4")


def test_retractions_happen_and_every_answer_is_complete(serve):
    server = serve(total=4096)
    result = load.retractions(server)
    assert result["problems"] == []
    assert result["complete"] == result["requests"] >= 20
    assert result["requests_retracted"] == 2 * result["retractions"] > 0


def test_a_retraction_that_never_happens_is_reported(serve):
    server = serve("never retracts", total=4096)
    server.say("KV cache pool is full. Retract requests. #retracted_reqs: 2")
    assert found(load.retractions(server), "no request was retracted")


def test_retractions_need_a_tiny_pool(serve):
    with pytest.raises(ValueError, match="65536 tokens.*RETRACTION_ARGS"):
        load.retractions(serve())


@pytest.mark.parametrize(
    "module, texts",
    [
        (
            "managers.scheduler",
            [
                "KV cache pool is full. Retract requests. ",
                "#retracted_reqs: {len(retracted_reqs)}",
            ],
        ),
        ("managers.schedule_batch", [f'message or "{ABORTED[0]}"']),
        ("managers.tokenizer_manager", [f'abort_message or "{ABORTED[1]}"']),
        ("managers.schedule_policy", list(load.RETRACTION_ENV)),
        ("server_args", [a for a in load.RETRACTION_ARGS if a.startswith("--")]),
        ("entrypoints.v1_loads", ["/v1/loads", '"num_running_reqs"']),
    ],
)
def test_what_is_read_of_sglang_is_in_its_source(module, texts):
    source = Path(importlib.util.find_spec(f"sglang.srt.{module}").origin).read_text()
    assert [text for text in texts if text not in source] == []


def kill(serve, fault="", fresh="", **kw):
    server = serve(fault)
    made = []

    def start():
        made.append(serve(fresh))
        return made[-1]

    result = load.kill_worker(
        server,
        REQUESTS[:120],
        start,
        concurrency=8,
        gpu_used=server.gpu_used,
        **{"down_within": 5, **kw},
    )
    return result, server, made


def test_a_killed_server_goes_down_and_its_successor_answers_alike(serve):
    result, server, made = kill(serve)
    assert result["problems"] == []
    assert not server.alive() and len(made) == 1 and made[0].alive()
    assert result["killed"].startswith("sleep")
    assert result["failed_by_kill"] > 0
    assert result["complete_before_kill"] + result["failed_by_kill"] == 120
    assert result["equal_after_restart"] == result["compared"] == 8
    assert result["gpu_memory_freed"] == 900 * load.MIB


def test_a_server_that_stays_up_after_the_kill_is_reported(serve):
    result, server, _ = kill(serve, "stays up", down_within=0.3)
    assert found(result, "still up 0.3 s after SIGKILL")
    assert not server.alive()


def test_a_successor_that_answers_otherwise_is_reported(serve):
    result, *_ = kill(serve, fresh="restart differs")
    assert found(result, "load-5-", "fresh server answers otherwise")
    assert result["equal_after_restart"] == 0


def test_gpu_memory_that_outlives_the_server_is_reported(serve, monkeypatch):
    until = load._until
    monkeypatch.setattr(load, "_until", lambda c, s, e: until(c, min(s, 2), e))
    result, *_ = kill(serve, "keeps memory")
    assert found(result, "freed 0 MiB", "held 900 MiB")


def test_a_successor_that_does_not_start_is_reported(serve):
    server = serve()

    def start():
        raise TimeoutError("not up in 300 s")

    result = load.kill_worker(
        server, REQUESTS[:120], start, concurrency=8, gpu_used=server.gpu_used
    )
    assert found(result, "starting a fresh server: TimeoutError: not up in 300 s")


MACHINE = dict(gpu="G", gpus=1, torch="t", triton="t", sglang="s", quick=False)


def test_the_page_has_the_figures(serve):
    server = serve()
    before = load.snapshot(server, server.gpu_used)
    parts = dict(storm=small_storm(server))
    parts["prefills"] = load.abort_prefills(server, VOCAB, times=3)
    parts["leaks"] = load.leaks(server, before, gpu_used=server.gpu_used)
    parts["quiet"] = load.quiet(server, REQUESTS, sample=20)
    parts["answers"] = load.compare_answers(parts["storm"], parts["quiet"])
    side = {name: load.summary(result) for name, result in parts.items()}
    retracted = load.summary(load.retractions(serve(total=4096)))
    section = dict(machine=MACHINE, problems=[], comparisons=[])
    page = report.markdown(
        {
            "load": {
                **section,
                "load": {"trtllm_mla": dict(unpatched=side, patched=side)},
                "retractions": {"trtllm_mla": retracted},
            },
            "kill": {**section, "kill": load.summary(kill(serve)[0])},
        }
    )
    assert "Not complete" not in page and "problem" not in page.lower()
    storm = side["storm"]
    assert f"| trtllm_mla | patched | {storm['complete']} of 240 |" in page
    assert f"| {side['prefills']['aborts']['in_prefill']} of 3 |" in page
    assert "a pool of 4096 tokens" in page and "8 of 8 answers bit for bit" in page
