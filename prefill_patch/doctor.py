"""Whether a server started now, by this Python on this host, would use the patch.

Nothing of SGLang or torch is imported here: what may crash or hang runs in a process of
its own (`selftest.py`), and everything else is read from files and metadata.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prefill_patch.patch import Inspection, Patch, State, inspect
from prefill_patch.target import Target

RELEASES = ("0.5.12", "0.5.12.post1")

# The attention backends with the hook, and their classes.
BACKENDS = {
    "trtllm_mla": "TRTLLMMLABackend",
    "tokenspeed_mla": "TokenspeedMLABackend",
}

# Distributions that the prefill path needs, and the modules they install.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "flashinfer-python": "flashinfer",
    "sglang-kernel": "sgl_kernel",
    "tokenspeed-mla": "tokenspeed_mla",
}

FP8_CAPABILITY, PDL_CAPABILITY, ATTENTION_MAJOR = (8, 9), (9, 0), 10
BLACKWELL_CUDA = (12, 8)

SWITCH, CHECK_SWITCH = "SGLANG_MLA_FP8_PREFILL", "SGLANG_MLA_FP8_PREFILL_CHECK"
FUSED, COMPOSED, OFF = "fused", "composed", "off"

OK, UNKNOWN, FAIL = "ok", "--", "FAIL"
EXIT_READY, EXIT_NOT_READY = 0, 1

_INSTALLED = "the installed sglang"
_SELFTEST = Path(__file__).with_name("selftest.py")


class Check(NamedTuple):
    """The outcome of one check: OK, UNKNOWN (could not be checked here) or FAIL."""

    mark: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<4} {self.subject}: {self.text}"

    @classmethod
    def parse(cls, line: str) -> Check | None:
        found = re.fullmatch(r"(ok|--|FAIL) +([^:]+): (.*)", line)
        return cls(*found.groups()) if found else None


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int | None = None  # bytes


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs of this host, and what torch says of them."""

    gpus: tuple[Gpu, ...] = ()
    seen_by_torch: bool = False
    torch: str | None = None  # the version that imports, if one does
    cuda: str | None = None  # that torch is built for
    hip: bool = False
    driver: str | None = None
    problem: str | None = None  # why torch sees none


@dataclass(frozen=True)
class Outcome:
    """How a process ended. `status` is None where it had to be stopped."""

    status: int | None
    out: str
    err: str
    timeout: float

    @property
    def failure(self) -> str:
        if self.status is None:
            return f"stopped, not finished after {self.timeout:g} s"
        if self.status < 0:
            return f"crashed ({signal.Signals(-self.status).name})"
        lines = self.err.strip().splitlines()
        return lines[-1].strip() if lines else f"ended with status {self.status}"


def add_options(parser: argparse.ArgumentParser) -> None:
    # Unlike the other commands this one knows a TARGET by itself: its --sglang takes
    # the place of the required one.
    replaced = parser.add_argument_group("target", conflict_handler="resolve")
    replaced.add_argument(
        "--sglang",
        metavar="TARGET",
        default=_INSTALLED,
        type=_target_or_installed,
        help="what the other commands take (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="check for this attention backend only (default: for all of them)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=120,
        help="stop a self-test that takes longer (default: %(default)s)",
    )


def run(
    args: argparse.Namespace,
    patch: Patch,
    target: Target,
    find_gpus: Callable[[float], GpuFacts] | None = None,
) -> int:
    """Print a line a check and the verdict; 0 only if every check is OK."""
    package = target.root / target.package
    print(f"checking {package} for {sys.executable}", flush=True)
    backends = [args.backend] if args.backend else list(BACKENDS)
    checks = []
    for check in _checks(patch, target, backends, args.timeout, find_gpus or ask_gpus):
        print(check, flush=True)
        checks.append(check)
    text, status = verdict(checks, backends)
    print(text)
    return status


def _checks(
    patch: Patch,
    target: Target,
    backends: Sequence[str],
    timeout: float,
    find_gpus: Callable[[float], GpuFacts],
) -> Iterator[Check]:
    release = known_release(target)
    yield check_release(release)
    found = inspect(patch, target)
    yield check_patch(found)
    yield check_import(target)
    yield from check_versions(target, release, backends)
    _progress("asking torch for the GPUs")
    facts = find_gpus(timeout)
    yield from check_gpus(facts)
    for backend in backends:
        yield check_backend(backend, found.state, facts, os.environ)
    yield from check_kernels(target, found.state, facts, timeout)


def verdict(checks: Sequence[Check], backends: Sequence[str]) -> tuple[str, int]:
    """The closing line and the exit status."""
    failed, unknown = (
        ", ".join(dict.fromkeys(c.subject for c in checks if c.mark == mark))
        for mark in (FAIL, UNKNOWN)
    )
    if failed:
        text = f"verdict: not ready, see FAIL above ({failed})"
        if unknown:
            text += f"; not checked: {unknown}"
        return text, EXIT_NOT_READY
    if unknown:
        text = f"verdict: cannot say, nothing failed but not checked: {unknown}"
        return text, EXIT_NOT_READY
    text = (
        f"verdict: ready, a server started now with --attention-backend "
        f"{' or '.join(backends)} and --kv-cache-dtype fp8_e4m3 uses the patch"
    )
    return text, EXIT_READY


def installed_package() -> Path | None:
    """The folder of the `sglang` that this Python would import, not imported."""
    try:
        spec = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).resolve().parent


def _target_or_installed(given: str) -> str:
    if given != _INSTALLED:
        return given
    package = installed_package()
    if package is None:
        raise argparse.ArgumentTypeError(
            f"{sys.executable} has no sglang package; use the Python that runs the "
            "server, or give --sglang a checkout or a package folder"
        )
    # Of a checkout the root, which has the tags that give its version.
    checkout = package.parent.name == "python" and _pyproject(package).is_file()
    return str(package.parent.parent if checkout else package)


def known_release(target: Target) -> str:
    """The target's version; of the one that is installed, metadata may know it."""
    if target.version != "unknown":
        return target.version
    if installed_package() == target.root / target.package:
        return _version_of("sglang") or "unknown"
    return "unknown"


def check_release(release: str) -> Check:
    accepted = " and ".join(RELEASES)
    # `git describe` says X-N-gCOMMIT of N own commits on X.
    if re.sub(r"-\d+-g[0-9a-f]+$", "", release.partition("+")[0]) in RELEASES:
        return Check(OK, "SGLang", f"{release}, which the patch is for")
    if release == "unknown" or ".dev" in release:
        text = f"version {release}; the patch is for {accepted}"
        return Check(UNKNOWN, "SGLang", text)
    text = f"{release}, but the patch is for {accepted}: install one of these"
    return Check(FAIL, "SGLang", text)


def check_patch(found: Inspection) -> Check:
    command = f"--sglang {found.target.root}"
    if found.state is State.APPLIED:
        return Check(OK, "patch", f"applied, {len(found.files)} files")
    if found.state is State.ORIGINAL:
        text = f"not applied: python3 -m prefill_patch apply {command}"
        return Check(FAIL, "patch", text)
    more = len(found.problems) - 1
    text = f"{found.state.value}: {found.problems[0]}" + (
        f", and {more} more" if more else ""
    )
    if found.state is State.ALTERED:
        text += f": restore SGLang's files, then apply; see status {command}"
    return Check(FAIL, "patch", text)


def check_import(target: Target) -> Check:
    package = target.root / target.package
    found = installed_package()
    if found == package:
        return Check(OK, "import", "this Python imports sglang from there")
    text = (
        f"this Python imports sglang from {found}, not from {package}"
        if found
        else f"{sys.executable} has no sglang package"
    )
    text += ": use the server's Python, or check the sglang that it imports"
    return Check(FAIL, "import", text)


def check_versions(
    target: Target, release: str, backends: Sequence[str]
) -> Iterator[Check]:
    """Installed versions against what SGLang, and for Triton torch, asks for."""
    pins = requirements(target, release)
    torch = _version_of("torch")
    # SGLang leaves the choice of Triton to torch.
    of_torch = _specifiers(importlib.metadata.requires("torch") if torch else None)
    for name, module in PACKAGES.items():
        if name == "tokenspeed-mla" and "tokenspeed_mla" not in backends:
            continue
        who, specifier = f"SGLang {release}", (pins or {}).get(name)
        if specifier is None and name in of_torch:
            who, specifier = f"torch {torch}", of_torch[name]
        yield _check_version(name, module, who, specifier, pins is not None)


def _check_version(
    name: str, module: str, who: str, specifier: str | None, pins_known: bool
) -> Check:
    version = _version_of(name)
    wanted = f"{name}{specifier or ''}"
    if version is None:
        if _importable(module):
            text = f"{module} imports, but without metadata that says its version"
            return Check(UNKNOWN, name, text)
        return Check(FAIL, name, f"not installed: pip install '{wanted}'")
    if specifier is None:
        if pins_known:
            return Check(OK, name, f"{version}, no version is asked for")
        text = f"{version}, not compared: no requirements of {who} are at hand"
        return Check(UNKNOWN, name, text)
    satisfied = satisfies(version, specifier)
    if satisfied is None:
        text = f"{version}, which cannot be compared with {specifier} of {who}"
        return Check(UNKNOWN, name, text)
    if satisfied:
        return Check(OK, name, f"{version}, as {who} asks for ({specifier})")
    text = f"{version}, but {who} asks for {specifier}: install '{wanted}'"
    return Check(FAIL, name, text)


def requirements(target: Target, release: str) -> dict[str, str] | None:
    """Version specifiers by distribution that SGLang asks for, None if unknown.

    From the metadata installed beside the package, a checkout's pyproject.toml, or an
    installed SGLang of the same version.
    """
    package = target.root / target.package
    for folder in sorted(package.parent.glob("sglang-*.dist-info")):
        found = importlib.metadata.PathDistribution(folder).requires
        if found:
            return _specifiers(found)
    try:
        text = _pyproject(package).read_text(encoding="utf-8")
        # A Python literal, comments included; tomllib is not there before 3.11.
        listed = re.search(r"^dependencies\s*=\s*(\[.*?^\])", text, re.M | re.S)
        if listed:
            return _specifiers(ast.literal_eval(listed[1]))
    except (OSError, SyntaxError, ValueError):
        pass
    if _version_of("sglang") == release:
        return _specifiers(importlib.metadata.requires("sglang")) or None
    return None


def _pyproject(package: Path) -> Path:
    return package.parent / "pyproject.toml"


def _specifiers(requirements: Sequence[str] | None) -> dict[str, str]:
    """Requirements by normalized name, those of extras left out."""
    found: dict[str, str] = {}
    for requirement in requirements or ():
        wanted, _, marker = requirement.partition(";")
        parts = re.fullmatch(
            r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^()]*?)\)?\s*", wanted
        )
        if parts and "extra" not in marker:
            name = re.sub(r"[-_.]+", "-", parts[1]).lower()
            if parts[2].strip():
                found.setdefault(name, parts[2].strip())
    return found


def satisfies(version: str, specifier: str) -> bool | None:
    """Whether a version meets all comparisons of a specifier; None: not simple ones."""
    results = []
    for part in specifier.split(","):
        comparison = re.fullmatch(r"\s*(==|!=|>=|<=|>|<)\s*(\S+)\s*", part)
        have = _ordered(version)
        want = _ordered(comparison[2]) if comparison else None
        if have is None or want is None:
            return None
        results.append(
            {
                "==": have == want,
                "!=": have != want,
                ">=": have >= want,
                "<=": have <= want,
                ">": have > want,
                "<": have < want,
            }[comparison[1]]
        )
    return all(results)


def _ordered(version: str) -> tuple | None:
    """A version's place in PEP 440's order, its local part (+cu130) left out."""
    parts = re.fullmatch(
        r"v?(\d+(?:\.\d+)*)(?:(a|b|rc)(\d+))?(?:\.post(\d+))?(?:\.dev(\d+))?(?:\+.*)?",
        version,
    )
    if not parts:
        return None
    release, pre, pre_number, post, dev = parts.groups()
    numbers = [int(number) for number in release.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    final = "" if dev and not post else "z"
    return (
        tuple(numbers),
        (pre, int(pre_number)) if pre else (final, 0),
        int(post) if post else -1,
        int(dev) if dev else float("inf"),
    )


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def ask_gpus(timeout: float) -> GpuFacts:
    """The GPUs through torch in another process, else through nvidia-smi."""
    listed, driver = _nvidia_smi()
    outcome = _run([sys.executable, str(_SELFTEST), "gpus"], timeout)
    try:
        said = json.loads(outcome.out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        problem = outcome.failure
        return GpuFacts(gpus=listed, driver=driver, problem=problem)
    gpus = tuple(
        Gpu(name, tuple(capability), memory)
        for name, capability, memory in said["gpus"]
    )
    return GpuFacts(
        gpus=gpus or listed,
        seen_by_torch=bool(gpus),
        torch=said["torch"],
        cuda=said["cuda"],
        hip=bool(said["hip"]),
        driver=driver,
        problem=said["problem"],
    )


def _nvidia_smi() -> tuple[tuple[Gpu, ...], str | None]:
    """What nvidia-smi lists, and the driver's version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    query = "--query-gpu=driver_version,compute_cap,memory.total,name"
    outcome = _run([program, query, "--format=csv,noheader,nounits"], 20)
    gpus, driver = [], None
    for line in outcome.out.splitlines() if outcome.status == 0 else ():
        parts = re.fullmatch(r"([\d.]+), (\d+)\.(\d+), ([^,]*), (.*)", line.strip())
        if parts:
            driver, major, minor, mebibytes, name = parts.groups()
            memory = int(mebibytes) * 2**20 if mebibytes.isdigit() else None
            gpus.append(Gpu(name, (int(major), int(minor)), memory))
    return tuple(gpus), driver


def check_gpus(facts: GpuFacts) -> Iterator[Check]:
    who = f"torch {facts.torch}"
    if facts.torch is None and _importable("torch"):
        text = f"cannot be imported: {facts.problem}; reinstall it"
        yield Check(FAIL, "torch import", text)
    if facts.hip:
        text = f"{who} is built for AMD GPUs, where SGLang lacks these backends"
        yield Check(FAIL, "GPU", text)
        return
    if not facts.gpus:
        text = f"none here, {facts.problem or 'none visible'}"
        yield Check(UNKNOWN, "GPU", f"{text}: run this on the host of the server")
        return
    if facts.torch and not facts.seen_by_torch:
        yield Check(
            FAIL,
            "torch and GPU",
            f"nvidia-smi lists {len(facts.gpus)}, but {who} (CUDA {facts.cuda}) sees "
            f"none, {facts.problem or 'none visible'}: check CUDA_VISIBLE_DEVICES, and "
            f"that driver {facts.driver} is new enough for that CUDA",
        )
    elif facts.seen_by_torch and not _cuda_suffices(facts):
        yield Check(
            FAIL,
            "torch and GPU",
            f"{who} is built for CUDA {facts.cuda}; SGLang has these backends from "
            f"CUDA {_dotted(BLACKWELL_CUDA)}: install torch for that",
        )
    for gpu in dict.fromkeys(facts.gpus):
        yield _check_gpu(gpu, facts.gpus.count(gpu), facts.driver)


def _check_gpu(gpu: Gpu, count: int, driver: str | None) -> Check:
    text = f"{count} x {gpu.name}, compute capability {_dotted(gpu.capability)}"
    if gpu.memory:
        text += f", {gpu.memory / 2**30:.0f} GiB"
    text += f", driver {driver or 'unknown'}"
    needs = {
        f"FP8 conversion ({_dotted(FP8_CAPABILITY)})": gpu.capability >= FP8_CAPABILITY,
        f"PDL ({_dotted(PDL_CAPABILITY)})": gpu.capability >= PDL_CAPABILITY,
        "MLA attention kernels (10.0, 10.3)": gpu.capability[0] == ATTENTION_MAJOR,
    }
    has = ", ".join(name for name, there in needs.items() if there)
    lacks = ", ".join(name for name, there in needs.items() if not there)
    if not lacks:
        return Check(OK, "GPU", f"{text}; has {has}")
    text += f"; lacks {lacks}: run on B200, GB200, B300 or GB300"
    return Check(FAIL, "GPU", text + (f" (it has {has})" if has else ""))


def check_backend(
    backend: str, state: State, facts: GpuFacts, environ: Mapping[str, str]
) -> Check:
    """Whether the backend takes the hook, as far as that holds for a whole process."""
    reasons = []
    if state is not State.APPLIED:
        reasons.append(f"the patch is {state.value}")
    producer = environ.get(SWITCH, FUSED).lower()
    if producer == OFF:
        reasons.append(f"{SWITCH}=off turns it off (unset it)")
    elif producer not in (FUSED, COMPOSED):
        reasons.append(
            f"{SWITCH} must be {FUSED}, {COMPOSED} or {OFF}, got "
            f"{environ[SWITCH]!r}: a server would not start"
        )
    flag = "SGLANG_IS_FLASHINFER_AVAILABLE"
    if not _importable("flashinfer"):
        reasons.append("FlashInfer is not installed")
    elif environ.get(flag, "true").lower() not in ("true", "1"):
        reasons.append(f"{flag}={environ[flag]} turns FlashInfer off (unset it)")
    if backend == "tokenspeed_mla" and not _importable("tokenspeed_mla"):
        reasons.append("tokenspeed_mla is not installed")
    if facts.hip:
        reasons.append("torch is built for AMD GPUs")
    elif facts.seen_by_torch and not _cuda_suffices(facts):
        reasons.append(f"torch is built for CUDA {facts.cuda}")
    others = {g.capability for g in facts.gpus if g.capability[0] != ATTENTION_MAJOR}
    if others:
        found = ", ".join(map(_dotted, sorted(others)))
        reasons.append(f"its kernels need compute capability 10.x, not {found}")

    needs = f"--attention-backend {backend} --kv-cache-dtype fp8_e4m3"
    if reasons:
        return Check(FAIL, backend, f"no hook: {'; '.join(reasons)}")
    if not facts.seen_by_torch:
        text = f"needs {needs} and a GPU that torch sees; nothing else is in the way"
        return Check(UNKNOWN, backend, text)
    text = (
        f"takes the hook ({producer} producer) with {needs}; other KV caches decline "
        "it, a page size other than 32 or 64 becomes 64"
    )
    if environ.get(CHECK_SWITCH, "").lower() in ("true", "1", "yes", "y"):
        text += f". {CHECK_SWITCH} is on: slow, for debugging only"
    return Check(OK, backend, text)


def check_kernels(
    target: Target, state: State, facts: GpuFacts, timeout: float
) -> Iterator[Check]:
    """Run the patched kernels on the GPU, unless that is bound to fail."""
    missing = None
    if state is not State.APPLIED:
        missing = f"the patch is {state.value}"
    elif facts.torch is None:
        missing = "torch cannot be imported"
    elif not facts.seen_by_torch:
        missing = "torch sees no GPU"
    elif facts.hip or facts.gpus[0].capability < FP8_CAPABILITY:
        missing = "the GPU has no FP8 conversion"
    if missing:
        yield Check(UNKNOWN, "self-test", f"not run, {missing}")
        return
    _progress("importing the patched SGLang and running its kernels on the GPU")
    tree = (target.root / target.package).parent
    command = [sys.executable, str(_SELFTEST), "kernels", str(tree)]
    yield from judge_selftest(_run(command, timeout))


def judge_selftest(outcome: Outcome) -> Iterator[Check]:
    """What the self-test's process said, and that it came to its end."""
    checks = [
        check for line in outcome.out.splitlines() if (check := Check.parse(line))
    ]
    for check in checks:
        yield check._replace(subject=f"self-test, {check.subject}")
    passed = outcome.status == 0 and checks
    told = outcome.status == 1 and any(check.mark != OK for check in checks)
    if not passed and not told:
        text = outcome.failure + (f" after {checks[-1].subject}" if checks else "")
        if outcome.status is None:
            text += "; reading SGLang from a cold disk is slow: run it again, or give "
            text += "--timeout more"
        yield Check(FAIL, "self-test", text)


def _cuda_suffices(facts: GpuFacts) -> bool:
    found = re.match(r"(\d+)\.(\d+)", facts.cuda or "")
    return bool(found) and (int(found[1]), int(found[2])) >= BLACKWELL_CUDA


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _run(command: Sequence[str], timeout: float) -> Outcome:
    """Run a command to its end or to the timeout, with everything it has started.

    Its output goes to files: a process stuck in the driver survives being killed, and
    a pipe that it holds open would be waited for.
    """
    with tempfile.TemporaryDirectory(
        prefix="prefill-patch-", ignore_cleanup_errors=True
    ) as folder:
        environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        environ.setdefault("TRITON_CACHE_DIR", os.path.join(folder, "triton"))
        out, err = Path(folder, "out"), Path(folder, "err")
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out_file,
                    stderr=err_file,
                    env=environ,
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome(127, "", f"{command[0]}: {error.strerror}", timeout)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    try:
                        process.wait(5)
                    except subprocess.TimeoutExpired:
                        pass
        out, err = (path.read_text(errors="replace") for path in (out, err))
        return Outcome(status, out, err, timeout)
