"""A trial's results as one page of text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trial.verdict import UNPATCHED, saved, shown, speed, total

from prefill_patch.doctor import OK


def text(results: Mapping[str, Any]) -> str:
    """The page, without a line end."""
    setup = results["setup"]
    kernel = setup.get("kernel", "not known")
    kernel += "" if setup.get("real") else " (a stand-in: not on this GPU)"
    hook = ", which has SGLang's own hook" if setup.get("own_hook") else ""
    lines = [
        f"FP8 prefill on {setup.get('machine', 'this machine')}",
        f"{setup['backend']}{hook}, {setup['heads']} heads a rank, {setup['patch']}",
        f"attention: {kernel}",
    ]
    checks = (*results["versions"], *results["checks"])
    lines += ["{:<4} {}: {}".format(*x) for x in checks if x[0] != OK]
    for title, part in (
        ("Against float64", accuracy(results["accuracy"])),
        ("GPU microseconds a layer", times(results["times"])),
        ("Your server, hook off and on", server(results.get("server"))),
        ("Not complete", [f"  {x}" for x in results["incomplete"]]),
    ):
        if part:
            lines += ["", title, *part]
    lines += ["", f"verdict: {results['verdict']['text']}"]
    lines += [f"  {reason}" for reason in results["verdict"]["reasons"][1:]]
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
        for row in rows
    ]


def accuracy(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = ("q", "k", "v", "cache row")
    cells = [["case", "", *names, "attention", "kernel", "log-sum-exp"]]
    for row in rows:
        if "error" in row:
            cells.append([row["case"], row["setting"], *[""] * 6, row["error"][:60]])
            continue
        parts = [row["operands"][name] for name in names]
        kernel = row["kernel"]
        lse = f"{kernel['lse']:.1e}, base {kernel['base']}" if "lse" in kernel else "-"
        cells.append(
            [row["case"], row["setting"]]
            + [f"{differing / elements:.4%}" for elements, differing, _ in parts]
            + [f"{row['attention']:.2%}", f"{kernel['error']:.2%}", lse]
        )
    return [
        "  operands: elements that are not the value rounded once; attention: rms error;",
        "  kernel: of its output and (nats) log-sum-exps, given its operands",
        *table(cells),
    ]


def times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    parts = ("launches", "preparation", "attention", "sum")
    cells = [["tokens", "behind", "", *parts, "to unpatched", "of a layer"]]
    for row in rows:
        batch = [str(row["tokens"]), str(row["prefix"])]
        for setting, us in row["us"].items():
            line = [*batch, setting, _median(us["launches"])]
            line += [_median(us["preparation"]), _median(us["attention"])]
            line += [_median(total(us)), "", ""]
            if setting != UNPATCHED and UNPATCHED in row["us"]:
                line[-2:] = shown(speed(row, setting)), f"{-saved(row, setting):+.1%}"
            cells.append(line)
    return [
        "  preparation: q_b_proj, kv_b_proj, all up to attention, merges of prefix chunks; a layer:",
        "  with projections, norms and a BF16 MLP of DeepSeek-V3's width",
        *table(cells),
    ]


def server(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [f"  problem: {problem}" for problem in found["problems"]]
    lines += [f"  also without the hook: {note}" for note in found["notes"]]
    if logprobs := found.get("logprobs"):
        lines.append(
            "  prompt log-probabilities, {tokens} tokens: hook on lower by {0:.4f} a "
            "token ({1:.4f} to {2:.4f}), apart by {apart:.4f}".format(
                *logprobs["worse"], **logprobs
            )
        )
        lines.append(
            "  greedy answers that are the same: {same} of {asked}".format(**logprobs)
        )
    if answers := found.get("gsm8k"):
        lines.append(
            "  GSM8K, {questions} questions: {1:.1%} right, without the hook "
            "{0:.1%}".format(*answers["right"], **answers)
        )
    for row in found.get("times", ()):
        lines.append(f"  {row['what']}: on / off {shown(row['ratio'])}")
    if found.get("times"):
        lines.append("  the two servers ran one after another")
    return lines


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}"
