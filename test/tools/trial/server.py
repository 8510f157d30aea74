"""The user's own server twice, with the hook off and on, asked the same.

Both run the installed SGLang with the user's arguments, one after another: a model may
fill its GPUs. Nothing but SGLANG_MLA_FP8_PREFILL differs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import requests
from e2e import compare, profiles
from e2e.compare import Prompt
from e2e.servers import Request, Server
from patched_sglang import ROOT
from resampling import ratio_of_medians, ratio_of_sums

from prefill_patch.doctor import OFF, SWITCH

SIDES = {"off": {SWITCH: OFF}, "on": {}}
START_SECONDS = 3600  # of a large checkpoint on a cold disk
ENDS_SECONDS = 20
NEW_TOKENS = 32
# As long as log-probabilities of a large vocabulary fit in what a server leaves free.
ASKED, LENGTHS = 512, (101, 300, 500, 512, 4096) * 2
# Whole pages of any size up to 128; behind less, fa3 absorbs.
PREFIX, BEHIND = 8320, (60, 120, 200, 300)
PIECE = 1500  # characters that are tokenized at once
# (new tokens, cached ones before them) of one prompt; (prompts, tokens of each) at once.
FIRST_TOKEN = ((1024, 0), (8192, 0), (2048, PREFIX))
AT_ONCE = (16, 2048)
TIMES, STORMS = 15, 5
# Where SGLang's own test keeps GSM8K; its first rows are examples to each question.
GSM8K, EXAMPLES, AT_ONCE_GSM8K = Path("/tmp/test.jsonl"), 8, 64
ON = "FP8 prefill preparation with the"


class UserServer(Server):
    """A server of the installed SGLang, as the user starts it."""

    def __init__(self, folder: Path, arguments: Sequence[str], env: Mapping[str, str]):
        super().__init__(folder, folder, folder, arguments, env, standin=False)
        self.cwd = Path.cwd()
        if "--api-key" in arguments[:-1]:
            key = arguments[arguments.index("--api-key") + 1]
            self._session.headers["Authorization"] = f"Bearer {key}"

    def command(self, port: int) -> list[str]:
        address = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "info"]
        return [sys.executable, "-m", "sglang.launch_server", *self.args, *address]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != SWITCH}
        return {**kept, "SGLANG_TIMEOUT_KEEP_ALIVE": "3600", **self.env}


def run(
    make: Callable[[str, Mapping[str, str]], Server], say: Callable[[str], None]
) -> dict[str, Any]:
    """What two servers, made and ended here, differ in: `problems` of the one with the
    hook alone, `notes` of the other or both, `logprobs`, `gsm8k` and `times`. Raises RuntimeError where the
    server does not come up without the hook."""
    found: dict[str, dict[str, Any]] = {}
    prompts: dict[str, list[Prompt]] = {}
    for side, env in SIDES.items():
        say(f"your server with {SWITCH} {env.get(SWITCH, 'unset')}: starting")
        with make(side, env) as server:
            started = time.monotonic()
            try:
                server.start()
                server.wait(START_SECONDS)
                say(f"  up after {time.monotonic() - started:.0f} s, asking")
                prompts = prompts or questions(server)
                found[side] = measured(server, prompts, say)
            except Exception as error:
                if side == "off":
                    raise RuntimeError(f"your server, hook off: {error}") from error
                return {"problems": [f"hook on: {error}"], "notes": []}
            found[side]["problems"] += hook(server.log_since(0), side == "on")
    return difference(found["off"], found["on"])


def questions(server: Server) -> dict[str, list[Prompt]]:
    """Prompts of this project's own text, by scenario; where the server tokenizes none,
    of random tokens."""
    needed = sum(LENGTHS) + 2 * (PREFIX + sum(BEHIND))
    ids: list[int] = []
    for path in (*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("test/**/*.py"))):
        text = path.read_text()
        for start in range(0, len(text), PIECE):
            if len(ids) >= needed:
                break
            ids += tokens_of(server, text[start : start + PIECE])
        if not ids:
            ids = (
                np.random.default_rng(0).integers(profiles.VOCAB, size=needed).tolist()
            )

    def take(count: int) -> list[int]:
        taken, ids[:count] = ids[:count], []
        return taken

    alone = [
        Prompt(f"{n} tokens, {i}", take(n), max(0, n - ASKED))
        for i, n in enumerate(LENGTHS)
    ]
    behind = []
    for i in range(2):
        prefix = take(PREFIX)
        behind += [
            Prompt(f"{n} tokens behind prefix {i}", prefix + take(n), PREFIX, f"{i}")
            for n in BEHIND
        ]
    return {"alone": alone, "behind prefixes": behind}


def tokens_of(server: Server, text: str) -> list[int]:
    """As the server's tokenizer cuts the text; none where it has no tokenizer."""
    body = Request([], 1, 0).body()
    del body["input_ids"]
    response = server.post("/generate", {**body, "text": text})
    if response.status_code != 200:
        return []
    return [x[1] for x in response.json()["meta_info"]["input_token_logprobs"]]


def measured(
    server: Server, prompts: Mapping[str, Sequence[Prompt]], say: Callable[[str], None]
) -> dict[str, Any]:
    """What `measure` finds; raises with the end of its log if the server ends meanwhile."""
    try:
        found = measure(server, prompts, say)
    except Exception as error:
        # A server that ends refuses connections seconds before its process is gone.
        refused = isinstance(error, requests.ConnectionError)
        deadline = time.monotonic() + (ENDS_SECONDS if refused else 0)
        while server.alive():
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    else:
        if server.alive():
            return found
    raise RuntimeError(f"ended while it was asked:\n{server.end_of_log()}")


def measure(
    server: Server, prompts: Mapping[str, Sequence[Prompt]], say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {"answers": {}, "problems": [], "times": {}}
    for scenario, some in prompts.items():
        answers, wrong = compare.ask(server, scenario, some, False, NEW_TOKENS)
        found["answers"] |= answers
        found["problems"] += wrong
    say("  answers are in, timing")
    count, size = AT_ONCE
    runs = {
        f"seconds to the first token, {size} tokens behind {prefix}": (
            lambda size=size, prefix=prefix: profiles.time_to_first_token(
                [server], size, prefix, TIMES
            )[0]
        )
        for size, prefix in FIRST_TOKEN
    }
    runs[f"seconds a token, {count} prompts of {size} tokens at once"] = lambda: [
        1 / rate for rate in profiles.throughput([server], size, count, STORMS)[0]
    ]
    for what, timed in runs.items():
        try:
            found["times"][what] = timed()
        except RuntimeError as error:
            reason = str(error).removeprefix(f"{server.name}: ")
            found["problems"].append(f"{what}: {reason}")
    if GSM8K.exists():
        say("  times are in, answering GSM8K")
        try:
            found["gsm8k"] = gsm8k(server)
        except Exception as error:
            found["problems"].append(f"GSM8K: {error}")
    return found


def gsm8k(server: Server) -> list[float]:
    """1 for each of GSM8K's questions that is answered rightly, else 0."""
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    asked = [f"Question: {row['question']}\nAnswer:" for row in rows]
    examples = "".join(
        f"{question} {row['answer']}\n\n"
        for question, row in zip(asked[:EXAMPLES], rows)
    )
    sampling = {"temperature": 0, "max_new_tokens": 512, "stop": ["Question:"]}

    def is_right(question: str, row: Mapping[str, str]) -> float:
        body = {"text": examples + question, "sampling_params": sampling}
        reply = server.post("/generate", body, timeout=600)
        reply.raise_for_status()
        return float(_last_number(reply.json()["text"]) == _last_number(row["answer"]))

    with ThreadPoolExecutor(AT_ONCE_GSM8K) as pool:
        return list(pool.map(is_right, asked[EXAMPLES:], rows[EXAMPLES:]))


def _last_number(text: str) -> str:
    return (re.findall(r"-?\d+", text.replace(",", "")) or [""])[-1]


def hook(log: str, on: bool) -> list[str]:
    """Why the log of a server with the hook does not say that it prepares prefills."""
    if not on or ON in log:
        return []
    declined = re.findall("FP8 prefill preparation declined: .*", log)
    return declined[:1] or ["the log does not say that the hook prepares prefills"]


def difference(off: Mapping[str, Any], on: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "problems": [x for x in on["problems"] if x not in off["problems"]],
        "notes": off["problems"],
        "times": [],
    }
    names = off["answers"].keys() & on["answers"].keys()
    pairs = [(off["answers"][x], on["answers"][x]) for x in sorted(names)]
    lower = [
        np.subtract(a.input_logprobs, b.input_logprobs)
        for a, b in pairs
        if a.input_logprobs
    ]
    if len(lower) > 1:
        sums, sizes = [x.sum() for x in lower], [len(x) for x in lower]
        found["logprobs"] = {
            # A token, with its interval; positive is worse with the hook on.
            "worse": list(ratio_of_sums(sums, sizes)),
            "apart": float(sum(abs(x).sum() for x in lower) / sum(sizes)),
            "tokens": sum(sizes),
            "same": sum(a.output_ids == b.output_ids for a, b in pairs),
            "asked": len(pairs),
        }
    if "gsm8k" in off and "gsm8k" in on:
        wrong = np.subtract(off["gsm8k"], on["gsm8k"])
        found["gsm8k"] = {
            "questions": len(wrong),
            "right": [float(np.mean(side["gsm8k"])) for side in (off, on)],
            # With its interval; positive is worse with the hook on.
            "worse": list(ratio_of_sums(wrong, np.ones(len(wrong)))),
        }
    for what, seconds in on["times"].items():
        if what in off["times"]:
            sides = [off["times"][what], seconds]
            ratio = list(ratio_of_medians(seconds, sides[0]))
            found["times"].append({"what": what, "ratio": ratio, "off_on": sides})
    return found
