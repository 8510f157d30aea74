"""A Python file as text, with its syntax tree addressed by text offsets."""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from prefill_patch.errors import PatchError

_EOL = re.compile(r"\r\n|\n|\r")
_CODING = re.compile(r"#!|#.*coding[:=]")

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

KINDS: dict[str, tuple[type[ast.stmt], ...]] = {
    "assign": (ast.Assign, ast.AnnAssign, ast.AugAssign),
    "call": (ast.Expr,),
    "return": (ast.Return,),
    "if": (ast.If,),
    "for": (ast.For, ast.AsyncFor),
    "while": (ast.While,),
    "with": (ast.With, ast.AsyncWith),
    "import": (ast.Import, ast.ImportFrom),
    "assert": (ast.Assert,),
    "raise": (ast.Raise,),
    "def": (ast.FunctionDef, ast.AsyncFunctionDef),
    "class": (ast.ClassDef,),
}


class Splice(NamedTuple):
    """Replace `text[start:end]` by `new`."""

    start: int
    end: int
    new: str


class Pattern(NamedTuple):
    """What a statement has to be: its kind, and the dotted names that it mentions,
    or, with `!` before the name, does not mention."""

    kind: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.kind, *self.names))

    def fits(self, stmt: ast.stmt) -> bool:
        named = mentions(stmt)
        return self.is_kind_of(stmt) and all(
            name[1:] not in named if name.startswith("!") else name in named
            for name in self.names
        )

    def may_have_fitted(self, stmt: ast.stmt, lost: str) -> bool:
        """Whether `stmt` can be the one meant, had it the expression `lost`."""
        expression = parse(lost).body[0]
        named = mentions(stmt) | mentions(expression)
        return self.is_kind_of(stmt) and all(
            name in named or name.startswith(("!", f"{lost}.")) for name in self.names
        )

    def is_kind_of(self, stmt: ast.stmt) -> bool:
        """Whether the kind is right, whatever the statement mentions."""
        if self.kind == "call" and not _is_call(stmt):
            return False
        return isinstance(stmt, KINDS[self.kind])


class Frame(NamedTuple):
    """What surrounds the text of a file and must come back unchanged."""

    bom: bytes
    added_eol: str  # completes a last line that has no end of its own


def decode(data: bytes) -> tuple[str, Frame]:
    """The text of a Python file, every line complete, and the rest of its bytes."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if encoding not in ("utf-8", "utf-8-sig"):
            raise PatchError(f"encoded as {encoding}; only UTF-8 can be patched")
        bom = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        text = data[len(bom) :].decode("utf-8")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PatchError(f"not UTF-8 ({error}); only UTF-8 can be patched") from None
    added_eol = ""
    if text and text[-1] not in "\r\n":
        first = _EOL.search(text)
        added_eol = first.group() if first else "\n"
    return text + added_eol, Frame(bom, added_eol)


def encode(text: str, frame: Frame) -> bytes:
    """The inverse of `decode`, also for text that has been edited."""
    return frame.bom + text.removesuffix(frame.added_eol).encode("utf-8")


def parse(text: str) -> ast.Module:
    """The syntax tree of a module."""
    return _compiled(text, ast.PyCF_ONLY_AST)


def validate(text: str) -> None:
    """Refuse what Python would refuse to import, misplaced statements included."""
    _compiled(text, 0)


def _compiled(text: str, flags: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the target's own deprecated escapes
        try:
            return compile(text, "<target>", "exec", flags, dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            where = f" on line {line}" if line else ""
            what = getattr(error, "msg", None) or error
            raise PatchError(f"syntax error{where}: {what}") from None


def same(one: ast.AST, other: ast.AST) -> bool:
    """Whether two expressions are equal, read or assigned, however formatted."""
    return type(one) is type(other) and _dump(one) == _dump(other)


def dotted(node: ast.AST | None) -> str | None:
    """`a.b.c` when the node is such a chain, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return value and f"{value}.{node.attr}"
    return None


def header(stmt: ast.stmt) -> list[ast.AST]:
    """The nodes of a statement without the block below it."""
    if isinstance(stmt, (ast.If, ast.While)):
        return [stmt.test]
    if isinstance(stmt, (ast.For, ast.AsyncFor)):
        return [stmt.target, stmt.iter]
    if isinstance(stmt, (ast.With, ast.AsyncWith)):
        return list(stmt.items)
    if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [stmt.args, *([stmt.returns] if stmt.returns else [])]
    if isinstance(stmt, ast.ClassDef):
        return [*stmt.bases, *stmt.keywords]
    return [stmt]


def mentions(stmt: ast.stmt) -> set[str]:
    """Every dotted name that the header of a statement mentions."""
    names: set[str | None] = {getattr(stmt, "name", None)}
    for node in (inner for top in header(stmt) for inner in ast.walk(top)):
        if isinstance(node, (ast.Name, ast.Attribute)):
            names.add(dotted(node))
        elif isinstance(node, (ast.arg, ast.keyword)):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.update((node.name, node.asname))
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name for name in names if name}


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists directly inside a node."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block:
            yield block
    for branch in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield branch.body


class Source:
    """Text whose statements can be found, and whose positions are text offsets."""

    def __init__(self, text: str):
        self.text = text
        self.tree = parse(text)
        self._starts = [0, *(match.end() for match in _EOL.finditer(text))]

    def scope(self, path: str) -> Scope:
        """The class or function of a dotted path, or the whole module."""
        node: Scope = self.tree
        for name in [] if path == "module" else path.split("."):
            found = [
                stmt
                for _, stmt in self.statements(node)
                if isinstance(stmt, _SCOPES) and stmt.name == name
            ]
            if len(found) != 1:
                raise PatchError(
                    (
                        f"{len(found)} definitions of {name} "
                        f"(lines {_lines(found)}), one is needed"
                        if found
                        else f"no class or function {name}"
                    ),
                    scope=path,
                )
            node = found[0]
        return node

    def statements(self, scope: ast.AST) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
        """Each statement with its block, at any depth but not in inner scopes."""
        for block in blocks(scope):
            for stmt in block:
                yield block, stmt
                if not isinstance(stmt, _SCOPES):
                    yield from self.statements(stmt)

    def fitting(
        self, scope: str, pattern: Pattern
    ) -> list[tuple[list[ast.stmt], ast.stmt]]:
        """The statements of a scope that fit, each with its block."""
        places = self.statements(self.scope(scope))
        return [place for place in places if pattern.fits(place[1])]

    def find(self, scope: str, pattern: Pattern) -> tuple[list[ast.stmt], ast.stmt]:
        """The one statement of a scope that fits, with its block."""
        found = self.fitting(scope, pattern)
        if len(found) == 1:
            return found[0]
        raise PatchError(
            (
                "matches more than one statement "
                f"(lines {_lines([stmt for _, stmt in found])})"
                if found
                else "no such statement"
            ),
            scope=scope,
            place=str(pattern),
        )

    def offset(self, line: int, column: int) -> int:
        """The text offset of a position as `ast` gives it (UTF-8 columns)."""
        start = self._starts[line - 1]
        text = self.text[start : self._starts[line]]
        if not text.isascii():
            column = len(text.encode("utf-8")[:column].decode("utf-8"))
        return start + column

    def start(self, node: ast.AST) -> int:
        return self.offset(node.lineno, node.col_offset)

    def end(self, node: ast.AST) -> int:
        return self.offset(node.end_lineno, node.end_col_offset)

    def line_start(self, line: int) -> int:
        return self._starts[line - 1]

    def line(self, line: int) -> str:
        """A line without its end."""
        return self.text[self._starts[line - 1] : self._starts[line]].rstrip("\r\n")

    def eol(self, line: int) -> str:
        return self.text[
            self._starts[line - 1] + len(self.line(line)) : self._starts[line]
        ]

    def first_line(self, stmt: ast.stmt) -> int:
        """The line a statement begins on, its decorators included."""
        decorators = getattr(stmt, "decorator_list", ())
        return min([stmt.lineno, *(node.lineno for node in decorators)])

    def indentation(self, stmt: ast.stmt) -> str:
        line = self.line(self.first_line(stmt))
        return line[: len(line) - len(line.lstrip(" \t"))]

    def commented_from(self, stmt: ast.stmt) -> int:
        """The first line of the comment right above a statement, or its own.

        An interpreter or encoding line belongs to the file, not to a statement.
        """
        first, indentation = self.first_line(stmt), self.indentation(stmt)
        while first - 1 in self.comment_lines:
            line = self.line(first - 1)
            if line != indentation + line.lstrip() or (
                first <= 3 and _CODING.match(line)
            ):
                break
            first -= 1
        return first

    def why_not_alone(self, stmt: ast.stmt) -> str | None:
        """Why lines cannot be put before or after a statement, if they cannot."""
        first = self.first_line(stmt)
        line = self.line(first)
        after = self.text[self.end(stmt) : self._starts[stmt.end_lineno]].strip()
        if first > 1 and self.line(first - 1).endswith("\\"):
            if first - 1 not in self.comment_lines:
                return "the line above continues into the statement"
        if first == stmt.lineno:
            before = self.text[self.line_start(first) : self.start(stmt)]
            if before.strip(" \t"):
                return "another statement begins on the same line"
        if isinstance(stmt, ast.If) and line.lstrip(" \t").startswith("elif"):
            return "it is an elif branch, which nothing can stand beside"
        if after and not after.startswith("#"):
            return "another statement follows on the same line"
        return None

    @cached_property
    def _tokens(self) -> list[tokenize.TokenInfo]:
        lines = io.StringIO(_EOL.sub("\n", self.text)).readline
        try:
            return list(tokenize.generate_tokens(lines))
        except (tokenize.TokenError, SyntaxError) as error:
            raise PatchError(f"syntax error: {error}") from None

    @cached_property
    def comment_lines(self) -> frozenset[int]:
        """Lines that hold a comment and nothing else."""
        return frozenset(
            token.start[0]
            for token in self._tokens
            if token.type == tokenize.COMMENT
            and self.line(token.start[0]).lstrip().startswith("#")
        )

    @cached_property
    def string_lines(self) -> frozenset[int]:
        """Lines that begin inside a string."""
        inside: set[int] = set()
        opened: list[int] = []
        for token in self._tokens:
            kind = tokenize.tok_name[token.type]
            if kind == "STRING":
                inside.update(range(token.start[0] + 1, token.end[0] + 1))
            elif kind in ("FSTRING_START", "TSTRING_START"):
                opened.append(token.start[0])
            elif kind in ("FSTRING_END", "TSTRING_END"):
                inside.update(range(opened.pop() + 1, token.end[0] + 1))
        return frozenset(inside)


def splice(text: str, splices: list[Splice]) -> str:
    """Make several replacements that do not overlap."""
    for part in sorted(splices, key=lambda part: part[:2], reverse=True):
        text = text[: part.start] + part.new + text[part.end :]
    return text


def _dump(node: ast.AST) -> str:
    return re.sub(r",? ?ctx=(Load|Store|Del)\(\)", "", ast.dump(node))


def _is_call(stmt: ast.stmt) -> bool:
    value = getattr(stmt, "value", None)
    if isinstance(value, ast.Await):
        value = value.value
    return isinstance(value, ast.Call)


def _lines(stmts: list[ast.stmt]) -> str:
    return ", ".join(str(stmt.lineno) for stmt in stmts)
