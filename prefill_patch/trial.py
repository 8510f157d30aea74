"""Whether to use the patch on this machine: `trial`, which answers in minutes what
`doctor` answers in seconds. Its parts are beside the tests, in the project's clone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefill_patch import doctor
from prefill_patch.errors import PatchError
from prefill_patch.patch import inspect
from prefill_patch.releases import BACKENDS, FA3
from prefill_patch.target import Target

EXIT_NO_GPU = 4
_TEST = Path(__file__).resolve().parents[1] / "test"


def add_options(parser: argparse.ArgumentParser) -> None:
    doctor.add_target_option(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help=f"attention backend (default: {FA3} on SM90, else trtllm_mla)",
    )
    parser.add_argument(
        "--heads",
        type=int,
        default=128,
        help="attention heads of a rank: the model's, divided by --tp-size unless "
        "attention is data-parallel (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument(
        "--server",
        action="store_true",
        help="start your server too, hook off and on, with the arguments after --",
    )
    parser.add_argument(
        "arguments", nargs="*", help="of sglang.launch_server, after --"
    )


def run(args: argparse.Namespace, source: Path, target: Target) -> int:
    """Print progress and a page of results; the status is the verdict's."""
    if args.server != bool(args.arguments):
        raise PatchError(
            "--server and launch_server's arguments, after --, go together"
        )
    if not (_TEST / "tools/trial").is_dir():
        raise PatchError("it takes the project's git clone: run it in there")
    gpu = _capability()
    if gpu is None:
        print("no GPU: run the trial on the host of the server", file=sys.stderr)
        return EXIT_NO_GPU
    found = inspect(source, target)
    backend = FA3 if gpu[0] == 9 else next(iter(found.release.backends))
    parts = ("", "support", "tools")
    sys.path[:0] = [
        path for part in parts if (path := str(_TEST / part)) not in sys.path
    ]
    from trial.run import run

    return run(
        found,
        args.backend or backend,
        args.heads,
        args.json,
        args.arguments if args.server else None,
    )


def _capability() -> tuple[int, int] | None:
    """Of the first GPU; None without one."""
    try:
        import torch
    except ImportError as error:
        text = f"{sys.executable} has no torch ({error})"
        raise PatchError(f"{text}: use the Python that runs the server") from None
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
