"""The patch as a whole, and what of it a target has."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefill_patch import SOURCE, TESTS, edits
from prefill_patch.diff import FileDiff, file_diff
from prefill_patch.errors import PatchError
from prefill_patch.target import CHECKOUT, Target

# An upstream file that has this name without our edits has a hook of its own.
HOOK = b"prepare_prefill_qkv"


@dataclass(frozen=True)
class Patch:
    """Edits of upstream files, new files, and tests, new too, that only a checkout
    gets; by path relative to SGLang's package."""

    edits: dict[str, tuple[edits.Edit, ...]]
    files: dict[str, bytes]
    tests: dict[str, bytes]

    @classmethod
    def load(cls, source: Path = SOURCE) -> Patch:
        """Read a tree that mirrors SGLang's package, and the tests beside it."""
        edited, new = {}, {}
        for file in _files(source):
            path = file.relative_to(source).as_posix()
            try:
                if file.suffix == ".edit":
                    text = file.read_text(encoding="utf-8")
                    edited[path.removesuffix(".edit")] = edits.read_edits(text, path)
                else:
                    new[path] = file.read_bytes()
            except (OSError, UnicodeDecodeError) as error:
                raise PatchError(f"cannot be read: {error}", file=path) from None
        both = edited.keys() & new.keys()
        if both or not edited:
            what = f"both new and edited: {min(both)}" if both else "no *.edit file"
            raise PatchError(f"{source}: {what}")
        root = source.parent.parent
        found = (file for name in TESTS for file in _files(root / "test" / name))
        try:
            tests = {
                f"../../{file.relative_to(root).as_posix()}": file.read_bytes()
                for file in found
            }
        except OSError as error:
            raise PatchError(f"cannot be read: {error}") from None
        return cls(edited, new, tests)


class State(enum.Enum):
    """What a file, or a target as a whole, has of the patch."""

    APPLIED = "applied"
    ORIGINAL = "not applied"
    BLOCKED = "cannot be applied"
    ALTERED = "partly applied or altered"


@dataclass(frozen=True)
class File:
    """One file of the patch in a target: its bytes as they are, without the patch and
    with it (None: no such file), and what is wrong with it."""

    path: str  # relative to SGLang's package
    state: State
    current: bytes | None
    original: bytes | None = None
    patched: bytes = b""
    problem: PatchError | None = None

    @property
    def new(self) -> bool:
        return self.original is None


@dataclass(frozen=True)
class Inspection:
    """What a target has of the patch; for ALTERED and BLOCKED, `problems` says why."""

    target: Target
    state: State
    files: tuple[File, ...]
    problems: tuple[PatchError, ...] = ()

    def diffs(self) -> list[FileDiff]:
        """The patch against the target, as it is when not applied."""
        if self.problems:
            raise self.problems[0]
        return [
            file_diff(self.target.path(file.path), file.original, file.patched)
            for file in self.files
        ]


def inspect(patch: Patch, target: Target) -> Inspection:
    """Find out what of the patch a target has; nothing is written."""
    files = [_edited(target, path, todo) for path, todo in patch.edits.items()]
    files += [_new(target, path, data) for path, data in patch.files.items()]
    files += _tests(patch, target, {file.state for file in files})
    files.sort(key=lambda file: target.path(file.path))
    states = {file.state for file in files}
    if states == {State.APPLIED}:
        return Inspection(target, State.APPLIED, tuple(files))
    if _ours(files):
        problems = [
            file.problem or _half(target, file)
            for file in files
            if file.state is not State.APPLIED
        ]
        return Inspection(target, State.ALTERED, tuple(files), tuple(problems))
    problems = _upstream_hook(target, patch, files) or [
        file.problem or _present(target, file)
        for file in files
        if file.state is not State.ORIGINAL
    ]
    state = State.BLOCKED if problems else State.ORIGINAL
    return Inspection(target, state, tuple(files), tuple(problems))


def build(patch: Patch, target: Target) -> bytes:
    """The unified diff against a target; the same where it is already applied."""
    return b"".join(diff.text for diff in inspect(patch, target).diffs())


def _edited(target: Target, path: str, todo: tuple[edits.Edit, ...]) -> File:
    shown = target.path(path)
    try:
        current = target.read(path)
        if current is None:
            raise PatchError("no such file", file=shown)
    except PatchError as error:
        return File(path, State.BLOCKED, None, problem=error)
    try:
        original = edits.revert(current, todo)
        return File(path, State.APPLIED, current, original, current)
    except PatchError as error:
        lost = error
    if edits.telling_traces(current, todo):
        reason = f"partly applied, or changed since: {lost.reason}"
        lost = PatchError(reason, file=shown, scope=lost.scope, place=lost.place)
        return File(path, State.ALTERED, current, problem=lost)
    try:
        patched = edits.apply_reversibly(current, todo)
    except PatchError as error:
        return File(path, State.BLOCKED, current, problem=error.at(shown))
    return File(path, State.ORIGINAL, current, current, patched)


def _new(target: Target, path: str, data: bytes) -> File:
    try:
        current = target.read(path)
    except PatchError as error:
        return File(path, State.BLOCKED, None, problem=error)
    if current is None:
        return File(path, State.ORIGINAL, None, None, data)
    if current == data:
        return File(path, State.APPLIED, current, None, data)
    other = PatchError(
        "a file that the patch adds is already there, with other content",
        file=target.path(path),
    )
    return File(path, State.BLOCKED, current, problem=other)


def _tests(patch: Patch, target: Target, states: set[State]) -> list[File]:
    """The tests that are to be added or, where the patch is applied, to be taken back.

    No server depends on them: without them the patch is applied nonetheless, as after
    it was applied to the package folder inside a checkout.
    """
    if target.package != CHECKOUT or len(states) != 1:
        return []
    files = [_new(target, path, data) for path, data in patch.tests.items()]
    done = State.ORIGINAL if states == {State.APPLIED} else State.APPLIED
    return [file for file in files if file.state is not done]


def _ours(files: list[File]) -> bool:
    """Whether anything shows that the patch, or a part of it, was applied."""
    return any(
        file.state is State.ALTERED or (file.state is State.APPLIED and file.current)
        for file in files
    )


def _half(target: Target, file: File) -> PatchError:
    what = "not there" if file.new else "not edited"
    return PatchError(f"{what}, though other files are", file=target.path(file.path))


def _present(target: Target, file: File) -> PatchError:
    return PatchError(
        "a file that the patch adds is already there", file=target.path(file.path)
    )


def _upstream_hook(target: Target, patch: Patch, files: list[File]) -> list[PatchError]:
    return [
        PatchError(
            f"SGLang {target.version} already has a prefill hook ({HOOK.decode()}); "
            "this patch is for releases without one",
            file=target.path(file.path),
        )
        for file in files
        if file.path in patch.edits and HOOK in (file.current or b"")
    ]


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
    for top, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name != "__pycache__" and name[0] != "."
        )
        for name in sorted(names):
            if name[0] != "." and not name.endswith(".pyc"):
                yield Path(top, name)
