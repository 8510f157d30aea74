"""The doctor: what it says of a tree, a Python and a GPU, and its self-test."""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang_cpu import DEVICE, HAS_GPU

from prefill_patch import SOURCE, cli, doctor, selftest
from prefill_patch.doctor import FAIL, OK, UNKNOWN, Check
from prefill_patch.errors import PatchError
from prefill_patch.patch import Inspection, State
from prefill_patch.releases import BASE, RELEASES
from prefill_patch.selftest import Gpu
from prefill_patch.target import Target, open_target

ROOT = Path(__file__).resolve().parents[2]
PINS = {
    "torch": "2.11.0",
    "flashinfer_python": "0.6.11.post1",
    "sglang-kernel": "0.4.2.post2",
    "tokenspeed_mla": "0.1.1",
}


@pytest.fixture
def patched(unpatched_sglang) -> Path:
    """The patched SGLang that this process imports, as a checkout."""
    return unpatched_sglang.parents[1] / "patched"


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """The metadata of a host that has all that SGLang pins; its own is hidden."""
    pytest.importorskip("packaging.requirements")  # before it is hidden too
    hidden = ("site-packages", "dist-packages")
    kept = [path for path in sys.path if not any(name in path for name in hidden)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *kept])
    pins = [f"{name}=={version}" for name, version in PINS.items()]
    others = ["numpy", "torch==1.0; extra == 'old'", "x[y]>=1; python_version > '3'"]
    add_metadata(tmp_path, "sglang", "0.5.12.post1", [*pins, *others])
    for name, version in PINS.items():
        requires = ["triton==3.6.0"] if name == "torch" else []
        add_metadata(tmp_path, name, version, requires)
    add_metadata(tmp_path, "triton", "3.6.0")
    return tmp_path


def add_metadata(folder: Path, name: str, version: str, requires=()) -> None:
    metadata = folder / f"{name.replace('-', '_')}.dist-info/METADATA"
    metadata.parent.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    metadata.write_text("\n".join(lines) + "\n")


def command(*arguments, python=sys.executable, **environ):
    """The doctor's own command line in a process of its own."""
    return subprocess.run(
        [python, "-m", "prefill_patch", "doctor", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


class TestTarget:
    @pytest.mark.parametrize(
        "version, mark",
        [
            ("0.5.12", OK),
            ("0.5.12.post1", OK),
            ("0.5.12.post1+local", OK),
            ("0.5.12-3-gabc1234", OK),
            ("0.5.12.post2.dev1", UNKNOWN),
            ("unknown", UNKNOWN),
            ("0.5.13", UNKNOWN),
        ],
    )
    def test_release(self, version, mark, tmp_path):
        release = RELEASES[version != "0.5.12" and "-" not in version]
        target = Target(tmp_path, "sglang", version)
        check = doctor.check_release(Inspection(target, release, State.APPLIED, ()))
        assert check.mark == mark and version in check.text

    def test_backend_without_a_hook_in_a_release(self, tmp_path):
        newest = RELEASES[-1]
        target = Target(tmp_path, "sglang", newest.version)
        found = Inspection(target, newest, State.APPLIED, ())
        backends = ["trtllm_mla", "tokenspeed_mla", "fa3"]
        (check,) = doctor.check_backends(found, backends)
        assert check.mark == FAIL
        assert check.text.endswith(
            f"no hook in {newest.version}: use trtllm_mla or cutedsl_mla"
        )

    def test_only_an_applied_patch_is_ok(self, tmp_path):
        target = Target(tmp_path, "sglang", "0.5.12")
        problem = PatchError("already there", file="a.py")

        def check(state: State, by_plugin: bool) -> Check:
            found = Inspection(target, BASE, state, (), (problem,))
            return doctor.check_patch(found, by_plugin)

        found = {state: check(state, by_plugin=False) for state in State}
        assert found.pop(State.APPLIED).mark == OK
        assert {check.mark for check in found.values()} == {FAIL}
        assert found.pop(State.BLOCKED).text.endswith("a.py: already there")
        apply = f"`python3 -m prefill_patch apply --sglang {tmp_path}`"
        assert found.pop(State.ORIGINAL).text == f"not applied, {apply} applies it"
        (partly,) = found.values()
        assert partly.text.endswith(f"{apply} finishes it")
        marks = {state: check(state, by_plugin=True).mark for state in State}
        assert marks.pop(State.ORIGINAL) == OK
        assert set(marks.values()) == {FAIL}

    def test_another_sglang_is_imported(self, patched, unpatched_sglang):
        assert doctor.check_import(open_target(patched)).mark == OK
        check = doctor.check_import(open_target(unpatched_sglang))
        assert check.mark == FAIL
        assert str(patched) in check.text and str(unpatched_sglang) in check.text

    def test_default_is_the_sglang_that_is_imported(self, tmp_path):
        package = tmp_path / "python/sglang"
        (package / "srt").mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        # A checkout, which has its version and its tests at its root.
        (tmp_path / "sglang").symlink_to(package)
        done = command(PYTHONPATH=str(tmp_path))
        assert done.returncode == 1 and f"checking {package} for" in done.stdout
        assert "--   SGLang: version unknown" in done.stdout
        assert "FAIL patch: cannot be applied: python/sglang/" in done.stdout
        assert "ok   import: " in done.stdout
        assert "ok   self-test: " not in done.stdout

    def test_a_bare_python_is_enough(self, patched, tmp_path):
        venv.create(tmp_path, with_pip=False)
        bare = dict(python=str(tmp_path / "bin/python"), PYTHONPATH="")
        done = command("--sglang", patched, **bare)
        assert done.returncode == 1
        assert "ok   patch: applied" in done.stdout
        assert "FAIL import: " in done.stdout and "no sglang package" in done.stdout
        assert "--   versions: not compared: `packaging`" in done.stdout
        assert "FAIL self-test: ended with status 1" in done.stdout
        assert "No module named 'torch'" in done.stderr
        done = command(**bare)
        assert done.returncode == 2 and "has no sglang package" in done.stderr

    def test_other_commands_still_need_a_target(self):
        with pytest.raises(SystemExit) as caught:
            cli.main(["status"])
        assert caught.value.code == 2


@pytest.mark.parametrize(
    "value, mark, text",
    [
        (None, OK, "is fused"),
        ("Composed", OK, "is composed"),
        ("OFF", FAIL, "turns the patch off"),
        ("", FAIL, "got ''"),
        ("on", FAIL, "got 'on': a server would not start"),
    ],
)
def test_switch(value, mark, text):
    check = doctor.check_switch({} if value is None else {doctor.SWITCH: value})
    assert check.mark == mark and text in check.text


@pytest.mark.parametrize(
    "value, mark, text",
    [(None, OK, "is auto"), ("ON", OK, "is on"), ("1", FAIL, "would not start")],
)
def test_gemm_switch(value, mark, text):
    environ = {} if value is None else {doctor.GEMM_SWITCH: value}
    check = doctor.check_gemm_switch(environ)
    assert check.mark == mark and text in check.text


class TestLogSumExp:
    """The static check, and what trtllm_mla finds on the stand-in for its kernel."""

    SOURCE = "data/include/flashinfer/trtllm/fmha/lse.cuh"

    @pytest.mark.parametrize(
        "source, base",
        [("math::log2e * m + log2f(d)", "2"), ("m + logf(d)", None), (None, None)],
    )
    def test_source(self, source, base, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
        package = tmp_path / "flashinfer"
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        if source:
            file = package / self.SOURCE
            file.parent.mkdir(parents=True)
            file.write_text(source)
        assert doctor.flashinfer_lse_base() == base

    def test_no_flashinfer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
        assert doctor.flashinfer_lse_base() is None

    @pytest.mark.parametrize(
        "value, in_source, mark, text",
        [
            (None, "2", OK, "is auto; FlashInfer's lse.cuh writes base 2"),
            ("AUTO", None, OK, "lse.cuh writes a base that is not known"),
            ("2", "2", OK, "is 2; FlashInfer's lse.cuh writes base 2"),
            ("e", None, OK, "is e; FlashInfer's"),
            ("e", "2", FAIL, "would be wrong, unset it"),
            ("", "2", FAIL, "must be auto, 2 or e, got '': a server would not start"),
        ],
    )
    def test_setting(self, value, in_source, mark, text):
        environ = {} if value is None else {doctor.LSE_SWITCH: value}
        check = doctor.check_lse(environ, in_source)
        assert check.mark == mark and text in check.text

    def find(self, natural, monkeypatch, **environ) -> Check:
        from gpu_stand_ins import kernels

        monkeypatch.setattr(kernels.SETTINGS, "natural_lse", natural)
        return selftest.attempt("", selftest.check_lse_base, environ, DEVICE)

    @pytest.mark.parametrize(
        "natural, setting, mark, text",
        [
            (False, "auto", OK, "returns base 2 here"),
            (False, "2", OK, "returns base 2 here"),
            (True, "auto", OK, "returns base e here"),
            (True, "2", FAIL, "base e here, not 2: unset SGLANG_MLA_FP8_PREFILL_LSE"),
        ],
    )
    def test_found(self, natural, setting, mark, text, monkeypatch):
        check = self.find(natural, monkeypatch, **{doctor.LSE_SWITCH: setting})
        assert check.mark == mark and text in check.text

    def test_neither(self, monkeypatch):
        import gpu_stand_ins  # noqa: F401, the backend finds FlashInfer as it is imported

        from sglang.srt.layers.attention import trtllm_mla_backend

        def kernel(*, query, **_):
            return query, torch.zeros(query.shape[:2], device=query.device)

        name = "trtllm_ragged_attention_deepseek"
        monkeypatch.setattr(trtllm_mla_backend.flashinfer.prefill, name, kernel)
        check = self.find(False, monkeypatch)
        assert check.mark == FAIL and "256 equal keys" in check.text

    @pytest.mark.parametrize(
        "gpus, backend, finds",
        [
            ([Gpu("B200", 100)], "trtllm_mla", True),
            ([Gpu("B200", 100)], "tokenspeed_mla", False),
            ([Gpu("B200", 100), Gpu("H200", 90)], "trtllm_mla", False),
            ([], "trtllm_mla", False),
        ],
    )
    def test_where(self, gpus, backend, finds, monkeypatch):
        monkeypatch.setattr(selftest, "visible_gpus", lambda: (gpus, "none"))
        monkeypatch.setattr(selftest, "check_lse_base", lambda environ: (OK, "found"))
        monkeypatch.setattr(selftest, "check_kernels", lambda reference: [])
        found = [check.text for check in selftest.run([backend], True)]
        assert ("found" in found) == finds


class TestVersions:
    def check(self, root: Path, backends=tuple(BASE.backends)) -> dict[str, Check]:
        target = Target(root, "sglang", "0.5.12.post1")
        return {c.subject: c for c in doctor.check_versions(target, backends)}

    def test_as_pinned(self, packages):
        found = self.check(packages)
        assert set(found) == set(doctor.PACKAGES)
        assert {check.mark for check in found.values()} == {OK}
        assert "sglang 0.5.12.post1 asks for 'torch==2.11.0'" in found["torch"].text
        assert "torch 2.11.0 asks for 'triton==3.6.0'" in found["triton"].text
        add_metadata(packages, "sglang-kernel", "0.4.2.post2+cu130")
        assert self.check(packages)["sglang-kernel"].mark == OK

    def test_other_and_missing(self, packages):
        add_metadata(packages, "triton", "3.5.1")
        (packages / "tokenspeed_mla.dist-info/METADATA").unlink()
        found = self.check(packages)
        failed = {name for name, check in found.items() if check.mark == FAIL}
        assert failed == {"triton", "tokenspeed-mla"}
        assert found["triton"].text.startswith("3.5.1, but torch 2.11.0 asks for")
        assert "pip install 'tokenspeed_mla==0.1.1'" in found["tokenspeed-mla"].text
        assert "tokenspeed-mla" not in self.check(packages, ["trtllm_mla"])

    def test_requirements_beside_the_target_come_first(self, packages, tmp_path):
        beside = tmp_path / "beside"
        beside.mkdir()
        add_metadata(beside, "sglang", "0.5.12", ["torch==2.10.0"])
        assert "sglang 0.5.12 asks for 'torch==2.10" in self.check(beside)["torch"].text

    def test_unknown(self, packages, monkeypatch):
        (packages / "sglang.dist-info/METADATA").unlink()
        (packages / "sglang.dist-info").rmdir()
        path = [x for x in sys.path if not [*Path(x).glob("sglang-*.dist-info")]]
        monkeypatch.setattr(sys, "path", path)
        found = self.check(packages)
        assert found["versions"].mark == UNKNOWN and found["triton"].mark == OK
        monkeypatch.setitem(sys.modules, "packaging.requirements", None)
        (check,) = self.check(packages).values()
        assert check.mark == UNKNOWN and "`packaging`" in check.text


class TestProcess:
    """How the self-test's process may end."""

    @pytest.mark.parametrize(
        "code, mark, text",
        [
            ("", OK, "passed"),
            ("raise SystemExit(3)", UNKNOWN, "not complete"),
            ("raise SystemExit(4)", FAIL, "failed"),
            ("import torch.no_such_module", FAIL, "ended with status 1"),
            ("import os; os.abort()", FAIL, "crashed: Aborted"),
        ],
    )
    def test_end(self, code, mark, text):
        check = doctor.run_selftest([sys.executable, "-S", "-c", code], 60)
        assert check.mark == mark and text in check.text

    def test_hang(self, tmp_path):
        # With a process below it, which is stopped as well.
        script = f"(sleep 1.5; touch {tmp_path}/late) & wait"
        check = doctor.run_selftest(["sh", "-c", script], 0.5)
        assert check.mark == FAIL and "not finished after 0.5 s" in check.text
        time.sleep(1.5)
        assert not (tmp_path / "late").exists()


class TestVerdict:
    """The whole command, on a host that is well but for one thing at a time."""

    @pytest.fixture(autouse=True)
    def host(self, packages, patched, monkeypatch):
        switches = doctor.SWITCH, doctor.LSE_SWITCH, doctor.GEMM_SWITCH
        for name in (*switches, "PYTHONDONTWRITEBYTECODE"):
            monkeypatch.delenv(name, raising=False)
        self.found = Inspection(open_target(patched), BASE, State.APPLIED, ())
        monkeypatch.setattr(doctor, "inspect", lambda patch, target: self.found)
        # Under the options of the real one; nothing may be written into the target.
        self.code = "import sys; sys.exit(4 * (not sys.dont_write_bytecode))"
        real = doctor.selftest_command

        def fake(backends, patched):
            self.patched, command = patched, real(backends, patched)
            return [*command[: command.index("-m")], "-S", "-c", self.code]

        monkeypatch.setattr(doctor, "selftest_command", fake)

    def run(self, backend=None) -> int:
        args = argparse.Namespace(backend=backend, timeout=60, no_gpu=False)
        return doctor.run(args, SOURCE, self.found.target)

    def test_ready(self, capfd):
        assert self.run() == 0 and self.patched
        last = capfd.readouterr().out.splitlines()[-1]
        assert last.startswith("verdict: ready")
        assert "--attention-backend trtllm_mla or tokenspeed_mla and" in last
        assert "without prefill CUDA graphs unless" in last

    def test_one_backend(self, packages, capfd):
        (packages / "tokenspeed_mla.dist-info/METADATA").unlink()
        assert self.run() == 1
        assert self.run("trtllm_mla") == 0
        assert "--attention-backend trtllm_mla and" in capfd.readouterr().out
        assert self.run("fa3") == 0
        assert "CUDA graphs" not in capfd.readouterr().out  # it keeps them

    @pytest.mark.parametrize("status, verdict", [(3, "cannot say"), (4, "not ready")])
    def test_selftest(self, status, verdict, capfd):
        self.code = f"raise SystemExit({status})"
        assert self.run() == 1
        assert f"\nverdict: {verdict}" in capfd.readouterr().out

    @pytest.mark.parametrize("wrong", ["state", "import", "release", "switch"])
    def test_one_thing_wrong(self, wrong, unpatched_sglang, monkeypatch, capfd):
        target = self.found.target
        self.code = "raise SystemExit(3)"  # what is not checked does not hide it
        if wrong == "state":
            self.found = replace(self.found, state=State.ORIGINAL)
        elif wrong == "import":
            self.found = replace(self.found, target=open_target(unpatched_sglang))
        elif wrong == "release":
            self.found = replace(self.found, release=RELEASES[-1])
        else:
            monkeypatch.setenv(doctor.SWITCH, "off")
        assert self.run("tokenspeed_mla") == 1
        assert "\nverdict: not ready" in capfd.readouterr().out
        # The kernels are of the SGLang that is imported, where that is the patched one.
        assert self.patched == (wrong in ("release", "switch"))


class TestContainerfile:
    """Its steps, run by sh on the release laid out as a checkout; no container is built."""

    FOLDER = "/opt/mla_fp8_prefill"

    @pytest.fixture
    def build(self, packages, tmp_path, unpatched_sglang):
        """Copies and runs all steps; the output of the last one that ran."""
        checkout = tmp_path / "checkout/python"
        shutil.copytree(unpatched_sglang / "sglang", checkout / "sglang")
        code = (ROOT / "Containerfile").read_text().replace("\\\n", "")
        steps = [line.split(maxsplit=1) for line in code.splitlines()]
        into = tmp_path / "opt"
        for source, target in [x[1].split() for x in steps if x[0] == "COPY"]:
            target = target.replace(self.FOLDER, str(into))
            shutil.copytree(ROOT / source, target)
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]
        environ = {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join(map(str, (checkout, packages))),
            "CUDA_VISIBLE_DEVICES": "",
        }

        def build(**settings):
            for command in [x[1] for x in steps if x[0] == "RUN"]:
                done = subprocess.run(
                    ["sh", "-c", command.replace(self.FOLDER, str(into))],
                    env={**os.environ, **environ, **settings},
                    capture_output=True,
                    text=True,
                )
                if done.returncode != 0:
                    break
            return done

        return build

    def test_it_takes_no_gpu_and_nothing_else_amiss(self, build, packages):
        done = build()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "--   GPU: " in done.stdout and "a GPU\nverdict: ready" in done.stdout
        (packages / "tokenspeed_mla.dist-info/METADATA").unlink()
        done = build()
        assert done.returncode == 1 and "FAIL tokenspeed-mla" in done.stdout

    def test_it_ends_where_the_patch_does_not_go_in(self, build, tmp_path):
        backend = "srt/layers/attention/trtllm_mla_backend.py"
        (tmp_path / "checkout/python/sglang" / backend).write_text("")
        done = build()
        assert done.returncode == 2 and backend in done.stderr


class TestGpus:
    @pytest.mark.parametrize(
        "gpus, mark, text",
        [
            ([Gpu("NVIDIA B200", 100)] * 8, OK, "8 x NVIDIA B200 (SM100)"),
            ([Gpu("NVIDIA GB300", 103)], OK, "1 x NVIDIA GB300 (SM103)"),
            ([Gpu("B200", 100), Gpu("H200", 90)], FAIL, "1 x H200 (SM90)"),
            ([Gpu("RTX PRO 6000", 120)], FAIL, "trtllm_mla need SM100"),
            ([Gpu("A100", 80)], FAIL, "FP8 conversion needs SM89"),
            ([], UNKNOWN, "no driver: run this on the host of the server"),
        ],
    )
    def test_gpus(self, gpus, mark, text):
        check = selftest.check_gpus(gpus, "no driver", ["trtllm_mla"])
        assert check.mark == mark and text in check.text
        assert f"torch {torch.__version__} for CUDA {torch.version.cuda}" in check.text

    @pytest.mark.parametrize(
        "gpu, mark", [(Gpu("H200", 90), OK), (Gpu("NVIDIA B200", 100), FAIL)]
    )
    def test_fa3_is_for_hopper(self, gpu, mark):
        check = selftest.check_gpus([gpu], "", ["fa3"])
        assert check.mark == mark
        assert ("fa3 needs SM90" in check.text) == (mark == FAIL)

    @pytest.mark.parametrize("gpus", [[], [Gpu("A100", 80)]])
    def test_no_kernels_without_fp8_conversion(self, gpus, monkeypatch):
        monkeypatch.setattr(selftest, "visible_gpus", lambda: (gpus, "none"))
        monkeypatch.setattr(selftest, "check_kernels", None)
        *_, kernels = selftest.run(list(BASE.backends), True)
        assert kernels.mark == UNKNOWN and "not run" in kernels.text

    @pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
    def test_selftest_on_this_gpu(self):
        done = command()
        kernels = [x for x in done.stdout.splitlines() if " tokens: " in x]
        exact, timed = kernels[:6], kernels[6:]
        assert len(exact) == 6, done.stdout
        assert all(line.startswith("ok ") for line in exact), done.stdout
        # Not how fast: other tests may be on the GPU.
        assert timed and all("of copy bandwidth" in line for line in timed)
        assert "ok   hook: " in done.stdout


class TestHook:
    METHODS = "sglang.srt.models.deepseek_common.attention_forward_methods"
    CLASS = "sglang.srt.layers.attention.trtllm_mla_backend.TRTLLMMLABackend"

    def test_hook(self):
        assert selftest.check_hook([*BASE.backends, "fa3"])[0] == OK

    def test_backend_without_it(self, monkeypatch):
        monkeypatch.setattr(self.CLASS, type("Bare", (), {}))
        mark, text = selftest.check_hook(["trtllm_mla"])
        assert mark == FAIL and "TRTLLMMLABackend is without" in text

    def test_model_without_it(self, monkeypatch):
        module = SimpleNamespace(__name__="bare")
        monkeypatch.setitem(sys.modules, f"{self.METHODS}.forward_mha", module)
        assert selftest.check_hook([]) == (FAIL, "bare does not call it")


class TestKernels:
    """The self-test's own judgement, at sizes that an interpreter can do."""

    PREFILL, PACK, QUANTIZE = selftest.KERNELS

    @pytest.fixture(scope="class")
    def reference(self):
        return selftest.load_reference()

    def check(self, reference, name, check=selftest.check_exact) -> Check:
        dims = reference.MLADims(heads=2, nope=16, rope=16, v=16, lora=32)
        return selftest.attempt(name, check, reference, name, dims, 5)

    def wrap(self, monkeypatch, name, change) -> None:
        """Change what the kernel has written, as bytes."""
        module = importlib.import_module(selftest.HOOK)
        kernel = getattr(module, name)

        def wrong(*args, **kwargs):
            written = kernel(*args, **kwargs)
            outputs = written if isinstance(written, tuple) else (written,)
            cache = [kwargs["kv_cache"]] if "kv_cache" in kwargs else []
            change([x.view(torch.uint8) for x in (*outputs, *cache)], kwargs)
            return written

        monkeypatch.setattr(module, name, wrong)

    @pytest.mark.parametrize("name", selftest.KERNELS)
    def test_right(self, reference, name):
        check = self.check(reference, name)
        assert check.mark == OK and check.text.startswith("0 of "), check

    @pytest.mark.parametrize(
        "name, output",
        [(PREFILL, 0), (PREFILL, 1), (PREFILL, 2), (PACK, 0), (PACK, 1), (QUANTIZE, 0)],
    )
    def test_one_byte_two_steps_off(self, reference, name, output, monkeypatch):
        def change(outputs, kwargs):
            outputs[output][-1, -1, -1] ^= 2

        self.wrap(monkeypatch, name, change)
        check = self.check(reference, name)
        assert check.mark == FAIL and ": 1 of" in check.text
        assert "SGLANG_MLA_FP8_PREFILL=off" in check.text

    @pytest.mark.parametrize("slot", ["written", "free"])
    def test_wrong_cache(self, reference, slot, monkeypatch):
        def change(outputs, kwargs):
            used = kwargs["cache_loc"].tolist()
            free = set(range(len(outputs[3]))) - set(used)
            outputs[3][used[0] if slot == "written" else min(free), 0, 7] ^= 0x40

        self.wrap(monkeypatch, self.PREFILL, change)
        check = self.check(reference, self.PREFILL)
        assert check.mark == FAIL and check.text.startswith("KV cache: 1 of")

    def test_unwritten_output(self, reference, monkeypatch):
        left = []

        def nothing(x):
            left.append(torch.empty_like(x, dtype=torch.float8_e4m3fn))
            return left[0]

        monkeypatch.setattr(f"{selftest.HOOK}.fp8_quantize", nothing)
        assert self.check(reference, self.QUANTIZE).mark == FAIL
        assert left[0].float().isnan().all()

    @pytest.mark.parametrize(
        "error, mark, text",
        [
            (
                RuntimeError("CUDA error: no\nhint"),
                FAIL,
                "RuntimeError: CUDA error: no;",
            ),
            (SystemExit("gone"), FAIL, "SystemExit: gone"),
            (torch.OutOfMemoryError("too much"), UNKNOWN, "stop what else is on"),
        ],
    )
    def test_error_in_a_kernel(self, reference, error, mark, text, monkeypatch):
        def broken(outputs, kwargs):
            raise error

        self.wrap(monkeypatch, self.PACK, broken)
        check = self.check(reference, self.PACK)
        assert check.mark == mark and text in check.text

    def test_nothing_is_tried_after_a_failure(self, reference, monkeypatch):
        tried = []

        def check(reference, name, dims, tokens):
            tried.append((name, dims.heads))
            return (FAIL if len(tried) == 5 else OK), ""

        monkeypatch.setattr(selftest, "check_exact", check)
        monkeypatch.setattr(selftest, "check_bandwidth", check)
        marks = [check.mark for check in selftest.check_kernels(reference)]
        assert marks == [OK] * 4 + [FAIL]
        assert {heads for _, heads in tried} == {128, 16}

    @pytest.mark.parametrize(
        "taken, mark, text",
        [
            (1.0, OK, "1.00 of copy bandwidth, 1000 us"),
            (1.25, OK, "Below the 0.9 expected, but correct"),
            (2.1, FAIL, "Far below the 0.9 expected"),
        ],
    )
    def test_bandwidth(self, reference, taken, mark, text, monkeypatch):
        bench, copied = "triton.testing.do_bench_cudagraph", []

        def time_of(call, return_mode):
            written = call()
            if isinstance(written, tuple):  # else it is the copy
                return taken
            copied.append(written.numel())
            return 1.0

        monkeypatch.setattr(bench, time_of)
        check = self.check(reference, self.PACK, selftest.check_bandwidth)
        assert check.mark == mark and text in check.text
        # Half of: k_nope and v of two heads and k_pe in BF16, then k and v in FP8.
        assert copied == [5 * (2 * (2 * 32 + 16) + 2 * 48) // 2]

    def check_gemm(self, reference, weight: str) -> Check:
        import gpu_stand_ins  # noqa: F401, it quantizes the latent of a weight in FP8

        small = SimpleNamespace(**vars(reference))
        dims = reference.MODELS["deepseek-v3"]._replace(heads=8)
        small.MODELS = {"deepseek-v3": dims}
        if weight == "q_b_proj":
            return selftest.attempt("", selftest.check_q_gemm, small, 5, DEVICE)
        in_fp8 = weight == "kv_b_proj in FP8"
        return selftest.attempt("", selftest.check_gemm, small, in_fp8, 5, DEVICE)

    @pytest.mark.parametrize("weight", ["kv_b_proj", "kv_b_proj in FP8", "q_b_proj"])
    @pytest.mark.parametrize("times, setting", [([3, 2], "on"), ([2, 3], "off")])
    def test_gemm(self, reference, times, setting, weight, monkeypatch):
        left = iter([3, 1, *times])
        monkeypatch.setattr(selftest, "time_of", lambda call: call() and next(left))
        check = self.check_gemm(reference, weight)
        assert check.mark == OK and check.text.startswith("3.00 times as fast")
        assert f"{doctor.GEMM_SWITCH}={setting} is faster here" in check.text

    @pytest.mark.parametrize(
        "weight, operand",
        [("kv_b_proj", "v"), ("kv_b_proj in FP8", "v"), ("q_b_proj", "q")],
    )
    def test_wrong_gemm(self, reference, weight, operand, monkeypatch):
        def change(outputs, kwargs):
            outputs[-1][-1, -1, -1] ^= 2

        name = selftest.Q_GEMM if operand == "q" else selftest.GEMM
        self.wrap(monkeypatch, name, change)
        check = self.check_gemm(reference, weight)
        assert check.mark == FAIL and check.text.startswith(f"{operand}: 1 of")
        assert f"{doctor.GEMM_SWITCH}=off" in check.text
