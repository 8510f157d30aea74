"""The machine and the versions that a page's figures come from, as one line."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess

import torch


def describe() -> str:
    """GPU, driver, CUDA, versions and date; call it where SGLang can be imported."""
    from sglang.version import __version__ as sglang

    parts = ["no GPU"]
    if torch.cuda.is_available():
        parts = [
            torch.cuda.get_device_name(),
            f"driver {_driver()}",
            f"CUDA {torch.version.cuda}",
        ]
    packages = ("torch", "triton", "flashinfer-python", "transformers")
    versions = [f"{name} {_version(name)}" for name in packages]
    return ", ".join(
        [*parts, *versions, f"sglang {sglang}", str(datetime.date.today())]
    )


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        output = ""
    return output.partition("\n")[0].strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
