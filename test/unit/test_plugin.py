"""The plug-in, installed from the project's wheel into a Python of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from patch_targets import copy_release, write_tree
from patched_sglang import ROOT

from prefill_patch.plugin import DISTRIBUTION, TWICE
from prefill_patch.releases import RELEASES
from prefill_patch.target import fetch_release

NEWEST = RELEASES[-1].version  # whose environ.py imports nothing heavy


def pip(*arguments) -> None:
    # Where the project is on the path, it is installed already.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, env=environ)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # A copy: setuptools leaves what it builds beside the sources.
    folder = tmp_path_factory.mktemp("wheel")
    names = ["README.md", "LICENSE", "pyproject.toml", "setup.cfg", "setup.py"]
    for name in [*names, "sglang_mla_fp8_prefill.py"]:
        shutil.copy(ROOT / name, folder)
    for name in ("prefill_patch", "python", "test"):
        shutil.copytree(ROOT / name, folder / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture
def python(wheel, tmp_path):
    """A function that runs this Python's like with the plug-in, on the SGLang of a
    folder; `python.pip` changes what it has installed."""
    venv.create(tmp_path / "venv", with_pip=False)
    executable = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_path("purelib"))

    def run(folder: Path, *arguments, **environ):
        others = {k: v for k, v in os.environ.items() if k != "SGLANG_PLUGINS"}
        return subprocess.run(
            [executable, *map(str, arguments)],
            env={**others, "PYTHONPATH": str(folder), **environ},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    run.site = site
    run.pip = lambda *arguments: pip("--python", executable, *arguments)
    run.pip("install", "--no-deps", "--no-index", wheel)
    return run


@pytest.fixture
def sglang(tmp_path) -> Path:
    """A folder with what of the newest release matters here."""
    folder = copy_release(NEWEST, tmp_path / "sglang", "sglang")
    plugins = "python/sglang/srt/plugins"
    source = fetch_release(NEWEST) / plugins
    shutil.copytree(source, folder / "sglang/srt/plugins")
    return write_tree(folder, {"sglang/__init__.py": ""})


ENVIRON = "sglang/srt/environ.py"
SWITCH = "from sglang.srt.environ import envs; print(envs.SGLANG_MLA_FP8_PREFILL.get())"


def test_spawned_processes_are_edited_too(python, sglang, tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        f"def show():\n    {SWITCH}\n"
        "if __name__ == '__main__':\n"
        "    from sglang.srt.plugins import load_plugins\n"
        "    load_plugins()\n"
        "    child = multiprocessing.get_context('spawn').Process(target=show)\n"
        "    child.start()\n"
        "    child.join()\n"
        "    show()\n"
    )
    done = python(sglang, script, PYTHONDONTWRITEBYTECODE="")
    assert (done.stdout, done.stderr) == ("fused\n" * 2, "")
    assert list(sglang.rglob("plugins/__pycache__/*.pyc"))
    assert not list(sglang.rglob("environ.*.pyc"))


def test_lines_are_those_that_ran(python, sglang):
    """In a file that the release does not have like this."""
    with open(sglang / ENVIRON, "a") as file:
        file.write("\n\ndef fail():\n    raise ValueError('here')\n")
    code = "import inspect; from sglang.srt import environ; "
    source = python(sglang, "-c", f"{code} print(inspect.getsource(environ.fail))")
    assert source.stdout == "def fail():\n    raise ValueError('here')\n\n"
    *_, line, error = python(sglang, "-c", f"{code} environ.fail()").stderr.splitlines()
    assert (line, error) == ("    raise ValueError('here')", "ValueError: here")


def test_states(python, sglang):
    def patch(command: str, status: int, said: str, **environ):
        options = ["-m", "prefill_patch", command, "--sglang", sglang]
        done = python(sglang, *options, **environ)
        assert done.returncode == status and said in done.stdout + done.stderr

    def starts(**environ) -> bool:
        done = python(sglang, "-c", SWITCH, **environ)
        return done.returncode == 0

    off = {"SGLANG_PLUGINS": "another"}
    patch("status", 0, "applied by the plug-in (SGLang")
    patch("status", 1, "not applied", **off)
    assert starts(SGLANG_PLUGINS="another, mla_fp8_prefill") and not starts(**off)
    patch("apply", 2, TWICE)
    patch("apply", 0, "applied", **off)
    patch("status", 2, TWICE)
    assert TWICE in python(sglang, "-c", SWITCH).stderr
    assert starts(**off)
    hook = sglang / "sglang/srt/layers/attention/mla_fp8_prefill.py"
    data = hook.read_bytes()
    patch("revert", 0, "reverted")
    assert starts()
    hook.write_bytes(data)  # as where SGLang was installed anew
    patch("status", 2, TWICE)
    assert not starts()
    python.pip("uninstall", "--yes", DISTRIBUTION)
    left = [path.name for path in python.site.iterdir() if "prefill" in path.name]
    assert left == [] and not starts()


def test_what_cannot_be_edited_does_not_start(python, sglang):
    model = next(sglang.rglob("forward_mha.py"))
    model.write_text(model.read_text().replace("num_prefix_chunks", "chunks"))
    done = python(sglang, "-c", SWITCH)
    assert (done.returncode, done.stdout) == (1, "")
    assert "forward_mha.py: " in done.stderr and "SGLANG_PLUGINS=none" in done.stderr


def test_what_was_imported_before_does_not_start(python, sglang):
    """A Python that finds the package where it reads no .pth file."""
    code = "from sglang.srt.plugins import load_plugins; load_plugins(); print('on')"
    folders = sglang, python.site, sysconfig.get_path("purelib")
    done = python(os.pathsep.join(map(str, folders)), "-S", "-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    assert "sglang.srt.environ was imported before" in done.stderr
