"""The command line: one function for each subcommand."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from prefill_patch import SOURCE, doctor, install, plugin, trial
from prefill_patch.errors import PatchError
from prefill_patch.patch import Inspection, State, inspect
from prefill_patch.releases import stated
from prefill_patch.target import Target, open_target

EXIT_IMPOSSIBLE, EXIT_INTERRUPTED = 2, 130
_STATUS = {State.APPLIED: 0, State.ORIGINAL: 1, State.PARTLY: 3}

_TARGET = (
    "a git checkout of SGLang, or an installed package folder (site-packages, or "
    "sglang in it)"
)


class Command(NamedTuple):
    """A subcommand. `verb` is what an error says could not be done."""

    name: str
    verb: str
    help: str
    run: Callable[[argparse.Namespace, Path, Target], int]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_release: bool = False


def main(argv: Sequence[str] | None = None, source: Path = SOURCE) -> int:
    """Run a subcommand and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every one is UTF-8
    parser = argparse.ArgumentParser(
        prog="python3 -m prefill_patch",
        description="FP8 prefill for SGLang's MLA backends, as a patch.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help)
        release = ", or a release number such as 0.5.12.post1"
        what = _TARGET + (release if command.takes_release else "")
        subparser.add_argument("--sglang", metavar="TARGET", required=True, help=what)
        command.options(subparser)
        subparser.set_defaults(chosen=command)
    args = parser.parse_args(argv)
    chosen: Command = args.chosen
    target = None
    try:
        target = open_target(args.sglang, chosen.takes_release)
        return chosen.run(args, source, target)
    except PatchError as error:
        release = f" (SGLang {target.version})" if target else ""
        _print(f"cannot {chosen.verb}: {error}{release}", file=sys.stderr)
        return EXIT_IMPOSSIBLE
    except KeyboardInterrupt:
        _print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run_build(args: argparse.Namespace, source: Path, target: Target) -> int:
    diffs = _look(source, target).diffs(*State)
    data = b"".join(diff.text for diff in diffs)
    try:
        if args.output in (None, "-"):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            Path(args.output).write_bytes(data)
    except BrokenPipeError:
        _discard(sys.stdout)  # the reader has seen enough
    except OSError as error:
        raise PatchError(f"{args.output or 'output'}: {error.strerror}") from None
    return 0


def run_apply(args: argparse.Namespace, source: Path, target: Target) -> int:
    with install.locked(target):
        found = _look(source, target)
        if plugin.serves(target):
            raise PatchError(plugin.TWICE)
        diffs = found.diffs(State.ORIGINAL, State.PARTLY)
        files = install.apply(found)
    if not files:
        _print(f"already applied: nothing to do ({_where(target)})")
        return 0
    for diff in diffs:
        _print(f"{'A' if diff.new else 'M'} {diff.path}  +{diff.added} -{diff.removed}")
    added, removed = sum(d.added for d in diffs), sum(d.removed for d in diffs)
    _print(f"applied: {len(diffs)} files, +{added} -{removed} ({_where(target)})")
    return 0


def run_revert(args: argparse.Namespace, source: Path, target: Target) -> int:
    with install.locked(target):
        found = _look(source, target)
        # What has nothing of the patch needs nothing taken back.
        applied = {State.APPLIED, State.PARTLY} & set(found.states())
        ours = [file.problem for file in found.files if not file.foreign]
        for problem in filter(None, ours if applied else found.problems):
            raise problem
        files = install.revert(found)
    done = (
        f"reverted: {len(files)} files"
        if files
        else "not applied: nothing to take back"
    )
    _print(f"{done} ({_where(target)})")
    return 0


def run_status(args: argparse.Namespace, source: Path, target: Target) -> int:
    found = _look(source, target)
    for problem in found.problems:
        raise problem
    if plugin.serves(target):
        if found.state is not State.ORIGINAL:
            raise PatchError(plugin.TWICE)
        _print(f"applied by the plug-in ({_where(target)})")
        return 0
    if found.state is State.ORIGINAL:
        install.check(target, found.files)
    _print(f"{found.state.value} ({_where(target)})")
    if found.state is State.PARTLY:
        for file in found.files:
            _print(f"  {file.state.value:11}  {target.path(file.path)}")
        _print("`apply` finishes it, `revert` takes it back")
    return _STATUS[found.state]


def _output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="default: stdout")


COMMANDS = (
    Command("build", "build", "write the diff", run_build, _output_option, True),
    Command("apply", "apply", "apply the patch, or finish it", run_apply),
    Command("revert", "revert", "take the patch back", run_revert),
    Command(
        "status",
        "apply",
        "0 applied, 1 not applied, 2 cannot be applied here, 3 partly applied",
        run_status,
    ),
    Command(
        "doctor",
        "check",
        "0 if a server started now uses the patch, 1 if not or unsure, 2 no SGLang",
        doctor.run,
        doctor.add_options,
    ),
    Command(
        "trial",
        "try",
        "0 adopt, 1 do not, 2 could not be tried, 3 adopt with a setting, 4 no GPU, "
        "5 cannot say",
        trial.run,
        trial.add_options,
    ),
)


def _look(source: Path, target: Target) -> Inspection:
    """What a target has of the patch, and a warning where its release is a guess."""
    found = inspect(source, target)
    if found.release.version != stated(target.version):
        _print(
            f"warning: SGLang {target.version} is no release that the patch knows: "
            f"taken for {found.release.version}, by its structure",
            file=sys.stderr,
        )
    return found


def _where(target: Target) -> str:
    return f"SGLang {target.version} in {target.root / target.package}"


def _print(line: str, file: io.TextIOBase | None = None) -> None:
    """The exit status says what happened, also where nobody reads."""
    file = file or sys.stdout
    try:
        print(line, file=file, flush=True)
    except OSError:
        _discard(file)


def _discard(stream: io.TextIOBase) -> None:
    """Nothing is left to fail when Python flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
