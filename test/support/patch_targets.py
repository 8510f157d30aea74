"""Trees for the patch builder's tests: copies of real releases and small made-up ones."""

import hashlib
import os
import shutil
import stat
from pathlib import Path

from prefill_patch import install
from prefill_patch.patch import Patch, State, inspect
from prefill_patch.target import fetch_release, open_target

# What the patch touches, what tells the version, and neighbours of both.
_PARTS = (
    "_version.py",
    "version.py",
    "jit_kernel/*.py",
    "srt/environ.py",
    "srt/layers/*.py",
    "srt/layers/attention/*.py",
    "srt/models/deepseek_common/**/*.py",
)


def copy_release(
    version: str, folder: Path, package: str = "python/sglang", whole: bool = False
) -> Path:
    """An unpatched copy of a release below `folder`; unless `whole`, of its relevant
    parts. Returns `folder`."""
    source = fetch_release(version) / "python/sglang"
    for part in ("**/*",) if whole else _PARTS:
        for file in source.glob(part):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = folder / package / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    # The cached release is a target like any other: someone may have patched it.
    found = inspect(Patch.load(), open_target(folder))
    if found.state is State.APPLIED:
        install.revert(found)
    return folder


def edited_files(folder: Path, package: str = "python/sglang") -> list[Path]:
    """The upstream files that the real patch edits, in a copy of a release."""
    return [folder / package / path for path in sorted(Patch.load().edits)]


def write_tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        file.write_bytes(data)
    return folder


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, mode, contents. git's own folder is left out,
    since `git apply` refreshes nothing there but may look."""
    found = {}
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".git"]
        for name in folders + names:
            path = Path(top, name)
            mode = path.lstat().st_mode
            content = ""
            if stat.S_ISLNK(mode):
                content = os.readlink(path)
            elif stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = (mode, content)
    return found
