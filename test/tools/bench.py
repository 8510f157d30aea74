"""`make bench`: the kernel benchmark and the layer benchmark of the patched SGLang, on a
GPU. With --out, the table as CSV and its plots."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import patched_sglang

KEY = ("operation", "heads", "tokens")
# Below, the launch decides, and with it the machine's host.
FROM_TOKENS = 2048
LEAST_SHARE = 0.95


def write_csv(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: round(v, 4) if type(v) is float else v for k, v in row.items()}
            )


def share(row: dict) -> float:
    """Of copy bandwidth, or where a GEMM is part of it, of the speed without its fusion."""
    return float(row.get("copy_share") or row["vs_separate"])


def slower(rows: list[dict], committed: Path) -> list[str]:
    """Where a share is below LEAST_SHARE of the committed one's."""
    with open(committed, newline="") as file:
        known = {
            tuple(row[name] for name in KEY): share(row) for row in csv.DictReader(file)
        }
    shares = {tuple(str(row[name]) for name in KEY): share(row) for row in rows}
    compared = [key for key in shares if key in known and int(key[2]) >= FROM_TOKENS]
    if not compared:
        return [f"{committed} has none of these rows"]
    return [
        f"slower: {' '.join(key)}: share {shares[key]:.3f}, committed {known[key]:.3f}"
        for key in compared
        if shares[key] < LEAST_SHARE * known[key]
    ]


def plot(rows: list[dict], folder: Path, machine: str) -> None:
    """Shares and speed-ups of the single launch, by tokens, a line for each head count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["operation"] == "mla_prefill_quantize_fp8"]
    speed_up = "times faster than "
    for file, panels in (
        ("copy_share", {"copy_share": "share of copy bandwidth"}),
        (
            "speed_up",
            {
                "vs_sglang_0_5_13": speed_up + "SGLang 0.5.13's kernels",
                "vs_bf16": speed_up + "the BF16 path",
            },
        ),
    ):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(6.5 * len(panels), 4.2), squeeze=False
        )
        for axis, (name, title) in zip(axes[0], panels.items()):
            for heads in sorted({row["heads"] for row in rows}):
                points = [r for r in rows if r["heads"] == heads and r.get(name)]
                axis.plot(
                    [row["tokens"] for row in points],
                    [row[name] for row in points],
                    marker="o",
                    label=f"{heads} heads",
                )
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("tokens")
            axis.set_title(f"mla_prefill_quantize_fp8: {title}", fontsize=10)
            axis.axhline(1, color="gray", linewidth=0.8)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.text(0.01, 0.01, machine, fontsize=6, color="gray")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(folder / f"{file}.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument("--peers", help="folder with SGLang 0.5.13's kernels")
    parser.add_argument("--quick", action="store_true", help="few sizes, kernels only")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the plots")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="CSV",
        help=f"fail below {LEAST_SHARE} of its shares",
    )
    options = parser.parse_args()
    if options.quick:
        # SGLang's benchmarks then take their small ranges.
        os.environ["SGLANG_IS_IN_CI"] = "true"
    trees = patched_sglang.lay_out(options.sglang)
    sys.path.insert(0, str(trees.patched))
    import machine

    from sglang.jit_kernel.benchmark import bench_mla_fp8_prefill

    described = machine.describe()
    print(described)
    rows = bench_mla_fp8_prefill.run(options.peers)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(rows, options.out / "mla_fp8_prefill.csv")
        plot(rows, options.out, described)
    problems = slower(rows, options.check) if options.check else []
    print("\n".join(problems))
    if not options.quick:
        layer = [
            sys.executable,
            str(HERE / "bench_layer.py"),
            "--sglang",
            options.sglang,
        ]
        layer += ["--peers", options.peers] if options.peers else []
        subprocess.run(layer, check=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
