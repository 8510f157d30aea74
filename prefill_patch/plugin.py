"""The patch without a file touched: SGLang's modules are edited as they are imported.

`pip install` puts a .pth file beside the package, by which every Python process imports
`sglang_mla_fp8_prefill`; that calls `activate` at the first import below `sglang`. SGLang
loads plug-ins too late for this, and goes on without one that fails: its `load_plugins`
calls `activate` too, which ends a server whose Python has not read the .pth file.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import io
import linecache
import os
import sys
import traceback
from importlib.machinery import ModuleSpec, SourceFileLoader

from prefill_patch import SOURCE, edits
from prefill_patch.errors import PatchError
from prefill_patch.patch import Patch, State, inspect
from prefill_patch.releases import candidates
from prefill_patch.target import Target, installed_package, open_target, root_of

# What SGLANG_PLUGINS calls it, and the distribution.
NAME = "mla_fp8_prefill"
DISTRIBUTION = "sglang-mla-fp8-prefill"

TWICE = (
    "patched files and the plug-in exclude each other, no server starts with both: "
    f"`revert` the files, or `pip uninstall {DISTRIBUTION}`"
)


def activate() -> None:
    """Edit what is imported from now on, or end the process with the reason."""
    if not _is_wanted() or any(isinstance(one, _Finder) for one in sys.meta_path):
        return
    try:
        finder = _Finder(sys.modules["sglang"].__path__[0])
    except PatchError as error:
        sys.exit(
            f"{DISTRIBUTION}: {error}. To start SGLang without it: SGLANG_PLUGINS=none, "
            f"or `pip uninstall {DISTRIBUTION}`"
        )
    sys.meta_path.insert(0, finder)
    if sys.version_info < (3, 13) and sys.excepthook is sys.__excepthook__:
        # Until then the built-in one takes lines from the files.
        sys.excepthook = traceback.print_exception


def _is_wanted() -> bool:
    """As SGLang has it: all plug-ins are, or those that SGLANG_PLUGINS names."""
    names = os.environ.get("SGLANG_PLUGINS")
    return not names or NAME in map(str.strip, names.split(","))


def serves(target: Target) -> bool:
    """Whether this Python edits the modules of a target when it imports them."""
    package = target.root / target.package
    is_waiting = "sglang_mla_fp8_prefill" in sys.modules
    return is_waiting and _is_wanted() and installed_package() == package


class _Finder:
    """Finds the modules that the patch edits or adds."""

    def __init__(self, package: str):
        target = open_target(root_of(package))
        self._specs = {}
        for path, source in _sources(target).items():
            name = f"sglang.{path.removesuffix('.py').replace('/', '.')}"
            name = name.removesuffix(".__init__")
            if name in sys.modules:
                raise PatchError(
                    f"{name} was imported before: this Python has to read the .pth "
                    "file of the package, install it into a site-packages folder"
                )
            self._specs[name] = os.path.join(package, path), source

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name not in self._specs:
            return None
        file, source = self._specs[name]
        loader = _Loader(name, file, *source)
        return importlib.util.spec_from_file_location(name, file, loader=loader)


class _Loader(SourceFileLoader):
    """Loads what the file has after the edits. Bytecode is neither read nor written."""

    def __init__(self, name: str, file: str, data: bytes, todo: tuple[edits.Edit, ...]):
        super().__init__(name, file)
        self._data, self._todo = data, todo

    def get_code(self, name):
        # A syntax tree is much for the collector, which would go through all of torch.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            self._data, self._todo = edits.apply_tested(self._data, self._todo), ()
        finally:
            if was_enabled:
                gc.enable()
        lines = io.StringIO(self.get_source(name)).readlines()
        # Without a time, which says that these lines are not the file's.
        linecache.cache[self.path] = len(self._data), None, lines, self.path
        return self.source_to_code(self._data, self.path)

    def get_data(self, path):
        return self._data if path == self.path else super().get_data(path)


def _sources(target: Target) -> dict[str, tuple[bytes, tuple[edits.Edit, ...]]]:
    """The files of the patch, with the edits to be made, by path relative to the
    package."""
    for release in candidates(target.version):
        patch = Patch.load(release=release)
        is_there = any(target.file(path).exists() for path in patch.files)
        if digest(target, patch) == release.digest and not is_there:
            edited = {path: (target.read(path), e) for path, e in patch.edits.items()}
            return edited | {path: (data, ()) for path, data in patch.files.items()}
    # Not as a release was published: all of it is looked at before any is edited.
    found = inspect(SOURCE, target)
    for problem in found.problems:
        raise problem
    if found.state is not State.ORIGINAL:
        raise PatchError(TWICE)
    return {file.path: (file.patched, ()) for file in found.files}


def digest(target: Target, patch: Patch) -> str:
    """The beginning of the SHA-256 of what a target has where the patch edits."""
    data = b"".join(target.read(path) or b"" for path in sorted(patch.edits))
    return hashlib.sha256(data).hexdigest()[:16]
