"""The end-to-end comparison: can it fail, and does it report what is so."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from e2e import compare, pairs
from e2e import reference as reference_module
from e2e.compare import Family, Prompt
from e2e.reference import Reference
from e2e.servers import Answer
from mla_standin import models
from transformers import AutoModelForCausalLM

VOCAB = models.KINDS["tiny"]["vocab_size"]
PAGE = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models here are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StandInServer:
    """Stands in for e2e.servers.Server, whose real one needs a GPU.

    Log-probabilities are transformers' own plus noise; the cache follows SGLang's rule:
    whole pages of what was asked before, up to logprob_start and short of the last
    token. `fault` may change an answer or drop it.
    """

    def __init__(self, reference, noise=0.05, batch_noise=0.0, seed=0, fault=None):
        self.reference = reference
        self.noise, self.batch_noise, self.seed = noise, batch_noise, seed
        self.fault = fault or (lambda request, answer: answer)
        self.flushes = 0
        self.flush_cache()

    def flush_cache(self):
        self.flushes += 1
        self.pages = set()

    def generate_all(self, requests, concurrency=64):
        answers = []
        for i, request in enumerate(requests):
            answer = self._answer(request, i if concurrency > 1 else 0)
            answers.append(self.fault(request, answer))
        return [answer for answer in answers if answer is not None]

    def _answer(self, request, place):
        ids = request.input_ids
        outputs = self.reference.greedy(ids, request.max_new_tokens)
        logprobs = self.reference.logprobs(ids)[request.logprob_start :]
        output_logprobs, _ = self.reference.score(ids, outputs)
        rng = np.random.default_rng([self.seed, len(ids), *ids[:4]])
        batch = np.random.default_rng([self.seed, place, len(ids)])

        def noisy(values):
            n = len(values)
            own = self.noise * rng.standard_normal(n)
            return (values + own + self.batch_noise * batch.normal(size=n)).tolist()

        limit = min(len(ids) - 1, request.logprob_start)
        cached = 0
        while cached + PAGE <= limit and tuple(ids[: cached + PAGE]) in self.pages:
            cached += PAGE
        for end in range(PAGE, len(ids) + 1, PAGE):
            self.pages.add(tuple(ids[:end]))
        return Answer(
            output_ids=outputs,
            output_logprobs=noisy(output_logprobs),
            input_logprobs=noisy(logprobs),
            cached_tokens=cached,
            finish="length",
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.make_model("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return Reference(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def exact(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    @torch.inference_mode()
    def logprobs(ids):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return logprobs


def some_ids(n, seed=0):
    return np.random.default_rng(seed).integers(VOCAB, size=n).tolist()


def of_next_tokens(logprobs, ids):
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


class TestReference:
    @pytest.mark.parametrize(
        "dtype, worst", [(torch.float32, 1e-4), (torch.bfloat16, 0.5)]
    )
    def test_logprobs_equal_a_float64_forward(self, folder, exact, dtype, worst):
        ids = some_ids(300)
        found = Reference(folder, "cpu", dtype).logprobs(ids)
        wanted = of_next_tokens(exact(ids), ids)
        assert len(found) == 299
        assert np.abs(found - wanted).max() < worst
        # Enough to tell one token's place from the next.
        assert np.abs(found[1:] - wanted[:-1]).mean() > 0.5

    def test_dtypes_are_what_was_asked_for(self, folder):
        for dtype in (torch.bfloat16, torch.float32):
            model = Reference(folder, "cpu", dtype).model
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert model.base_model.rotary_emb.inv_freq.dtype == torch.float32

    def test_pieces_of_a_long_prompt_equal_the_whole(self, tiny, monkeypatch):
        ids = some_ids(150)
        whole = tiny.logprobs(ids), tiny.score(ids[:100], ids[100:])
        monkeypatch.setattr(reference_module, "_QUERY_ROWS", 32)
        monkeypatch.setattr(reference_module, "_LOGITS", 20 * VOCAB)
        np.testing.assert_allclose(tiny.logprobs(ids), whole[0], atol=1e-4)
        np.testing.assert_allclose(
            tiny.score(ids[:100], ids[100:]), whole[1], atol=1e-4
        )

    def test_greedy_is_the_best_token_after_each(self, tiny, exact, monkeypatch):
        ids = some_ids(40)
        chosen = tiny.greedy(ids, 12)
        best = exact(ids + chosen)[39:-1].argmax(-1).tolist()
        assert chosen == best
        monkeypatch.setattr(reference_module, "_QUERY_ROWS", 16)
        assert tiny.greedy(ids, 12) == chosen
        assert tiny.greedy(ids, 0) == []

    def test_score_of_a_given_continuation(self, tiny, exact):
        ids, outputs = some_ids(20), some_ids(5, seed=9)
        logprobs, margins = tiny.score(ids, outputs)
        wanted = exact(ids + outputs)[19:-1]
        chosen = wanted[torch.arange(5), outputs]
        np.testing.assert_allclose(logprobs, chosen, atol=1e-4)
        np.testing.assert_allclose(margins, wanted.amax(1) - chosen, atol=1e-4)
        assert min(margins) > 0
        assert tiny.score(ids, tiny.greedy(ids, 5))[1] == pytest.approx([0] * 5)
        assert tiny.score(ids, []) == ([], [])

    def test_a_single_token_has_no_logprobs_but_a_continuation(self, tiny):
        assert tiny.logprobs([5]) == []
        assert tiny.score([5], tiny.greedy([5], 3))[1] == pytest.approx([0] * 3)

    def test_says_what_it_takes(self, tiny):
        with pytest.raises(ValueError, match="empty prompt; give at least one"):
            tiny.logprobs([])
        with pytest.raises(ValueError, match=f"takes 0 to {VOCAB - 1}"):
            tiny.logprobs([1, VOCAB])
        with pytest.raises(ValueError, match="from -1 to 1"):
            tiny.greedy([1, -1], 1)

    def test_a_checkpoint_with_kv_scales_is_the_same_model(
        self, folder, tiny, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(models.KINDS, "scaled", models.KINDS["tiny"])
        scaled = models.make_model("scaled", tmp_path / "scaled")
        assert "quantization_config" in (scaled / "config.json").read_text()
        ids = some_ids(30)
        assert Reference(scaled, "cpu", torch.float32).logprobs(ids) == tiny.logprobs(
            ids
        )


class TestPrompts:
    def test_lengths_seeds_and_vocabulary(self):
        made = compare.prompts(1, 4096)
        assert [len(p.input_ids) for p in made] == list(compare.LENGTHS)
        assert made == compare.prompts(1, 4096)
        assert made[-1].input_ids != compare.prompts(2, 4096)[-1].input_ids
        ids = np.array(made[-1].input_ids)
        assert ids.min() == 0 and ids.max() == 4095
        assert all(type(i) is int for i in made[-1].input_ids)

    def test_mixed_are_of_many_lengths(self):
        made = compare.mixed(1, VOCAB)
        lengths = [len(p.input_ids) for p in made]
        assert len(made) == len({p.name for p in made}) == 64
        assert min(lengths) >= 2 and max(lengths) <= 4096
        assert sum(n < 64 for n in lengths) > 10 < sum(n > 512 for n in lengths)

    def test_families_ask_from_the_last_whole_page(self):
        for family in compare.shared_prefix(1, VOCAB):
            prefix = family.prefix.input_ids
            for prompt, n in zip(family.prompts, compare.SUFFIXES):
                assert prompt.input_ids[: len(prefix)] == prefix
                assert len(prompt.input_ids) == len(prefix) + n
                assert prompt.start == len(prefix) // 64 * 64
                assert prompt.group == family.prefix.name

    def test_all_names_differ(self):
        names = [
            p.name
            for seed in compare.SEEDS
            for p in (
                *compare.prompts(seed, VOCAB),
                *compare.mixed(seed, VOCAB),
                *(q for f in compare.shared_prefix(seed, VOCAB) for q in f.prompts),
            )
        ]
        assert len(names) == len(set(names))

    def test_one_seed_of_families_fits_in_the_servers_pool(self):
        families = compare.shared_prefix(1, VOCAB)
        assert sum(family.tokens() for family in families) < 57344


LENGTHS = (1, 2, 3, 17, 63, 64, 65, 100)


class TestScenarios:
    def test_single_and_concurrent(self, tiny):
        asked = compare.prompts(1, VOCAB, LENGTHS)
        server = StandInServer(tiny, noise=0.0)
        for scenario in (compare.single, compare.concurrent):
            flushes = server.flushes
            result = scenario(server, asked, new_tokens=4)
            assert server.flushes > flushes
            assert result["problems"] == []
            assert list(result["answers"]) == [p.name for p in asked]
            wanted = compare.expected(tiny, asked)
            for prompt in asked:
                answer = result["answers"][prompt.name]
                assert answer["logprobs"] == pytest.approx(wanted[prompt.name])
                assert len(answer["output_ids"]) == len(answer["output_logprobs"]) == 4
            json.dumps(result, allow_nan=False)

    def test_greedy_asks_for_its_output_alone(self, tiny):
        asked = compare.prompts(1, VOCAB, LENGTHS)
        result = compare.greedy(StandInServer(tiny), asked, 5)
        assert result["problems"] == []
        for answer in result["answers"].values():
            assert answer["logprobs"] == []
            assert len(answer["output_ids"]) == 5

    def families(self):
        return compare.shared_prefix(1, VOCAB, (64, 100, 200), (2, 65))

    @pytest.mark.parametrize("room, turns", [(57344, 1), (900, 2), (640, 3)])
    def test_prefix_hits(self, tiny, room, turns):
        families = self.families()
        server = StandInServer(tiny, noise=0.0)
        result = compare.prefix_hits(server, families, room=room)
        assert result["problems"] == []
        assert server.flushes == 1 + turns
        asked = [prompt for family in families for prompt in family.prompts]
        wanted = compare.expected(tiny, asked)
        for prompt in asked:
            answer = result["answers"][prompt.name]
            assert answer["cached_tokens"] == answer["start"] == prompt.start > 0
            assert answer["logprobs"] == pytest.approx(wanted[prompt.name], abs=1e-6)
            n = len(prompt.input_ids) - prompt.start - 1
            assert len(answer["logprobs"]) == n

    def test_a_family_beyond_the_pool_is_refused(self, tiny):
        with pytest.raises(ValueError, match="prefix 64 takes .* room=100"):
            compare.prefix_hits(StandInServer(tiny), self.families(), room=100)

    def test_a_cache_that_misses_is_a_problem(self, tiny):
        def cold(request, answer):
            return replace(answer, cached_tokens=0)

        server = StandInServer(tiny, fault=cold)
        result = compare.prefix_hits(server, self.families())
        assert len(result["problems"]) == 6
        assert "prefix 100 + 2: 0 tokens came from the cache, not 64" in "\n".join(
            result["problems"]
        )
        # Ranks have a cache each: some prompts may miss it, but not all.
        result = compare.prefix_hits(server, self.families(), hits=False)
        (problem,) = result["problems"]
        assert "no prompt found its prefix" in problem

        def often_cold(request, answer):
            odd = len(request.input_ids) % 2
            return replace(answer, cached_tokens=0) if odd else answer

        server = StandInServer(tiny, fault=often_cold)
        result = compare.prefix_hits(server, self.families(), hits=False)
        assert result["problems"] == []
        hits = [x["cached_tokens"] for x in result["answers"].values()]
        assert 0 in hits and any(hits)

    @pytest.mark.parametrize(
        "change, said",
        [
            (
                lambda a: a.input_logprobs.__setitem__(3, math.nan),
                "first, at 3, is nan",
            ),
            (lambda a: a.input_logprobs.__setitem__(3, None), "first, at 3, is None"),
            (lambda a: a.output_logprobs.__setitem__(1, -math.inf), "at 1, is -inf"),
            (lambda a: a.input_logprobs.__setitem__(3, 0.5), "or positive; the first"),
            (lambda a: a.input_logprobs.pop(), "15 input_logprobs where 16"),
            (lambda a: a.input_logprobs.append(-1.0), "17 input_logprobs where 16"),
            (lambda a: a.output_logprobs.clear(), "0 output_logprobs where 4"),
            (lambda a: a.output_ids.pop(), "3 output_ids where 4"),
            (lambda a: setattr(a, "error", "500: CUDA error"), "500: CUDA error"),
            (lambda a: setattr(a, "finish", "abort"), "finished with 'abort'"),
            (lambda a: setattr(a, "cached_tokens", 64), "64 tokens came from the cac"),
        ],
    )
    def test_a_wrong_answer_is_named_and_left_out(self, tiny, change, said):
        def fault(request, answer):
            if len(request.input_ids) == 17:
                change(answer)
            return answer

        asked = compare.prompts(1, VOCAB, LENGTHS)
        server = StandInServer(tiny, fault=fault)
        result = compare.single(server, asked, new_tokens=4)
        (problem,) = result["problems"]
        assert problem.startswith("single, seed 1, 17 tokens: ") and said in problem
        assert len(result["answers"]) == len(asked) - 1

        good = compare.single(StandInServer(tiny), asked, new_tokens=4)
        wanted = compare.expected(tiny, asked)
        judged = compare.compare(result, good, wanted, backend="b")
        assert not judged["ok"]
        (failure,) = [f for f in compare.failures([judged]) if "17 tokens" in f]
        assert said in failure

    def test_a_dropped_answer_is_a_problem(self, tiny):
        server = StandInServer(tiny, fault=lambda request, answer: None)
        result = compare.single(server, compare.prompts(1, VOCAB, (2,)))
        assert result["problems"] == ["single: 0 answers to 1 requests"]

    def test_two_prompts_of_one_name_are_refused(self, tiny):
        twice = [Prompt("a", [1, 2]), Prompt("a", [3, 4])]
        with pytest.raises(ValueError, match="same name"):
            compare.single(StandInServer(tiny), twice)


class TestStatistics:
    def test_distance(self):
        found = compare.distance([-1.0, -2.0, -3.0], [-1.0, -2.5, -1.5])
        assert found["mean"] == pytest.approx(2 / 3)
        assert found["rms"] == pytest.approx(math.sqrt(2.5 / 3))
        assert found["max"] == 1.5 and found["tokens"] == 3

    @pytest.mark.parametrize(
        "a, b, said",
        [
            ([-1.0], [-1.0, -2.0], "1 log-probabilities against 2"),
            ([-1.0, math.nan], [-1.0, -2.0], "log-probability 1 or its reference"),
            ([-math.inf], [-1.0], "not finite"),
            ([], [], "no log-probabilities"),
        ],
    )
    def test_distance_of_what_has_none(self, a, b, said):
        with pytest.raises(ValueError, match=said):
            compare.distance(a, b)

    def test_a_constant_ratio_has_an_exact_interval(self):
        unpatched = np.linspace(0.05, 0.2, 40)
        found = compare.paired(1.1 * unpatched, unpatched)
        assert found["ratio"] == pytest.approx(1.1)
        assert found["ratio_ci"] == pytest.approx([1.1, 1.1])
        assert found["difference"] == pytest.approx(0.1 * unpatched.mean())

    def test_interval_of_the_mean_difference_is_the_normal_one(self):
        rng = np.random.default_rng(3)
        unpatched = rng.uniform(1, 2, 400)
        patched = unpatched + rng.normal(0.01, 0.1, 400)
        low, high = compare.paired(patched, unpatched)["difference_ci"]
        gap = patched - unpatched
        half = 1.96 * gap.std(ddof=1) / 20
        assert low == pytest.approx(gap.mean() - half, abs=0.001)
        assert high == pytest.approx(gap.mean() + half, abs=0.001)

    def test_interval_covers_the_truth_19_times_in_20(self):
        rng = np.random.default_rng(5)
        covered = 0
        for trial in range(200):
            unpatched = rng.uniform(1, 2, 50)
            patched = unpatched * rng.normal(1.05, 0.2, 50)
            found = compare.paired(patched, unpatched, resamples=500, seed=trial)
            covered += found["ratio_ci"][0] <= 1.05 <= found["ratio_ci"][1]
        assert 0.88 <= covered / 200 <= 0.99

    def test_weights_and_groups(self):
        found = compare.paired([1.0, 3.0], [1.0, 1.0], weights=[3, 1])
        assert found["patched"] == 1.5
        # Suffixes of one prefix move together: no more evidence than one of each.
        rng = np.random.default_rng(0)
        one = rng.uniform(1, 2, 20)
        four, names = np.repeat(one, 4), np.repeat([f"f{i}" for i in range(20)], 4)
        grouped = compare.paired(four, np.ones(80), groups=names)
        alone = compare.paired(one, np.ones(20))
        blind = compare.paired(four, np.ones(80))
        assert grouped["independent"] == 20
        assert np.ptp(grouped["ratio_ci"]) == pytest.approx(
            np.ptp(alone["ratio_ci"]), rel=0.1
        )
        assert np.ptp(blind["ratio_ci"]) < 0.7 * np.ptp(alone["ratio_ci"])

    def test_the_seed_fixes_the_interval(self):
        rng = np.random.default_rng(0)
        a, b = rng.uniform(size=(2, 30))
        assert compare.paired(a, b) == compare.paired(a, b)
        assert compare.paired(a, b) != compare.paired(a, b, seed=1)

    def test_distances_of_zero(self):
        zeros = np.zeros(10)
        assert compare.judge(compare.paired(zeros, zeros))["ok"]
        some = np.where(np.arange(10) < 8, 0.1, 0.0)
        worse = compare.judge(compare.paired(some, zeros))
        assert worse["verdict"] == "larger" and "inf" in worse["reason"]

    def test_what_cannot_be_compared_is_refused(self):
        with pytest.raises(ValueError, match="2 patched values and 1 unpatched"):
            compare.paired([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match="not finite"):
            compare.paired([math.nan], [1.0])

    @pytest.mark.parametrize(
        "ratio, spread, verdict",
        [
            (1.1, 0.02, "larger"),
            (1.1, 0.5, "undecided"),
            (1.0, 0.02, "no larger"),
            (1.015, 0.001, "no larger"),
            (0.9, 0.1, "no larger"),
        ],
    )
    def test_verdicts(self, ratio, spread, verdict):
        rng = np.random.default_rng(1)
        unpatched = rng.uniform(0.05, 0.15, 60)
        patched = unpatched * rng.normal(ratio, spread, 60)
        judged = compare.judge(compare.paired(patched, unpatched))
        assert judged["verdict"] == verdict, judged
        assert judged["ok"] == (verdict == "no larger")

    def test_few_prompts_decide_nothing(self):
        judged = compare.judge(compare.paired([0.1] * 7, [0.1] * 7))
        assert not judged["ok"] and "7 independent prompts" in judged["reason"]


def made_up(noise, seed, asked, truth, outputs=0):
    """A scenario's result whose log-probabilities are `noise` from `truth`."""
    rng = np.random.default_rng(seed)
    answers = {}
    for prompt in asked:
        true = np.asarray(truth[prompt.name])
        answers[prompt.name] = {
            "group": prompt.group or prompt.name,
            "start": prompt.start,
            "length": len(prompt.input_ids),
            "logprobs": (true + noise * rng.standard_normal(len(true))).tolist(),
            "output_ids": rng.integers(VOCAB, size=outputs).tolist(),
            "output_logprobs": rng.normal(size=outputs).tolist(),
            "cached_tokens": prompt.start,
            "seconds": 0.0,
        }
    return {"scenario": "single", "answers": answers, "problems": []}


@pytest.fixture(scope="module")
def asked():
    return [p for seed in compare.SEEDS for p in compare.prompts(seed, VOCAB)]


@pytest.fixture(scope="module")
def truth(asked):
    rng = np.random.default_rng(0)
    return {
        p.name: rng.normal(-8, 2, len(p.input_ids) - 1 - p.start).tolist()
        for p in asked
    }


@pytest.fixture
def unpatched(asked, truth):
    return made_up(0.1, 1, asked, truth)


class TestCompare:
    def test_an_equally_good_server_is_no_larger(self, asked, truth, unpatched):
        judged = compare.compare(
            made_up(0.1, 2, asked, truth), unpatched, truth, backend="trtllm_mla"
        )
        assert judged["ok"], judged
        assert judged["verdict"] == "no larger"
        assert judged["prompts"] == len(asked) - len(compare.SEEDS)
        assert judged["tokens"] == sum(len(x) for x in truth.values())
        # Mean and RMS of a normal error, and of the difference of two.
        assert judged["patched_distance"] == pytest.approx(0.0798, rel=0.01)
        assert judged["patched_rms"] == pytest.approx(0.1, rel=0.01)
        assert judged["apart"] == pytest.approx(0.1128, rel=0.01)
        assert judged["difference_ci"][0] < 0 < judged["difference_ci"][1]
        assert judged["scenario"] == "single" and judged["backend"] == "trtllm_mla"
        json.dumps(judged, allow_nan=False)

    @pytest.mark.parametrize("factor, ok", [(1.1, False), (1.03, False), (0.9, True)])
    def test_a_distance_that_is_larger_is_judged_so(
        self, asked, truth, unpatched, factor, ok
    ):
        patched = made_up(0.1 * factor, 2, asked, truth)
        judged = compare.compare(patched, unpatched, truth, backend="b")
        assert judged["ok"] == ok, judged
        if factor == 1.1:
            assert judged["verdict"] == "larger"
            assert "patched / unpatched = 1.1" in compare.failures([judged])[0]

    def test_one_prompt_gone_wrong_is_found(self, asked, truth, unpatched):
        patched = made_up(0.1, 2, asked, truth)
        answer = patched["answers"]["seed 2, 65 tokens"]
        answer["logprobs"] = answer["logprobs"][1:] + answer["logprobs"][:1]
        judged = compare.compare(patched, unpatched, truth, backend="b")
        assert not judged["ok"]
        (stray,) = [p for p in judged["problems"] if p.startswith("stray: ")]
        assert "seed 2, 65 tokens: distance 2." in stray

    def test_short_prompts_gone_worse_are_found(self, asked, truth, unpatched):
        patched = made_up(0.1, 2, asked, truth)
        for name, answer in patched["answers"].items():
            if 1 < answer["length"] < 20:
                gap = np.subtract(answer["logprobs"], truth[name])
                answer["logprobs"] = (truth[name] + 3 * gap).tolist()
        judged = compare.compare(patched, unpatched, truth, backend="b")
        assert judged["verdict"] == "problems"
        assert "with prompts weighing the same" in judged["problems"][0]

    def test_a_server_of_another_model_is_found(self, asked, truth):
        both = [made_up(3.0, seed, asked, truth) for seed in (1, 2)]
        judged = compare.compare(*both, truth, backend="b")
        assert not judged["ok"] and "same model" in judged["problems"][-1]

    def test_prompts_that_only_one_answered(self, asked, truth, unpatched):
        patched = made_up(0.1, 2, asked, truth)
        del patched["answers"]["seed 1, 2 tokens"]
        judged = compare.compare(patched, unpatched, truth, backend="b")
        assert judged["problems"] == ["seed 1, 2 tokens: answered by one server only"]

    def test_the_reference_must_have_the_same_tokens(self, asked, truth, unpatched):
        with pytest.raises(ValueError, match="must have all prompts"):
            compare.compare(unpatched, unpatched, {}, backend="b")
        short = {name: values[:-1] for name, values in truth.items()}
        with pytest.raises(ValueError, match="both must be of the same tokens"):
            compare.compare(unpatched, unpatched, short, backend="b")

    def test_no_answers_are_no_success(self, truth):
        nothing = {"scenario": "single", "answers": {}, "problems": []}
        judged = compare.compare(nothing, nothing, truth, backend="b")
        assert not judged["ok"] and compare.failures([judged])

    def test_a_result_that_went_through_json_is_the_same(self, asked, truth, unpatched):
        again = json.loads(json.dumps(unpatched))
        assert compare.bit_equal(again, unpatched) == []

    def test_the_whole_way_on_the_stand_in(self, tiny):
        made = [
            Prompt(f"{i}", some_ids(20 + 5 * i, seed=i), group="") for i in range(12)
        ]
        wanted = compare.expected(tiny, made)
        servers = [StandInServer(tiny, noise, seed=7) for noise in (0.05, 0.1)]
        good, bad = (compare.single(server, made, 0) for server in servers)
        assert compare.compare(good, bad, wanted, backend="b")["ok"]
        assert not compare.compare(bad, good, wanted, backend="b")["ok"]


class TestBitEqual:
    def test_equal(self, unpatched):
        judged = compare.compare_off(unpatched, unpatched, backend="b")
        assert judged["ok"] and judged["verdict"] == "bit-equal"

    def test_one_bit(self, unpatched):
        off = json.loads(json.dumps(unpatched))
        values = off["answers"]["seed 3, 500 tokens"]["logprobs"]
        values[7] = float(np.nextafter(values[7], 0))
        judged = compare.compare_off(off, unpatched, backend="b")
        assert not judged["ok"] and judged["verdict"] == "differs"
        assert "seed 3, 500 tokens: logprobs: 1 of 499" in judged["problems"][0]
        assert "the first at 7" in judged["problems"][0]

    def test_a_missing_answer_or_none_at_all(self, unpatched):
        off = json.loads(json.dumps(unpatched))
        del off["answers"]["seed 3, 500 tokens"]
        assert not compare.compare_off(off, unpatched, backend="b")["ok"]
        nothing = {"scenario": "single", "answers": {}, "problems": []}
        assert not compare.compare_off(nothing, nothing, backend="b")["ok"]


class TestConsistency:
    def results(self, tiny, batch_noise, seed=0):
        made = [Prompt(f"{i}", some_ids(10 + 2 * i, seed=i)) for i in range(40)]
        server = StandInServer(tiny, 0.05, batch_noise, seed)
        # Alone, a request is first in its batch.
        alone = compare.single(server, made, 1)
        return alone, compare.concurrent(server, made, 1)

    def test_known_answer(self):
        def result(logprobs, outputs):
            answers = {
                name: {
                    "group": name,
                    "logprobs": values,
                    "output_ids": out,
                }
                for name, values, out in zip("ab", logprobs, outputs)
            }
            return {"scenario": "s", "answers": answers, "problems": []}

        alone = result([[-1.0, -2.0], [-3.0]], [[1, 2], [3]])
        found = compare.consistency(
            alone, result([[-1.0, -2.5], [-3.0]], [[1, 2], [4]])
        )
        assert found["mean"] == pytest.approx(0.5 / 3) and found["max"] == 0.5
        assert found["equal_prompts"] == 0.5 and found["equal_outputs"] == 0.5

    def test_no_worse_and_worse(self, tiny):
        one, other, worse = (
            self.results(tiny, noise, seed)
            for noise, seed in ((0.02, 1), (0.02, 2), (0.04, 3))
        )
        judged = compare.compare_consistency(*one, *other, backend="b")
        assert judged["ok"], judged
        assert judged["patched_equal_outputs"] == 1.0
        judged = compare.compare_consistency(*worse, *other, backend="b")
        assert judged["verdict"] == "larger"
        json.dumps(judged, allow_nan=False)

    def test_a_server_that_never_depends_on_the_batch_sets_the_bar(self, tiny):
        steady, unsteady = self.results(tiny, 0.0), self.results(tiny, 1e-4, seed=1)
        assert compare.compare_consistency(*steady, *steady, backend="b")["ok"]
        assert not compare.compare_consistency(*unsteady, *steady, backend="b")["ok"]

    def test_outputs_that_change_are_found(self, tiny):
        alone, together = self.results(tiny, 0.02)
        changed = json.loads(json.dumps(together))
        for name in list(changed["answers"])[:8]:
            changed["answers"][name]["output_ids"][0] += 1
        judged = compare.compare_consistency(
            alone, changed, alone, together, backend="b"
        )
        assert not judged["ok"]
        assert "a batch changes 20.0% of greedy" in judged["problems"][0]

    def test_a_problem_on_the_way_fails(self, tiny):
        alone, together = self.results(tiny, 0.02)
        fewer = json.loads(json.dumps(alone))
        del fewer["answers"]["3"]
        judged = compare.compare_consistency(
            fewer, together, fewer, together, backend="b"
        )
        assert judged["problems"][0] == "patched: no answer alone to 3"

        broken = together | {"problems": ["concurrent, 3: 500"]}
        judged = compare.compare_consistency(
            alone, broken, alone, together, backend="b"
        )
        assert judged["problems"] == ["concurrent, 3: 500"]


class TestGreedy:
    def scored(self, rng, result, far):
        """Scores in which a share `far` of the tokens is no near tie."""
        made = {}
        for name, answer in result["answers"].items():
            n = len(answer["output_ids"])
            margins = np.where(rng.random(n) < far, 1.0, 0.0)
            made[name] = {"logprobs": [-1.0] * n, "margins": margins.tolist()}
        return made

    def test_known_answer(self):
        result = {
            "answers": {"a": {"output_ids": [1, 2, 3, 4]}, "b": {"output_ids": [5, 6]}}
        }
        scored = {
            "a": {"margins": [0.0, 0.05, 0.0, 0.3]},
            "b": {"margins": [0.0, 0.0]},
        }
        found = compare.agreement(result, scored)
        assert found["equal"] == pytest.approx(4 / 6)
        assert found["near"] == pytest.approx(5 / 6)
        assert found["before_divergence"] == pytest.approx(3 / 6)
        assert found["max_margin"] == 0.3

    def test_margins_must_fit(self):
        result = {"answers": {"a": {"output_ids": [1, 2]}}}
        with pytest.raises(ValueError, match="1 margins of 2 tokens"):
            compare.agreement(result, {"a": {"margins": [0.0]}})
        with pytest.raises(ValueError, match="not finite"):
            compare.agreement(result, {"a": {"margins": [0.0, math.nan]}})
        with pytest.raises(ValueError, match="no scores of 'a'"):
            compare.agreement(result, {})

    @pytest.mark.parametrize("far, ok", [(0.05, True), (0.02, True), (0.2, False)])
    def test_compare(self, asked, truth, far, ok):
        rng = np.random.default_rng(0)
        patched, unpatched = (made_up(0, s, asked, truth, outputs=16) for s in (1, 2))
        judged = compare.compare_greedy(
            patched,
            unpatched,
            self.scored(rng, patched, far),
            self.scored(rng, unpatched, 0.05),
            backend="b",
        )
        assert judged["ok"] == ok, judged
        assert judged["tokens"] == 16 * len(asked)
        assert judged["patched_near"] == pytest.approx(1 - far, abs=0.02)
        if not ok:
            assert judged["verdict"] == "larger"

    def test_the_whole_way_on_the_stand_in(self, tiny):
        made = compare.prompts(1, VOCAB, LENGTHS)
        good = compare.greedy(StandInServer(tiny), made, 6)

        def other_token(request, answer):
            answer.output_ids = [(i + 1) % VOCAB for i in answer.output_ids]
            return answer

        bad = compare.greedy(StandInServer(tiny, fault=other_token), made, 6)
        scored = [compare.scores(tiny, result, made) for result in (good, bad)]
        judged = compare.compare_greedy(good, good, scored[0], scored[0], backend="b")
        assert judged["ok"] and judged["patched_equal"] == 1.0
        judged = compare.compare_greedy(bad, good, *scored[::-1], backend="b")
        assert not judged["ok"] and judged["patched_near"] < 0.2


class TestTable:
    def test_rows_and_failures(self, asked, truth, unpatched):
        worse = made_up(0.12, 2, asked, truth, outputs=4)
        scored = compare_scores(worse)
        comparisons = [
            compare.compare(unpatched, unpatched, truth, backend="trtllm_mla"),
            compare.compare(worse, unpatched, truth, backend="tokenspeed_mla"),
            compare.compare_off(unpatched, unpatched, backend="trtllm_mla"),
            compare.compare_greedy(worse, worse, scored, scored, backend="trtllm_mla"),
        ]
        table = compare.rows(comparisons)
        assert len({tuple(row) for row in table}) == 1
        assert all(type(value) is str for row in table for value in row.values())
        assert table[0]["verdict"] == "no larger"
        assert table[0]["ratio, 95%"] == "1.000 (1.000 to 1.000)"
        assert table[1]["verdict"] == "NOT OK: larger"
        assert table[2]["difference, 95%"] == "-"
        assert table[3]["patched"] == "0.00%"
        found = compare.failures(comparisons)
        assert found[0].startswith("single, tokenspeed_mla, distance: patched / unp")
        assert all("tokenspeed_mla" in failure for failure in found)
        assert compare.failures(comparisons[::2]) == []


def compare_scores(result):
    return {
        name: {"logprobs": [0.0] * 4, "margins": [0.0] * 4}
        for name in result["answers"]
    }


def test_a_familys_share_of_the_pool():
    family = Family(
        Prompt("p", [0] * 100),
        (Prompt("a", [0] * 101, start=64), Prompt("b", [0] * 200, start=64)),
    )
    # Two pages of prefix, then one and three, and one each for what is generated.
    assert family.tokens() == 64 * (2 + 1 + 1 + 3 + 1)


class TestPooled:
    def test_runs_decide_together_what_each_leaves_open(self):
        """Noise that hides in eight prompts does not in eight times sixteen runs."""
        rng = np.random.default_rng(5)
        truth = {f"prompt {i}": rng.normal(-5, 1, 40).tolist() for i in range(8)}

        def run(scale):
            answers = {
                name: {
                    "group": name,
                    "start": 0,
                    "length": 41,
                    "logprobs": (np.add(values, rng.normal(0, scale, 40))).tolist(),
                    "output_ids": [],
                    "output_logprobs": [],
                    "cached_tokens": 0,
                    "seconds": 0.0,
                }
                for name, values in truth.items()
            }
            return {"scenario": "single", "answers": answers, "problems": []}

        def judged(scale):
            sides = {}
            for side, size in (("patched", scale), ("unpatched", 0.1)):
                sides[side] = compare.pooled({f"run {i}": run(size) for i in range(16)})
            names = sides["patched"]["answers"]
            wanted = {name: truth[name.split(": ")[1]] for name in names}
            return compare.compare(**sides, reference=wanted, backend="all")

        same, worse = judged(0.1), judged(0.12)
        assert same["prompts"] == 128 and same["independent"] == 8
        assert same["verdict"] in ("no larger", "undecided")
        assert worse["verdict"] == "larger"
        assert compare.failures([worse], decided=True)

    def test_only_what_is_undecided_may_wait(self):
        base = compare._comparison("distance", "single", "b")
        open_ = base | {"verdict": "undecided", "reason": "few"}
        assert compare.failures([open_]) and not compare.failures([open_], decided=True)
        broken = open_ | {"problems": ["NaN"]}
        assert compare.failures([broken], decided=True) == ["single, b, distance: NaN"]


class TestPairs:
    """What `run_case` asks two servers and makes of it, without the servers' start."""

    SCENARIOS = ("off", "single", "concurrent", "prefix hits", "greedy")
    CASE = pairs.Case("a case", "b", (), SCENARIOS, model="tiny", seeds=3)

    @pytest.fixture(scope="class")
    def references(self, folder):
        questions = pairs.Questions(
            families=compare.shared_prefix(1, VOCAB, (64, 100), (2, 21)),
            singles=compare.prompts(1, VOCAB, (2, 17, 65)),
            mixed=compare.mixed(1, VOCAB, 8, longest=60),
            more=compare.mixed(2, VOCAB, 6, longest=60),
        )
        return pairs.References(lambda kind: folder, questions, "cpu")

    def judged(self, references, patched, unpatched, name):
        """By (scenario, reference)."""
        answers = [
            pairs.ask(server, self.CASE, references.questions, False)
            for server in (patched, unpatched)
        ]
        assert set(answers[0]) == {*self.SCENARIOS, "alone"}
        found = pairs.comparisons_of(self.CASE, name, *answers, references)
        return {(one["scenario"], one["reference"]): one for one in found}

    def servers(self, tiny, noise=0.05, **kw):
        return StandInServer(tiny, noise=noise, seed=1, **kw), StandInServer(tiny)

    def test_every_scenario_is_judged(self, references, tiny):
        pair = self.servers(tiny)
        for name in ("single", "concurrent", "prefix hits"):
            found = self.judged(references, *pair, name)
            assert {against for _, against in found} == {
                "transformers, bfloat16",
                "transformers, float32",
            }
            assert {scenario for scenario, _ in found} == {f"a case: {name}"}
            prompts = {"single": 3, "concurrent": 14, "prefix hits": 4}[name]
            assert {one["prompts"] for one in found.values()} == {prompts}
            # The servers' noise is about float32.
            far, near = (
                found[f"a case: {name}", f"transformers, {dtype}"]["patched_distance"]
                for dtype in ("bfloat16", "float32")
            )
            assert near == pytest.approx(0.05 * math.sqrt(2 / math.pi), rel=0.3)
            assert far > 1.03 * near
            assert not any(one["problems"] for one in found.values())
        (greedy,) = self.judged(references, *pair, "greedy").values()
        assert greedy["kind"] == "greedy" and not greedy["problems"]

    def test_a_patched_server_that_is_worse_is_found(self, references, tiny):
        pair = self.servers(tiny, noise=0.5)
        for name in ("single", "concurrent", "prefix hits"):
            found = self.judged(references, *pair, name)
            assert not any(one["ok"] for one in found.values())

    def test_greedy_choices_are_judged_by_their_own_scores(self, references, tiny):
        def worst(request, answer):
            return replace(answer, output_ids=[0] * len(answer.output_ids))

        pair = StandInServer(tiny, fault=worst), StandInServer(tiny)
        (greedy,) = self.judged(references, *pair, "greedy").values()
        assert greedy["patched_distance"] > 0.5 > greedy["unpatched_distance"]
        assert not greedy["ok"]

    def test_ranks_with_a_cache_each_may_miss_it(self, references, tiny):
        def often_cold(request, answer):
            odd = len(request.input_ids) % 2
            return replace(answer, cached_tokens=0) if odd else answer

        def problems(case):
            server = StandInServer(tiny, fault=often_cold)
            answers = pairs.ask(server, case, references.questions, True)
            return answers["prefix hits"]["problems"]

        case = replace(self.CASE, scenarios=("prefix hits",))
        families = references.questions.families
        assert {len(p.input_ids) % 2 for f in families for p in f.prompts} == {0, 1}
        assert problems(case)
        assert problems(replace(case, hits=False)) == []

    def run(self, references, tiny, monkeypatch, record=(), **changes):
        """`run_case` without servers' processes."""
        calls = [dict(kernel="k", padded=False) | dict(record)]
        monkeypatch.setattr(pairs, "check_record", lambda s: (dict(calls=calls), []))

        def pair(case, stack):
            servers = [StandInServer(tiny, seed=seed) for seed in (0, 1)]
            for server, side in zip(servers, ("unpatched", "patched")):
                server.spec = SimpleNamespace(side=side)
            return servers

        run = SimpleNamespace(
            pair=pair, slots=nullcontext(), several=nullcontext(), quick=True
        )
        case = replace(self.CASE, **changes)
        return pairs.run_case(run, case, references.questions, references)

    def test_what_of_a_case_is_pooled(self, references, tiny, monkeypatch):
        result = self.run(references, tiny, monkeypatch)
        assert set(result["answers"]["tiny"]) == {
            f"b, a case: {name}" for name in ("single", "concurrent", "prefix hits")
        }
        assert set(result["records"]["a case, b"]) == {"patched", "unpatched"}
        assert result["problems"] == [] and len(result["comparisons"]) == 9
        # An error that is known to be there may not be pooled with others.
        other = self.run(references, tiny, monkeypatch, ceiling=9.0)
        assert other["answers"] == {"tiny": {}}

    def test_a_case_that_must_pad(self, references, tiny, monkeypatch):
        case = dict(scenarios=("single",), padding=True)
        result = self.run(references, tiny, monkeypatch, **case)
        assert result["problems"] == ["a case, b: no batch was padded"] * 2
        record = dict(padded=True)
        result = self.run(references, tiny, monkeypatch, record, **case)
        assert result["problems"] == []

    def test_crowds_are_compared_with_the_same_requests_alone(self, references, tiny):
        (same,) = self.judged(references, *self.servers(tiny), "alone").values()
        assert same["ok"] and same["prompts"] == 8
        assert same["scenario"] == "a case: alone against 64 at once"
        pair = self.servers(tiny, batch_noise=0.2)
        (other,) = self.judged(references, *pair, "alone").values()
        assert not other["ok"]

    def test_off_is_compared_bit_for_bit(self, references, tiny):
        alike = StandInServer(tiny), StandInServer(tiny)
        (same,) = self.judged(references, *alike, "off").values()
        assert same["ok"] and same["scenario"] == "a case"
        (other,) = self.judged(references, *self.servers(tiny), "off").values()
        assert not other["ok"]
