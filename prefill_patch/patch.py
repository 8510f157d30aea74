"""The patch as a whole, and what of it a target has."""

from __future__ import annotations

import ast
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prefill_patch import SOURCE, TESTS, edits, history
from prefill_patch.diff import FileDiff, file_diff
from prefill_patch.errors import PatchError
from prefill_patch.releases import BASE, RELEASES, Release, candidates
from prefill_patch.target import CHECKOUT, Target

# The patch's hook, where SGLang has none. An upstream file that has this name without
# our edits has a hook of its own.
HOOK = "prepare_prefill_qkv"

_OTHER_VERSION = "it may be of another version of this patch: revert with the version that applied it"


@dataclass(frozen=True)
class Patch:
    """Edits of upstream files, new files, and tests, new too, that only a checkout
    gets; by path relative to SGLang's package. All of it is for one release."""

    release: Release
    edits: dict[str, tuple[edits.Edit, ...]]
    files: dict[str, bytes]
    tests: dict[str, bytes]

    @classmethod
    def load(cls, source: Path = SOURCE, release: Release = BASE) -> Patch:
        """Read a tree that mirrors SGLang's package, and the tests beside it."""
        root = source.parent.parent
        edited, new, tests = {}, {}, {}
        try:
            for file in _files(source):
                path = file.relative_to(source).as_posix()
                code = release.renamed(file.read_bytes().decode())
                if file.suffix == ".edit":
                    edited[path.removesuffix(".edit")] = edits.read_edits(
                        code, path, release.version
                    )
                else:
                    where = release.path(path)
                    into = tests if where.startswith("..") else new
                    into[where] = code.encode()
                    new |= _packages(path, release)
            for name in TESTS if release.tests else ():
                for file in _files(root / "test" / name):
                    path = f"../../{file.relative_to(root).as_posix()}"
                    tests[path] = file.read_bytes()
        except (OSError, UnicodeDecodeError) as error:
            raise PatchError(f"{source}: cannot be read: {error}") from None
        both = edited.keys() & new.keys()
        if both or not edited:
            what = f"both new and edited: {min(both)}" if both else "no *.edit file"
            raise PatchError(f"{source}: {what}")
        # A release in which a file needs no edit leaves it alone.
        edited = {path: todo for path, todo in edited.items() if todo}
        return cls(release, edited, new, tests)


class State(enum.Enum):
    """What a target, or but for PARTLY a file, has of the patch."""

    APPLIED = "applied"
    ORIGINAL = "not applied"
    PARTLY = "partly applied"
    BLOCKED = "cannot be applied"


@dataclass(frozen=True)
class File:
    """One file of the patch in a target: its bytes as they are, without the patch and
    with it (None: no such file), and what is wrong with it. PARTLY is what an update of
    SGLang or of this project left: of the patch for another release, or an earlier one.
    """

    path: str  # relative to SGLang's package
    new: bool
    state: State
    current: bytes | None = None
    original: bytes | None = None
    patched: bytes | None = b""
    problem: PatchError | None = None
    # BLOCKED, but without a trace of this patch: nothing to take back.
    foreign: bool = False


@dataclass(frozen=True)
class Inspection:
    """What a target has of the patch for a release; where it is BLOCKED, `problems` says
    why."""

    target: Target
    release: Release
    state: State
    files: tuple[File, ...]
    problems: tuple[PatchError, ...] = ()

    def states(self) -> list[State]:
        return [file.state for file in self.files]

    def diffs(self, *states: State) -> list[FileDiff]:
        """The patch against the target without it, of the files in one of `states`."""
        if self.problems:
            raise self.problems[0]
        return [
            file_diff(self.target.path(file.path), file.original, file.patched)
            for file in self.files
            if file.state in states and file.patched is not None
        ]


def inspect(source: Path, target: Target) -> Inspection:
    """Find out what of the patch a target has; nothing is written.

    The target is taken for the likeliest release for which every place is found and every
    import, else for the one of whose patch it has most, and then lacks least.
    """
    found = _inspect_as_likeliest(source, target)
    ours = [file for file in found.files if file.current and not file.foreign]
    if found.state is State.PARTLY or any(file.problem for file in ours):
        for earlier in _earlier(source, found):
            other = _inspect(source, target, found.release, earlier)
            unpatched = other.states().count(State.ORIGINAL)
            if not other.problems and (
                found.problems or unpatched < found.states().count(State.ORIGINAL)
            ):
                return other
    return found


def _inspect_as_likeliest(source: Path, target: Target) -> Inspection:
    tried = []
    for release in candidates(target.version):
        found = _inspect(source, target, release)
        if not found.problems:
            return found
        tried.append(found)

    def fit(found: Inspection) -> tuple[int, int]:
        return found.states().count(State.APPLIED), -len(found.problems)

    return max(tried, key=fit)


def _earlier(source: Path, found: Inspection) -> Iterator[Patch]:
    """Earlier states of the patch that have every new file that it has otherwise."""
    others = {f.path: f.current for f in found.files if f.new and f.problem}
    for folder in history.states(source):
        try:
            patch = Patch.load(folder, found.release)
        except PatchError:
            continue  # its edit files are for the builder of then
        if others.items() <= (patch.files | patch.tests).items():
            yield patch


def _inspect(
    source: Path, target: Target, release: Release, earlier: Patch | None = None
) -> Inspection:
    patch = Patch.load(source, release)
    others = _of_other_releases(source, release, target)
    tests = patch.tests if target.package == CHECKOUT else {}
    todo = {path: (wanted, ()) for path, wanted in patch.edits.items()}
    if earlier is not None:
        for path, done in earlier.edits.items():
            todo[path] = patch.edits.get(path, ()), done
        for path, data in _added(earlier, target).items():
            others.setdefault(path, set()).add(data)
    files = [_edited(target, path, *both) for path, both in todo.items()]
    files = [f for f in files if f.path in patch.edits or f.state is State.PARTLY]
    files += [
        _new(target, path, data, others.get(path, set()))
        for path, data in patch.files.items()
    ]
    for path in others.keys() - patch.files.keys() - patch.edits.keys() - tests.keys():
        left = _new(target, path, None, others[path])
        files += [left] if left.state is State.PARTLY else []
    applied = {file.state for file in files} == {State.APPLIED}
    for path, data in tests.items():
        test = _new(target, path, data, others.get(path, set()))
        # No server depends on them: without them the patch is applied nonetheless, as
        # after it was applied to the package folder inside a checkout.
        files += [] if applied and test.state is State.ORIGINAL else [test]
    files.sort(key=lambda file: target.path(file.path))
    problems = [file.problem for file in files if file.problem]
    if HOOK not in patch.release.names:
        problems = _upstream_hook(target, files) or problems
    problems += _missing_imports(target, patch)
    states = {file.state for file in files}
    state = State.BLOCKED if problems else State.PARTLY
    if not problems and len(states) == 1:
        (state,) = states
    return Inspection(target, patch.release, state, tuple(files), tuple(problems))


def _added(patch: Patch, target: Target) -> dict[str, bytes]:
    """The files that it adds to a target."""
    return patch.files | (patch.tests if target.package == CHECKOUT else {})


def _of_other_releases(
    source: Path, release: Release, target: Target
) -> dict[str, set[bytes]]:
    """What the patch adds to releases that have its files elsewhere, by path."""
    kinds = {
        (id(one.names), id(one.kernel_tests)): one
        for one in RELEASES
        if (one.names, one.kernel_tests) != (release.names, release.kernel_tests)
    }
    found: dict[str, set[bytes]] = {}
    for one in kinds.values():
        for path, data in _added(Patch.load(source, one), target).items():
            found.setdefault(path, set()).add(data)
    return found


def _packages(path: str, release: Release) -> dict[str, bytes]:
    """The `__init__.py` of the folders that are for the patch alone in a release."""
    moved = release.path(path)
    if moved == path:
        return {}
    own = release.path(f"{path.partition('/')[0]}.py").removesuffix(".py")
    folders = [folder.as_posix() for folder in PurePosixPath(moved).parents]
    return {
        f"{folder}/__init__.py": b"" for folder in folders if folder.startswith(own)
    }


def _edited(
    target: Target,
    path: str,
    todo: tuple[edits.Edit, ...],
    earlier: tuple[edits.Edit, ...],
) -> File:
    shown = target.path(path)
    try:
        current = target.read(path)
        if current is None:
            raise PatchError("no such file", file=shown)
    except PatchError as error:
        return File(path, False, State.BLOCKED, problem=error)
    lost = PatchError("not edited")
    # Edits that are some of the others are found in what those have left, too.
    ways = [(State.APPLIED, todo)] if todo else []
    ways += [(State.PARTLY, earlier)] if earlier else []
    for state, done in sorted(ways, key=lambda way: -len(way[1])):
        try:
            original = edits.revert(current, done)
            patched = current if done is todo else edits.apply(original, todo)
            return File(path, False, state, current, original, patched)
        except PatchError as error:
            lost = error
    if edits.has_marks(current, todo):
        reason = f"partly edited, or changed since: {lost.reason}; {_OTHER_VERSION}"
        problem = PatchError(reason, file=shown, scope=lost.scope, place=lost.place)
        return File(path, False, State.BLOCKED, current, problem=problem)
    try:
        patched = edits.apply(current, todo)
    except PatchError as error:
        problem = error.at(shown)
        return File(path, False, State.BLOCKED, current, problem=problem, foreign=True)
    return File(path, False, State.ORIGINAL, current, current, patched)


def _new(target: Target, path: str, data: bytes | None, others: set[bytes]) -> File:
    try:
        current = target.read(path)
    except PatchError as error:
        return File(path, True, State.BLOCKED, problem=error)
    if current in (None, data):
        state = State.ORIGINAL if current is None else State.APPLIED
        return File(path, True, state, current, patched=data)
    if current in others:
        return File(path, True, State.PARTLY, current, patched=data)
    reason = "a file that the patch adds is already there, with other content; "
    problem = PatchError(reason + _OTHER_VERSION, file=target.path(path))
    return File(path, True, State.BLOCKED, current, problem=problem)


def _upstream_hook(target: Target, files: list[File]) -> list[PatchError]:
    return [
        PatchError(
            f"SGLang {target.version} already has a prefill hook ({HOOK})",
            file=target.path(file.path),
        )
        for file in files
        if not file.new
        and (file.foreign or file.state is State.ORIGINAL)
        and HOOK.encode() in (file.current or b"")
    ]


def _missing_imports(target: Target, patch: Patch) -> list[PatchError]:
    """What a server that imports the patch's files would not find."""
    problems = []
    for path, data in patch.files.items():
        if {"tests", "benchmark"} & {*PurePosixPath(path).parts}:
            continue
        for stmt in ast.parse(data).body:
            branches = [[stmt]]
            if isinstance(stmt, ast.Try):
                branches = [stmt.body, *(handler.body for handler in stmt.handlers)]
            lacks = [_lacks(target, patch, branch) for branch in branches]
            if all(lacks):
                reason = f"it imports {lacks[0]}, which is not there"
                problems.append(PatchError(reason, file=target.path(path)))
    return problems


def _lacks(target: Target, patch: Patch, block: list[ast.stmt]) -> str | None:
    """A module or name of SGLang that a block imports and that is not there."""
    for stmt in block:
        if not isinstance(stmt, ast.ImportFrom) or not stmt.module.startswith(
            "sglang."
        ):
            continue
        module = stmt.module.removeprefix("sglang.").replace(".", "/")
        files = [f"{module}.py", f"{module}/__init__.py"]
        code = [patch.files[file] for file in files if file in patch.files]
        code += [target.file(f).read_bytes() for f in files if target.file(f).is_file()]
        if not code and not target.file(module).is_dir():
            return stmt.module
        for name in (alias.name for alias in stmt.names):
            named = rf"\b{name}\b|\bimport \*".encode()
            submodule = target.file(f"{module}/{name}.py").is_file()
            if not submodule and not any(re.search(named, one) for one in code):
                return f"{stmt.module}.{name}"
    return None


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "__pycache__")) for part in parts)
        if file.is_file() and not hidden:
            yield file
