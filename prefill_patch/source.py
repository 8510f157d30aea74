"""A Python file as text, with its syntax tree addressed by text offsets."""

from __future__ import annotations

import ast
import builtins
import codecs
import io
import re
import symtable
import sys
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from prefill_patch.errors import PatchError

_EOL = re.compile(r"\r\n|\n|\r")
_SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# The fields of a compound statement that hold the statements below it.
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")

KINDS: dict[str, tuple[type[ast.stmt], ...]] = {
    "assign": (ast.Assign, ast.AnnAssign, ast.AugAssign),
    "return": (ast.Return,),
    "if": (ast.If,),
    "for": (ast.For,),
    "def": (ast.FunctionDef,),
}


class Splice(NamedTuple):
    """Replace `text[start:end]` by `new`."""

    start: int
    end: int
    new: str


class Frame(NamedTuple):
    """What surrounds the text of a file and must come back unchanged."""

    bom: bytes
    added_eol: str  # completes a last line that has no end of its own


class Pattern(NamedTuple):
    """What a statement has to be: its kind, and the dotted names that it mentions,
    or, with `!` before the name, does not mention; after `<`, the same of the statement
    above it in its block."""

    kind: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.kind, *self.names))

    def fits(self, block: list[ast.stmt], stmt: ast.stmt) -> bool:
        if not isinstance(stmt, KINDS[self.kind]):
            return False
        above = [name[1:] for name in self.names if name.startswith("<")]
        own = [name for name in self.names if not name.startswith("<")]
        return _mentions_as(own, stmt) and (
            not above or _mentions_as(above, *block[: block.index(stmt)][-1:])
        )


def decode(data: bytes) -> tuple[str, Frame]:
    """The text of a Python file, every line complete, and the rest of its bytes."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
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
            python = ".".join(map(str, sys.version_info[:2]))
            raise PatchError(f"not valid Python {python}{where}: {what}") from None


def same(one: ast.AST, other: ast.AST) -> bool:
    """Whether two expressions are equal, read or assigned, however formatted."""
    return type(one) is type(other) and _dump(one) == _dump(other)


def _dump(node: ast.AST) -> str:
    return re.sub(r",? ?ctx=(Load|Store|Del)\(\)", "", ast.dump(node))


def dotted(node: ast.AST | None) -> str | None:
    """`a.b.c` when the node is such a chain, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return value and f"{value}.{node.attr}"
    return None


def header(stmt: ast.stmt) -> Iterator[ast.AST]:
    """The nodes directly in a statement, without its decorators and the block below."""
    for field, value in ast.iter_fields(stmt):
        if field not in (*_BLOCKS, "decorator_list"):
            nodes = value if isinstance(value, list) else [value]
            yield from (node for node in nodes if isinstance(node, ast.AST))


def mentions(stmt: ast.stmt) -> set[str]:
    """Every dotted name that the header of a statement mentions."""
    names = {getattr(stmt, "name", None)}
    for node in (inner for top in header(stmt) for inner in ast.walk(top)):
        names.add(
            node.arg if isinstance(node, (ast.arg, ast.keyword)) else dotted(node)
        )
    return {name for name in names if name}


def _mentions_as(names: Iterable[str], *stmts: ast.stmt) -> bool:
    """Whether the statements mention these names, or, with `!` in front, do not."""
    named = set().union(*map(mentions, stmts))
    return all(
        name[1:] not in named if name.startswith("!") else name in named
        for name in names
    )


def needed_and_stored(code: str) -> tuple[set[str], set[str]]:
    """The names that code loads before it has set them, and those that it sets, but for
    the variables of comprehensions."""
    needed, stored = set(), set()
    stmts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    for stmt in sorted(stmts, key=lambda stmt: (stmt.lineno, stmt.col_offset)):
        nodes = [node for top in header(stmt) for node in ast.walk(top)]
        inner = [one.target for one in nodes if isinstance(one, ast.comprehension)]
        own = {name for target in inner for name in _named(ast.walk(target), ast.Store)}
        needed |= _named(nodes, ast.Load) - stored - own
        stored |= _named(nodes, ast.Store) - own
    return needed, stored


def _named(nodes: Iterable[ast.AST], context: type[ast.expr_context]) -> set[str]:
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, context)}


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists directly inside a node."""
    for field in _BLOCKS:
        block = getattr(node, field, None) or []
        if field in ("handlers", "cases"):
            yield from (branch.body for branch in block)
        elif isinstance(block, list) and block:
            yield block


class Source:
    """Text whose statements can be found, and whose positions are text offsets."""

    def __init__(self, text: str):
        self.text = text
        self.tree: ast.Module = _compiled(text, ast.PyCF_ONLY_AST)
        self._starts = [0, *(match.end() for match in _EOL.finditer(text))]

    def scope(self, path: str) -> ast.AST:
        """The class or function of a dotted path, or the whole module."""
        node: ast.AST = self.tree
        for name in [] if path == "module" else path.split("."):
            inner = (stmt for _, stmt in self.statements(node))
            found = [
                one for one in inner if isinstance(one, _SCOPES) and one.name == name
            ]
            if not found:
                raise PatchError(f"no class or function {name}", scope=path)
            if len(found) > 1:
                many = f"{len(found)} definitions of {name} (lines {_lines(found)})"
                raise PatchError(f"{many}, one is needed", scope=path)
            node = found[0]
        return node

    def statements(self, scope: ast.AST) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
        """Each statement with its block, at any depth but not in inner scopes."""
        for block in blocks(scope):
            for stmt in block:
                yield block, stmt
                if not isinstance(stmt, _SCOPES):
                    yield from self.statements(stmt)

    def find(self, scope: str, pattern: Pattern) -> tuple[list[ast.stmt], ast.stmt]:
        """The one statement of a scope that fits, with its block."""
        places = self.statements(self.scope(scope))
        found = [place for place in places if pattern.fits(*place)]
        if len(found) == 1:
            return found[0]
        reason = "no such statement"
        if found:
            lines = _lines([stmt for _, stmt in found])
            reason = f"matches more than one statement (lines {lines})"
        raise PatchError(reason, scope=scope, place=str(pattern))

    def start(self, node: ast.AST) -> int:
        return self._offset(node.lineno, node.col_offset)

    def end(self, node: ast.AST) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int, column: int) -> int:
        """The text offset of a position as `ast` gives it (UTF-8 columns)."""
        start = self._starts[line - 1]
        text = self.text[start : self._starts[line]]
        return start + len(text.encode("utf-8")[:column].decode("utf-8"))

    def line_start(self, line: int) -> int:
        return self._starts[line - 1]

    def lines(self, first: int, last: int) -> list[str]:
        """The lines from `first` to `last`, each with its end."""
        starts = self._starts[first - 1 : last + 1]
        return [self.text[a:b] for a, b in zip(starts, starts[1:])]

    def line(self, number: int) -> str:
        return self.lines(number, number)[0]

    def eol(self, line: int) -> str:
        return self.line(line)[len(self.line(line).rstrip("\r\n")) :]

    def first_line(self, stmt: ast.stmt) -> int:
        """The line a statement begins on, its decorators included."""
        decorators = getattr(stmt, "decorator_list", ())
        return min([stmt.lineno, *(node.lineno for node in decorators)])

    def indentation(self, stmt: ast.stmt) -> str:
        line = self.line(self.first_line(stmt))
        return line[: len(line) - len(line.lstrip(" \t"))]

    def commented_from(self, stmt: ast.stmt) -> int:
        """The first line of the comment right above a statement, or its own."""
        first, comment = self.first_line(stmt), self.indentation(stmt) + "#"
        while (
            first > 1
            and self.line(first - 1).startswith(comment)
            and first - 1 not in self.string_lines
        ):
            first -= 1
        return first

    def check_alone(self, stmt: ast.stmt) -> None:
        """Refuse a statement that lines cannot be put before or after."""
        first = self.first_line(stmt)
        before = self.text[self.line_start(first) : self.start(stmt)].strip(" \t")
        after = self.text[self.end(stmt) : self.line_start(stmt.end_lineno + 1)].strip()
        if before and not before.startswith("@") or after and not after.startswith("#"):
            raise PatchError(f"shares line {stmt.lineno} with another statement")
        if first > 1 and re.search(r"^[^#]*\\\s*$", self.line(first - 1)):
            raise PatchError(f"the line above line {first} continues into it")
        if self.text.startswith("elif", self.start(stmt)):
            raise PatchError(f"line {first} is an elif, which nothing can stand beside")

    def unbound(self, scope: str, names: set[str]) -> list[str]:
        """Those of the names that nothing binds in a scope."""
        bound = {*dir(builtins)} | {
            symbol.get_name()
            for symbol in self._symbols.get_symbols()
            if symbol.is_assigned() or symbol.is_imported()
        }
        table = self._symbols
        for part in [] if scope == "module" else scope.split("."):
            inner = table.get_children()
            table = next(child for child in inner if child.get_name() == part)
        return [
            name
            for name in sorted(names - bound)
            if name not in table.get_identifiers() or table.lookup(name).is_global()
        ]

    def unused(self, scope: str, names: set[str]) -> list[str]:
        """Those of the names set in a function that nothing there loads."""
        node = self.scope(scope)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return []  # they are for others
        return sorted(names - _named(ast.walk(node), ast.Load))

    @cached_property
    def _symbols(self) -> symtable.SymbolTable:
        return symtable.symtable(self.text, "<target>", "exec")

    @cached_property
    def string_lines(self) -> frozenset[int]:
        """Lines that begin inside a string, or between strings that are joined."""
        return frozenset(
            line
            for node in ast.walk(self.tree)
            if isinstance(node, ast.JoinedStr)
            or isinstance(node, ast.Constant)
            and isinstance(node.value, (str, bytes))
            for line in range(node.lineno + 1, node.end_lineno + 1)
        )


def _lines(stmts: list[ast.stmt]) -> str:
    return ", ".join(str(stmt.lineno) for stmt in stmts)
