"""The end-to-end suite's parts that ask no server: reference, statistics, answers,
records, traces, results and page. `test_e2e_servers.py` has the rest."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from e2e import __main__ as suite
from e2e import compare, page, pairs, profiles, reference
from e2e.servers import ABORTED, Answer, Request, Server, faults
from mla_standin import models
from mla_standin.kernels import CAUSAL, DECODE, PREFIX_CHUNK
from resampling import ratio_of_medians, ratio_of_sums
from transformers import AutoModelForCausalLM

VOCAB = models.KINDS["tiny"]["vocab_size"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.make_model("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("piece", [32, reference.PIECE])
def test_the_reference_equals_a_float64_forward(tiny, monkeypatch, piece):
    monkeypatch.setattr(reference, "PIECE", piece)
    ids = np.random.default_rng(0).integers(VOCAB, size=150).tolist()
    found = reference.Reference(tiny, "cpu", torch.float32).logprobs(ids)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
    assert len(found) == 149
    assert np.abs(np.subtract(found, wanted)).max() < 1e-4
    assert reference.Reference(tiny, "cpu").logprobs([5]) == []


def test_sglang_reads_the_scales_of_the_scaled_checkpoint(tiny, tmp_path, monkeypatch):
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config
    from sglang.srt.layers.radix_attention import RadixAttention

    monkeypatch.setitem(models.KINDS, "scaled", models.KINDS["tiny"])
    scaled = models.make_model("scaled", tmp_path / "scaled")
    tensors = models.load_file(scaled / "model.safetensors")
    # transformers' answers are those for the plain checkpoint.
    for name, tensor in models.load_file(tiny / "model.safetensors").items():
        assert tensor.equal(tensors[name])
    config = json.loads((scaled / "config.json").read_text())
    quantization = ModelOptFp8Config.from_config(config["quantization_config"])
    assert quantization.is_layer_excluded("model.layers.1.self_attn.kv_b_proj")
    prefix = "model.layers.1.self_attn.attn_mha"
    attention = RadixAttention(
        2, 32, 1.0, 2, 1, quant_config=quantization, prefix=prefix
    )
    attention.k_scale.data.copy_(tensors[f"{prefix}.k_scale"])
    attention.v_scale.data.copy_(tensors[f"{prefix}.v_scale"])
    attention.quant_method.process_weights_after_loading(attention)
    scales = attention.k_scale_float, attention.v_scale_float
    assert scales == (models.K_SCALE, models.V_SCALE)


class TestRatio:
    def test_a_constant_ratio_has_an_exact_interval(self):
        old = np.linspace(0.05, 0.2, 40)
        assert ratio_of_sums(1.1 * old, old) == pytest.approx((1.1, 1.1, 1.1))

    def test_covers_the_truth_19_times_in_20(self, monkeypatch):
        monkeypatch.setattr("resampling.RESAMPLES", 500)
        rng = np.random.default_rng(5)
        covered = 0
        for _ in range(200):
            old = rng.uniform(1, 2, 50)
            _, low, high = ratio_of_sums(old * rng.normal(1.05, 0.2, 50), old)
            covered += low <= 1.05 <= high
        assert 0.88 <= covered / 200 <= 0.99

    def test_of_medians(self):
        old = np.random.default_rng(5).normal(100, 3, 60)
        ratio, low, high = ratio_of_medians(0.9 * old, old)
        assert ratio == pytest.approx(0.9)
        assert 0.85 < low < 0.9 < high < 0.95

    def test_values_that_are_not_finite_are_refused(self):
        with pytest.raises(ValueError, match="not finite"):
            ratio_of_sums([1.0, math.nan, 1.0], [1.0, 1.0, 1.0])


def test_prompts_behind_a_prefix_count_as_one_and_as_their_tokens():
    prompts = [
        compare.Prompt(str(i), [1] * 4, 1, "a" if i < 2 else "b") for i in range(3)
    ]
    answers = {str(i): Answer(input_logprobs=[-1.0, -2.0]) for i in range(3)}
    wrong = {**answers, "1": Answer(input_logprobs=[-1.0, -4.0])}
    expected = {str(i): [-9.0, -1.0, -2.5] for i in range(3)}
    found = compare.distances(prompts, [answers, wrong], expected)
    assert {name: list(x) for name, x in found.items()} == {
        "a": [1.0, 2.0, 4, 2],
        "b": [0.5, 0.5, 2, 1],
    }
    assert compare.ratio(found)["ratio"][0] == pytest.approx(2.5 / 1.5, abs=1e-5)


def test_another_token_is_a_difference():
    one, other = ({"a": Answer([token], [-0.5], [-1.0, -2.0])} for token in (5, 6))
    assert compare.bit_equal(one, other)["differing"] == 1


class TestAnswer:
    REQUEST = Request([5, 6, 7], 2, logprob_start=0, rid="r")

    def read(self, inputs=(None, -1.5, -2.5), outputs=(-0.5, -0.25), **meta):
        meta = {
            "id": "r",
            "finish_reason": {"type": "length"},
            "input_token_logprobs": [[x, 5, None] for x in inputs],
            "output_token_logprobs": [[x, 8, None] for x in outputs],
            **meta,
        }
        return Answer.read(self.REQUEST, {"meta_info": meta, "output_ids": [8, 9]})

    def test_a_whole_one_has_no_faults(self):
        answer = self.read()
        assert answer.input_logprobs == [-1.5, -2.5]
        assert answer.output_ids == [8, 9] and answer.output_logprobs == [-0.5, -0.25]
        assert faults(self.REQUEST, answer) == []

    @pytest.mark.parametrize(
        "changes, says",
        [
            # JSON has no NaN: SGLang writes null.
            (dict(inputs=(None, None, -1.0)), "1 of 2 input_logprobs are NaN"),
            (dict(outputs=(-1.0, -math.inf)), "1 of 2 output_logprobs are NaN"),
            (dict(outputs=(0.5, -1.0)), "or positive, the first at 0"),
            (dict(inputs=(None, -1.0)), "1 input_logprobs, not 2"),
            (dict(outputs=(-1.0,)), "1 output_logprobs, not 2"),
            (dict(id="other"), "error: the answer is to 'other'"),
            (dict(finish_reason={"type": "stop"}), "finished by 'stop'"),
        ],
    )
    def test_a_fault_is_named(self, changes, says):
        (found,) = faults(self.REQUEST, self.read(**changes), may_abort=True)
        assert says in found

    @pytest.mark.parametrize("message", ABORTED)
    def test_an_abort_that_was_asked_for_may_be_short_but_not_nan(self, message):
        reason = {"type": "abort", "message": message}
        answer = self.read(inputs=(None, None), outputs=(), finish_reason=reason)
        assert faults(self.REQUEST, answer, may_abort=True) == []
        assert "finished by 'abort'" in faults(self.REQUEST, answer)[0]
        answer = self.read(outputs=(None,), finish_reason=reason)
        assert "NaN" in faults(self.REQUEST, answer, may_abort=True)[0]

    def test_another_abort_is_an_error(self):
        reason = {"type": "abort", "message": "Out of memory"}
        answer = self.read(finish_reason=reason)
        assert faults(self.REQUEST, answer, may_abort=True) == ["error: Out of memory"]


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path / "a server", tmp_path, tmp_path, env={"A": "b"})


@pytest.mark.parametrize("natural", [True, False])
def test_what_each_server_of_a_pair_is_started_with(natural, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs.Run, "model", lambda self, kind: tmp_path)
    trees = SimpleNamespace(unpatched=tmp_path / "before", patched=tmp_path / "after")
    monkeypatch.setattr(pairs, "no_prefill_graphs", lambda site: "--no-graphs")
    run = pairs.Run(trees, tmp_path, quick=True)
    switch = "SGLANG_MLA_FP8_PREFILL"
    composed = {switch: "composed"}
    case = pairs.Case(
        "x", "trtllm_mla", env={"A": "b"}, patched_env=composed, natural=natural
    )
    lse = {"STANDIN_LSE": "natural"} if natural else {}
    for side, site, env in (
        ("unpatched", trees.unpatched, lse),
        ("off", trees.patched, {**lse, switch: "off", f"{switch}_LSE": "e"}),
        ("patched", trees.patched, composed),
    ):
        server = run.server(case, side, (0,))
        assert (server.site, server.env) == (site, {"A": "b", **env})
        assert "--no-graphs" in server.args


class TestRecord:
    ON = "FP8 prefill preparation with the fused producer"
    DECLINED = "FP8 prefill preparation declines a batch: CUDA graph"

    def call(self, **changes):
        fp8 = "float8_e4m3fn"
        return {
            "kernel": "tokenspeed_mla_prefill",
            **dict(q_dtype=fp8, k_dtype=fp8, v_dtype=fp8, contiguous=True),
            **dict(causal=True, padded=True, count=3, tokens=10),
            **changes,
        }

    def check(self, server, *calls, nan=0, late=(), log=ON, hook_on=True):
        server.log.write_text(log)
        for i, call in enumerate(calls):
            record = {"calls": [call], "nan": {"q": 0, "out": nan}, "compiled": []}
            record["late_compiles"] = list(late)
            (server.folder / f"record-{i}.json").write_text(json.dumps(record))
        return pairs.check_record(server, hook_on)

    def test_processes_add_up(self, server):
        calls = self.call(), self.call(count=2), self.call(causal=False, padded=False)
        totals, problems = self.check(server, *calls)
        assert problems == []
        assert totals == {
            "tokenspeed_mla_prefill, causal": [5, 5, 0, 20],
            "tokenspeed_mla_prefill, prefix chunk": [3, 0, 0, 10],
        }

    @pytest.mark.parametrize(
        "changes, more, says",
        [
            (dict(causal=None), {}, "no prefill kernel"),
            (dict(count=2), {}, "no prefill kernel"),
            (dict(q_dtype="bfloat16"), {}, "bfloat16"),
            (dict(contiguous=False), {}, "'contiguous': False"),
            ({}, dict(nan=1), "1 NaN"),
            ({}, dict(late=[["bf16"]]), "compiled by a request"),
            ({}, dict(log="declined, …"), "does not say FP8 on"),
            ({}, dict(hook_on=False), "the log says FP8 on"),
            ({}, dict(log=f"{ON} {DECLINED}"), DECLINED),
        ],
    )
    def test_a_fault_is_found(self, server, changes, more, says):
        (problem,) = self.check(server, self.call(**changes), **more)[1]
        assert says in problem


def trace(steps):
    """A profiler's trace of forward passes: each a list of range names and kernel
    names, in one tuple those of a graph, in the order of the host's calls."""
    events, clock, correlation = [], 0.0, 0

    def add(cat, name, dur, **more):
        event = dict(ph="X", cat=cat, name=name, ts=clock, dur=dur, tid=1, **more)
        events.append(event)

    def launch(*names, call="cudaLaunchKernel"):
        nonlocal clock, correlation
        correlation += 1
        args = dict(correlation=correlation)
        add("cuda_runtime", call, 1.0, args=args)
        # Kernels run later than they are launched, and on another line of the trace.
        for name in names:
            kernel = dict(ph="X", cat="kernel", name=name, ts=clock + 1e4, tid=7)
            events.append({**kernel, "dur": 10.0 + len(name), "args": args})
        clock += 2

    for step in steps:
        for name in step:
            if isinstance(name, tuple):
                launch(*name, call="cudaGraphLaunch")
            elif name.startswith("standin"):
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
    def measured(self, *layer):
        one_pass = ["embedding"] + [*layer, CAUSAL] * 4 + ["nvjet_head", "sample"]
        return profiles.usual_layer(profiles.layers_of(trace([one_pass, one_pass])))

    def test_usual_layer(self):
        found = self.measured("nvjet_tst", "rope", "fp8_cast", "RMSNormKernel")
        assert found["launches"] == 4 and found["preparation_launches"] == 2
        assert found["preparation_us"] == 10 + 4 + 10 + 8
        assert found["us"] == 40 + len("nvjet_tstropefp8_castRMSNormKernel")

    def test_memsets_are_of_the_projections(self):
        assert self.measured("Memset (Device)", "rope")["preparation_launches"] == 1

    def test_prefix_chunks_belong_to_their_layer(self):
        layer = ["rope", "fp8_cast", CAUSAL, "gather", PREFIX_CHUNK, "merge"]
        events = trace([layer * 3, ["nvjet", DECODE]])
        assert profiles.usual_layer(profiles.layers_of(events))["launches"] == 4

    def test_no_attention(self):
        assert profiles.layers_of(trace([["rope"]])) == []

    def test_problems(self):
        unpatched = self.measured("rope", "concat", "fp8_cast", "fp8_cast")
        ours = f"_{profiles.OURS}_fp8_kernel"
        assert profiles.problems("x", unpatched, self.measured(ours)) == []
        assert len(profiles.problems("x", unpatched, unpatched)) == 4
        slower = self.measured(ours, "another_kernel_with_a_long_name")
        (problem,) = profiles.problems("x", unpatched, slower)
        assert "preparation_us" in problem

    def test_passes_in_graphs_and_without(self):
        piece = ("nvjet", "copy_kernel")
        layer = [piece, "copy_kernel", "flashinfer::BatchMLAPagedAttentionKernel"]
        read = functools.partial(profiles.forward_pass, passes=2, layers=4)
        old = read(trace([layer * 4] * 2))
        assert old["launches"] == 12 and old["graphs"] == 4
        assert old["us"] == 15 + 21 + 21 and old["copies_us"] == 21
        assert old["attention_us"] == 10 + len(layer[2])
        new = read(trace([["nvjet", CAUSAL] * 4] * 2))
        assert new["launches"] == 4 * 3 and new["graphs"] == 0
        assert read(trace([])) == {}
        assert profiles.graph_problems("x", old, {**new, "us": 50}) == []
        assert len(profiles.graph_problems("x", new, old)) == 2
        (problem,) = profiles.graph_problems("x", old, {**new, "us": 57})
        assert problem == "x: 57 us, unpatched 57.0"

    def test_servers_are_timed_in_turn_and_the_first_times_dropped(self):
        asked = []

        def measure(server, i):
            asked.append(server)
            return len(asked)

        assert profiles.in_turn("ab", measure, 3, warm=2) == [[5, 8, 9], [6, 7, 10]]
        assert "".join(asked) == "abba" + "abbaab"

    def test_a_prefix_that_is_not_cached_is_not_timed(self):
        server = SimpleNamespace(
            name="a", generate=lambda request: Answer(), flush_cache=lambda: None
        )
        with pytest.raises(RuntimeError, match="0 cached tokens behind 64"):
            profiles.time_to_first_token([server, server], 4, 64, 3)


RESULTS = Path(__file__).resolve().parents[2] / "docs/e2e/results.json"


class TestPage:
    def test_the_committed_page_is_that_of_the_committed_results(self):
        rows = json.loads(RESULTS.read_text())
        assert page.markdown(rows) == (RESULTS.parent / "README.md").read_text()
        assert {row["section"] for row in rows} == set(suite.SECTIONS)
        # On the page, fa3's rows say what is not ok in them.
        others = [s for s in suite.SECTIONS if not s.startswith("fa3")]
        assert page.problems(rows, others) == []
        for row in rows:
            for scenario in page.SCENARIOS:
                if scenario in row and row["section"] in others:
                    assert compare.problems_of("", scenario, row[scenario]) == []

    @pytest.mark.parametrize("section", suite.SECTIONS)
    def test_problems_are_named_and_sections_that_did_not_run(self, section):
        rows = [{"section": section, "problems": ["it broke"]}]
        text = page.markdown(rows)
        assert "- it broke\n" in text
        assert text.count("Not in these results: ") == len(suite.SECTIONS) - 1
        others = [s for s in suite.SECTIONS if s != section]
        assert page.problems(rows, others) == []

    def test_the_projection(self):
        old = dict(launches=9, us=155.0, preparation_launches=7, preparation_us=126.0)
        new = {**old, "preparation_us": 15.0}
        row = dict(model=page.PROJECTED, tokens=64, prefix=8)
        row |= dict(layer=dict(unpatched=old, patched=new))
        # 111 us of 155 and attention's 0.2, and 61 times that.
        assert page._share(row) == "71.5%, 6.8 ms"

    def test_attention_is_taken_off_the_unpatched_first_token(self):
        old = dict(launches=90, us=700.0, copies_us=250.0, attention_us=100.0)
        new = dict(launches=200, us=400.0, copies_us=0.0, attention_us=0.0)
        row = dict(tokens=64, layers=8, layer=dict(unpatched=old, patched=new))
        row["first_token"] = dict(medians=[0.0088, 0.006])
        assert "8.80 ms -> 6.00 ms" in page.graphs([row])
        assert "25.0%" in page.graphs([row])  # of 8.8 - 8 * 0.1


def test_the_results_hold_what_is_done_and_other_sections_rows(tmp_path):
    file = tmp_path / "results.json"

    def run(section, job):
        suite.Results(file, [section], "a machine").run(section, section, job)
        return json.loads(file.read_text())

    def breaks():
        yield {"n": 1, "problems": []}
        # A run that is cut short here keeps the part before.
        assert json.loads(file.read_text())[-1]["n"] == 1
        raise ValueError("it broke")

    run("profile", lambda: [{"n": 2, "problems": []}])
    for rows in run("load", breaks), run("load", breaks):
        assert [row.get("n") for row in rows] == [None, 2, None, 1, None]
        assert page.problems(rows) == ["load: ValueError: it broke"]


def test_prefill_graphs_are_for_their_section_alone(unpatched_sglang):
    flag = pairs.no_prefill_graphs(unpatched_sglang)
    for case in pairs.one_gpu_cases() + pairs.two_gpu_cases():
        assert flag in case.arguments(unpatched_sglang)
    graphs = pairs.Case("graphs", pairs.TRTLLM, **profiles.GRAPHS_CASE)
    assert flag not in graphs.arguments(unpatched_sglang)


def test_every_pair_has_a_name_of_its_own_and_a_model():
    cases = pairs.one_gpu_cases() + pairs.two_gpu_cases()
    assert len({(case.name, case.backend) for case in cases}) == len(cases)
    assert {case.backend for case in cases} == {"fa3", pairs.TOKENSPEED, pairs.TRTLLM}
    assert {case.model for case in cases} <= set(models.KINDS)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main([]) == 2
    assert "needs GPU 0" in capsys.readouterr().err


def test_the_upper_end_of_an_interval_decides():
    row = dict(unpatched=0.1, ratio=[1.0, 0.97, 1.03])
    assert compare.problems_of("pair", "alone", row) == []
    (problem,) = compare.problems_of("pair", "all", row)
    assert "up to 1.02 is right" in problem
