"""What several tests of the patched SGLang need, the unpatched one's results included."""

import fcntl
import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from patched_sglang import run_python
from sglang_cpu import DEVICE, HAS_GPU


class UnpatchedRun:
    """`batch_cases.run_unpatched` in a process of its own, once for all test workers.

    It starts with the first worker's first test. A worker that needs its results waits
    for the lock, which is held for as long as the process runs.
    """

    def __init__(self, site: Path, folder: Path):
        self._site = site
        self._results, self._log = folder / "unpatched.pt", folder / "unpatched.log"
        self._lock = open(folder / "unpatched.lock", "w")
        self._thread = None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not self._log.exists():
            self._log.touch()
            self._thread = threading.Thread(target=self._run)
            self._thread.start()
        else:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _run(self) -> None:
        code = "import sys, batch_cases; batch_cases.run_unpatched(sys.argv[1])"
        try:
            run_python(self._site, "-c", code, str(self._results))
        except RuntimeError as error:
            self._log.write_text(str(error))
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def results(self) -> dict:
        if self._thread is not None:
            self._thread.join()
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        if not self._results.exists():
            pytest.fail(self._log.read_text(), pytrace=False)
        return torch.load(self._results, weights_only=False, map_location=DEVICE)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._lock.close()


@pytest.fixture(scope="session", autouse=True)
def unpatched_run(request, unpatched_sglang, tmp_path_factory):
    """The run, from the first test on where any test needs its results."""
    if not any("unpatched" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    run = UnpatchedRun(unpatched_sglang, folder)
    yield run
    run.close()


@pytest.fixture(scope="session")
def unpatched_results(unpatched_run) -> dict:
    return unpatched_run.results()


@pytest.fixture
def unpatched(unpatched_results):
    """The unpatched SGLang's Result of a case and backend."""

    def result(case, backend: str):
        found = unpatched_results[case.name, backend]
        if isinstance(found, str):
            pytest.fail(f"the unpatched SGLang failed:\n{found}", pytrace=False)
        return found

    return result


@pytest.fixture
def log(caplog, monkeypatch):
    """A function that gives the lines that the hook has logged, as in a new process; or
    those about something else that its module logs."""
    from sglang.srt.layers.attention import mla_fp8_prefill

    name = mla_fp8_prefill.__name__
    log_once = mla_fp8_prefill.cache_once(mla_fp8_prefill._log_once.__wrapped__)
    monkeypatch.setattr(mla_fp8_prefill, "_log_once", log_once)

    def lines(about: str = "FP8 prefill preparation") -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == name]
        return [line for line in found if about in line]

    with caplog.at_level(logging.INFO, logger=name):
        yield lines


@pytest.fixture
def flashinfer(monkeypatch):
    """A function that gives or takes away FlashInfer's RoPE; a CPU gets a stand-in."""
    from gpu_stand_ins import FLASHINFER

    from sglang.srt.layers.attention import mla_fp8_prefill

    def available(answer: bool) -> None:
        monkeypatch.setattr(mla_fp8_prefill, "is_flashinfer_available", lambda: answer)
        if answer and not HAS_GPU:
            monkeypatch.setattr(
                mla_fp8_prefill, "flashinfer", FLASHINFER, raising=False
            )

    return available
