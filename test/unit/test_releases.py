"""The patch on every release: where it goes, that it imports there, and the way back."""

import subprocess
from pathlib import Path

import black
import isort
import new_release
import pytest
from patch_targets import copy_release, snapshot, unused_imports, write_tree
from patched_sglang import run_batches, run_python
from sglang_cpu import HAS_GPU

from prefill_patch import edits, plugin
from prefill_patch.cli import main
from prefill_patch.patch import Patch
from prefill_patch.releases import BASE, RELEASES, Release
from prefill_patch.target import fetch_release, open_target

# `make test` takes these, `make test-releases` all.
IN_FULL = (BASE, RELEASES[-1])


def releases(*always: Release):
    return pytest.mark.parametrize(
        "release",
        [
            pytest.param(
                one,
                id=one.version,
                marks=[] if one in always else pytest.mark.every_release,
            )
            for one in RELEASES
        ],
    )


@releases(*IN_FULL)
def test_round_trip(release, tmp_path, capfdbinary):
    def run(command: str, tree: Path) -> bytes:
        capfdbinary.readouterr()  # of a wheel that was fetched
        assert main([command, "--sglang", str(tree)]) == 0
        out, err = capfdbinary.readouterr()
        assert err == b""
        return out

    by_git, ours = (
        copy_release(release.version, tmp_path / name) for name in ("by_git", "ours")
    )
    original = snapshot(ours)
    diff = run("build", ours)
    for options in (["--check", "--whitespace=error-all"], []):
        subprocess.run(["git", "apply", *options], cwd=by_git, input=diff, check=True)
    run("apply", ours)
    assert snapshot(by_git) == snapshot(ours) != original
    assert run("status", ours).startswith(b"applied")
    for tree in (by_git, ours):
        run("revert", tree)
        assert snapshot(tree) == original


@releases(*IN_FULL)
def test_lines_are_formatted_as_upstream_wants_them(release, tmp_path):
    """black, isort and no unused import, where upstream's own lines are as well."""
    patch = Patch.load(release=release)
    package = fetch_release(release.version) / "python/sglang"
    before = {path: (package / path).read_bytes() for path in patch.edits}
    after = {
        path: edits.apply(data, patch.edits[path]) for path, data in before.items()
    }

    def formatted(data: bytes) -> bytes:
        code = isort.code(data.decode(), profile="black", known_first_party=["sglang"])
        return black.format_str(code, mode=black.Mode()).encode()

    for path, todo in patch.edits.items():
        assert formatted(after[path]) == edits.apply(formatted(before[path]), todo)
    unused = unused_imports(write_tree(tmp_path / "before", before))
    assert unused_imports(write_tree(tmp_path / "after", after)) == unused
    for path, data in (patch.files | patch.tests).items():
        assert formatted(data) == data, path
    assert unused_imports(write_tree(tmp_path / "new", patch.files)) == []


@pytest.mark.skipif(HAS_GPU, reason="a GPU host has what one release needs")
@releases(RELEASES[-1])
def test_every_batch(release):
    """The table of batches, on the release's own classes."""
    done = run_batches(release.version)
    assert done.returncode == 0, done.stdout


# As the .pth file does it; then that an edited module has the lines of the file with
# edits, which stand in a file of its own for each module.
AS_PLUGIN = """
import os, sys, importlib, inspect
import sglang_mla_fp8_prefill
del os.environ["SGLANG_PLUGINS"]
import mla_harness
for name, file in zip(sys.argv[1::2], sys.argv[2::2]):
    assert inspect.getsource(importlib.import_module(name)) == open(file).read(), name
"""


@releases(*IN_FULL)
def test_plug_in(release, tmp_path):
    """It knows the files as published, and edits them as `apply` does."""
    patch, target = Patch.load(release=release), open_target(release.version)
    assert plugin.digest(target, patch) == release.digest
    arguments = []
    for path, todo in patch.edits.items():
        module = "sglang." + path.removesuffix(".py").replace("/", ".")
        arguments += [module, str(tmp_path / module)]
        (tmp_path / module).write_bytes(edits.apply(target.read(path), todo))
    site = fetch_release(release.version) / "python"
    run_python(site, "-c", AS_PLUGIN, *arguments)


def test_new_release(tmp_path, capsys):
    """What is not found in it is named."""
    newest = RELEASES[-1].version
    tree = copy_release(newest, tmp_path)
    package = tree / "python/sglang"
    write_tree(package, {"_version.py": "__version__ = '0.99.0'\n"})
    model = next(package.rglob("forward_mha.py"))
    model.write_text(model.read_text().replace("num_prefix_chunks", "chunks"))
    assert new_release.main([str(tree)]) == 1
    first, *problems = capsys.readouterr().out.splitlines()
    assert first == f"SGLang 0.99.0, taken for {newest}"
    assert (
        len(problems) == 1 and "for forward_batch.num_prefix_chunks: no" in problems[0]
    )
