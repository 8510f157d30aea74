"""Trees for the patch builder's tests: copies of real releases and small made-up ones."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from prefill_patch.patch import Patch
from prefill_patch.releases import RELEASES
from prefill_patch.target import fetch_release

# What the patch touches or imports, what tells the version, and neighbours of both.
_PARTS = (
    "_version.py",
    "version.py",
    "jit_kernel/*.py",
    "jit_kernel/utils/*.py",
    "kernels/jit/**/*.py",
    "kernels/ops/*.py",
    "kernels/ops/quantization/*.py",
    "srt/*.py",
    "srt/compilation/*.py",
    "srt/distributed/*.py",
    "srt/layers/*.py",
    "srt/layers/attention/*.py",
    "srt/layers/quantization/*.py",
    "srt/layers/rotary_embedding/*.py",
    "srt/mem_cache/*.py",
    "srt/model_executor/**/*.py",
    "srt/utils/*.py",
)


def copy_release(version: str, folder: Path, package: str = "python/sglang") -> Path:
    """A copy of the parts of a release that matter, below `folder`, which is returned."""
    source = fetch_release(version) / "python/sglang"
    files = {file for part in _PARTS for file in source.glob(part)}
    (release,) = (one for one in RELEASES if one.version == version)
    for file in files | {source / path for path in Patch.load(release=release).edits}:
        copy = folder / package / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return folder


def write_tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        file.write_bytes(data)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Everything below a folder but git's own: mode and contents."""
    found = {}
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".git"]
        for name in folders + names:
            path = Path(top, name)
            mode, content = path.lstat().st_mode, ""
            if stat.S_ISLNK(mode):
                content = os.readlink(path)
            elif stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = (mode, content)
    return found


def unused_imports(folder: Path) -> list[str]:
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F401"]
    found = subprocess.run([*ruff, "--output-format=json"], cwd=folder, stdout=-1)
    return sorted(one["message"] for one in json.loads(found.stdout))
