"""Whether a server started now, by this Python on this host, would use the patch.

Nothing of SGLang or torch is imported here: what may crash or hang runs in a process of
its own (`selftest.py`), and everything else is read from files and metadata.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefill_patch import plugin
from prefill_patch.patch import Inspection, State, inspect
from prefill_patch.releases import BACKENDS, FA3, RELEASES, stated
from prefill_patch.target import Target, installed_package, root_of

if TYPE_CHECKING:
    from packaging.requirements import Requirement

SWITCH, PRODUCERS, OFF = "SGLANG_MLA_FP8_PREFILL", ("fused", "composed"), "off"
GEMM_SWITCH, GEMM_SETTINGS = "SGLANG_MLA_FP8_PREFILL_GEMM", ("auto", "on", "off")
LSE_SWITCH, LSE_AUTO, LSE_BASES = "SGLANG_MLA_FP8_PREFILL_LSE", "auto", ("2", "e")

# The distributions that the prefill path runs on.
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang-kernel", "tokenspeed-mla")

_WITHOUT_GRAPHS = ", without prefill CUDA graphs unless a flag asks for them"

OK, UNKNOWN, FAIL = "ok", "--", "FAIL"
# How the self-test ends; a Python that fails ends with 1 or 2.
SELFTEST_STATUS = {OK: 0, UNKNOWN: 3, FAIL: 4}

_INSTALLED = "the installed sglang"
_ROOT = Path(__file__).resolve().parents[1]


class Check(NamedTuple):
    """The outcome of one check: OK, UNKNOWN (could not be checked here) or FAIL."""

    mark: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<4} {self.subject}: {self.text}"


def print_all(checks: Iterable[Check]) -> str:
    """Print checks as they come; the worst of their marks."""
    marks = {OK}
    for check in checks:
        print(check, flush=True)
        marks.add(check.mark)
    return next(mark for mark in (FAIL, UNKNOWN, OK) if mark in marks)


def add_target_option(parser: argparse.ArgumentParser) -> None:
    """Unlike the other commands these know a TARGET by themselves: their --sglang takes
    the place of the required one."""
    replaced = parser.add_argument_group("target", conflict_handler="resolve")
    replaced.add_argument(
        "--sglang",
        metavar="TARGET",
        default=_INSTALLED,
        type=_target_or_installed,
        help="what the other commands take (default: %(default)s)",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add_target_option(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help=f"check for this attention backend only, {FA3} on Hopper (default: for "
        "all that need SM100)",
    )
    parser.add_argument(
        "--no-gpu",
        action="store_true",
        help="let the checks that need a GPU wait, as where an image is built",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=300,
        help="stop a self-test that takes longer (default: %(default)s)",
    )


def run(args: argparse.Namespace, source: Path, target: Target) -> int:
    """Print a line a check and the verdict; 0 only if every check is OK."""
    print(f"checking {target.root / target.package} for {sys.executable}", flush=True)
    found = inspect(source, target)
    backends = [args.backend] if args.backend else list(found.release.backends)
    worst = print_all(_checks(found, backends, args.timeout, args.no_gpu))
    if worst == FAIL:
        print("verdict: not ready, see FAIL above")
    elif worst == UNKNOWN:
        print("verdict: cannot say, nothing failed but not all was checked, see --")
    else:
        print(
            "verdict: ready, a server started now with --attention-backend "
            f"{' or '.join(backends)} and --kv-cache-dtype fp8_e4m3 uses the patch"
            + (_WITHOUT_GRAPHS if backends != [FA3] else "")
            + ("; run this on its host too, with a GPU" if args.no_gpu else "")
        )
    return 0 if worst == OK else 1


def _checks(
    found: Inspection, backends: Sequence[str], timeout: float, no_gpu: bool
) -> Iterator[Check]:
    yield check_release(found)
    yield from check_backends(found, backends)
    applied = check_patch(found, plugin.serves(found.target))
    yield applied
    imported = check_import(found.target)
    yield imported
    yield check_switch(os.environ)
    yield check_gemm_switch(os.environ)
    if "trtllm_mla" in backends:
        yield check_lse(os.environ, flashinfer_lse_base())
    yield from check_versions(found.target, backends)
    patched = applied.mark == imported.mark == OK
    tested = run_selftest(selftest_command(backends, patched), timeout)
    if no_gpu and tested.mark == UNKNOWN:
        tested = tested._replace(mark=OK, text="passed, but for what needs a GPU")
    yield tested


def _target_or_installed(given: str) -> str:
    if given != _INSTALLED:
        return given
    package = installed_package()
    if package is None:
        raise argparse.ArgumentTypeError(
            f"{sys.executable} has no sglang package; use the Python that runs the "
            "server, or give --sglang a checkout or a package folder"
        )
    return str(root_of(package))


def check_release(found: Inspection) -> Check:
    version, release = found.target.version, found.release.version
    if stated(version) == release:
        return Check(OK, "SGLang", f"{version}, which the patch is for")
    oldest, newest = RELEASES[0].version, RELEASES[-1].version
    text = f"version {version}, taken for {release}; the patch is for "
    text += f"{oldest} to {newest}"
    return Check(UNKNOWN, "SGLang", text)


def check_backends(found: Inspection, backends: Sequence[str]) -> Iterator[Check]:
    for backend in backends:
        if backend not in (*found.release.backends, FA3):
            others = " or ".join(found.release.backends)
            text = f"{backend} has no hook in {found.release.version}: use {others}"
            yield Check(FAIL, "backend", text)


def check_patch(found: Inspection, by_plugin: bool) -> Check:
    if by_plugin and found.state in (State.APPLIED, State.PARTLY):
        return Check(FAIL, "patch", plugin.TWICE)
    if by_plugin and found.state is State.ORIGINAL:
        return Check(OK, "patch", "applied by the plug-in as SGLang is imported")
    if found.state is State.APPLIED:
        return Check(OK, "patch", f"applied, {len(found.files)} files")
    if found.state is State.BLOCKED:
        text = f"{found.state.value}: {found.problems[0]}"
    else:
        command = f"python3 -m prefill_patch apply --sglang {found.target.root}"
        does = "applies" if found.state is State.ORIGINAL else "finishes"
        text = f"{found.state.value}, `{command}` {does} it"
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


def check_switch(environ: Mapping[str, str]) -> Check:
    value = environ.get(SWITCH, PRODUCERS[0])
    if value.lower() in PRODUCERS:
        return Check(OK, "switch", f"{SWITCH} is {value.lower()}")
    if value.lower() == OFF:
        return Check(FAIL, "switch", f"{SWITCH}=off turns the patch off: unset it")
    choices = f"{', '.join(PRODUCERS)} or {OFF}"
    text = f"{SWITCH} must be {choices}, got {value!r}: a server would not start"
    return Check(FAIL, "switch", text)


def check_gemm_switch(environ: Mapping[str, str]) -> Check:
    value = environ.get(GEMM_SWITCH, GEMM_SETTINGS[0])
    if value.lower() in GEMM_SETTINGS:
        return Check(OK, "kv_b_proj", f"{GEMM_SWITCH} is {value.lower()}")
    text = f"{GEMM_SWITCH} must be {', '.join(GEMM_SETTINGS)}, got {value!r}"
    return Check(FAIL, "kv_b_proj", f"{text}: a server would not start")


def flashinfer_lse_base() -> str | None:
    """The base of trtllm-gen's log-sum-exps in the source that the FlashInfer of this
    Python compiles; None where it cannot be told."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        return None
    include = Path(spec.origin).with_name("data") / "include"
    source = include / "flashinfer/trtllm/fmha/lse.cuh"
    return "2" if source.is_file() and "log2e" in source.read_text() else None


def check_lse(environ: Mapping[str, str], in_source: str | None) -> Check:
    value = environ.get(LSE_SWITCH, LSE_AUTO)
    setting = value.lower()
    if setting not in (LSE_AUTO, *LSE_BASES):
        choices = f"{LSE_AUTO}, {' or '.join(LSE_BASES)}"
        text = f"{LSE_SWITCH} must be {choices}, got {value!r}"
        return Check(FAIL, "log-sum-exp", f"{text}: a server would not start")
    text = f"{LSE_SWITCH} is {setting}; FlashInfer's lse.cuh writes "
    text += "a base that is not known" if in_source is None else f"base {in_source}"
    if setting == LSE_AUTO or in_source in (None, setting):
        return Check(OK, "log-sum-exp", text)
    text += ": answers behind a cached prefix would be wrong, unset it"
    return Check(FAIL, "log-sum-exp", text)


def check_versions(target: Target, backends: Sequence[str]) -> Iterator[Check]:
    """Installed versions against what SGLang and, for Triton, torch ask for."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        yield Check(UNKNOWN, "versions", "not compared: `packaging` is not installed")
        return
    path = [str((target.root / target.package).parent), *sys.path]
    for name in ("sglang", "torch"):
        owner = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        if owner is None:
            text = f"no metadata of {name} says what it needs"
            yield Check(UNKNOWN, "versions", text)
            continue
        for wanted in map(Requirement, owner.requires or ()):
            package = canonicalize_name(wanted.name)
            if package not in PACKAGES:
                continue
            if package == "tokenspeed-mla" and "tokenspeed_mla" not in backends:
                continue
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                yield check_version(f"{name} {owner.version}", package, wanted)


def check_version(owner: str, package: str, wanted: Requirement) -> Check:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if not version:
        return Check(FAIL, package, f"not installed: pip install '{wanted}'")
    if wanted.specifier.contains(version, prereleases=True):
        return Check(OK, package, f"{version}, {owner} asks for '{wanted}'")
    text = f"{version}, but {owner} asks for '{wanted}': install that"
    return Check(FAIL, package, text)


def selftest_command(backends: Sequence[str], patched: bool) -> list[str]:
    # -B: nothing is written into the target.
    options = ["-B", "-W", "ignore", "-X", "faulthandler"]
    module = ["-m", "prefill_patch.selftest", *(["--patched"] if patched else [])]
    return [sys.executable, *options, *module, *backends]


def run_selftest(command: Sequence[str], timeout: float) -> Check:
    """Run a process that prints checks of its own, and say how it ended."""
    paths = (os.environ.get("PYTHONPATH"), str(_ROOT))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,
    )
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        text = f"stopped, not finished after {timeout:g} s: where the disk is cold, "
        return Check(FAIL, "self-test", text + "run it again, or give --timeout more")
    finally:
        # Not waited for: a process that hangs in the driver survives being killed.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    if status < 0:
        return Check(FAIL, "self-test", f"crashed: {signal.strsignal(-status)}")
    for mark, ended in SELFTEST_STATUS.items():
        if status == ended:
            done = {OK: "passed", UNKNOWN: "not complete, see --", FAIL: "failed"}
            return Check(mark, "self-test", done[mark])
    text = f"ended with status {status}, its error is printed above"
    return Check(FAIL, "self-test", text)
