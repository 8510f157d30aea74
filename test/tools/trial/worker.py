"""One side's process: reads requests from stdin, a JSON object a line, and answers each
with a line.

    python -m trial.worker

{"do": "selftest", …} runs doctor's self-test, {"do": "layer", …} makes the layer, and
anything else is a method of it. It ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def selftest(backend: str) -> list[list[str]]:
    """The checks of doctor's self-test, but what it says of the whole."""
    from prefill_patch import selftest

    return [list(check) for check in selftest.run([backend], patched=True)]


def make_layer(**arguments: Any):
    from trial.layer import Layer

    return Layer(**arguments)


def main() -> None:
    # What SGLang and its kernels print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    layer = None
    for line in sys.stdin:
        request = json.loads(line)
        do, answer = request.pop("do"), None
        try:
            if do == "selftest":
                answer = {"result": selftest(**request)}
            elif do == "layer":
                layer = make_layer(**request)
            else:
                answer = {"result": getattr(layer, do)(**request)}
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer or {"result": None}), file=answers, flush=True)


if __name__ == "__main__":
    main()
