"""The patch builder: diffs, targets, what a target has of the patch, and writing it."""

import ast
import errno
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import pytest
from patch_targets import copy_release, snapshot, write_tree

from prefill_patch import SOURCE, edits, target
from prefill_patch.cli import main
from prefill_patch.diff import file_diff
from prefill_patch.errors import PatchError
from prefill_patch.patch import Patch, State, inspect

ROOT = Path(__file__).resolve().parents[2]
# With the same upstream files, but for some that the patch does not touch.
RELEASES = ("0.5.12", "0.5.12.post1")

# A small patch, and a small SGLang that it fits.
MIRROR = {
    "srt/model.py.edit": "before Model.run :: assign x\n    hook(self)\n",
    "srt/backend.py.edit": "base Backend :: Mixin\n"
    "import module\n    from sglang.srt.new.hook import Mixin\n",
    "srt/new/hook.py": "class Mixin:\n    pass  \n\n",
    "srt/new/__init__.py": "",
    "srt/extra.py": "x = 1\n",
}
SGLANG = {
    "_version.py": "__version__ = version = '0.5.12'\n",
    "srt/model.py": "from sglang import hook\n\nclass Model:\n    def run(self):\n"
    "        x = 1\n        return x\n",
    "srt/backend.py": "from sglang import x\n\nclass Backend(object):\n    pass\n",
    "srt/other.py": "y = 1\n",
}
PATCHED = {
    "srt/model.py": SGLANG["srt/model.py"].replace("    x =", "    hook(self)\n        x ="),
    "srt/backend.py": "from sglang import x\nfrom sglang.srt.new.hook import Mixin\n\n"
    "class Backend(Mixin, object):\n    pass\n",
}  # fmt: skip
NEW = tuple(name for name in MIRROR if not name.endswith(".edit"))


@pytest.fixture
def mirror(tmp_path):
    return write_tree(tmp_path / "mirror", MIRROR)


@pytest.fixture
def tree(tmp_path):
    return make(tmp_path / "target")


def make(folder: Path, package: str = "python/sglang", **changes: str) -> Path:
    files = {f"{package}/{name}": content for name, content in SGLANG.items()}
    return write_tree(folder, files | changes)


@pytest.fixture
def run(mirror, capfd):
    """Run a subcommand on the small patch; returns status, stdout, stderr."""

    def run(command: str, tree: Path | str, *options: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([command, "--sglang", str(tree), *options], source=mirror)
        return code, *capfd.readouterr()

    return run


def refused(run, tree: Path, reason: str, revert: bool = True) -> str:
    """All commands refuse, in one line, and change nothing; returns the line."""
    before = snapshot(tree)
    for command in ("build", "status", "apply", *(["revert"] if revert else [])):
        code, out, err = run(command, tree)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("cannot ") and reason in err
        assert snapshot(tree) == before
    return err


def git(folder: Path, *options: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgSign=false")
    command = ["git", *identity, *options]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def repository(folder: Path) -> Path:
    git(folder, "init", "-q")
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-qm", "m")
    return folder


def test_diffs_are_what_git_applies(tmp_path):
    pick = random.Random(0)
    files, patch = {}, b""
    for number in range(60):
        old = [b"%d\n" % pick.randint(0, 9) for _ in range(pick.randint(0, 40))]
        new = [line for line in old if pick.random() > 0.1]
        for _ in range(pick.randint(1, 4)):
            new.insert(pick.randint(0, len(new)), b"x\r\n")
        old, new = b"".join(old), b"".join(new)
        if pick.random() < 0.4:
            old, new = old.rstrip(b"\n"), new[:-1] if pick.random() < 0.5 else new
        name = f"d/{number}.py"
        was = None if number % 10 == 0 else old
        change = file_diff(name, was, new)
        assert change.new is (was is None)
        patch += change.text
        files[name] = new
        if was is not None:
            write_tree(tmp_path, {name: was})
    empty = file_diff("new/__init__.py", None, b"")
    patch, files["new/__init__.py"] = patch + empty.text, b""
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    subprocess.run(command, cwd=tmp_path, input=patch, check=True)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_diff_counts_and_headers():
    change = file_diff("a.py", b"1\n2\n3\n--- x\n", b"1\n+++ y\n3\n4\n")
    assert (change.added, change.removed) == (2, 2)
    assert b"\n@@ -0,0 +1,2 @@\n+1\n+2\n" in file_diff("a.py", None, b"1\n2\n").text
    assert b"\n@@ -1 +1 @@\n-1\n+2\n" in file_diff("a.py", b"1\n", b"2\n").text
    assert file_diff("a.py", None, b"").text == (
        b"diff --git a/a.py b/a.py\nnew file mode 100644\n"
        b"index %s..e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\n" % (b"0" * 40)
    )


@pytest.mark.parametrize("package", ["python/sglang", "sglang"])
def test_round_trip(run, tmp_path, package):
    tree = make(tmp_path / "t", package)
    before = snapshot(tree)
    assert run("status", tree)[0] == 1
    code, diff, _ = run("build", tree)
    assert code == 0 and f"+++ b/{package}/srt/model.py\n" in diff
    assert snapshot(tree) == before

    code, out, err = run("apply", tree)
    assert (code, err) == (0, "")
    assert f"M {package}/srt/model.py  +1 -0\n" in out
    assert f"A {package}/srt/new/hook.py  +3 -0\n" in out
    assert "applied: 5 files, +7 -1 (SGLang 0.5.12 in " in out
    after = snapshot(tree)
    assert after.keys() - before.keys() == {
        f"{package}/srt/{name}"
        for name in ("new", "new/__init__.py", "new/hook.py", "extra.py")
    }
    for name, content in PATCHED.items():
        assert (tree / package / name).read_text() == content
    assert run("status", tree)[0] == 0
    assert run("build", tree)[1] == diff

    code, out, err = run("apply", tree)
    assert (code, err) == (0, "") and out.startswith("already applied")
    assert snapshot(tree) == after

    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before
    code, out, _ = run("revert", tree)
    assert code == 0 and out.startswith("not applied")
    assert snapshot(tree) == before


TESTS = {
    "test/registered/mla/test_it.py": "import mla_standin\n",
    "test/mla_standin/kernels.py": "y = 2\n",
    "test/mla_standin/models.py": "z = 3\n",
}


@pytest.fixture
def with_tests(tmp_path, capfd):
    """`run` on a patch that has tests for a checkout."""
    mirror = {f"python/sglang/{name}": content for name, content in MIRROR.items()}
    here = {"test/test_here.py": "", "test/e2e/load.py": "", "test/mla_standin/.x": ""}
    source = write_tree(tmp_path / "project", mirror | TESTS | here) / "python/sglang"

    def run(command: str, tree: Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([command, "--sglang", str(tree)], source=source)
        return code, *capfd.readouterr()

    return run


def test_tests_go_into_a_checkout(with_tests, tmp_path):
    theirs = {"test/registered/mla/test_other.py": "", "test/run_suite.py": "x = 1\n"}
    tree = repository(make(tmp_path / "t", **theirs))
    before = snapshot(tree)
    diff = with_tests("build", tree)[1]
    assert with_tests("apply", tree)[0] == 0
    assert {name: (tree / name).read_text() for name in TESTS} == TESTS
    assert len(git(tree, "status", "--porcelain", "-uall").splitlines()) == 5 + 3
    assert with_tests("status", tree)[0] == 0
    assert with_tests("build", tree)[1] == diff
    # What running them leaves behind goes with them.
    write_tree(tree, {"test/mla_standin/__pycache__/kernels.cpython-311.pyc": b""})
    assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before


def test_no_tests_for_a_package_folder(with_tests, tmp_path):
    installed = make(tmp_path / "site-packages", "sglang")
    assert with_tests("apply", installed)[0] == 0
    assert not (installed / "test").exists()

    # The package in a checkout, by either path.
    tree = make(tmp_path / "t")
    before = snapshot(tree)
    assert with_tests("apply", tree / "python")[0] == 0
    assert not (tree / "test").exists()
    assert with_tests("status", tree)[0] == 0
    assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before
    assert with_tests("apply", tree)[0] == 0
    assert with_tests("revert", tree / "python")[0] == 0
    assert with_tests("status", tree)[0] == 3
    assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before


def test_tests_that_are_changed_or_gone(with_tests, tmp_path):
    name = next(iter(TESTS))
    tree = make(tmp_path / "t", **{name: "other\n"})
    refused(with_tests, tree, f"{name}: a file that the patch adds is already there")
    (tree / name).unlink()
    assert with_tests("apply", tree)[0] == 0
    (tree / name).write_text(TESTS[name] + "more\n")
    refused(with_tests, tree, f"{name}: a file that the patch adds is already there")
    # Nothing that serves is missing.
    (tree / name).unlink()
    assert with_tests("status", tree)[0] == 0
    assert with_tests("revert", tree)[0] == 0
    assert not any((tree / name).exists() for name in TESTS)


def test_paths_that_name_a_target(run, tmp_path):
    installed = make(tmp_path / "lib/site-packages", "sglang")
    checkout = make(tmp_path / "checkout")
    (tmp_path / "link").symlink_to(installed)
    for given in (
        installed,
        installed / "sglang",
        tmp_path / "link",
        checkout,
        checkout / "python/sglang",
    ):
        code, out, _ = run("build", given)
        prefix = "python/" if given == checkout else ""
        assert code == 0 and f"--- a/{prefix}sglang/srt/model.py\n" in out


def test_build_to_a_file(run, tree, tmp_path):
    code, out, _ = run("build", tree, "-o", str(tmp_path / "out.diff"))
    assert (code, out) == (0, "")
    assert (tmp_path / "out.diff").read_text() == run("build", tree)[1]
    code, _, err = run("build", tree, "-o", str(tmp_path / "no/out.diff"))
    assert code == 2 and "no/out.diff: No such file" in err


@pytest.mark.parametrize(
    "given, reason",
    [
        ("", "no such folder, nor a release number such as"),
        ("nowhere", "'nowhere': no such folder, nor a release number such as"),
        ("/", "not an SGLang tree; give a git checkout"),
        (__file__, "not an SGLang tree; give a git checkout"),
    ],
)
def test_not_a_target(run, given, reason):
    for command in ("build", "apply", "revert", "status"):
        code, out, err = run(command, given)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("cannot ") and reason in err


@pytest.mark.parametrize("command", ["apply", "revert", "status"])
def test_a_release_number_is_for_build_alone(run, command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, err = run(command, "0.5.12.post1")
    assert (code, out) == (2, "")
    assert "only `build` takes a release number: give the checkout or site-pack" in err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "files, version",
    [
        ({"sglang/_version.py": "__version__ = version = '1.2'\n"}, "1.2"),
        ({"sglang/version.py": "__version__ = '1.3\\n\\x1b[2J'\n"}, "1.3???2J"),
        (
            {
                "sglang/version.py": "try:\n    import x\nexcept: __version__ = '0.0'\n",
                "sglang-1.4.dist-info/METADATA": "Name: sglang\nVersion: 1.4\n\n",
            },
            "1.4",
        ),
        ({"sglang/_version.py": "(\n"}, "unknown"),
    ],
)
def test_version(tmp_path, files, version):
    write_tree(tmp_path, {"sglang/srt/x.py": "", **files})
    assert target.open_target(tmp_path).version == version


OTHER_RELEASE = "srt/model.py.edit"
SECTIONS = """\
[< 0.5.13]
before Model.run :: assign x
    hook(self)
[>= 0.5.13]
after Model.run :: assign x
    hook(x)
"""


@pytest.mark.parametrize(
    "version, code, like, added",
    [
        ("0.5.12", "x", "0.5.12", "        hook(self)\n        x = 1\n"),
        ("0.5.12+cu129", "x", "0.5.12+cu129", "        hook(self)\n        x = 1\n"),
        ("0.5.14", "x", "0.5.14", "        x = 1\n        hook(x)\n"),
        ("0.5.12-9-gabcdef0", "x", "0.5.12", "        hook(self)\n        x = 1\n"),
        ("0.5.14.dev3+gabc", "x", "0.5.13.post1", "        x = 1\n        hook(x)\n"),
        ("0.5.99", "x", "0.5.23", "        x = 1\n        hook(x)\n"),
        ("", "x", "0.5.23", "        x = 1\n        hook(x)\n"),
        # Only in the older ones is there a place in this.
        ("", "old", "0.5.12.post1", "        hook(self)\n        old = 1\n"),
    ],
)
def test_release_that_a_tree_is_taken_for(
    run, mirror, tree, version, code, like, added
):
    sections = SECTIONS.replace("assign x\n    hook(s", f"assign {code}\n    hook(s")
    write_tree(mirror, {OTHER_RELEASE: sections})
    package = tree / "python/sglang"
    (package / "_version.py").write_text(f"__version__ = {version!r}\n")
    model = SGLANG["srt/model.py"].replace("x = 1", f"{code} = 1")
    (package / "srt/model.py").write_text(model)
    before = snapshot(tree)
    _, out, warning = run("apply", tree)
    assert added in (package / "srt/model.py").read_text()
    guessed = f"taken for {like}, by its structure\n"
    exactly = version in (like, f"{like}-9-gabcdef0")
    assert warning.endswith(guessed) != exactly and bool(warning) != exactly
    assert run("status", tree)[0] == 0
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before


def test_version_of_a_checkout_from_its_tag(tree, tmp_path, monkeypatch):
    (tree / "python/sglang/_version.py").unlink()
    os.mkfifo(tree / "python/sglang/_version.py")
    assert target.open_target(tree).version == "unknown"
    git(repository(tree), "tag", "v0.5.12.post7")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert target.open_target(tree).version == "0.5.12.post7"


def test_missing_and_ambiguous_places(run, tree):
    model = tree / "python/sglang/srt/model.py"
    original = model.read_text()
    where = "python/sglang/srt/model.py: Model.run: assign x: "
    model.write_text(original.replace("x = 1", "z = 1"))
    line = refused(run, tree, where + "no such statement (SGLang 0.5.12)\n")
    assert line == f"cannot revert: {where}no such statement (SGLang 0.5.12)\n"
    model.write_text(original.replace("x = 1", "x = 1\n        x = 2"))
    refused(run, tree, where + "matches more than one statement (lines 5, 6) (SGLang")
    model.write_text(original.replace("import hook", "import x"))
    refused(run, tree, "Model.run: before assign x: uses hook, which nothing defines")
    model.write_text(original + "(\n")
    refused(run, tree, "python/sglang/srt/model.py: not valid Python 3.")
    model.unlink()
    refused(run, tree, "python/sglang/srt/model.py: no such file (SGLang")
    model.mkdir()
    refused(run, tree, "python/sglang/srt/model.py: not a regular file")


def test_what_new_files_import_is_there(run, mirror, tree):
    srt, name = tree / "python/sglang/srt", "sglang.jit_kernel.utils"
    code = f"from {name} import cached\n"
    write_tree(mirror, {"srt/extra.py": code})
    refused(run, tree, f"srt/extra.py: it imports {name}, which is not there (SGLang")
    utils = write_tree(srt.parent / "jit_kernel", {"utils.py": "cache = 1\n"})
    refused(run, tree, f"srt/extra.py: it imports {name}.cached, which is not there")
    code = f"try:\n    from sglang.srt import x\nexcept ImportError:\n    {code}"
    write_tree(mirror, {"srt/extra.py": code})
    refused(run, tree, "srt/extra.py: it imports sglang.srt.x, which is not there")
    write_tree(utils, {"utils.py": "cached = 1\n"})
    assert run("status", tree)[0] == 1
    # Newer releases have it elsewhere.
    (srt.parent / "_version.py").unlink()
    assert "taken for 0.5.16, by its structure" in run("apply", tree)[2]


def test_a_new_file_is_there_with_other_content(run, tree):
    extra = tree / "python/sglang/srt/extra.py"
    extra.write_text("x = 2\n")
    reason = "srt/extra.py: a file that the patch adds is already there, with other con"
    line = refused(run, tree, reason)
    assert "another version of this patch: revert with the version that app" in line


def test_what_cannot_be_taken_back_is_not_applied(run, mirror, tree):
    swap = "swap Model.run :: assign x :: a != b -> 2\n"
    write_tree(mirror, {"srt/model.py.edit": swap})
    model = tree / "python/sglang/srt/model.py"
    model.write_text(SGLANG["srt/model.py"].replace("x = 1", "x = (a  != b)"))
    refused(run, tree, "srt/model.py: could not be taken back exactly (SGLang")
    model.write_text(SGLANG["srt/model.py"].replace("x = 1", "x = a != b"))
    assert run("apply", tree)[0] == 0


def test_upstream_hook(run, tree):
    model = tree / "python/sglang/srt/model.py"
    model.write_text("def prepare_prefill_qkv(): pass\n")
    refused(run, tree, "srt/model.py: SGLang 0.5.12 already has a prefill hook")
    # Also where every place of ours is to be found.
    model.write_text(SGLANG["srt/model.py"] + "        prepare_prefill_qkv()\n")
    refused(run, tree, "srt/model.py: SGLang 0.5.12 already has a prefill hook")


def test_every_mix_of_original_and_patched_files(run, tree):
    package = tree / "python/sglang"
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    after = snapshot(tree)
    diff = run("build", tree)[1]
    patched = {name: (package / name).read_bytes() for name in (*PATCHED, *NEW)}
    assert run("revert", tree)[0] == 0
    for count in range(1, len(patched)):
        for names in itertools.combinations(patched, count):
            for command, wanted in (("apply", after), ("revert", before)):
                write_tree(package, {name: patched[name] for name in names})
                code, out, _ = run("status", tree)
                assert (code, out.count("\n  applied ")) == (3, count)
                assert out.count("\n  not applied ") == len(patched) - count
                assert all(
                    f"  applied      python/sglang/{one}\n" in out for one in names
                )
                assert run("build", tree)[1] == diff
                assert run(command, tree)[0] == 0
                assert snapshot(tree) == wanted
                assert run("revert", tree)[0] == 0


def test_files_that_are_neither_original_nor_patched(run, tree):
    original = snapshot(tree)
    assert run("apply", tree)[0] == 0
    srt = tree / "python/sglang/srt"

    def only(name: str, data: str | None, reason: str) -> None:
        patched = (srt / name).read_bytes()
        (srt / name).unlink() if data is None else (srt / name).write_text(data)
        refused(run, tree, reason)
        (srt / name).write_bytes(patched)

    only("model.py", None, "python/sglang/srt/model.py: no such file")
    only("extra.py", "x = 2\n", "srt/extra.py: a file that the patch adds is already")
    backend = PATCHED["srt/backend.py"]
    only(
        "backend.py",
        backend.replace("(Mixin, ", "("),
        "srt/backend.py: Backend: base Mixin: partly edited, or changed since: the",
    )
    only(
        "backend.py",
        backend.replace("sglang.srt.new.hook import Mixin", "x import Mixin"),
        "srt/backend.py: module: import: partly edited, or changed since",
    )
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == original


def test_what_is_left_beside_an_updated_sglang_is_taken_back(run, tree):
    """As after `pip install -U`, which leaves new files that it does not know."""
    assert run("apply", tree)[0] == 0
    theirs = {"srt/model.py": "def prepare_prefill_qkv(): pass\n"}
    write_tree(tree / "python/sglang", theirs)
    refused(run, tree, "already has a prefill hook", revert=False)
    assert run("revert", tree)[0] == 0
    for name, content in (SGLANG | theirs).items():
        assert (tree / "python/sglang" / name).read_text() == content
    assert not any((tree / "python/sglang" / name).exists() for name in NEW)


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_update_of_sglang_to_where_the_patch_has_other_names(
    run, mirror, tree, command
):
    """What it has added before is replaced, or taken back with what it adds now."""
    new = {"jit_kernel/k.py": "k = 1\n", "srt/hook.py": "import sglang.jit_kernel.k\n"}
    write_tree(mirror, new)
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    package = tree / "python/sglang"
    write_tree(package, SGLANG | {"_version.py": "__version__ = '0.5.17'\n"})
    code, out, _ = run("status", tree)
    assert code == 3 and out.count("\n  partly applied ") == 2
    assert run(command, tree)[0] == 0
    if command == "apply":
        assert not (package / "jit_kernel").exists()
        assert "ops.mla_fp8.k" in (package / "srt/hook.py").read_text()
        assert run("status", tree)[0] == 0
        assert run("revert", tree)[0] == 0
    write_tree(package, {"_version.py": SGLANG["_version.py"]})
    assert snapshot(tree) == before


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_update_of_this_project(with_tests, tmp_path, command):
    """What an earlier state of it has applied is replaced, or taken back."""
    project, tree, fresh = (tmp_path / name for name in ("project", "tree", "fresh"))
    repository(project)
    before = snapshot(make(tree))
    assert with_tests("apply", tree)[0] == 0
    srt = project / "python/sglang/srt"
    (srt / "model.py.edit").write_text("before Model.run :: return\n    hook(x)\n")
    (srt / "backend.py.edit").unlink()
    (srt / "extra.py").rename(srt / "more.py")
    (srt / "new/hook.py").write_text("x = 1\n")
    (project / "test/mla_standin/models.py").unlink()
    repository(project)

    assert with_tests("status", tree)[0] == 3
    assert with_tests(command, tree)[0] == 0
    if command == "apply":
        assert with_tests("apply", make(fresh))[0] == 0
        assert snapshot(tree) == snapshot(fresh) != before
        assert with_tests("status", tree)[0] == 0
        assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before


def test_local_changes_survive(run, tree):
    srt = tree / "python/sglang/srt"
    (srt / "model.py").write_text("import os\n\n" + SGLANG["srt/model.py"])
    assert run("apply", tree)[0] == 0
    assert (srt / "model.py").read_text() == "import os\n\n" + PATCHED["srt/model.py"]
    with open(srt / "backend.py", "a") as file:
        file.write("\n\nlast = 1\n")
    assert run("status", tree)[0] == 0
    assert run("revert", tree)[0] == 0
    assert (srt / "model.py").read_text() == "import os\n\n" + SGLANG["srt/model.py"]
    last = SGLANG["srt/backend.py"] + "\n\nlast = 1\n"
    assert (srt / "backend.py").read_text() == last


@pytest.mark.parametrize("eol, end", [("\r\n", ""), ("\r\n", "\r\n"), ("\n", "")])
def test_line_ends(run, tree, eol, end):
    srt = tree / "python/sglang/srt"
    for name in ("model.py", "backend.py"):
        code = SGLANG[f"srt/{name}"].rstrip("\n").replace("\n", eol) + end
        (srt / name).write_bytes(code.encode())
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    model = PATCHED["srt/model.py"].rstrip("\n").replace("\n", eol) + end
    assert (srt / "model.py").read_bytes() == model.encode()
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before


def test_bytecode_and_folders_go_with_the_new_files(run, tree):
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    srt = tree / "python/sglang/srt"
    command = [sys.executable, "-m", "compileall", "-q", str(srt / "new")]
    subprocess.run([*command, str(srt / "extra.py")], check=True)
    assert len(list(srt.rglob("*.pyc"))) == 3
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before

    assert run("apply", tree)[0] == 0
    (srt / "new/mine.py").write_text("")
    assert run("revert", tree)[0] == 0
    assert os.listdir(srt / "new") == ["mine.py"]


def test_bytecode_that_python_would_not_check_is_removed(run, tree):
    model = tree / "python/sglang/srt/model.py"
    for mode, left in (("unchecked-hash", 0), ("timestamp", 1)):
        command = [sys.executable, "-m", "compileall", "-qf", "--invalidation-mode"]
        subprocess.run([*command, mode, str(model)], check=True)
        assert run("apply", tree)[0] == 0
        assert len(list(model.parent.rglob("*.pyc"))) == left
        assert run("revert", tree)[0] == 0


def test_modes_and_hard_links(run, tree, tmp_path, monkeypatch):
    srt = tree / "python/sglang/srt"
    os.link(srt / "model.py", tmp_path / "cached.py")
    (srt / "model.py").chmod(0o640)
    (srt / "backend.py").chmod(0o775)
    srt.chmod(0o775)
    before = snapshot(tree)
    replaced = []

    def replace(new, old, real=os.replace):
        if os.path.exists(old):
            replaced.append((Path(new).stat().st_mode, Path(old).stat().st_mode))
        real(new, old)

    monkeypatch.setattr(os, "replace", replace)
    # Whoever may read the folder may read what is added to it.
    umask = os.umask(0o077)
    assert run("apply", tree)[0] == 0
    os.umask(umask)
    modes = [(srt / name).stat().st_mode & 0o777 for name in ("extra.py", "new")]
    assert modes == [0o664, 0o775]
    assert (tmp_path / "cached.py").read_text() == SGLANG["srt/model.py"]
    os.link(srt / "model.py", tmp_path / "patched.py")
    assert run("revert", tree)[0] == 0
    # At no moment is there a file of another mode.
    assert len(replaced) == 4 and all(new == old for new, old in replaced)
    assert snapshot(tree) == before
    assert (tmp_path / "patched.py").read_text() == PATCHED["srt/model.py"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a tree away")
def test_tree_of_another_user(run, tree):
    for top, folders, names in os.walk(tree):
        for name in (".", *folders, *names):
            os.chown(Path(top, name), 12345, 12346)
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    for path in tree.rglob("*"):
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before


@pytest.mark.parametrize("name", ["srt/model.py", "srt/new", "srt"])
@pytest.mark.parametrize("inside", [True, False])
def test_symbolic_links(run, tree, tmp_path, name, inside):
    link = tree / "python/sglang" / name
    elsewhere = (tree if inside else tmp_path) / "elsewhere"
    if link.exists():
        link.rename(elsewhere)
    else:
        elsewhere.mkdir()
    link.symlink_to(elsewhere)
    before = snapshot(tmp_path)
    refused(run, tree, f"python/sglang/{name}: a symbolic link to {elsewhere}")
    assert snapshot(tmp_path) == before


def in_child(function) -> int:
    """The exit status of a child process that calls `function`."""
    child = os.fork()
    if not child:
        status = 99
        try:
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_nobody(function) -> int:
    def call() -> int:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return function()

    return in_child(call)


@pytest.fixture
def open_folder():
    """A folder that every user may enter; pytest's own are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("folder", ["srt", "srt/new"])
def test_read_only(open_folder, folder, capfd):
    tree = make(open_folder / "target")
    mirror = write_tree(open_folder / "mirror", MIRROR)
    package = tree / "python/sglang"
    (package / folder).mkdir(exist_ok=True)
    for path in (package, *package.rglob("*")):
        if path.is_dir():
            path.chmod(0o555 if path == package / folder else 0o777)

    def call(name: str) -> int:
        return as_nobody(lambda: main([name, "--sglang", str(tree)], source=mirror))

    def refuses(*names: str) -> None:
        before = snapshot(tree)
        for name in names:
            capfd.readouterr()
            assert call(name) == 2
            said = f": the folder python/sglang/{folder} is read-only (SGLang 0.5.12)\n"
            assert said in capfd.readouterr().err
            assert snapshot(tree) == before

    refuses("apply", "status")
    if os.geteuid() == 0:
        assert main(["apply", "--sglang", str(tree)], source=mirror) == 0
        assert call("status") == call("apply") == 0
        refuses("revert")


@pytest.mark.parametrize("path", ["", "python/sglang/srt"])
def test_unreadable(open_folder, path, capfd):
    tree = make(open_folder / "target")
    mirror = write_tree(open_folder / "mirror", MIRROR)
    (tree / path).chmod(0o000)
    status = as_nobody(lambda: main(["apply", "--sglang", str(tree)], source=mirror))
    (tree / path).chmod(0o755)
    out, err = capfd.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "cannot be read: Permission denied" in err


class Fault:
    """Lets the file-changing calls of `os` go wrong from the `number`th on, or at it
    alone: each then raises, or ends the process halfway."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, how: str):
        self.left, self.how = number, how
        names = ("write", "fsync", "replace", "unlink", "mkdir", "rmdir", "chmod")
        for name in ("open", *names):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *args, r=real: self.call(r, *args))

    def call(self, real, *args):
        name = real.__name__
        if (
            (name == "open" and not args[1] & os.O_CREAT)
            or (name == "unlink" and not os.path.lexists(args[0]))
            or (
                name == "rmdir"
                and not (os.path.isdir(args[0]) and not os.listdir(args[0]))
            )
        ):
            return real(*args)  # changes nothing
        self.left -= 1
        if self.left > 0 or (self.left < 0 and self.how in ("once", "kill")):
            return real(*args)
        if self.how == "full" and name not in ("open", "write", "mkdir"):
            return real(*args)
        if name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        if self.how == "kill":
            os._exit(77)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("how", ["once", "full", "always", "kill"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_failure_of_each_call(run, mirror, tree, monkeypatch, command, how):
    """Of the calls that change a file: no upstream file is ever missing or half-written,
    and another run mends what is left."""
    states = {"revert": snapshot(tree)}
    assert run("apply", tree)[0] == 0
    states["apply"] = snapshot(tree)
    opposite = {"apply": "revert", "revert": "apply"}[command]
    assert run(opposite, tree)[0] == 0
    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            if how == "kill":
                argv = [command, "--sglang", str(tree)]
                code = in_child(
                    lambda: Fault(patch, number, how) and main(argv, source=mirror)
                )
                reached = code == 77
            else:
                fault = Fault(patch, number, how)
                code, _, err = run(command, tree)
                reached = fault.left <= 0
        if not reached:
            assert code == 0 and number > 10
            break
        now = snapshot(tree)
        for name in PATCHED:
            path = f"python/sglang/{name}"
            assert now[path] in (states["apply"][path], states["revert"][path])
            if now[path] == states["apply"][path]:  # what it imports is there
                assert states["apply"].keys() <= now.keys()
        if how in ("once", "full"):
            # All or nothing; what only tidies may fail for both.
            assert code == (2 if now == states[opposite] else 0) or "__pycache__" in err
            assert code == 0 or "No space left on device" in err
        copy = tree.with_name("copy")
        shutil.copytree(tree, copy)
        for place, again in ((tree, (command, opposite)), (copy, (opposite, command))):
            for name in again:
                assert run(name, place)[0] == 0, (number, name)
                assert snapshot(place) == states[name], (number, name)
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", [*PATCHED, "srt/extra.py"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_file_that_cannot_be_replaced_keeps_no_other_from_being_put_back(
    run, tree, monkeypatch, command, name
):
    """As one that is immutable (`chattr +i`)."""
    if command == "revert":
        assert run("apply", tree)[0] == 0
    before = snapshot(tree)
    for call in ("replace", "unlink"):

        def fail(*paths, real=getattr(os, call)):
            if str(paths[-1]).endswith("/" + name):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            real(*paths)

        monkeypatch.setattr(os, call, fail)
    code, _, err = run(command, tree)
    assert code == 2 and "cannot be written: " in err and "put back" not in err
    assert snapshot(tree) == before


def test_a_file_system_that_writes_in_parts_and_changes_no_mode(run, tree, monkeypatch):
    synced = []

    def refuse(*args):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    assert run("apply", tree)[0] == 0
    for name, content in PATCHED.items():
        assert (tree / "python/sglang" / name).read_text() == content
    assert run("revert", tree)[0] == 0
    assert len(synced) == 5 + 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interruptions_wait_until_all_is_written(mirror, tree, monkeypatch, name):
    number = getattr(signal, name)

    def interrupted() -> int:
        # A background shell hands on an ignored SIGINT, nohup an ignored SIGHUP.
        interrupt = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(number, interrupt)
        real = os.replace
        monkeypatch.setattr(
            os, "replace", lambda *paths: (os.kill(os.getpid(), number), real(*paths))
        )
        return main(["apply", "--sglang", str(tree)], source=mirror)

    assert in_child(interrupted) == (130 if name == "SIGINT" else -number)
    for path, content in PATCHED.items():
        assert (tree / "python/sglang" / path).read_text() == content
    assert main(["status", "--sglang", str(tree)], source=mirror) == 0


def test_two_at_once_both_succeed(mirror, tree, monkeypatch):
    def slow(*paths, real=os.replace):
        time.sleep(0.02)
        real(*paths)

    for command, status in (("apply", 0), ("revert", 1)):
        child = os.fork()
        if not child:
            monkeypatch.setattr(os, "replace", slow)
            os._exit(main([command, "--sglang", str(tree)], source=mirror))
        time.sleep(0.03)
        other = in_child(lambda: main([command, "--sglang", str(tree)], source=mirror))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == other == 0
        assert main(["status", "--sglang", str(tree)], source=mirror) == status


def test_a_reader_finds_every_file_whole_all_the_time(run, tree, tmp_path):
    files = {
        tree / "python/sglang" / name: {SGLANG[name], PATCHED[name]} for name in PATCHED
    }

    def read() -> int:
        while not (tmp_path / "done").exists():
            if any(
                file.read_text() not in contents for file, contents in files.items()
            ):
                return 1
        return 0

    child = os.fork()
    if not child:
        status = 2  # a missing file raises
        try:
            status = read()
        finally:
            os._exit(status)
    for _ in range(20):
        assert run("apply", tree)[0] == 0
        assert run("revert", tree)[0] == 0
    (tmp_path / "done").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_mirror_mistakes_are_named(run, mirror, tree):
    write_tree(mirror, {"srt/model.py": "x = 1\n"})
    code, _, err = run("status", tree)
    assert code == 2 and "both new and edited: srt/model.py" in err
    write_tree(mirror, {"srt/model.py.edit": "\n\nnonsense\n"})
    code, _, err = run("status", tree)
    assert code == 2 and "srt/model.py.edit:3: 'nonsense' is none of" in err


def test_what_the_mirror_ignores(mirror):
    write_tree(mirror, {"srt/__pycache__/x.pyc": "", "srt/.x.swp": "", ".y/z.py": ""})
    assert sorted(Patch.load(mirror).files) == sorted(NEW)


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    """The upstream files that the real patch edits; both releases have the same."""
    package = target.fetch_release(RELEASES[-1]) / "python/sglang"
    return {path: (package / path).read_bytes() for path in Patch.load().edits}


def test_each_release_gets_the_same_diff():
    patch = Patch.load()
    one, other = (
        inspect(SOURCE, target.open_target(version)).diffs(State.ORIGINAL)
        for version in RELEASES
    )
    assert one == other
    assert len(one) == sum(map(len, (patch.edits, patch.files, patch.tests)))


def edited(files: dict[str, bytes]) -> dict[str, bytes]:
    todo = Patch.load().edits
    return {path: edits.apply(data, todo[path]) for path, data in files.items()}


def black(width: int, **options: bool):
    def reformat(code: str) -> str:
        black = pytest.importorskip("black")
        return black.format_str(code, mode=black.Mode(line_length=width, **options))

    return reformat


FORMATS = {
    "unparsed": lambda code: ast.unparse(ast.parse(code)) + "\n",
    # A function more before each other one.
    "shifted": lambda code: re.sub(
        r"(?m)(?<=\n\n)( *)(?=def )", r"\1def added():\n\1    pass\n\n\1", code
    ),
    "CRLF": lambda code: code.replace("\n", "\r\n"),
    "BOM, no final newline": lambda code: "\ufeff" + code.rstrip("\n"),
    "black 50": black(50),
    "black 160, joined": black(160, magic_trailing_comma=False),
}


def program(code: str) -> str:
    """What a file says, less what `FORMATS` adds and what black changes in the tree:
    the indentation of docstrings, parentheses after `del`."""
    tree = ast.parse(code.removeprefix("\ufeff"))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [
                one for one in node.body if getattr(one, "name", "") != "added"
            ]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.Delete) and isinstance(node.targets[0], ast.Tuple):
            node.targets = node.targets[0].elts
    return ast.dump(tree)


@pytest.mark.parametrize("form", FORMATS)
def test_release_in_other_formats(originals, form):
    others = {
        path: FORMATS[form](data.decode()).encode() for path, data in originals.items()
    }
    assert others != originals
    plain, patched = edited(originals), edited(others)
    for path, todo in Patch.load().edits.items():
        assert program(patched[path].decode()) == program(plain[path].decode())
        assert edits.revert(patched[path], todo) == others[path]


def command(*args, cwd: Path = ROOT, isolated: bool = False, **options):
    if isolated:
        # Without site-packages or git: the standard library is enough.
        python = [sys.executable, "-I", "-S", str(ROOT / "prefill_patch")]
        options["env"] = {"PATH": ""}
    else:
        python = [sys.executable, "-m", "prefill_patch"]
    return subprocess.run([*python, *args], cwd=cwd, capture_output=True, **options)


def test_command_from_anywhere_on_an_installed_release(tmp_path):
    packages = tmp_path / "site-packages"
    copy_release("0.5.12", packages, "sglang")
    (packages / "sglang/_version.py").unlink()
    info = {"sglang-0.5.12.dist-info/METADATA": "Name: sglang\nVersion: 0.5.12\n"}
    before = snapshot(write_tree(packages, info))
    calls = [
        ("apply", 0, "A sglang/srt/layers/attention/mla_fp8_prefill.py  +"),
        ("status", 0, "applied (SGLang 0.5.12 in"),
        ("revert", 0, "reverted: "),
    ]
    for name, status, said in calls:
        done = command(
            name, "--sglang", "site-packages/sglang", cwd=tmp_path, isolated=True
        )
        assert (done.returncode, done.stderr) == (status, b"")
        assert said in done.stdout.decode()
    assert snapshot(packages) == before


@pytest.mark.parametrize("output", ["| head -c 0", "> /dev/full"])
def test_the_status_holds_where_nobody_reads(tree, mirror, output):
    # The locale's encoding does not matter either.
    odd = tree.with_name("t\u00e9t")
    tree.rename(odd)
    code = "import sys; from pathlib import Path; from prefill_patch.cli import main; "
    code += (
        "sys.exit(main(['apply', '--sglang', sys.argv[1]], source=Path(sys.argv[2])))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    shell = f'set -o pipefail; "$@" {output}'
    done = subprocess.run(
        ["bash", "-c", shell, "-", sys.executable, "-c", code, odd, mirror],
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_reader_of_the_diff_that_stops():
    code = f"{sys.executable} -m prefill_patch build --sglang 0.5.12.post1 | head -c 5"
    done = subprocess.run(code, cwd=ROOT, shell=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"diff ", b"")


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that has a wheel for another host only, of SGLang 0.5.12."""
    wheel = tmp_path / "sglang-0.5.12-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sglang/srt/x.py", "")
        archive.writestr("sglang/version.py", "__version__ = '0.5.12'\n")
        archive.writestr("other/x.py", "")
        archive.writestr("sglang/../../x.txt", "")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nfor one in "$@"; do case $one in --dest=*) to=${one#--dest=};; esac; done\n'
        f'case "$*" in *sglang==0.5.12*--platform=*) exec cp {wheel} $to;; esac\n'
        'echo "ERROR: No matching distribution" >&2; exit 1\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/sglang-fp8-prefill"


def test_wheel_for_another_host(pip):
    found = target.open_target("v0.5.12")
    assert (found.root, found.version) == (pip / "sglang-0.5.12", "0.5.12")
    assert os.listdir(pip) == ["sglang-0.5.12"]
    assert sorted(found.root.rglob("*.py")) == [
        found.root / "python/sglang" / name for name in ("srt/x.py", "version.py")
    ]
    # Nothing is unpacked outside.
    assert list(pip.parents[1].rglob("x.txt")) == [found.root / "python/sglang/x.txt"]


def test_unknown_release(pip, run):
    code, out, err = run("build", "0.0.0.dev99")
    assert (code, out) == (2, "")
    wanted = "cannot build: SGLang 0.0.0.dev99: pip could not get the wheel: ERROR: No"
    assert err.splitlines()[-1].startswith(wanted)
    assert os.listdir(pip) == []


def test_file_that_is_no_wheel(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"<html>")
    with pytest.raises(PatchError, match="x.whl: not a wheel"):
        target._extract(tmp_path / "x.whl", tmp_path / "out")


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(PatchError, match="SGLang 0.5.12: cannot be cached"):
        target.fetch_release("0.5.12", tmp_path / "cache/x")
