"""Earlier states of the patch, as far as the clone that it runs from has them: a target
may be left with one when this project is updated."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from prefill_patch import TESTS


def states(source: Path) -> Iterator[Path]:
    """The patch's sources as each commit had them, newest first. A folder is gone when
    the next one is asked for."""
    root = source.parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return

    def run(*command: str) -> bytes:
        named = [git, f"--git-dir={root}/.git", *command]
        return subprocess.run(named, capture_output=True).stdout

    paths = ["python/sglang", *(f"test/{name}" for name in TESTS)]
    for commit in run("rev-list", "HEAD", "--", *paths).decode().split():
        archive = run("archive", "--format=zip", commit, "python", "test")
        if not archive:
            continue  # it has no tests
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(io.BytesIO(archive)) as files:
                files.extractall(folder)
            yield Path(folder) / source.relative_to(root)
