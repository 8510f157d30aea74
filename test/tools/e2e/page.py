"""The page of a run of the suite, from its results.json.

python -m e2e.page docs/e2e/results.json > docs/e2e/README.md
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.compare import MARGIN, SCENARIO_MARGIN
from e2e.profiles import GRAPHS_POOL
from resampling import RESAMPLES
from tabulate import tabulate

Row = Mapping[str, Any]

# One DeepSeek-V3 layer on a rank that has all heads: attention's multiplications and
# additions for a query and a key, and what an FP8 attention kernel might do a second.
LAYERS = 61
ATTENTION_FLOPS = 2 * 128 * (192 + 128)
ATTENTION_RATE = 1e15
PROJECTED = "deepseek_v3_wide"
MODELS = {PROJECTED: "128 heads", "deepseek_v3_tp8": "16 heads"}
SCENARIOS = ("alone", "at once", "behind prefixes", "all")

INTRODUCTION = """\
# A real server, end to end

SGLang's own server (scheduler, radix cache, chunked prefill, DeepSeek model code,
backends, KV pool) with the patch and without it, over HTTP, on small models of
DeepSeek-V3's architecture with random weights. The attention kernels, which need
SM100, are [stand-ins](../../test/mla_standin/kernels.py) in plain torch that check what
they are handed; fa3's, on Hopper, and everything else are SGLang's own.

```bash
make e2e VENV= SGLANG=/path/to/site-packages            # one GPU
make e2e VENV= SGLANG=/path/to/site-packages GPUS=0,1   # with the two-GPU part
make e2e VENV= SGLANG=/path/to/site-packages QUICK=1    # fewer servers and prompts
```

What this does not show: the SM100 attention kernels; a trained model's weights, or
experts (the models have 4 to 16 dense layers); CUDA graphs of decoding, which are off
since the stand-ins read lengths on the host; all-reduce other than NCCL's; and two-batch
overlap, which SGLang runs with an expert-parallel all-to-all backend only (unit tests
have its wrapper).
"""

COMPARE = f"""
The distance from transformers' own forward is the mean over the prompts' tokens of
|log p(server) - log p(transformers)|. Its ratio, patched to unpatched, has a 95%
bootstrap interval over prompts ({RESAMPLES:,} resamples, suffixes of one prefix
together), which may not reach beyond {1 + MARGIN:.2f}, of a
single scenario beyond {1 + SCENARIO_MARGIN:.2f}. Prompts are random ids: 1 to
16,000 tokens one at a time, 64 of up to 4,096 tokens at once, and suffixes of 2 to 2,000
tokens behind cached prefixes of 64 to 12,288 in one to many chunks (`--quick`: up to
2,049, and prefixes up to 2,048). With trtllm_mla the stand-in returns base-2
log-sum-exps to patched servers, as trtllm-gen does, and natural ones to unpatched servers,
as SGLang merges them.
"""

LSE = """
trtllm-gen returns base-2 log-sum-exps. Here the stand-in returns them to both servers: the
unpatched one merges prefix chunks with wrong weights, the patched one converts them first.
"""

LOAD = """
A storm of requests with shared prefixes, 200 at once, in waves, with aborts and cache
flushes; prompts of 8,192 tokens aborted partway, with short requests behind them; and some
of the storm's requests alone, to compare with.
"""

PROFILE = f"""
Models of 8 layers with 128 heads and a dense MLP of 18432, as with data-parallel
attention (the MLP is as much as the 9 experts of 2048 that a token meets), and of 16
layers with an eighth of both, as at tensor parallel size 8; hidden size 7168, eager, on
one GPU, so without communication, and with attention kernels that do nothing.

Launches and GPU time of one layer, from SGLang's profiler; the preparation is what is
neither projection, norm, activation nor attention: RoPE, concatenation, casts, cache row,
zeroing the output, and for prefix chunks gather, pack and merge. Prefixes come in chunks
of 2048 tokens (SGLANG_MAX_KV_CHUNK_CAPACITY; SGLang's default of 131072 takes such a
prefix in one).

What is saved of a DeepSeek-V3 prefill step is a projection: microseconds saved a layer
over the layer's measured time plus attention's, taken as 128 heads x (192 + 128)
multiply-adds for each of tokens x (tokens / 2 + prefix) pairs at
{ATTENTION_RATE / 1e12:.0f} TFLOP/s; {LAYERS} layers. FP8 weights would take less time than
this GPU's BF16 ones, which makes the share larger; routing, all experts of a batch and
communication, which are not in it, make it smaller.
"""

FIRST_TOKEN = """
Time to first token of one request over HTTP, all of it but attention: medians of requests
sent to both servers in turn, with a 95% bootstrap interval of the saved share, too narrow
where the host's noise lasts for many requests; and the fastest, since that noise only adds.
"""

GRAPHS = f"""
The unpatched server keeps SGLang's prefill CUDA graphs (captured at these sizes only, to
start sooner), the patched one turns them off; trtllm_mla, 8 layers with 128 heads as
above, a KV pool of {GRAPHS_POOL:,} tokens. In a graph attention is absorbed and runs on
FlashInfer's kernel, really, after torch has copied the layer's whole pool to BF16. The
patched server's attention kernel is a stand-in that does nothing, so FlashInfer's is
left out on both sides and shown apart: as GPU time, and taken off the unpatched server's
time to first token, all layers of it, in the last column.
"""


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    return f"\n{tabulate(rows, 'keys', tablefmt='pipe', disable_numparse=True)}\n"


def _interval(ratio: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*ratio)


def compare(rows: Sequence[Row]) -> str:
    distances = [
        {
            "servers": row["pair"],
            "backend": row["backend"],
            "tokens": f"{row['all']['tokens']:,}",
            "distance": "{unpatched:.4f} -> {patched:.4f}".format(**row["all"]),
            **{
                name: _interval(row[name]["ratio"]) if name in row else "-"
                for name in SCENARIOS
            },
        }
        for row in rows
        if "all" in row
    ]
    text = table(distances)
    for row in rows:
        if "off" in row:
            text += (
                "\n{pair}, {backend}: with SGLANG_MLA_FP8_PREFILL=off and "
                "SGLANG_MLA_FP8_PREFILL_LSE=e, {differing:,} of {values:,} values "
                "({prompts} prompts, one at a time) differ in any bit from the unpatched "
                "server's.\n"
            ).format(**row, **row["off"])
    totals: dict[str, list[int]] = {}
    for row in rows:
        for name, counts in row.get("kernels", {}).items():
            known = totals.get(name, [0] * len(counts))
            totals[name] = [a + b for a, b in zip(known, counts)]
    if totals:
        text += (
            "\nWhat the patched servers handed to the attention kernels. Anything but "
            "contiguous FP8 without NaN would be listed as not ok.\n"
        )
    columns = ("calls", "with padding", "with requests without keys", "tokens")
    return text + table(
        {"kernel": name, **dict(zip(columns, (f"{n:,}" for n in counts)))}
        for name, counts in sorted(totals.items())
    )


def load(rows: Sequence[Row]) -> str:
    text = table(
        {
            "backend": row["load"],
            "side": row["side"],
            "requests answered": f"{row['complete']} of {row['requests']}",
            "aborted": row["aborted"],
            "long prompts aborted in prefill": "{aborted_in_prefill} of {prefills}".format(
                **row
            ),
            "flushes": row["flushes"],
            "seconds": f"{row['seconds']:.0f}",
            "pool tokens held after": row["pool_tokens_held"],
            "GPU memory after": f"{row['memory_growth_mib']:+d} MiB",
            "same output as alone": f"{row['same']} of {row['compared']}",
            "first token's log p, mean off": f"{row.get('first_token_off', math.nan):.4f}",
        }
        for row in rows
        if "load" in row
    )
    for row in rows:
        if "small pool" in row:
            text += (
                f"\n{row['small pool']}, a pool of 4096 tokens: {row['retractions']} "
                f"retractions, {row['complete']} of {row['requests']} requests answered.\n"
            )
        if "kill" in row:
            text += (
                f"\n{row['kill']}, SIGKILL to a scheduler in mid-batch: {row['complete']} "
                f"of {row['requests']} requests had their answer, the others get an error; "
                f"the server is down after {row['seconds_until_down']:.1f} s, and a fresh "
                f"one gives {row['equal']} of {row['compared']} answers bit for bit as "
                "before.\n"
            )
    return text


def _who(row: Row) -> dict[str, str]:
    behind = f" behind {row['prefix']}" if row.get("prefix") else ""
    return {
        "layers of": MODELS[row["model"]],
        "backend": row["backend"],
        "tokens": f"{row['tokens']}{behind}",
    }


def _share(row: Row) -> str:
    """The projected share of a DeepSeek-V3 prefill step, and the time."""
    if row["model"] != PROJECTED:
        return "-"
    pairs = row["tokens"] * (row["tokens"] / 2 + row["prefix"])
    attention = ATTENTION_FLOPS * pairs / ATTENTION_RATE * 1e6
    old, new = row["layer"]["unpatched"], row["layer"]["patched"]
    saved = old["preparation_us"] - new["preparation_us"]
    share = saved / (old["us"] + attention)
    return f"{share:.1%}, {saved * LAYERS / 1e3:.1f} ms"


def profile(rows: Sequence[Row]) -> str:
    launches, first_token, throughput = [], [], []
    for row in rows:
        if "layer" in row:
            old, new = row["layer"]["unpatched"], row["layer"]["patched"]

            def change(key: str) -> str:
                return f"{old[key]:.0f} -> {new[key]:.0f}"

            launches.append(
                {
                    **_who(row),
                    "launches": change("launches"),
                    "of the preparation": change("preparation_launches"),
                    "its us": change("preparation_us"),
                    "ratio": f"{old['preparation_us'] / new['preparation_us']:.2f}",
                    "us in all": change("us"),
                    "saved of a step": _share(row),
                }
            )
            value, low, high = row["first_token"]["ratio"]
            first_token.append(
                {
                    **_who(row),
                    **_sides(row["first_token"], 1e3, "{:.2f} ms"),
                    "less": f"{1 - value:.1%} ({1 - high:.1%} to {1 - low:.1%})",
                }
            )
        if "throughput" in row:
            value, low, high = row["throughput"]["ratio"]
            throughput.append(
                {
                    **_who(row),
                    **_sides(row["throughput"], 1, "{:,.0f} tokens/s"),
                    "more": f"{value - 1:.1%} ({low - 1:.1%} to {high - 1:.1%})",
                }
            )
    text = table(launches)
    text += FIRST_TOKEN + table(first_token)
    return text + "\nThroughput of 16 prompts at once, likewise:\n" + table(throughput)


def graphs(rows: Sequence[Row]) -> str:
    text = []
    for row in rows:
        if "layer" not in row:
            continue
        old, new = row["layer"]["unpatched"], row["layer"]["patched"]
        first = [1e3 * x for x in row["first_token"]["medians"]]
        attention = old["attention_us"] * row["layers"] / 1e3
        text.append(
            {
                "tokens": row["tokens"],
                "launches of a pass": f"{old['launches']} -> {new['launches']}",
                "us of a layer": f"{old['us']:.0f} -> {new['us']:.0f}",
                "of it torch's copies": f"{old['copies_us']:.0f} -> {new['copies_us']:.0f}",
                "attention, apart": f"{old['attention_us']:.0f}",
                "first token": "{:.2f} ms -> {:.2f} ms".format(*first),
                "less, without attention": f"{1 - first[1] / (first[0] - attention):.1%}",
            }
        )
    return table(text)


def _sides(measured: Mapping[str, Sequence[float]], scale: float, form: str) -> Row:
    old, new = (form.format(scale * x) for x in measured["medians"])
    best = " -> ".join(form.format(scale * x) for x in measured["best"])
    return {"unpatched": old, "patched": new, "best": best}


FA3 = """
`--prefill-attention-backend fa3`, SGLang's default on Hopper, with an FP8 cache: nothing is
stood in for. Decode is triton's.
"""

FA3_TIME = """
The models of the section above, with a BF16 cache too, and patched with
SGLANG_MLA_FP8_PREFILL_GEMM=off. GPU time of a round of prompts, from SGLang's profiler:
preparation and attention of all layers, which is without the projections, and in the
columns "all" that of all kernels. Over HTTP, medians of
rounds asked of all servers in turn; the ratios to the unpatched server have 95% bootstrap
intervals, and that of a second unpatched server is the noise.
"""


def fa3(rows: Sequence[Row]) -> str:
    return compare([row for row in rows if "pair" in row]) + load(rows)


def fa3_time(rows: Sequence[Row]) -> str:
    gpu, http = [], []
    for row in rows:
        behind = f" behind {row['prefix']}" if row["prefix"] else ""
        what = f"{row['prompts']} x {row['tokens']}{behind}"
        who = {"layers of": MODELS[row["model"]], "tokens": what}
        total = {
            side: x["preparation_us"] + x["attention_us"]
            for side, x in row["gpu"].items()
        }
        launches = [
            row["gpu"][side]["preparation_launches"]
            for side in ("unpatched", "patched")
        ]
        of_all = {side: x["all_us"] for side, x in row["gpu"].items()}
        gpu.append(
            {
                **who,
                **{side: f"{us / 1e3:.2f} ms" for side, us in total.items()},
                "unpatched / patched": f"{total['unpatched'] / total['patched']:.2f}",
                "BF16 / patched": f"{total['BF16 cache'] / total['patched']:.2f}",
                **{
                    f"all, {side} / patched": f"{of_all[side] / of_all['patched']:.3f}"
                    for side in ("unpatched", "GEMM off")
                },
                "launches": "{:.0f} -> {:.0f}".format(*launches),
            }
        )
        sides = list(row["gpu"])
        http.append(
            {
                **who,
                **{side: f"{ms:.2f} ms" for side, ms in zip(sides, row["http_ms"])},
                **{
                    f"{side} / unpatched": _interval(ratio)
                    for side, ratio in zip(sides[1:], row["ratios"])
                },
            }
        )
    return (
        table(gpu) + "\nOver HTTP, until the last prompt has its token:\n" + table(http)
    )


SECTIONS = {
    "compare": ("One GPU: answers and what the kernels were handed", COMPARE, compare),
    "lse": ("Base-2 log-sum-exps", LSE, compare),
    "parallel": ("Two GPUs", "", compare),
    "load": ("Load and a kill", LOAD, load),
    "profile": ("Launches and time", PROFILE, profile),
    "graphs": ("Prefill CUDA graphs", GRAPHS, graphs),
    "fa3": ("Hopper: fa3, nothing stood in", FA3, fa3),
    "fa3 time": ("Hopper: time", FA3_TIME, fa3_time),
}


_SAID_OF_ANY = {"section", "machine", "problems"}


def problems(rows: Iterable[Row], sections: Iterable[str] = SECTIONS) -> list[str]:
    chosen = [row for row in rows if row["section"] in sections]
    return [problem for row in chosen for problem in row.get("problems", ())]


def markdown(rows: Sequence[Row]) -> str:
    text = INTRODUCTION
    for name, (title, introduction, write) in SECTIONS.items():
        mine = [row for row in rows if row["section"] == name]
        if not mine:
            text += f"\nNot in these results: {title}.\n"
            continue
        text += f"\n## {title}\n{introduction}"
        text += "".join(f"\n{row['machine']}.\n" for row in mine if "machine" in row)
        # One that failed has problems only.
        text += write([row for row in mine if row.keys() - _SAID_OF_ANY])
        wrong = problems(mine)
        if wrong:
            text += "\nNot ok:\n\n" + "".join(f"- {problem}\n" for problem in wrong)
    return text


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
