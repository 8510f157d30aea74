"""The trial: what it measures of a layer and of a server, and what follows from it."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import requests
from fake_server import FakeServer
from sglang_cpu import HAS_GPU
from trial import layer_cases, page, run, server, verdict
from trial.sides import Side, SideFailed

from prefill_patch import SOURCE, cli, trial
from prefill_patch.doctor import FAIL, OK
from prefill_patch.patch import inspect
from prefill_patch.target import open_target

SMALL = dict(dims=(4, 16, 64, 16, 32), hidden=128, q_lora=64, slots=512, divisor=64)


@pytest.fixture
def tried(pytestconfig, tmp_path):
    found = inspect(SOURCE, open_target(pytestconfig.getoption("--sglang")))
    return run.Trial(found, "trtllm_mla", 4, tmp_path, **SMALL)


class TestCommand:
    @pytest.mark.skipif(HAS_GPU, reason="this machine has one")
    def test_without_a_gpu_it_says_so(self, unpatched_sglang, capsys):
        assert cli.main(["trial", "--sglang", str(unpatched_sglang)]) == 4
        assert capsys.readouterr().err.splitlines() == [
            "no GPU: run the trial on the host of the server"
        ]

    @pytest.mark.parametrize("more", [["--server"], ["--", "--tp", "8"]])
    def test_a_server_needs_its_arguments(self, more, unpatched_sglang, capsys):
        assert cli.main(["trial", "--sglang", str(unpatched_sglang), *more]) == 2
        assert "go together" in capsys.readouterr().err

    def test_without_the_clone_it_says_so(
        self, unpatched_sglang, capsys, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(trial, "_TEST", tmp_path)
        assert cli.main(["trial", "--sglang", str(unpatched_sglang)]) == 2
        assert "git clone" in capsys.readouterr().err

    def test_the_server_needs_the_patch(self, tried):
        with pytest.raises(cli.PatchError, match="--server: patch: not applied"):
            run.run(tried.found, "fa3", 128, None, ["--tp", "8"])

    def test_the_file_is_tried_first(self, tried, tmp_path):
        with pytest.raises(cli.PatchError, match="Is a directory|No such file"):
            run.run(tried.found, "fa3", 128, str(tmp_path / "no/file"), None)


@pytest.mark.skipif(HAS_GPU, reason="the interpreter's dimensions")
def test_a_layer_of_both_sides(tried, monkeypatch, tmp_path, capsys):
    """In the interpreter, on a stand-in, where a profiler sees nothing."""
    case = "requests without keys"
    monkeypatch.setattr(run, "CASES", {case: layer_cases.CASES[case]})
    monkeypatch.setattr(run, "TIMES", [(32, 16)])
    tried.try_layer()
    tried.finish(tmp_path / "trial.json")
    old, new = tried.results["accuracy"]
    assert (old["setting"], new["setting"]) == ("unpatched", "GEMM off")
    for row in (old, new):
        assert row["finite"] and row["padding"] and row["attention"] < 0.05
        assert row["kernel"]["lse"] < 1e-5 and row["kernel"]["base"] == "e"
    assert old["operands"]["q"][1] > new["operands"]["q"][1]
    assert old["operands"]["cache row"][1] > 0 == new["operands"]["cache row"][1]
    assert new["operands"]["v"] == old["operands"]["v"]  # BF16 on both sides
    assert not verdict.layer_faults(tried.results, "GEMM off")
    written = json.loads((tmp_path / "trial.json").read_text())
    assert written["verdict"]["kind"] == verdict.CANNOT_SAY
    reasons = written["verdict"]["reasons"]
    assert any("the profiler sees no kernels" in reason for reason in reasons)
    assert any("was a stand-in" in reason for reason in reasons)
    printed = capsys.readouterr().out
    assert "verdict: cannot say" in printed and case in printed


class TestSide:
    def test_a_side_that_raises_answers_the_next(self, unpatched_sglang, tmp_path):
        with Side(unpatched_sglang, tmp_path / "log") as side:
            for _ in range(2):
                with pytest.raises(SideFailed, match="AttributeError"):
                    side.ask("no such thing")
        assert side.process.poll() is not None

    def test_one_that_hangs_is_killed(self, unpatched_sglang, tmp_path):
        side = Side(unpatched_sglang, tmp_path / "log", seconds=0.1)
        with side, pytest.raises(SideFailed, match="did not answer within 0.1 s"):
            side.ask("selftest", backend="fa3")

    def test_one_that_dies_is_told_from_that(self, unpatched_sglang, tmp_path):
        with Side(unpatched_sglang, tmp_path / "log") as side:
            side.process.kill()
            with pytest.raises(SideFailed, match="ended with status -9"):
                side.ask("unload")

    def test_it_ends_with_what_started_it(self, unpatched_sglang, tmp_path):
        with Side(unpatched_sglang, tmp_path / "log") as side:
            side.process.stdin.close()
            assert side.process.wait(60) == 0


def test_the_parts_of_a_trace():
    """Kernels count where they were launched, not where they ran."""

    def event(cat, name, ts, dur, correlation=None):
        args = {} if correlation is None else {"correlation": correlation}
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, args=args)

    from trial.layer import ATTENTION, OTHER, parts_of

    events = [{"ph": "M", "name": "process_name"}]
    events.append(event("user_annotation", OTHER, 0, 9))
    events.append(event("user_annotation", ATTENTION, 20, 9))
    events.append(event("gpu_user_annotation", ATTENTION, 0, 500))
    for i, (at, us, cat) in enumerate(
        [
            (5, 100.0, "kernel"),
            (12, 7.0, "kernel"),
            (15, 2.0, "gpu_memset"),
            (25, 50.0, "kernel"),
        ]
    ):
        events.append(event("cuda_runtime", "cudaLaunchKernel", at, 1, i))
        events.append(event(cat, "any", 22, us, i))
    assert parts_of(events) == dict(
        preparation=9.0, attention=50.0, other=100.0, launches=2
    )


def accurate(setting, differing=0, **changes):
    operands = {name: [100_000, differing, 1] for name in ("q", "k", "v", "cache row")}
    row = dict(case="causal", setting=setting, operands=operands, attention=0.03)
    row |= dict(finite=True, padding=True, kernel={"error": 0.01})
    return row | changes


def timed(**preparation):
    parts = dict(attention=[100.0] * 5, other=[400.0] * 5, launches=[1] * 5)
    us = {
        setting.replace("_", " "): {"preparation": [x + i for i in range(5)], **parts}
        for setting, x in preparation.items()
    }
    return dict(tokens=1024, prefix=0, us=us)


def results(**changes):
    setup = dict(backend="fa3", heads=128, patch="not applied", real=True)
    setup |= dict(kernel="flash_attn", default="GEMM on", own_hook=False, machine="X")
    rows = [accurate("unpatched", 3000), accurate("GEMM off"), accurate("GEMM on")]
    times = [timed(unpatched=300, GEMM_off=120, GEMM_on=100)]
    found = dict(setup=setup, versions=[], checks=[[OK, "GPU", "one"]], accuracy=rows)
    return {**found, "times": times, "incomplete": [], **changes}


def with_row(row):
    rows = results()["accuracy"]
    return [row if row["setting"] == other["setting"] else other for other in rows]


LOGPROBS = dict(worse=[0.1, 0.05, 0.2], apart=0.3, tokens=512, same=1, asked=2)
WORSE = dict(problems=[], notes=[], logprobs=LOGPROBS)


@pytest.mark.parametrize(
    "changes, kind, says",
    [
        ({}, verdict.ADOPT, "1.99 times less"),
        (
            dict(times=[timed(unpatched=300, GEMM_off=100, GEMM_on=120)]),
            verdict.ADOPT_WITH,
            "SGLANG_MLA_FP8_PREFILL_GEMM=off",
        ),
        (
            dict(accuracy=with_row(accurate("GEMM on", 9000))),
            verdict.ADOPT_WITH,
            "SGLANG_MLA_FP8_PREFILL_GEMM=off",
        ),
        (
            dict(times=[timed(unpatched=300, GEMM_off=400, GEMM_on=500)]),
            verdict.DO_NOT,
            "times the unpatched time",
        ),
        (dict(checks=[[FAIL, "torch", "old"]]), verdict.DO_NOT, "torch: old"),
        (dict(server=WORSE), verdict.DO_NOT, "log-probabilities are lower"),
        (
            dict(server=dict(problems=["hook on: ended"], notes=[])),
            verdict.DO_NOT,
            "hook on: ended",
        ),
        (dict(incomplete=["times: no"]), verdict.CANNOT_SAY, "times: no"),
        (dict(accuracy=[], times=[]), verdict.CANNOT_SAY, "no layer ran"),
        (
            dict(setup={**results()["setup"], "real": False}),
            verdict.CANNOT_SAY,
            "flash_attn was a stand-in",
        ),
    ],
)
def test_the_verdict(changes, kind, says):
    found = results(**changes)
    found["verdict"] = verdict.decide(found)._asdict()
    assert found["verdict"]["kind"] == kind and says in found["verdict"]["text"]
    assert len({*verdict.EXIT.values()} - {2, trial.EXIT_NO_GPU}) == 4
    assert f"verdict: {found['verdict']['text']}" in page.text(found)


@pytest.mark.parametrize(
    "row, says",
    [
        (dict(differing=3001), "q: 3001 of 100000 elements"),
        (dict(attention=0.032), "attention is off float64 by 3.20%"),
        (dict(finite=False), "is not finite"),
        (dict(padding=False), "padding"),
        (dict(error="AssertionError"), "AssertionError"),
    ],
)
def test_a_layer_that_is_worse_is_found(row, says):
    theirs = accurate("unpatched", 3000)
    assert not verdict.accuracy_faults(accurate("GEMM off", 3000), theirs)
    assert says in verdict.accuracy_faults(accurate("GEMM off", **row), theirs)[0]


class Fake(FakeServer):
    """With a tokenizer, whose log says what it does with prefills."""

    says = server.ON

    def start(self):
        self.log.write_text(self.says)

    # Looks at its process that find it, while it is ending.
    found_alive = 3

    def alive(self):
        if self.fault == "is ending":
            self.found_alive -= 1
        return self.found_alive > 0

    def post(self, path, json=None, timeout=60):
        if self.fault == "ends" and path.startswith("/flush_cache"):
            self.fault = "is ending"
            raise requests.ConnectionError("refused")
        if "text" not in (json or {}):
            return super().post(path, json, timeout)
        ids = [[None, ord(x), None] for x in json["text"]]
        body = {"meta_info": {"input_token_logprobs": ids}}
        # What is asked for is a sum of ones, said in words and last in figures.
        ones = json["text"].rpartition("Question:")[2].count("one")
        missed = 1 if self.fault == "miscounts" and ones % 4 == 0 else 0
        body["text"] = f"It is 1 more than {ones - 1}, so 1,{ones - missed:03}."
        return SimpleNamespace(
            status_code=200, json=lambda: body, raise_for_status=lambda: None
        )


class TestServers:
    @pytest.fixture
    def compared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(server, "TIMES", 2)
        monkeypatch.setattr(server, "STORMS", 2)
        monkeypatch.setattr(server, "GSM8K", tmp_path / "test.jsonl")

        def compared(**on):
            def make(side, env):
                assert env == (
                    {"SGLANG_MLA_FP8_PREFILL": "off"} if side == "off" else {}
                )
                fake = Fake(tmp_path / side, **{} if side == "off" else on)
                return fake

            return server.run(make, lambda line: None)

        return compared

    def test_two_that_answer_the_same(self, compared):
        found = compared()
        assert not found["problems"] and not found["notes"]
        logprobs, asked = found["logprobs"], len(server.LENGTHS) + 2 * len(
            server.BEHIND
        )
        assert logprobs["worse"] == [0, 0, 0] and logprobs["apart"] == 0
        assert logprobs["same"] == logprobs["asked"] == asked
        assert len(found["times"]) == len(server.FIRST_TOKEN) + 1
        assert not verdict.server_faults({**found, "times": []})
        page.server(found)

    def test_lower_log_probabilities_are_found(self, compared):
        found = compared(noise=0.5)
        (fault,) = verdict.server_faults({**found, "times": []})
        assert "prompt log-probabilities are lower by" in fault

    @pytest.mark.parametrize(
        "fault, says",
        [
            ("nan", "are NaN"),
            ("loses", "timed out"),
            ("ends", f"ended while it was asked:\n{server.ON}"),
        ],
    )
    def test_a_fault_with_the_hook_on_is_found(
        self, compared, fault, says, monkeypatch
    ):
        problems = compared(fault=fault)["problems"]
        assert problems and says in problems[0]

    @pytest.mark.parametrize("fault, right", [("", 1), ("miscounts", 0.75)])
    def test_gsm8k_is_answered_where_its_data_is(self, compared, fault, right):
        rows = [
            {"question": "one and " * (1 + i), "answer": f"Add. #### {1001 + i}"}
            for i in range(server.EXAMPLES + 40)
        ]
        server.GSM8K.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        found = compared(fault=fault)
        assert found["gsm8k"]["questions"] == 40
        assert found["gsm8k"]["right"] == [1, right]
        faults = verdict.server_faults({**found, "times": []})
        assert any("75.0% of GSM8K" in x for x in faults) == (fault != "")
        assert f"GSM8K, 40 questions: {right:.1%} right" in "".join(page.server(found))

    def test_a_hook_that_declines_is_found(self, compared, monkeypatch):
        said = "FP8 prefill preparation declined: the KV cache is bfloat16"
        monkeypatch.setattr(Fake, "says", said)
        assert compared()["problems"] == [said]

    def test_what_is_wrong_on_both_is_not_of_the_hook(self):
        side = dict(answers={}, problems=["too long"], times={"one": [1.0, 1.1]})
        found = server.difference(side, side)
        assert not found["problems"] and found["notes"] == ["too long"]
        assert found["times"][0]["ratio"][0] == 1


class TestTeardown:
    """Of servers that are real processes, which start others."""

    CHILD = "import subprocess, sys; subprocess.run(['sleep', '600'])"

    @pytest.mark.parametrize("last", ["sys.exit(3)", "child.wait()"])
    def test_nothing_is_left(self, last, tmp_path, monkeypatch):
        code = "import subprocess, sys\n"
        code += f"child = subprocess.Popen([sys.executable, '-c', {self.CHILD!r}])\n"
        code += f"print('started', flush=True)\n{last}"
        command = lambda self, port: [sys.executable, "-c", code]
        monkeypatch.setattr(server.UserServer, "command", command)
        with server.UserServer(tmp_path / "on", [], {}) as one:
            one.start()
            deadline = time.monotonic() + 60
            while "started" not in one.log_since(0) and time.monotonic() < deadline:
                time.sleep(0.05)
            with pytest.raises(RuntimeError, match="ended|not up in 0.1 s"):
                one.wait(0.1)
            started = one.processes()
            assert len(started) >= (2 if one.alive() else 1)
        assert psutil.wait_procs(started, timeout=10)[1] == []
        assert not one.processes()

    def test_one_that_does_not_come_up(self, tried, monkeypatch):
        code = "raise OSError('no weights')"
        command = lambda self, port: [sys.executable, "-c", code]
        monkeypatch.setattr(server.UserServer, "command", command)
        tried.try_server(["--tp", "8"])
        (reason,) = tried.results["incomplete"]
        assert "hook off: off ended" in reason and "no weights" in reason

    def test_a_signal_unwinds(self, tmp_path):
        """So that `with` ends servers and sides."""
        code = (
            "import os, signal\nfrom trial import run\n"
            "with run.ending_on_signals():\n"
            "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    finally:\n        print('unwound')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        assert done.returncode == 128 + 15 and done.stdout == "unwound\n"


def test_only_the_switch_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_MLA_FP8_PREFILL", "composed")
    monkeypatch.setenv("SGLANG_MLA_FP8_PREFILL_GEMM", "off")
    off, on = (
        server.UserServer(tmp_path / side, ["--api-key", "k"], env)
        for side, env in server.SIDES.items()
    )
    assert off.command(1) == on.command(1) and "--api-key" in on.command(1)
    assert on._session.headers["Authorization"] == "Bearer k"
    off, on = off.environment(), on.environment()
    assert off.pop("SGLANG_MLA_FP8_PREFILL") == "off" and off == on
    assert on["SGLANG_MLA_FP8_PREFILL_GEMM"] == "off"
