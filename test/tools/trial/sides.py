"""The processes of the two sides, which live side by side and are asked in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from patched_sglang import environment

OPTIONS = ("-W", "ignore", "-X", "faulthandler")


class SideFailed(Exception):
    """A side could not answer: what it raised, or how its process ended."""


class Side:
    """A process that imports the SGLang of the folder `site`; `log` takes what it prints.

    It ends with this one, and is killed where it has not answered within `seconds`.
    """

    def __init__(self, site: Path, log: Path, seconds: float = 600):
        self.log, self.seconds = log, seconds
        with open(log, "a") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *OPTIONS, "-m", "trial.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**environment(site), "SGLANG_PLUGINS": "none"},
                text=True,
            )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the request returns.

        Raises:
            SideFailed: it raised, or the process ended or had to be killed.
        """
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            self.process.kill()

        timer = threading.Timer(self.seconds, kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            end = f"did not answer within {self.seconds:g} s"
            if not killed.is_set():
                end = f"its process ended with status {self.process.wait()}"
            printed = self.log.read_text(errors="replace").strip().splitlines()
            raise SideFailed("; ".join([end, *printed[-1:]]))
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Not waited for without end: a process that hangs in the driver survives."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:
                continue
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass
