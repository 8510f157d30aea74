"""Unified diffs in git's format."""

from __future__ import annotations

import difflib
import hashlib
import io
from typing import NamedTuple


class FileDiff(NamedTuple):
    """What happens to one file; `text` is its part of the diff."""

    path: str
    new: bool
    added: int
    removed: int
    text: bytes


def file_diff(path: str, old: bytes | None, new: bytes) -> FileDiff:
    """The change of a file from `old`, or from nothing, to `new`."""
    name = path.encode()
    mode = b"new file mode 100644\n" if old is None else b""
    blobs = (b"0" * 40 if old is None else _blob(old)), _blob(new)
    head = b"diff --git a/%s b/%s\n%sindex %s..%s\n" % (name, name, mode, *blobs)
    files, *lines = [
        line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"
        for line in difflib.diff_bytes(
            difflib.unified_diff,
            _lines(old or b""),
            _lines(new),
            b"/dev/null" if old is None else b"a/" + name,
            b"b/" + name,
        )
    ] or [b""]
    return FileDiff(
        path=path,
        new=old is None,
        added=sum(line.startswith(b"+") for line in lines[1:]),
        removed=sum(line.startswith(b"-") for line in lines[1:]),
        text=b"".join([head, files, *lines]),
    )


def _lines(data: bytes) -> list[bytes]:
    # Only \n ends a line for git, unlike for bytes.splitlines.
    return io.BytesIO(data).readlines()


def _blob(data: bytes) -> bytes:
    """git's name for the contents of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest().encode()
