"""The page and the table of a run of the suite, from its results.json.

python -m e2e.report docs/e2e/results.json > docs/e2e/README.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e import compare, profiles

# One DeepSeek-V3 layer on a rank that has all heads: attention's multiplications and
# additions for a query and a key, and what an FP8 attention kernel might do a second.
LAYERS = 61
ATTENTION_FLOPS = 2 * 128 * (192 + 128)
ATTENTION_RATE = 1e15

MODELS = {
    "deepseek_v3_wide": "128 heads (data-parallel attention)",
    "deepseek_v3_tp8": "16 heads (tensor parallel 8)",
}

INTRODUCTION = """\
# A real server, end to end

SGLang's own server (scheduler, radix cache, chunked prefill, DeepSeek model code,
backends, KV pool) with the patch and without it, over HTTP, on small models of
DeepSeek-V3's architecture with random weights. The attention kernels, which need
SM100, are [stand-ins](../../test/mla_standin/kernels.py) in plain torch that check what
they are handed; everything else is SGLang's own.

```bash
make e2e VENV= SGLANG=/path/to/site-packages            # one GPU
make e2e VENV= SGLANG=/path/to/site-packages GPUS=0,1   # the two-GPU part
```

What this does not show: the SM100 attention kernels; a trained model's weights, or
experts (the models have 4 to 16 dense layers); CUDA graphs, which are off since the
stand-ins read lengths on the host (in prefill, SGLang's piecewise graphs take the MLA
path, which the patch has no part in); all-reduce other than NCCL's; and two-batch
overlap, which SGLang runs with an expert-parallel all-to-all backend only (unit tests
have its wrapper).
"""

COMPARE = """
## Log-probabilities and greedy tokens

*distance*: mean over tokens of |log p(server) - log p(transformers)| of the prompts'
tokens; the interval is a 95% percentile bootstrap over prompts ({resamples} resamples,
suffixes of one prefix together) of the ratio patched / unpatched. "No larger" means that
its upper end is at most {margin:.2f}; "undecided", that it is not and the prompts are too
few to tell. Single scenarios may be undecided; the last rows, which pool all of a scenario
and of a model, may not. *far tokens*: share of greedy tokens that transformers, having
read the same tokens, finds {near} or more below its own choice; no larger means that the
interval of the difference ends below {greedy:.0%}. *consistency*: distance of a request's
answer, with up to 64 requests at once, from the one it gets alone; no larger means an
upper end of at most {consistency:.2f}. *bit-equal*: the hook switched off by environment.

Prompts: random ids, 1 to 16,000 tokens; prefixes of 64 to 12,288 cached tokens in 1 to
many chunks; one seed, but three for the concurrent ones of "chunked prefill off" with
tokenspeed_mla. Rows that pool count a prompt once for each pair of servers that was asked
it; the interval knows that they are one prompt. The base-2 case is in none of them.
With trtllm_mla the stand-in returns natural log-sum-exps, as SGLang merges them, except
where the table says base-2, which is what trtllm-gen returns and which makes merged
prefix chunks wrong, patched or not.
"""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows that have the same keys."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [[str(row[name]) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(section: Mapping[str, Any]) -> str:
    m = section["machine"]
    quick = "; `--quick`" if m["quick"] else ""
    return (
        f"\n{m['gpus']} x {m['gpu']}, torch {m['torch']}, triton {m['triton']}, "
        f"SGLang {m['sglang']}{quick}.\n"
    )


def _kernels(records: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """What reached the attention kernels of the patched servers, added up."""
    totals: dict[tuple, list[int]] = {}
    for sides in records.values():
        for call in sides["patched"]["calls"]:
            kind = {True: "causal", False: "prefix chunk", None: "decode"}
            key = (
                call["kernel"],
                kind[call.get("causal")],
                ", ".join(sorted({call[f"{x}_dtype"] for x in "qkv"})),
                "yes" if call["contiguous"] else "no",
            )
            total = totals.setdefault(key, [0, 0, 0, 0])
            total[0] += call["count"]
            total[1] += call["tokens"]
            total[2] += call["count"] * call.get("padded", False)
            total[3] += call["count"] * call.get("requests_without_keys", False)
    for key, (count, tokens, padded, empty) in sorted(totals.items()):
        kernel, kind, dtypes, contiguous = key
        yield {
            "kernel": kernel,
            "kind": kind,
            "q/k/v": dtypes,
            "contiguous": contiguous,
            "calls": f"{count:,}",
            "with padding": f"{padded:,}",
            "with requests without keys": f"{empty:,}",
            "tokens": f"{tokens:,}",
        }


def _comparisons(section: Mapping[str, Any]) -> str:
    text = table(compare.rows(section["comparisons"] + section.get("pooled", [])))
    nan = sum(
        n
        for sides in section["records"].values()
        for n in sides["patched"]["nan"].values()
    )
    text += "\nWhat the patched servers handed to the attention kernels "
    text += f"(NaN among it and in what came out: {nan}):\n\n"
    return text + table(list(_kernels(section["records"])))


def _load(section: Mapping[str, Any]) -> str:
    rows = []
    for backend, sides in section.get("load", {}).items():
        for side, parts in sides.items():
            storm, answers = parts["storm"], parts["answers"]
            aborts, leaks = storm["aborts"], parts["leaks"]
            whose = leaks["memory_of"]
            memory = leaks["memory"][whose] - leaks["memory_before"][whose]
            same = f"{answers['identical']} of {answers['compared']}"
            spread = answers["first_token"]
            rows.append(
                {
                    "backend": backend,
                    "side": side,
                    "requests": f"{storm['complete']} of {storm['requests']}",
                    "aborted in queue / prefill / decode": " / ".join(
                        str(aborts[fate])
                        for fate in ("in_queue", "in_prefill", "in_decode")
                    ),
                    "long prompts aborted in prefill": "{in_prefill} of {asked}".format(
                        **parts["prefills"]["aborts"]
                    ),
                    "flushes": storm["flushes"]["at_lulls"],
                    "seconds": f"{storm['seconds']:.0f}",
                    "pool tokens held after": leaks["pool"]["used"],
                    f"GPU memory after, {whose}": f"{memory / 2**20:+.0f} MiB",
                    "same output as in quiet": same,
                    "first token's log p, mean off": f"{spread['mean']:.4f}",
                }
            )
    text = table(rows)
    for backend, r in section.get("retractions", {}).items():
        text += (
            f"\n{backend}, a pool of {r['pool']['total']} tokens: "
            f"{r['requests_retracted']} retractions, {r['complete']} of "
            f"{r['requests']} requests complete.\n"
        )
    return text


def _kill(section: Mapping[str, Any]) -> str:
    r = section["kill"]
    return (
        f"SIGKILL to {r['killed'].strip()} in mid-batch: {r['complete_before_kill']} of "
        f"{r['requests']} requests had their answer, the others get an error; the "
        f"server is down after {r['seconds_until_down']:.1f} s, nothing of it is left on "
        f"the GPU, and a fresh one gives {r['equal_after_restart']} of {r['compared']} "
        "answers bit for bit as before.\n"
    )


def _milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _profile(section: Mapping[str, Any]) -> str:
    launches, times, rates, shares = [], [], [], []
    for model, backends in section["profile"].items():
        for backend, result in backends.items():
            who = {"model": MODELS[model], "backend": backend}
            u, p = (result["layers"][side] for side in ("unpatched", "patched"))
            for size in u:
                a, b = u[size], p[size]
                launches.append(
                    {
                        **who,
                        "tokens": size,
                        "launches": f"{a['launches']} -> {b['launches']}",
                        "of the preparation": f"{a['preparation_launches']} -> "
                        f"{b['preparation_launches']}",
                        "its GPU time": f"{a['preparation_us']:.0f} -> "
                        f"{b['preparation_us']:.0f} us",
                        "ratio": f"{a['preparation_us'] / b['preparation_us']:.2f}",
                        "the whole layer": f"{a['us']:.0f} -> {b['us']:.0f} us",
                    }
                )
                if model == "deepseek_v3_wide":
                    shares.append({**who, **_share(size, a, b)})
            for size, sides in result["time_to_first_token"].items():
                both = [sides[x] for x in ("unpatched", "patched")]
                a, b = map(_milliseconds, both)
                ratio, low, high = profiles.ratio_of_medians(*both)
                times.append(
                    {
                        **who,
                        "layers": result["model_layers"],
                        "tokens": size,
                        "unpatched": f"{a:.2f} ms",
                        "patched": f"{b:.2f} ms",
                        "less": f"{1 - ratio:.1%} ({1 - high:.1%} to {1 - low:.1%})",
                        "fastest": " -> ".join(f"{1e3 * min(x):.2f}" for x in both)
                        + " ms",
                    }
                )
            both = [result["throughput"][x] for x in ("unpatched", "patched")]
            a, b = map(statistics.median, both)
            ratio, low, high = profiles.ratio_of_medians(*both)
            rates.append(
                {
                    **who,
                    "layers": result["model_layers"],
                    "prompts": f"16 of {result['throughput_prompt']} tokens",
                    "unpatched": f"{a:,.0f} tokens/s",
                    "patched": f"{b:,.0f} tokens/s",
                    "more": f"{ratio - 1:.1%} ({low - 1:.1%} to {high - 1:.1%})",
                    "fastest": " -> ".join(f"{max(x):,.0f}" for x in both)
                    + " tokens/s",
                }
            )
    return (
        "Layers of DeepSeek-V3's dimensions (hidden 7168; an MLP of 18432 over the "
        "tensor-parallel size, which is a dense layer's and as much as the 9 experts of "
        "2048 that a token meets), eager, on one GPU, so without communication, and with "
        "attention kernels that do nothing. Launches "
        "and GPU time of one layer, from SGLang's profiler; the preparation is what is "
        "neither projection, norm, activation nor attention: RoPE, concatenation, "
        "casts, cache row, zeroing the output, and for prefix chunks gather, pack and "
        "merge. Prefixes come in chunks of 2048 tokens (SGLANG_MAX_KV_CHUNK_CAPACITY; "
        "SGLang's default of 131072 takes such a prefix in one).\n\n"
        + table(launches)
        + "\nTime to first token of one request over HTTP, all of it but attention "
        "(median of requests sent to both servers in turn, with a 95% bootstrap interval "
        "of the saved share, too narrow where the host's noise lasts for many requests; "
        "and the fastest, since that noise only adds):\n\n"
        + table(times)
        + "\nPrompt throughput, all of it but attention (likewise):\n\n"
        + table(rates)
        + f"\nProjected share of a DeepSeek-V3 prefill step: saved microseconds a layer "
        f"over the layer's measured time plus attention's, taken as 128 heads x "
        f"(192 + 128) multiply-adds for each of tokens x (tokens / 2 + prefix) pairs at "
        f"{ATTENTION_RATE / 1e12:.0f} TFLOP/s; {LAYERS} layers. A projection: FP8 weights "
        "would take less time than this GPU's BF16 ones, which makes the share larger; "
        "routing, all experts of a batch and communication, which are not in it, make it "
        "smaller.\n\n" + table(shares)
    )


def _share(size: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    tokens, _, prefix = size.partition(" behind ")
    pairs = int(tokens) * (int(tokens) / 2 + int(prefix or 0))
    attention = ATTENTION_FLOPS * pairs / ATTENTION_RATE * 1e6
    saved = a["preparation_us"] - b["preparation_us"]
    return {
        "tokens": size,
        "saved": f"{saved:.0f} us",
        "layer": f"{a['us']:.0f} us",
        "attention": f"{attention:.0f} us",
        "share": f"{saved / (a['us'] + attention):.1%}",
        "saved a step": f"{saved * LAYERS / 1e3:.1f} ms",
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The page. Sections that did not run, or not to their end, are named."""
    parts = [INTRODUCTION]
    sections = (
        (
            "compare",
            COMPARE.format(
                resamples=f"{compare.RESAMPLES:,}",
                margin=1 + compare.MARGIN,
                near=compare.NEAR,
                greedy=compare.GREEDY_MARGIN,
                consistency=1 + compare.CONSISTENCY_MARGIN,
            ),
            _comparisons,
        ),
        ("parallel", "\n## Two GPUs\n", _comparisons),
        (
            "load",
            "\n## Load\n\nA storm of requests with shared prefixes, aborts and cache "
            "flushes, 200 at once; prompts of 8,192 tokens aborted partway, with short "
            "requests behind them; and the storm's requests in quiet.\n",
            _load,
        ),
        ("kill", "\n## Killed in mid-batch\n", _kill),
        ("profile", "\n## Launches and time\n", _profile),
    )
    missing = [name for name, _, _ in sections if not results.get(name)]
    if missing:
        parts.append(f"\nNot in these results: {', '.join(missing)}.\n")
    for name, title, write in sections:
        section = results.get(name)
        if not section:
            continue
        parts += [title, _machine(section), "\n"]
        try:
            parts.append(write(section))
        except (KeyError, TypeError, ZeroDivisionError) as e:
            parts.append(f"Not complete: {type(e).__name__} {e}.\n")
        problems = section["problems"] + [
            f"{label}: not done" for label in section.get("waiting", [])
        ]
        if problems:
            parts += ["\nProblems:\n\n", *(f"- {p}\n" for p in problems)]
    return "".join(parts)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
