"""The command line: one function for each subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from prefill_patch import SOURCE, doctor, install
from prefill_patch.errors import PatchError
from prefill_patch.patch import Patch, State, build, inspect
from prefill_patch.target import Target, open_target

EXIT_APPLIED, EXIT_NOT_APPLIED, EXIT_IMPOSSIBLE, EXIT_ALTERED = range(4)
EXIT_INTERRUPTED = 130

_TARGET = (
    "a git checkout of SGLang, an installed package folder (site-packages, or sglang "
    "in it), or a release number such as 0.5.12.post1"
)


class Command(NamedTuple):
    """A subcommand. `verb` is what an error says could not be done."""

    name: str
    verb: str
    help: str
    run: Callable[[argparse.Namespace, Patch, Target], int]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(argv: Sequence[str] | None = None, source: Path = SOURCE) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m prefill_patch",
        description="FP8 prefill for SGLang's MLA backends, as a patch.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help)
        subparser.add_argument(
            "--sglang", metavar="TARGET", required=True, help=_TARGET
        )
        command.options(subparser)
        subparser.set_defaults(chosen=command)
    args = parser.parse_args(argv)
    target = None
    try:
        target = open_target(args.sglang)
        return args.chosen.run(args, Patch.load(source), target)
    except PatchError as error:
        return _fail(args.chosen.verb, error, target)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run_build(args: argparse.Namespace, patch: Patch, target: Target) -> int:
    data = build(patch, target)
    try:
        if args.output in (None, "-"):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            Path(args.output).write_bytes(data)
    except BrokenPipeError:
        # The reader has seen enough; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise PatchError(f"{args.output or 'output'}: {error.strerror}") from None
    return 0


def run_apply(args: argparse.Namespace, patch: Patch, target: Target) -> int:
    found = inspect(patch, target)
    diffs = found.diffs()
    if found.state is State.APPLIED:
        print(f"already applied: nothing to do ({_where(target)})")
        return 0
    install.apply(found)
    for diff in diffs:
        mark = "A" if diff.new else "M"
        print(f"{mark} {diff.path}  +{diff.added} -{diff.removed}")
    added, removed = (
        sum(getattr(diff, name) for diff in diffs) for name in ("added", "removed")
    )
    print(f"applied: {len(diffs)} files, +{added} -{removed} ({_where(target)})")
    return 0


def run_revert(args: argparse.Namespace, patch: Patch, target: Target) -> int:
    found = inspect(patch, target)
    if found.state is State.ORIGINAL:
        print(f"not applied: nothing to take back ({_where(target)})")
        return 0
    if found.problems:
        _fail("revert", found.problems[0], target)
        altered = found.state is State.ALTERED
        return EXIT_ALTERED if altered else EXIT_IMPOSSIBLE
    install.revert(found)
    print(f"reverted: {len(found.files)} files ({_where(target)})")
    return 0


def run_status(args: argparse.Namespace, patch: Patch, target: Target) -> int:
    found = inspect(patch, target)
    if found.state is State.BLOCKED:
        raise found.problems[0]
    if found.state is State.ORIGINAL:
        install.check(found)
    print(f"{found.state.value} ({_where(target)})")
    for problem in found.problems:
        print(f"  {problem}")
    return _STATUS[found.state]


_STATUS = {
    State.APPLIED: EXIT_APPLIED,
    State.ORIGINAL: EXIT_NOT_APPLIED,
    State.ALTERED: EXIT_ALTERED,
}


def _output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="default: stdout")


COMMANDS = (
    Command("build", "build", "write the diff", run_build, _output_option),
    Command("apply", "apply", "apply the patch", run_apply),
    Command("revert", "revert", "take the patch back", run_revert),
    Command(
        "status",
        "apply",
        "0 applied, 1 not applied, 2 cannot be applied here, 3 partly or altered",
        run_status,
    ),
    Command(
        "doctor",
        "check",
        "0 if a server started now uses the patch, 1 if not or unsure, 2 no SGLang",
        doctor.run,
        doctor.add_options,
    ),
)


def _where(target: Target) -> str:
    return f"SGLang {target.version} in {target.root / target.package}"


def _fail(verb: str, error: PatchError, target: Target | None) -> int:
    release = f" (SGLang {target.version})" if target else ""
    print(f"cannot {verb}: {error}{release}", file=sys.stderr)
    return EXIT_IMPOSSIBLE
