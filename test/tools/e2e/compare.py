"""Compares a patched server's answers with an unpatched one's and with transformers'.

A prompt's distance is the mean of |log p(server) - log p(transformers)| over its
tokens. The patched server's is called no larger when the upper end of the 95%
confidence interval of the ratio of distances, patched / unpatched, is at most
1 + MARGIN. Both servers answer the same prompts, so the interval comes from resampling
prompts (suffixes of one prefix together) with both their answers: a percentile
bootstrap. Tokens weigh the same; the ratio with prompts weighing the same is reported
beside it, and its interval may not lie above 1 + MARGIN as a whole. With independent
errors of one size, prompts of all SEEDS usually pass; one seed is often undecided.

Scenarios return plain dictionaries:

    {"scenario": str,
     "answers": {prompt: {"group", "start", "length", "logprobs", "output_ids",
                          "output_logprobs", "cached_tokens", "seconds"}},
     "problems": [str]}

An answer with an error, a wrong length or a value that is not finite is a problem, and
is left out of the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from e2e.servers import Request, Server, faults

if TYPE_CHECKING:
    from e2e.reference import Reference

SEEDS = (1, 2, 3)
# Around a page (64), around prefill chunks (512, 2048), and up to 16k.
LENGTHS = (
    *(1, 2, 3, 17, 63, 64, 65, 127, 500, 511, 512, 513, 1000),
    *(2047, 2048, 2049, 4096, 8191, 16000),
)
# One page, less and more than whole pages, and what a small
# SGLANG_MAX_KV_CHUNK_CAPACITY splits into many chunks.
PREFIXES = (64, 100, 512, 1000, 2048, 4100, 8192, 12288)
SUFFIXES = (2, 65, 500, 2000)

RESAMPLES = 10_000
MARGIN = 0.02
# What a batch changes depends on who rides in it, which timing decides.
CONSISTENCY_MARGIN = 0.25
# In share of tokens.
GREEDY_MARGIN = 0.05
# A token this close to transformers' own choice, in log-probability, is a near tie.
NEAR = 0.1
# Fewer resampled prompts than this make an interval that means nothing.
FEWEST_PROMPTS = 8
# A prompt is a stray when its distance is this many times what nine in ten prompts of
# about its length stay within on the unpatched server, and that server's own for it.
# One of n tokens is allowed 1 + 4 / n times that: single tokens have heavy tails.
STRAY = 4.0
# Confidence of what is looked at besides the verdict, in every comparison, so that
# chance seldom fails a good server.
GUARD = 0.999
# Beyond this mean distance, server and reference do not run the same model.
CEILING = 0.5

Result = dict[str, Any]
Comparison = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """Token ids whose log-probabilities are asked for from `start`, the length of the
    prefix that the cache should supply. Prompts of one `group` are not independent."""

    name: str
    input_ids: list[int]
    start: int = 0
    group: str = ""


@dataclass(frozen=True)
class Family:
    """Prompts that share a prefix, which a server gets first."""

    prefix: Prompt
    prompts: tuple[Prompt, ...]

    def tokens(self, page: int = 64) -> int:
        """What it takes of the KV pool while all its prompts run."""
        pages = -(-len(self.prefix.input_ids) // page)
        for prompt in self.prompts:
            pages += -(-(len(prompt.input_ids) - prompt.start) // page) + 1
        return pages * page


def prompts(seed: int, vocab: int, lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    """Uniformly random token ids, one prompt of each length."""
    rng = np.random.default_rng([seed, 0])
    return [
        Prompt(f"seed {seed}, {n} tokens", rng.integers(vocab, size=n).tolist())
        for n in lengths
    ]


def mixed(seed: int, vocab: int, n: int = 64, longest: int = 4096) -> list[Prompt]:
    """`n` prompts of lengths from 2 to `longest`, evenly over their logarithm."""
    rng = np.random.default_rng([seed, 1])
    lengths = np.exp(rng.uniform(np.log(2), np.log(longest + 1), n)).astype(int)
    return [
        Prompt(
            f"seed {seed}, mixed {i}, {length} tokens",
            rng.integers(vocab, size=length).tolist(),
        )
        for i, length in enumerate(lengths)
    ]


def shared_prefix(
    seed: int,
    vocab: int,
    prefixes: Sequence[int] = PREFIXES,
    suffixes: Sequence[int] = SUFFIXES,
    page: int = 64,
) -> list[Family]:
    """One family for each prefix length, with one prompt for each suffix length.

    SGLang matches whole pages, and none behind logprob_start_len; so the prompts ask
    for log-probabilities from the end of their prefix's last whole page.
    """
    rng = np.random.default_rng([seed, 2])
    families = []
    for length in prefixes:
        name = f"seed {seed}, prefix {length}"
        prefix = rng.integers(vocab, size=length).tolist()
        members = tuple(
            Prompt(
                f"{name} + {n}",
                prefix + rng.integers(vocab, size=n).tolist(),
                start=length // page * page,
                group=name,
            )
            for n in suffixes
        )
        families.append(Family(Prompt(name, prefix), members))
    return families


def single(server: Server, prompts: Sequence[Prompt], new_tokens: int = 8) -> Result:
    """One request after another, with an empty cache."""
    server.flush_cache()
    return _ask("single", server, prompts, 1, new_tokens)


def concurrent(
    server: Server,
    prompts: Sequence[Prompt],
    new_tokens: int = 8,
    concurrency: int = 64,
) -> Result:
    """All at once, with an empty cache."""
    server.flush_cache()
    return _ask("concurrent", server, prompts, concurrency, new_tokens)


def prefix_hits(
    server: Server,
    families: Sequence[Family],
    concurrency: int = 64,
    room: int = 57344,
    hits: bool = True,
) -> Result:
    """The prefixes, then all prompts at once, so that prefixes of every length, and of
    any number of chunks, meet in one batch.

    Families take turns in a flushed cache where `room`, the tokens of KV pool that may
    be filled, does not hold all. `hits=False` is for servers whose cache may miss, as
    with data parallelism, where each rank has its own.
    """
    scenario = "prefix hits"
    result: Result = {"scenario": scenario, "answers": {}, "problems": []}
    for turn in _turns(families, room):
        server.flush_cache()
        prefixes = [family.prefix for family in turn]
        members = [prompt for family in turn for prompt in family.prompts]
        warm = _ask(scenario, server, prefixes, concurrency, logprobs=False)
        asked = _ask(scenario, server, members, concurrency, hits=hits)
        result["answers"] |= asked["answers"]
        result["problems"] += warm["problems"] + asked["problems"]
    found = any(answer["cached_tokens"] for answer in result["answers"].values())
    if not hits and not found:
        result["problems"].append(
            f"{scenario}: no prompt found its prefix in the cache"
        )
    return result


def greedy(
    server: Server, prompts: Sequence[Prompt], n: int = 16, concurrency: int = 64
) -> Result:
    """`n` greedy tokens, all prompts at once; log-probabilities of those alone."""
    server.flush_cache()
    return _ask("greedy", server, prompts, concurrency, n, logprobs=False)


def _turns(families: Sequence[Family], room: int) -> Iterator[list[Family]]:
    turn: list[Family] = []
    filled = 0
    for family in families:
        tokens = family.tokens()
        if tokens > room:
            raise ValueError(
                f"{family.prefix.name} takes {tokens} tokens of KV pool, more than "
                f"room={room}; give fewer suffixes or more room"
            )
        if filled + tokens > room:
            yield turn
            turn, filled = [], 0
        turn.append(family)
        filled += tokens
    if turn:
        yield turn


def _ask(
    scenario: str,
    server: Server,
    prompts: Sequence[Prompt],
    concurrency: int,
    new_tokens: int = 0,
    logprobs: bool = True,
    hits: bool = True,
) -> Result:
    names = {prompt.name for prompt in prompts}
    if len(names) < len(prompts):
        raise ValueError("two prompts have the same name; give each its own")
    # The last token's place asks for the output's log-probabilities and no other.
    starts = [p.start if logprobs else len(p.input_ids) - 1 for p in prompts]
    requests = [
        Request(prompt.input_ids, new_tokens, start)
        for prompt, start in zip(prompts, starts)
    ]
    answers = server.generate_all(requests, concurrency)
    result: Result = {"scenario": scenario, "answers": {}, "problems": []}
    if len(answers) != len(requests):
        result["problems"].append(
            f"{scenario}: {len(answers)} answers to {len(requests)} requests"
        )
    for prompt, request, answer in zip(prompts, requests, answers):
        problems = faults(request, vars(answer))
        wrong = answer.cached_tokens != prompt.start
        if not hits:
            wrong = answer.cached_tokens > prompt.start
        if not problems and wrong:
            problems.append(
                f"{answer.cached_tokens} tokens came from the cache, not {prompt.start}"
            )
        if problems:
            result["problems"] += [f"{scenario}, {prompt.name}: {p}" for p in problems]
            continue
        result["answers"][prompt.name] = {
            "group": prompt.group or prompt.name,
            "start": request.logprob_start,
            "length": len(prompt.input_ids),
            "logprobs": list(answer.input_logprobs),
            "output_ids": list(answer.output_ids),
            "output_logprobs": list(answer.output_logprobs),
            "cached_tokens": answer.cached_tokens,
            "seconds": answer.seconds,
        }
    return result


def expected(reference: Reference, prompts: Iterable[Prompt]) -> dict[str, list[float]]:
    """A Reference's log-probabilities of what the prompts ask for, by name."""
    return {p.name: reference.logprobs(p.input_ids)[p.start :] for p in prompts}


def scores(
    reference: Reference, result: Result, prompts: Iterable[Prompt]
) -> dict[str, dict[str, list[float]]]:
    """A Reference's log-probabilities and margins of the outputs of a result."""
    found = {}
    for prompt in prompts:
        if prompt.name in result["answers"]:
            outputs = result["answers"][prompt.name]["output_ids"]
            logprobs, margins = reference.score(prompt.input_ids, outputs)
            found[prompt.name] = {"logprobs": logprobs, "margins": margins}
    return found


def distance(logprobs: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Mean, RMS and largest of the absolute differences of one prompt's tokens."""
    if len(logprobs) != len(reference):
        raise ValueError(
            f"{len(logprobs)} log-probabilities against {len(reference)} of the "
            "reference; both must be of the same tokens"
        )
    if not len(logprobs):
        raise ValueError("no log-probabilities; a prompt of one token has no distance")
    gap = np.abs(np.subtract(logprobs, reference, dtype=np.float64))
    if not np.isfinite(gap).all():
        raise ValueError(
            f"log-probability {int(np.argmin(np.isfinite(gap)))} or its reference is "
            "not finite"
        )
    return {
        "mean": float(gap.mean()),
        "rms": float(np.sqrt(np.mean(gap**2))),
        "max": float(gap.max()),
        "tokens": len(gap),
    }


def paired(
    patched: Sequence[float],
    unpatched: Sequence[float],
    weights: Optional[Sequence[float]] = None,
    groups: Optional[Sequence[str]] = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Weighted means of two servers' values for the same prompts, their difference and
    ratio (patched to unpatched), and percentile-bootstrap intervals of both, from
    resampling groups of prompts (each prompt alone by default)."""
    patched = np.asarray(patched, dtype=np.float64)
    unpatched = np.asarray(unpatched, dtype=np.float64)
    if patched.shape != unpatched.shape or not patched.size:
        raise ValueError(
            f"{patched.size} patched values and {unpatched.size} unpatched ones; give "
            "one of each for every prompt"
        )
    if not (np.isfinite(patched).all() and np.isfinite(unpatched).all()):
        raise ValueError("values to compare are not finite")
    weights = np.ones(len(patched)) if weights is None else np.asarray(weights, float)
    members = np.arange(len(patched))
    if groups is not None:
        members = np.unique(list(groups), return_inverse=True)[1]
    sums = np.stack(
        [
            np.bincount(members, weights * values)
            for values in (patched, unpatched, np.ones(len(patched)))
        ]
    )
    n = sums.shape[1]
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    p, u = _means(sums.sum(1))
    ps, us = _means(sums[:, drawn].sum(2))

    def interval(values: np.ndarray, level: float = confidence) -> list[float]:
        ends = (1 - level) / 2, (1 + level) / 2
        # A ratio may be infinite, which interpolation would turn into NaN.
        return [float(x) for x in np.quantile(values, ends, method="nearest")]

    return {
        "patched": float(p),
        "unpatched": float(u),
        "difference": float(p - u),
        "difference_ci": interval(ps - us),
        "ratio": float(_ratio(p, u)),
        "ratio_ci": interval(_ratio(ps, us)),
        "ratio_ci_sure": interval(_ratio(ps, us), GUARD),
        "independent": n,
    }


def _means(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return sums[0] / sums[2], sums[1] / sums[2]


def _ratio(patched: np.ndarray, unpatched: np.ndarray) -> np.ndarray:
    """1 where both are zero: servers that equal the reference are alike."""
    patched, unpatched = np.atleast_1d(patched), np.atleast_1d(unpatched)
    ratio = np.where(patched == 0, 1.0, np.inf)
    np.divide(patched, unpatched, out=ratio, where=unpatched > 0)
    return ratio if ratio.size > 1 else ratio[0]


def judge(statistics: Mapping[str, Any], margin: float = MARGIN) -> dict[str, Any]:
    """The verdict on what `paired` returned: "no larger", "larger", or "undecided"
    where the prompts are too few to tell. Only the first is ok.

    "Larger" takes an interval of the level GUARD: a run makes dozens of comparisons, of
    which chance would call some larger at 95%.
    """
    low, high = statistics["ratio_ci"]
    found = (
        f"patched / unpatched = {statistics['ratio']:.4f}, "
        f"95% interval {low:.4f} to {high:.4f}"
    )
    n = statistics["independent"]
    if n < FEWEST_PROMPTS:
        verdict = "undecided"
        found = f"{n} independent prompts; give {FEWEST_PROMPTS} or more"
    elif high <= 1 + margin:
        verdict = "no larger"
    elif statistics["ratio_ci_sure"][0] > 1:
        verdict = "larger"
    else:
        verdict = "undecided"
        found += "; more prompts would narrow it"
    return {
        "ok": verdict == "no larger",
        "verdict": verdict,
        "reason": f"{found} (no larger: up to {1 + margin:.2f})",
        "margin": margin,
    }


def strays(
    names: Sequence[str],
    patched: Sequence[float],
    unpatched: Sequence[float],
    tokens: Sequence[int],
) -> list[str]:
    """Prompts that the patched server alone gets grossly wrong, which a mean over many
    tokens can hide."""
    unpatched, tokens = np.asarray(unpatched), np.asarray(tokens)
    found = []
    for name, p, u, n in zip(names, patched, unpatched, tokens):
        # Means over fewer tokens scatter more.
        alike = unpatched[(tokens >= n / 4) & (tokens <= n * 4)]
        usual = max(np.quantile(alike, 0.9), np.median(unpatched))
        if p > STRAY * (1 + 4 / n) * max(usual, u):
            found.append(
                f"{name}: distance {p:.4g}, unpatched {u:.4g}, up to {usual:.4g} usual"
            )
    return found


def compare(
    patched: Result,
    unpatched: Result,
    reference: Mapping[str, Sequence[float]],
    *,
    backend: str,
    scenario: Optional[str] = None,
    against: str = "bfloat16",
    margin: float = MARGIN,
    ceiling: float = CEILING,
) -> Comparison:
    """Are the patched server's prompt log-probabilities no further from `reference`
    (as `expected` returns it) than the unpatched server's?"""
    names, problems = _common(patched, unpatched)
    names = [name for name in names if patched["answers"][name]["logprobs"]]
    comparison = _comparison("distance", scenario or patched["scenario"], backend)
    comparison["reference"] = f"transformers, {against}"
    comparison["statistic"] = "mean |log p - log p(reference)| over tokens"
    if not names:
        return _failed(comparison, problems + ["no prompt has log-probabilities"])
    a, b = patched["answers"], unpatched["answers"]
    for name in names:
        if name not in reference:
            raise ValueError(f"the reference has no {name!r}; it must have all prompts")
    p = [distance(a[name]["logprobs"], reference[name]) for name in names]
    u = [distance(b[name]["logprobs"], reference[name]) for name in names]
    tokens = np.array([d["tokens"] for d in p])
    groups = [a[name]["group"] for name in names]
    p_mean, u_mean = [d["mean"] for d in p], [d["mean"] for d in u]
    statistics = paired(p_mean, u_mean, tokens, groups)
    by_prompt = paired(p_mean, u_mean, None, groups, confidence=GUARD)
    comparison |= _figures(statistics, names, tokens)
    comparison |= judge(statistics, margin)
    comparison |= {
        "by_prompt": by_prompt,
        "patched_rms": _pooled_rms(p, tokens),
        "unpatched_rms": _pooled_rms(u, tokens),
        "patched_max": max(d["max"] for d in p),
        "unpatched_max": max(d["max"] for d in u),
        "apart": _mean_apart([(a[x]["logprobs"], b[x]["logprobs"]) for x in names]),
        "longest": max(a[name]["length"] for name in names),
    }
    low = by_prompt["ratio_ci"][0]
    if low > 1 + margin and by_prompt["independent"] >= FEWEST_PROMPTS:
        problems.append(
            "with prompts weighing the same, patched / unpatched = "
            f"{by_prompt['ratio']:.4f}, {GUARD:.1%} interval from {low:.4f}"
        )
    if statistics["unpatched"] > ceiling:
        problems.append(
            f"the unpatched server is {statistics['unpatched']:.3g} from transformers, "
            f"more than {ceiling}: they do not run the same model"
        )
    problems += [f"stray: {stray}" for stray in strays(names, p_mean, u_mean, tokens)]
    return _failed(comparison, problems)


def pooled(results: Mapping[str, Result]) -> Result:
    """The answers of several runs as one, named "<run>: <prompt>". Answers to one
    prompt stay one group, whatever the run."""
    answers = {
        f"{run}: {name}": answer
        for run, result in results.items()
        for name, answer in result["answers"].items()
    }
    return {"scenario": "all", "answers": answers, "problems": []}


def bit_equal(a: Result, b: Result) -> list[str]:
    """Where two results differ in any bit: one line for each prompt. Only results of
    requests that ran alone can be expected to be equal."""
    names, differences = _common(a, b)
    for name in names:
        for key in ("logprobs", "output_ids", "output_logprobs"):
            x, y = a["answers"][name][key], b["answers"][name][key]
            if x != y:
                gap = f"{len(x)} values against {len(y)}"
                if len(x) == len(y):
                    unequal = [i for i in range(len(x)) if x[i] != y[i]]
                    first = unequal[0]
                    gap = (
                        f"{len(unequal)} of {len(x)} differ, the first at {first}: "
                        f"{x[first]} and {y[first]}"
                    )
                differences.append(f"{name}: {key}: {gap}")
    return differences


def compare_off(
    off: Result, unpatched: Result, *, backend: str, scenario: str = "hook off"
) -> Comparison:
    """With the hook off by environment, is a patched server the unpatched one?"""
    names, _ = _common(off, unpatched)
    comparison = _comparison("bit-equal", scenario, backend)
    comparison["statistic"] = "answers that are equal bit for bit"
    values = sum(len(off["answers"][name]["logprobs"]) for name in names)
    outputs = sum(len(off["answers"][name]["output_ids"]) for name in names)
    comparison |= {
        "prompts": len(names),
        "tokens": values + outputs,
        "ok": True,
        "verdict": "bit-equal",
        "reason": "equal bit for bit",
    }
    problems = bit_equal(off, unpatched)
    if not values + outputs:
        problems.append("nothing to compare")
    return _failed(comparison, problems, "differs")


def consistency(alone: Result, in_batch: Result) -> dict[str, Any]:
    """How far the same requests' answers depend on the batch they ride in. Every prompt
    of `in_batch` must be in `alone`, which may have more."""
    names = [name for name in in_batch["answers"] if name in alone["answers"]]
    a, b = alone["answers"], in_batch["answers"]
    scored = [name for name in names if a[name]["logprobs"]]
    outputs = [name for name in names if a[name]["output_ids"]]
    gaps = {name: distance(b[name]["logprobs"], a[name]["logprobs"]) for name in scored}
    tokens = sum(gap["tokens"] for gap in gaps.values())
    same = {name: a[name]["output_ids"] == b[name]["output_ids"] for name in outputs}
    return {
        "prompts": len(names),
        "missing": [name for name in in_batch["answers"] if name not in a],
        "tokens": tokens,
        "mean": sum(g["mean"] * g["tokens"] for g in gaps.values()) / max(tokens, 1),
        "max": max((gap["max"] for gap in gaps.values()), default=0.0),
        "equal_prompts": _share(gap["max"] == 0 for gap in gaps.values()),
        "equal_outputs": _share(same.values()),
        "means": {name: gap["mean"] for name, gap in gaps.items()},
        "lengths": {name: gap["tokens"] for name, gap in gaps.items()},
        "same_outputs": same,
    }


def compare_consistency(
    patched_alone: Result,
    patched_in_batch: Result,
    unpatched_alone: Result,
    unpatched_in_batch: Result,
    *,
    backend: str,
    scenario: str = "alone against in a batch",
    margin: float = CONSISTENCY_MARGIN,
) -> Comparison:
    """Do the patched server's answers depend on the batch no more than the unpatched
    one's?"""
    patched = consistency(patched_alone, patched_in_batch)
    unpatched = consistency(unpatched_alone, unpatched_in_batch)
    comparison = _comparison("consistency", scenario, backend)
    comparison["reference"] = "the same server, alone"
    comparison["statistic"] = "mean |log p - log p(alone)| over tokens"
    problems = _gathered(
        patched_alone, patched_in_batch, unpatched_alone, unpatched_in_batch
    )
    for which, found in (("patched", patched), ("unpatched", unpatched)):
        if found["missing"]:
            problems.append(f"{which}: no answer alone to {found['missing'][0]}")
    names = [name for name in patched["means"] if name in unpatched["means"]]
    if len(names) < max(len(patched["means"]), len(unpatched["means"])):
        problems.append("the two servers did not answer the same prompts")
    if not names:
        return _failed(comparison, problems + ["no prompt has log-probabilities"])
    p, u = ([side["means"][name] for name in names] for side in (patched, unpatched))
    tokens = np.array([patched["lengths"][name] for name in names])
    groups = [patched_in_batch["answers"][name]["group"] for name in names]
    statistics = paired(p, u, tokens, groups)
    comparison |= _figures(statistics, names, tokens)
    comparison |= judge(statistics, margin)
    comparison |= {
        f"{which}_{key}": side[key]
        for which, side in (("patched", patched), ("unpatched", unpatched))
        for key in ("max", "equal_prompts", "equal_outputs")
    }
    both = [
        name for name in patched["same_outputs"] if name in unpatched["same_outputs"]
    ]
    if both:
        # Of outputs that the batch changed, so that more is worse.
        p, u = ([not s["same_outputs"][x] for x in both] for s in (patched, unpatched))
        groups = [patched_in_batch["answers"][name]["group"] for name in both]
        changed = paired(p, u, None, groups, confidence=GUARD)
        comparison["changed_outputs"] = changed
        if changed["difference_ci"][0] > 0:
            problems.append(
                f"a batch changes {changed['patched']:.1%} of greedy continuations, "
                f"and {changed['unpatched']:.1%} of the unpatched server's"
            )
    return _failed(comparison, problems)


def agreement(
    result: Result, scored: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """How far the greedy outputs of a result are transformers' own choices.

    `scored` is from `scores`: at every token, transformers has read what the server
    chose before it, so one divergence does not spoil what follows.
    """
    margins = {}
    for name, answer in result["answers"].items():
        if name not in scored:
            raise ValueError(f"no scores of {name!r}; give those of all prompts")
        margins[name] = np.asarray(scored[name]["margins"], dtype=np.float64)
        if len(margins[name]) != len(answer["output_ids"]):
            raise ValueError(
                f"{name}: {len(margins[name])} margins of "
                f"{len(answer['output_ids'])} tokens"
            )
        if not np.isfinite(margins[name]).all():
            raise ValueError(f"{name}: a margin is not finite")
    everything = np.concatenate([np.empty(0), *margins.values()])
    if not everything.size:
        raise ValueError("no greedy tokens to judge")
    agreed = sum(
        int(np.argmax(m > 0)) if (m > 0).any() else len(m) for m in margins.values()
    )
    return {
        "prompts": len(margins),
        "tokens": int(everything.size),
        "equal": float(np.mean(everything == 0)),
        "near": float(np.mean(everything < NEAR)),
        "before_divergence": agreed / everything.size,
        "mean_margin": float(everything.mean()),
        "max_margin": float(everything.max()),
        "far": {name: float(np.mean(m >= NEAR)) for name, m in margins.items()},
    }


def compare_greedy(
    patched: Result,
    unpatched: Result,
    patched_scores: Mapping[str, Mapping[str, Sequence[float]]],
    unpatched_scores: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    backend: str,
    scenario: Optional[str] = None,
    against: str = "bfloat16",
    margin: float = GREEDY_MARGIN,
) -> Comparison:
    """Are the patched server's greedy tokens no more often far from transformers' own
    choice than the unpatched one's? `margin` is in share of tokens."""
    names, problems = _common(patched, unpatched)
    comparison = _comparison("greedy", scenario or patched["scenario"], backend)
    comparison["reference"] = f"transformers, {against}"
    comparison["statistic"] = (
        f"share of tokens {NEAR} or more below the reference's own choice"
    )
    comparison["margin"] = margin
    if not any(patched["answers"][name]["output_ids"] for name in names):
        return _failed(comparison, problems + ["no greedy tokens to judge"])
    p = agreement(patched, patched_scores)
    u = agreement(unpatched, unpatched_scores)
    tokens = np.array([len(patched["answers"][name]["output_ids"]) for name in names])
    statistics = paired(
        [p["far"][name] for name in names],
        [u["far"][name] for name in names],
        tokens,
        [patched["answers"][name]["group"] for name in names],
    )
    comparison |= _figures(statistics, names, tokens)
    low, high = statistics["difference_ci"]
    few = statistics["independent"] < FEWEST_PROMPTS
    verdict = "undecided"
    if high <= margin and not few:
        verdict = "no larger"
    elif low > 0 and not few:
        verdict = "larger"
    comparison |= {
        "ok": verdict == "no larger",
        "verdict": verdict,
        "reason": (
            f"patched - unpatched = {statistics['difference']:.2%}, 95% interval "
            f"{low:.2%} to {high:.2%}, {statistics['independent']} independent prompts "
            f"(no larger: up to {margin:.0%})"
        ),
    }
    comparison |= {
        f"{which}_{key}": side[key]
        for which, side in (("patched", p), ("unpatched", u))
        for key in ("equal", "near", "before_divergence", "mean_margin", "max_margin")
    }
    return _failed(comparison, problems)


def rows(comparisons: Iterable[Comparison]) -> list[dict[str, str]]:
    """One table's rows, all with the same columns."""
    table = []
    for c in comparisons:
        share = c["kind"] == "greedy"

        def figure(value: Optional[float], sign: str = "") -> str:
            if value is None:
                return "-"
            return format(value, f"{sign}.2%" if share else f"{sign}.5f")

        interval = c["difference_ci"]
        table.append(
            {
                "scenario": c["scenario"],
                "backend": c["backend"],
                "measure": "far tokens" if share else c["kind"],
                "against": c["reference"],
                "prompts": str(c["prompts"]),
                "tokens": str(c["tokens"]),
                "unpatched": figure(c["unpatched_distance"]),
                "patched": figure(c["patched_distance"]),
                "difference, 95%": (
                    f"{figure(interval[0], '+')} to {figure(interval[1], '+')}"
                    if interval
                    else "-"
                ),
                "ratio, 95%": (
                    f"{c['ratio']:.3f} ({c['ratio_ci'][0]:.3f} to "
                    f"{c['ratio_ci'][1]:.3f})"
                    if c["ratio_ci"] and not share
                    else "-"
                ),
                "verdict": (
                    c["verdict"]
                    if c["ok"] or undecided(c)
                    else f"NOT OK: {c['verdict']}"
                ),
            }
        )
    return table


def undecided(comparison: Comparison) -> bool:
    """Not ok for no other reason than too few prompts."""
    return comparison["verdict"] == "undecided" and not comparison["problems"]


def failures(comparisons: Iterable[Comparison], decided: bool = False) -> list[str]:
    """Why comparisons are not ok; empty when all are. `decided` lets those pass that
    are undecided, where `pooled` decides on all their prompts together."""
    return [
        f"{c['scenario']}, {c['backend']}, {c['kind']}: {why}"
        for c in comparisons
        if not c["ok"] and not (decided and undecided(c))
        for why in (c["problems"] or [c["reason"]])
    ]


def _comparison(kind: str, scenario: str, backend: str) -> Comparison:
    return {
        "kind": kind,
        "scenario": scenario,
        "backend": backend,
        "reference": "the unpatched server",
        "prompts": 0,
        "tokens": 0,
        "patched_distance": None,
        "unpatched_distance": None,
        "difference": None,
        "difference_ci": None,
        "ratio": None,
        "ratio_ci": None,
        "ok": False,
        "verdict": "not judged",
        "reason": "",
        "problems": [],
    }


def _figures(
    statistics: Mapping[str, Any], names: Sequence[str], tokens: np.ndarray
) -> dict[str, Any]:
    return {
        "prompts": len(names),
        "tokens": int(tokens.sum()),
        "independent": statistics["independent"],
        "patched_distance": statistics["patched"],
        "unpatched_distance": statistics["unpatched"],
        **{
            key: statistics[key]
            for key in ("difference", "difference_ci", "ratio", "ratio_ci")
        },
    }


def _failed(
    comparison: Comparison, problems: Sequence[str], verdict: str = "problems"
) -> Comparison:
    """The comparison itself, unless there are problems. A verdict that is not ok stays,
    and its reason comes first."""
    if not problems:
        return comparison
    if comparison["ok"] or not comparison["reason"]:
        comparison |= {"ok": False, "verdict": verdict}
    else:
        problems = [comparison["reason"], *problems]
    return comparison | {"problems": list(problems)}


def _gathered(*results: Result) -> list[str]:
    return [problem for result in results for problem in result["problems"]]


def _common(patched: Result, unpatched: Result) -> tuple[list[str], list[str]]:
    """Prompts that both answered, and the problems of both."""
    problems = [
        f"{which}: {problem}"
        for which, result in (("patched", patched), ("unpatched", unpatched))
        for problem in result["problems"]
    ]
    a, b = patched["answers"], unpatched["answers"]
    names = [name for name in a if name in b]
    lone = [*(a.keys() - b.keys()), *(b.keys() - a.keys())]
    # Named already, unless the two were asked different things.
    lone = [name for name in lone if not any(f"{name}: " in text for text in problems)]
    problems += [f"{name}: answered by one server only" for name in sorted(lone)]
    return names, problems


def _mean_apart(pairs: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float:
    gaps = [np.abs(np.subtract(x, y)) for x, y in pairs]
    return float(np.concatenate(gaps).mean())


def _pooled_rms(distances: Sequence[Mapping[str, float]], tokens: np.ndarray) -> float:
    squares = np.array([d["rms"] ** 2 for d in distances])
    return float(np.sqrt(np.average(squares, weights=tokens)))


def _share(flags: Iterable[bool]) -> Optional[float]:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None
