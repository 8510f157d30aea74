"""Stands in for prometheus_client where it is not installed: no more of it than counters
that each process writes to a file of its own, and what sums them."""

import json
import os
from collections import Counter as Sums
from pathlib import Path
from types import SimpleNamespace

_counters = {}


class CollectorRegistry:
    pass


class Counter:
    def __init__(self, name: str, documentation: str, labelnames: list[str]):
        if name in _counters:
            raise ValueError(f"{name} is there already")
        folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
        self._file = Path(folder, f"counter_{os.getpid()}.json")
        self._labelnames = labelnames
        self._values = _counters[name] = Sums()

    def labels(self, *values) -> SimpleNamespace:
        labels = zip(self._labelnames, map(str, values), strict=True)
        key = tuple(sorted(labels))

        def inc() -> None:
            self._values[key] += 1
            samples = [
                [name, *sample]
                for name, sums in _counters.items()
                for sample in sums.items()
            ]
            self._file.write_text(json.dumps(samples))

        return SimpleNamespace(inc=inc)


class _MultiProcessCollector:
    def __init__(self, registry: CollectorRegistry, path: str):
        self._folder = Path(path)

    def collect(self) -> list[SimpleNamespace]:
        """One metric with the samples of all."""
        sums = Sums()
        for file in self._folder.glob("counter_*.json"):
            for name, labels, value in json.loads(file.read_text()):
                sums[name, tuple(map(tuple, labels))] += value
        samples = [
            SimpleNamespace(name=name, labels=dict(labels), value=float(value))
            for (name, labels), value in sums.items()
        ]
        return [SimpleNamespace(samples=samples)]


multiprocess = SimpleNamespace(MultiProcessCollector=_MultiProcessCollector)
