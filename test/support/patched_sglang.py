"""Two copies of an SGLang below .build/, as it is and with the patch applied, and
processes that import one of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

from prefill_patch import SOURCE, cli
from prefill_patch.target import open_target

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build"
# What the project's own processes import from, but for SGLang.
PATHS = tuple(ROOT / part for part in ("", "test", "test/support", "test/tools"))

OF_EVERY_RELEASE = (
    "test/unit/test_every_batch.py",
    "test/unit/test_prefill_graphs.py::test_the_log_names_the_flag_of_every_release",
)


class Trees(NamedTuple):
    """Folders for sys.path."""

    unpatched: Path
    patched: Path


def _digest(*roots: Path) -> str:
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _link_or_copy(source: str, target: str) -> None:
    """What the patch replaces is not written through a link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lay_out(sglang: str) -> Trees:
    """Copy a target (release, checkout or package folder) twice and patch one copy.

    The folder is named by the content of both sides, so that what is there is right
    and nothing is changed under a process that uses it.
    """
    # The plug-in, where it is installed, stays out of both.
    os.environ["SGLANG_PLUGINS"] = "none"
    target = open_target(sglang)
    package = target.root / target.package
    folder = BUILD / _digest(package, SOURCE, Path(cli.__file__).parent)
    trees = Trees(folder / "unpatched/python", folder / "patched/python")
    if folder.is_dir():
        return trees
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        for name, command in (("unpatched", "revert"), ("patched", "apply")):
            tree = Path(work, "trees", name)
            shutil.copytree(
                package,
                tree / "python/sglang",
                ignore=shutil.ignore_patterns("__pycache__"),
                copy_function=_link_or_copy,
            )
            # As a package folder, which gets no tests for SGLang's CI.
            with contextlib.redirect_stdout(io.StringIO()):
                status = cli.main([command, "--sglang", str(tree / "python")])
            if status != 0:
                sys.exit(status)
        try:
            Path(work, "trees").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return trees


def environment(site: Path) -> dict[str, str]:
    """Of a process with the SGLang of the folder `site` and this project to import."""
    paths = [str(site), *map(str, PATHS), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_python(site: Path, *arguments: str, cwd: Optional[str] = None) -> str:
    """What Python prints, run with the SGLang of the folder `site` and this project to
    import; raises with the end of its errors if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(site),
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"failed on {site}:\n{done.stderr[-4000:]}")
    return done.stdout


def run_batches(sglang: str, *options: str) -> subprocess.CompletedProcess:
    """Every kind of batch on a target, patched against unpatched, and where its prefill
    graphs go off, as pytest prints it."""
    # Not as a worker of the pytest that may run this.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--sglang={sglang}"]
    return subprocess.run(
        [*pytest, *options, *OF_EVERY_RELEASE],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
