"""Tests import the SGLang that the builder has patched, on a GPU or without one."""

import os
import sys
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--sglang",
        default="0.5.12.post1",
        help="release number, checkout or package folder to patch and test",
    )
    parser.addoption(
        "--every-release",
        action="store_true",
        help="tests of every release, whose wheels are fetched, not of a choice",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--every-release"):
        items[:] = [
            item for item in items if not item.get_closest_marker("every_release")
        ]


def pytest_configure(config):
    import patched_sglang

    trees = patched_sglang.lay_out(config.getoption("--sglang"))
    config.unpatched_sglang = trees.unpatched
    sys.path.insert(0, str(trees.patched))
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    paths = [trees.patched, *patched_sglang.PATHS]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *inherited])

    import sglang_cpu

    sglang_cpu.install()


@pytest.fixture(scope="session")
def unpatched_sglang(pytestconfig) -> Path:
    """The folder of the same SGLang without the patch, for a process of its own."""
    return pytestconfig.unpatched_sglang


@pytest.fixture(autouse=True)
def gpu_memory_for_other_workers():
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**32:
        torch.cuda.empty_cache()
