"""Builds, applies and takes back the FP8 prefill patch for an SGLang source tree.

Only the standard library is used: the tool runs in whatever Python is at hand,
next to the SGLang that it patches and without importing it.
"""

from pathlib import Path

# Installed, the package has in itself what lies beside it here.
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE if (_HERE / "python").is_dir() else _HERE.parent

# The mirrored tree: new files as they are, edits of upstream files as `*.edit`.
SOURCE = _ROOT / "python" / "sglang"

# What a checkout gets besides, from test/ here to test/ there: tests for SGLang's CI, and
# what they import. That is outside registered/, where its runner takes every file for a
# test.
TESTS = ("registered", "mla_standin")
