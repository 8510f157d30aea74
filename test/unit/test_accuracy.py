"""The accuracy report: its measures against known answers, and a small run of all."""

import copy
import json
import math

import accuracy
import pytest
import torch
from accuracy import FP8, PATHS, Prepared, Settings, Shape
from mla_harness import round_fp8
from sglang_cpu import HAS_GPU

# A little above the middle of 1 and 1.125: rounding to BF16 first loses which side.
DOUBLE_ROUNDED = 1.0625 + 2**-10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=64,
        max_position_embeddings=128,
    )
    model = DeepseekV3ForCausalLM(config).bfloat16()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            values = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(2 * values * weight.shape[1] ** -0.5)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory, pytestconfig):
    """The folder of a small run, as the command line does it."""
    out = tmp_path_factory.mktemp("docs") / "accuracy"
    arguments = ["--quick", "--model", str(checkpoint), "--out", str(out)]
    arguments += ["--sglang", pytestconfig.getoption("--sglang")]
    assert accuracy.main(arguments) == 0
    return out


@pytest.fixture
def results(report):
    return json.loads((report / "results.json").read_text())


def pooled(results, source, operand, path):
    (found,) = (x for x in results["sources"] if x["name"] == source)
    return accuracy.pooled(found["layers"], operand, path)


def attention(results, source):
    (found,) = (x for x in results["sources"] if x["name"] == source)
    return [layer["attention"] for layer in found["layers"]]


class TestMeasures:
    def test_spacing(self):
        x = torch.tensor([1, -1.9, 0.99, 448, 464, 2**-6, 2**-7, 2**-30, 0])
        wanted = [1 / 8, 1 / 8, 1 / 16, 32, 32, 2**-9, 2**-9, 2**-9, 2**-9]
        assert accuracy.spacing(x).tolist() == wanted

    def test_double_rounding_is_told_from_single(self):
        exact = torch.tensor([DOUBLE_ROUNDED, -3.0], dtype=torch.float64)
        twice = round_fp8(exact.bfloat16())
        assert twice.tolist() == [1.0, -3.0]
        found = accuracy.compare(twice, exact)
        assert (found["correct"], found["inside"]) == (1, 2)
        assert found["max_ulps"] == pytest.approx(0.5 + 8 * 2**-10, abs=1e-12)
        assert found["squared_error"] == pytest.approx((0.0625 + 2**-10) ** 2)
        once = accuracy.compare(round_fp8(exact), exact)
        assert round_fp8(exact).tolist() == [1.125, -3.0]
        assert once["correct"] == 2
        assert once["max_ulps"] == pytest.approx(0.5 - 8 * 2**-10, abs=1e-12)
        assert once["squared_error"] < found["squared_error"]

    def test_a_tie_is_in_the_bin_that_ends_at_half(self):
        exact = torch.tensor([1.0625, 1.0, DOUBLE_ROUNDED], dtype=torch.float64)
        counts = accuracy.compare(torch.ones(3).to(FP8), exact)["histogram"]
        filled = {i: count for i, count in enumerate(counts) if count}
        assert filled == {0: 1, 49: 1, 50: 1}

    def test_overflow_is_counted_apart(self):
        exact = torch.tensor([464.0, 465.0, -1e4, 2.25]).double()
        cast = accuracy.compare(accuracy.torch_cast(exact), exact)
        assert (cast["elements"], cast["inside"], cast["nan"]) == (4, 2, 2)
        saturated = accuracy.compare(round_fp8(exact), exact)
        assert saturated["nan"] == 0
        assert saturated["squared_error"] == cast["squared_error"] == 16.0**2
        assert saturated["largest"] == 1e4

    def test_nan_of_a_small_element_is_not_hidden(self):
        found = accuracy.compare(
            torch.tensor([math.nan, 1.0]).to(FP8), torch.tensor([1.0, 1.0]).double()
        )
        assert found["nan"] == 1 and math.isnan(found["squared_error"])

    def test_pooled_over_layers(self):
        exact = torch.tensor([2.0, 1.0]).double()
        parts = [
            dict(operands=dict(q=dict(bf16=accuracy.compare(x.bfloat16(), exact))))
            for x in (exact + 1, exact)
        ]
        found = accuracy.pooled(parts, "q", "bf16")
        assert found["rms"] == math.sqrt(2 / 10)
        assert found["max_ulps"] == 8 and found["elements"] == 4
        assert found["correct"] is None and found["misrounded"] is None

    def test_torch_cast(self):
        x = torch.tensor([448, 463, 464, 466, -464, -466, 1e6, math.inf, math.nan])
        found = accuracy.torch_cast(x)
        nan = [False, False, False, True, False, True, True, True, True]
        assert found.float().isnan().tolist() == nan
        assert found.float()[[0, 1, 2, 4]].tolist() == [448, 448, 448, -448]

    @pytest.mark.skipif(not HAS_GPU, reason="torch's cast on a GPU")
    def test_torch_cast_is_the_gpus(self):
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
        x = bits.view(torch.bfloat16).cuda()
        found, real = accuracy.torch_cast(x).float(), x.to(FP8).float()
        assert found.isnan().equal(real.isnan())
        assert found.nan_to_num().equal(real.nan_to_num())


class TestAttention:
    lens = [2, 3]

    def operands(self):
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 5, 2, 4, generator=generator).double().unbind()
        return Prepared(q, k, v, None)

    def test_is_causal_softmax_of_each_request(self):
        x = self.operands()
        out = accuracy.attention(x, self.lens, 0.5)
        wanted = torch.empty_like(out)
        for t, first in enumerate([0, 0, 2, 2, 2]):
            for h in range(2):
                keys = slice(first, t + 1)
                weights = (x.k[keys, h] @ x.q[t, h] * 0.5).softmax(0)
                wanted[t, h] = weights @ x.v[keys, h]
        torch.testing.assert_close(out, wanted)

    @pytest.mark.parametrize(
        "operand, place, rows, columns",
        [
            ("q", (3, 1, 0), [3], slice(None)),
            ("k", (3, 1, 2), [3, 4], slice(None)),
            ("v", (3, 1, 2), [3, 4], [2]),
            ("v", (0, 0, 1), [0, 1], [1]),
        ],
    )
    def test_nan_reaches_what_looks_at_it(self, operand, place, rows, columns):
        x = self.operands()
        clean = accuracy.attention(x, self.lens, 0.5)
        getattr(x, operand)[place] = math.nan
        out = accuracy.attention(x, self.lens, 0.5)
        wanted = torch.zeros(out.shape, dtype=torch.bool)
        for row in rows:
            wanted[row, place[1], columns] = True
        assert out.isnan().equal(wanted)
        assert out[~wanted].equal(clean[~wanted])

    def test_rows_that_look_beyond_the_limit_are_apart(self):
        exact = self.operands()
        exact.k[3, 1, 2] = 500.0
        cast, saturated = (
            exact.map(lambda x: x if x is None else rounded(x))
            for rounded in (accuracy.torch_cast, round_fp8)
        )
        paths = dict(unpatched=cast, patched=saturated)
        found, groups = accuracy.compare_attention(paths, exact, self.lens, 0.5)
        assert (found["rows"], found["hit"]) == (10, 2)
        assert found["unpatched"]["nan_rows"] == 2
        assert found["unpatched"]["hit_error"] is None
        assert found["patched"]["nan_rows"] == 0
        assert 0 < found["patched"]["hit_error"] < math.inf
        clear = found["patched"]["clear_error"]
        assert found["unpatched"]["clear_error"] == clear > 0
        assert groups["patched"].shape == (2, 2)
        layers = [dict(attention=found)]
        assert accuracy.attention_rms(layers, "unpatched", "hit") is None
        rms = accuracy.attention_rms(layers, "patched", "clear")
        assert rms == pytest.approx(math.sqrt(clear / found["clear_exact"]))

    def test_interval(self):
        squares = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).double()
        double = [dict(unpatched=squares, patched=4 * squares)]
        assert accuracy.interval(double, seed=0) == pytest.approx([1.0, 1.0])
        mixed = [dict(unpatched=squares, patched=squares.flip(0))]
        low, high = accuracy.interval(mixed, seed=0)
        assert -0.5 < low < 0 < high < 0.5
        nothing = [dict(unpatched=0 * squares, patched=0 * squares)]
        assert accuracy.interval(nothing, seed=0) is None


class TestCapture:
    def test_is_what_the_projections_give(self, checkpoint):
        from safetensors.torch import load_file

        shape, layers = accuracy.capture(checkpoint, Settings(lens=(3, 7)))
        assert (shape.heads, shape.nope, shape.rope, shape.v) == (2, 128, 64, 128)
        assert shape.kv_lora == 512 and not shape.is_neox
        assert shape.scale == 192**-0.5
        angles = torch.arange(7)[:, None] / 1e4 ** (torch.arange(0, 64, 2) / 64)
        wanted = torch.cat([angles.cos(), angles.sin()], dim=-1)
        torch.testing.assert_close(shape.cos_sin_cache, wanted)
        weights = load_file(checkpoint / "model.safetensors")
        assert len(layers) == 2
        for i, x in enumerate(layers):
            weight = weights[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
            kv = (x.kv_a.float() @ weight.float().T).view(10, 2, 256)
            torch.testing.assert_close(x.kv.float(), kv, rtol=0.02, atol=0.02)
            assert x.q.shape == (10, 2, 192) and x.k_pe.shape == (10, 64)
        assert not layers[0].q.equal(layers[1].q)

    def test_same_seed_same_inputs(self, checkpoint):
        shape, (first, _) = accuracy.capture(checkpoint, Settings(lens=(5,)))
        again = accuracy.capture(checkpoint, Settings(lens=(5,)))[1][0]
        other = accuracy.capture(checkpoint, Settings(lens=(5,), seed=1))[1][0]
        assert first.q.equal(again.q) and not first.q.equal(other.q)
        drawn = [
            accuracy.synthetic(shape, Settings(lens=(5,), seed=seed))[2].layers[0].kv
            for seed in (0, 0, 1)
        ]
        assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


class TestRun:
    def test_patched_rounds_once_and_unpatched_twice(self, results):
        for source in results["sources"]:
            for name in accuracy.ROTATED:
                before, after = (
                    pooled(results, source["name"], name, path)
                    for path in ("unpatched", "patched")
                )
                # A GPU's float32 rotation can end on the other side of a tie.
                assert after["misrounded"] < 1e-4
                assert after["max_ulps"] < 0.5001
                assert 0.005 < before["misrounded"] < 0.1
                assert 0.51 < before["max_ulps"] <= 0.53126
                assert after["squared_error"] < before["squared_error"]

    def test_what_is_not_rotated_is_the_same(self, results):
        before, after = (
            pooled(results, "model", "v", path) for path in ("unpatched", "patched")
        )
        assert before == after and before["misrounded"] == 0

    def test_bf16_is_near_and_fp8_is_far(self, results):
        rms = [pooled(results, "model", "q_rope", path)["rms"] for path in PATHS]
        assert 1e-3 < rms[0] < 3e-3 and 0.02 < rms[1] < 0.04

    def test_what_overflows_is_nan_without_the_patch_only(self, results):
        before, after = (
            [pooled(results, "outliers", x, path) for x in ("q", "k", "v", "row")]
            for path in ("unpatched", "patched")
        )
        beyond = [x["elements"] - x["inside"] for x in before]
        assert sum(beyond) > 0
        assert [x["nan"] for x in before] == beyond
        assert [x["nan"] for x in after] == [0] * 4
        (rows,) = attention(results, "outliers")
        assert rows["unpatched"]["nan_rows"] == rows["hit"] > 0
        assert rows["patched"]["nan_rows"] == 0
        assert rows["patched"]["hit_error"] > 0
        assert attention(results, "model")[0]["hit"] == 0

    def test_sglangs_casts_are_as_documented(self, results):
        cast = results["cast"]
        assert cast["elements"] > 10**5 and cast["differ"] == 0

    def test_another_path_than_meant_is_an_error(self):
        shape = Shape(2, 16, 16, 16, 32, False, 1.0, torch.ones(4, 16))
        (x,) = accuracy.synthetic(shape, Settings(lens=(4,)))[0].layers
        layer = accuracy.Layer(shape, [4], FP8)
        with pytest.raises(RuntimeError, match="another path ran"):
            layer.prepare(x, patched=False)

    def test_given_activations_reach_the_layer(self):
        shape = Shape(2, 16, 16, 16, 32, False, 1.0, torch.ones(4, 16))
        (x,) = accuracy.synthetic(shape, Settings(lens=(4,)))[0].layers
        layer = accuracy.Layer(shape, [4], FP8)
        exact = layer.exact(x)
        assert exact.q[..., :16].cpu().equal(x.q[..., :16].double())
        assert exact.v.cpu().equal(x.kv[..., 16:].double())
        assert exact.row[:, :32].cpu().equal(x.kv_a.double())
        even, odd = x.k_pe[:, 0].double(), x.k_pe[:, 1].double()
        assert exact.row[:, 32].cpu().equal(even - odd)


class TestVerdict:
    def test_nothing_is_worse(self, results):
        assert accuracy.worse(results) == []

    def test_swapped_paths_are_worse(self, results):
        for source in results["sources"]:
            for layer in source["layers"]:
                for paths in layer["operands"].values():
                    paths["unpatched"], paths["patched"] = (
                        paths["patched"],
                        paths["unpatched"],
                    )
        found = "\n".join(accuracy.worse(results))
        for name in ("q", "k", "cache row"):
            assert f"model: {name}, RoPE part: RMS error" in found
        assert "model: v" not in found
        assert "outliers: k: " in found and "NaN" in found

    def test_attention(self, results):
        worse = copy.deepcopy(results)
        worse["sources"][0]["attention_interval"] = [0.001, 0.01]
        assert accuracy.worse(worse) == [
            "model: attention: RMS error +0.100% to +1.000% against unpatched"
        ]
        worse = copy.deepcopy(results)
        worse["sources"][1]["layers"][0]["attention"]["patched"]["nan_rows"] = 3
        assert accuracy.worse(worse) == ["student_t3: attention: 3 rows with NaN"]

    def test_is_in_the_report(self, results):
        results["sources"][0]["attention_interval"] = [0.001, 0.01]
        text = accuracy.render(results, {}, "accuracy", None)
        assert "**The patched path is worse here:**\n\n- model: attention" in text


class TestReport:
    def test_text(self, report, results):
        text = report.with_name("accuracy.md").read_text()
        for source in results["sources"]:
            assert f"### {source['title']}" in text
        stats = pooled(results, "model", "q_rope", "unpatched")
        row = f"{accuracy.percent(stats['rms'], 4)} |"
        assert row in text and accuracy.percent(stats["misrounded"]) in text
        assert "Not generated" in text and "What this does not show" in text
        assert text.startswith("# Accuracy\n\nHow far q, k, v")
        assert results["machine"] in text and "{" not in text
        assert ("without a GPU" in text) == (not HAS_GPU)

    @pytest.mark.parametrize(
        "value, text",
        [
            (None, "-"),
            (0, "0"),
            (0.0266, "2.66%"),
            (0.000001, "0.0001%"),
            (2.54e-7, "0.0000254%"),
            (15.0, "1,500%"),
        ],
    )
    def test_percent(self, value, text):
        assert accuracy.percent(value) == text

    def test_tables_are_rectangular(self, report):
        text = report.with_name("accuracy.md").read_text()
        blocks = [b for b in text.split("\n\n") if b.startswith("|")]
        assert len(blocks) == 8
        for block in blocks:
            assert len({line.count("|") for line in block.splitlines()}) == 1

    def test_figures(self, report):
        pytest.importorskip("matplotlib")
        text = report.with_name("accuracy.md").read_text()
        for name in ("rms_error", "rounding", "misrounded", "saturation"):
            assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert f"](accuracy/{name}.png)" in text

    def test_without_matplotlib(self, results, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(accuracy.sys.modules, "matplotlib", None)
        assert "![" not in accuracy.write(results, tmp_path, None).read_text()
        assert "matplotlib is not installed" in capsys.readouterr().err

    def test_rendered_again_with_servers(self, report, tmp_path):
        out = tmp_path / "accuracy"
        out.mkdir()
        (out / "results.json").write_bytes((report / "results.json").read_bytes())
        e2e = tmp_path / "results.json"
        comparison = dict(
            scenario="chunked 512",
            backend="trtllm_mla",
            patched_distance=0.0512,
            unpatched_distance=0.0534,
            difference_ci=[-0.004, -0.0004],
            prompts=24,
            tokens=41000,
            more="ignored",
        )
        e2e.write_text(json.dumps(dict(compare=dict(pooled=[comparison]))))
        arguments = ["--render-only", "--out", str(out), "--e2e", str(e2e)]
        assert accuracy.main(arguments) == 0
        text = (tmp_path / "accuracy.md").read_text()
        assert "| chunked 512 | trtllm_mla | 0.0534 | 0.0512 | -0.004 to" in text
        flat = " ".join(text.split())
        assert "Of 1 comparisons the whole interval is above zero in 0." in flat
        assert "Not generated" not in text

    def test_servers_missing(self, tmp_path):
        path = tmp_path / "results.json"
        assert accuracy.server_comparisons(None) is None
        assert accuracy.server_comparisons(path) is None
        path.write_text("{}")
        assert accuracy.server_comparisons(path) is None
        path.write_text(json.dumps(dict(compare=dict(pooled=[dict(scenario="x")]))))
        with pytest.raises(ValueError, match="no backend, patched_distance"):
            accuracy.server_comparisons(path)

    @pytest.mark.skipif(HAS_GPU, reason="the full size runs on a GPU")
    def test_full_size_needs_a_gpu(self, tmp_path):
        with pytest.raises(SystemExit, match="--quick"):
            accuracy.main(["--out", str(tmp_path / "accuracy")])

    def test_nothing_to_render(self, tmp_path):
        with pytest.raises(SystemExit, match="run once without"):
            accuracy.main(["--render-only", "--out", str(tmp_path)])
