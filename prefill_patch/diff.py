"""Unified diffs in git's format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

_CONTEXT = 3
_NO_EOL = b"\n\\ No newline at end of file\n"


@dataclass(frozen=True)
class FileDiff:
    """What happens to one file; `text` is its part of the diff."""

    path: str
    new: bool
    added: int
    removed: int
    text: bytes


def file_diff(path: str, old: bytes | None, new: bytes) -> FileDiff:
    """The change of a file from `old`, or from nothing, to `new`."""
    head = [f"diff --git a/{path} b/{path}\n"]
    if old is None:
        head.append("new file mode 100644\n")
    head.append(f"index {_blob(old)}..{_blob(new)}\n")
    lines = list(_hunks(_lines(old or b""), _lines(new)))
    if lines:
        head.append("--- /dev/null\n" if old is None else f"--- a/{path}\n")
        head.append(f"+++ b/{path}\n")
    return FileDiff(
        path=path,
        new=old is None,
        added=sum(line.startswith(b"+") for line in lines),
        removed=sum(line.startswith(b"-") for line in lines),
        text="".join(head).encode() + b"".join(lines),
    )


def _hunks(old: list[bytes], new: list[bytes]) -> Iterator[bytes]:
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        _, old_from, _, new_from, _ = group[0]
        _, _, old_to, _, new_to = group[-1]
        yield (
            f"@@ -{_range(old_from, old_to)} +{_range(new_from, new_to)} @@\n".encode()
        )
        for kind, i1, i2, j1, j2 in group:
            if kind == "equal":
                yield from (_marked(b" ", line) for line in old[i1:i2])
            else:
                yield from (_marked(b"-", line) for line in old[i1:i2])
                yield from (_marked(b"+", line) for line in new[j1:j2])


def _lines(data: bytes) -> list[bytes]:
    # Only \n ends a line for git, unlike for bytes.splitlines.
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _marked(mark: bytes, line: bytes) -> bytes:
    return mark + line + (b"" if line.endswith(b"\n") else _NO_EOL)


def _range(start: int, stop: int) -> str:
    length = stop - start
    first = start + 1 if length else start
    return f"{first}" if length == 1 else f"{first},{length}"


def _blob(data: bytes | None) -> str:
    """git's name for the contents of a file."""
    if data is None:
        return "0" * 40
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
