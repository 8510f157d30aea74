"""Which servers capture prefills in CUDA graphs, and where the patch turns that off."""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import batch_runs
import mla_harness as harness
import pytest
import torch
from batch_cases import DEEPSEEK
from e2e.pairs import no_prefill_graphs
from mla_harness import TINY, make_env
from sglang_internals import decode_context_parallel, parse_graph_config, publish
from transformers import DeepseekV3Config

from sglang.srt import server_args as server_args_module
from sglang.srt.layers.attention import mla_fp8_prefill
from sglang.srt.layers.attention.mla_fp8_prefill import (
    GRAPHLESS_BACKENDS,
    MLAFP8PrefillMixin,
)
from sglang.srt.model_executor import model_runner as model_runner_module

SWITCH = "SGLANG_MLA_FP8_PREFILL"
LINE = (
    "Prefill CUDA graphs are turned off for FP8 prefill preparation; "
    "--enforce-piecewise-cuda-graph keeps them"
)


def start(backend="trtllm_mla", dims=TINY, **env):
    """A layer whose backend was made with prefill graphs on."""
    return make_env(dims, backend, disable_piecewise_cuda_graph=False, **env)


@pytest.mark.parametrize("backend", GRAPHLESS_BACKENDS)
@pytest.mark.parametrize("breakable", [False, True])
def test_turned_off_with_one_line_and_nothing_else(backend, breakable, log):
    settings = dict(page_size=64, kv_cache_dtype="fp8_e4m3")
    settings |= dict(enable_breakable_cuda_graph=breakable)
    before = harness.make_server_args(backend, **settings)
    for _ in range(2):
        after = start(backend, enable_breakable_cuda_graph=breakable).server_args
        assert after.disable_piecewise_cuda_graph
        assert dataclasses.asdict(after) == dataclasses.asdict(before)
    assert log()[1:] == [LINE]


@pytest.mark.parametrize(
    "env",
    [
        dict(attention_backend="fa3", decode_attention_backend="triton"),
        dict(
            attention_backend="flashinfer", prefill_attention_backend="tokenspeed_mla"
        ),
        dict(attention_backend="trtllm_mla", prefill_attention_backend=None),
        dict(kv_cache_dtype="auto"),
    ],
    ids=["prefill-only", "decode-only-here", "one-backend", "cache-of-checkpoint"],
)
def test_turned_off_for_the_backend_that_prefills(env, monkeypatch):
    make_server_args = harness.make_server_args
    monkeypatch.setattr(
        harness, "make_server_args", lambda *a, **kw: make_server_args(*a, **kw | env)
    )
    assert start().server_args.disable_piecewise_cuda_graph


@pytest.mark.parametrize(
    "env",
    [
        dict(enforce_piecewise_cuda_graph=True),
        dict(attention_backend="trtllm_mla", prefill_attention_backend="fa3"),
        dict(cache_dtype=torch.bfloat16),
        dict(cache_dtype=torch.float8_e5m2),
        dict(dtype=torch.float32),
        dict(dims=DEEPSEEK, pool_class=batch_runs.dsa_pool),
    ],
    ids=["enforced", "decode-only", "bf16-cache", "e5m2-cache", "fp32", "nsa-pool"],
)
def test_kept(env, log):
    assert not start(**env).server_args.disable_piecewise_cuda_graph
    assert LINE not in log()


def test_kept_with_the_hook_off(monkeypatch, log):
    monkeypatch.setenv(SWITCH, "off")
    assert not start().server_args.disable_piecewise_cuda_graph
    assert LINE not in log()


def test_kept_for_a_model_that_does_not_ask_the_hook():
    env = start(enforce_piecewise_cuda_graph=True)
    env.server_args.enforce_piecewise_cuda_graph = False
    env.runner.model = torch.nn.Linear(1, 1)  # as Sarvam's, with its own prepare step
    env.backend.init_fp8_prefill(env.runner)
    assert not env.server_args.disable_piecewise_cuda_graph


@pytest.mark.parametrize("breakable", [False, True])
@pytest.mark.parametrize("enforce", [False, True])
def test_the_model_runner_captures_or_not(enforce, breakable, monkeypatch):
    env = start(
        enforce_piecewise_cuda_graph=enforce,
        enable_breakable_cuda_graph=breakable,
        piecewise_cuda_graph_tokens=[4, 8],
    )
    for name in ("PiecewiseCudaGraphRunner", "BreakableCudaGraphRunner"):
        monkeypatch.setattr(model_runner_module, name, lambda _, name=name: name)
    monkeypatch.setattr(model_runner_module, "get_available_gpu_memory", lambda *_: 0)
    layers = [SimpleNamespace(self_attn=env.attn)]
    runner = SimpleNamespace(
        server_args=env.server_args,
        is_draft_worker=False,
        model=SimpleNamespace(model=SimpleNamespace(layers=layers)),
        model_config=SimpleNamespace(num_hidden_layers=1),
        device=None,
        gpu_id=0,
    )
    model_runner_module.ModelRunner.init_piecewise_cuda_graphs(runner)
    kind = "BreakableCudaGraphRunner" if breakable else "PiecewiseCudaGraphRunner"
    assert runner.piecewise_cuda_graph_runner == (kind if enforce else None)


@pytest.mark.parametrize(
    "architecture, arguments, has_graphs",
    [
        ("DeepseekV3ForCausalLM", {}, False),
        ("DeepseekV3ForCausalLM", dict(moe_runner_backend="triton"), True),
        ("DeepseekV2ForCausalLM", {}, True),
        ("Glm4MoeLiteForCausalLM", {}, True),
        ("DeepseekV2ForCausalLM", dict(enable_dp_attention=True), False),
    ],
)
def test_servers_that_have_prefill_graphs_in_sglang(
    architecture, arguments, has_graphs, tmp_path, monkeypatch
):
    """On SM100, where the default MoE runner of DeepSeek-V3 turns them off."""
    config = DeepseekV3Config(architectures=[architecture], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    for name in ("is_sm100_supported", "is_blackwell_supported"):
        monkeypatch.setattr(server_args_module, name, lambda *_: True)
    args = server_args_module.ServerArgs(
        model_path=str(tmp_path),
        device="cuda",
        attention_backend="trtllm_mla",
        kv_cache_dtype="fp8_e4m3",
        **arguments,
    )
    assert args.disable_piecewise_cuda_graph != has_graphs
    assert args.piecewise_cuda_graph_max_tokens == 2048


def captures_prefills(*flags: str) -> bool:
    """Whether the model runner of this SGLang does, asked after the hook."""
    with contextlib.suppress(ImportError):  # before 0.5.14
        from sglang.srt.model_executor import cuda_graph_config

        cuda_graph_config.default_prefill_backend = lambda: "breakable"  # as on a GPU
    parser = argparse.ArgumentParser()
    server_args_module.ServerArgs.add_cli_args(parser)
    flags = "--model-path", "dummy", "--device", "cpu", *flags
    args = server_args_module.ServerArgs.from_cli_args(parser.parse_args(flags))
    parse_graph_config(args)
    publish(args)
    model = torch.nn.Module()
    model.forward_normal_prepare = None
    runner = SimpleNamespace(server_args=args, model=model)
    MLAFP8PrefillMixin._disable_prefill_cuda_graphs(runner)
    if hasattr(args, "disable_piecewise_cuda_graph"):
        return not args.disable_piecewise_cuda_graph
    check = cuda_graph_config.check_cuda_graph_backend
    off = cuda_graph_config.Backend.DISABLED
    assert not check(cuda_graph_config.Phase.DECODE, off)
    return not check(cuda_graph_config.Phase.PREFILL, off)


def test_the_log_names_the_flag_of_every_release(monkeypatch):
    """Run on all of them, by `run_batches`."""
    lines = []
    monkeypatch.setattr(mla_fp8_prefill, "_log_once", lines.append)
    flashinfer = "--attention-backend", "flashinfer"
    assert captures_prefills(*flashinfer)
    site = Path(server_args_module.__file__).parents[2]
    assert not captures_prefills(*flashinfer, no_prefill_graphs(site))
    trtllm_mla = "--attention-backend", "trtllm_mla"
    with contextlib.suppress(ImportError), decode_context_parallel():  # from 0.5.15 on
        assert captures_prefills(*trtllm_mla)
    assert not lines and not captures_prefills(*trtllm_mla)
    flag = lines[0].removesuffix(" keeps them").split()[-1]
    assert captures_prefills(*trtllm_mla, flag) and len(lines) == 1
