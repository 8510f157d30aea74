"""Two copies of an SGLang below .build/: as it is, and with the patch applied."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from prefill_patch import cli
from prefill_patch.target import open_target

BUILD = Path(__file__).resolve().parent.parent / ".build"
UNPATCHED, PATCHED = (BUILD / name / "python" for name in ("unpatched", "patched"))


def lay_out(sglang: str) -> None:
    """Make UNPATCHED and PATCHED, folders for sys.path, from any target."""
    target = open_target(sglang)
    for folder, command in ((UNPATCHED, "revert"), (PATCHED, "apply")):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            target.root / target.package,
            folder / "sglang",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        status = cli.main([command, "--sglang", str(folder.parent)])
        if status != 0:
            sys.exit(status)
