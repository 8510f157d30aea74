"""From what a trial found to what its user should do."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from resampling import Ratio, ratio_of_medians

from prefill_patch.doctor import FAIL, GEMM_SWITCH, SWITCH

ADOPT, ADOPT_WITH, DO_NOT, CANNOT_SAY = (
    *("adopt", "adopt with a setting", "do not adopt", "cannot say"),
)
# 2 is for what could not be tried, as of the other commands, 4 for no GPU.
EXIT = {ADOPT: 0, DO_NOT: 1, ADOPT_WITH: 3, CANNOT_SAY: 5}

UNPATCHED = "unpatched"
GEMM = {"GEMM off": "off", "GEMM on": "on"}
# Of elements: as many may differ, where float32 falls on the other side of a tie.
TIES = 1e-4
# Of attention's error, which is FP8's on both sides; of times, which vary.
NOISE, SLOWER = 1.03, 1.02
# A setting has to be that much faster than the default to be worth setting.
WORTH_SETTING = 0.99
# Nats a token; of GSM8K's answers; of times, of servers that ran one after another.
WORSE_LOGPROBS, WORSE_ANSWERS, SERVER_SLOWER = 0.02, 0.01, 1.05

Results = Mapping[str, Any]


class Verdict(NamedTuple):
    """`kind` is one of EXIT's; `text` says it and why, `reasons` one by one."""

    kind: str
    text: str
    reasons: list[str]


def decide(results: Results) -> Verdict:
    """What follows from the results of a trial (`run.Trial.results`)."""
    reasons = [f"{x[1]}: {x[2]}" for x in results["checks"] if x[0] == FAIL]
    reasons += server_faults(results.get("server"))
    if reasons:
        return Verdict(DO_NOT, f"{DO_NOT}: {reasons[0]}", reasons)
    unknown = list(results["incomplete"])
    if not results["setup"]["real"]:
        unknown.append(f"{results['setup']['kernel']} was a stand-in")
    faults = {setting: layer_faults(results, setting) for setting in GEMM}
    tried = {row["setting"] for row in results["accuracy"]} & GEMM.keys()
    sound = [setting for setting in GEMM if setting in tried and not faults[setting]]
    if not sound:
        reasons = [fault for setting in GEMM for fault in faults[setting]]
        if reasons:
            return Verdict(DO_NOT, f"{DO_NOT}: {reasons[0]}", reasons)
        unknown.append("no layer ran with the patch")
    if unknown:
        return Verdict(CANNOT_SAY, f"{CANNOT_SAY}: {unknown[0]}", unknown)
    default = results["setup"]["default"]
    best = min(sound, key=lambda setting: sum(totals(results, setting)))
    if default in sound:
        worth = WORTH_SETTING * sum(totals(results, default))
        if sum(totals(results, best)) >= worth:
            best = default
    gain = gains(results, best)
    if best == default:
        return Verdict(ADOPT, f"{ADOPT}: {gain}", [gain])
    text = f"adopt with {GEMM_SWITCH}={GEMM[best]}: {gain}"
    return Verdict(ADOPT_WITH, text, [gain, *faults[default]])


def layer_faults(results: Results, setting: str) -> list[str]:
    """Where the patched layer is worse than the unpatched one."""
    rows = {(row["case"], row["setting"]): row for row in results["accuracy"]}
    found = []
    for (case, of), ours in rows.items():
        if of == setting:
            theirs = rows.get((case, UNPATCHED), {"error": "not run"})
            where = f"{case}, {setting}"
            found += [f"{where}: {x}" for x in accuracy_faults(ours, theirs)]
    for row in results["times"]:
        if setting in row["us"] and UNPATCHED in row["us"]:
            ratio = speed(row, setting)
            if ratio.low > SLOWER:
                where = f"{row['tokens']} tokens behind {row['prefix']}, {setting}"
                found.append(f"{where}: {shown(ratio)} times the unpatched time")
    return found


def accuracy_faults(ours: Results, theirs: Results) -> list[str]:
    if "error" in ours:
        return [ours["error"]]
    found = []
    if not ours["finite"]:
        found.append("the attention output is not finite")
    compared = "error" not in theirs
    for name, (elements, differing, steps) in ours["operands"].items():
        known = theirs["operands"][name] if compared else (0, elements, 1)
        if steps > max(known[2], 1) or differing > max(known[1], TIES * elements):
            found.append(
                f"{name}: {differing} of {elements} elements up to {steps} steps off "
                f"float64, unpatched {known[1]} up to {known[2]}"
            )
    if compared:
        if theirs["finite"] and ours["attention"] > NOISE * theirs["attention"]:
            errors = f"{ours['attention']:.2%}, unpatched {theirs['attention']:.2%}"
            found.append(f"attention is off float64 by {errors}")
        if theirs["padding"] and not ours["padding"]:
            found.append("rows of padding are not finite")
    return found


def server_faults(server: Results | None) -> list[str]:
    """Where the server with the hook is worse than without; what went wrong on both is
    of the server."""
    if server is None:
        return []
    found = list(server["problems"])
    logprobs = server.get("logprobs")
    if logprobs and logprobs["worse"][1] > WORSE_LOGPROBS:
        value = "{:.3f} ({:.3f} to {:.3f})".format(*logprobs["worse"])
        found.append(f"prompt log-probabilities are lower by {value} a token")
    answers = server.get("gsm8k")
    if answers and answers["worse"][1] > WORSE_ANSWERS:
        right = "{:.1%} of GSM8K is answered rightly, {:.1%} without".format(
            *reversed(answers["right"])
        )
        found.append(right)
    for row in server.get("times", ()):
        low = row["ratio"][1]
        if low > SERVER_SLOWER:
            found.append(f"{row['what']}: {shown(row['ratio'])} times that without")
    return found


def totals(results: Results, setting: str) -> list[float]:
    """Median microseconds of preparation and attention, by batch."""
    rows = [row["us"] for row in results["times"] if len(row["us"]) > 1]
    return [
        statistics.median(total(us[setting])) if setting in us else float("inf")
        for us in rows
    ]


def total(us: Mapping[str, Sequence[float]]) -> list[float]:
    return [a + b for a, b in zip(us["preparation"], us["attention"])]


def speed(row: Results, setting: str) -> Ratio:
    """Of preparation and attention, patched to unpatched, with its interval."""
    us = row["us"]
    return ratio_of_medians(total(us[setting]), total(us[UNPATCHED]))


def saved(row: Results, setting: str) -> float:
    """The share of a layer that the patch takes away."""
    us = row["us"]
    old, new = (statistics.median(total(us[x])) for x in (UNPATCHED, setting))
    return (old - new) / (old + statistics.median(us[UNPATCHED]["other"]))


def gains(results: Results, setting: str) -> str:
    rows = [r for r in results["times"] if {setting, UNPATCHED} <= r["us"].keys()]
    if not rows:
        return "as exact, times were not measured"
    ratios = [1 / speed(row, setting).value for row in rows]
    shares = [saved(row, setting) for row in rows]
    return (
        f"preparation and attention take {min(ratios):.2f} to {max(ratios):.2f} times "
        f"less, {min(shares):.1%} to {max(shares):.1%} of a layer; {SWITCH}=off is the "
        "way back"
    )


def shown(ratio: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*ratio)
