"""The end-to-end suite's own parts that need no GPU: checkpoints, records, traces, the
page. `test_e2e_compare.py` and `test_e2e_load.py` have the rest."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from e2e import __main__ as suite
from e2e import compare, profiles, report
from e2e import servers as servers_module
from e2e.servers import Answer, Request, Server, ServerSpec
from mla_standin import models
from mla_standin.kernels import CAUSAL, DECODE, PREFIX_CHUNK
from transformers import AutoModelForCausalLM


@pytest.fixture
def server(tmp_path):
    def make(patched=True, **env):
        folder = tmp_path / ("patched" if patched else "unpatched")
        spec = ServerSpec("a server", patched, folder, folder, env=env)
        return Server(spec, folder)

    return make


class TestModels:
    def test_same_weights_for_the_same_seed(self, tmp_path):
        folders = [models.make_model("tiny", tmp_path / str(i)) for i in range(2)]
        one, two = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).state_dict()
            for f in folders
        )
        assert one.keys() == two.keys()
        assert all(one[name].equal(two[name]) for name in one)
        other = models.make_model("tiny", tmp_path / "other", seed=1)
        other = AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16)
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        assert not one[name].equal(other.state_dict()[name])

    def test_logits_neither_flat_nor_one_hot(self, tmp_path):
        folder = models.make_model("tiny", tmp_path / "tiny")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.randint(0, 128, (1, 200))).logits
        top = torch.softmax(logits, -1).amax(-1).mean()
        assert 0.05 < top < 0.8

    def test_scales_are_named_for_what_sglang_prefills_with(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(models.KINDS, "scaled", models.KINDS["tiny"])
        folder = models.make_model("scaled", tmp_path / "scaled")
        tensors = models.load_file(folder / "model.safetensors")
        # transformers' answers are those for the plain checkpoint.
        plain = models.make_model("tiny", tmp_path / "plain")
        for name, tensor in models.load_file(plain / "model.safetensors").items():
            assert tensor.equal(tensors[name])
        name = "model.layers.1.self_attn.attn_mha.v_scale"
        assert tensors[name].item() == models.V_SCALE
        config = json.loads((folder / "config.json").read_text())
        from sglang.srt.layers.quantization.modelopt_quant import (
            ModelOptFp8Config,
            ModelOptFp8KVCacheMethod,
        )
        from sglang.srt.layers.radix_attention import RadixAttention

        quantization = ModelOptFp8Config.from_config(config["quantization_config"])
        prefix = "model.layers.1.self_attn.attn_mha"
        attention = RadixAttention(2, 32, 1.0, 2, 1, quant_config=quantization)
        assert isinstance(attention.quant_method, ModelOptFp8KVCacheMethod)
        attention.k_scale.data.copy_(tensors[f"{prefix}.k_scale"])
        attention.v_scale.data.copy_(tensors[f"{prefix}.v_scale"])
        attention.quant_method.process_weights_after_loading(attention)
        assert attention.k_scale_float == models.K_SCALE
        assert quantization.is_layer_excluded("model.layers.1.self_attn.kv_b_proj")

    def test_unknown_kind(self, tmp_path):
        with pytest.raises(ValueError, match="deepseek_v3"):
            models.make_model("v4", tmp_path)


class TestAnswer:
    def test_prompt_and_output(self):
        request = Request([5, 6, 7], max_new_tokens=2, logprob_start=0)
        meta = {
            "finish_reason": {"type": "length"},
            "cached_tokens": 0,
            "input_token_logprobs": [[None, 5, None], [-1.5, 6, None], [-2.5, 7, None]],
            "output_token_logprobs": [[-0.5, 8, None], [-0.25, 9, None]],
        }
        answer = Answer.read(request, {"meta_info": meta, "output_ids": [8, 9]}, 0.5)
        assert answer.input_logprobs == [-1.5, -2.5]
        assert answer.output_ids == [8, 9] and answer.output_logprobs == [-0.5, -0.25]

    def test_no_new_tokens_are_dropped(self):
        request = Request([5, 6])
        assert request.body()["sampling_params"]["max_new_tokens"] == 1
        body = {"meta_info": {"finish_reason": {"type": "length"}}, "output_ids": [3]}
        assert Answer.read(request, body, 0.1).output_ids == []


def call(**changes):
    fp8 = "float8_e4m3fn"
    return {
        "kernel": "tokenspeed_mla_prefill",
        **dict(q_dtype=fp8, k_dtype=fp8, v_dtype=fp8),
        **dict(contiguous=True, causal=True, padded=False),
        **dict(count=2, tokens=10),
        **changes,
    }


def write_record(server, name, calls, nan=0, late=()):
    record = {
        "calls": calls,
        "nan": {"q": 0, "k": 0, "v": 0, "out": nan},
        "compiled": [],
        "late_compiles": list(late),
    }
    (server.folder / f"record-{name}.json").write_text(json.dumps(record))
    server.log.write_text("TRTLLMMLABackend: FP8 prefill preparation with the fused …")


class TestStart:
    def test_command_and_environment(self, server, monkeypatch):
        started = []
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **kw: started.append((command, kw))
        )
        servers = [server(STANDIN_LSE="natural"), server(patched=False)]
        try:
            for one in servers:
                one.start()
        finally:
            servers_module._running.clear()
        ports = []
        for command, kw in started:
            options = dict(zip(command, command[1:]))
            port = int(options["--port"])
            assert int(options["--nccl-port"]) == port + 1
            ports.append(port)
            assert int(kw["env"]["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 600
        assert started[0][1]["env"]["STANDIN_LSE"] == "natural"
        assert abs(ports[0] - ports[1]) >= 50
        assert [one.url for one in servers] == [
            f"http://127.0.0.1:{port}" for port in ports
        ]

    def test_a_port_whose_next_is_taken_is_passed_over(self, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            monkeypatch.setattr(
                servers_module, "_ports", iter([port - 1, port, port + 50])
            )
            assert servers_module.free_port() == port + 50


class TestRecord:
    def test_processes_add_up(self, server):
        server = server()
        write_record(server, 1, [call(), call(causal=False)], nan=1)
        write_record(server, 2, [call(count=3)], nan=2)
        record = server.record()
        assert [c["count"] for c in record["calls"]] == [5, 2]
        assert record["nan"]["out"] == 3

    def test_fine(self, server):
        server = server()
        write_record(server, 1, [call()])
        assert suite.check_record(server)[1] == []

    @pytest.mark.parametrize(
        "record, says",
        [
            (dict(calls=[]), "no prefill kernel"),
            (dict(calls=[call(), call(q_dtype="bfloat16")]), "bfloat16"),
            (dict(calls=[call(contiguous=False)]), "'contiguous': False"),
            (dict(calls=[call()], nan=1), "NaN in {'out': 1}"),
            (dict(calls=[call()], late=[["bf16"]]), "compiled by a request"),
        ],
    )
    def test_faults(self, server, record, says):
        server = server()
        write_record(server, 1, **record)
        (problem,) = suite.check_record(server)[1]
        assert says in problem

    def test_who_says_that_the_hook_is_on(self, server):
        unpatched, off = server(False), server(SGLANG_MLA_FP8_PREFILL="off")
        for some in (unpatched, off):
            write_record(some, 1, [call()])
            assert "the log says" in suite.check_record(some)[1][0]
            some.log.write_text("declined, SGLANG_MLA_FP8_PREFILL=off")
            assert not suite.check_record(some)[1]
        on = server()
        write_record(on, 1, [call()])
        on.log.write_text("")
        assert "does not say" in suite.check_record(on)[1][0]


def trace(steps):
    """A profiler's trace of forward passes: each a list of range names and kernel
    names in the order of the host's calls."""
    events, clock, correlation = [], 0.0, 0

    def add(cat, name, dur, **more):
        event = dict(ph="X", cat=cat, name=name, ts=clock, dur=dur, tid=1, **more)
        events.append(event)

    def launch(name):
        nonlocal clock, correlation
        correlation += 1
        args = dict(correlation=correlation)
        add("cuda_runtime", "cudaLaunchKernel", 1.0, args=args)
        # Kernels run later than they are launched, and on another line of the trace.
        kernel = dict(ph="X", cat="kernel", name=name, ts=clock + 1e4, tid=7)
        events.append({**kernel, "dur": 10.0 + len(name), "args": args})
        clock += 2

    for step in steps:
        for name in step:
            if name.startswith("standin"):
                add("user_annotation", name, 9.0)
                add("gpu_user_annotation", name, 99.0)
                clock += 1
                launch("attention inside")
                launch("attention inside")
                clock += 10
            else:
                launch(name)
    events.append(dict(ph="i", name="no category"))
    return events


class TestProfiles:
    LAYER = ["nvjet_tst", "rope", "fp8_cast", "RMSNormKernel"]

    def steps(self, layer):
        one_pass = ["embedding"] + [*layer, CAUSAL] * 4 + ["nvjet_head", "sample"]
        return trace([one_pass, one_pass])

    def test_usual_layer(self):
        found = profiles.per_layer(profiles.layers_of(self.steps(self.LAYER)))
        assert found["layers"] == 6 and found["launches"] == 4
        assert found["preparation_launches"] == 2
        assert found["preparation_us"] == 10 + 4 + 10 + 8
        assert found["preparation_kernels"] == {"rope": 1, "fp8_cast": 1}
        assert found["launches_by_part"]["projections"] == 1
        assert found["us"] == 40 + sum(map(len, self.LAYER))

    def test_prefix_chunks_belong_to_their_layer(self):
        layer = [*self.LAYER, CAUSAL, "gather", PREFIX_CHUNK, "merge"]
        events = trace([layer * 3, ["nvjet", DECODE]])
        found = profiles.per_layer(profiles.layers_of(events))
        assert found["layers"] == 2 and found["launches"] == 6

    def test_no_attention(self):
        assert profiles.layers_of(trace([["rope"]])) == []
        with pytest.raises(ValueError, match="no two causal"):
            profiles.per_layer([])

    def test_problems(self):
        def measured(*preparation):
            layer = ["nvjet_tst", *preparation, "RMSNormKernel"]
            return profiles.per_layer(profiles.layers_of(self.steps(layer)))

        def problems(patched):
            sides = dict(unpatched={"64": unpatched}, patched={"64": patched})
            return profiles.problems("wide, trtllm_mla", sides)

        ours = "_mla_prefill_quantize_fp8_kernel"
        unpatched = measured("rope", "concat", "fp8_cast", "fp8_cast")
        assert problems(measured(ours)) == []
        assert len(problems(unpatched)) == 3
        (slower,) = problems(measured(ours, "another_kernel_with_a_long_name"))
        assert "takes" in slower

    def test_memsets_are_of_the_projections(self):
        measured = profiles.layers_of(self.steps(["Memset (Device)", "rope"]))
        found = profiles.per_layer(measured)
        assert found["launches_by_part"] == {"projections": 1, "preparation": 1}

    def test_ratio_of_medians(self):
        a = np.random.default_rng(5).normal(100, 3, 60)
        ratio, low, high = profiles.ratio_of_medians(a, 0.9 * a)
        assert ratio == pytest.approx(0.9)
        assert 0.85 < low < 0.9 < high < 0.95
        assert profiles.ratio_of_medians([1.0], [2.0]) == (2, 2, 2)

    def test_servers_are_timed_in_turn(self):
        asked, cached = [], 0

        def server(name):
            def generate(request):
                asked.append(name)
                return Answer(seconds=len(asked), cached_tokens=cached)

            spec = SimpleNamespace(name=name)
            return SimpleNamespace(
                spec=spec, generate=generate, flush_cache=lambda: None
            )

        pair = [server("a"), server("b")]
        seconds = profiles.time_to_first_token(pair, 16, 4, 3)
        assert "".join(asked) == "abba" + "abbaab"
        assert seconds == [[5, 8, 9], [6, 7, 10]]
        with pytest.raises(RuntimeError, match="0 cached tokens .* behind 64"):
            profiles.time_to_first_token(pair, 16, 4, 3, prefix=64)
        cached = 64
        assert len(profiles.time_to_first_token(pair, 16, 4, 3, prefix=64)[1]) == 3

    def test_throughput(self, monkeypatch):
        now, asked = [0.0], []
        monkeypatch.setattr(profiles.time, "monotonic", lambda: now[0])

        def server(name, seconds):
            def generate_all(requests, concurrency):
                asked.append((name, [request.input_ids for request in requests]))
                now[0] += seconds
                return [Answer() for request in requests]

            return SimpleNamespace(generate_all=generate_all, flush_cache=lambda: None)

        pair = [server("a", 2.0), server("b", 1.0)]
        assert profiles.throughput(pair, 16, 100, 5, 3) == [[250.0] * 3, [500.0] * 3]
        assert "".join(name for name, _ in asked) == "abbaabba"
        # Both are asked the same, and nothing twice.
        assert asked[0][1] == asked[1][1] and asked[0][1] != asked[2][1]
        assert {len(ids) for _, requests in asked for ids in requests} == {100}


RESULTS = Path(__file__).resolve().parents[2] / "docs/e2e/results.json"


class TestReport:
    def test_committed_page_is_that_of_the_committed_results(self):
        results = json.loads(RESULTS.read_text())
        page = (RESULTS.parent / "README.md").read_text()
        assert report.markdown(results) == page and "Not complete" not in page

    def test_committed_results_are_ok(self):
        results = json.loads(RESULTS.read_text())
        assert results and set(results) <= set(suite.SECTIONS)
        for section in results.values():
            assert not section["problems"] and not suite.failures(section)

    def test_profile(self):
        def layers(preparation):
            kernels = ["nvjet", *preparation, "norm"]
            one_pass = [*kernels, CAUSAL] * 4
            return profiles.per_layer(profiles.layers_of(trace([one_pass])))

        sides = {"unpatched": layers(["cast"] * 9), "patched": layers(["fused"])}
        one = {
            "layers": {side: {"64": x, "64 behind 8": x} for side, x in sides.items()},
            "time_to_first_token": {
                "64": dict(unpatched=[0.2, 0.4, 0.6], patched=[0.1, 0.3, 0.5])
            },
            "throughput": dict(unpatched=[100.0], patched=[125.0]),
            "throughput_prompt": 16,
            "model_layers": 8,
        }
        models = {model: {"trtllm_mla": one} for model in report.MODELS}
        machine = dict(gpu="G", gpus=1, torch="t", triton="t", sglang="s", quick=False)
        section = dict(machine=machine, problems=[], profile=models)
        page = report.markdown({"profile": section})
        assert "Not complete" not in page
        assert "| 64 behind 8 | 11 -> 3 | 9 -> 1 | 126 -> 15 us | 8.40 |" in page
        assert "| 8 | 64 | 400.00 ms | 300.00 ms | 25.0% (" in page
        assert "| 100 tokens/s | 125 tokens/s | 25.0% (25.0% to 25.0%) |" in page
        # 111 us of 155 and attention's 0.17.
        assert "| 111 us | 155 us | 0 us | 71.5% |" in page

    def test_a_section_that_broke_off_is_named(self):
        section = dict(
            machine=dict(
                gpu="G", gpus=1, torch="t", triton="t", sglang="s", quick=True
            ),
            problems=["profile: it broke"],
        )
        page = report.markdown({"profile": section})
        assert "Not complete" in page and "it broke" in page and "--quick" in page


class TestResults:
    MACHINE = dict(gpu="G", gpus=1, torch="t", triton="t", sglang="s", quick=False)

    def results(self, tmp_path, **jobs):
        return suite.Results(tmp_path / "results.json", jobs, self.MACHINE)

    def on_file(self, tmp_path):
        return json.loads((tmp_path / "results.json").read_text())

    def test_file_has_what_is_done(self, tmp_path, capsys):
        results = self.results(tmp_path, load=["storm", "retractions"])

        def storm():
            yield {"load": {"x": {"n": 1}}, "problems": []}
            # A run that is cut short here keeps the part before.
            assert self.on_file(tmp_path)["load"]["load"] == {"x": {"n": 1}}
            yield {"load": {"y": {"n": 2}}, "problems": ["a leak"], "answers": {"m": 1}}

        results.run("load", "storm", storm)
        section = self.on_file(tmp_path)["load"]
        assert section["load"] == {"x": {"n": 1}, "y": {"n": 2}}
        assert section["problems"] == ["a leak"]
        assert section["waiting"] == ["retractions"] and "answers" not in section
        assert results.answers == {"load": {"m": 1}}
        assert "storm: NOT OK" in capsys.readouterr().out

    def test_a_job_that_raises_is_a_problem(self, tmp_path, capsys):
        results = self.results(tmp_path, kill=["kill"])
        results.run("kill", "kill", lambda: 1 / 0)
        section = self.on_file(tmp_path)["kill"]
        assert section["problems"] == ["kill: ZeroDivisionError: division by zero"]
        assert section["waiting"] == []

    def test_other_sections_stay(self, tmp_path):
        first = self.results(tmp_path, kill=["kill"])
        first.run("kill", "kill", lambda: {"kill": {"n": 1}, "problems": []})
        second = self.results(tmp_path, load=["storm"])
        second.run("load", "storm", lambda: {"problems": []})
        assert self.on_file(tmp_path)["kill"]["kill"] == {"n": 1}
        # And what runs again replaces its last results.
        third = self.results(tmp_path, kill=["kill"])
        third.run("kill", "kill", lambda: {"problems": ["x"]})
        assert "kill" not in self.on_file(tmp_path)["kill"]


def test_no_server_outlives_the_suite(tmp_path):
    """Processes that a server started, too, when the suite is ended by a signal."""
    (tmp_path / "mla_standin").mkdir()
    (tmp_path / "mla_standin/__init__.py").touch()
    (tmp_path / "mla_standin/launch_server.py").write_text(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "time.sleep(99)\n"
    )
    code = """
        import os, pathlib, signal, sys, time
        from e2e import __main__ as suite, servers
        servers.TEST = sys.argv[1]
        folder = pathlib.Path(sys.argv[1])
        server = servers.Server(servers.ServerSpec("s", True, folder, folder), folder)
        server.start()
        while len(server.processes()) < 2:
            time.sleep(0.05)
        print(*(process.pid for process in server.processes()), flush=True)
        signal.signal(signal.SIGTERM, suite.end)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    """
    code = "import sglang_cpu; sglang_cpu.install()\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 128 + 15, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


class TestSuite:
    def test_pooled_by_model(self, monkeypatch):
        """One comparison for each model, of all that its servers were asked."""
        values = [-1.0, -2.0, -3.0]
        answer = dict(
            group="g",
            start=0,
            length=4,
            logprobs=values,
            output_ids=[],
            output_logprobs=[],
            cached_tokens=0,
            seconds=0.0,
        )
        result = {
            "scenario": "single",
            "answers": {f"prompt {i}": {**answer, "group": str(i)} for i in range(9)},
            "problems": [],
        }

        class References:
            """Stands in for transformers' answers, which the servers' equal here."""

            def get(self, kind, dtype):
                return None, {
                    f"prompt {i}": [x + 0.1 for x in values] for i in range(9)
                }

        runs = {
            f"tokenspeed_mla, {case}: single": dict(patched=result, unpatched=result)
            for case in ("chunked prefill off", "chunked prefill 512")
        }
        one = {"trtllm_mla, GLM: single": dict(patched=result, unpatched=result)}
        found = suite.pool_all(References(), {"deepseek_v3": runs, "glm": one})
        assert [c["prompts"] for c in found["comparisons"]] == [9, 9]
        scenarios, everything, glm = found["pooled"]
        assert scenarios["scenario"] == "deepseek_v3: all single"
        assert everything["prompts"] == 18 and everything["independent"] == 9
        assert glm["scenario"] == "glm: trtllm_mla, GLM" and glm["prompts"] == 9
        for judged in found["comparisons"] + found["pooled"]:
            assert judged["ok"] and judged["patched_distance"] == pytest.approx(0.1)

    def test_failures_and_what_is_not_done(self):
        base = compare._comparison("distance", "single", "b")
        undecided = base | {"verdict": "undecided", "reason": "few prompts"}
        assert suite.failures({"problems": [], "comparisons": [undecided]}) == []
        assert suite.failures({"problems": [], "pooled": [undecided]})
        assert suite.failures({"problems": [], "waiting": ["kill"]}) == [
            "kill: not done"
        ]

    def test_every_case_has_a_name_of_its_own(self):
        cases = suite.one_gpu_cases() + suite.two_gpu_cases((0, 1))
        names = [(case.name, case.backend) for case in cases]
        assert len(set(names)) == len(names)
        assert {case.backend for case in cases} == {suite.TOKENSPEED, suite.TRTLLM}
        assert {case.model for case in cases} <= set(models.KINDS)

    def test_without_a_gpu(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert suite.main([]) == 2
        assert "needs GPU 0" in capsys.readouterr().err
