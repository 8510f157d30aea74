"""The patch on every release: where it goes, that it imports there, and the way back."""

import os
import shutil
import subprocess
from pathlib import Path

import black
import isort
import new_release
import pytest
from patch_targets import copy_release, snapshot, unused_imports, write_tree
from patched_sglang import run_python

from prefill_patch import edits, plugin
from prefill_patch.cli import main
from prefill_patch.patch import Patch
from prefill_patch.releases import BACKENDS, BASE, FA3, RELEASES
from prefill_patch.target import fetch_release, open_target

# `make test` takes these and those where its names change, `make test-releases` all.
IN_FULL = (BASE.version, RELEASES[-1].version)
FIRST_OF_A_KIND = [
    one.version
    for last, one in zip(RELEASES, RELEASES[1:])
    if (one.names, one.kernel_tests) != (last.names, last.kernel_tests)
]


def releases(*always: str):
    return pytest.mark.parametrize(
        "release",
        [
            pytest.param(
                one,
                id=one.version,
                marks=[] if one.version in always else pytest.mark.every_release,
            )
            for one in RELEASES
        ],
    )


@releases(*IN_FULL, *FIRST_OF_A_KIND)
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


@releases(*IN_FULL, *FIRST_OF_A_KIND)
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


# Pools whose rows are [lora + rope] and that add to MLATokenToKVPool for other layers.
PLAIN_POOLS = {"MLATokenToKVPool", "NSATokenToKVPool", "DSATokenToKVPool"}


@pytest.mark.parametrize("way", ["files", "plug-in"])
@releases(*IN_FULL)
def test_one_batch(release, way, tmp_path):
    """On the release's own classes, in a process that imports it."""
    source = fetch_release(release.version) / "python"
    # Links where there can be: what the patch replaces is not written through them.
    tree = shutil.copytree(source, tmp_path / "site", copy_function=link_or_copy)
    backends = [*release.backends.values(), BACKENDS[FA3]]
    graphs = "graphs off" if release.graphs_off else ""
    if way == "files":
        assert main(["apply", "--sglang", str(tree)]) == 0
        run = ["-m", "one_batch", graphs, *backends]
    else:
        call = f"one_batch.main({backends}, {graphs!r})"
        run = ["-c", f"{AS_PLUGIN}; import one_batch; {call}"]
    pools = run_python(tree, *run).split()
    assert "MLATokenToKVPool" in pools and set(pools) <= PLAIN_POOLS


# As the .pth file does it.
AS_PLUGIN = "import os, sglang_mla_fp8_prefill; del os.environ['SGLANG_PLUGINS']"


@releases(*IN_FULL)
def test_files_as_published(release):
    """The plug-in knows them, and edits them as `apply` does."""
    patch, target = Patch.load(release=release), open_target(release.version)
    assert plugin.digest(target, patch) == release.digest
    for path, todo in patch.edits.items():
        data = target.read(path)
        assert edits.apply_tested(data, todo) == edits.apply(data, todo)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
