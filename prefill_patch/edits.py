"""Edits of an upstream file, placed by structure, and the way back.

An edit file holds edits, each a header in column 0 and, for most, a body of lines
indented by four or more spaces. `#` in column 0 begins a comment.

    before SCOPE :: STMT            the body before the statement and its comment
    before+blank SCOPE :: STMT      the same, with an empty line after the body
    after SCOPE :: STMT             the body after the statement
    wrap SCOPE :: FIRST :: LAST     the body, then FIRST to LAST indented below it
    swap SCOPE :: STMT :: OLD -> NEW    one expression of the statement replaced
    base CLASS :: NAME              NAME becomes the first base of the class
    import module                   the body, a `from` import, where isort has it
    unimport module                 the name that the body imports is imported no more

SCOPE is the dotted path of a class or function, or `module`. STMT is a kind (`assign`,
`return`, `if`, `for`, `def`) and dotted names that the statement mentions or, with `!`
in front, does not mention; with `<` in front of either, the same of the statement above
it in its block; of a compound statement only the header counts. Exactly one statement of
the scope has to fit, at any depth but not in inner functions or classes; for `swap`,
exactly one occurrence of OLD in the statements that fit.

A line such as `[>= 0.5.13, < 0.5.17]` begins a section: what follows is for these
releases only. `[]` ends it.

Every edit replaces one span of the upstream text, and nothing about it is stored in the
file. `revert` looks for what each edit has left and accepts a result only if editing it
again gives the file it began with, byte for byte, and if it is the only such result.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefill_patch.errors import PatchError
from prefill_patch.releases import BASE, ordered
from prefill_patch.source import (
    KINDS,
    Pattern,
    Source,
    Splice,
    blocks,
    decode,
    dotted,
    encode,
    header,
    needed_and_stored,
    same,
    validate,
)

_STEP = "    "
_MOST_WAYS = 200


@dataclass(frozen=True)
class Edit(ABC):
    scope: str
    place: str  # within the scope, as the edit file has it
    loads: str  # what it adds that uses names of the scope

    # Whether what it leaves shows by itself that a file was edited.
    is_marker = True

    @abstractmethod
    def locate(self, source: Source) -> Splice:
        """The change to a source that has not been edited."""

    @abstractmethod
    def undone(self, source: Source) -> Iterator[Splice]:
        """Every way to take it back from a source that may have been edited."""

    def check(self, original: Source, result: Source) -> None:
        """Refuse a result that Python compiles but cannot run, or that does nothing."""
        needed, stored = needed_and_stored(self.loads)
        for name in [
            *result.unbound(self.scope, needed - stored),
            *original.unbound(self.scope, needed & stored),
        ]:
            raise self.error(f"uses {name}, which nothing defines there")
        for name in result.unused(self.scope, stored):
            raise self.error(f"sets {name}, which nothing uses there")

    def error(self, reason: str) -> PatchError:
        return PatchError(reason, scope=self.scope, place=self.place)


@dataclass(frozen=True)
class Lines(Edit):
    """Whole lines."""

    body: tuple[str, ...]

    def undone(self, source: Source) -> Iterator[Splice]:
        for found in _found(source, self.body):
            yield Splice(*found.span(), "")

    def _beside(self, source: Source, stmt: ast.stmt, above: bool) -> Splice:
        source.check_alone(stmt)
        line = source.commented_from(stmt) if above else stmt.end_lineno + 1
        at = source.line_start(line)
        eol = source.eol(source.first_line(stmt))
        return Splice(at, at, _indented(self.body, source.indentation(stmt), eol))


@dataclass(frozen=True)
class Insert(Lines):
    """`before` and `after`."""

    stmt: Pattern
    above: bool

    def locate(self, source: Source) -> Splice:
        _, stmt = source.find(self.scope, self.stmt)
        return self._beside(source, stmt, self.above)


@dataclass(frozen=True)
class Import(Lines):
    """`import`, beside the imports from the same package."""

    module: str

    def locate(self, source: Source) -> Splice:
        package = self.module.partition(".")[0]
        top = itertools.takewhile(
            lambda stmt: not isinstance(stmt, (ast.ClassDef, ast.FunctionDef)),
            source.tree.body,
        )
        imports = [
            stmt
            for stmt in top
            if isinstance(stmt, ast.ImportFrom)
            and f"{stmt.module}.".startswith(f"{package}.")
        ]
        if not imports:
            raise self.error(f"no other import from {package}")
        for stmt in imports:
            if stmt.module.lower() > self.module.lower():
                return self._beside(source, stmt, above=True)
        return self._beside(source, imports[-1], above=False)


@dataclass(frozen=True)
class Unimport(Edit):
    """`unimport`: a name dropped from an import of several."""

    module: str
    name: str

    is_marker = False  # another release may not import the name in the first place

    def locate(self, source: Source) -> Splice:
        found = [stmt for stmt in self._imports(source) if self.name in _names(stmt)]
        if len(found) != 1 or len(found[0].names) == 1:
            raise self.error(f"{self.name} is not one of several names of one import")
        names = found[0].names
        at = _names(found[0]).index(self.name)
        if at + 1 < len(names):
            return Splice(source.start(names[at]), source.start(names[at + 1]), "")
        return Splice(source.end(names[at - 1]), source.end(names[at]), "")

    def undone(self, source: Source) -> Iterator[Splice]:
        for stmt in self._imports(source):
            if self.name in _names(stmt):
                continue
            gap = _gap(source, stmt.names[-1])
            for alias in stmt.names:
                if _isort_key(alias.name) > _isort_key(self.name):
                    at = source.start(alias)
                    yield Splice(at, at, self.name + gap)
                    break
            else:
                at = source.end(stmt.names[-1])
                yield Splice(at, at, gap + self.name)

    def check(self, original: Source, result: Source) -> None:
        for node in ast.walk(result.tree):
            if isinstance(node, ast.Name) and node.id == self.name:
                raise self.error(f"{self.name} is still used on line {node.lineno}")

    def _imports(self, source: Source) -> list[ast.ImportFrom]:
        return [
            stmt
            for _, stmt in source.statements(source.tree)
            if isinstance(stmt, ast.ImportFrom) and stmt.module == self.module
        ]


@dataclass(frozen=True)
class Wrap(Edit):
    """`wrap`: statements moved into the block that the body opens."""

    body: tuple[str, ...]
    first: Pattern
    last: Pattern

    def locate(self, source: Source) -> Splice:
        block, first = source.find(self.scope, self.first)
        other, last = source.find(self.scope, self.last)
        if other is not block or block.index(last) < block.index(first):
            raise self.error("the last statement does not follow in the same block")
        source.check_alone(first)
        source.check_alone(last)
        top, end = source.commented_from(first), last.end_lineno
        if not source.string_lines.isdisjoint(range(top, end + 1)):
            raise self.error("a string that spans lines cannot be indented")
        lines = [
            _STEP + line if line.strip() else line for line in source.lines(top, end)
        ]
        opening = _indented(self.body, source.indentation(first), source.eol(top))
        span = source.line_start(top), source.line_start(end + 1)
        return Splice(*span, opening + "".join(lines))

    def undone(self, source: Source) -> Iterator[Splice]:
        """The block below the body is what was wrapped, all of it."""
        below = {
            source.line_start(source.commented_from(block[0])): block
            for node in ast.walk(source.tree)
            for block in blocks(node)
        }
        for found in _found(source, self.body):
            if found.end() in below:
                first, last = below[found.end()][0], below[found.end()][-1]
                lines = source.lines(source.commented_from(first), last.end_lineno)
                end = source.line_start(last.end_lineno + 1)
                moved = "".join(line.removeprefix(_STEP) for line in lines)
                yield Splice(found.start(), end, moved)


@dataclass(frozen=True)
class Swap(Edit):
    """`swap`: one expression of a statement replaced."""

    stmt: Pattern
    old: str
    new: str

    is_marker = False  # upstream may well have the same expression of its own

    def locate(self, source: Source) -> Splice:
        stmts = [place[1] for place in self._places(source) if self.stmt.fits(*place)]
        if not stmts:
            raise self.error("no such statement")
        found = [
            span for stmt in stmts for span in self._occurrences(source, stmt, self.old)
        ]
        if len(found) != 1:
            lines = ", ".join(str(stmt.lineno) for stmt in stmts)
            times = f"occurs {len(found)} times" if found else "does not occur"
            raise self.error(f"{self.old} {times} in the statement (line {lines})")
        return Splice(*found[0], self.new)

    def undone(self, source: Source) -> Iterator[Splice]:
        kind = Pattern(self.stmt.kind, ())  # it may not mention what it did
        for block, stmt in self._places(source):
            if kind.fits(block, stmt):
                for span in self._occurrences(source, stmt, self.new):
                    yield Splice(*span, self.old)

    def _places(self, source: Source) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
        return source.statements(source.scope(self.scope))

    @staticmethod
    def _occurrences(
        source: Source, stmt: ast.stmt, code: str
    ) -> Iterator[tuple[int, int]]:
        wanted = _expression(code)
        nodes = list(header(stmt))
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.expr) and same(node, wanted):
                yield source.start(node), source.end(node)
            # Within f-strings Python before 3.12 has neither positions nor the syntax.
            if not isinstance(node, ast.JoinedStr):
                nodes += ast.iter_child_nodes(node)


@dataclass(frozen=True)
class Base(Edit):
    """`base`: a class that has bases gains a first one."""

    name: str

    def locate(self, source: Source) -> Splice:
        bases = self._bases(source)
        if not bases or self.name in map(dotted, bases):
            raise self.error("not a class with other bases and without this one")
        at = source.start(bases[0])
        return Splice(at, at, self.name + _gap(source, bases[0]))

    def undone(self, source: Source) -> Iterator[Splice]:
        bases = self._bases(source)
        if len(bases) > 1 and dotted(bases[0]) == self.name:
            yield Splice(source.start(bases[0]), source.start(bases[1]), "")

    def _bases(self, source: Source) -> list[ast.expr]:
        return getattr(source.scope(self.scope), "bases", [])


def apply(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The edited file; refused where `revert` would not give back the same bytes."""
    text, frame = decode(data)
    result = _edited(text, edits)
    try:
        validate(result)
    except PatchError as error:
        raise PatchError(f"{error.reason}, after the edits") from None
    sources = Source(text), Source(result)
    for edit in edits:
        edit.check(*sources)
    edited = encode(result, frame)
    try:
        if revert(edited, edits) == data:
            return edited
    except PatchError as error:
        reason = f"could not be taken back exactly: {error.reason}"
        raise PatchError(reason, scope=error.scope, place=error.place) from None
    raise PatchError("could not be taken back exactly")


def apply_tested(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The same for a file that `apply` is known to edit, without a look at the result."""
    text, frame = decode(data)
    return encode(_edited(text, edits), frame) if edits else data


def revert(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The upstream file that `apply` turns into `data`."""
    text, frame = decode(data)
    source = Source(text)
    ways = [_undone(edit, source) for edit in edits]
    for edit, found in zip(edits, ways):
        if not found:
            raise edit.error("the edit is not found there")
    if math.prod(map(len, ways)) > _MOST_WAYS:
        raise PatchError("the edits are found too many times")
    originals = set()
    for way in itertools.product(*ways):
        try:
            original = _spliced(text, edits, way)
            if _edited(original, edits) == text:
                originals.add(original)
        except PatchError:
            pass  # this was not the way
    if len(originals) == 1:
        return encode(originals.pop(), frame)
    if originals:
        raise PatchError("more than one original would give this file")
    raise PatchError("changed where it was edited: it cannot be taken back exactly")


def has_marks(data: bytes, edits: Sequence[Edit]) -> bool:
    """Whether something in the file shows that edits were made, all of them or not."""
    try:
        source = Source(decode(data)[0])
    except PatchError:
        return False
    return any(edit.is_marker and _undone(edit, source) for edit in edits)


def _edited(text: str, edits: Sequence[Edit]) -> str:
    source = Source(text)
    splices = []
    for edit in edits:
        try:
            splices.append(edit.locate(source))
        except PatchError as error:
            place = error.place or edit.place
            raise PatchError(error.reason, scope=edit.scope, place=place) from None
    return _spliced(text, edits, splices)


def _undone(edit: Edit, source: Source) -> list[Splice]:
    try:
        return list(edit.undone(source))
    except PatchError:
        return []  # its scope is missing


def _spliced(text: str, edits: Sequence[Edit], splices: Sequence[Splice]) -> str:
    """The text after one replacement for each edit."""
    after = len(text) + 1
    for splice, edit in sorted(zip(splices, edits), key=lambda pair: pair[0])[::-1]:
        if splice.end > after or splice.start == after:
            raise edit.error("overlaps another edit")
        text = text[: splice.start] + splice.new + text[splice.end :]
        after = splice.start
    return text


def _found(source: Source, body: tuple[str, ...]) -> Iterator[re.Match[str]]:
    """Where the lines of a body are, at whatever indentation."""
    eol = r"(?:\r\n|\n|\r)"
    lines = ((r"\1" + re.escape(line) if line else "") + eol for line in body)
    pattern = "".join(lines).replace(r"\1", r"([ \t]*)", 1)
    return re.finditer(r"(?:\A|(?<=[\r\n]))" + pattern, source.text)


def _indented(body: tuple[str, ...], indentation: str, eol: str) -> str:
    return "".join((indentation + line if line else "") + eol for line in body)


def _gap(source: Source, item: ast.AST) -> str:
    """What separates the items of a list: one that has a line each keeps that."""
    line = source.line_start(item.lineno)
    before = source.text[line : source.start(item)]
    return ", " if before.strip() else f",{source.eol(item.lineno)}{before}"


def _names(stmt: ast.ImportFrom) -> list[str]:
    return [alias.name if alias.asname is None else "" for alias in stmt.names]


def _isort_key(name: str) -> tuple[int, str]:
    if name.isupper() and len(name) > 1:
        return 0, name.lower()
    return (1 if name[:1].isupper() else 2), name.lower()


def read_edits(text: str, name: str, version: str = BASE.version) -> tuple[Edit, ...]:
    """The edits of an edit file for a release; `name` is for messages."""
    edits, count, wanted = [], 0, True
    for found in re.finditer(r"^([^#\s].*)\n((?:(?: .*)?\n)*)", text + "\n", re.M):
        head, body = found[1].strip(), textwrap.dedent(found[2]).strip("\n")
        try:
            if head.startswith("["):
                wanted = _in_section(version, head)
                continue
            edit = _read_edit(head, tuple(body.split("\n")) if body else ())
        except PatchError as error:
            line = text.count("\n", 0, found.start()) + 1
            raise PatchError(error.reason, file=f"{name}:{line}") from None
        count += 1
        edits += [edit] if wanted else []
    if not count:
        raise PatchError("no edit in the file", file=name)
    return tuple(edits)


_COMPARE = {"<": operator.lt, ">=": operator.ge}


def _in_section(version: str, head: str) -> bool:
    """Whether a release is one of those that a section is for."""
    bounds = re.findall(r"(<|>=) (\d+(?:\.\w+)+)", head)
    if head != f"[{', '.join(map(' '.join, bounds))}]":
        raise PatchError(f"{head!r} is no section such as [>= 0.5.13, < 0.5.17]")
    return all(
        _COMPARE[sign](ordered(version), ordered(bound)) for sign, bound in bounds
    )


# operation -> (fields after the scope, whether it has a body)
_OPERATIONS = {
    "before": (1, True),
    "before+blank": (1, True),
    "after": (1, True),
    "wrap": (2, True),
    "swap": (2, False),
    "base": (1, False),
    "import": (0, True),
    "unimport": (0, True),
}


def _read_edit(line: str, body: tuple[str, ...]) -> Edit:
    operation, _, rest = line.partition(" ")
    scope, *fields = (field.strip() for field in rest.split(" :: "))
    if operation not in _OPERATIONS:
        raise PatchError(f"{operation!r} is none of {', '.join(_OPERATIONS)}")
    count, has_body = _OPERATIONS[operation]
    if len(fields) != count:
        raise PatchError(f"{operation} takes {count} fields after the scope")
    if bool(body) != has_body:
        raise PatchError(f"{operation} takes {'a' if has_body else 'no'} body")
    if not all(name.isidentifier() for name in scope.split(".")):
        raise PatchError(f"{scope!r} is not a dotted path of classes and functions")
    place, code = " ".join([operation, " :: ".join(fields)]).strip(), "\n".join(body)
    if operation == "base":
        return Base(scope, place, fields[0], fields[0])
    if operation == "swap":
        old, _, new = (part.strip() for part in fields[1].partition(" -> "))
        if same(_expression(old), _expression(new)):
            raise PatchError("swap takes two different expressions")
        return Swap(scope, place, new, _pattern(fields[0]), old, new)
    if operation == "wrap":
        if not code.endswith(":"):
            raise PatchError("the last line of the body has to end with ':'")
        patterns = map(_pattern, fields)
        return Wrap(scope, place, f"{code} pass", body, *patterns)
    if operation == "import":
        return Import(scope, place, "", body, _imported(scope, code).module)
    if operation == "unimport":
        stmt = _imported(scope, code)
        return Unimport(scope, place, "", stmt.module, stmt.names[0].name)
    if operation == "before+blank":
        body = (*body, "")
    above = operation != "after"
    return Insert(scope, place, code, body, _pattern(fields[0]), above)


def _pattern(text: str) -> Pattern:
    kind, *names = text.split() or [""]
    if kind not in KINDS:
        raise PatchError(f"{kind!r} is no kind of statement: {', '.join(KINDS)}")
    return Pattern(kind, tuple(names))


def _expression(code: str) -> ast.expr:
    try:
        return ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError):
        raise PatchError(f"{code!r} is not an expression") from None


def _imported(scope: str, code: str) -> ast.ImportFrom:
    try:
        (stmt,) = ast.parse(code).body
    except (SyntaxError, ValueError):
        stmt = None
    if scope != "module" or not isinstance(stmt, ast.ImportFrom) or stmt.level:
        raise PatchError("takes `module` and one `from MODULE import NAME`")
    return stmt
