"""The tests for SGLang's CI: that they arrive in a checkout, that its runner finds them,
that they skip where they cannot run, and that a bad answer would be noticed."""

import ast
import importlib.util
import math
import os
import runpy
import subprocess
import sys
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import sglang_cpu
import torch
from patch_targets import copy_release

from prefill_patch import SOURCE
from prefill_patch.cli import main
from prefill_patch.target import fetch_release, open_target
from sglang.test.ci.ci_register import HWBackend, collect_tests

TEST = Path(__file__).resolve().parents[1]
REGISTERED = sorted((TEST / "registered").rglob("*.py"))
STANDIN = TEST / "registered/mla/test_mla_fp8_prefill_standin.py"
SHIPPED = [*REGISTERED, *sorted((TEST / "mla_standin").glob("*.py"))]
# Suites of SGLang's test/run_suite.py, which its wheels do not hold.
SUITES = {"stage-b-test-1-gpu-large", "nightly-4-gpu-b200"}


def kernel_files(package: Path) -> list[Path]:
    """What SGLang's runner takes for tests and benchmarks of kernels in a package."""
    folder = package / "jit_kernel"
    tests = folder.glob("tests/**/test_*.py")
    return sorted([*tests, *folder.glob("benchmark/**/bench_*.py")])


def test_sglangs_runner_finds_every_file_in_a_suite_that_exists(unpatched_sglang):
    kernels = kernel_files(SOURCE)
    theirs = collect_tests(
        [str(file) for file in kernel_files(unpatched_sglang / "sglang")],
        sanity_check=False,
    )
    known = SUITES | {
        test.effective_suite for test in theirs if test.backend is HWBackend.CUDA
    }
    # As the runner does: strictly, so that one file without registration stops it.
    found = collect_tests([str(file) for file in REGISTERED + kernels])
    assert {test.filename for test in found} == set(map(str, REGISTERED + kernels))
    for test in found:
        assert test.backend is HWBackend.CUDA and test.effective_suite in known, test
        assert test.nightly == test.effective_suite.startswith("nightly-")
        assert test.disabled is None and test.est_time > 0
        name = Path(test.filename).name
        if Path(test.filename) in kernels:
            kind = "benchmark" if name.startswith("bench_") else "unit"
            assert test.effective_suite == f"stage-b-kernel-{kind}-1-gpu-large", name


def test_the_suites_are_those_of_the_checkout(pytestconfig):
    sglang = open_target(pytestconfig.getoption("--sglang"))
    runner = sglang.root / "test/run_suite.py"
    if not runner.is_file():
        pytest.skip("--sglang is not a whole checkout of SGLang's repository")
    nodes = ast.walk(ast.parse(runner.read_text()))
    assert SUITES <= {node.value for node in nodes if isinstance(node, ast.Constant)}


def test_files_arrive_in_a_checkout_import_from_there_alone_and_go_again(tmp_path):
    checkout = copy_release("0.5.12.post1", tmp_path / "checkout")
    assert main(["apply", "--sglang", str(checkout)]) == 0
    copies = [checkout / file.relative_to(TEST.parent) for file in SHIPPED]
    for file, copy in zip(SHIPPED, copies):
        assert copy.read_bytes() == file.read_bytes()
    # The runner takes every file here for a test.
    assert len(list((checkout / "test/registered").rglob("*.py"))) == len(REGISTERED)

    code = "import mla_standin.kernels, mla_standin.install, mla_standin.models as m\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(m.VOCAB, m.__file__)"],
        env={**os.environ, "PYTHONPATH": str(checkout / "test")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4096", f"{checkout}/test/mla_standin/models.py"]

    assert main(["revert", "--sglang", str(checkout)]) == 0
    assert not any(copy.exists() for copy in copies)


@pytest.mark.parametrize(
    "version, suite",
    [
        ("0.5.13", "base-b-kernel-{}-1-gpu-large"),
        ("0.5.14", "base-b-kernel-{}-1-gpu-large"),
        ("0.5.15", "base-b-kernel-{}-test-1-gpu-large"),
        ("0.5.17", "base-b-kernel-{}-test-1-gpu-large"),
        ("0.5.23", "base-b-kernel-{}-test-1-gpu-large"),
    ],
)
def test_kernel_tests_arrive_in_later_releases(tmp_path, version, suite):
    checkout = copy_release(version, tmp_path)
    assert main(["apply", "--sglang", str(checkout)]) == 0
    # Where the runner looks from 0.5.14 on, and before.
    found = sorted((checkout / "test/registered").rglob("*.py"))
    if version == "0.5.13":
        found = kernel_files(checkout / "python/sglang")
    register = fetch_release(version) / "python/sglang/test/ci/ci_register.py"
    tests = runpy.run_path(str(register))["collect_tests"]([str(f) for f in found])
    kernels = kernel_files(SOURCE)
    assert {Path(test.filename).name for test in tests} == {f.name for f in kernels}
    for test in tests:
        is_benchmark = Path(test.filename).name.startswith("bench_")
        kind = "benchmark" if is_benchmark else "unit"
        assert test.effective_suite == suite.format(kind), test.filename
    assert main(["revert", "--sglang", str(checkout)]) == 0
    assert not any(file.exists() for file in found)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """A folder for sys.path that stands in for the package `datasets` where there is
    none: sglang.test imports it, and nothing here uses it."""
    folder = tmp_path_factory.mktemp("datasets")
    if importlib.util.find_spec("datasets") is None:
        (folder / "datasets.py").write_text("load_dataset = None\n")
    return folder


@pytest.fixture
def load(datasets, monkeypatch):
    """Imports a registered file."""

    def load(file: Path) -> ModuleType:
        monkeypatch.syspath_prepend(datasets)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    if (datasets / "datasets.py").exists():
        sys.modules.pop("datasets", None)


@pytest.mark.skipif(sglang_cpu.HAS_GPU, reason="a GPU may be what a file needs")
@pytest.mark.parametrize("file", REGISTERED, ids=lambda file: file.stem)
def test_every_test_skips_without_its_gpu_and_says_which(load, file):
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(load(file)).run(result)
    assert not result.errors and not result.failures
    reasons = [reason for _, reason in result.skipped]
    assert len(reasons) == result.testsRun >= 6
    assert all("GPU" in reason for reason in reasons)


@pytest.mark.skipif(
    not sglang_cpu.HAS_GPU or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
def test_on_this_gpu(datasets):
    done = subprocess.run(
        [sys.executable, str(STANDIN), "-f", "-v"],
        env={
            **os.environ,
            "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{datasets}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0 and "skipped" not in done.stdout


def test_the_standin_suite_notices_a_bad_answer(load):
    suite = load(STANDIN)
    off = {f"{n} tokens": [-(37 * i % 97) / 20 for i in range(n)] for n in suite.LENS}
    on = {name: [x - 0.01 for x in values] for name, values in off.items()}
    case = suite.TestTRTLLMMLA("test_log_probabilities_agree")

    def check(on: dict[str, list[float]]) -> None:
        case.on, case.off = (suite.Run(x, 0, [], "") for x in (on, off))
        case.test_log_probabilities_agree()

    check(on)
    other_tokens = {name: x[1:] + x[:1] for name, x in on.items()}
    one_nan = {**on, "700 tokens": [*on["700 tokens"][1:], math.nan]}
    one_missing = {**on, "700 tokens": on["700 tokens"][1:]}
    for bad in (other_tokens, one_nan, one_missing, off):
        with pytest.raises(AssertionError):
            check(bad)
