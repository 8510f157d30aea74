"""The end-to-end suite finds each fault that is put into a server."""

import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from e2e import compare, load, pairs
from fake_server import VOCAB, FakeServer, log_probabilities


@pytest.fixture(autouse=True)
def settles_at_once(monkeypatch):
    monkeypatch.setattr(load, "SETTLES_WITHIN", 0.1)


REQUESTS = load.workload(120, 5, VOCAB)
ABORTS = load.random_aborts(len(REQUESTS), 1, within=0)


def waits(rid):
    return rid in {REQUESTS[i].rid for i in ABORTS}


def storm(server, aborts=ABORTS):
    return load.storm(server, REQUESTS, aborts, waves=2, concurrency=16)


def test_the_workload_shares_prefixes_and_repeats_itself():
    assert load.workload(300, 1, VOCAB) == load.workload(300, 1, VOCAB)
    asked = load.workload(1000, 1, VOCAB)
    heads = Counter(tuple(r.input_ids[:16]) for r in asked)
    assert heads.most_common(1)[0][1] > 50
    assert len({tuple(r.input_ids) for r in asked}) < 980
    lengths = [len(r.input_ids) for r in asked]
    assert max(lengths) <= 3000 and 200 < np.mean(lengths) < 1000
    # SGLang aborts every request whose rid begins with the one given.
    assert len({len(r.rid) for r in asked}) == 1


def test_a_sound_server_passes_the_storm(tmp_path):
    server = FakeServer(tmp_path, waits=waits)
    figures, problems, answers = storm(server)
    assert problems == []
    assert figures["aborted"] == len(ABORTS) == 6
    assert figures["complete"] == figures["requests"] - 6
    watch = load.Watch(server)
    server.waits = lambda rid: False
    alone, problems = load.lone(server, REQUESTS[::4])
    assert problems == []
    assert not any(answer.cached_tokens for answer in alone)
    assert any(answer.cached_tokens for answer in answers)
    figures, problems = load.compare_answers(REQUESTS[::4], answers[::4], alone)
    assert problems == [] and figures["compared"] == figures["same"] > 20
    server.memory += 60 * load.MIB
    figures, problems = watch.report()
    assert problems == [] and figures["memory_growth_mib"] == 60


@pytest.mark.parametrize(
    "fault, says",
    [
        ("loses", "load-5-000007: error: ReadTimeout"),
        ("swaps", "load-5-000007: error: the answer is to 'another'"),
        ("nan", r"load-5-000007: .* of \d+ output_logprobs are NaN"),
        ("aborts others", "finished by 'abort'"),
        ("leaks", "idle, the server holds {'used': "),
        ("never ends", "idle, the server holds {'requests': 1}"),
        ("ignores", "none of 6 aborts took effect"),
    ],
)
def test_a_fault_under_load_is_found(tmp_path, fault, says):
    _, problems, _ = storm(FakeServer(tmp_path, fault, waits=waits))
    assert any(re.search(says, problem) for problem in problems), problems


def test_a_flush_that_fails_is_an_error(tmp_path):
    with pytest.raises(requests.HTTPError):
        storm(FakeServer(tmp_path, "does not flush"))


def test_an_answer_to_another_prompt_is_found(tmp_path):
    server = FakeServer(tmp_path, "mixes up under load")
    server.waits = lambda rid: rid == REQUESTS[0].rid  # so that it is never alone
    _, problems, loaded = storm(server, {0: 0.2})
    server.waits = lambda rid: False
    alone, _ = load.lone(server, REQUESTS)
    figures, problems = load.compare_answers(REQUESTS, loaded, alone)
    wrong = {problem.split(":")[0] for problem in problems}
    assert wrong and all(rid.endswith("7") for rid in wrong)


def test_answers_that_cannot_be_compared_are_a_problem(tmp_path):
    alone, _ = load.lone(FakeServer(tmp_path, "nan"), REQUESTS[7:8])
    _, problems = load.compare_answers(REQUESTS[7:8], alone, alone)
    assert problems == ["only 0 of 1 answers can be compared"]


@pytest.mark.parametrize(
    "line, faulty",
    [
        ("Traceback (most recent call last):", True),
        ("RuntimeError: CUDA driver error", True),
        ("Detected errors during sampling! NaN in the logits.", True),
        ("pool memory leak detected! ...", True),
        ("Cache not flushed because there are pending requests.", False),
    ],
)
def test_what_the_log_gains_is_read(tmp_path, line, faulty):
    server = FakeServer(tmp_path)
    with open(server.log, "a") as log:
        log.write("OSError: before\n")
    watch = load.Watch(server)
    with open(server.log, "a") as log:
        log.write(f"[10:00:00] {line}\n")
    _, problems = watch.report()
    assert problems == ([f"log: [10:00:00] {line}"] if faulty else [])


def test_growing_memory_and_an_ill_server_are_found(tmp_path):
    server = FakeServer(tmp_path, "ill")
    watch = load.Watch(server)
    server.memory += 70 * load.MIB
    health, memory = watch.report()[1]
    assert "not healthy" in health and "grew by 70 MiB" in memory
    server.memory = 0
    assert "cannot tell a leak" in load.Watch(server).report()[1][1]


class TestAbortedPrefills:
    def run(self, tmp_path, fault=""):
        def waits(rid):
            return re.fullmatch(r"prefill-\d+-0", rid) is not None

        return load.abort_prefills(
            FakeServer(tmp_path, fault, waits=waits), VOCAB, 3, 512
        )

    def test_a_sound_server_passes(self, tmp_path):
        figures, problems = self.run(tmp_path)
        assert figures == {"prefills": 3, "aborted_in_prefill": 3} and problems == []

    @pytest.mark.parametrize(
        "fault, says",
        [
            ("leaks", "idle, the server holds {'used': 64}"),
            ("ignores", "none of 3 aborts found its request in prefill"),
        ],
    )
    def test_a_fault_is_found(self, tmp_path, fault, says):
        assert says in self.run(tmp_path, fault)[1]


def test_retractions_are_counted(tmp_path):
    asked = load.outgrowing(20, 1, VOCAB)
    sizes = [len(r.input_ids) + r.max_new_tokens for r in asked]
    assert max(sizes) < load.SMALL_POOL / 8 < load.SMALL_POOL < sum(sizes)
    for fault, count in (("", 2), ("never retracts", 0)):
        figures, problems, _ = load.storm(FakeServer(tmp_path, fault), asked)
        assert (figures["retractions"], problems) == (count, [])


class TestKill:
    @pytest.fixture
    def serve(self, tmp_path):
        servers = []

        def make(then="kill $$", seed=1):
            """Its process ends with its worker, unless `then` says otherwise."""
            server = FakeServer(tmp_path / str(len(servers)), seed=seed)
            server.process = subprocess.Popen(
                ["sh", "-c", f"sleep 60 & echo $!; wait $!; {then}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            server.process.stdout.readline()
            servers.append(server)
            return server

        yield make
        for server in servers:
            for process in server.processes():
                process.kill()
            server.process.communicate()

    def kill(self, serve, then="kill $$", fresh_seed=1):
        def start_fresh():
            return serve(seed=fresh_seed)

        return load.kill_scheduler(
            serve(then), REQUESTS[:40], start_fresh, down_within=0.5
        )

    def test_a_killed_server_goes_down_and_a_fresh_one_answers_alike(self, serve):
        figures, problems = self.kill(serve)
        assert problems == []
        assert figures["equal"] == figures["compared"] == 8
        assert 0 < figures["complete"] < 40

    def test_a_server_that_stays_up_is_found(self, serve):
        _, problems = self.kill(serve, then="exec sleep 60")
        assert problems == ["1 processes outlive the kill by 0.5 s"]

    def test_a_fresh_server_that_answers_otherwise_is_found(self, serve):
        _, problems = self.kill(serve, fresh_seed=2)
        assert problems == ["the fresh server gives 0 of 8 answers as before"]


QUESTIONS = {
    "alone": compare.of_lengths(VOCAB, (1, 2, 3, 17, 64, 65, 127, 300, 500)),
    "at once": compare.mixed(VOCAB, 40, 300),
    "behind prefixes": compare.behind_prefixes(
        VOCAB, (64, 100, 128, 130, 200, 260), (2, 65, 200)
    ),
}
EXPECTED = {
    prompt.name: log_probabilities(prompt.input_ids)[:-1]
    for prompts in QUESTIONS.values()
    for prompt in prompts
}
CASE = pairs.Case("chunks of 2048", "trtllm_mla", off=True)


def run_pair(tmp_path, monkeypatch, case=CASE, **sides):
    """The row of a pair of fake servers; `sides` say what they are like."""

    def server(case, side, gpus):
        like = {"seed": side == "patched", **sides.get(side, {})}
        return FakeServer(tmp_path / side, **like)

    monkeypatch.setattr(pairs, "start_all", lambda servers: None)
    monkeypatch.setattr(pairs, "check_record", lambda server, on: ({"k": [9, 0]}, []))
    run = SimpleNamespace(
        questions=QUESTIONS,
        server=server,
        expected=lambda model: SimpleNamespace(result=lambda: EXPECTED),
    )
    return pairs.run_pair(run, case, (0,))


class TestPair:
    def test_equally_good_servers_pass(self, tmp_path, monkeypatch):
        row = run_pair(tmp_path, monkeypatch)
        assert row["problems"] == []
        assert row["off"]["values"] > 1000 and row["off"]["differing"] == 0
        found = row["all"]
        assert found["prompts"] == 8 + 40 + 18
        assert 0.06 < found["patched"] < 0.09  # 0.05 of 0 to 3
        value, low, high = found["ratio"]
        assert 0.97 < low < value < high < 1.03

    def test_a_patched_server_that_is_further_off_is_found(self, tmp_path, monkeypatch):
        row = run_pair(tmp_path, monkeypatch, patched={"noise": 0.06})
        assert len(row["problems"]) == 4
        assert re.search("behind prefixes: .* is 1.2", row["problems"][3])
        assert (
            run_pair(tmp_path, monkeypatch, patched={"noise": 0.04})["problems"] == []
        )

    def test_an_error_in_one_scenario_is_found(self, tmp_path, monkeypatch):
        ask = compare.ask

        def worse(server, scenario, *more):
            server.noise = 0.05
            if scenario == "behind prefixes" and server.name == "patched":
                server.noise = 0.06
            return ask(server, scenario, *more)

        monkeypatch.setattr(compare, "ask", worse)
        problems = run_pair(tmp_path, monkeypatch)["problems"]
        assert any(", behind prefixes: " in problem for problem in problems)

    def test_another_model_than_transformers_is_found(self, tmp_path, monkeypatch):
        wrong = {"noise": 0.5, "seed": 0}
        row = run_pair(tmp_path, monkeypatch, unpatched=wrong, patched=wrong, off=wrong)
        assert all("do not run the same model" in x for x in row["problems"])

    def test_one_bit_with_the_hook_off_is_found(self, tmp_path, monkeypatch):
        row = run_pair(tmp_path, monkeypatch, off={"noise": 0.05 * (1 + 1e-15)})
        assert row["off"]["differing"] > 100
        assert len(row["problems"]) == 1 and "hook off" in row["problems"][0]

    def test_base_2_merged_as_natural_must_be_further_off(self, tmp_path, monkeypatch):
        case = pairs.Case("base-2 LSE", "trtllm_mla", natural=False)
        (problem,) = run_pair(tmp_path, monkeypatch, case)["problems"]
        assert "no nearer to transformers" in problem
        wrong = {"noise": 0.06}
        row = run_pair(tmp_path, monkeypatch, case, unpatched=wrong)
        assert row["problems"] == []

    @pytest.mark.parametrize(
        "fault, says",
        [
            ("nan", "patched: alone, 17 tokens: 8 of 8 output_logprobs are NaN"),
            ("cold", r"prefix 100 \+ 2: 0 tokens came from the cache, not 64"),
        ],
    )
    def test_a_wrong_answer_is_found(self, tmp_path, monkeypatch, fault, says):
        row = run_pair(tmp_path, monkeypatch, patched={"fault": fault})
        assert any(re.search(says, problem) for problem in row["problems"])

    def test_a_batch_that_should_be_padded_must_be(self, tmp_path, monkeypatch):
        case = pairs.Case("by rank", "trtllm_mla", padding=True)
        (problem,) = run_pair(tmp_path, monkeypatch, case)["problems"]
        assert "no batch was padded" in problem


def test_the_unpatched_server_may_have_a_model_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "Server", lambda folder, site, model, *more: model)
    monkeypatch.setattr(pairs, "no_prefill_graphs", lambda site: "--no-graphs")
    trees = SimpleNamespace(patched=None, unpatched=None)
    run = SimpleNamespace(trees=trees, folder=tmp_path, model=lambda kind: kind)
    case = pairs.Case("scales", "tokenspeed_mla", model="a", unpatched_model="b")
    models = [pairs.Run.server(run, case, side, (0,)) for side in pairs.SIDES]
    assert models == ["b", "a"]


def test_ranks_may_miss_the_cache_but_not_always(tmp_path):
    prompts = QUESTIONS["behind prefixes"]
    _, problems = compare.ask(FakeServer(tmp_path, "cold"), "x", prompts, hits=False)
    assert problems == ["x: no prompt found its prefix in the cache"]
    _, problems = compare.ask(FakeServer(tmp_path), "x", prompts, hits=False)
    assert problems == []
