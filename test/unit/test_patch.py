"""The patch builder: edits, diffs, targets, and the command line on real releases."""

import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
import zipfile
from pathlib import Path

import pytest
from patch_targets import copy_release, edited_files, snapshot, write_tree

from prefill_patch import edits, install, target
from prefill_patch.cli import main
from prefill_patch.diff import file_diff
from prefill_patch.errors import PatchError
from prefill_patch.patch import Patch, State, build, inspect

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("0.5.12", "0.5.12.post1")
GIT = shutil.which("git")


def text(code: str) -> str:
    return textwrap.dedent(code).lstrip("\n")


def edited(code: str, edit_file: str) -> str:
    """`code` edited, after making sure that it can be taken back."""
    todo = edits.read_edits(text(edit_file), "test.edit")
    before = code.encode()
    after = edits.apply(before, todo)
    assert edits.revert(after, todo) == before
    assert edits.apply_reversibly(before, todo) == after
    assert [edit for edit in todo if edit.telling] == edits.telling_traces(after, todo)
    assert edits.telling_traces(before, todo) == []
    return after.decode()


def refusal(code: str, edit_file: str) -> str:
    todo = edits.read_edits(text(edit_file), "test.edit")
    with pytest.raises(PatchError) as caught:
        edits.apply_reversibly(code.encode(), todo)
    return str(caught.value)


MODULE = text(
    """
    # license

    import os
    from lib import (
        Alpha,
        Beta,
        _gamma,
    )

    if os.name:
        import extra


    class Plain:
        pass


    class Node(Alpha, metaclass=Beta):
        # about run
        @staticmethod
        def run(x, y=1):
            total = 0
            # loop over all
            # of x
            for item in x:
                if item.shape[0] != y:
                    total += torch.zeros(item.shape, dtype=y)  # note
                elif item:
                    emit(item, device="cpu")

            a = 1
            # about b
            b = (
                "one"
                "two"
            )

            c = a, b
            return total

        async def wait(self):
            def run():
                return 1

            async with self.lock as held:
                await held.wait_for(run)
            try:
                raise ValueError(self.message)
            except ValueError:
                assert self.done, "é"; self.count = 0
    """
)

# edit file -> the lines that replace lines of MODULE: (old, new)
EDITS = {
    "before": (
        "before Node.run :: for item x\n    u = 1\n\n    v = 2",
        "        # loop over all\n",
        "        u = 1\n\n        v = 2\n        # loop over all\n",
    ),
    "before+blank": (
        "before+blank Node.run :: assign a !c\n    u = 1",
        "        a = 1\n",
        "        u = 1\n\n        a = 1\n",
    ),
    "before a decorated function": (
        "before Node :: def run\n    u = 1",
        "    # about run\n",
        "    u = 1\n    # about run\n",
    ),
    "before, a body that ends in a comment": (
        "before Node.run :: assign b !c\n    u = 1\n    # more",
        "        # about b\n",
        "        u = 1\n        # more\n        # about b\n",
    ),
    "after": (
        "after Node.run :: assign total torch.zeros item.shape dtype\n    u = 1",
        "dtype=y)  # note\n",
        "dtype=y)  # note\n                u = 1\n",
    ),
    "after+blank": (
        "after+blank module :: import lib Beta\n    import u",
        "    _gamma,\n)\n",
        "    _gamma,\n)\n\nimport u\n",
    ),
    "after a compound statement": (
        "after Node.run :: for item\n    u = 1",
        '                emit(item, device="cpu")\n',
        '                emit(item, device="cpu")\n        u = 1\n',
    ),
    "after, in a branch of the module": (
        "after module :: import extra\n    import u",
        "    import extra\n",
        "    import extra\n    import u\n",
    ),
    "after an awaited call": (
        "after Node.wait :: call held.wait_for\n    u = 1",
        "            await held.wait_for(run)\n",
        "            await held.wait_for(run)\n            u = 1\n",
    ),
    "a statement told apart by what it lacks": (
        "after Node.run :: assign !total !a\n    u = 1",
        '            "two"\n        )\n',
        '            "two"\n        )\n        u = 1\n',
    ),
    "an inner function": (
        "before Node.wait.run :: return\n    u = 1",
        "            return 1\n",
        "            u = 1\n            return 1\n",
    ),
    "async with, raise": (
        "before Node.wait :: with self.lock\n    u = 1",
        "        async with",
        "        u = 1\n        async with",
    ),
    "raise": (
        "before Node.wait :: raise self.message\n    u = 1",
        "            raise ",
        "            u = 1\n            raise ",
    ),
    "wrap": (
        "wrap Node.run :: assign b !c :: assign c\n    if y:\n        b = 2\n    else:",
        MODULE[
            MODULE.index("        # about b") : MODULE.index("        return total")
        ],
        "        if y:\n            b = 2\n        else:\n            # about b\n"
        '            b = (\n                "one"\n                "two"\n            )\n'
        "\n            c = a, b\n",
    ),
    "wrap one compound statement": (
        "wrap Node.run :: if item.shape :: if item.shape\n    while y:",
        MODULE[MODULE.index("            if item.s") : MODULE.index("\n        a = 1")],
        "            while y:\n"
        + textwrap.indent(
            MODULE[
                MODULE.index("            if item.s") : MODULE.index("\n        a = 1")
            ],
            "    ",
        ),
    ),
    "swap a chain": (
        "swap Node.run :: assign total torch.zeros :: torch.zeros -> torch.empty",
        "torch.zeros(",
        "torch.empty(",
    ),
    "swap the root of a chain": (
        "swap Node.run :: assign total torch.zeros :: torch -> jax.numpy",
        "torch.zeros(",
        "jax.numpy.zeros(",
    ),
    "swap a comparison in an if": (
        "swap Node.run :: if y :: item.shape[0] != y -> y > 0 and item != y",
        "item.shape[0] != y",
        "y > 0 and item != y",
    ),
    "swap in an elif": (
        "swap Node.run :: if item !y :: item -> item.u",
        "elif item:",
        "elif item.u:",
    ),
    "swap a target": (
        "swap Node.run :: assign a !b :: a -> a.u",
        "        a = 1",
        "        a.u = 1",
    ),
    "swap after other than ASCII": (
        "swap Node.wait :: assign self.count :: self.count -> self.u",
        "self.count",
        "self.u",
    ),
    "swap finds the one statement that has it": (
        "swap Node.run :: assign :: 1 -> 2",
        "a = 1\n",
        "a = 2\n",
    ),
    "base of a plain class": ("base Plain :: U", "class Plain:", "class Plain(U):"),
    "first base": ("base Node :: m.U", "Node(Alpha", "Node(m.U, Alpha"),
    "unimport the last name": (
        "unimport module :: import lib :: _gamma",
        "    _gamma,\n",
        "",
    ),
    "unimport the first name": (
        "unimport module :: import lib :: Alpha",
        "    Alpha,\n",
        "",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edit(name):
    edit_file, old, new = EDITS[name]
    assert MODULE.count(old) == 1
    assert edited(MODULE, edit_file) == MODULE.replace(old, new)


def test_edits_of_one_file_are_placed_in_the_original():
    separate = [
        "before",
        "after+blank",
        "swap a comparison in an if",
        "wrap",
        "first base",
        "base of a plain class",
        "unimport the last name",
    ]
    expected = MODULE
    for name in separate:
        if name == "after+blank":  # beside the import that loses a name
            expected = expected.replace(
                "    _gamma,\n)\n", "    _gamma,\n)\n\nimport u\n"
            )
        else:
            expected = expected.replace(*EDITS[name][1:])
    for order in (separate, separate[::-1]):
        together = "\n\n# comment\n".join(EDITS[name][0] for name in order)
        assert edited(MODULE, together) == expected


def test_swap_in_the_statement_that_another_edit_looks_for():
    beside = "before Node.run :: assign total torch.zeros\n    u = 1\n"
    swap, old, new = EDITS["swap a chain"]
    expected = MODULE.replace(
        "                total += torch.zeros",
        "                u = 1\n                total += torch.empty",
    )
    for together in (beside + swap, swap + "\n" + beside):
        assert edited(MODULE, together) == expected


def test_end_of_a_line_is_no_trace():
    code = "my = 1\nx = 1\n"
    after = edited(code, "before module :: assign x\n    y = 1")
    assert after == "my = 1\ny = 1\nx = 1\n"


@pytest.mark.parametrize(
    "frame",
    [
        lambda code: code.replace("\n", "\r\n"),
        lambda code: "\ufeff" + code,
        lambda code: code.rstrip("\n"),
        lambda code: "\ufeff" + code.rstrip("\n").replace("\n", "\r\n"),
        lambda code: code.replace("    ", "\t"),
    ],
    ids=["CRLF", "BOM", "no final newline", "all three", "tabs"],
)
@pytest.mark.parametrize(
    "name", ["before", "after", "swap a chain", "base of a plain class"]
)
def test_bytes_around_the_edit_are_kept(frame, name):
    edit_file, old, new = EDITS[name]
    tabs = "\t" in frame("    ")
    expected = frame(MODULE.replace(old, new))
    assert edited(frame(MODULE), edit_file) == expected
    assert tabs == ("\t" in expected)


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
def test_after_the_last_statement(eol):
    todo = "after module :: assign x\n    y = 2"
    assert edited(f"import os{eol}x = 1", todo) == f"import os{eol}x = 1{eol}y = 2"
    assert edited(f"x = 1{eol}", todo) == f"x = 1{eol}y = 2{eol}"
    assert edited("x = 1", todo) == "x = 1\ny = 2"


@pytest.mark.parametrize(
    "before, after",
    [
        (
            "class C(\n    A,\n    B,\n):\n    x = 1\n",
            "class C(\n    U,\n    A,\n    B,\n):\n    x = 1\n",
        ),
        ("class C(metaclass=M): x = 1\n", "class C(U, metaclass=M): x = 1\n"),
        ("class C(*bases):\n    x = 1\n", "class C(U, *bases):\n    x = 1\n"),
        ("@d(\n 1)\nclass  C :\n    x = 1\n", "@d(\n 1)\nclass  C(U) :\n    x = 1\n"),
    ],
)
def test_base(before, after):
    assert edited(before, "base C :: U") == after


@pytest.mark.parametrize(
    "before, after",
    [
        ("from m import (\n    A,\n    _u,\n)\n", "from m import (\n    A,\n)\n"),
        ("from m import (\n    A,\n    B,\n    _u\n)\n", "from m import (\n    A,\n    B\n)\n"),
        ("from m import A, _u\n", "from m import A\n"),
        ("from m import (A, B, _u,)\n", "from m import (A, B,)\n"),
        ("from m import A, _u, zeta\n", "from m import A, zeta\n"),
        ("from m import _u, zeta as z\n", "from m import zeta as z\n"),
        ("from m import (\n    A, B, _u,\n)\n", "from m import (\n    A, B,\n)\n"),
        ("from m import zeta, A, _u\n", "from m import zeta, A\n"),
        ("from m import (\r\n    A,\r\n    _u,\r\n)\r\n", "from m import (\r\n    A,\r\n)\r\n"),
    ],
)  # fmt: skip
def test_unimport(before, after):
    assert edited(before, "unimport module :: import m :: _u") == after


@pytest.mark.parametrize(
    "name, code, edit_file, reason",
    [
        ("no scope", "x = 1\n", "before f :: assign x\n    y", "f: before assign x: no class or function f"),
        ("no inner scope", "class C: x = 1\n", "swap C.f :: assign x :: x -> y", "C.f: swap assign x :: x: no class or function f"),
        ("two scopes", "def f(): x = 1\ndef f(): x = 1\n", "before f :: assign x\n    y", "2 definitions of f (lines 1, 2)"),
        ("no statement", "def f():\n    y = 1\n", "before f :: assign x\n    y", "f: assign x: no such statement"),
        ("two statements", "x = 1\nx = 2\n", "before module :: assign x\n    y", "module: assign x: matches more than one statement (lines 1, 2)"),
        ("in an inner function only", "def f():\n    def g():\n        x = 1\n", "before f :: assign x\n    y", "no such statement"),
        ("in the block, not in the header", "if a:\n    x()\n", "before module :: if x\n    y", "no such statement"),
        ("not a call", "x.y\n", "before module :: call x.y\n    y", "no such statement"),
        ("joined before", "a = 1; x = 1\n", "before module :: assign x\n    y", "another statement begins on the same line"),
        ("joined after", "x = 1; a = 1\n", "after module :: assign x\n    y", "another statement follows on the same line"),
        ("on the line of its header", "if a: x = 1\n", "after module :: assign x\n    y", "another statement begins on the same line"),
        ("continued line", "a = 1; \\\nx = 1\n", "before module :: assign x\n    y", "continues into the statement"),
        ("joined at the start", "a = 1; x = 1\ny = 1\n", "wrap module :: assign x :: assign y\n    if z:", "another statement begins on the same line"),
        ("joined at the end", "x = 1\ny = 1; z = 1\n", "wrap module :: assign x :: assign y\n    if z:", "another statement follows on the same line"),
        ("elif", "if a:\n    y\nelif x:\n    z\n", "before module :: if x\n    y", "elif"),
        ("no such expression", "x = 1\n", "swap module :: assign x :: y -> z", "does not occur in the statement (line 1)"),
        ("two such expressions", "x = y + y\n", "swap module :: assign x :: y -> z", "occurs 2 times in the statement (line 1)"),
        ("in an f-string", "x = f'{y}'\n", "swap module :: assign x :: y -> 'z'", "does not occur"),
        ("other formatting of OLD", "x = (a ==  b)\n", "swap module :: assign x :: a == b -> c", "could not be taken back exactly"),
        ("NEW of lower precedence", "x = a.b\n", "swap module :: assign x :: a -> c or d", "could not be taken back exactly"),
        ("wrapped string", 'x = 1\ny = """a\nb"""\n', "wrap module :: assign x :: assign y\n    if z:", "a string that spans lines"),
        ("wrapped f-string", 'x = 1\ny = f"""{a}\n{b}"""\n', "wrap module :: assign x :: assign y\n    if z:", "a string that spans lines"),
        ("wrap across blocks", "x = 1\nif a:\n    y = 1\n", "wrap module :: assign x :: assign y\n    if z:", "same block"),
        ("wrap backwards", "y = 1\nx = 1\n", "wrap module :: assign x :: assign y\n    if z:", "same block"),
        ("base is there", "class C(A, U): x = 1\n", "base C :: U", "already has this base"),
        ("empty parentheses", "class C(): x = 1\n", "base C :: U", "empty parentheses"),
        ("base of a function", "def C(): x = 1\n", "base C :: U", "not a class"),
        ("only name", "from m import _u\n", "unimport module :: import m :: _u", "the only name"),
        ("renamed", "from m import A, _u as v\n", "unimport module :: import m :: _u", "no such `from"),
        ("uneven list", "from m import (\n    A, B,\n    _u,\n)\n", "unimport module :: import m :: _u", "could not be taken back exactly"),
        ("with a comment", "from m import (\n    A,\n    B,  # b\n    _u,\n)\n", "unimport module :: import m :: B", "could not be taken back exactly"),
        ("not Python after", "x = 1\n", "before module :: assign x\n    y =", "after the edits"),
        ("misplaced return", "x = 1\n", "before module :: assign x\n    return", "after the edits"),
        ("before a future import", "from __future__ import annotations\n", "before module :: import __future__\n    import os", "after the edits"),
        ("not Python before", "x = (\n", "before module :: assign x\n    y", "syntax error on line 1"),
        ("null byte", "x = '\0'\n", "before module :: assign x\n    y", "syntax error"),
        ("overlap of swaps", "x = a.b\n", "swap module :: assign x :: a -> c\nswap module :: assign x :: a.b -> d", "overlaps the edit `swap assign x :: a`"),
        ("same point", "x = 1\n", "before module :: assign x\n    y\nbefore module :: assign x\n    z", "overlaps"),
        ("inside a wrap", "x = 1\n\ny = 1\n", "wrap module :: assign x :: assign y\n    if z:\nafter module :: assign x\n    u = 1", "overlaps"),
        ("wrap in a wrap", "x = 1\ny = 1\nz = 1\n", "wrap module :: assign x :: assign y\n    if z:\nwrap module :: assign y :: assign z\n    if a:", "overlaps"),
    ],
)  # fmt: skip
def test_refused(name, code, edit_file, reason):
    assert reason in refusal(code, edit_file)


@pytest.mark.parametrize(
    "edit_file, reason",
    [
        ("replace module :: assign x\n    y", "'replace' is none of before,"),
        ("before module\n    y", "takes 1 fields"),
        ("before module :: assign x", "takes a body"),
        ("base C :: U\n    y", "takes no body"),
        ("base C :: f()", "not a dotted name"),
        ("base C[0] :: U", "not a dotted path"),
        ("before module :: try x\n    y", "no kind of statement"),
        ("before module ::\n    y", "takes 1 fields"),
        ("wrap module :: assign x :: assign y\n    z()", "end with ':'"),
        ("swap module :: assign x :: y", "OLD -> NEW"),
        ("swap module :: assign x :: y -> z z", "'z z' is not an expression"),
        ("swap module :: assign x :: y ->", "OLD -> NEW"),
        ("swap module :: assign x :: a.b -> (a . b)", "different expressions"),
        ("unimport C :: import m :: u", "unimport takes"),
        ("unimport module :: import m :: u.v", "unimport takes"),
        ("# nothing\n", "no edit in the file"),
    ],
)
def test_malformed_edit_file(edit_file, reason):
    with pytest.raises(PatchError, match="^x.edit") as caught:
        edits.read_edits(edit_file, "x.edit")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"# coding: latin-1\nx = '\xe9'\n", "encoded as iso-8859-1"),
        (b"x = '\xe9'\n", "not UTF-8"),
        (b"x = 1\n\n\ny = '\xe9'\n", "not UTF-8"),
        (b"# coding: nonsense\nx = 1\n", "not UTF-8"),
    ],
)
def test_other_encodings(data, reason):
    todo = edits.read_edits("before module :: assign x\n    y", "x.edit")
    for step in (edits.apply, edits.revert):
        with pytest.raises(PatchError, match=reason):
            step(data, todo)


def test_shebang_and_encoding_lines_stay_first():
    code = "#!/usr/bin/python\n# -*- coding: utf-8 -*-\n# about x\nx = 1\n"
    after = edited(code, "before module :: assign x\n    y = 1")
    assert after == code.replace("# about", "y = 1\n# about")


@pytest.mark.parametrize("line", ["if a:\n    b()\n    # of b\n", "a = 1  # of a\n"])
def test_comment_of_another_statement_stays_with_it(line):
    after = edited(f"{line}x = 1\n", "before module :: assign x\n    y = 1")
    assert after == f"{line}y = 1\nx = 1\n"


def test_in_a_match_statement():
    code = "match a:\n    case 1:\n        x = 1\n    case _:\n        pass\n"
    after = edited(code, "after module :: assign x\n    y = 1")
    assert after == code.replace("x = 1\n", "x = 1\n        y = 1\n")


def test_comment_in_a_string_is_not_a_comment():
    code = 'a = """\n# no comment"""\nx = 1\n'
    after = edited(code, "before module :: assign x\n    y = 1")
    assert after == code.replace("x = 1", "y = 1\nx = 1")


def test_changes_elsewhere_survive_both_ways():
    todo = edits.read_edits(
        "\n".join(EDITS[n][0] for n in ("before", "wrap")), "x.edit"
    )

    def change(code: bytes) -> bytes:
        code = code.replace(b"import os\n", b"import os\nimport sys\n")
        code = code.replace(b"total += ", b"print(x)\n                total += ")
        code = code.replace(b'"one"', b'"three"')  # inside the wrapped lines
        return code + b"\n\nx = 1\n"

    before = MODULE.encode()
    assert change(before) != before
    assert change(edits.apply(before, todo)) == edits.apply(change(before), todo)
    assert edits.revert(change(edits.apply(before, todo)), todo) == change(before)


@pytest.mark.parametrize(
    "old, new",
    [
        ("u = 1", "u = 2"),
        ("        u = 1\n\n        v = 2\n", ""),
        ("        v = 2\n", "        v = 2\n        w = 3\n"),
        ("for item in x", "for thing in y"),
        ("if y:\n            b = 2", "if y and x:\n            b = 2"),
        ("            c = a, b\n", "            c = a, b\n            d = 1\n"),
        ("        return total", "        return ("),
        ("        return total", "        for item in x:\n            pass"),
        ("def run(x, y=1)", "def runs(x, y=1)"),
    ],
)
def test_our_lines_changed(old, new):
    todo = edits.read_edits(
        "\n".join(EDITS[n][0] for n in ("before", "wrap")), "x.edit"
    )
    applied = edits.apply(MODULE.encode(), todo).decode()
    assert applied.count(old) == 1
    with pytest.raises(PatchError):
        edits.revert(applied.replace(old, new).encode(), todo)


def test_two_possible_originals_are_refused():
    todo = edits.read_edits("swap module :: call :: a -> b", "x.edit")
    assert edits.revert(b"f(b)\n", todo) == b"f(a)\n"
    with pytest.raises(PatchError, match="more than one original"):
        edits.revert(b"f(b, b)\n", todo)
    with pytest.raises(PatchError, match="taken back"):
        edits.apply_reversibly(b"f(a, b)\n", todo)


class RandomModule:
    """A small module, with edits at places that are there once."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.names = 0
        self.places: list[tuple[str, str]] = []  # scope, pattern
        self.pairs: list[tuple[str, str, str]] = []  # scope, first, last
        self.swaps: list[tuple[str, str, str]] = []  # scope, pattern, expression
        lines = ["from lib import (", "    Zed,", "    _low,", "    alpha,", ")"]
        lines += self.block("module", 0)
        for number in range(self.random.randint(1, 3)):
            base = self.random.choice(["", "(Zed)", "(Zed, metaclass=alpha)"])
            lines += ["", f"class C{number}{base}:"]
            for method in range(self.random.randint(1, 2)):
                lines += [f"    def m{method}(self):"]
                lines += self.block(f"C{number}.m{method}", 2)
        self.classes = number + 1
        eol = self.random.choice(["\n", "\n", "\r\n"])
        self.text = eol.join(lines) + self.random.choice([eol, eol, ""])

    def name(self) -> str:
        self.names += 1
        return f"n{self.names}"

    def block(self, scope: str, depth: int) -> list[str]:
        pick, indent = self.random.random, "    " * depth
        lines, patterns = [], []
        for _ in range(self.random.randint(1, 5)):
            if pick() < 0.3:
                lines.append("")
            if pick() < 0.3:
                lines.append(f"{indent}# é {self.random.randint(0, 2)}")
            a, b = self.name(), self.name()
            if pick() < 0.3 and depth < 4:
                kind, head = self.random.choice(
                    [("if", f"if {a} == {b}:"), ("for", f"for {a} in {b}.x:")]
                )
                patterns.append(f"{kind} {a}")
                lines += [indent + head, *self.block(scope, depth + 1)]
            else:
                form = self.random.choice(
                    ["{a} = 'é', f({b}.x)", "{a} = (\n{i}  {b}.x,\n{i})"]
                )
                lines += (indent + form.format(a=a, b=b, i=indent)).split("\n")
                patterns.append(f"assign {a}")
                self.swaps.append((scope, patterns[-1], f"{b}.x"))
        self.places += [(scope, pattern) for pattern in patterns]
        first = self.random.randrange(len(patterns))
        last = self.random.randrange(first, len(patterns))
        self.pairs.append((scope, patterns[first], patterns[last]))
        return lines

    def edit(self) -> str:
        random, name = self.random, self.name()
        body = random.choice(
            [
                "{0} = 1",
                "{0} = 1\n\n    # é 1",
                "# é 0\n    if {0}:\n        x = 1",
            ]
        )
        body = body.format(name)
        kind = random.choice(["before", "after", "wrap", "swap", "base", "unimport"])
        if kind == "wrap":
            return "wrap {} :: {} :: {}\n    if {}:\n        y = 1\n    else:".format(
                *random.choice(self.pairs), name
            )
        if kind == "swap" and self.swaps:
            new = random.choice(["{0}", "{0}.x", "f(x, {0})"]).format(name)
            return "swap {} :: {} :: {} -> ".format(*random.choice(self.swaps)) + new
        if kind == "base":
            return f"base C{random.randrange(self.classes)} :: {name}"
        if kind == "unimport":
            return f"unimport module :: import lib :: {random.choice(['Zed', '_low', 'alpha'])}"
        kind = random.choice(["before", "before+blank", "after", "after+blank"])
        return "{} {} :: {}\n    ".format(kind, *random.choice(self.places)) + body


def test_random_edits_are_taken_back():
    made = 0
    for seed in range(300):
        module = RandomModule(seed)
        before = module.text.encode()
        todo = edits.read_edits(
            "\n".join(module.edit() for _ in range(module.random.randint(1, 4))), "x"
        )
        try:
            after = edits.apply(before, todo)
        except PatchError as error:
            assert "overlaps" in str(error), (seed, str(error))
            continue
        assert after != before
        ast.parse(after)
        assert edits.revert(after, todo) == before, seed
        made += 1
    assert made > 200


@pytest.mark.skipif(GIT is None, reason="needs git")
def test_diffs_are_what_git_applies(tmp_path):
    pick = random.Random(0)
    files, patch = {}, b""
    for number in range(60):
        old = [b"%d\n" % pick.randint(0, 9) for _ in range(pick.randint(0, 40))]
        new = [line for line in old if pick.random() > 0.1]
        for _ in range(pick.randint(0, 4)):
            new.insert(pick.randint(0, len(new)), b"x\r\n")
        old, new = b"".join(old), b"".join(new)
        if pick.random() < 0.4:
            old, new = old.rstrip(b"\n"), new[:-1] if pick.random() < 0.5 else new
        name = f"d/{number}.py"
        was = None if number % 10 == 0 else old
        if was == new:
            continue
        change = file_diff(name, was, new)
        assert change.new is (was is None)
        patch += change.text
        files[name] = new
        if was is not None:
            write_tree(tmp_path, {name: was})
    empty = file_diff("new/__init__.py", None, b"")
    patch, files["new/__init__.py"] = patch + empty.text, b""
    command = ["git", "apply", "--whitespace=nowarn", "--numstat", "--apply", "-"]
    done = subprocess.run(
        command, cwd=tmp_path, input=patch, check=True, capture_output=True
    )
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert f"{empty.added}\t{empty.removed}\t{empty.path}" in done.stdout.decode()


def test_diff_says_no_more_than_needed():
    change = file_diff("a.py", b"1\n2\n3\n--- x\n", b"1\n+++ y\n3\n4\n")
    assert (change.added, change.removed) == (2, 2)
    same = [b"x\n"] * 300
    change = file_diff("a.py", b"".join(same * 2), b"".join([*same, b"y\n", *same]))
    assert (change.added, change.removed) == (1, 0)
    assert b"\n@@ -0,0 +1,2 @@\n+1\n+2\n" in file_diff("a.py", None, b"1\n2\n").text
    assert b"\n@@ -1 +1 @@\n-1\n+2\n" in file_diff("a.py", b"1\n", b"2\n").text
    assert file_diff("a.py", None, b"").text == (
        b"diff --git a/a.py b/a.py\nnew file mode 100644\n"
        b"index %s..e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\n" % (b"0" * 40)
    )


# A small patch, and a small SGLang that it fits.
MIRROR = {
    "srt/model.py.edit": "before Model.run :: assign x\n    hook(self)\n",
    "srt/backend.py.edit": "base Backend :: Mixin\nbefore module :: class Backend\n"
    "    from sglang.srt.new.hook import Mixin\n",
    "srt/new/hook.py": "class Mixin:\n    pass  \n\n",
    "srt/new/__init__.py": "",
    "srt/extra.py": "x = 1\n",
}
SGLANG = {
    "_version.py": "__version__ = version = '0.5.12'\n",
    "srt/model.py": "class Model:\n    def run(self):\n        x = 1\n        return x\n",
    "srt/backend.py": "class Backend:\n    pass\n",
    "srt/other.py": "y = 1\n",
}


@pytest.fixture
def mirror(tmp_path):
    return write_tree(tmp_path / "mirror", MIRROR)


@pytest.fixture
def tree(tmp_path):
    return make(tmp_path / "target")


def make(folder: Path, package: str = "python/sglang", **changes: str | bytes) -> Path:
    files = {f"{package}/{name}": content for name, content in SGLANG.items()}
    return write_tree(folder, files | changes)


@pytest.fixture
def run(mirror, capfd):
    """Run a subcommand on the small patch; returns status, stdout, stderr."""

    def run(command: str, tree: Path | str, *options: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([command, "--sglang", str(tree), *options], source=mirror)
        return code, *capfd.readouterr()

    return run


def refused(run, tree: Path, reason: str, status: int = 2, apply: int = 2) -> str:
    """apply and status refuse, in one line, and change nothing; returns the line."""
    before = snapshot(tree)
    code, out, err = run("apply", tree)
    assert (code, out) == (apply, "")
    assert err.count("\n") == 1 and err.startswith("cannot apply: ")
    assert reason in err
    code, out, said = run("status", tree)
    assert code == status
    assert reason in (said if status == 2 else out)
    assert snapshot(tree) == before
    return err


@pytest.mark.parametrize("package", ["python/sglang", "sglang"])
def test_round_trip(run, tmp_path, package):
    tree = make(tmp_path / "t", package)
    before = snapshot(tree)
    assert run("status", tree)[0] == 1
    code, diff, _ = run("build", tree)
    assert code == 0 and f"+++ b/{package}/srt/model.py\n" in diff
    assert snapshot(tree) == before

    code, out, err = run("apply", tree)
    assert (code, err) == (0, "")
    assert f"M {package}/srt/model.py  +1 -0\n" in out
    assert f"A {package}/srt/new/hook.py  +3 -0\n" in out
    assert "applied: 5 files, +7 -1 (SGLang 0.5.12 in " in out
    after = snapshot(tree)
    assert after.keys() - before.keys() == {
        f"{package}/srt/{name}"
        for name in ("new", "new/__init__.py", "new/hook.py", "extra.py")
    }
    backend = (tree / package / "srt/backend.py").read_text()
    assert backend == (
        "from sglang.srt.new.hook import Mixin\nclass Backend(Mixin):\n    pass\n"
    )
    assert run("status", tree)[0] == 0
    assert run("build", tree)[1] == diff

    code, out, err = run("apply", tree)
    assert (code, err) == (0, "") and out.startswith("already applied")
    assert snapshot(tree) == after

    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before
    code, out, _ = run("revert", tree)
    assert code == 0 and out.startswith("not applied")
    assert snapshot(tree) == before


TESTS = {
    "test/registered/mla/test_it.py": "import mla_standin\n",
    "test/mla_standin/kernels.py": "y = 2\n",
    "test/mla_standin/models.py": "z = 3\n",
}


@pytest.fixture
def with_tests(tmp_path, capfd):
    """`run` on a patch that has tests for a checkout."""
    mirror = {f"python/sglang/{name}": content for name, content in MIRROR.items()}
    here = {"test/test_here.py": "", "test/e2e/load.py": "", "test/mla_standin/.x": ""}
    source = write_tree(tmp_path / "project", mirror | TESTS | here) / "python/sglang"

    def run(command: str, tree: Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([command, "--sglang", str(tree)], source=source)
        return code, *capfd.readouterr()

    return run


def test_tests_go_into_a_checkout(with_tests, tmp_path):
    theirs = {"test/registered/mla/test_other.py": "", "test/run_suite.py": "x = 1\n"}
    tree = repository(make(tmp_path / "t", **theirs))
    before = snapshot(tree)
    diff = with_tests("build", tree)[1]
    assert with_tests("apply", tree)[0] == 0
    assert {name: (tree / name).read_text() for name in TESTS} == TESTS
    assert len(git(tree, "status", "--porcelain", "-uall").splitlines()) == 5 + 3
    assert with_tests("status", tree)[0] == 0
    assert with_tests("build", tree)[1] == diff
    after = snapshot(tree)
    # What running them leaves behind goes with them.
    compiled = {"test/mla_standin/__pycache__/kernels.cpython-311.pyc": b""}
    write_tree(tree, compiled)
    assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before
    subprocess.run(["git", "apply"], cwd=tree, input=diff, check=True, text=True)
    assert snapshot(tree) == after


def test_no_tests_for_a_package_folder(with_tests, tmp_path):
    installed = make(tmp_path / "site-packages", "sglang")
    assert with_tests("apply", installed)[0] == 0
    assert not (installed / "test").exists()

    # The package in a checkout, by either path.
    tree = make(tmp_path / "t")
    before = snapshot(tree)
    assert with_tests("apply", tree / "python")[0] == 0
    assert not (tree / "test").exists()
    assert with_tests("status", tree)[0] == 0
    assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before
    assert with_tests("apply", tree)[0] == 0
    assert with_tests("revert", tree / "python")[0] == 0
    assert with_tests("status", tree)[0] == 1
    assert with_tests("apply", tree)[0] == 0
    assert with_tests("revert", tree)[0] == 0
    assert snapshot(tree) == before


@pytest.mark.parametrize("name", TESTS)
def test_tests_that_are_changed_or_gone(with_tests, tmp_path, name):
    tree = make(tmp_path / "t", **{name: "other\n"})
    refused(with_tests, tree, f"{name}: a file that the patch adds is already there")
    (tree / name).unlink()
    assert with_tests("apply", tree)[0] == 0
    write_tree(tree, {name: TESTS[name] + "more\n"})
    before = snapshot(tree)
    for command, status, said in (("status", 3, 1), ("revert", 3, 2)):
        done = with_tests(command, tree)
        assert done[0] == status and f"{name}: a file that the patch" in done[said]
        assert snapshot(tree) == before
    # Nothing that serves is missing.
    (tree / name).unlink()
    assert with_tests("status", tree)[0] == 0
    assert with_tests("revert", tree)[0] == 0
    assert not any((tree / name).exists() for name in TESTS)


def test_paths_that_name_a_target(run, tmp_path):
    installed = make(tmp_path / "lib/site-packages", "sglang")
    checkout = make(tmp_path / "checkout")
    for given in (
        installed,
        installed / "sglang",
        checkout,
        checkout / "python/sglang",
    ):
        code, out, _ = run("build", given)
        prefix = "python/" if given == checkout else ""
        assert code == 0 and f"--- a/{prefix}sglang/srt/model.py\n" in out


def test_build_to_a_file(run, tree, tmp_path):
    code, out, _ = run("build", tree, "-o", str(tmp_path / "out.diff"))
    assert (code, out) == (0, "")
    assert (tmp_path / "out.diff").read_text() == run("build", tree)[1]
    code, _, err = run("build", tree, "-o", str(tmp_path / "no/out.diff"))
    assert code == 2 and "no/out.diff: No such file" in err


@pytest.mark.parametrize(
    "given, reason",
    [
        ("", "no such folder, nor a release number such as"),
        ("nowhere", "'nowhere': no such folder, nor a release number such as"),
        ("/", "not an SGLang tree; give a git checkout"),
        (__file__, "not an SGLang tree; give a git checkout"),
    ],
)
@pytest.mark.parametrize("command", ["build", "apply", "revert", "status"])
def test_not_a_target(run, command, given, reason):
    code, out, err = run(command, given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("cannot ") and reason in err


@pytest.mark.parametrize(
    "files, version",
    [
        ({"sglang/_version.py": "__version__ = version = '1.2'\n"}, "1.2"),
        ({"sglang/version.py": "__version__ = '1.3'\n"}, "1.3"),
        (
            {
                "sglang/version.py": "try:\n    import x\nexcept: __version__ = '0.0'\n",
                "sglang-1.4.dist-info/METADATA": "Name: sglang\nVersion: 1.4\n\n",
            },
            "1.4",
        ),
        ({"sglang/_version.py": "(\n"}, "unknown"),
    ],
)
def test_version(tmp_path, files, version):
    write_tree(tmp_path, {"sglang/srt/x.py": "", **files})
    assert target.open_target(tmp_path).version == version


def git(folder: Path, *options: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgSign=false")
    command = ["git", *identity, *options]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def repository(folder: Path) -> Path:
    git(folder, "init", "-q")
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-qm", "m")
    return folder


def test_version_of_a_checkout_from_its_tag(tree):
    (tree / "python/sglang/_version.py").unlink()
    assert target.open_target(tree).version == "unknown"
    git(repository(tree), "tag", "v0.5.12.post7")
    assert target.open_target(tree).version == "0.5.12.post7"


def test_missing_and_ambiguous_places(run, tree):
    model = tree / "python/sglang/srt/model.py"
    original = model.read_text()
    where = "python/sglang/srt/model.py: Model.run: assign x: "
    model.write_text(original.replace("x = 1", "z = 1"))
    line = refused(run, tree, where + "no such statement (SGLang 0.5.12)\n")
    assert line == f"cannot apply: {where}no such statement (SGLang 0.5.12)\n"
    model.write_text(original.replace("x = 1", "x = 1\n        x = 2"))
    refused(run, tree, where + "matches more than one statement (lines 3, 4) (SGLang")
    model.write_text(original.replace("def run", "def go"))
    refused(run, tree, "Model.run: before assign x: no class or function run")
    model.write_text(original + "(\n")
    refused(run, tree, "python/sglang/srt/model.py: syntax error on line 5")
    model.write_bytes(original.encode() + b"# \xe9\n")
    refused(run, tree, "python/sglang/srt/model.py: not UTF-8")
    model.unlink()
    refused(run, tree, "python/sglang/srt/model.py: no such file (SGLang")
    model.mkdir()
    refused(run, tree, "python/sglang/srt/model.py: not a regular file")


def test_new_file_is_there_already(run, tree):
    extra = tree / "python/sglang/srt/extra.py"
    extra.write_text("x = 2\n")
    refused(
        run, tree, "srt/extra.py: a file that the patch adds is already there, with"
    )
    extra.write_text("x = 1\n")  # just as the patch has it
    refused(run, tree, "though other files are", status=3)


def test_what_cannot_be_taken_back_is_not_applied(run, mirror, tree):
    swap = "swap Model.run :: assign x :: a != b -> c\n"
    write_tree(mirror, {"srt/model.py.edit": swap})
    model = tree / "python/sglang/srt/model.py"
    model.write_text(SGLANG["srt/model.py"].replace("x = 1", "x = (a  != b)"))
    refused(run, tree, "srt/model.py: could not be taken back exactly (SGLang")
    model.write_text(SGLANG["srt/model.py"].replace("x = 1", "x = a != b"))
    assert run("apply", tree)[0] == 0


def test_upstream_hook(run, tree):
    model = tree / "python/sglang/srt/model.py"
    model.write_text("def prepare_prefill_qkv(): pass\n")
    refused(run, tree, "srt/model.py: SGLang 0.5.12 already has a prefill hook")
    # Also where every place of ours is to be found.
    model.write_text(SGLANG["srt/model.py"] + "        prepare_prefill_qkv()\n")
    refused(run, tree, "srt/model.py: SGLang 0.5.12 already has a prefill hook")
    code, _, err = run("revert", tree)
    assert code == 2 and err.startswith(
        "cannot revert: python/sglang/srt/model.py: SGL"
    )


def test_partly_applied(run, tree):
    original = snapshot(tree)
    assert run("apply", tree)[0] == 0
    srt = tree / "python/sglang/srt"
    applied = {path: path.read_bytes() for path in srt.rglob("*.py")}

    def only(path: str, data: bytes | None, reason: str) -> None:
        if data is None:
            (srt / path).unlink()
        else:
            (srt / path).write_bytes(data)
        refused(run, tree, reason, status=3)
        before = snapshot(tree)
        code, out, err = run("revert", tree)
        assert (code, out) == (3, "") and reason in err
        assert run("build", tree)[0] == 2
        assert snapshot(tree) == before
        (srt / path).write_bytes(applied[srt / path])

    only(
        "model.py", SGLANG["srt/model.py"].encode(), "srt/model.py: not edited, though"
    )
    only("model.py", None, "python/sglang/srt/model.py: no such file")
    only("extra.py", None, "python/sglang/srt/extra.py: not there, though")
    only("extra.py", b"x = 2\n", "srt/extra.py: a file that the patch adds is already")
    backend = applied[srt / "backend.py"]
    only(
        "backend.py",
        backend.replace(b"(Mixin)", b""),
        "srt/backend.py: Backend: base Mixin: partly applied, or changed since: the",
    )
    only(
        "backend.py",
        backend.replace(b"sglang.srt.new.hook import Mixin", b"x import Mixin"),
        "srt/backend.py: module: before class Backend: partly applied, or changed",
    )
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == original


def test_local_changes_survive(run, tree):
    srt = tree / "python/sglang/srt"
    (srt / "model.py").write_text("import os\n\n" + SGLANG["srt/model.py"])
    assert run("apply", tree)[0] == 0
    assert "import os\n\nclass Model" in (srt / "model.py").read_text()
    with open(srt / "backend.py", "a") as file:
        file.write("\n\nlast = 1\n")
    assert run("status", tree)[0] == 0
    assert run("revert", tree)[0] == 0
    assert (srt / "model.py").read_text() == "import os\n\n" + SGLANG["srt/model.py"]
    assert (srt / "backend.py").read_text() == SGLANG["srt/backend.py"] + (
        "\n\nlast = 1\n"
    )


def test_bytecode_and_folders_go_with_the_new_files(run, tree):
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    srt = tree / "python/sglang/srt"
    command = [sys.executable, "-m", "compileall", "-q", str(srt / "new")]
    subprocess.run([*command, str(srt / "extra.py")], check=True)
    assert len(list(srt.rglob("*.pyc"))) == 3
    assert run("status", tree)[0] == 0
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before

    assert run("apply", tree)[0] == 0
    (srt / "new/mine.py").write_text("")
    assert run("revert", tree)[0] == 0
    assert os.listdir(srt / "new") == ["mine.py"]


def test_modes_and_hard_links(run, tree, tmp_path, monkeypatch):
    srt = tree / "python/sglang/srt"
    os.link(srt / "model.py", tmp_path / "cached.py")
    (srt / "model.py").chmod(0o600)
    (srt / "backend.py").chmod(0o775)
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    for name in ("model.py", "backend.py"):
        path = f"python/sglang/srt/{name}"
        assert snapshot(tree)[path][0] == before[path][0]
    assert (tmp_path / "cached.py").read_text() == SGLANG["srt/model.py"]
    os.link(srt / "model.py", tmp_path / "patched.py")
    replaced = []

    def replace(new, old, real=os.replace):
        replaced.append((Path(new).stat().st_mode, Path(old).stat().st_mode))
        real(new, old)

    monkeypatch.setattr(os, "replace", replace)
    assert run("revert", tree)[0] == 0
    # At no moment is there a file of another mode.
    assert len(replaced) == 2 and all(new == old for new, old in replaced)
    assert snapshot(tree) == before
    assert (tmp_path / "patched.py").read_text() != SGLANG["srt/model.py"]


@pytest.mark.parametrize("eol, end", [("\r\n", ""), ("\r\n", "\r\n"), ("\n", "")])
@pytest.mark.parametrize("autocrlf", [None, "true", "input"])
def test_line_ends(run, tree, eol, end, autocrlf):
    srt = tree / "python/sglang/srt"
    for name in ("model.py", "backend.py"):
        code = SGLANG[f"srt/{name}"].rstrip("\n").replace("\n", eol) + end
        (srt / name).write_bytes(code.encode())
    if autocrlf:
        repository(tree)
        git(tree, "config", "core.autocrlf", autocrlf)
        git(tree, "config", "apply.whitespace", "fix")
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    model = (srt / "model.py").read_bytes()
    assert model.count(b"\r\n") == (model.count(b"\n") if "\r" in eol else 0)
    assert model.endswith(b"return x" + end.encode())
    assert run("status", tree)[0] == 0
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before


def test_attributes_that_convert_are_noticed(run, tree):
    (tree / ".gitattributes").write_text("*.py text eol=crlf\n")
    repository(tree)
    before = snapshot(tree)
    code, _, err = run("apply", tree)
    assert code == 2 and "git apply left other bytes" in err
    assert snapshot(tree) == before


def test_settings_of_the_user_change_nothing(run, tree, tmp_path, monkeypatch):
    home = write_tree(
        tmp_path / "home",
        {".gitconfig": "[nonsense\n", ".config/git/attributes": "*.py text eol=crlf\n"},
    )
    repository(tree)
    git(tree, "config", "core.eol", "crlf")
    write_tree(tree, {".gitattributes": "*.py text=auto\n"})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert run("apply", tree)[::2] == (0, "")
    assert b"\r" not in (tree / "python/sglang/srt/model.py").read_bytes()


@pytest.mark.parametrize("place", ["venv/lib/site-packages", "sub"])
@pytest.mark.parametrize("ignored", [True, False])
def test_inside_another_repository(run, tmp_path, monkeypatch, place, ignored):
    outer = write_tree(tmp_path / "outer", {".gitignore": "venv\nsub\n" * ignored})
    tree = make(outer / place, "sglang")
    repository(outer)
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(outer))
    monkeypatch.chdir(outer / place)
    before = snapshot(outer)
    assert run("apply", tree)[0] == 0
    assert run("status", tree)[0] == 0
    assert snapshot(outer) != before
    assert run("revert", tree)[0] == 0
    assert snapshot(outer) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a tree away")
def test_repository_of_another_user(run, tree):
    repository(tree)
    for top, folders, names in os.walk(tree):
        for name in (".", *folders, *names):
            os.chown(Path(top, name), 12345, 12345)
    before = snapshot(tree)
    assert run("apply", tree)[0] == 0
    assert (tree / "python/sglang/srt/model.py").stat().st_uid == 12345
    assert run("revert", tree)[0] == 0
    assert snapshot(tree) == before
    assert (tree / "python/sglang/srt/model.py").stat().st_uid == 12345


@pytest.mark.parametrize("name", ["srt/model.py", "srt/backend.py", "srt/new", "srt"])
@pytest.mark.parametrize("inside", [True, False])
def test_symbolic_links(run, tree, tmp_path, name, inside):
    link = tree / "python/sglang" / name
    elsewhere = (tree if inside else tmp_path) / "elsewhere"
    if link.exists():
        link.rename(elsewhere)
    else:
        elsewhere.mkdir()
    link.symlink_to(elsewhere)
    before = snapshot(tmp_path)
    refused(run, tree, f"python/sglang/{name}: a symbolic link to {elsewhere}")
    assert snapshot(tmp_path) == before


def test_target_given_through_a_link(run, tree, tmp_path):
    for name, folder in (("link", tree), ("other", tree / "python/sglang")):
        (tmp_path / name).symlink_to(folder)
        assert run("apply", tmp_path / name)[0] == 0
        assert run("status", tmp_path / name)[0] == 0
        assert run("revert", tmp_path / name)[0] == 0


def test_without_git(run, tree, monkeypatch):
    diff = run("build", tree)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "")
        refused(run, tree, "git is not on PATH")
        assert run("build", tree) == diff
    assert run("apply", tree)[0] == 0
    monkeypatch.setenv("PATH", "")
    assert run("status", tree)[0] == 0
    assert run("revert", tree)[0] == 0
    assert run("build", tree) == diff


def as_nobody(function) -> int:
    """The exit status of `function` in a child process that may not write anything."""
    child = os.fork()
    if not child:
        status = 99
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def open_folder():
    """A folder that every user may enter; pytest's own are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("folder", ["srt", "srt/new", "srt/models"])
def test_read_only(open_folder, folder, capfd):
    tree = make(open_folder / "target")
    mirror = write_tree(open_folder / "mirror", MIRROR)
    if folder == "srt/models":  # as if one edited file were elsewhere
        (mirror / "srt/models").mkdir()
        (mirror / "srt/model.py.edit").rename(mirror / "srt/models/model.py.edit")
        write_tree(tree, {"python/sglang/srt/models/model.py": SGLANG["srt/model.py"]})
    package = tree / "python/sglang"
    (package / folder).mkdir(exist_ok=True)
    for path in (package, *package.rglob("*")):
        if path.is_dir():
            path.chmod(0o555 if path == package / folder else 0o777)
    before = snapshot(tree)

    def call(name: str) -> int:
        return as_nobody(lambda: main([name, "--sglang", str(tree)], source=mirror))

    for name in ("apply", "status"):
        capfd.readouterr()
        assert call(name) == 2
        said = f": the folder python/sglang/{folder} is read-only (SGLang 0.5.12)\n"
        assert said in capfd.readouterr().err
        assert snapshot(tree) == before
    if os.geteuid() == 0:
        assert main(["apply", "--sglang", str(tree)], source=mirror) == 0
        applied = snapshot(tree)
        assert call("status") == 0
        capfd.readouterr()
        assert call("revert") == 2
        assert "is read-only" in capfd.readouterr().err
        assert snapshot(tree) == applied


@pytest.mark.parametrize("path", ["", "python/sglang/srt"])
def test_unreadable(open_folder, path, capfd):
    tree = make(open_folder / "target")
    mirror = write_tree(open_folder / "mirror", MIRROR)
    (tree / path).chmod(0o000)
    status = as_nobody(lambda: main(["apply", "--sglang", str(tree)], source=mirror))
    (tree / path).chmod(0o755)
    out, err = capfd.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "cannot be read: Permission denied" in err


def other_git(folder: Path, script: str) -> str:
    """A PATH on which git is a script, with the real one as $GIT."""
    folder.mkdir()
    code = f"#!/bin/sh\nGIT={GIT}\ncheck=no\n"
    code += 'for one in "$@"; do [ "$one" = --check ] && check=yes; done\n'
    code += f'[ $check = yes ] && exec $GIT "$@"\n{script}\n'
    (folder / "git").write_text(code)
    (folder / "git").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            '$GIT "$@" --include="*/new/*"\nexit 1',
            "git apply failed: without a message",
        ),
        ('$GIT "$@" --include="*/model.py"\nkill -9 $$', "git apply failed"),
        ('$GIT "$@" --include="*/new/*"', "git apply left other bytes"),
        ("cat > /dev/null", "git apply left other bytes"),
        ('$GIT "$@"\necho >> python/sglang/srt/extra.py', "git apply left other bytes"),
        ('$GIT "$@"\nrm -r python/sglang/srt/model.py', "git apply left other bytes"),
        ("echo one >&2; echo two >&2; exit 1", "git apply failed: one; two (SGLang"),
    ],
)
def test_apply_fails_half_way(run, tree, tmp_path, monkeypatch, script, reason):
    (tree / "python/sglang/srt/model.py").chmod(0o640)
    before = snapshot(tree)
    monkeypatch.setenv("PATH", other_git(tmp_path / "bin", script))
    code, out, err = run("apply", tree)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert snapshot(tree) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_apply_is_interrupted(mirror, tree, tmp_path, name):
    before = snapshot(tree)
    # The signal comes when one file is written and the others are not, and like a
    # terminal's Ctrl-C to the whole process group.
    script = (
        f'cat > {tmp_path}/diff\n$GIT "$@" --include="*/model.py" < {tmp_path}/diff\n'
        f"kill -{name[3:]} -$PPID\nsleep 0.3\n"
        f'$GIT "$@" --exclude="*/model.py" < {tmp_path}/diff\n'
    )
    environment = os.environ | {"PATH": other_git(tmp_path / "bin", script)}
    # A background shell hands on an ignored SIGINT, nohup an ignored SIGHUP.
    handler = "default_int_handler" if name == "SIGINT" else "SIG_DFL"
    code = (
        "import signal, sys; from pathlib import Path; from prefill_patch.cli import "
        f"main; signal.signal(signal.{name}, signal.{handler}); "
        "sys.exit(main(sys.argv[2:], source=Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, mirror, "apply", "--sglang", tree],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        capture_output=True,
        text=True,
    )
    number = getattr(signal, name)
    assert done.returncode == (130 if name == "SIGINT" else -number), done.stderr
    assert "Traceback" not in done.stderr
    found = inspect(Patch.load(mirror), target.open_target(tree))
    assert found.state is State.APPLIED
    install.revert(found)
    assert snapshot(tree) == before


@pytest.mark.parametrize("calls", range(1, 6))
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_revert_fails_half_way(run, tree, monkeypatch, calls, failure):
    assert run("apply", tree)[0] == 0
    before = snapshot(tree)
    left = calls

    def failing(real):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise failure
            return real(*args, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing(os.replace))
        patched.setattr(Path, "unlink", failing(Path.unlink))
        code, _, err = run("revert", tree)
    assert left <= 0
    assert code == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert "Traceback" not in err
    assert snapshot(tree) == before
    assert run("revert", tree)[0] == 0


def test_rollback_that_fails_is_told(run, tree, tmp_path, monkeypatch):
    script = '$GIT "$@" --include="*/model.py"\nexit 1'
    monkeypatch.setenv("PATH", other_git(tmp_path / "bin", script))

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run("apply", tree)
    assert code == 2 and "putting back what was there failed too: disk full" in err
    monkeypatch.undo()
    assert run("status", tree)[0] == 3


def test_git_that_hangs(run, tree, tmp_path, monkeypatch):
    before = snapshot(tree)
    script = '$GIT "$@" --include="*/model.py"\nexec sleep 60'
    monkeypatch.setenv("PATH", other_git(tmp_path / "bin", script))
    monkeypatch.setattr(install, "_GIT_SECONDS", 1)
    code, _, err = run("apply", tree)
    assert code == 2 and "timed out" in err
    assert snapshot(tree) == before


def test_mirror_mistakes_are_named(run, mirror, tree):
    write_tree(mirror, {"srt/model.py": "x = 1\n"})
    code, _, err = run("status", tree)
    assert code == 2 and "both new and edited: srt/model.py" in err
    write_tree(mirror, {"srt/model.py.edit": "\n\nnonsense\n"})
    code, _, err = run("status", tree)
    assert code == 2 and "srt/model.py.edit:3: 'nonsense' is none of" in err


def test_what_the_mirror_ignores(mirror):
    write_tree(mirror, {"srt/__pycache__/x.pyc": "", "srt/.x.swp": "", ".y/z.py": ""})
    assert sorted(Patch.load(mirror).files) == [
        "srt/extra.py",
        "srt/new/__init__.py",
        "srt/new/hook.py",
    ]


def test_round_trip_on_each_release(tmp_path, capsys):
    built = []
    for version in RELEASES:
        tree = copy_release(version, tmp_path / version)
        before = snapshot(tree)
        found = target.open_target(tree)
        assert found.version == version
        patch = Patch.load()
        built.append(build(patch, found))
        assert main(["apply", "--sglang", str(tree)]) == 0
        assert main(["status", "--sglang", str(tree)]) == 0
        assert build(patch, found) == built[-1]
        assert main(["revert", "--sglang", str(tree)]) == 0
        assert snapshot(tree) == before
    assert built[0] == built[1]
    parts = (patch.edits, patch.files, patch.tests)
    assert built[0].count(b"diff --git") == sum(map(len, parts))


def unparsed(code: str) -> str:
    return ast.unparse(ast.parse(code)) + "\n"


def shifted(code: str) -> str:
    """A function more before each function, method and class."""
    lines = code.splitlines(keepends=True)
    tree = ast.parse(code)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    inner = [one for node in classes for one in node.body]
    defined = (ast.ClassDef, ast.FunctionDef)
    places = [one for one in tree.body + inner if isinstance(one, defined)]
    places.sort(key=lambda one: one.lineno, reverse=True)
    for node in places:
        first = min(one.lineno for one in (node, *node.decorator_list))
        indent = " " * node.col_offset
        lines[first - 1 : first - 1] = [f"{indent}def added():\n{indent}    pass\n\n"]
    return "".join(lines)


def black(width: int, *options: str):
    def reformat(code: str) -> str:
        command = [sys.executable, "-m", "black", "-q", f"-l{width}", *options, "-"]
        done = subprocess.run(command, input=code, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return reformat


FORMATS = {
    "unparsed": unparsed,
    "shifted": shifted,
    "CRLF": lambda code: code.replace("\n", "\r\n"),
    "no final newline": lambda code: code.rstrip("\n"),
    "black 50": black(50, "--fast"),
    "black 160, joined": black(160, "--fast", "--skip-magic-trailing-comma"),
}


def program(code: str) -> str:
    """What a file says, less what `FORMATS` adds and what black changes in the tree:
    the indentation of docstrings, parentheses after `del`."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            node.body = [
                one for one in node.body if getattr(one, "name", "") != "added"
            ]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.Delete) and isinstance(node.targets[0], ast.Tuple):
            node.targets = node.targets[0].elts
    return ast.dump(tree)


@pytest.fixture(scope="module")
def patched_release(tmp_path_factory):
    tree = copy_release("0.5.12.post1", tmp_path_factory.mktemp("patched"))
    assert main(["apply", "--sglang", str(tree)]) == 0
    return tree


# Both releases have the same bytes in the edited files; one is enough here.
@pytest.mark.parametrize("form", FORMATS)
def test_release_in_other_formats(tmp_path, patched_release, form):
    tree = copy_release("0.5.12.post1", tmp_path)
    for file in edited_files(tree):
        code = file.read_bytes()
        file.write_bytes(FORMATS[form](code.decode()).encode())
        assert file.read_bytes() != code
    before = snapshot(tree)
    assert main(["apply", "--sglang", str(tree)]) == 0
    assert main(["status", "--sglang", str(tree)]) == 0
    for file, plain in zip(edited_files(tree), edited_files(patched_release)):
        one, other = (path.read_text(encoding="utf-8") for path in (file, plain))
        assert program(one) == program(other)
    assert main(["revert", "--sglang", str(tree)]) == 0
    assert snapshot(tree) == before


def command(*args, cwd: Path = ROOT, isolated: bool = False, **options):
    if isolated:
        # Without site-packages: the standard library is enough.
        python = [sys.executable, "-I", "-S", str(ROOT / "prefill_patch")]
    else:
        python = [sys.executable, "-m", "prefill_patch"]
    return subprocess.run([*python, *args], cwd=cwd, capture_output=True, **options)


def test_git_apply_of_the_built_file_equals_apply(tmp_path):
    by_git = repository(copy_release("0.5.12.post1", tmp_path / "by_git"))
    ours = repository(copy_release("0.5.12.post1", tmp_path / "ours"))
    built = command("build", "--sglang", str(by_git))
    assert built.returncode == 0, built.stderr
    original = snapshot(by_git)
    for options in (["--check", "--whitespace=error-all"], []):
        subprocess.run(
            ["git", "apply", *options], cwd=by_git, input=built.stdout, check=True
        )
    done = command("apply", "--sglang", str(ours))
    assert done.returncode == 0, done.stderr
    assert snapshot(by_git) == snapshot(ours) != original
    assert git(by_git, "diff", "HEAD") == git(ours, "diff", "HEAD")

    # What git applied is taken back, and the other way round.
    assert command("revert", "--sglang", str(by_git)).returncode == 0
    subprocess.run(["git", "apply", "-R"], cwd=ours, input=built.stdout, check=True)
    assert snapshot(by_git) == snapshot(ours) == original
    assert git(by_git, "status", "--porcelain") == ""


def test_command_from_anywhere_on_an_installed_release(tmp_path):
    packages = tmp_path / "site-packages"
    copy_release("0.5.12", packages, "sglang")
    (packages / "sglang/_version.py").unlink()
    info = {"sglang-0.5.12.dist-info/METADATA": "Name: sglang\nVersion: 0.5.12\n"}
    before = snapshot(write_tree(packages, info))
    calls = [
        ("status", 1, "not applied (SGLang 0.5.12 in"),
        ("apply", 0, "A sglang/srt/layers/attention/mla_fp8_prefill.py  +"),
        ("status", 0, "applied (SGLang 0.5.12 in"),
        ("apply", 0, "already applied"),
        ("revert", 0, "reverted: "),
    ]
    for name, status, said in calls:
        done = command(
            name, "--sglang", "site-packages/sglang", cwd=tmp_path, isolated=True
        )
        assert (done.returncode, done.stderr) == (status, b"")
        assert said in done.stdout.decode()
    assert snapshot(packages) == before


def test_whole_release_round_trip(tmp_path):
    tree = copy_release("0.5.12.post1", tmp_path / "t", whole=True)
    before = snapshot(tree)
    assert len(before) > 2000
    for name, status in (("apply", 0), ("status", 0), ("revert", 0), ("status", 1)):
        assert command(name, "--sglang", str(tree)).returncode == status
    assert snapshot(tree) == before


def test_release_by_number(tmp_path):
    done = command("build", "--sglang", "0.5.12.post1")
    assert done.returncode == 0, done.stderr
    tree = copy_release("0.5.12.post1", tmp_path / "t")
    assert done.stdout == build(Patch.load(), target.open_target(tree))


def test_release_with_a_hook():
    for name in ("build", "apply", "status", "revert"):
        done = command(name, "--sglang", "0.5.13", text=True)
        assert (done.returncode, done.stdout) == (2, "")
        line = done.stderr.splitlines()[-1]
        assert "SGLang 0.5.13 already has a prefill hook (prepare_prefill_qkv)" in line


def test_reader_of_the_diff_that_stops():
    code = f"{sys.executable} -m prefill_patch build --sglang 0.5.12.post1 | head -c 5"
    done = subprocess.run(code, cwd=ROOT, shell=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"diff ", b"")


def test_unknown_release(monkeypatch, tmp_path, run):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, err = run("status", "0.0.0.dev99")
    line = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert line.startswith(
        "cannot apply: SGLang 0.0.0.dev99: pip could not get the whe"
    )
    assert list((tmp_path / "cache").rglob("*")) == [
        tmp_path / "cache/sglang-fp8-prefill"
    ]


def test_wheel_for_another_host(tmp_path, monkeypatch):
    """Where pip finds no wheel for this host, the one for Linux on x86-64 does."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*--platform=*) exec {sys.executable} "$@";;\n'
        '*) echo "ERROR: No matching distribution" >&2; exit 1;;\nesac\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    folder = target.fetch_release("0.5.12", tmp_path / "cache")
    assert folder == tmp_path / "cache/sglang-0.5.12"
    assert os.listdir(tmp_path / "cache") == ["sglang-0.5.12"]
    found = target.open_target(folder)
    assert (found.package, found.version) == ("python/sglang", "0.5.12")
    usual = target.fetch_release("0.5.12")
    for name in ("version.py", "srt/layers/radix_attention.py"):
        one, other = (path / "python/sglang" / name for path in (folder, usual))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["sglang/../../x.py", "/x.py", "sglang/..\\x.py"])
def test_wheel_that_leaves_its_folder(tmp_path, name):
    wheel = tmp_path / "sglang-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sglang/__init__.py", "")
        archive.writestr(name, "x = 1\n")
    with pytest.raises(PatchError, match="unsafe path"):
        target._extract(wheel, tmp_path / "out/python")
    assert not list(tmp_path.rglob("x.py"))


def test_file_that_is_no_wheel(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"<html>")
    with pytest.raises(PatchError, match="x.whl: not a wheel"):
        target._extract(tmp_path / "x.whl", tmp_path / "out")


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(PatchError, match="SGLang 0.5.12: cannot be cached"):
        target.fetch_release("0.5.12", tmp_path / "cache/x")
