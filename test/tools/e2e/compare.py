"""What servers are asked, and how far their answers are from transformers'.

The distance of an answer is |log p(server) - log p(transformers)|, summed over the
prompt's tokens. Both servers of a pair answer the same prompts; the ratio of their sums,
patched to unpatched, has a bootstrap interval over prompts (those that share a prefix
together). It may not reach beyond 1 + MARGIN, of a single scenario, which has fewer
prompts, beyond 1 + SCENARIO_MARGIN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from e2e.servers import Answer, Request, Server, faults
from resampling import ratio_of_sums

MARGIN, SCENARIO_MARGIN = 0.02, 0.05
# Beyond this mean distance, server and reference do not run the same model.
CEILING = 0.5
NEW_TOKENS = 8

# Around a page (64), around prefill chunks (512, 2048), and up to 16k.
LENGTHS = (
    *(1, 2, 3, 17, 63, 64, 65, 127, 500, 511, 512, 513, 1000),
    *(2047, 2048, 2049, 4096, 8191, 16000),
)
# One page, less and more than whole pages, and what a small
# SGLANG_MAX_KV_CHUNK_CAPACITY splits into many chunks. All fit into the pool at once.
PREFIXES = (64, 100, 512, 1000, 2048, 4100, 8192, 12288)
SUFFIXES = (2, 65, 500, 2000)
QUICK_LENGTHS = tuple(n for n in LENGTHS if n < 4096)
QUICK_PREFIXES = (64, 100, 200, 512, 700, 1000, 1500, 2048)

Answers = dict[str, Answer]


@dataclass(frozen=True)
class Prompt:
    """Token ids whose log-probabilities are asked for from `start`, the length of the
    prefix that the cache should supply."""

    name: str
    input_ids: list[int]
    start: int = 0
    prefix: str = ""


def of_lengths(vocab: int, lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    """Uniformly random token ids, one prompt of each length."""
    rng = np.random.default_rng([1, 0])
    return [
        Prompt(f"{n} tokens", rng.integers(vocab, size=n).tolist()) for n in lengths
    ]


def mixed(vocab: int, count: int = 64, longest: int = 4096) -> list[Prompt]:
    """Prompts of lengths from 2 to `longest`, evenly over their logarithm."""
    rng = np.random.default_rng([1, 1])
    lengths = np.exp(rng.uniform(np.log(2), np.log(longest + 1), count)).astype(int)
    return [
        Prompt(f"mixed {i}, {n} tokens", rng.integers(vocab, size=n).tolist())
        for i, n in enumerate(lengths)
    ]


def behind_prefixes(
    vocab: int,
    prefixes: Sequence[int] = PREFIXES,
    suffixes: Sequence[int] = SUFFIXES,
    page: int = 64,
) -> list[Prompt]:
    """One prompt for each prefix length and suffix length.

    SGLang matches whole pages, and none behind logprob_start_len; so the prompts ask
    for log-probabilities from the end of their prefix's last whole page.
    """
    rng = np.random.default_rng([1, 2])
    prompts = []
    for length in prefixes:
        name = f"prefix {length}"
        prefix = rng.integers(vocab, size=length).tolist()
        for n in suffixes:
            ids = prefix + rng.integers(vocab, size=n).tolist()
            start = length // page * page
            prompts.append(Prompt(f"{name} + {n}", ids, start, name))
    return prompts


def questions(vocab: int, quick: bool) -> dict[str, list[Prompt]]:
    """By scenario, what every pair of servers is asked."""
    return {
        "alone": of_lengths(vocab, QUICK_LENGTHS if quick else LENGTHS),
        "at once": mixed(vocab),
        "behind prefixes": behind_prefixes(
            vocab, QUICK_PREFIXES if quick else PREFIXES
        ),
    }


def ask(
    server: Server,
    scenario: str,
    prompts: Sequence[Prompt],
    hits: bool = True,
    new_tokens: int = NEW_TOKENS,
) -> tuple[Answers, list[str]]:
    """The answers that are fit to be compared, by prompt, and what is wrong with others.

    `hits` False is for servers whose cache may miss, as with data parallelism, where
    each rank has its own.
    """
    server.flush_cache()
    prefixes = {p.prefix: p.input_ids[: p.start] for p in prompts if p.prefix}
    server.generate_all([Request(ids) for ids in prefixes.values()])
    requests = [Request(p.input_ids, new_tokens, p.start) for p in prompts]
    concurrency = 1 if scenario == "alone" else 64
    answers: Answers = {}
    problems = []
    for prompt, request, answer in zip(
        prompts, requests, server.generate_all(requests, concurrency)
    ):
        wrong = faults(request, answer)
        cached = answer.cached_tokens
        if not wrong and (cached != prompt.start if hits else cached > prompt.start):
            wrong = [f"{cached} tokens came from the cache, not {prompt.start}"]
        problems += [f"{scenario}, {prompt.name}: {fault}" for fault in wrong]
        if not wrong:
            answers[prompt.name] = answer
    if prefixes and not any(answer.cached_tokens for answer in answers.values()):
        problems.append(f"{scenario}: no prompt found its prefix in the cache")
    return answers, problems


def distances(
    prompts: Sequence[Prompt],
    sides: Sequence[Answers],
    expected: Mapping[str, Sequence[float]],
) -> dict[str, np.ndarray]:
    """By prompt, or by prefix: the distances of the two sides, the number of tokens and
    that of prompts. Only prompts that have log-probabilities on both sides count."""
    found: dict[str, np.ndarray] = {}
    for prompt in prompts:
        values = [
            side[prompt.name].input_logprobs for side in sides if prompt.name in side
        ]
        if len(values) < len(sides) or not values[0]:
            continue
        wanted = expected[prompt.name][prompt.start :]
        sums = [np.abs(np.subtract(x, wanted)).sum() for x in values]
        group = prompt.prefix or prompt.name
        found[group] = found.get(group, 0) + np.array([*sums, len(wanted), 1])
    return found


def ratio(distances: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The mean distances a token of the two sides, unpatched and patched, and the ratio
    with its interval."""
    old, new, tokens, prompts = np.array(list(distances.values())).T
    value, low, high = ratio_of_sums(new, old)
    return {
        "prompts": int(prompts.sum()),
        "tokens": int(tokens.sum()),
        "unpatched": round(old.sum() / tokens.sum(), 5),
        "patched": round(new.sum() / tokens.sum(), 5),
        "ratio": [round(x, 5) for x in (value, low, high)],
    }


def problems_of(where: str, scenario: str, row: Mapping[str, Any]) -> list[str]:
    margin = MARGIN if scenario == "all" else SCENARIO_MARGIN
    where, found = f"{where}, {scenario}", []
    value, low, high = row["ratio"]
    if not high <= 1 + margin:
        found.append(
            f"{where}: the distance from transformers is {value:.3f} times the unpatched "
            f"server's ({low:.3f} to {high:.3f}), where up to {1 + margin:.2f} is right"
        )
    if not row["unpatched"] <= CEILING:
        found.append(
            f"{where}: the unpatched server is {row['unpatched']:.3g} from transformers: "
            "they do not run the same model"
        )
    return found


def bit_equal(one: Answers, other: Answers) -> dict[str, int]:
    """How many values of two servers' answers to lone requests differ in any bit."""

    def values(answer: Answer) -> list[float]:
        return [*answer.input_logprobs, *answer.output_ids, *answer.output_logprobs]

    names = one.keys() & other.keys()
    pairs = [zip(values(one[name]), values(other[name])) for name in names]
    equal = [x == y for pair in pairs for x, y in pair]
    return {
        "prompts": len(names),
        "values": len(equal),
        "differing": len(equal) - sum(equal),
    }
