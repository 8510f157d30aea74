"""FP8 preparation of MLA prefills against its peers and against copy bandwidth.

Kernel time is the median of CUDA graph replays over input sets that are rotated so that
L2 holds none of them; outputs stay alive, so that each call writes memory of its own.
Bytes count each input element read once and each output element written once. The
bandwidth of a large device copy, in the same process, is what a share of 1 means.

Peers, each left out with a word where it is absent:
  upstream    SGLang 0.5.13's path: FlashInfer's RoPE and quantization, two
              ``fp8_quantize``, the pool's cache write; or its single kernel. From an
              installed SGLang >= 0.5.13 or the folder given with --peers.
  flashinfer  FlashInfer's mla_rope_quantize_fp8 alone: q and k, no v and no cache.
  bf16        this SGLang's own path without the hook.
  torch       the same in plain torch.
"""

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import torch
import triton

from sglang.jit_kernel.benchmark.utils import get_benchmark_range
from sglang.jit_kernel.fp8_quantize import fp8_quantize
from sglang.jit_kernel.mla_kv_pack_quantize_fp8 import mla_kv_pack_quantize_fp8
from sglang.jit_kernel.mla_prefill_quantize_fp8 import mla_prefill_quantize_fp8
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=60, suite="stage-b-kernel-benchmark-1-gpu-large")

DEVICE = "cuda"
FP8 = torch.float8_e4m3fn
MAX_POSITION = 8192
# Enough input to flush a 60 MB L2 several times over.
ROTATED_BYTES = 240e6
MAX_SETS = 400

# (heads, nope, rope, v, lora)
DEEPSEEK = {h: (h, 128, 64, 128, 512) for h in (16, 32, 64, 128)}
GLM = {h: (h, 192, 64, 256, 512) for h in (20, 64)}
TOKENS = get_benchmark_range(
    full_range=[1, 8, 64, 128, 512, 2048, 8192, 16384, 32768, 65536],
    ci_range=[128, 2048],
)
QUICK_TOKENS = [1, 128, 2048, 8192]


def load_peer(folder, name):
    """SGLang 0.5.13's function of this name, or None."""
    if folder:
        path = Path(folder, f"{name}.py")
        if not path.is_file():
            return None
        spec = importlib.util.spec_from_file_location(f"upstream_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)
    from sglang.version import __version__

    release = tuple(int(part) for part in __version__.split(".")[:3] if part.isdigit())
    if release < (0, 5, 13):
        return None
    module = importlib.import_module(f"sglang.jit_kernel.{name}")
    return getattr(module, name)


def microseconds(calls, replays=15):
    """Median time of one call, all of `calls` in one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, 8 // len(calls))
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            outputs += [call() for call in calls]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return sorted(times)[replays // 2]


def copy_bandwidth(size=1 << 31):
    """Bytes per microsecond, read plus written, of a large device copy."""
    a = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    b = torch.empty_like(a)
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * size / sorted(times)[7]


class Prefill:
    """q, k, v and the cache rows of one layer."""

    name = "mla_prefill_quantize_fp8"

    def __init__(self, peers):
        self.peers = peers
        self.cos_sin = torch.randn(MAX_POSITION, 64, device=DEVICE)

    def bytes(self, tokens, shape):
        heads, nope, rope, v, lora = shape
        per_head = 2 * (nope + rope) + 2 * (nope + v) + 2 * (nope + rope) + v
        per_token = 2 * (lora + rope) + (lora + rope) + 8 + 8 + 4 * rope
        return tokens * (heads * per_head + per_token)

    def inputs(self, tokens, shape):
        heads, nope, rope, v, lora = shape
        randn = lambda *size: torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
        slots = max(2 * tokens, 4096)
        return dict(
            q=randn(tokens, heads, nope + rope),
            kv=randn(tokens, heads, nope + v),
            kv_a=randn(tokens, lora),
            # A slice of the fused projection of q and the latent, as in the model.
            k_pe=randn(tokens, 1, 1536 + lora + rope)[..., 1536 + lora :],
            positions=torch.randint(0, MAX_POSITION, (tokens,), device=DEVICE),
            cos_sin_cache=self.cos_sin,
            is_neox=False,
            qk_nope_head_dim=nope,
            kv_cache=torch.zeros(slots, 1, lora + rope, dtype=FP8, device=DEVICE),
            cache_loc=torch.randperm(slots, device=DEVICE)[:tokens],
        )

    def ours(self, x):
        return mla_prefill_quantize_fp8(**x)

    def flashinfer(self, x, pdl=True):
        from flashinfer.rope import mla_rope_quantize_fp8

        q, nope = x["q"], x["qk_nope_head_dim"]
        q_fp8 = torch.empty(q.shape, dtype=FP8, device=DEVICE)
        k_fp8 = torch.empty(q.shape, dtype=FP8, device=DEVICE)
        mla_rope_quantize_fp8(
            q[..., nope:],
            x["k_pe"].expand(-1, q.shape[1], -1),
            q[..., :nope],
            x["kv"][..., :nope],
            x["cos_sin_cache"],
            x["positions"],
            is_neox=False,
            quantize_dtype=FP8,
            q_rope_out=q_fp8[..., nope:],
            k_rope_out=k_fp8[..., nope:],
            q_nope_out=q_fp8[..., :nope],
            k_nope_out=k_fp8[..., :nope],
            enable_pdl=pdl,
        )
        return q_fp8, k_fp8

    def upstream(self, x):
        from sglang.srt.mem_cache.utils import set_mla_kv_buffer_triton

        nope = x["qk_nope_head_dim"]
        q_fp8, k_fp8 = self.flashinfer(x)
        quantize = self.peers["fp8_quantize"]
        v_fp8 = quantize(x["kv"][..., nope:], enable_pdl=True)
        latent = quantize(x["kv_a"], enable_pdl=True).unsqueeze(1)
        set_mla_kv_buffer_triton(
            x["kv_cache"].view(torch.uint8),
            x["cache_loc"],
            latent.view(torch.uint8),
            k_fp8[:, :1, nope:].view(torch.uint8),
        )
        return q_fp8, k_fp8, v_fp8

    def bf16(self, x):
        from sgl_kernel import concat_mla_k

        from sglang.jit_kernel.rope import apply_rope_with_cos_sin_cache_inplace
        from sglang.srt.layers.attention.utils import concat_and_cast_mha_k_triton
        from sglang.srt.mem_cache.utils import set_mla_kv_buffer_triton

        q, kv, k_pe = x["q"], x["kv"], x["k_pe"]
        nope = x["qk_nope_head_dim"]
        q_pe = q[..., nope:]
        apply_rope_with_cos_sin_cache_inplace(
            q_pe, k_pe, x["cos_sin_cache"], x["positions"], is_neox=False
        )
        q[..., nope:] = q_pe
        set_mla_kv_buffer_triton(
            x["kv_cache"].view(torch.uint8),
            x["cache_loc"],
            x["kv_a"].unsqueeze(1).to(FP8).view(torch.uint8),
            k_pe.to(FP8).view(torch.uint8),
        )
        k = torch.empty_like(q)
        if (q.shape[1], nope) == (128, 128):
            concat_mla_k(k=k, k_nope=kv[..., :nope], k_rope=k_pe)
        elif all(n & (n - 1) == 0 for n in (q.shape[1], nope)):
            concat_and_cast_mha_k_triton(k, kv[..., :nope], k_pe)
        else:
            k[..., :nope] = kv[..., :nope]
            k[..., nope:] = k_pe
        return q.to(FP8), k.to(FP8), kv[..., nope:].to(FP8)

    def torch(self, x):
        nope = x["qk_nope_head_dim"]
        cos, sin = x["cos_sin_cache"][x["positions"]].unsqueeze(1).chunk(2, dim=-1)

        def rotate(pe):
            a, b = pe[..., 0::2].float(), pe[..., 1::2].float()
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

        q, kv = x["q"], x["kv"]
        k_pe = rotate(x["k_pe"])
        q = torch.cat([q[..., :nope].float(), rotate(q[..., nope:])], -1)
        k = torch.cat(
            [kv[..., :nope].float(), k_pe.expand(-1, kv.shape[1], -1)], dim=-1
        )
        row = torch.cat([x["kv_a"].float(), k_pe[:, 0]], -1).clamp(-448, 448).to(FP8)
        cache = x["kv_cache"].view(torch.uint8)
        cache[x["cache_loc"], 0] = row.view(torch.uint8)
        clamped = (y.clamp(-448, 448) for y in (q, k, kv[..., nope:]))
        return [y.to(FP8) for y in clamped]


class Pack:
    """K and V of a prefix chunk."""

    name = "mla_kv_pack_quantize_fp8"

    def __init__(self, peers):
        self.peers = peers

    def bytes(self, tokens, shape):
        heads, nope, rope, v, _ = shape
        per_head = 2 * (nope + v) + (nope + rope) + v
        return tokens * (heads * per_head + 2 * rope)

    def inputs(self, tokens, shape):
        heads, nope, rope, v, _ = shape
        kv = torch.randn(tokens, heads, nope + v, device=DEVICE, dtype=torch.bfloat16)
        k_pe = torch.randn(tokens, 1, rope, device=DEVICE, dtype=torch.bfloat16)
        return kv[..., :nope], k_pe, kv[..., nope:]

    def ours(self, x):
        return mla_kv_pack_quantize_fp8(*x)

    def upstream(self, x):
        return self.peers["mla_kv_pack_quantize_fp8"](*x, enable_pdl=True)

    def torch(self, x):
        k_nope, k_pe, v = x
        k = torch.cat([k_nope, k_pe.expand(-1, k_nope.shape[1], -1)], dim=-1)
        return k.to(FP8), v.to(FP8)


class Quantize:
    """The cast of V, a strided view of kv_b_proj's output."""

    name = "fp8_quantize"

    def __init__(self, peers):
        self.peers = peers

    def bytes(self, tokens, shape):
        return tokens * shape[0] * shape[3] * 3

    def inputs(self, tokens, shape):
        heads, nope, _, v, _ = shape
        size = (tokens, heads, nope + v)
        return torch.randn(size, device=DEVICE, dtype=torch.bfloat16)[..., nope:]

    def ours(self, x):
        return fp8_quantize(x)

    def upstream(self, x):
        return self.peers["fp8_quantize"](x, enable_pdl=True)

    def torch(self, x):
        return x.clamp(-448, 448).to(FP8)


PROVIDERS = ("upstream", "flashinfer", "bf16", "torch")
# Plain torch needs float32 copies of everything; it is measured where they fit.
TORCH_BYTES = 8e9
FIELDS = (
    ["kernel", "heads", "nope", "rope", "v", "lora", "tokens", "us", "gbps"]
    + ["copy_share"]
    + [f"{provider}_us" for provider in PROVIDERS]
)


def supported(kernel, provider, shape, peers):
    """Whether a peer exists for this kernel and shape."""
    if not hasattr(kernel, provider):
        return False
    _, nope, _, v, _ = shape
    powers_of_two = all(n & (n - 1) == 0 for n in (nope, v))
    if provider == "upstream":
        needed = {Prefill: "fp8_quantize", Pack: "mla_kv_pack_quantize_fp8"}
        # Its own Triton kernels compile for powers of two only.
        return peers.get(needed.get(type(kernel), "fp8_quantize")) and powers_of_two
    return True


def measure(kernel, tokens, shape, peers, bandwidth):
    size = kernel.bytes(tokens, shape)
    sets = min(MAX_SETS, max(2, math.ceil(ROTATED_BYTES / size)))
    inputs = [kernel.inputs(tokens, shape) for _ in range(sets)]

    def timed(provider):
        function = getattr(kernel, provider)
        return microseconds([lambda x=x: function(x) for x in inputs])

    us = timed("ours")
    row = dict(zip(FIELDS, (kernel.name, *shape, tokens)))
    row.update(us=us, gbps=size / us / 1e3, copy_share=size / us / bandwidth)
    for provider in PROVIDERS:
        absent = not supported(kernel, provider, shape, peers)
        row[f"{provider}_us"] = None
        if absent or (provider == "torch" and size > TORCH_BYTES):
            continue
        try:
            row[f"{provider}_us"] = timed(provider)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            print(f"{provider} cannot: {reason}", file=sys.stderr)
    return row


def show(row, file=sys.stdout):
    ratios = " ".join(
        f"{row[f'{p}_us'] / row['us']:>10.2f}" if row[f"{p}_us"] else f"{'-':>10}"
        for p in PROVIDERS
    )
    print(
        f"{row['tokens']:>7} {row['heads']:>5} {row['us']:>9.1f} {row['gbps']:>6.0f} "
        f"{row['copy_share']:>6.3f} {ratios}",
        file=file,
        flush=True,
    )


def describe():
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    from sglang.version import __version__

    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(smi, capture_output=True, text=True).stdout
        driver = done.split("\n")[0].strip() or "unknown"
    except OSError:
        driver = "unknown"
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, triton {triton.__version__}, "
        f"flashinfer {version('flashinfer-python')}, sglang {__version__}, "
        f"{datetime.date.today()}"
    )


def plot(rows, folder, machine):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    prefill = [row for row in rows if row["kernel"] == Prefill.name]
    shapes = sorted({(row["heads"], row["nope"]) for row in prefill})
    labels = {s: f"{s[0]} heads" + (", GLM" if s[1] == 192 else "") for s in shapes}

    def series(shape, value):
        points = [r for r in prefill if (r["heads"], r["nope"]) == shape and value(r)]
        return [r["tokens"] for r in points], [value(r) for r in points]

    figures = {
        "copy_share": [("share of copy bandwidth", lambda r: r["copy_share"])],
        "speed_up": [
            ("times faster than SGLang 0.5.13's path", lambda r: _ratio(r, "upstream")),
            ("times faster than the BF16 path", lambda r: _ratio(r, "bf16")),
        ],
    }
    for name, panels in figures.items():
        figure, axes = plt.subplots(
            1, len(panels), figsize=(6.5 * len(panels), 4.2), squeeze=False
        )
        for axis, (title, value) in zip(axes[0], panels):
            for shape in shapes:
                tokens, values = series(shape, value)
                if tokens:
                    axis.plot(tokens, values, marker="o", label=labels[shape])
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("tokens")
            axis.set_title(f"{Prefill.name}: {title}", fontsize=10)
            axis.axhline(1, color="gray", linewidth=0.8)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.text(0.01, 0.01, machine, fontsize=6, color="gray")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(Path(folder, f"{name}.png"), dpi=110)


def _ratio(row, provider):
    return row[f"{provider}_us"] / row["us"] if row[f"{provider}_us"] else None


def run(quick, peers_folder):
    peers, absent = {}, []
    for name in ("fp8_quantize", "mla_kv_pack_quantize_fp8"):
        peers[name] = load_peer(peers_folder, name)
        if peers[name] is None:
            absent.append(f"upstream {name}: no SGLang >= 0.5.13 here, give --peers")
    for provider, module in (("flashinfer", "flashinfer"), ("bf16", "sgl_kernel")):
        if importlib.util.find_spec(module) is None:
            absent.append(f"{provider}: {module} is not installed")
            delattr(Prefill, provider)
            if provider == "flashinfer":
                del Prefill.upstream
    print(describe())
    print("\n".join(f"absent peer: {line}" for line in absent))
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e3:.0f} GB/s, the meaning of share 1")

    tokens = QUICK_TOKENS if quick else TOKENS
    heads = (16, 128) if quick else DEEPSEEK
    plans = [
        (Prefill(peers), [DEEPSEEK[h] for h in heads], tokens),
        (
            Prefill(peers),
            GLM.values(),
            [n for n in tokens if n in (1, 2048, 8192, 32768)],
        ),
        (Pack(peers), [DEEPSEEK[128]], tokens),
        (Quantize(peers), [DEEPSEEK[128]], [8192]),
    ]
    rows = []
    for kernel, shapes, lengths in plans:
        for shape in shapes:
            print(f"\n{kernel.name}, nope/rope/v/lora {shape[1:]}; ratios to each peer")
            print(
                f"{'tokens':>7} {'heads':>5} {'us':>9} {'GB/s':>6} {'share':>6} "
                + " ".join(f"{p:>10}" for p in PROVIDERS)
            )
            for length in lengths:
                rows.append(measure(kernel, length, shape, peers, bandwidth))
                show(rows[-1])
                torch.cuda.empty_cache()
    return rows


def check(rows, baseline, least=0.95):
    """Compare shares of copy bandwidth with a committed table's; True when all hold."""
    key = lambda row: tuple(str(row[name]) for name in FIELDS[:7])
    with open(baseline, newline="") as file:
        known = {key(row): float(row["copy_share"]) for row in csv.DictReader(file)}
    held = True
    for row in rows:
        # Below 2048 tokens the launch decides, which the machine's host sets.
        if key(row) not in known or row["tokens"] < 2048:
            continue
        ratio = row["copy_share"] / known[key(row)]
        if ratio < least:
            held = False
            print(
                f"slower: {row['kernel']} {row['heads']} heads {row['tokens']} tokens: "
                f"share {row['copy_share']:.3f}, was {known[key(row)]:.3f}"
            )
    print("as fast as the committed table" if held else "REGRESSION")
    return held


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="folder with SGLang 0.5.13's kernels")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--out", help="folder for the CSV and the plots")
    parser.add_argument("--check", metavar="CSV", help="fail below 0.95 of its shares")
    options = parser.parse_args()
    rows = run(options.quick, options.peers)
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        machine = describe()
        with open(folder / "mla_fp8_prefill.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for row in rows:
                rounded = {k: round(v, 4) for k, v in row.items() if type(v) is float}
                writer.writerow({**row, **rounded})
        (folder / "machine.txt").write_text(machine + "\n")
        plot(rows, folder, machine)
        print(f"\ntable and plots in {folder}")
    if options.check:
        sys.exit(0 if check(rows, options.check) else 1)


if __name__ == "__main__":
    main()
