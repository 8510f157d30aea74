"""transformers' own forward of a checkpoint, to measure a server's answers by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

# A prompt goes through the model in pieces of this many tokens, so that its logits, and
# the scores of an attention without a fused kernel, fit in memory.
PIECE = 4096


class Reference:
    """A checkpoint in transformers, without a server, FP8 or paging."""

    def __init__(
        self,
        folder: Path,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        self.model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Entry i is log p(input_ids[i + 1] | input_ids[: i + 1])."""
        tokens = torch.tensor(input_ids, device=self.device)
        cache = DynamicCache(config=self.model.config)
        found: list[float] = []
        for piece, targets in zip(tokens[:-1].split(PIECE), tokens[1:].split(PIECE)):
            if not len(piece):
                continue
            output = self.model(input_ids=piece[None], past_key_values=cache)
            logprobs = output.logits[0].float().log_softmax(-1)
            found += logprobs.gather(1, targets[:, None])[:, 0].tolist()
        return found
