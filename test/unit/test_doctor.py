"""The doctor: what it says of a tree, a Python and a GPU, and its self-test."""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import time
import venv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from patch_targets import copy_release, snapshot
from sglang_cpu import HAS_GPU

from prefill_patch import SOURCE, cli, doctor, install, selftest
from prefill_patch.doctor import FAIL, OK, UNKNOWN, Check, Gpu, GpuFacts
from prefill_patch.patch import Patch, State, inspect
from prefill_patch.target import Target, open_target

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("0.5.12", "0.5.12.post1")
PATCH = Patch.load()
PINS = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "flashinfer_python": "0.6.11.post1",
    "sglang_kernel": "0.4.2.post2",
    "tokenspeed_mla": "0.1.1",
}

B200 = Gpu("NVIDIA B200", (10, 0), 183359 * 2**20)
H200 = Gpu("NVIDIA H200", (9, 0), 143771 * 2**20)
BLACKWELL = GpuFacts(
    gpus=(B200,) * 8,
    seen_by_torch=True,
    torch="2.11.0",
    cuda="13.0",
    driver="580.65.06",
)
NO_GPU = GpuFacts(torch="2.11.0", cuda="13.0", problem="RuntimeError: no GPUs")


@pytest.fixture(scope="session")
def patched(unpatched_sglang) -> Path:
    """The whole patched SGLang that this process imports, as a checkout."""
    return unpatched_sglang.parents[1] / "patched"


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """The only folder of packages, empty; what the host has installed is hidden."""
    folder = tmp_path / "packages"
    folder.mkdir()
    hidden = ("site-packages", "dist-packages")
    kept = [path for path in sys.path if not any(name in path for name in hidden)]
    monkeypatch.setattr(sys, "path", [str(folder), *kept])
    for module in doctor.PACKAGES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


def add_package(folder: Path, name: str, version: str, requires=()) -> None:
    module = doctor.PACKAGES.get(name.replace("_", "-"), name)
    (folder / module).mkdir(exist_ok=True)
    (folder / module / "__init__.py").write_text("raise RuntimeError('imported')\n")
    add_metadata(folder, name, version, requires)


def add_metadata(folder: Path, name: str, version: str, requires=()) -> None:
    metadata = folder / f"{name}-{version}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    metadata.write_text("\n".join(lines) + "\n")


def add_pinned(folder: Path) -> None:
    """What a host has that installed SGLang with all that it pins."""
    for name, version in PINS.items():
        requires = ["triton==3.6.0"] if name == "torch" else []
        add_package(folder, name, version, requires)


def add_sglang_metadata(folder: Path, release: str = "0.5.12.post1") -> None:
    requires = [
        f"{name}=={version}" for name, version in PINS.items() if name != "triton"
    ]
    requires += ["triton==1.0; extra == 'old'", "numpy", "x[y]>=1; python_version>'3'"]
    add_metadata(folder, "sglang", release, requires)


def run_doctor(tree, facts=BLACKWELL, backend=None, timeout=60.0) -> int:
    args = argparse.Namespace(backend=backend, timeout=timeout)
    return doctor.run(args, PATCH, open_target(tree), lambda timeout: facts)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> str:
    """A Python with its standard library alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return str(folder / "bin/python")


def command(
    *arguments, python=sys.executable, **environ
) -> subprocess.CompletedProcess:
    """The doctor's own command line in a process of its own."""
    return subprocess.run(
        [python, "-m", "prefill_patch", "doctor", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


nothing_installed = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is not None,
    reason="finds what is installed here",
)


def lines(output: str) -> dict[str, Check]:
    checks = [Check.parse(line) for line in output.splitlines()]
    return {check.subject: check for check in checks if check}


def fake_selftest(tmp_path, monkeypatch, code: str) -> None:
    script = tmp_path / "fake_selftest.py"
    script.write_text(textwrap.dedent(code))
    monkeypatch.setattr(doctor, "_SELFTEST", script)


class TestTarget:
    @pytest.mark.parametrize(
        "release, mark",
        [
            ("0.5.12", OK),
            ("0.5.12.post1", OK),
            ("0.5.12.post1+local", OK),
            ("0.5.12-3-gabc1234", OK),
            ("0.5.12.post2.dev1", UNKNOWN),
            ("unknown", UNKNOWN),
            ("0.5.13", FAIL),
            ("0.5.1", FAIL),
            ("0.5.12.post2", FAIL),
        ],
    )
    def test_release(self, release, mark):
        check = doctor.check_release(release)
        assert check.mark == mark and release in check.text
        assert mark == OK or "0.5.12 and 0.5.12.post1" in check.text

    @pytest.mark.parametrize("release", RELEASES)
    def test_patch_states(self, release, tmp_path):
        tree = copy_release(release, tmp_path / "tree")

        def check():
            return doctor.check_patch(inspect(PATCH, open_target(tree)))

        assert check().mark == FAIL
        assert check().text.startswith("not applied: python3 -m prefill_patch apply")
        original = (tree / "python/sglang/srt/environ.py").read_bytes()
        install.apply(inspect(PATCH, open_target(tree)))
        assert check() == Check(OK, "patch", check().text)
        (tree / "python/sglang/srt/environ.py").write_bytes(original)
        assert check().mark == FAIL
        assert "partly applied or altered" in check().text
        assert "srt/environ.py" in check().text

    def test_upstream_hook(self, tmp_path):
        tree = copy_release("0.5.13", tmp_path / "tree")
        check = doctor.check_patch(inspect(PATCH, open_target(tree)))
        assert check.mark == FAIL and "already has a prefill hook" in check.text

    def test_import(self, patched, unpatched_sglang):
        assert doctor.check_import(open_target(patched)).mark == OK
        check = doctor.check_import(open_target(unpatched_sglang))
        assert check.mark == FAIL
        assert str(patched) in check.text and str(unpatched_sglang) in check.text

    def test_default_is_the_installed_sglang(self, patched, tmp_path):
        done = command(PYTHONPATH=str(patched / "python"))
        assert f"checking {patched / 'python/sglang'} for" in done.stdout
        tree = copy_release("0.5.12", tmp_path)
        (tree / "python/sglang/__init__.py").write_text("raise SystemExit('imported')")
        (tree / "python/pyproject.toml").touch()
        # What the default stands for, without an import.
        code = (
            "from prefill_patch import doctor\n"
            "print(doctor._target_or_installed(doctor._INSTALLED))\n"
            "print(doctor._target_or_installed('somewhere'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": f"{tree / 'python'}:{ROOT}"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [str(tree), "somewhere"], done.stderr

    def test_no_sglang_anywhere(self, bare_python, tmp_path):
        bare = dict(python=bare_python, PYTHONPATH="")
        done = command(**bare)
        assert done.returncode == 2 and "has no sglang package" in done.stderr
        done = command("--sglang", tmp_path, **bare)
        assert done.returncode == 2 and "not an SGLang tree" in done.stderr
        done = command("--sglang", "no/such/folder", **bare)
        assert done.returncode == 2 and "no such folder" in done.stderr
        assert "Traceback" not in done.stderr

    def test_only_the_standard_library(self, bare_python, patched):
        done = command("--sglang", patched, python=bare_python, PYTHONPATH="")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        found = lines(done.stdout)
        assert found["patch"].mark == OK
        assert found["import"].text.startswith(f"{bare_python} has no sglang")
        assert found["torch"] == Check(FAIL, "torch", found["torch"].text)
        assert "not installed: pip install 'torch" in found["torch"].text
        assert found["self-test"] == Check(
            UNKNOWN, "self-test", "not run, torch cannot be imported"
        )
        assert done.stdout.splitlines()[-1].startswith("verdict: not ready")


class TestVersions:
    @pytest.mark.parametrize(
        "version, specifier, wanted",
        [
            ("2.11.0", "==2.11.0", True),
            ("2.11.0+cu130", "==2.11.0", True),
            ("2.11", "==2.11.0", True),
            ("2.11.1", "==2.11.0", False),
            ("0.6.11", "==0.6.11.post1", False),
            ("0.6.11.post1", ">=0.6.11", True),
            ("0.6.11rc1", ">=0.6.11", False),
            ("0.6.11.dev3", ">=0.6.11rc1", False),
            ("0.6.11.post1.dev2", ">=0.6.11", True),
            ("2.9.0", ">=2.10", False),
            ("0.7.30", "<0.8.0,>=0.7.11", True),
            ("0.8.0", "<0.8.0,>=0.7.11", False),
            ("1.2", "!=1.2", False),
            ("1.2", "~=1.0", None),
            ("1.2", "==1.*", None),
            ("nightly", "==1.0", None),
        ],
    )
    def test_satisfies(self, version, specifier, wanted):
        assert doctor.satisfies(version, specifier) is wanted

    def check(self, root: Path, release="0.5.12.post1", backends=doctor.BACKENDS):
        target = Target(root, "sglang", release)
        return {c.subject: c for c in doctor.check_versions(target, release, backends)}

    def test_all_as_pinned(self, packages):
        add_pinned(packages)
        add_sglang_metadata(packages)
        found = self.check(packages)
        assert list(found) == list(doctor.PACKAGES)
        assert {check.mark for check in found.values()} == {OK}
        assert "SGLang 0.5.12.post1 asks for (==0.6.11.post1)" in (
            found["flashinfer-python"].text
        )
        assert "torch 2.11.0 asks for (==3.6.0)" in found["triton"].text

    @nothing_installed
    def test_other_and_missing(self, packages):
        add_sglang_metadata(packages)
        add_package(packages, "torch", "2.9.1+cu128", ["triton==3.5.1"])
        add_package(packages, "triton", "3.6.0")
        add_package(packages, "flashinfer_python", "oddly-named")
        (packages / "sgl_kernel").mkdir()
        (packages / "sgl_kernel/__init__.py").touch()
        found = self.check(packages)
        marks = {name: check.mark for name, check in found.items()}
        assert marks == {
            "torch": FAIL,
            "triton": FAIL,
            "flashinfer-python": UNKNOWN,
            "sglang-kernel": UNKNOWN,
            "tokenspeed-mla": FAIL,
        }
        assert "2.9.1+cu128, but SGLang 0.5.12.post1 asks for ==2.11.0" in (
            found["torch"].text
        )
        assert "torch 2.9.1+cu128 asks for ==3.5.1" in found["triton"].text
        assert "cannot be compared" in found["flashinfer-python"].text
        assert "without metadata" in found["sglang-kernel"].text
        assert "pip install 'tokenspeed-mla==0.1.1'" in found["tokenspeed-mla"].text
        assert "tokenspeed-mla" not in self.check(packages, backends=["trtllm_mla"])

    def test_pins_of_a_checkout(self, packages, tmp_path):
        add_pinned(packages)
        root = tmp_path / "checkout"
        root.mkdir()
        (root / "pyproject.toml").write_text(
            textwrap.dedent(
                """\
            [build-system]
            requires = ["setuptools"]
            [project]
            dependencies = [
              "aiohttp",  # not "torch==1.0"
              "nvidia-cutlass-dsl[cu13]==4.5.1",
              "torch==2.12.0",
              "tokenspeed_mla >= 0.1.1 ; sys_platform == 'linux'",
            ]
            [project.optional-dependencies]
            old = ["torch==1.0"]
            """
            )
        )
        found = self.check(root)
        assert found["torch"].mark == FAIL and "==2.12.0" in found["torch"].text
        assert found["tokenspeed-mla"].mark == OK
        assert "no version is asked for" in found["flashinfer-python"].text

    @nothing_installed
    def test_pins_of_an_installed_sglang_of_that_version(self, packages, tmp_path):
        add_pinned(packages)
        found = self.check(tmp_path)
        assert found["torch"].mark == UNKNOWN
        assert "no requirements of SGLang 0.5.12.post1" in found["torch"].text
        add_sglang_metadata(packages)
        assert self.check(tmp_path)["torch"].mark == OK
        assert self.check(tmp_path, release="0.5.12")["torch"].mark == UNKNOWN

    @nothing_installed
    def test_release_of_an_installed_sglang(self, packages, monkeypatch):
        target = Target(packages, "sglang", "unknown")
        monkeypatch.setattr(doctor, "installed_package", lambda: packages / "sglang")
        assert doctor.known_release(target) == "unknown"
        add_sglang_metadata(packages, "0.5.12")
        assert doctor.known_release(target) == "0.5.12"

    def test_pins_of_the_real_release(self, pytestconfig):
        target = open_target(pytestconfig.getoption("--sglang"))
        pins = doctor.requirements(target, target.version)
        if pins is None:
            pytest.skip("this target comes without its requirements")
        assert pins["torch"].startswith("==")
        assert set(doctor.PACKAGES) - pins.keys() == {"triton"}


class TestGpus:
    def smi(self, folder: Path, output: str, monkeypatch, status: int = 0) -> None:
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'E'\n{output}\nE\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def test_nvidia_smi(self, tmp_path, monkeypatch):
        rows = (
            "580.65.06, 10.0, 183359, NVIDIA B200\n580.65.06, 9.0, [N/A], NVIDIA X, Y"
        )
        self.smi(tmp_path, rows, monkeypatch)
        gpus, driver = doctor._nvidia_smi()
        assert gpus == (B200, Gpu("NVIDIA X, Y", (9, 0))) and driver == "580.65.06"

    def test_nvidia_smi_without_a_driver(self, tmp_path, monkeypatch):
        self.smi(tmp_path, "NVIDIA-SMI has failed because it", monkeypatch, status=9)
        assert doctor._nvidia_smi() == ((), None)
        monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
        assert doctor._nvidia_smi() == ((), None)

    def test_torch_sees_none(self, tmp_path, monkeypatch):
        self.smi(tmp_path, "535.1, 10.0, 183359, NVIDIA B200", monkeypatch)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        facts = doctor.ask_gpus(60)
        assert facts.gpus == (B200,) and not facts.seen_by_torch
        assert facts.torch == torch.__version__ and facts.problem
        first, second = doctor.check_gpus(facts)
        assert first.mark == FAIL and second.mark == OK
        assert facts.problem in first.text and "driver 535.1" in first.text

    @pytest.mark.parametrize(
        "code, timeout, problem",
        [
            ("raise OSError('libcudart.so.13: no such file')", 60, "libcudart.so.13"),
            ("import os; os.abort()", 60, "crashed (SIGABRT)"),
            # Modules beside selftest.py do not stand in for others.
            ("import target", 60, "No module named 'target'"),
            ("import time; time.sleep(60)", 3, "not finished after 3 s"),
        ],
    )
    def test_broken_torch(self, code, timeout, problem, tmp_path, monkeypatch):
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        facts = doctor.ask_gpus(timeout)
        assert facts.torch is None and problem in facts.problem
        check = next(doctor.check_gpus(facts))
        assert check.subject == "torch import" and check.mark == FAIL
        kernels = list(doctor.check_kernels(None, State.APPLIED, facts, 1))
        assert [check.mark for check in kernels] == [UNKNOWN]

    @pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
    def test_real_gpu(self):
        facts = doctor.ask_gpus(60)
        assert facts.seen_by_torch and facts.torch == torch.__version__
        assert facts.gpus[0].capability == torch.cuda.get_device_capability(0)
        assert facts.gpus[0].name == torch.cuda.get_device_name(0)

    @pytest.mark.parametrize(
        "gpu, has, lacks",
        [
            (B200, ["FP8", "PDL", "MLA"], []),
            (Gpu("NVIDIA GB300", (10, 3)), ["FP8", "PDL", "MLA"], []),
            (Gpu("RTX PRO 6000", (12, 0)), ["FP8", "PDL"], ["MLA"]),
            (H200, ["FP8", "PDL"], ["MLA"]),
            (Gpu("NVIDIA L40S", (8, 9)), ["FP8"], ["PDL", "MLA"]),
            (Gpu("NVIDIA A100", (8, 0)), [], ["FP8", "PDL", "MLA"]),
        ],
    )
    def test_capabilities(self, gpu, has, lacks):
        (check,) = doctor.check_gpus(replace(BLACKWELL, gpus=(gpu, gpu)))
        assert check.mark == (FAIL if lacks else OK)
        assert check.text.startswith(f"2 x {gpu.name}, compute capability")
        _, _, rest = check.text.partition("lacks ")
        lacked = rest.partition(": run on")[0]
        for feature in has:
            assert feature in check.text and feature not in lacked
        for feature in lacks:
            assert feature in lacked

    def test_no_kernels_without_fp8_conversion(self):
        facts = replace(BLACKWELL, gpus=(Gpu("NVIDIA A100", (8, 0)),))
        (check,) = doctor.check_kernels(None, State.APPLIED, facts, 1)
        assert check.mark == UNKNOWN and "no FP8 conversion" in check.text

    def test_mixed(self):
        checks = list(doctor.check_gpus(replace(BLACKWELL, gpus=(B200, H200, B200))))
        assert [check.mark for check in checks] == [OK, FAIL]
        assert checks[0].text.startswith(
            "2 x NVIDIA B200, compute capability 10.0, 179"
        )

    def test_others(self):
        assert [c.mark for c in doctor.check_gpus(NO_GPU)] == [UNKNOWN]
        (amd,) = doctor.check_gpus(replace(BLACKWELL, hip=True))
        assert amd.mark == FAIL and "AMD" in amd.text
        old, gpu = doctor.check_gpus(replace(BLACKWELL, cuda="12.6"))
        assert old.mark == FAIL and "CUDA 12.8" in old.text and gpu.mark == OK
        assert len(list(doctor.check_gpus(replace(BLACKWELL, cuda="12.8")))) == 1


class TestBackends:
    @pytest.fixture(autouse=True)
    def installed(self, packages):
        for name in ("flashinfer_python", "tokenspeed_mla"):
            add_package(packages, name, "1.0")

    def check(self, backend, facts=BLACKWELL, state=State.APPLIED, **environ):
        return doctor.check_backend(backend, state, facts, environ)

    @pytest.mark.parametrize("backend", doctor.BACKENDS)
    def test_taken(self, backend):
        check = self.check(backend)
        assert check.mark == OK and check.subject == backend
        assert "fused producer" in check.text
        assert f"--attention-backend {backend} --kv-cache-dtype fp8_e4m3" in check.text
        assert "32 or 64" in check.text
        check = self.check(backend, SGLANG_MLA_FP8_PREFILL="Composed")
        assert check.mark == OK and "composed producer" in check.text

    @pytest.mark.parametrize("backend", doctor.BACKENDS)
    @pytest.mark.parametrize(
        "change, reason",
        [
            (dict(SGLANG_MLA_FP8_PREFILL="OFF"), "SGLANG_MLA_FP8_PREFILL=off"),
            (dict(SGLANG_MLA_FP8_PREFILL="on"), "got 'on': a server would not start"),
            (dict(SGLANG_MLA_FP8_PREFILL=""), "got ''"),
            (dict(SGLANG_IS_FLASHINFER_AVAILABLE="no"), "turns FlashInfer off"),
            (dict(state=State.ORIGINAL), "the patch is not applied"),
            (dict(state=State.ALTERED), "the patch is partly applied"),
            (dict(facts=replace(BLACKWELL, cuda="12.6")), "built for CUDA 12.6"),
            (dict(facts=replace(BLACKWELL, gpus=(H200, B200))), "10.x, not 9.0"),
            (dict(facts=replace(BLACKWELL, hip=True)), "AMD"),
        ],
    )
    def test_not_taken(self, backend, change, reason):
        check = self.check(backend, **change)
        assert check.mark == FAIL and reason in check.text

    @nothing_installed
    def test_missing_packages(self, packages):
        shutil.rmtree(packages / "tokenspeed_mla")
        assert self.check("trtllm_mla").mark == OK
        check = self.check("tokenspeed_mla")
        assert check.mark == FAIL and "tokenspeed_mla is not installed" in check.text
        shutil.rmtree(packages / "flashinfer")
        for backend in doctor.BACKENDS:
            check = self.check(backend)
            assert check.mark == FAIL and "FlashInfer is not installed" in check.text

    def test_without_gpu(self):
        check = self.check("trtllm_mla", NO_GPU)
        assert check.mark == UNKNOWN and "a GPU that torch sees" in check.text
        assert self.check("trtllm_mla", NO_GPU, SGLANG_MLA_FP8_PREFILL="off").mark == (
            FAIL
        )

    def test_debug_switch_is_told(self):
        check = self.check("trtllm_mla", SGLANG_MLA_FP8_PREFILL_CHECK="true")
        assert check.mark == OK and "SGLANG_MLA_FP8_PREFILL_CHECK is on" in check.text

    def test_names_are_those_of_the_patch(self):
        hook = (SOURCE / "srt/layers/attention/mla_fp8_prefill.py").read_text()
        values = doctor.FUSED, doctor.COMPOSED, doctor.OFF
        assert 'FUSED, COMPOSED, OFF = "{}", "{}", "{}"'.format(*values) in hook
        environ = (SOURCE / "srt/environ.py.edit").read_text()
        assert f'{doctor.SWITCH} = EnvStr("{doctor.FUSED}")' in environ
        assert f"{doctor.CHECK_SWITCH} = EnvBool(False)" in environ
        for backend, name in doctor.BACKENDS.items():
            edit = SOURCE / f"srt/layers/attention/{backend}_backend.py.edit"
            assert f"{name}." in edit.read_text()


class TestVerdict:
    """The whole command, on a host that is well but for one thing at a time."""

    @pytest.fixture(autouse=True)
    def host(self, packages, patched, tmp_path, monkeypatch):
        for name in (doctor.SWITCH, doctor.CHECK_SWITCH):
            monkeypatch.delenv(name, raising=False)
        add_pinned(packages)
        add_sglang_metadata(packages, open_target(patched).version)
        fake_selftest(tmp_path, monkeypatch, "print('ok   kernels: exact')")

    def last(self, capsys) -> str:
        return capsys.readouterr().out.splitlines()[-1]

    def test_ready(self, patched, capsys):
        assert run_doctor(patched) == 0
        output = capsys.readouterr().out
        assert {check.mark for check in lines(output).values()} == {OK}
        assert lines(output)["self-test, kernels"].text == "exact"
        last = output.splitlines()[-1]
        assert last.startswith("verdict: ready") and "fp8_e4m3 uses the patch" in last
        assert "trtllm_mla or tokenspeed_mla" in last

    def test_one_backend(self, patched, packages, capsys):
        shutil.rmtree(packages / "tokenspeed_mla")
        shutil.rmtree(packages / "tokenspeed_mla-0.1.1.dist-info")
        assert run_doctor(patched) == 1
        assert "(tokenspeed-mla, tokenspeed_mla)" in self.last(capsys)
        assert run_doctor(patched, backend="trtllm_mla") == 0
        assert "--attention-backend trtllm_mla and" in self.last(capsys)

    def test_without_gpu(self, patched, capsys):
        assert run_doctor(patched, NO_GPU) == 1
        output = capsys.readouterr().out
        marks = {check.mark for check in lines(output).values()}
        assert marks == {OK, UNKNOWN}
        last = output.splitlines()[-1]
        assert last.startswith("verdict: cannot say")
        for subject in ("GPU", "trtllm_mla", "tokenspeed_mla", "self-test"):
            assert subject in last

    @pytest.mark.parametrize(
        "facts",
        [
            replace(BLACKWELL, gpus=(H200,)),
            replace(BLACKWELL, cuda="12.6"),
            replace(BLACKWELL, gpus=(B200, H200)),
        ],
    )
    def test_wrong_gpu(self, facts, patched, capsys):
        assert run_doctor(patched, facts) == 1
        output = capsys.readouterr().out
        assert output.splitlines()[-1].startswith("verdict: not ready")
        # What can run on this GPU runs all the same.
        assert lines(output)["self-test, kernels"].mark == OK

    def test_switched_off(self, patched, monkeypatch, capsys):
        monkeypatch.setenv(doctor.SWITCH, "off")
        assert run_doctor(patched) == 1
        assert "(trtllm_mla, tokenspeed_mla)" in self.last(capsys)

    def test_not_applied(self, unpatched_sglang, capsys):
        assert run_doctor(unpatched_sglang) == 1
        found = lines(capsys.readouterr().out)
        assert found["patch"].mark == found["import"].mark == FAIL
        assert found["self-test"] == Check(
            UNKNOWN, "self-test", "not run, the patch is not applied"
        )

    @pytest.mark.parametrize(
        "code, text",
        [
            ("import os; os.abort()", "crashed (SIGABRT)"),
            ("print('ok   a: b', flush=True); 1 / 0", "ZeroDivisionError"),
            ("", "ended with status 0"),
            ("raise SystemExit(1)", "ended with status 1"),
            ("print('FAIL a: wrong'); raise SystemExit(1)", "wrong"),
            ("print('ok   a: b'); raise SystemExit(7)", "ended with status 7 after a"),
        ],
    )
    def test_failing_selftest(self, code, text, patched, tmp_path, monkeypatch, capsys):
        fake_selftest(tmp_path, monkeypatch, code)
        assert run_doctor(patched) == 1
        output = capsys.readouterr().out
        failed = [check for check in lines(output).values() if check.mark == FAIL]
        assert len(failed) == 1 and text in failed[0].text
        assert output.splitlines()[-1].startswith("verdict: not ready")

    def test_stuck_selftest(self, tmp_path):
        # A process below it holds on as well, with the output still open.
        script = "echo 'ok   first: done'; sleep 300 & echo $! >pid; wait"
        start = time.monotonic()
        outcome = doctor._run(["sh", "-c", f"cd {tmp_path}; {script}"], 3)
        assert time.monotonic() - start < 30
        first, stuck = doctor.judge_selftest(outcome)
        assert first == Check(OK, "self-test, first", "done")
        assert stuck.mark == FAIL
        assert "not finished after 3 s after first" in stuck.text
        state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")

        def ended() -> bool:
            try:
                return state.read_text().split()[2] == "Z"
            except (FileNotFoundError, ProcessLookupError):
                return True

        # A signal ends a process that waits for a disk only after that wait.
        deadline = time.monotonic() + 10
        while not ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ended()


def test_triton_cache_is_temporary_unless_given(monkeypatch):
    show = ["sh", "-c", 'mkdir -p "$TRITON_CACHE_DIR"; echo "$TRITON_CACHE_DIR"']
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    given = Path(doctor._run(show, 30).out.strip())
    assert given.is_absolute() and not given.parent.exists()
    monkeypatch.setenv("TRITON_CACHE_DIR", os.devnull)
    assert doctor._run(show, 30).out.strip() == os.devnull


def test_writes_nothing_into_the_target(patched, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(patched, tree, ignore=shutil.ignore_patterns("__pycache__"))
    before = snapshot(tree)
    monkeypatch.setenv("PYTHONPATH", str(tree / "python"))
    for name in ("TRITON_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.delenv(name, raising=False)
    # The patched SGLang is imported, on a host without a GPU too.
    checks = list(
        doctor.check_kernels(open_target(tree), State.APPLIED, BLACKWELL, 120)
    )
    assert checks and snapshot(tree) == before
    assert all(check.subject.startswith("self-test, ") for check in checks)
    if not HAS_GPU:
        # No crash and no silence where the GPU that was promised is not there.
        assert FAIL in {check.mark for check in checks}


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_selftest_on_the_gpu(patched):
    target = open_target(patched)
    facts = doctor.ask_gpus(60)
    checks = list(doctor.check_kernels(target, State.APPLIED, facts, 300))
    assert {check.mark for check in checks} == {OK}, "\n".join(map(str, checks))
    shares = [check for check in checks if "bandwidth" in check.subject]
    assert len(shares) == 3


class TestNumerics:
    """The self-test's own judgement, at sizes that an interpreter can do."""

    DIMS = selftest.Dims(heads=2, nope=16, rope=8, v=16, lora=32)
    TOKENS = 5

    @pytest.fixture(scope="class")
    def kernels(self, patched):
        return selftest.load_kernels(patched / "python")

    @pytest.fixture(scope="class")
    def reference(self):
        return selftest.load_reference()

    def check(self, kernels, reference, name) -> Check:
        return selftest.check_exactness(
            name, selftest.LAUNCHES[name], kernels, reference, self.TOKENS, self.DIMS
        )

    @pytest.mark.parametrize("name", selftest.LAUNCHES)
    def test_right(self, kernels, reference, name):
        check = self.check(kernels, reference, name)
        assert check.mark == OK and "bit for bit" in check.text, check

    def planted(self, kernels, name, change):
        """The kernels, one of which then changes what it has written."""
        original = getattr(kernels, name)

        def wrong(*args, **kwargs):
            written = original(*args, **kwargs)
            outputs = {
                "prefill": lambda: (*written, kwargs["kv_cache"]),
                "pack": lambda: written,
                "quantize": lambda: (written,),
            }[name]()
            change([x.view(torch.uint8) for x in outputs], kwargs)
            return written

        return kernels._replace(**{name: wrong})

    @pytest.mark.parametrize(
        "name, output",
        [("prefill", 0), ("prefill", 1), ("prefill", 2)]
        + [("pack", 0), ("pack", 1), ("quantize", 0)],
    )
    @pytest.mark.parametrize("wrong", ["two steps", "sign", "unwritten"])
    def test_one_wrong_byte(self, kernels, reference, name, output, wrong):
        def change(outputs, kwargs):
            byte = outputs[output][-1, -1]
            byte[-1] = {
                "two steps": byte[-1] ^ 2,
                "sign": byte[-1] ^ 0x80,
                "unwritten": torch.full_like(byte[-1], 0xFF),
            }[wrong]

        check = self.check(self.planted(kernels, name, change), reference, name)
        assert check.mark == FAIL
        assert "1 of" in check.text and "SGLANG_MLA_FP8_PREFILL=off" in check.text
        assert f"[{self.TOKENS - 1}, {self.DIMS.heads - 1}, " in check.text
        assert ("NaN or unwritten" in check.text) == (wrong == "unwritten")

    def test_wrong_cache(self, kernels, reference):
        def wrong_row(outputs, kwargs):
            outputs[3][kwargs["cache_loc"][0], 0, 7] ^= 0x40

        def stray_write(outputs, kwargs):
            free = set(range(len(outputs[3]))) - set(kwargs["cache_loc"].tolist())
            outputs[3][min(free), 0, 7] = 0

        for change, name in (
            (wrong_row, "cache rows"),
            (stray_write, "free cache rows"),
        ):
            planted = self.planted(kernels, "prefill", change)
            check = self.check(planted, reference, "prefill")
            assert check.mark == FAIL and f"elements of {name} differ" in check.text

    def test_unwritten_output_is_seen(self, kernels, reference):
        def nothing(q, kv, kv_a, qk_nope_head_dim, **kwargs):
            v = kv.shape[-1] - qk_nope_head_dim
            shapes = (q.shape, q.shape, (*q.shape[:2], v))
            return [torch.empty(s, dtype=selftest.FP8, device=q.device) for s in shapes]

        check = self.check(kernels._replace(prefill=nothing), reference, "prefill")
        assert check.mark == FAIL
        for name in ("q", "k", "v", "cache rows"):
            assert f"elements of {name} differ" in check.text

    def test_one_step_off(self, reference):
        wanted = torch.linspace(1, 400, 20_001, dtype=torch.float64)
        right = reference.round_to_fp8(wanted, selftest.FP8)

        def check(count):
            actual = right.clone()
            actual.view(torch.uint8)[:count] += 1
            output = selftest.Output("x", actual, wanted)
            return selftest.compare(reference, "x", [output])

        assert check(0).text.startswith("all 20001 elements equal")
        assert check(2).mark == OK and "2 of 20001 elements one step" in check(2).text
        assert check(3).mark == FAIL

    def test_error_in_a_kernel(self, kernels, reference):
        def broken(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access\nhints\nhints")

        check = self.check(kernels._replace(quantize=broken), reference, "quantize")
        assert check.mark == FAIL
        assert "RuntimeError: CUDA error: an illegal memory access. Set" in check.text

        def too_large(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        check = self.check(kernels._replace(quantize=too_large), reference, "quantize")
        assert check.mark == UNKNOWN and "too little GPU memory" in check.text

    def test_run(self, patched, unpatched_sglang, monkeypatch):
        tree = patched / "python"
        small = (self.DIMS._replace(heads=8), self.TOKENS)
        monkeypatch.setattr(selftest, "check_bandwidth", lambda *args: [])
        checks = list(selftest.run(tree, *small))
        assert [check.mark for check in checks] == [OK] * 7
        assert checks[0].text == "trtllm_mla and tokenspeed_mla import with the hook"
        subjects = [
            f"{name} kernel, {h} heads" for h in (8, 1) for name in selftest.LAUNCHES
        ]
        assert [check.subject for check in checks[1:]] == subjects
        assert all(Check.parse(str(check)) == check for check in checks)

        # After a failure nothing else is tried on the GPU.
        monkeypatch.setitem(selftest.LAUNCHES, "prefill", lambda *args: 1 / 0)
        checks = list(selftest.run(tree, *small))
        assert [check.mark for check in checks] == [OK, FAIL]

        (check,) = selftest.run(unpatched_sglang, *small)
        assert check.mark == FAIL and "ImportError: sglang comes from" in check.text

    def test_backend_without_the_hook(self, monkeypatch):
        assert selftest.check_backends().mark == OK
        name = "sglang.srt.layers.attention.trtllm_mla_backend"
        bare = SimpleNamespace(TRTLLMMLABackend=type("TRTLLMMLABackend", (), {}))
        monkeypatch.setitem(sys.modules, name, bare)
        check = selftest.check_backends()
        assert check.mark == FAIL
        assert "TRTLLMMLABackend is without MLAFP8PrefillMixin" in check.text

    def test_poison_is_taken_back(self):
        before = torch.are_deterministic_algorithms_enabled()
        with selftest.poisoned_allocations():
            assert torch.empty(64, dtype=selftest.FP8).float().isnan().all()
        assert torch.are_deterministic_algorithms_enabled() == before

    def test_bytes_moved(self, kernels, reference, monkeypatch):
        def times(*launches):
            for launch in launches:
                launch()
            # A copy of x bytes in a millionth of a millisecond makes x GB/s.
            return [1e-6, 1e-6]

        monkeypatch.setattr(selftest, "median_times", times)
        tokens, (h, nope, rope, v, lora) = self.TOKENS, self.DIMS
        k, latent = h * (nope + rope), lora + rope
        moved = {
            "prefill": 2 * (k + h * (nope + v) + latent) + 2 * k + h * v + latent,
            "pack": 2 * (h * (nope + v) + rope) + k + h * v,
            "quantize": 3 * h * v,
        }
        checks = list(selftest._bandwidth(kernels, reference, self.DIMS, tokens))
        assert [check.subject for check in checks] == [f"{n} bandwidth" for n in moved]
        for check, per_token in zip(checks, moved.values()):
            assert check.text.endswith(f"reaches {tokens * per_token} GB/s")

    @pytest.mark.parametrize(
        "taken, mark, text",
        [
            (0.350, OK, "1.00 of copy bandwidth: 350 us for 8192 tokens, 128 heads"),
            (0.350, OK, "the copy reaches 4257 GB/s"),
            (0.4375, OK, "0.80 of copy bandwidth"),
            (0.4375, OK, "Below the 0.9 expected, but correct"),
            (0.710, FAIL, "Far below the 0.9 expected"),
        ],
    )
    def test_bandwidth_verdict(self, taken, mark, text):
        moved = 1_490_000_000
        check = selftest.judge_bandwidth("prefill", 8192, 128, moved, 0.350, taken)
        assert check.mark == mark and text in check.text
        assert check.subject == "prefill bandwidth"


def test_other_commands_still_need_a_target():
    with pytest.raises(SystemExit) as caught:
        cli.main(["status"])
    assert caught.value.code == 2
