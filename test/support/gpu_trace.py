"""The GPU's work in a trace of torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Event = dict[str, Any]

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def launched(events: Iterable[Event]) -> Iterator[tuple[Event, Event]]:
    """Each kernel, copy and fill, behind the host's call that launched it."""
    complete = [e for e in events if e.get("ph") == "X" and "cat" in e]
    calls = {
        e["args"]["correlation"]: e
        for e in complete
        if e["cat"] in ("cuda_runtime", "cuda_driver")
        and "correlation" in e.get("args", {})
    }
    for e in complete:
        call = calls.get(e.get("args", {}).get("correlation"))
        if e["cat"] in GPU_WORK and call is not None:
            yield call, e
