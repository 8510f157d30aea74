"""`make accuracy`: how far SGLang's FP8 prefill is from float64, with and without the
patch, as one table.

SGLang's own attention layer prepares the same hidden states twice: unpatched, which is
SGLANG_MLA_FP8_PREFILL=off, and patched. Its weights are those of a small random
DeepSeek-V3 checkpoint, as they are and with outlier channels; the hidden states are what
the checkpoint's layers get in transformers for random prompts. The reference is the
definition in float64, and attention is computed in float64 from the operands.

A rounding is right if its bits are those of the float64 value rounded to FP8 once.
Errors are relative: over the root mean square of the exact values.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import torch
from sglang_cpu import DEVICE, HAS_GPU

# What imports SGLang is imported late: `main` first puts the patched one on the path.

PRODUCERS = {"unpatched": "off", "patched": "fused"}
PROMPTS, QUICK_PROMPTS = (64, 512, 1472), (7, 14)
# Outputs of a projection, or channels of the latent, that are larger than the others.
OUTLIERS_IN = ("q_b_proj.weight", "kv_b_proj.weight", "kv_a_layernorm.weight")
OUTLIER_EVERY, OUTLIER_GAINS = 32, (200, 5)


class Layer(NamedTuple):
    """The attention of one layer: its parameters and what it is given."""

    weights: dict[str, torch.Tensor]
    hidden: torch.Tensor


class Prepared(NamedTuple):
    """What an attention kernel and the KV cache get, and what attention then gives."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor
    attention: torch.Tensor


class Error(NamedTuple):
    misrounded: Optional[float]  # a share; None where nothing is rounded to FP8
    relative: float
    nan_rows: int


def load_checkpoint(kind: str, prompts: Sequence[int]):
    """The configuration of a checkpoint of `mla_standin`, and its layers."""
    from mla_standin.models import make_model
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = make_model(kind, Path(folder, "model"))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = model.to(DEVICE).eval()
    modules = [block.self_attn for block in model.model.layers]
    given = {module: [] for module in modules}
    for module in modules:
        module.register_forward_pre_hook(
            lambda module, _, x: given[module].append(x["hidden_states"][0]),
            with_kwargs=True,
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for length in prompts:
            ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)
            model(ids, use_cache=False, logits_to_keep=1)
    layers = []
    for module in modules:
        weights = {name: weight.data for name, weight in module.named_parameters()}
        # SGLang makes one projection of these two.
        parts = weights.pop("q_a_proj.weight"), weights.pop("kv_a_proj_with_mqa.weight")
        weights["fused_qkv_a_proj_with_mqa.weight"] = torch.cat(parts)
        layers.append(Layer(weights, torch.cat(given[module])))
    return model.config, layers


def with_outliers(layer: Layer) -> Layer:
    generator = torch.Generator().manual_seed(1)
    weights = dict(layer.weights)
    for name in OUTLIERS_IN:
        count = len(weights[name])
        chosen = torch.randperm(count, generator=generator)[: count // OUTLIER_EVERY]
        gains = torch.ones(count)
        gains[chosen] = torch.logspace(*map(math.log10, OUTLIER_GAINS), len(chosen))
        shape = (count,) + (1,) * (weights[name].dim() - 1)
        weights[name] = weights[name] * gains.to(weights[name]).view(shape)
    return layer._replace(weights=weights)


def attend(q, k, v, prompts: Sequence[int], scale: float) -> torch.Tensor:
    """Causal attention in float64. NaN gets to the rows that look at it, no others:
    a kernel may spread it further."""
    outputs = []
    for parts in zip(*(x.double().split(prompts) for x in (q, k, v))):
        q_nan, k_nan, v_nan = (x.isnan().any(-1) for x in parts)
        seen_nan = (k_nan | v_nan).cummax(dim=0).values | q_nan
        heads_first = (x.nan_to_num().transpose(0, 1) for x in parts)
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=scale
        )
        outputs.append(out.transpose(0, 1).masked_fill(seen_nan[..., None], math.nan))
    return torch.cat(outputs)


def prepare(config, layers: Sequence[Layer], prompts, producer: str):
    """What SGLang makes of the layers, and what the definition does, layer after
    layer."""
    import mla_harness as harness

    from sglang.jit_kernel.tests.fp8_reference import MLADims
    from sglang.srt.environ import envs

    dims = MLADims(
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        v=config.v_head_dim,
        lora=config.kv_lora_rank,
    )
    with envs.SGLANG_MLA_FP8_PREFILL.override(producer):
        env = harness.make_env(
            dims,
            "trtllm_mla",
            q_lora=config.q_lora_rank,
            hidden=config.hidden_size,
            slots=-(-sum(prompts) // 64) * 64,
            max_context=max(prompts),
        )
    prepared, exact = [], []
    for layer in layers:
        for name, weight in env.attn.named_parameters():
            weight.data.copy_(layer.weights[name])
        batch = harness.make_batch(env, prompts)
        batch.hidden = layer.hidden
        result = harness.run_prefill(env, batch)
        if (result.q.dtype == env.pool.dtype) != (producer == "fused"):
            raise RuntimeError(f"with {producer}, the layer's q is {result.q.dtype}")
        (call,) = result.calls
        rows = result.cache[batch.out_cache_loc, 0].view(env.pool.dtype)
        for found, operands in (
            (prepared, (call.q, call.k, call.v, rows)),
            (exact, harness.expected(env, batch)),
        ):
            output = attend(*operands[:3], prompts, env.attn.scaling)
            found.append(Prepared(*operands, output))
    return tuple(Prepared(*map(torch.cat, zip(*found))) for found in (prepared, exact))


def compare(actual: torch.Tensor, exact: torch.Tensor) -> Error:
    import mla_harness as harness

    from sglang.jit_kernel.tests.fp8_reference import fp8_difference

    misrounded = None
    if actual.dtype == torch.float8_e4m3fn:
        misrounded = fp8_difference(actual, exact).differing / exact.numel()
    actual = actual.double()
    nan_rows = int(actual.isnan().any(-1).sum())
    return Error(misrounded, harness.relative_error(actual, exact), nan_rows)


def measure(kind: str, prompts: Sequence[int]) -> dict[tuple[str, str], dict]:
    """By source of activations and operand: an Error of each path."""
    config, layers = load_checkpoint(kind, prompts)
    nope, lora = config.qk_nope_head_dim, config.kv_lora_rank
    operands = {
        "q": lambda x: x.q,
        "q, rotated part": lambda x: x.q[..., nope:],
        "k": lambda x: x.k,
        "v": lambda x: x.v,
        "cache row": lambda x: x.rows,
        "cache row, rotated part": lambda x: x.rows[..., lora:],
        "attention output": lambda x: x.attention,
    }
    sources = {"checkpoint": layers, "outliers": [with_outliers(x) for x in layers]}
    errors = {}
    for source, source_layers in sources.items():
        for path, producer in PRODUCERS.items():
            actual, exact = prepare(config, source_layers, prompts, producer)
            for name, part in operands.items():
                error = compare(part(actual), part(exact))
                errors.setdefault((source, name), {})[path] = error
    return errors


def table(errors: dict[tuple[str, str], dict]) -> str:
    from tabulate import tabulate

    def percent(value: Optional[float]) -> str:
        return "" if value is None else f"{100 * value:.4g}%"

    rows = []
    for (source, operand), paths in errors.items():
        found = [paths[path] for path in PRODUCERS]
        rows.append(
            [source, operand]
            + [percent(error.misrounded) for error in found]
            + [percent(error.relative) for error in found]
            + [f"{error.nan_rows:,}" for error in found]
        )
    header = ["activations", "operand"]
    for what in ("misrounded", "error", "rows with NaN"):
        header += [f"{what}, {path}" for path in PRODUCERS]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument("--quick", action="store_true", help="small; needs no GPU")
    options = parser.parse_args()
    if not HAS_GPU and not options.quick:
        sys.exit("no GPU: run on a GPU host, or a reduced size here with --quick")
    import patched_sglang

    sys.path.insert(0, str(patched_sglang.lay_out(options.sglang).patched))
    import machine

    kind, prompts = "deepseek_v3", PROMPTS
    if options.quick:
        kind, prompts = "tiny", QUICK_PROMPTS
    errors = measure(kind, prompts)
    print(f"{machine.describe()}\n{kind}, prompts of {prompts} tokens\n")
    print(table(errors))


if __name__ == "__main__":
    main()
