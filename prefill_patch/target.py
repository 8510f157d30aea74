"""The SGLang tree to patch: where it is, which release, what may be written."""

from __future__ import annotations

import ast
import importlib.util
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prefill_patch.errors import PatchError

CHECKOUT = "python/sglang"

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)+(?:(?:a|b|rc)\d+)?(?:\.post\d+)?(?:\.dev\d+)?)")
# SGLang's wheels are built for one interpreter and platform. Only their Python files
# are wanted, so the wheel for another machine does where there is none for this one.
_ANY_HOST = (
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--abi=abi3",
    "--abi=none",
    *(
        f"--platform={name}_x86_64"
        for name in ("manylinux_2_34", "manylinux_2_28", "manylinux_2_17", "linux")
    ),
    "--platform=manylinux2014_x86_64",
    "--platform=any",
)


@dataclass(frozen=True)
class Target:
    """An SGLang tree. `package` is its package folder, relative to `root`."""

    root: Path
    package: str
    version: str

    def path(self, relative: str) -> str:
        """A path relative to the package, as it stands in the diff."""
        return posixpath.normpath(f"{self.package}/{relative}")

    def file(self, relative: str) -> Path:
        return self.root / self.path(relative)

    def parents(self, relative: str) -> Iterator[Path]:
        """The folders from the root down to a file, the root left out."""
        for parent in reversed(PurePosixPath(self.path(relative)).parents[:-1]):
            yield self.root / parent

    def read(self, relative: str) -> bytes | None:
        """A file's bytes, None where there is none.

        Links are not followed: what is written through one could be outside.
        """
        file = self.file(relative)
        try:
            for path in (*self.parents(relative), file):
                if path.is_symlink():
                    name = path.relative_to(self.root).as_posix()
                    raise PatchError(
                        f"a symbolic link to {os.readlink(path)}, which is not "
                        "followed, as others may use it: put a copy in its place",
                        file=name,
                    )
            if not os.path.lexists(file):
                return None
            if not file.is_file():
                raise PatchError("not a regular file", file=self.path(relative))
            return file.read_bytes()
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            raise PatchError(reason, file=self.path(relative)) from None


def open_target(given: str | os.PathLike[str], allow_release: bool = True) -> Target:
    """The tree that a path or a release number stands for."""
    try:
        return _open_target(str(given), allow_release)
    except OSError as error:
        raise PatchError(f"{given}: cannot be read: {error.strerror}") from None


def _open_target(given: str, allow_release: bool) -> Target:
    path = Path(given)
    if not given or not path.exists():
        release = _RELEASE.fullmatch(given)
        if not release:
            raise PatchError(
                f"{given!r}: no such folder, nor a release number such as 0.5.12.post1"
            )
        if not allow_release:
            raise PatchError(
                f"{given!r} is no folder, and only `build` takes a release number: "
                "give the checkout or site-packages folder that your server imports"
            )
        path = fetch_release(release[1])
    root = path.resolve()
    if (root / CHECKOUT / "srt").is_dir():
        package = CHECKOUT
    elif (root / "sglang/srt").is_dir():
        package = "sglang"
    elif root.name == "sglang" and (root / "srt").is_dir():
        root, package = root.parent, "sglang"
    else:
        raise PatchError(
            f"{root}: not an SGLang tree; give a git checkout (with python/sglang/ "
            "inside, also of an editable install), a site-packages folder with sglang/ "
            "inside, or that sglang/"
        )
    # What a file says it is ends up on a terminal.
    version = re.sub(r"[^\w.+!-]", "?", _version(root, package).strip())
    return Target(root, package, version)


def installed_package() -> Path | None:
    """The folder of the `sglang` that this Python would import, not imported."""
    spec = importlib.util.find_spec("sglang")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def root_of(package: str | os.PathLike[str]) -> Path:
    """What to open for a package folder: of a checkout the root, which has the tags that
    give its version."""
    package = Path(package).resolve()
    root = package.parents[1]
    return root if root / CHECKOUT == package else package


def cache_folder() -> Path:
    """Where what comes from the package index is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-fp8-prefill"


def fetch_release(version: str, cache: Path | None = None) -> Path:
    """A release from the package index, laid out as a checkout in a cache folder."""
    cache = cache or cache_folder()
    folder = cache / f"sglang-{version}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as work:
            wheel = _download(version, Path(work))
            laid_out = Path(work) / "tree"
            _extract(wheel, laid_out / "python")
            try:
                laid_out.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise PatchError(f"SGLang {version}: cannot be cached: {error}") from None
    return folder


def _download(version: str, folder: Path) -> Path:
    print(f"getting the SGLang {version} wheel with pip", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += [f"--dest={folder}", f"sglang=={version}"]
    for options in ((), _ANY_HOST):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        for wheel in folder.glob("sglang-*.whl"):
            return wheel
    why = (done.stderr.strip().splitlines() or ["pip did not say why"])[-1]
    raise PatchError(f"SGLang {version}: pip could not get the wheel: {why}")


def _extract(wheel: Path, folder: Path) -> None:
    """Unpack the package itself."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [one for one in archive.namelist() if one.startswith("sglang/")]
            archive.extractall(folder, names)
    except zipfile.BadZipFile as error:
        raise PatchError(f"{wheel.name}: not a wheel: {error}") from None


def _version(root: Path, package: str) -> str:
    """The SGLang version that a tree says it has, or `unknown`."""
    for name in ("_version.py", "version.py"):
        file = root / package / name
        try:
            tree = ast.parse(file.read_bytes() if file.is_file() else b"")
        except (OSError, SyntaxError, ValueError):
            continue
        # Assignments in the branches are fallbacks for when nothing is known.
        for stmt in tree.body:
            if isinstance(stmt, ast.Assign) and isinstance(stmt.value, ast.Constant):
                names = map(ast.unparse, stmt.targets)
                if "__version__" in names and isinstance(stmt.value.value, str):
                    return stmt.value.value
    for metadata in (root / package).parent.glob("sglang-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
        if found:
            return found[1]
    return _described(root) or "unknown"


def _described(root: Path) -> str | None:
    """The version that a checkout's tags give, as SGLang's own build derives it."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    # Named, so that no GIT_DIR of the environment and no folder above is taken.
    command = [git, f"--git-dir={root}/.git", "describe", "--tags", "--match=v[0-9]*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().removeprefix("v") or None
