"""Tries the patch on an SGLang that its table of releases does not have.

    python test/tools/new_release.py 0.5.24

prints what breaks: which places are not found, then which of the table of batches fail;
or the row for prefill_patch/releases.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

from patched_sglang import run_batches

from prefill_patch import SOURCE, plugin
from prefill_patch.patch import Patch, inspect
from prefill_patch.target import open_target


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sglang", help="release number, checkout or package folder")
    target = open_target(parser.parse_args(argv).sglang)
    found = inspect(SOURCE, target)
    release = found.release
    print(f"SGLang {target.version}, taken for {release.version}")
    for problem in found.problems:
        print(f"  {problem}")
    if found.problems:
        return 1
    done = run_batches(str(target.root), "-rfE")
    print(done.stdout)
    if done.returncode != 0:
        return 1
    print(
        f"every place is found and every batch is right: add {target.version} to RELEASES "
        f"with the digest {plugin.digest(target, Patch.load(release=release))} and what "
        f"else {release.version} has there, and run `make test-releases`"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
