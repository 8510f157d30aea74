"""Small checkpoints of DeepSeek-V3's architecture with random weights.

Real MLA dimensions, norm weights round 1, a few outlier channels in the latent (as
trained models have), softmax neither flat nor one-hot. Saved by transformers, so that
its own forward is an independent reference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

VOCAB = 4096
CONTEXT = 20480
K_SCALE, V_SCALE = 0.5, 2.0

_BASE = dict(
    vocab_size=VOCAB,
    max_position_embeddings=CONTEXT,
    hidden_size=1024,
    intermediate_size=2048,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=16,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    # YaRN as DeepSeek-V3's, for the context here.
    rope_parameters=dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=5.0,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)
KINDS = {
    "deepseek_v3": {},
    "v2_lite": dict(
        q_lora_rank=None,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
    # K and V scales of attn_mha, which SGLang gives to its prefill kernels.
    "scaled": {},
    # One rank's layers of DeepSeek-V3 under data-parallel attention, to time. The MLP is
    # that of a dense layer, and as large as the nine experts of 2048 a token meets.
    "deepseek_v3_wide": dict(
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=8,
        num_attention_heads=128,
        vocab_size=512,
        max_position_embeddings=2 * CONTEXT,
    ),
    # The same at tensor parallel size 8.
    "deepseek_v3_tp8": dict(
        hidden_size=7168,
        intermediate_size=2304,
        num_hidden_layers=16,
        vocab_size=512,
        max_position_embeddings=2 * CONTEXT,
    ),
    # For tests of the suite itself on a CPU.
    "tiny": dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=64,  # fewer, and SGLang's RoPE runs its fallback kernel
        v_head_dim=16,
    ),
}
# Fields that SGLang reads and transformers' configuration does not have.
_SGLANG = dict(moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc")


def _initialize(model: torch.nn.Module) -> None:
    """Random weights of realistic size, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    on_device = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            values = 1 + 0.1 * torch.randn(weight.shape, generator=generator)
            if "kv_a_layernorm" in name:
                # One channel in a hundred, ten to forty times the others.
                outliers = torch.rand(weight.shape, generator=generator) < 0.01
                size = 10 + 30 * torch.rand(weight.shape, generator=generator)
                values = torch.where(outliers, values * size, values)
            weight.data.copy_(values)
            continue
        gain = 1.0
        if "q_b_proj" in name or "q_proj" in name:
            gain = 1.5  # some keys matter more than others
        elif "kv_b_proj" in name:
            gain = 0.5  # what the outliers add to K and V
        elif "lm_head" in name:
            gain = 2.5
        scale = 1.0 if "embed" in name else gain * weight.shape[1] ** -0.5
        if weight.numel() < 1 << 24:
            values = torch.randn(weight.shape, generator=generator)
        else:
            values = torch.randn(weight.shape, generator=on_device, device=device)
        weight.data.copy_(values.mul_(scale))


def make_model(kind: str, folder: Path | str) -> Path:
    """Write a checkpoint of one of KINDS to `folder`, unless it is there; returns it."""
    folder = Path(folder)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if (folder / "config.json").is_file():
        return folder
    fields = {**_BASE, **KINDS[kind]}
    config = DeepseekV3Config(
        **fields,
        # No experts: they do not meet the code under test.
        first_k_dense_replace=fields["num_hidden_layers"],
        num_key_value_heads=fields["num_attention_heads"],
    )
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _initialize(model)
    model.save_pretrained(part, max_shard_size="20GB")

    config_file = part / "config.json"
    content = {**json.loads(config_file.read_text()), **_SGLANG}
    if kind == "scaled":
        weights = part / "model.safetensors"
        tensors = load_file(weights)
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}.self_attn.attn_mha"
            tensors[f"{prefix}.k_scale"] = torch.tensor(K_SCALE)
            tensors[f"{prefix}.v_scale"] = torch.tensor(V_SCALE)
        save_file(tensors, weights, metadata={"format": "pt"})
        content["quantization_config"] = dict(
            quant_method="modelopt",
            quant_algo="FP8",
            kv_cache_scheme=dict(type="float", num_bits=8, dynamic=False),
            ignore=["model*", "lm_head*"],
        )
    config_file.write_text(json.dumps(content, indent=2))
    part.rename(folder)
    return folder
