"""transformers' own forward of a checkpoint, to measure a server's answers by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

# A prompt goes through the model in pieces of this many tokens, so that an attention
# without a fused kernel needs at most heads x 4096 x context scores at a time.
_QUERY_ROWS = 4096
# Logits in full precision, 512 MiB of float32.
_LOGITS = 1 << 27


class Reference:
    """A checkpoint in transformers, without a server, FP8 or paging.

    bfloat16 does what the model's authors ship; float32 takes the same weights
    upcast and is the sharper reference, at twice the memory.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        attention: str = "sdpa",
    ):
        if dtype == torch.float32:
            # TF32 would make it no sharper than bfloat16.
            torch.set_float32_matmul_precision("highest")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        self.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.vocab = self.model.config.vocab_size

    @torch.inference_mode()
    def logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Entry i is log p(input_ids[i + 1] | input_ids[: i + 1])."""
        tokens = self._tokens(input_ids)
        if len(tokens) == 1:
            return []
        hidden = torch.cat(list(self._hidden(tokens[:-1])))
        return self._score(hidden, tokens[1:])[0]

    @torch.inference_mode()
    def score(
        self, input_ids: Sequence[int], output_ids: Sequence[int]
    ) -> tuple[list[float], list[float]]:
        """Log-probability of each token of a given continuation, and its margin.

        The margin is how far the token's log-probability lies below that of the
        reference's own choice after the same tokens: 0 where the two agree.
        """
        if not len(output_ids):
            return [], []
        tokens = self._tokens([*input_ids, *output_ids])
        hidden = torch.cat(list(self._hidden(tokens[:-1])))
        targets = tokens[len(input_ids) :]
        return self._score(hidden[len(input_ids) - 1 :], targets)

    @torch.inference_mode()
    def greedy(self, input_ids: Sequence[int], n: int) -> list[int]:
        """The reference's own n greedy tokens."""
        tokens = self._tokens(input_ids)
        cache = DynamicCache(config=self.model.config)
        chosen: list[int] = []
        while len(chosen) < n:
            *_, hidden = self._hidden(tokens, cache)
            tokens = self._logits(hidden[-1:]).argmax(-1)
            chosen.append(int(tokens))
        return chosen

    def close(self) -> None:
        """Give its GPU memory back, for servers to start."""
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tokens(self, ids: Sequence[int]) -> torch.Tensor:
        if not len(ids):
            raise ValueError("empty prompt; give at least one token")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise ValueError(
                f"token ids from {min(ids)} to {max(ids)}; this model takes 0 to "
                f"{self.vocab - 1}"
            )
        return torch.tensor(ids, device=self.device)

    def _hidden(
        self, tokens: torch.Tensor, cache: DynamicCache | None = None
    ) -> Iterator[torch.Tensor]:
        if cache is None and len(tokens) > _QUERY_ROWS:
            cache = DynamicCache(config=self.model.config)
        for piece in tokens.split(_QUERY_ROWS):
            output = self.model.base_model(
                input_ids=piece[None],
                past_key_values=cache,
                use_cache=cache is not None,
            )
            yield output.last_hidden_state[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _score(
        self, hidden: torch.Tensor, targets: torch.Tensor
    ) -> tuple[list[float], list[float]]:
        logprobs, margins = [], []
        rows = max(1, _LOGITS // self.vocab)
        for piece, target in zip(hidden.split(rows), targets.split(rows)):
            logits = self._logits(piece)
            chosen = logits.gather(1, target[:, None])[:, 0]
            logprobs += (chosen - logits.logsumexp(1)).tolist()
            margins += (logits.amax(1) - chosen).tolist()
        return logprobs, margins
