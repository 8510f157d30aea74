"""A trial, step by step: checks, a layer of both sides, the user's server, a verdict."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import patched_sglang
from trial import page
from trial.layer_cases import CASES, PARTS, TIMES
from trial.sides import Side, SideFailed
from trial.verdict import EXIT, GEMM, UNPATCHED, decide

from prefill_patch import doctor, plugin
from prefill_patch.doctor import FAIL
from prefill_patch.errors import PatchError
from prefill_patch.patch import Inspection

ROUNDS = 9
AUTO = "auto"
# Of a GPU that something else is on.
OUT_OF_MEMORY = "OutOfMemoryError"


def run(
    found: Inspection,
    backend: str,
    heads: int,
    json_file: Optional[str],
    server_arguments: Optional[Sequence[str]],
) -> int:
    """Print progress and the page, write the JSON file; the exit status.

    `server_arguments` None starts no server.

    Raises:
        PatchError: it could not be tried.
    """
    if server_arguments is not None:
        check_installed(found)
    try:
        if json_file is not None:
            Path(json_file).touch()
    except OSError as error:
        raise PatchError(f"{json_file}: {error.strerror}") from None
    with ending_on_signals(), tempfile.TemporaryDirectory() as scratch:
        trial = Trial(found, backend, heads, Path(scratch))
        try:
            trial.check()
            trial.try_layer()
            if server_arguments is not None:
                trial.try_server(server_arguments)
        except BaseException as error:
            trial.results["incomplete"].append(f"ended by {type(error).__name__}")
            raise
        finally:
            trial.finish(json_file)
    return EXIT[trial.results["verdict"]["kind"]]


def check_installed(found: Inspection) -> None:
    """A server with the hook takes an SGLang that has it."""
    patch = doctor.check_patch(found, plugin.serves(found.target))
    for check in (patch, doctor.check_import(found.target)):
        if check.mark == FAIL:
            raise PatchError(f"--server: {check.subject}: {check.text}")


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """What ends this process ends what it has started first."""

    def leave(signum: int, frame: Any) -> None:
        sys.exit(128 + signum)

    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, leave) for signum in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, before):
            signal.signal(signum, handler)


class Trial:
    """One run. `results` is the JSON: always what is known so far.

    `sizes` are a smaller layer's (`layer.Layer`), for a machine without a GPU.
    """

    def __init__(
        self, found: Inspection, backend: str, heads: int, folder: Path, **sizes: Any
    ):
        self.found, self.folder, self.sizes = found, folder, sizes
        self.started = time.monotonic()
        patch = doctor.check_patch(found, plugin.serves(found.target))
        self.results: dict[str, Any] = {
            "setup": {
                "sglang": found.target.version,
                "backend": backend,
                "heads": heads,
                "patch": f"installed SGLang: {patch.text}",
                "real": False,
                "kernel": "the attention kernel",
            },
            "versions": [],
            "checks": [],
            "accuracy": [],
            "times": [],
            "incomplete": [],
        }
        self.backend = backend
        with mock.patch.dict(os.environ):  # of which a plug-in's server may depend
            self.trees = patched_sglang.lay_out(str(found.target.root))
        self.sides: dict[str, Side] = {}

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {line}", flush=True)

    def check(self) -> None:
        """Doctor's checks of the versions, and its self-test on the patched copy."""
        self.say(f"checks, for {self.backend}")
        trtllm = self.backend == "trtllm_mla"
        lse = doctor.check_lse(os.environ, doctor.flashinfer_lse_base())
        checks = [
            doctor.check_release(self.found),
            *doctor.check_backends(self.found, [self.backend]),
            *([lse] if trtllm else []),
        ]
        versions = [*doctor.check_versions(self.found.target, [self.backend])]
        with Side(self.trees.patched, self.folder / "selftest.log") as side:
            try:
                tested = side.ask("selftest", backend=self.backend)
                checks += [doctor.Check(*check) for check in tested]
            except SideFailed as error:
                checks.append(doctor.Check(FAIL, "self-test", str(error)))
        for check in (*versions, *checks):
            print(check, flush=True)
        self.results["versions"] = [list(check) for check in versions]
        self.results["checks"] = [list(check) for check in checks]

    def try_layer(self) -> None:
        """A layer of both sides: against float64, then in time."""
        with ExitStack() as stack:
            for name, site in self.trees._asdict().items():
                log = self.folder / f"{name}.log"
                self.sides[name] = stack.enter_context(Side(site, log))
            active = self.start_layers()
            for case in CASES:
                self.say(f"against float64: {case}")
                for setting in active:
                    row = {"case": case, "setting": setting}
                    try:
                        row |= self.ask(setting, "compare", case=case)
                    except SideFailed as error:
                        if OUT_OF_MEMORY in str(error):
                            what = f"{case}, {setting}: {error}"
                            self.results["incomplete"].append(what)
                            continue
                        row["error"] = str(error)
                    self.results["accuracy"].append(row)
            for tokens, prefix in TIMES:
                self.say(f"times: {tokens} tokens behind {prefix}")
                row = {"tokens": tokens, "prefix": prefix}
                self.results["times"].append(row | {"us": self.times(active, **row)})

    def start_layers(self) -> list[str]:
        """The settings that there are; the results' setup says more of them."""
        self.say("building a layer, unpatched and patched")
        setup, active = self.results["setup"], []
        layer = dict(backend=self.backend, heads=setup["heads"], **self.sizes)
        try:
            for side in self.sides.values():
                side.ask("layer", **layer)
            about = {
                setting: self.ask(setting, "describe")
                for setting in (UNPATCHED, *GEMM, AUTO)
            }
        except SideFailed as error:
            self.results["incomplete"].append(f"a layer: {error}")
            return []
        for name in ("machine", "kernel", "real", "own_hook"):
            setup[name] = about[UNPATCHED][name]
        setup["default"] = "GEMM off" if about[AUTO]["no_gemm"] else "GEMM on"
        for setting, one in about.items():
            if one["declined"]:
                self.results["incomplete"].append(f"{setting}: {one['declined']}")
            elif setting != AUTO and not (setting == "GEMM on" and one["no_gemm"]):
                active.append(setting)
        return active

    def ask(self, setting: str, do: str, **arguments: Any) -> Any:
        side = "unpatched" if setting == UNPATCHED else "patched"
        return self.sides[side].ask(do, setting=setting, **arguments)

    def times(
        self, active: Sequence[str], tokens: int, prefix: int
    ) -> dict[str, dict[str, list[float]]]:
        """Microseconds of a layer by setting and part, measured in turn."""
        us: dict[str, dict[str, list[float]]] = {}
        try:
            for setting in active:
                self.ask(setting, "load", tokens=tokens, prefix=prefix)
            for i in range(ROUNDS):
                for setting in active[:: -1 if i % 2 else 1]:
                    one = self.ask(setting, "time")
                    parts = us.setdefault(setting, {})
                    for part in (*PARTS, "launches"):
                        parts.setdefault(part, []).append(one[part])
            for side in self.sides.values():
                side.ask("unload")
        except SideFailed as error:
            what = f"{tokens} tokens behind {prefix}"
            self.results["incomplete"].append(f"times, {what}: {error}")
            return {}
        return us

    def try_server(self, arguments: Sequence[str]) -> None:
        """The user's server with the hook off and on."""
        from trial import server  # which takes seconds to import

        def make(side: str, env: Any) -> server.UserServer:
            return server.UserServer(self.folder / side, arguments, env)

        try:
            self.results["server"] = server.run(make, self.say)
        except RuntimeError as error:
            self.results["incomplete"].append(str(error))

    def finish(self, json_file: Optional[str]) -> None:
        """The verdict, the page and the file."""
        self.results["verdict"] = decide(self.results)._asdict()
        self.results["seconds"] = round(time.monotonic() - self.started)
        if json_file is not None:
            Path(json_file).write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"\n{page.text(self.results)}", flush=True)
