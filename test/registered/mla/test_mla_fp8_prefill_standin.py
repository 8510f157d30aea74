"""FP8 prefill of the MLA backends in a real server on one Hopper GPU, against the same
server with SGLANG_MLA_FP8_PREFILL=off.

The model is of DeepSeek-V3's architecture, small, with random weights. Only the attention
kernels, which need SM100, are not the real ones: test/mla_standin/ takes their place.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import requests

from sglang.srt.utils import is_sm90_supported, kill_process_tree
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    DEFAULT_URL_FOR_TEST,
    CustomTestCase,
)
from sglang.utils import wait_for_http_ready

register_cuda_ci(est_time=240, stage="stage-b", runner_config="1-gpu-large")

# The folder of the package `mla_standin`.
TEST = Path(__file__).resolve().parents[2]
FP8 = "float8_e4m3fn"
VOCAB = 4096
LENS = (5, 64, 700, 3000)
# Below the longest prompt, whose later chunks then have a prefix.
CHUNK = 1024
# Of the mean distance between the log-probabilities of a prompt, in standard deviations
# of the latter from token to token. Two roundings against one make 0.03 to 0.05 on
# average; an error in what is rounded makes 1.
TOLERANCE = 0.1
# The two servers run side by side.
HOST, PORT = DEFAULT_URL_FOR_TEST.removeprefix("http://").split(":")
PORTS = {"fused": int(PORT), "off": int(PORT) + 500}


class Run(NamedTuple):
    """What a server answered, and what is known of how."""

    logprobs: dict[str, list[float]]
    cached_tokens: int
    calls: list[dict]
    log: str


def generate(url: str, prompts: list[list[int]], logprob_start_len: int) -> list[dict]:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    response = requests.post(
        f"{url}/generate",
        json={
            "input_ids": prompts,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": logprob_start_len,
        },
        timeout=600,
    )
    response.raise_for_status()
    return [answer["meta_info"] for answer in response.json()]


def input_logprobs(answer: dict) -> list[float]:
    # The first token of a prompt has none.
    values = [value for value, *_ in answer["input_token_logprobs"]]
    return [value for value in values if value is not None]


def launch_server(
    model: Path, attention_backend: str, producer: str, folder: Path
) -> subprocess.Popen:
    """popen_launch_server, for another main module than SGLang's."""
    command = [sys.executable, "-m", "mla_standin.launch_server"]
    command += ["--model-path", str(model), "--skip-tokenizer-init"]
    command += ["--host", HOST, "--port", str(PORTS[producer])]
    command += ["--attention-backend", attention_backend]
    command += ["--kv-cache-dtype", "fp8_e4m3", "--page-size", "64"]
    command += ["--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "65536"]
    command += ["--sampling-backend", "pytorch", "--random-seed", "0"]
    # The stand-ins read lengths on the host, which a graph cannot.
    command += ["--disable-cuda-graph", "--disable-piecewise-cuda-graph"]
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TEST), *inherited]),
        "SGLANG_MLA_FP8_PREFILL": producer,
        "STANDIN_RECORD": str(folder),
    }
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def run_server(model: Path, attention_backend: str, producer: str, folder: Path) -> Run:
    folder.mkdir()
    log = folder / "log.txt"
    url = f"http://{HOST}:{PORTS[producer]}"
    process = launch_server(model, attention_backend, producer, folder)
    try:
        wait_for_http_ready(
            f"{url}/health_generate",
            DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
            process,
            request_timeout=30,
        )
        rng = random.Random(0)
        prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in LENS]
        answers = generate(url, prompts, logprob_start_len=0)
        longest = prompts[-1]
        tail = [rng.randrange(VOCAB) for _ in range(300)]
        (hit,) = generate(url, [longest + tail], logprob_start_len=len(longest))
    except Exception:
        print(log.read_text()[-8000:])
        raise
    finally:
        kill_process_tree(process.pid, wait_timeout=60)
    logprobs = {f"{n} tokens": input_logprobs(a) for n, a in zip(LENS, answers)}
    logprobs["behind a cached prefix"] = input_logprobs(hit)
    records = [json.loads(file.read_text()) for file in folder.glob("record-*.json")]
    calls = [call for record in records for call in record["calls"]]
    return Run(logprobs, hit["cached_tokens"], calls, log.read_text())


class HookOnAgainstOff:
    attention_backend: str
    prefill_kernel: str

    @classmethod
    def setUpClass(cls):
        sys.path.insert(0, str(TEST))
        from mla_standin.models import make_model

        with tempfile.TemporaryDirectory() as work:
            model = make_model("deepseek_v3", Path(work, "model"))

            def run(producer: str) -> Run:
                folder = Path(work, producer)
                return run_server(model, cls.attention_backend, producer, folder)

            with ThreadPoolExecutor() as pool:
                cls.on, cls.off = pool.map(run, ("fused", "off"))

    def test_log_says_which_path_it_is(self):
        what = "FP8 prefill preparation"
        self.assertIn(f"{what} with the fused producer", self.on.log)
        self.assertNotIn(f"{what} decline", self.on.log)
        self.assertIn(f"{what} declined: SGLANG_MLA_FP8_PREFILL=off", self.off.log)

    def test_log_says_the_base_of_the_log_sum_exps(self):
        for run in (self.on, self.off):
            found = "the log-sum-exps are base 2" in run.log
            self.assertEqual(found, self.attention_backend == "trtllm_mla")

    def test_kernel_is_handed_fp8(self):
        for run in (self.on, self.off):
            calls = [c for c in run.calls if c["kernel"] == self.prefill_kernel]
            # New tokens, and the chunks of a prefix, beside a call of each at start.
            kinds = {call["causal"] for call in calls if call["count"] > 1}
            self.assertEqual(kinds, {True, False})
            for call in calls:
                dtypes = [call[f"{name}_dtype"] for name in "qkv"]
                self.assertEqual(dtypes, [FP8] * 3, call)
                if run is self.on:
                    self.assertTrue(call["contiguous"], call)

    def test_prefix_is_cached(self):
        self.assertGreaterEqual(self.on.cached_tokens, LENS[-1] - 64)
        self.assertEqual(self.on.cached_tokens, self.off.cached_tokens)

    def test_log_probabilities_agree(self):
        spread = statistics.stdev(self.off.logprobs[f"{LENS[-1]} tokens"])
        for name, on in self.on.logprobs.items():
            with self.subTest(name):
                off = self.off.logprobs[name]
                self.assertEqual(len(on), len(off))
                self.assertTrue(all(map(math.isfinite, on + off)))
                distance = statistics.fmean(abs(a - b) for a, b in zip(on, off))
                print(f"{name}: {distance=:.4f} {spread=:.4f}")
                self.assertLess(distance, TOLERANCE * spread)
        # One rounding or two: were all of them equal, both servers took one path.
        self.assertNotEqual(self.on.logprobs, self.off.logprobs)


@unittest.skipUnless(is_sm90_supported(), "needs a Hopper GPU (SM90)")
class TestTRTLLMMLA(HookOnAgainstOff, CustomTestCase):
    attention_backend = "trtllm_mla"
    prefill_kernel = "trtllm_ragged_attention_deepseek"


@unittest.skipUnless(is_sm90_supported(), "needs a Hopper GPU (SM90)")
class TestTokenspeedMLA(HookOnAgainstOff, CustomTestCase):
    attention_backend = "tokenspeed_mla"
    prefill_kernel = "tokenspeed_mla_prefill"


if __name__ == "__main__":
    unittest.main()
