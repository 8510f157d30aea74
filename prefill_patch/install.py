"""Writing a target, so that no upstream file is ever missing or half-written.

Every new content is first written beside its file; then the files are replaced one by
one, each in one step: new files before those that use them, removed ones after. What
ends the process in between leaves a mix of original and patched files, which the next
run finishes or takes back; a failure is taken back at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefill_patch.errors import PatchError
from prefill_patch.patch import File, Inspection, State
from prefill_patch.target import Target

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def locked(target: Target) -> Iterator[None]:
    """Wait for other runs on the same package folder, and keep them waiting."""
    package = target.root / target.package
    try:
        folder = os.open(package, os.O_RDONLY)
    except OSError as error:
        raise PatchError(f"{package}: cannot be read: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def check(target: Target, files: Iterable[File]) -> None:
    """Refuse files whose folders cannot be written."""
    for file in files:
        folder = target.file(file.path).parent
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            name = folder.relative_to(target.root).as_posix()
            path = target.path(file.path)
            raise PatchError(f"the folder {name} is read-only", file=path)


def apply(found: Inspection) -> list[File]:
    """Patch every file that is not patched."""
    assert not found.problems
    files = [file for file in found.files if file.current != file.patched]
    files.sort(key=lambda file: (file.patched is None, not file.new))
    _write(found, files, lambda file: file.patched)
    return files


def revert(found: Inspection) -> list[File]:
    """Make every patched file the original one."""
    files = [
        file
        for file in found.files
        if file.state is not State.BLOCKED and file.current != file.original
    ]
    files.sort(key=lambda file: file.new)
    _write(found, files, lambda file: file.original)
    return files


@dataclass(frozen=True)
class _Step:
    """A file to be written or, with `after` None, removed."""

    path: Path
    before: bytes | None
    after: bytes | None

    def prepare(self) -> None:
        if self.after is None:
            return
        _make_folder(self.path.parent)
        like = os.stat(self.path.parent if self.before is None else self.path)
        mode = like.st_mode & (0o666 if self.before is None else 0o7777)
        temporary = _temporary(self.path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            data = memoryview(self.after)
            while data:
                data = data[os.write(handle, data) :]
            _give(temporary, like, mode)
            os.fsync(handle)
        finally:
            os.close(handle)

    def carry_out(self) -> None:
        _remove_bytecode(self.path, all_of_it=False)
        if self.after is None:
            os.unlink(self.path)
        else:
            os.replace(_temporary(self.path), self.path)

    def taken_back(self) -> bool:
        step = _Step(self.path, self.after, self.before)
        try:
            step.prepare()
            step.carry_out()
        except OSError:
            return False
        return True


def _write(
    found: Inspection,
    files: list[File],
    wanted: Callable[[File], bytes | None],
) -> None:
    check(found.target, files)
    steps = [
        _Step(found.target.file(file.path), file.current, wanted(file))
        for file in files
    ]
    done: list[_Step] = []
    # An interruption waits: writing is short, and half of it is of no use.
    handled = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for step in steps:
            step.prepare()
        for step in steps:
            step.carry_out()
            done.append(step)
    except OSError as error:
        lost = [step.path.name for step in reversed(done) if not step.taken_back()]
        reason = f"cannot be written: {error}"
        if lost:
            reason += f"; nor put back: {', '.join(lost)}; apply or revert again"
        raise PatchError(reason) from None
    finally:
        _clean(found)
        signal.pthread_sigmask(signal.SIG_SETMASK, handled)


def _clean(found: Inspection) -> None:
    """Remove what this or an earlier run has left: temporary files, and of new files
    that are not there the bytecode and the folders made for them.

    No release has a folder without files, so an empty one was made for the patch.
    """
    for file in found.files:
        path = found.target.file(file.path)
        with contextlib.suppress(OSError):
            os.unlink(_temporary(path))
        if file.new and not path.exists():
            _remove_bytecode(path, all_of_it=True)
            folders = reversed(list(found.target.parents(file.path)))
            for folder in (path.parent / "__pycache__", *folders):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.prefill_patch")


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        os.mkdir(folder)
        like = os.stat(folder.parent)
        _give(folder, like, like.st_mode & 0o7777)


def _give(path: Path, like: os.stat_result, mode: int) -> None:
    """Owner and mode, where they differ: not every file system can change them."""
    now = os.stat(path)
    if (now.st_uid, now.st_gid) != (like.st_uid, like.st_gid):
        with contextlib.suppress(OSError):  # only root may
            os.chown(path, like.st_uid, like.st_gid)
    if os.stat(path).st_mode & 0o7777 != mode:
        os.chmod(path, mode)


def _remove_bytecode(path: Path, all_of_it: bool) -> None:
    """Python runs bytecode marked as unchecked whatever the source says."""
    with contextlib.suppress(OSError):
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            if all_of_it or compiled.read_bytes()[4:8] == b"\1\0\0\0":
                os.unlink(compiled)
