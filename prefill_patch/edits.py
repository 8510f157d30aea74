"""Edits of an upstream file, placed by structure, and the way back.

An edit file holds edits, each a header in column 0 and, for some, a body of lines
indented by four or more spaces. `#` in column 0 begins a comment.

    before SCOPE :: STMT              the body before the statement and its comment
    after  SCOPE :: STMT              the body after the statement
    wrap   SCOPE :: FIRST :: LAST     the body, then FIRST to LAST indented below it
    swap   SCOPE :: STMT :: OLD -> NEW    one expression of the statement replaced
    base   CLASS :: NAME              NAME becomes the first base of the class
    unimport module :: import MODULE :: NAME    NAME dropped from the import

SCOPE is the dotted path of a class or function, or `module`. STMT is a kind (`assign`,
`call`, `return`, `if`, `for`, `while`, `with`, `import`, `assert`, `raise`, `def`,
`class`) and dotted names that the statement mentions or, with `!` in front, does not
mention; of a compound statement only the header counts. Exactly one statement of the
scope has to fit, at any depth but not in inner functions or classes; for `swap`,
exactly one occurrence of OLD in the statements that fit. `before+blank` and
`after+blank` put an empty line between the body and the statement.

Nothing about an edit is stored in the edited file. `revert` finds each edit by what it
has left there, and accepts a result only if editing it again gives the file it began
with, byte for byte, and if it is the only such result.
"""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefill_patch.errors import PatchError
from prefill_patch.source import (
    KINDS,
    Pattern,
    Source,
    Splice,
    decode,
    dotted,
    encode,
    header,
    parse,
    same,
    splice,
    validate,
)

_STEP = "    "


class Change(NamedTuple):
    """What an edit does to a text: its replacements, the lines that it indents, and
    the statement that it puts lines beside, as offsets."""

    splices: list[Splice]
    indented: range = range(0)
    beside: int = -1


@dataclass(frozen=True)
class Edit(ABC):
    scope: str

    @property
    @abstractmethod
    def place(self) -> str:
        """The place within the scope, as the edit file names it."""

    @abstractmethod
    def locate(self, source: Source) -> Change:
        """The change to a source that has not been edited."""

    @abstractmethod
    def traces(self, source: Source) -> Iterator[list[Splice]]:
        """Every way to take the edit back from a source that may have been edited."""

    @property
    def telling(self) -> bool:
        """Whether a trace shows by itself that the source has been edited."""
        return True

    def error(self, reason: str) -> PatchError:
        return PatchError(reason, scope=self.scope, place=self.place)

    def _alone(self, source: Source, stmt: ast.stmt) -> None:
        reason = source.why_not_alone(stmt)
        if reason:
            raise self.error(f"{reason} (line {stmt.lineno})")

    def _statements(self, source: Source) -> list[tuple[list[ast.stmt], ast.stmt]]:
        """Those of the scope, with their blocks; none where the scope is missing."""
        try:
            return list(source.statements(source.scope(self.scope)))
        except PatchError:
            return []


@dataclass(frozen=True)
class Insert(Edit):
    """`before` and `after`: lines beside a statement."""

    stmt: Pattern
    body: tuple[str, ...]
    above: bool
    blank: bool

    @property
    def place(self) -> str:
        return f"{'before' if self.above else 'after'} {self.stmt}"

    def locate(self, source: Source) -> Change:
        _, stmt = source.find(self.scope, self.stmt)
        self._alone(source, stmt)
        line = source.commented_from(stmt) if self.above else stmt.end_lineno + 1
        at = source.line_start(line)
        lines = Splice(at, at, self._lines(source, stmt))
        return Change([lines], beside=source.start(stmt))

    def traces(self, source: Source) -> Iterator[list[Splice]]:
        for _, stmt in self._statements(source):
            # Another edit may have changed what the statement mentions.
            if not self.stmt.is_kind_of(stmt):
                continue
            lines = self._lines(source, stmt)
            if not self.above:
                at = source.line_start(stmt.end_lineno + 1)
                if source.text.startswith(lines, at):
                    yield [Splice(at, at + len(lines), "")]
                continue
            # A body that ends in a comment looks like part of the statement's own.
            last = source.first_line(stmt)
            for line in range(source.commented_from(stmt), last + 1):
                at = source.line_start(line)
                if _ends_above(source, lines, at):
                    yield [Splice(at - len(lines), at, "")]

    def _lines(self, source: Source, stmt: ast.stmt) -> str:
        eol = source.eol(source.first_line(stmt))
        body = _indented(self.body, source.indentation(stmt), eol)
        if self.blank:
            return body + eol if self.above else eol + body
        return body


@dataclass(frozen=True)
class Wrap(Edit):
    """`wrap`: statements moved into the block that the body opens."""

    first: Pattern
    last: Pattern
    body: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"wrap {self.first} .. {self.last}"

    def locate(self, source: Source) -> Change:
        block, first = source.find(self.scope, self.first)
        other, last = source.find(self.scope, self.last)
        if other is not block or block.index(last) < block.index(first):
            raise self.error("the last statement does not follow in the same block")
        self._alone(source, first)
        self._alone(source, last)
        lines = range(source.commented_from(first), last.end_lineno + 1)
        if not source.string_lines.isdisjoint(lines):
            raise self.error("a string that spans lines cannot be indented")
        indent = [
            Splice(at, at, _STEP)
            for at in (source.line_start(n) for n in lines if source.line(n).strip())
        ]
        opening = _indented(self.body, source.indentation(first), source.eol(lines[0]))
        top, *rest = indent
        indented = range(source.line_start(lines[0]), source.line_start(lines[-1] + 1))
        return Change([top._replace(new=opening + _STEP), *rest], indented)

    def traces(self, source: Source) -> Iterator[list[Splice]]:
        for block, first in self._statements(source):
            if not self.first.is_kind_of(first):
                continue
            indentation = source.indentation(first)
            top = source.commented_from(first)
            at = source.line_start(top)
            opening = _indented(
                self.body, indentation.removesuffix(_STEP), source.eol(top)
            )
            if not _ends_above(source, opening, at):
                continue
            for last in block[block.index(first) :]:
                lines = range(top, last.end_lineno + 1)
                used = [n for n in lines if source.line(n).strip()]
                if self.last.is_kind_of(last) and all(
                    source.line(n).startswith(_STEP) for n in used
                ):
                    starts = [source.line_start(n) for n in used]
                    yield [
                        Splice(at - len(opening), at, ""),
                        *(Splice(n, n + len(_STEP), "") for n in starts),
                    ]


@dataclass(frozen=True)
class Swap(Edit):
    """`swap`: one expression of a statement replaced."""

    stmt: Pattern
    old: str
    new: str

    @property
    def place(self) -> str:
        return f"swap {self.stmt} :: {self.old}"

    @property
    def telling(self) -> bool:
        return False  # upstream may well have the same expression of its own

    def locate(self, source: Source) -> Change:
        stmts = [stmt for _, stmt in source.fitting(self.scope, self.stmt)]
        if not stmts:
            raise self.error("no such statement")
        found = [
            span for stmt in stmts for span in self._occurrences(source, stmt, self.old)
        ]
        if len(found) != 1:
            lines = ", ".join(str(stmt.lineno) for stmt in stmts)
            times = f"occurs {len(found)} times" if found else "does not occur"
            raise self.error(f"{times} in the statement (line {lines})")
        return Change([Splice(*found[0], self.new)])

    def traces(self, source: Source) -> Iterator[list[Splice]]:
        for _, stmt in self._statements(source):
            if self.stmt.may_have_fitted(stmt, self.old):
                for start, end in self._occurrences(source, stmt, self.new):
                    yield [Splice(start, end, self.old)]

    @staticmethod
    def _occurrences(
        source: Source, stmt: ast.stmt, code: str
    ) -> Iterator[tuple[int, int]]:
        wanted = _expression(code)
        nodes = header(stmt)
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.expr) and same(node, wanted):
                yield source.start(node), source.end(node)
            # Within f-strings Python before 3.12 has neither positions nor the syntax.
            if not isinstance(node, ast.JoinedStr):
                nodes += ast.iter_child_nodes(node)


@dataclass(frozen=True)
class Base(Edit):
    """`base`: a class gains a first base."""

    name: str

    @property
    def place(self) -> str:
        return f"base {self.name}"

    def locate(self, source: Source) -> Change:
        node = self._class(source)
        bases = [*node.bases, *node.keywords]
        if any(dotted(base) == self.name for base in node.bases):
            raise self.error("the class already has this base")
        if not bases:
            at = self._name_end(source, node)
            if not source.text[at:].lstrip().startswith(":"):
                raise self.error("empty parentheses or type parameters are in the way")
            return Change([Splice(at, at, f"({self.name})")])
        first = min(bases, key=source.start)
        at, line = source.start(first), first.lineno
        before = source.text[source.line_start(line) : at]
        # One base a line stays one base a line.
        gap = " " if before.strip() else source.eol(line) + before
        return Change([Splice(at, at, f"{self.name},{gap}")])

    def traces(self, source: Source) -> Iterator[list[Splice]]:
        try:
            node = self._class(source)
        except PatchError:
            return
        bases = sorted([*node.bases, *node.keywords], key=source.start)
        if not bases or dotted(bases[0]) != self.name:
            return
        if len(bases) > 1:
            yield [Splice(source.start(bases[0]), source.start(bases[1]), "")]
            return
        at, added = self._name_end(source, node), f"({self.name})"
        if source.text.startswith(added, at):
            yield [Splice(at, at + len(added), "")]

    def _class(self, source: Source) -> ast.ClassDef:
        node = source.scope(self.scope)
        if not isinstance(node, ast.ClassDef):
            raise self.error("not a class")
        return node

    @staticmethod
    def _name_end(source: Source, node: ast.ClassDef) -> int:
        name = re.compile(r"class\s+" + re.escape(node.name))
        match = name.match(source.text, source.start(node))
        assert match, node.name
        return match.end()


@dataclass(frozen=True)
class Unimport(Edit):
    """`unimport`: a name dropped from a `from MODULE import` list."""

    stmt: Pattern
    name: str

    @property
    def place(self) -> str:
        return f"unimport {self.stmt} :: {self.name}"

    @property
    def telling(self) -> bool:
        return False  # another release may not import the name in the first place

    def locate(self, source: Source) -> Change:
        wanted = self.stmt._replace(names=(*self.stmt.names, self.name))
        _, stmt = source.find(self.scope, wanted)
        at = self._index(stmt)
        if at is None:
            raise self.error("no such `from MODULE import NAME`")
        names = stmt.names
        if len(names) == 1:
            raise self.error("it is the only name of the import")
        if at + 1 < len(names):
            span = source.start(names[at]), source.start(names[at + 1])
        else:
            span = source.end(names[at - 1]), source.end(names[at])
        return Change([Splice(*span, "")])

    def traces(self, source: Source) -> Iterator[list[Splice]]:
        for _, stmt in self._statements(source):
            if not isinstance(stmt, ast.ImportFrom) or not self.stmt.fits(stmt):
                continue
            if self._index(stmt) is not None:
                continue
            at, gap = self._isorted(stmt.names), self._gap(source, stmt.names)
            if at < len(stmt.names):
                start = source.start(stmt.names[at])
                yield [Splice(start, start, self.name + gap)]
            else:
                end = source.end(stmt.names[-1])
                yield [Splice(end, end, gap + self.name)]

    def _index(self, stmt: ast.stmt) -> int | None:
        if isinstance(stmt, ast.ImportFrom):
            for index, alias in enumerate(stmt.names):
                if alias.name == self.name and alias.asname is None:
                    return index
        return None

    def _isorted(self, aliases: list[ast.alias]) -> int:
        """Where isort has the name in a list that it sorted; else the end."""
        keys = [_isort_key(alias.name) for alias in aliases]
        if keys != sorted(keys):
            return len(keys)
        return sum(key < _isort_key(self.name) for key in keys)

    @staticmethod
    def _gap(source: Source, aliases: list[ast.alias]) -> str:
        """What stands between two names of the list."""
        if len(aliases) > 1:
            return source.text[source.end(aliases[-2]) : source.start(aliases[-1])]
        line = aliases[0].lineno
        before = source.text[source.line_start(line) : source.start(aliases[0])]
        return ", " if before.strip() else "," + source.eol(line - 1) + before


def apply(data: bytes, edits: Sequence[Edit]) -> bytes:
    """An upstream file with all the edits; each is placed in the file as it is."""
    text, frame = decode(data)
    source = Source(text)
    changes = [_located(edit, source) for edit in edits]
    for one, other in itertools.combinations(range(len(edits)), 2):
        if _clash(changes[one], changes[other]):
            raise edits[other].error(f"overlaps the edit `{edits[one].place}`")
    result = splice(text, [part for change in changes for part in change.splices])
    try:
        validate(result)
    except PatchError as error:
        raise PatchError(f"{error.reason}, after the edits") from None
    return encode(result, frame)


def revert(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The upstream file that `apply` turns into `data`."""
    originals: set[bytes] = set()
    seen: set[tuple[str, int]] = set()
    text, frame = decode(data)
    missing: list[Edit] = []

    def undo(text: str, depth: int) -> None:
        if (text, depth) in seen:
            return
        seen.add((text, depth))
        if depth == len(edits):
            original = encode(text, frame)
            if _edits_to(original, edits, data):
                originals.add(original)
            return
        try:
            traces = list(edits[depth].traces(Source(text)))
        except PatchError:
            return  # not Python any more: this was not the way
        if not traces:
            missing.append(edits[depth])
        for splices in traces:
            undo(splice(text, splices), depth + 1)

    parse(text)
    undo(text, 0)
    if len(originals) == 1:
        return originals.pop()
    if originals:
        raise PatchError("more than one original would give this file")
    if missing:
        raise missing[0].error("the edit is not found there")
    raise PatchError("changed where it was edited: it cannot be taken back exactly")


def apply_reversibly(data: bytes, edits: Sequence[Edit]) -> bytes:
    """`apply`, refused where `revert` would not give back the same bytes."""
    result = apply(data, edits)
    try:
        if revert(result, edits) == data:
            return result
    except PatchError as error:
        reason = f"could not be taken back exactly: {error.reason}"
        raise PatchError(reason, scope=error.scope, place=error.place) from None
    raise PatchError("could not be taken back exactly")


def telling_traces(data: bytes, edits: Sequence[Edit]) -> list[Edit]:
    """The edits that this file shows on its own to have been made."""
    try:
        source = Source(decode(data)[0])
    except PatchError:
        return []
    return [edit for edit in edits if edit.telling and any(edit.traces(source))]


def read_edits(text: str, name: str) -> tuple[Edit, ...]:
    """The edits of an edit file; `name` is for messages."""
    edits = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at]
        at += 1
        if not line.strip() or line.startswith("#"):
            continue
        body = list(
            itertools.takewhile(
                lambda one: not one.strip() or one[0] == " ", lines[at:]
            )
        )
        at += len(body)
        try:
            edits.append(_read_edit(line, _trimmed(body)))
        except PatchError as error:
            raise PatchError(error.reason, file=f"{name}:{number}") from None
    if not edits:
        raise PatchError("no edit in the file", file=name)
    return tuple(edits)


def _read_edit(line: str, body: tuple[str, ...]) -> Edit:
    operation, _, rest = line.partition(" ")
    scope, *fields = (field.strip() for field in rest.split(" :: "))
    if operation not in _OPERATIONS:
        raise PatchError(f"{operation!r} is none of {', '.join(_OPERATIONS)}")
    count, wants_body, make = _OPERATIONS[operation]
    if len(fields) != count:
        raise PatchError(f"{operation} takes {count} fields after the scope")
    if wants_body != bool(body):
        raise PatchError(f"{operation} takes {'a' if wants_body else 'no'} body")
    if not all(name.isidentifier() for name in scope.split(".")):
        raise PatchError(f"{scope!r} is not a dotted path of classes and functions")
    return make(scope, fields, body)


def _insert(above: bool, blank: bool) -> _Maker:
    return lambda scope, fields, body: Insert(
        scope, _pattern(fields[0]), body, above, blank
    )


def _wrap(scope: str, fields: list[str], body: tuple[str, ...]) -> Edit:
    if not body[-1].endswith(":"):
        raise PatchError("the last line of the body has to end with ':'")
    return Wrap(scope, _pattern(fields[0]), _pattern(fields[1]), body)


def _swap(scope: str, fields: list[str], body: tuple[str, ...]) -> Edit:
    old, arrow, new = (part.strip() for part in fields[1].partition(" -> "))
    if not arrow:
        raise PatchError("swap takes OLD -> NEW")
    if same(_expression(old), _expression(new)):
        raise PatchError("swap takes two different expressions")
    return Swap(scope, _pattern(fields[0]), old, new)


def _base(scope: str, fields: list[str], body: tuple[str, ...]) -> Edit:
    if dotted(_expression(fields[0])) is None:
        raise PatchError(f"{fields[0]!r} is not a dotted name")
    return Base(scope, fields[0])


def _unimport(scope: str, fields: list[str], body: tuple[str, ...]) -> Edit:
    stmt = _pattern(fields[0])
    if scope != "module" or stmt.kind != "import" or not fields[1].isidentifier():
        raise PatchError("unimport takes `module :: import MODULE :: NAME`")
    return Unimport(scope, stmt, fields[1])


_Maker = Callable[[str, list[str], tuple[str, ...]], Edit]

# operation -> (fields after the scope, whether it has a body, what reads it)
_OPERATIONS: dict[str, tuple[int, bool, _Maker]] = {
    "before": (1, True, _insert(above=True, blank=False)),
    "before+blank": (1, True, _insert(above=True, blank=True)),
    "after": (1, True, _insert(above=False, blank=False)),
    "after+blank": (1, True, _insert(above=False, blank=True)),
    "wrap": (2, True, _wrap),
    "swap": (2, False, _swap),
    "base": (1, False, _base),
    "unimport": (2, False, _unimport),
}


def _pattern(text: str) -> Pattern:
    kind, *names = text.split() or [""]
    if kind not in KINDS:
        raise PatchError(f"{kind!r} is no kind of statement: {', '.join(KINDS)}")
    return Pattern(kind, tuple(names))


def _expression(code: str) -> ast.expr:
    try:
        return ast.parse(code.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise PatchError(f"{code!r} is not an expression") from None


def _trimmed(body: list[str]) -> tuple[str, ...]:
    lines = textwrap.dedent("\n".join(body)).strip("\n").split("\n")
    return tuple(line.rstrip() for line in lines) if any(lines) else ()


def _indented(body: tuple[str, ...], indentation: str, eol: str) -> str:
    return "".join((indentation + line if line else "") + eol for line in body)


def _ends_above(source: Source, lines: str, at: int) -> bool:
    """Whether whole lines stand right above an offset."""
    start = at - len(lines)
    return (
        start >= 0
        and source.text.startswith(lines, start)
        and (start == 0 or source.text[start - 1] in "\r\n")
    )


def _isort_key(name: str) -> tuple[int, str]:
    if name.isupper() and len(name) > 1:
        return 0, name.lower()
    return (1 if name[:1].isupper() else 2), name.lower()


def _located(edit: Edit, source: Source) -> Change:
    try:
        return edit.locate(source)
    except PatchError as error:
        place = error.place or edit.place
        raise PatchError(error.reason, scope=edit.scope, place=place) from None


def _clash(one: Change, other: Change) -> bool:
    for a, b in itertools.product(one.splices, other.splices):
        if a.start < b.end and b.start < a.end:
            return True
        if a.start == b.start and a.start == a.end and b.start == b.end:
            return True
    # A line beside an indented statement would not know its indentation.
    return one.beside in other.indented or other.beside in one.indented


def _edits_to(original: bytes, edits: Sequence[Edit], result: bytes) -> bool:
    try:
        return apply(original, edits) == result
    except PatchError:
        return False
