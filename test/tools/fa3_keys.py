"""What FlashAttention-3's FP8 prefill loses with the number of keys a call attends to, and
what it costs to attend to fewer a call. Needs a Hopper GPU.

    python3 test/tools/fa3_keys.py --sglang 0.5.12.post1

An error is the mean over queries and dimensions of |output - exact| over that of |exact|,
the exact result being float64's of the same FP8 operands; the bias is the signed one, of
the outputs' distance from zero. *uniform*: queries of 0, V round 1. *mean 1*: random
queries and keys, V round 1. *random*: V round 0. Several calls are merged in order by
SGLang's `merge_state_v2`, as SGLang merges prefix chunks. Time is of all calls and merges
for 8192 queries of 128 heads over so many keys, none of them causal.
"""

import argparse
import sys
from pathlib import Path

import torch

TEST = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TEST / "support"), str(TEST), str(TEST.parent)]

FP8 = torch.float8_e4m3fn
QK, V = 192, 128
KEYS = (2048, 8192, 32768, 131072)
PER_CALL = (1024, 2048, 4096, 8192)
KINDS = {"uniform": (0.0, 1.0), "mean 1": (1.0, 1.0), "random": (1.0, 0.0)}


def make(kind: str, queries: int, keys: int, heads: int):
    """q, k and v in FP8 of one request."""
    q_scale, v_mean = KINDS[kind]
    shapes = ((queries, heads, QK), (keys, heads, QK), (keys, heads, V))
    q, k, v = (torch.randn(shape, device="cuda") for shape in shapes)
    return (q * q_scale).to(FP8), k.to(FP8), (v + v_mean).to(FP8)


def exact(q, k, v):
    """Attention in float64, [queries, heads, V]."""
    out = torch.empty(*q.shape[:2], V, dtype=torch.float64, device=q.device)
    for head in range(q.shape[1]):
        one = (x[:, head].double() for x in (q, k, v))
        q_head, k_head, v_head = one
        out[:, head] = torch.softmax(q_head @ k_head.T * QK**-0.5, dim=-1) @ v_head
    return out


def attend(q, k, v, keys_per_call: int):
    """FA3's output in BF16, over at most so many keys a call, merged."""
    from sgl_kernel import merge_state_v2
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    def ends(x):
        return torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)

    merged = None
    for k_part, v_part in zip(k.split(keys_per_call), v.split(keys_per_call)):
        out, lse, *_ = flash_attn_varlen_func(
            q,
            k_part,
            v_part,
            cu_seqlens_q=ends(q),
            cu_seqlens_k=ends(k_part),
            max_seqlen_q=len(q),
            max_seqlen_k=len(k_part),
            softmax_scale=QK**-0.5,
            causal=False,
            return_softmax_lse=True,
        )
        lse = lse.T.contiguous()
        if merged is None:
            merged = out, lse
            continue
        target = torch.empty_like(out), torch.empty_like(lse)
        merge_state_v2(out, lse, *merged, *target)
        merged = target
    return merged[0]


def errors(kind: str, keys: int, keys_per_call: int) -> dict[str, str]:
    operands = make(kind, 128, keys, 4)
    wanted = exact(*operands)
    off = attend(*operands, keys_per_call).double() - wanted
    size = wanted.abs().mean()
    return {
        "values": kind,
        "keys": keys,
        "a call": keys_per_call,
        "error": f"{off.abs().mean() / size:.2%}",
        "bias": f"{(off * wanted.sign()).mean() / size:+.2%}",
    }


def milliseconds(keys: int, keys_per_call: int, times: int = 5) -> float:
    operands = make("mean 1", 8192, keys, 128)
    attend(*operands, keys_per_call)
    pairs = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)
    ]
    for start, end in pairs:
        start.record()
        attend(*operands, keys_per_call)
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in pairs)[times // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sglang", default="0.5.12.post1")
    options = parser.parse_args()
    import patched_sglang

    sys.path.insert(0, str(patched_sglang.lay_out(options.sglang).patched))
    import machine
    from tabulate import tabulate

    torch.manual_seed(0)
    print(machine.describe())
    rows = [errors(kind, keys, keys) for kind in KINDS for keys in KEYS]
    print("\nOne call\n", tabulate(rows, "keys", "pipe"), sep="\n")
    rows = [
        errors(kind, KEYS[-1], per_call)
        for kind in ("uniform", "mean 1")
        for per_call in PER_CALL
    ]
    print("\nSeveral calls\n", tabulate(rows, "keys", "pipe"), sep="\n")
    whole = milliseconds(32768, 32768)
    rows = [
        {
            "a call": n,
            "ms": f"{(ms := milliseconds(32768, n)):.1f}",
            "of one call": f"{ms / whole:.3f}",
        }
        for n in (*PER_CALL, 32768)
    ]
    print("\n32768 keys, time\n", tabulate(rows, "keys", "pipe"), sep="\n")


if __name__ == "__main__":
    main()
