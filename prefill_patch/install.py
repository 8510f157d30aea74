"""Writing a target: all files or none, through `git apply`, and back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefill_patch.errors import PatchError
from prefill_patch.patch import File, Inspection, State
from prefill_patch.target import Target, git_environment

_GIT_SECONDS = 300
# The settings of the target's repository or its user must not change a byte.
_GIT_APPLY = (
    *("-c", "core.autocrlf=false"),
    *("-c", "core.eol=lf"),
    *("-c", f"core.attributesFile={os.devnull}"),
    "apply",
    "--whitespace=nowarn",
)


def check(found: Inspection) -> None:
    """Refuse a target that the patch fits but that cannot be patched as it is."""
    for file in found.files:
        _check_writable(found.target, file)
    _git(found, "--check")


def apply(found: Inspection) -> None:
    """Apply the patch to a target in the state ORIGINAL."""
    assert found.state is State.ORIGINAL
    check(found)
    with _signals_held(), _undone_on_failure(found):
        _git(found)
        for file in found.files:
            if found.target.read(file.path) != file.patched:
                raise PatchError(
                    "git apply left other bytes than the patch has; an attribute or "
                    "filter of the repository may convert the file",
                    file=found.target.path(file.path),
                )


def revert(found: Inspection) -> None:
    """Take the patch back from a target in the state APPLIED."""
    assert found.state is State.APPLIED
    for file in found.files:
        _check_writable(found.target, file)
    with _signals_held():
        with _undone_on_failure(found):
            for file in found.files:
                path = found.target.file(file.path)
                if file.original is not None:
                    _replace(path, file.original)
                else:
                    path.unlink()
        for file in found.files:
            if file.new:
                _tidy(found.target, file)


def _check_writable(target: Target, file: File) -> None:
    folder = target.file(file.path).parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        name = folder.relative_to(target.root).as_posix()
        raise PatchError(f"the folder {name} is read-only", file=target.path(file.path))


def _git(found: Inspection, *options: str) -> None:
    git = shutil.which("git")
    if git is None:
        raise PatchError("git is not on PATH; the patch is applied with git apply")
    root = found.target.root
    try:
        done = subprocess.run(
            [git, *_GIT_APPLY, *options, "-"],
            input=b"".join(diff.text for diff in found.diffs()),
            cwd=root,
            env=git_environment(root),
            capture_output=True,
            timeout=_GIT_SECONDS,
            start_new_session=True,  # Ctrl-C is for this process to deal with
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PatchError(f"git apply failed: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "without a message"
        raise PatchError(f"git apply failed: {'; '.join(said.splitlines())}")


@dataclass(frozen=True)
class _Before:
    """A file as it was, to be put back."""

    path: Path
    data: bytes | None
    stat: os.stat_result | None

    @classmethod
    def of(cls, path: Path) -> _Before:
        if not path.exists():
            return cls(path, None, None)
        return cls(path, path.read_bytes(), path.stat())

    def restore(self) -> None:
        if self.data is None:
            self.path.unlink(missing_ok=True)
        elif not self.path.exists() or self.path.read_bytes() != self.data:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, self.data)
        self.restore_owner_and_mode()

    def restore_owner_and_mode(self) -> None:
        """A file that git rewrites is a new one, with the caller's owner and umask."""
        if self.stat is not None and self.path.exists():
            _copy_owner_and_mode(self.stat, self.path)


@contextlib.contextmanager
def _undone_on_failure(found: Inspection) -> Iterator[None]:
    """Whatever is raised inside, the target's files are as before; else only their
    contents change."""
    files = [_Before.of(found.target.file(file.path)) for file in found.files]
    folders = [
        folder
        for file in found.files
        for folder in found.target.parents(file.path)
        if not folder.exists()
    ]
    try:
        yield
        for file in files:
            file.restore_owner_and_mode()
    except BaseException as failure:
        try:
            for file in files:
                file.restore()
            for folder in sorted(set(folders), reverse=True):
                if folder.exists():
                    folder.rmdir()
        except OSError as error:
            raise PatchError(
                f"{failure}; and putting back what was there failed too: {error}"
            ) from failure
        if isinstance(failure, OSError):
            raise PatchError(f"cannot be written: {failure}") from None
        raise


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let an interruption wait: writing is short, and half of it is of no use."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {
        number: signal.signal(number, lambda number, frame: held.append(number))
        for number in (getattr(signal, name, None) for name in names)
        if number is not None
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by other than Python, and cannot be set from it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in held[:1]:
            signal.raise_signal(number)


def _replace(path: Path, data: bytes) -> None:
    """Write a file anew, so that a hard link elsewhere keeps what it had."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
        if path.exists():
            _copy_owner_and_mode(path.stat(), Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _copy_owner_and_mode(stat: os.stat_result, path: Path) -> None:
    now = path.stat()
    if (now.st_uid, now.st_gid) != (stat.st_uid, stat.st_gid):
        with contextlib.suppress(OSError):  # only root may
            os.chown(path, stat.st_uid, stat.st_gid)
    path.chmod(stat.st_mode & 0o7777)


def _tidy(target: Target, file: File) -> None:
    """Remove what a new file leaves behind: its bytecode, folders made for it.

    No release has a folder without files, so an empty one was made for the patch.
    """
    path = target.file(file.path)
    cache = path.parent / "__pycache__"
    with contextlib.suppress(OSError):
        for compiled in cache.glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        cache.rmdir()
    for folder in reversed(list(target.parents(file.path))):
        try:
            folder.rmdir()
        except OSError:
            break
