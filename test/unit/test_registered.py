"""The tests for SGLang's CI: that its runner finds them, that they skip where they cannot
run, and that the one that can run here would notice what it is for."""

import ast
import importlib.util
import math
import os
import socket
import subprocess
import sys
import textwrap
import unittest
from collections.abc import Iterable
from pathlib import Path

import pytest
import requests
import sglang_cpu
import torch
from patch_targets import copy_release, write_tree

from prefill_patch import SOURCE
from prefill_patch.cli import main
from prefill_patch.target import open_target
from sglang.test.ci.ci_register import HWBackend, collect_tests

TEST = Path(__file__).resolve().parents[1]
REGISTERED = sorted((TEST / "registered").rglob("*.py"))
STANDIN = TEST / "registered/mla/test_mla_fp8_prefill_standin.py"


def kernel_files(package: Path) -> list[Path]:
    """What SGLang's runner takes for tests and benchmarks of kernels in a package."""
    folder = package / "jit_kernel"
    tests = folder.glob("tests/**/test_*.py")
    return sorted([*tests, *folder.glob("benchmark/**/bench_*.py")])


KERNELS = kernel_files(SOURCE)

# Suites of CUDA, per commit and nightly, of test/run_suite.py in SGLang's repository.
# Its wheels do not hold that file; see test_suites_are_the_checkouts.
SUITES = {"stage-b-test-1-gpu-large", "nightly-4-gpu-b200"}


def cuda_suites(files: Iterable[Path]) -> set[str]:
    tests = collect_tests(list(map(str, files)), sanity_check=False)
    return {test.effective_suite for test in tests if test.backend is HWBackend.CUDA}


def test_runner_finds_every_file(unpatched_sglang):
    assert REGISTERED and KERNELS
    # As the runner does: strictly, so that one file without registration stops it.
    found = collect_tests([str(file) for file in REGISTERED + KERNELS])
    assert {test.filename for test in found} == set(map(str, REGISTERED + KERNELS))
    theirs = kernel_files(unpatched_sglang / "sglang")
    assert len(theirs) > 50
    known = SUITES | cuda_suites(theirs)
    for test in found:
        assert test.backend is HWBackend.CUDA
        assert test.effective_suite in known, test
        assert test.nightly == test.effective_suite.startswith("nightly-")
        assert test.disabled is None and test.est_time > 0


def test_suites_are_the_checkouts(pytestconfig):
    sglang = open_target(pytestconfig.getoption("--sglang"))
    runner = sglang.root / "test/run_suite.py"
    if not runner.is_file():
        pytest.skip("--sglang is not a whole checkout of SGLang's repository")
    strings = {
        node.value
        for node in ast.walk(ast.parse(runner.read_text()))
        if isinstance(node, ast.Constant)
    }
    assert SUITES <= strings


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.name)
def test_suites_of_kernel_files(file):
    kind = "benchmark" if file.name.startswith("bench_") else "unit"
    assert cuda_suites([file]) == {f"stage-b-kernel-{kind}-1-gpu-large"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    tree = copy_release("0.5.12.post1", tmp_path_factory.mktemp("checkout"))
    assert main(["apply", "--sglang", str(tree)]) == 0
    return tree


def test_checkout_has_them(checkout):
    for file in REGISTERED + KERNELS:
        copy = checkout / file.relative_to(TEST.parent)
        assert copy.read_bytes() == file.read_bytes()
    # The runner globs every file here.
    assert len(list((checkout / "test/registered").rglob("*.py"))) == len(REGISTERED)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """A folder for sys.path that stands in for the package `datasets` where there is
    none: sglang.test imports it, and nothing here uses it."""
    folder = tmp_path_factory.mktemp("datasets")
    if importlib.util.find_spec("datasets") is None:
        (folder / "datasets.py").write_text("load_dataset = None\n")
    return folder


# `python3 file.py …` where torchvision may lack its operators.
AS_SCRIPT = """
import runpy, sys
import sglang_cpu
sglang_cpu.install()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_file(file: Path, datasets: Path) -> subprocess.CompletedProcess:
    paths = [str(TEST), os.environ["PYTHONPATH"], str(datasets)]
    return subprocess.run(
        [sys.executable, "-c", AS_SCRIPT, str(file), "-f", "-v"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=file.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(sglang_cpu.HAS_GPU, reason="a GPU may be what a file needs")
@pytest.mark.parametrize("file", REGISTERED, ids=lambda file: file.name)
def test_skips_without_its_gpu(checkout, datasets, file):
    done = run_file(checkout / file.relative_to(TEST.parent), datasets)
    assert done.returncode == 0, done.stdout
    skipped = done.stdout.count("skipped '")
    assert skipped >= 6 and f"OK (skipped={skipped})" in done.stdout
    assert f"Ran {skipped} tests" in done.stdout
    assert done.stdout.count("GPU") == skipped  # each says what it needs


@pytest.mark.skipif(
    not sglang_cpu.HAS_GPU or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
def test_standin_suite_on_this_gpu(datasets):
    done = run_file(STANDIN, datasets)
    print(done.stdout)
    assert done.returncode == 0 and "skipped" not in done.stdout


def test_checkout_has_what_the_standin_suite_imports(checkout, standin, tmp_path):
    code = """
        import sys
        sys.path.append(sys.argv[2])
        import sglang_cpu
        sglang_cpu.install()
        sys.path.pop()
        from mla_standin.models import VOCAB, make_model
        import mla_standin.install, mla_standin.kernels
        make_model("tiny", sys.argv[1])
        parts = mla_standin.models, mla_standin.install
        print(VOCAB, *(part.__file__ for part in parts))
    """
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(code),
            tmp_path / "model",
            TEST / "support",
        ],
        env={**os.environ, "PYTHONPATH": str(checkout / "test")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    vocab, *files = done.stdout.split()
    assert int(vocab) == standin.VOCAB
    folder = checkout / "test"
    assert files == [
        f"{folder}/mla_standin/{name}.py" for name in ("models", "install")
    ]
    assert (checkout / "test/mla_standin/launch_server.py").is_file()
    assert (tmp_path / "model/config.json").is_file()


# Stands in for mla_standin.launch_server, which needs a GPU: the form of a server's answers,
# of its log and of the kernels' record.
SERVER = """
import argparse, json, os
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
args, _ = parser.parse_known_args()
on = os.environ["SGLANG_MLA_FP8_PREFILL"] == "fused"
how = "with the fused producer" if on else "declined, SGLANG_MLA_FP8_PREFILL=off"
print(f"Backend: FP8 prefill preparation {how}", flush=True)
requests = 0


def answer(ids, start):
    later = [[-(token % 97) / 20 - 0.01 * on, token, None] for token in ids[start + 1 :]]
    meta = {"input_token_logprobs": [[None, ids[start], None], *later]}
    return {"meta_info": {**meta, "cached_tokens": start // 64 * 64}}


class Handler(BaseHTTPRequestHandler):
    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        global requests
        requests += 1
        self.reply(200 if requests > 1 else 503, None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/generate" and body["return_logprob"]
        start = body["logprob_start_len"]
        self.reply(200, [answer(ids, start) for ids in body["input_ids"]])


fp8 = {f"{name}_dtype": "float8_e4m3fn" for name in "qkv"}
prefill = {"kernel": "tokenspeed_mla_prefill", **fp8, "contiguous": True, "count": 4}
calls = [{**prefill, "causal": causal} for causal in (True, False)]
calls.append({"kernel": "tokenspeed_mla_decode", "q_dtype": "float8_e4m3fn", "count": 4})
with open(f"{os.environ['STANDIN_RECORD']}/record-{os.getpid()}.json", "w") as file:
    json.dump({"calls": calls}, file)
HTTPServer((args.host, args.port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def standin(datasets):
    """The stand-in suite as a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(datasets)
        spec = importlib.util.spec_from_file_location("standin_suite", STANDIN)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if (datasets / "datasets.py").exists():
            del sys.modules["datasets"]
        return module


@pytest.fixture(scope="module")
def runs(standin, tmp_path_factory):
    """Two runs of the suite's own against servers that are as they should be."""
    work = write_tree(
        tmp_path_factory.mktemp("runs"), {"mla_standin/launch_server.py": SERVER}
    )
    ports = {}
    for producer in ("fused", "off"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[producer] = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(standin, "HOST", "127.0.0.1")
        patched.setattr(standin, "PORTS", ports)
        patched.setattr(standin, "TEST", work)
        yield tuple(
            standin.run_server(
                work / "model", "tokenspeed_mla", producer, work / producer
            )
            for producer in ("fused", "off")
        )
        for port in ports.values():
            with pytest.raises(requests.ConnectionError):
                requests.get(f"http://127.0.0.1:{port}", timeout=10)


def failures(standin, on, off) -> set[str]:
    class Case(standin.HookOnAgainstOff, unittest.TestCase):
        attention_backend = "tokenspeed_mla"
        prefill_kernel = "tokenspeed_mla_prefill"

        @classmethod
        def setUpClass(cls):
            cls.on, cls.off = on, off

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.testsRun == 4 and not result.errors
    failed = [getattr(test, "test_case", test) for test, _ in result.failures]
    return {test.id().rpartition(".")[2] for test in failed}


def with_logprobs(run, change):
    return run._replace(
        logprobs={name: change(values) for name, values in run.logprobs.items()}
    )


def with_calls(run, **changes):
    return run._replace(calls=[{**call, **changes} for call in run.calls])


LOG, KERNEL = "test_log_says_which_path_it_is", "test_kernel_is_handed_fp8"
CACHE, LOGPROBS = "test_prefix_is_cached", "test_log_probabilities_agree"
# What may go wrong: the runs that it makes of good ones, and the tests that say so.
WRONG = {
    "the hook declines": (
        lambda on, off: (on._replace(log=off.log), off),
        {LOG},
    ),
    "the switch does nothing": (lambda on, off: (on, on), {LOG, LOGPROBS}),
    "the hook is not asked": (
        lambda on, off: (on._replace(logprobs=off.logprobs), off),
        {LOGPROBS},
    ),
    "BF16 keys": (
        lambda on, off: (with_calls(on, k_dtype="bfloat16"), off),
        {KERNEL},
    ),
    "strided operands": (
        lambda on, off: (with_calls(on, contiguous=False), off),
        {KERNEL},
    ),
    "no prefix chunk": (lambda on, off: (with_calls(on, causal=True), off), {KERNEL}),
    "no record": (lambda on, off: (on, off._replace(calls=[])), {KERNEL}),
    "no cache hit": (
        lambda on, off: tuple(run._replace(cached_tokens=0) for run in (on, off)),
        {CACHE},
    ),
    "a NaN": (
        lambda on, off: (with_logprobs(on, lambda x: [*x[:-1], math.nan]), off),
        {LOGPROBS},
    ),
    "answers to the wrong tokens": (
        lambda on, off: (with_logprobs(on, lambda x: x[1:] + x[:1]), off),
        {LOGPROBS},
    ),
    "a missing log-probability": (
        lambda on, off: (with_logprobs(on, lambda x: x[:-1]), off),
        {LOGPROBS},
    ),
}


def test_standin_suite_passes(standin, runs):
    assert failures(standin, *runs) == set()
    lens = [len(values) for values in runs[0].logprobs.values()]
    assert lens == [*(n - 1 for n in standin.LENS), 299]


@pytest.mark.parametrize("what", WRONG)
def test_standin_suite_notices(standin, runs, what):
    change, tests = WRONG[what]
    assert failures(standin, *change(*runs)) == tests


def test_standin_suite_says_why_a_server_ended(standin, tmp_path, monkeypatch):
    monkeypatch.setattr(standin, "TEST", tmp_path)
    write_tree(tmp_path, {"mla_standin/launch_server.py": "raise SystemExit('no GPU')"})
    with pytest.raises(RuntimeError, match="the server ended:\nno GPU"):
        standin.run_server(tmp_path, "tokenspeed_mla", "off", tmp_path / "off")
