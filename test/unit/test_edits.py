"""The edits of upstream files: where they go, what is refused, and the way back."""

import random
import sys
import textwrap

import pytest

from prefill_patch import edits
from prefill_patch.errors import PatchError

MODULE = """\
# license

import os
from lib import (
    Alpha,
    Beta,
    _gamma,
)

from pkg.early import a
# about late
from pkg.late import z

if os.name:
    extra = 1


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
            "one",
            "two",
        )

        c = a, b
        return total

    async def wait(self):
        def run():
            return 1

        try:
            held = run()
        except ValueError:
            assert self.done, "é"; self.count = 0
"""
WRAPPED = MODULE[
    MODULE.index("        # about b") : MODULE.index("        return total")
]

# name -> an edit, and what it puts in the place of which text
EDITS = {
    "before": (
        "before Node.run :: for item x\n    print(1)\n\n    print(2)",
        "        # loop over all\n",
        "        print(1)\n\n        print(2)\n        # loop over all\n",
    ),
    "before+blank": (
        "before+blank Node.run :: assign a !c\n    print(1)",
        "        a = 1\n",
        "        print(1)\n\n        a = 1\n",
    ),
    "before a decorated function": (
        "before Node :: def run\n    print(1)",
        "    # about run\n",
        "    print(1)\n    # about run\n",
    ),
    "before, a body that ends in a comment": (
        "before Node.run :: return\n    print(1)\n    # more",
        "        return total\n",
        "        print(1)\n        # more\n        return total\n",
    ),
    "after": (
        "after Node.run :: assign total torch.zeros item.shape dtype\n    print(1)",
        "dtype=y)  # note\n",
        "dtype=y)  # note\n                print(1)\n",
    ),
    "after a compound statement": (
        "after Node.run :: for item\n    print(1)",
        'device="cpu")\n',
        'device="cpu")\n        print(1)\n',
    ),
    "after, in a branch of the module": (
        "after module :: assign extra\n    print(1)",
        "    extra = 1\n",
        "    extra = 1\n    print(1)\n",
    ),
    "an inner function": (
        "before Node.wait.run :: return\n    print(1)",
        "            return 1\n",
        "            print(1)\n            return 1\n",
    ),
    "wrap": (
        "wrap Node.run :: assign c :: assign c\n    if y:\n        b = 2\n    else:",
        "        c = a, b\n",
        "        if y:\n            b = 2\n        else:\n            c = a, b\n",
    ),
    "wrap a compound statement": (
        "wrap Node.wait :: assign held :: assign held\n    if self:",
        "            held = run()\n",
        "            if self:\n                held = run()\n",
    ),
    "swap a chain": (
        "swap Node.run :: assign total torch.zeros :: torch.zeros -> y.numpy",
        "torch.zeros(",
        "y.numpy(",
    ),
    "swap a comparison in an if": (
        "swap Node.run :: if y :: item.shape[0] != y -> y > 0 and item != y",
        "item.shape[0] != y",
        "y > 0 and item != y",
    ),
    "swap in an elif": ("swap Node.run :: if item !y :: item -> x.u", "elif item:", "elif x.u:"),
    "swap a target, after other than ASCII": (
        "swap Node.wait :: assign :: self.count -> self.u",
        "self.count",
        "self.u",
    ),
    "swap in the one statement that has it": (
        "swap Node.run :: assign :: 0 -> 2",
        "total = 0\n",
        "total = 2\n",
    ),
    "base": ("base Node :: os.U", "Node(Alpha", "Node(os.U, Alpha"),
    "import": (
        "import module\n    from pkg.J import u",
        "# about late\n",
        "from pkg.J import u\n# about late\n",
    ),
    "unimport": ("unimport module\n    from lib import _gamma", "    _gamma,\n", ""),
}  # fmt: skip


def edited(code: str, edit_file: str) -> str:
    """`code` edited, after making sure that it can be taken back."""
    todo = edits.read_edits(edit_file, "test.edit")
    before = code.encode()
    after = edits.apply(before, todo)
    assert edits.revert(after, todo) == before
    marked = not all(
        edit.startswith(("swap", "unimport")) for edit in edit_file.split("\n\n")
    )
    assert edits.has_marks(after, todo) == marked
    assert not edits.has_marks(before, todo)
    return after.decode()


@pytest.mark.parametrize("name", EDITS)
def test_edit(name):
    edit_file, old, new = EDITS[name]
    assert MODULE.count(old) == 1
    assert edited(MODULE, edit_file) == MODULE.replace(old, new)


def test_wrap_moves_comments_and_empty_lines():
    edit = "wrap Node.run :: assign b !c :: assign c\n    while y:"
    moved = textwrap.indent(WRAPPED.rstrip("\n"), "    ")
    expected = MODULE.replace(WRAPPED, f"        while y:\n{moved}\n")
    assert edited(MODULE, edit) == expected


@pytest.mark.parametrize("above", ["<a.g", "<!a"])
def test_a_statement_is_known_by_the_one_above(above):
    last = "x = a.g" if above == "<a.g" else "x = 2"
    code = f"x = a\nx = f()\nif y:\n    {last}\n    x = f()\n"
    result = edited(code, f"swap module :: assign x {above} :: f() -> x()")
    assert result == code.removesuffix("f()\n") + "x()\n"


FRAMES = {
    "plain": lambda code: code,
    "CRLF": lambda code: code.replace("\n", "\r\n"),
    "BOM": lambda code: "\ufeff" + code,
    "no final newline": lambda code: code.removesuffix("\n"),
    "all three": lambda code: "\ufeff" + code.removesuffix("\n").replace("\n", "\r\n"),
    "tabs": lambda code: code.replace("    ", "\t"),
}


@pytest.mark.parametrize("form", FRAMES)
@pytest.mark.parametrize("name", ["before", "after", "base", "import", "unimport"])
def test_bytes_around_an_edit_are_kept(form, name):
    edit_file, old, new = EDITS[name]
    frame = FRAMES[form]
    assert edited(frame(MODULE), edit_file) == frame(MODULE.replace(old, new))


def test_edits_of_one_file_are_placed_in_the_original():
    pick = random.Random(0)
    for number in range(60):
        names = pick.sample(sorted(EDITS), pick.randint(2, 6))
        expected = MODULE
        for name in names:
            expected = expected.replace(*EDITS[name][1:])
        frame = FRAMES["CRLF" if number % 3 else "all three"]
        together = "\n\n".join(EDITS[name][0] for name in names)
        assert edited(frame(MODULE), together) == frame(expected), names


def test_swap_in_the_statement_that_another_edit_looks_for():
    after, old, new = EDITS["after"]
    swap, *swapped = EDITS["swap a chain"]
    expected = MODULE.replace(old, new).replace(*swapped)
    for together in (f"{after}\n\n{swap}", f"{swap}\n\n{after}"):
        assert edited(MODULE, together) == expected


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
def test_after_the_last_statement(eol):
    todo = "after module :: assign x\n    y = 2"
    assert edited(f"import os{eol}x = 1", todo) == f"import os{eol}x = 1{eol}y = 2"
    assert edited(f"x = 1{eol}", todo) == f"x = 1{eol}y = 2{eol}"
    assert edited("x = 1", todo) == "x = 1\ny = 2"


@pytest.mark.parametrize(
    "edit_file, before, after",
    [
        ("base C :: U", "class C(\n    A,\n    B,\n): x = 1\n", "class C(\n    U,\n    A,\n    B,\n): x = 1\n"),
        ("base C :: U", "class C(*bases): x = 1\n", "class C(U, *bases): x = 1\n"),
        ("import module\n    from p.b import U", "from p.a import x\nimport z\n", "from p.a import x\nfrom p.b import U\nimport z\n"),
        ("import module\n    from p.b import U", "from pq.a import x\nfrom p import x\n", "from pq.a import x\nfrom p import x\nfrom p.b import U\n"),
        ("unimport module\n    from m import _u", "from m import (\n    A,\n    _u,\n)\n", "from m import (\n    A,\n)\n"),
        ("unimport module\n    from m import _u", "from m import A, _u\n", "from m import A\n"),
        ("unimport module\n    from m import _u", "from m import (A, B, _u,)\n", "from m import (A, B,)\n"),
        ("unimport module\n    from m import _u", "from m import A, _u, zeta\n", "from m import A, zeta\n"),
        ("unimport module\n    from m import B", "from m import A_A, B, z as y\n", "from m import A_A, z as y\n"),
        ("unimport module\n    from m import _u", "from m import (\n    A, B, _u,\n)\n", "from m import (\n    A, B,\n)\n"),
        ("before module :: assign x\n    y = 1", "my = 1\nx = 1\n", "my = 1\ny = 1\nx = 1\n"),
        ("before module :: assign x\n    y = 1", "if a:\n    b()\n    # of b\nx = 1\n", "if a:\n    b()\n    # of b\ny = 1\nx = 1\n"),
        ("before module :: assign x\n    y = 1", "a = 1  # of a\nx = 1\n", "a = 1  # of a\ny = 1\nx = 1\n"),
        ("before module :: assign x\n    y = 1", 'a = """\n# no comment"""\nx = 1\n', 'a = """\n# no comment"""\ny = 1\nx = 1\n'),
        ("after module :: assign x\n    y = 1", "match a:\n    case 1:\n        x = 1\n", "match a:\n    case 1:\n        x = 1\n        y = 1\n"),
        ("before module :: assign x\n    y = 1", "# coding: utf8\n\nx = 1\n", "# coding: utf8\n\ny = 1\nx = 1\n"),
    ],
)  # fmt: skip
def test_lists_and_neighbours(edit_file, before, after):
    known = "A = U = a = 1\n" if edit_file.startswith("base") else ""
    assert edited(known + before, edit_file) == known + after


VERSION = ".".join(map(str, sys.version_info[:2]))
BEFORE_X = "before module :: assign x\n    y = 1\n"
WRAP_X_Y = "wrap module :: assign x :: assign y\n    if 1:\n"


@pytest.mark.parametrize(
    "code, edit_file, reason",
    [
        ("x = 1\n", "before f :: assign x\n    y = 1", "f: before assign x: no class or function f"),
        ("class C: x = 1\n", "swap C.f :: assign x :: x -> y", "C.f: swap assign x :: x -> y: no class or function f"),
        ("def f(): x = 1\ndef f(): x = 1\n", "before f :: assign x\n    y = 1", "2 definitions of f (lines 1, 2)"),
        ("def f():\n    y = 1\n", "before f :: assign x\n    y = 1", "f: assign x: no such statement"),
        ("x = 1\nx = 2\n", BEFORE_X, "module: assign x: matches more than one statement (lines 1, 2)"),
        ("def f():\n    def g():\n        x = 1\n", "before f :: assign x\n    y = 1", "no such statement"),
        ("if a:\n    x()\n", "before module :: if x\n    y = 1", "no such statement"),
        ("a = 1; x = 1\n", BEFORE_X, "shares line 1 with another"),
        ("x = 1; a = 1\n", "after module :: assign x\n    y = 1", "shares line 1 with another"),
        ("if a: x = 1\n", "after module :: assign x\n    y = 1", "shares line 1 with another"),
        ("a = 1; \\\nx = 1\n", BEFORE_X, "the line above line 2 continues into it"),
        ("a = 1; x = 1\ny = 1\n", WRAP_X_Y, "shares line 1 with another"),
        ("x = 1\ny = 1; z = 1\n", WRAP_X_Y, "shares line 2 with another"),
        ("if a:\n    y\nelif x:\n    z\n", "before module :: if x\n    y = 1", "elif"),
        ("x = 1\n", "swap module :: assign x :: y -> 2", "y does not occur in the statement (line 1)"),
        ("x = y + y\n", "swap module :: assign x :: y -> 2", "y occurs 2 times in the statement (line 1)"),
        ("x = f'{y}'\n", "swap module :: assign x :: y -> 'z'", "does not occur"),
        ("x = (a ==  b)\n", "swap module :: assign x :: a == b -> 2", "could not be taken back exactly"),
        ("c = d = 1\nx = a.b\n", "swap module :: assign x :: a -> c or d", "could not be taken back exactly"),
        ("f(a, b)\nb = 1\nx = a, b\n", "swap module :: assign x :: a -> b", "more than one original"),
        ('x = 1\ny = """a\nb"""\n', WRAP_X_Y, "a string that spans lines"),
        ('x = 1\ny = f"""{a}\n{b}"""\n', WRAP_X_Y, "a string that spans lines"),
        ("x = 1\nif a:\n    y = 1\n", WRAP_X_Y, "same block"),
        ("y = 1\nx = 1\n", WRAP_X_Y, "same block"),
        ("class C(A, U): x = 1\n", "base C :: U", "not a class with other bases and without this one"),
        ("class C: x = 1\n", "base C :: U", "not a class with other bases"),
        ("def C(): x = 1\n", "base C :: U", "not a class with other bases"),
        ("from q import x\n", "import module\n    from p import y", "no other import from p"),
        ("def f(): pass\nfrom p import x\n", "import module\n    from p import y", "no other import from p"),
        ("from m import _u\n", "unimport module\n    from m import _u", "not one of several names"),
        ("from m import A, _u as v\n", "unimport module\n    from m import _u", "not one of several names"),
        ("from m import (\n    A, B,\n    _u,\n)\n", "unimport module\n    from m import _u", "could not be taken back exactly"),
        ("from m import zeta, A, _u\n", "unimport module\n    from m import _u", "could not be taken back exactly"),
        ("x = 1\n", "before module :: assign x\n    y =", "after the edits"),
        ("x = 1\n", "before module :: assign x\n    return", "after the edits"),
        ("x = (\n", BEFORE_X, f"not valid Python {VERSION} on line 1"),
        ("x = '\0'\n", BEFORE_X, "not valid Python"),
        ("x = a.b\n", "swap module :: assign x :: a -> 1\nswap module :: assign x :: a.b -> 2", "overlaps another edit"),
        ("x = 1\n", BEFORE_X + BEFORE_X, "overlaps another edit"),
        ("x = 1\n\ny = 1\n", WRAP_X_Y + "after module :: assign x\n    print(1)", "overlaps another edit"),
        ("def f(q):\n    x = 1\n", "before f :: assign x\n    y = [p for p in q if p < k_pe]", "f: before assign x: uses k_pe, which nothing defines there"),
        ("def f(q):\n    x = q\n", "after f :: assign x\n    k = q\n    r = k, r", "uses r, which nothing"),
        ("def f(q):\n    x = q\n", "after f :: assign x\n    k = 1", "f: after assign x: sets k, which nothing uses there"),
        ("def f(q):\n    x = 1\n", "swap f :: assign x :: 1 -> missing.y", "uses missing, which nothing"),
        ("x = 1\ny = 1\n", "wrap module :: assign x :: assign y\n    if z:", "uses z, which nothing"),
        ("class C(object): x = 1\n", "base C :: U", "uses U, which nothing"),
        ("from m import A, _u\nf(_u)\n", "unimport module\n    from m import _u", "_u is still used on line 2"),
    ],
)  # fmt: skip
def test_refused(code, edit_file, reason):
    todo = edits.read_edits(edit_file, "test.edit")
    with pytest.raises(PatchError) as caught:
        edits.apply(code.encode(), todo)
    assert reason in str(caught.value)


def test_names_that_the_scope_or_the_module_binds_are_known():
    code = "from m import g\n\ndef f(q, *, k=1):\n    r, s = q\n    def i(k):\n        x = 1\n"
    uses = "y = len(g(q, k, r, s, [w for w in q]))\n    k = y"
    edited(code, f"before f.i :: assign x\n    {uses}")


@pytest.mark.parametrize(
    "edit_file, reason",
    [
        ("replace module :: assign x\n    y", "'replace' is none of before,"),
        ("before module\n    y", "takes 1 fields"),
        ("before module :: assign x", "takes a body"),
        ("base C :: U\n    y", "takes no body"),
        ("base C[0] :: U", "not a dotted path"),
        ("before module :: try x\n    y", "no kind of statement"),
        ("wrap module :: assign x :: assign y\n    z()", "end with ':'"),
        ("swap module :: assign x :: y", "'' is not an expression"),
        ("swap module :: assign x :: y -> z z", "'z z' is not an expression"),
        ("swap module :: assign x :: a.b -> (a . b)", "different expressions"),
        ("import f\n    from m import x", "takes `module` and one `from"),
        ("unimport module\n    import m", "takes `module` and one `from"),
        ("# nothing\n", "no edit in the file"),
        ("[< 0.5.13]\n", "no edit in the file"),
        ("[> 0.5.13]\n" + BEFORE_X, "'[> 0.5.13]' is no section such as"),
        ("[>= 0.5.13 < 0.5.17]\n" + BEFORE_X, "is no section such as"),
        ("[>= latest]\n" + BEFORE_X, "is no section such as"),
        ("[>= 0.5.13]\nreplace x", "'replace' is none of"),
    ],
)
def test_malformed_edit_file(edit_file, reason):
    with pytest.raises(PatchError, match="^x.edit") as caught:
        edits.read_edits(edit_file, "x.edit")
    assert reason in str(caught.value)


SECTIONS = """\
after module :: assign x
    a = 1
[>= 0.5.13]
after module :: assign x
    b = 1
[>= 0.5.13, < 0.5.17]
after module :: assign x
    c = 1
[< 0.5.13]
after module :: assign x
    d = 1
[]
after module :: assign x
    e = 1
"""


@pytest.mark.parametrize(
    "version, wanted",
    [
        ("0.5.12", "ade"),
        ("0.5.12.post1", "ade"),
        ("0.5.13rc1", "ade"),
        ("0.5.13", "abce"),
        ("0.5.16", "abce"),
        ("0.5.17", "abe"),
        ("0.5.23", "abe"),
        ("0.10.0", "abe"),
    ],
)
def test_sections(version, wanted):
    found = edits.read_edits(SECTIONS, "x.edit", version)
    assert "".join(edit.loads[0] for edit in found) == wanted


def test_a_file_that_needs_no_edit_in_a_release():
    assert edits.read_edits("[< 0.5.13]\n" + BEFORE_X, "x.edit", "0.5.13") == ()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"# coding: latin-1\nx = '\xe9'\n", "encoded as iso-8859-1"),
        (b"x = 1\n\n\ny = '\xe9'\n", "not UTF-8"),
        (b"# coding: nonsense\nx = 1\n", "not UTF-8"),
    ],
)
def test_other_encodings(data, reason):
    todo = edits.read_edits(BEFORE_X, "x.edit")
    for step in (edits.apply, edits.revert):
        with pytest.raises(PatchError, match=reason):
            step(data, todo)


TOGETHER = "\n".join(EDITS[name][0] for name in ("before", "wrap"))


def test_changes_elsewhere_survive_both_ways():
    todo = edits.read_edits(TOGETHER, "x.edit")

    def change(code: bytes) -> bytes:
        code = code.replace(b"import os\n", b"import os\nimport sys\n")
        code = code.replace(b"total += ", b"print(x)\n                total += ")
        code = code.replace(b"c = a, b", b"c = a, (b)")  # inside the wrapped lines
        return code + b"\n\nx = 1\n"

    before = MODULE.encode()
    assert change(edits.apply(before, todo)) == edits.apply(change(before), todo)
    assert edits.revert(change(edits.apply(before, todo)), todo) == change(before)


@pytest.mark.parametrize(
    "old, new",
    [
        ("print(1)", "print(2)"),
        ("        print(1)\n\n        print(2)\n", ""),
        ("        print(2)\n", "        print(2)\n        print(3)\n"),
        ("for item in x", "for thing in y"),
        ("if y:\n            b = 2", "if y and x:\n            b = 2"),
        ("            c = a, b\n", "            c = a, b\n            d = 1\n"),
        ("        return total", "        return ("),
        ("        return total", "        for item in x:\n            pass"),
        ("def run(x, y=1)", "def runs(x, y=1)"),
    ],
)
def test_changes_of_what_was_edited_are_noticed(old, new):
    todo = edits.read_edits(TOGETHER, "x.edit")
    applied = edits.apply(MODULE.encode(), todo).decode()
    assert applied.count(old) == 1
    with pytest.raises(PatchError):
        edits.revert(applied.replace(old, new).encode(), todo)
