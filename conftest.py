"""Tests import the SGLang that the builder has patched, on a GPU or without one."""

import os
import sys


def pytest_addoption(parser):
    parser.addoption(
        "--sglang",
        default="0.5.12.post1",
        help="release number, checkout or package folder to patch and test",
    )


def pytest_configure(config):
    import patched_sglang

    # Workers of pytest-xdist find the trees that the controller made.
    if not hasattr(config, "workerinput"):
        patched_sglang.lay_out(config.getoption("--sglang"))
    sys.path.insert(0, str(patched_sglang.PATCHED))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(patched_sglang.PATCHED), os.environ.get("PYTHONPATH")])
    )
    import sglang_cpu

    sglang_cpu.install()
