"""`make accuracy`: how far SGLang's FP8 prefill is from float64, with and without the
patch, as docs/accuracy.md.

Three paths prepare the same inputs, each in SGLang's own attention layer with only the
outputs of its projections put in: `bf16`, the unpatched SGLang with a BF16 KV cache;
`unpatched`, the same with an FP8 cache; `patched`. The reference is the definition in
float64. Inputs are what the projections of a checkpoint give for random prompts, and
heavy-tailed random numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), *map(str, HERE.parents[:2])]

import torch
from patched_sglang import call_elsewhere
from sglang_cpu import DEVICE, HAS_GPU

# What imports SGLang is imported late: `main` first puts the patched one on the path.

FP8 = torch.float8_e4m3fn
# Halfway from the largest value, 448, to the next that the exponent could hold, 480:
# torch's cast gives NaN beyond, a saturating one 448.
CAST_LIMIT = 464.0
PATHS = {"bf16": "BF16 path", "unpatched": "unpatched FP8", "patched": "patched FP8"}
OPERANDS = {
    "q": "q",
    "q_rope": "q, RoPE part",
    "k": "k",
    "k_rope": "k, RoPE part",
    "v": "v",
    "row": "cache row",
    "row_rope": "cache row, RoPE part",
}
ROTATED = ("q_rope", "k_rope", "row_rope")
HISTOGRAM_BINS, HISTOGRAM_STEP = 60, 0.01
OUTLIER_EVERY, OUTLIER_GAINS = 32, (10, 300)
RESAMPLES, CONFIDENCE = 2000, 0.99


@dataclass(frozen=True)
class Settings:
    lens: tuple[int, ...] = (64, 512, 1472)
    seed: int = 0
    quick: bool = False


QUICK = Settings(lens=(7, 14), quick=True)


@dataclass
class Activations:
    """What one layer's preparation starts from, in BF16 and before RoPE."""

    q: torch.Tensor  # [tokens, heads, nope + rope]
    kv: torch.Tensor  # [tokens, heads, nope + v]
    kv_a: torch.Tensor  # [tokens, lora], after its norm
    k_pe: torch.Tensor  # [tokens, rope]


@dataclass
class Shape:
    """What the layers of a checkpoint have in common."""

    heads: int
    nope: int
    rope: int
    v: int
    kv_lora: int
    is_neox: bool
    scale: float
    cos_sin_cache: (
        torch.Tensor
    )  # [longest prompt, rope], float32, as SGLang lays it out


@dataclass
class Prepared:
    """What one path hands to the attention kernel and to the KV cache."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    row: torch.Tensor

    def map(self, function: Callable) -> "Prepared":
        return Prepared(*(function(getattr(self, f.name)) for f in fields(self)))

    def operand(self, name: str, shape: Shape) -> torch.Tensor:
        if name == "row_rope":
            return self.row[..., shape.kv_lora :]
        if name in ROTATED:
            return getattr(self, name[0])[..., shape.nope :]
        return getattr(self, name)


@dataclass
class Source:
    """Inputs of one kind: one or more layers of them."""

    name: str
    title: str
    layers: list[Activations]


def capture(folder: Path, settings: Settings) -> tuple[Shape, list[Activations]]:
    """Run a checkpoint on random prompts in BF16 and keep what its projections give."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model = model.to(DEVICE).eval()
    config = model.config
    layers = [block.self_attn for block in model.model.layers]
    positions = torch.arange(max(settings.lens), device=DEVICE)[None]
    # In the type of its first argument, where both halves of a row are the same.
    cos_sin = model.model.rotary_emb(torch.empty(0, device=DEVICE), positions)
    halves = [x[0].float().cpu().chunk(2, dim=-1)[0] for x in cos_sin]
    shape = Shape(
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        v=config.v_head_dim,
        kv_lora=config.kv_lora_rank,
        is_neox=not getattr(config, "rope_interleave", True),
        scale=layers[0].scaling,
        cos_sin_cache=torch.cat(halves, dim=-1),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def keep(layer: int, name: str):
        def hook(module, inputs, output):
            seen.setdefault((layer, name), []).append(output[0].cpu())

        return hook

    for i, attn in enumerate(layers):
        q_proj = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        for name, module in (
            ("q", q_proj),
            ("latent", "kv_a_proj_with_mqa"),
            ("kv_a", "kv_a_layernorm"),
            ("kv", "kv_b_proj"),
        ):
            getattr(attn, module).register_forward_hook(keep(i, name))
    with torch.no_grad():
        for length in settings.lens:
            ids = torch.randint(config.vocab_size, (1, length), generator=generator)
            model(ids.to(DEVICE), use_cache=False, logits_to_keep=1)

    def activations(i: int) -> Activations:
        q, latent, kv_a, kv = (
            torch.cat(seen[i, name]) for name in ("q", "latent", "kv_a", "kv")
        )
        return Activations(
            q=q.unflatten(-1, (shape.heads, -1)),
            kv=kv.unflatten(-1, (shape.heads, -1)),
            kv_a=kv_a,
            k_pe=latent[:, shape.kv_lora :].contiguous(),
        )

    return shape, [activations(i) for i in range(len(layers))]


def student_t(size, freedom: int, generator: torch.Generator) -> torch.Tensor:
    chi2 = sum(torch.randn(size, generator=generator).square() for _ in range(freedom))
    return torch.randn(size, generator=generator) / (chi2 / freedom).sqrt()


def outlier_channels(size, generator: torch.Generator) -> torch.Tensor:
    """Normal, with some channels of the last dimensions larger than the others."""
    gain = torch.ones(size[1:])
    channels = torch.randperm(gain.numel(), generator=generator)
    channels = channels[: max(2, gain.numel() // OUTLIER_EVERY)]
    low, high = map(math.log10, OUTLIER_GAINS)
    gain.view(-1)[channels] = torch.logspace(low, high, len(channels))
    return gain * torch.randn(size, generator=generator)


def synthetic(shape: Shape, settings: Settings) -> list[Source]:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    tokens = sum(settings.lens)

    def draw(sample) -> list[Activations]:
        sizes = (
            (tokens, shape.heads, shape.nope + shape.rope),
            (tokens, shape.heads, shape.nope + shape.v),
            (tokens, shape.kv_lora),
            (tokens, shape.rope),
        )
        return [Activations(*(sample(size).bfloat16() for size in sizes))]

    return [
        Source(
            "student_t3",
            "Student-t, 3 degrees of freedom",
            draw(lambda size: student_t(size, 3, generator)),
        ),
        Source(
            "student_t2",
            "Student-t, 2 degrees of freedom",
            draw(lambda size: student_t(size, 2, generator)),
        ),
        Source(
            "outliers",
            "Normal with outlier channels",
            draw(lambda size: outlier_channels(size, generator)),
        ),
    ]


class Layer:
    """SGLang's attention layer, into which the outputs of projections are put."""

    def __init__(self, shape: Shape, lens: Sequence[int], cache_dtype: torch.dtype):
        import mla_harness as harness

        pages = -(-sum(lens) // 64)
        self.env = harness.make_env(
            harness.Dims(shape.heads, shape.nope, shape.rope, shape.v, shape.kv_lora),
            "trtllm_mla",  # takes a BF16 cache too
            cache_dtype=cache_dtype,
            is_neox=shape.is_neox,
            slots=64 * pages,
            max_context=max(lens),
            max_requests=len(lens),
        )
        rotary = self.env.attn.rotary_emb
        rotary.cos_sin_cache = shape.cos_sin_cache.to(DEVICE)
        self.batch = harness.make_batch(self.env, lens)

    @contextlib.contextmanager
    def given(self, x: Activations) -> Iterator[None]:
        """The projections return copies of x: the unpatched path rotates in place."""
        latent = torch.cat([x.kv_a, x.k_pe], dim=-1)
        outputs = dict(
            q_proj=x.q, kv_a_proj_with_mqa=latent, kv_a_layernorm=x.kv_a, kv_b_proj=x.kv
        )

        def put(value: torch.Tensor):
            value = value.flatten(1).to(DEVICE)

            def hook(module, inputs, output):
                if isinstance(output, tuple):
                    return value.clone(), *output[1:]
                return value.clone()

            return hook

        with contextlib.ExitStack() as stack:
            for name, value in outputs.items():
                module = getattr(self.env.attn, name)
                stack.enter_context(module.register_forward_hook(put(value)))
            yield

    def prepare(self, x: Activations, patched: bool) -> Prepared:
        import mla_harness as harness

        with self.given(x):
            result = harness.run_prefill(self.env, self.batch)
        if (result.q.dtype == FP8) != patched:
            raise RuntimeError(
                f"the layer's q is {result.q.dtype} {'with' if patched else 'without'} "
                "the patch: another path ran than the report is about"
            )
        row = result.rows(self.batch.out_cache_loc)
        (call,) = result.calls
        return Prepared(call.q, call.k, call.v, row.view(self.env.pool.dtype))

    def exact(self, x: Activations) -> Prepared:
        import mla_harness as harness

        with self.given(x):
            exact = harness.expected(self.env, self.batch)
        return Prepared(exact.q, exact.k, exact.v, exact.rows)


def torch_cast(x: torch.Tensor) -> torch.Tensor:
    """`.to(torch.float8_e4m3fn)` as a GPU does it: nearest even, NaN beyond the limit.

    torch's cast on a CPU saturates from some release on, so it cannot be asked there.
    """
    from mla_harness import round_fp8

    x = x.double()
    return round_fp8(torch.where(x.abs() > CAST_LIMIT, math.nan, x))


def serve(source: str, target: str) -> None:
    """The unpatched SGLang's part, in a process of its own."""
    from mla_harness import fp8_ulps

    given = torch.load(source, weights_only=False)
    shape = Shape(**given["shape"])
    bf16_layer, fp8_layer = (
        Layer(shape, given["lens"], dtype) for dtype in (torch.bfloat16, FP8)
    )
    results, elements, differ = [], 0, 0
    for x in (Activations(**layer) for layer in given["layers"]):
        bf16 = bf16_layer.prepare(x, patched=False)
        fp8 = fp8_layer.prepare(x, patched=False)
        cast = bf16.map(torch_cast)
        if not HAS_GPU:  # SGLang cast with a CPU's torch
            beyond = bf16.map(lambda value: value.abs() > CAST_LIMIT)
            for name, value in vars(fp8).items():
                value.view(torch.uint8)[getattr(beyond, name)] = 0x7F
        for name, value in vars(fp8).items():
            differ += int((fp8_ulps(value, getattr(cast, name)) > 0).sum())
            elements += value.numel()
        results.append(
            [vars(prepared.map(torch.Tensor.cpu)) for prepared in (bf16, fp8)]
        )
    torch.save(dict(results=results, elements=elements, differ=differ), target)


def run_unpatched(
    site: Path, shape: Shape, lens: Sequence[int], layers: Sequence[Activations]
) -> dict:
    # Plain containers: this module may have another name on the other side.
    inputs = dict(shape=vars(shape), lens=lens, layers=[vars(x) for x in layers])
    return call_elsewhere(site, "accuracy", inputs)


def spacing(x: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of e4m3 at x."""
    smallest_normal = 2.0**-6
    exponent = torch.frexp(x.double().abs().clamp(min=smallest_normal)).exponent - 1
    return torch.exp2(exponent.double() - 3)


def compare(actual: torch.Tensor, exact: torch.Tensor) -> dict:
    """Errors of one tensor. All but the counts of what is beyond the limit and of NaN
    are of the elements within the limit, so that rounding and overflow stay apart."""
    from mla_harness import round_fp8

    inside = exact.abs() <= CAST_LIMIT
    wide = actual.double()
    error = (wide - exact)[inside].abs()
    ulps = error / spacing(exact[inside])
    # Each bin has its upper end, so that 0.5 is where single roundings end.
    bins = torch.ceil(ulps.nan_to_num(math.inf) / HISTOGRAM_STEP) - 1
    bins = bins.clamp(0, HISTOGRAM_BINS - 1).long()
    equal = None
    if actual.dtype == FP8:
        same = actual.view(torch.uint8) == round_fp8(exact).view(torch.uint8)
        equal = int(same[inside].sum())
    return dict(
        elements=exact.numel(),
        inside=int(inside.sum()),
        nan=int(wide.isnan().sum()),
        squared_error=error.square().sum().item(),
        squared_exact=exact[inside].square().sum().item(),
        largest=exact.abs().max().item(),
        max_ulps=ulps.max().item(),
        correct=equal,
        histogram=torch.bincount(bins, minlength=HISTOGRAM_BINS).tolist(),
    )


def pooled(layers: Sequence[dict], operand: str, path: str) -> dict:
    """The errors of one operand over several layers."""
    parts = [layer["operands"][operand][path] for layer in layers]
    total = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if key in ("max_ulps", "largest"):
            total[key] = max(values)
        elif key == "histogram":
            total[key] = [sum(counts) for counts in zip(*values)]
        else:
            total[key] = None if None in values else sum(values)
    total["rms"] = math.sqrt(total["squared_error"] / total["squared_exact"])
    total["misrounded"] = None
    if total["correct"] is not None:
        total["misrounded"] = 1 - total["correct"] / total["inside"]
    return total


def seen(marks: torch.Tensor, lens: Sequence[int]) -> torch.Tensor:
    """Whether a query of each row may look at a marked row of its request."""
    return (
        torch.cat([part.int().cummax(dim=0).values for part in marks.split(lens)]) > 0
    )


def attention(x: Prepared, lens: Sequence[int], scale: float) -> torch.Tensor:
    """Causal attention in float64; NaN gets to the rows that look at it, no others."""
    from mla_harness import attention64

    q, k, v = (operand.double() for operand in (x.q, x.k, x.v))
    cu = [sum(lens[:i]) for i in range(len(lens) + 1)]
    finite = (operand.nan_to_num(0.0) for operand in (q, k, v))
    out, _ = attention64(*finite, cu, cu, scale, causal=True)
    rows = q.isnan().any(-1) | seen(k.isnan().any(-1), lens)
    return out.masked_fill(rows.unsqueeze(-1) | seen(v.isnan(), lens), math.nan)


def compare_attention(
    paths: dict[str, Prepared], exact: Prepared, lens: Sequence[int], scale: float
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Errors of the attention output by rows, a row being a token and a head.

    Rows that look at an element beyond the limit are counted apart. The second result
    has sums of squares of the other rows by request and head, for `interval`.
    """
    wanted = attention(exact, lens, scale)
    q, k, v = ((x.abs() > CAST_LIMIT).any(-1) for x in (exact.q, exact.k, exact.v))
    hit = q | seen(k | v, lens)

    def by_request(squares: torch.Tensor) -> torch.Tensor:
        parts = squares.masked_fill(hit, 0.0).split(lens)
        return torch.stack([part.sum(dim=0) for part in parts])

    squares = wanted.square().sum(-1)
    groups = dict(exact=by_request(squares))
    found = dict(
        rows=hit.numel(),
        hit=int(hit.sum()),
        clear_exact=groups["exact"].sum().item(),
        hit_exact=squares[hit].sum().item(),
    )
    for name, operands in paths.items():
        out = attention(operands, lens, scale)
        squares = (out - wanted).square().sum(-1)
        groups[name] = by_request(squares)
        hit_error = squares[hit].sum().item()
        found[name] = dict(
            nan_rows=int(out.isnan().any(-1).sum()),
            clear_error=groups[name].sum().item(),
            hit_error=None if math.isnan(hit_error) else hit_error,
        )
    return found, groups


def attention_rms(layers: Sequence[dict], path: str, kind: str) -> Optional[float]:
    """Relative RMS error over the "hit" or the "clear" rows; None where it is none."""
    errors = [layer["attention"][path][f"{kind}_error"] for layer in layers]
    exact = sum(layer["attention"][f"{kind}_exact"] for layer in layers)
    if exact == 0 or None in errors:
        return None
    return math.sqrt(sum(errors) / exact)


def interval(groups: Sequence[dict[str, torch.Tensor]], seed: int) -> Optional[list]:
    """Bootstrap interval of the patched path's RMS error over the unpatched one's,
    less 1, with whole groups (a request and head of one layer) drawn again."""
    unpatched, patched = (
        torch.cat([group[name].flatten() for group in groups]).cpu()
        for name in ("unpatched", "patched")
    )
    count = unpatched.numel()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    below = unpatched[drawn].sum(-1)
    if not (below > 0).all():
        return None
    ratios = (patched[drawn].sum(-1) / below).sqrt() - 1
    tail = (1 - CONFIDENCE) / 2
    return torch.quantile(ratios, torch.tensor([tail, 1 - tail]).double()).tolist()


def measure(
    unpatched: Path, model: Optional[Path], settings: Settings, command: str
) -> dict:
    """Run everything; the patched SGLang is the one that imports."""
    with tempfile.TemporaryDirectory() as folder:
        title = "Activations of the checkpoint"
        if model is None:
            from mla_standin.models import make_model

            model = Path(folder, "model")
            make_model("deepseek_v3", model)
            title = "Activations of the small DeepSeek-V3 model"
        shape, layers = capture(model, settings)
    lens = list(settings.lens)
    sources = [Source("model", title, layers), *synthetic(shape, settings)]
    inputs = [x for source in sources for x in source.layers]
    with ThreadPoolExecutor(1) as beside:
        pending = beside.submit(run_unpatched, unpatched, shape, lens, inputs)
        layer = Layer(shape, lens, FP8)  # both import SGLang, which takes its time
        others = pending.result()
    pairs = iter(others["results"])
    reports = []
    for source in sources:
        found, groups = [], []
        for x in source.layers:
            bf16, fp8 = (
                Prepared(**y).map(lambda tensor: tensor.to(DEVICE)) for y in next(pairs)
            )
            patched = layer.prepare(x, patched=True)
            paths = dict(bf16=bf16, unpatched=fp8, patched=patched)
            exact = layer.exact(x)
            operands = {
                name: {
                    path: compare(y.operand(name, shape), exact.operand(name, shape))
                    for path, y in paths.items()
                }
                for name in OPERANDS
            }
            rows, sums = compare_attention(paths, exact, lens, shape.scale)
            found.append(dict(operands=operands, attention=rows))
            groups.append(sums)
        reports.append(
            dict(
                name=source.name,
                title=source.title,
                layers=found,
                attention_interval=interval(groups, settings.seed),
            )
        )
    return dict(
        command=command,
        machine=describe(),
        gpu=HAS_GPU,
        settings=dict(lens=lens, seed=settings.seed, quick=settings.quick),
        dims={n: x for n, x in vars(shape).items() if isinstance(x, int)},
        cast=dict(elements=others["elements"], differ=others["differ"]),
        sources=reports,
    )


def describe() -> str:
    import transformers
    import triton

    from sglang.version import __version__

    where = "CPU, Triton's interpreter"
    if HAS_GPU:
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return (
        f"{where}, torch {torch.__version__}, triton {triton.__version__}, transformers "
        f"{transformers.__version__}, sglang {__version__}, {datetime.date.today()}"
    )


def worse(results: dict) -> list[str]:
    """Where the patched path is further from float64 than the unpatched one, or NaN.

    Attention is a sum of rounding errors, of which single ones cancel by chance: it is
    worse when all of the interval is above zero.
    """
    found = []
    for source in results["sources"]:
        for name, label in OPERANDS.items():
            before, after = (
                pooled(source["layers"], name, path)
                for path in ("unpatched", "patched")
            )
            if after["nan"] > 0:
                found.append(f"{source['name']}: {label}: {after['nan']} NaN")
            # Where both round alike, only the order of summation can differ.
            elif not after["rms"] <= before["rms"] * (1 + 1e-9):
                found.append(
                    f"{source['name']}: {label}: RMS error {after['rms']:.6g}, "
                    f"unpatched {before['rms']:.6g}"
                )
        nan_rows = sum(x["attention"]["patched"]["nan_rows"] for x in source["layers"])
        if nan_rows > 0:
            found.append(f"{source['name']}: attention: {nan_rows} rows with NaN")
        bounds = source["attention_interval"]
        if bounds is not None and not bounds[0] <= 0:
            found.append(
                f"{source['name']}: attention: RMS error {bounds[0]:+.3%} to "
                f"{bounds[1]:+.3%} against unpatched"
            )
    return found


def server_comparisons(path: Optional[Path]) -> Optional[list[dict]]:
    """The end-to-end run's log-probability distances, all scenarios of a model
    together, or None where there are none.

    What this report knows of that file's form is here: in the section `compare`, a list
    `pooled` of objects with scenario, backend, patched_distance, unpatched_distance,
    difference_ci, prompts and tokens.
    """
    if path is None or not path.is_file():
        return None
    names = ("scenario", "backend", "patched_distance", "unpatched_distance")
    names += ("difference_ci", "prompts", "tokens")
    rows = json.loads(path.read_text()).get("compare", {}).get("pooled") or []
    for row in rows:
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(
                f"{path}: a comparison has no {', '.join(missing)}; the end-to-end run "
                "of this version writes them"
            )
    return [{name: row[name] for name in names} for row in rows] or None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: Optional[float], digits: int = 3) -> str:
    if not value:
        return "-" if value is None else "0"
    text = f"{100 * value:.{digits}g}"
    if "e" in text:
        text = f"{float(text):,.7f}".rstrip("0").rstrip(".")
    return text + "%"


def share(count: int, whole: int) -> str:
    return f"{count:,} ({percent(count / whole)})" if count else "0"


def error_table(source: dict) -> str:
    rows = []
    for name, label in OPERANDS.items():
        paths = {path: pooled(source["layers"], name, path) for path in PATHS}
        fp8 = paths["unpatched"], paths["patched"]
        rows.append(
            [label]
            + [percent(stats["rms"], 4) for stats in paths.values()]
            + [f"{stats['max_ulps']:.4f}" for stats in fp8]
            + [percent(stats["misrounded"]) for stats in fp8]
        )
    attention = [attention_rms(source["layers"], path, "clear") for path in PATHS]
    rows.append(["attention output", *(percent(x, 4) for x in attention)] + [""] * 4)
    header = ["", "RMS error, BF16", "unpatched", "patched"]
    for what in ("largest, ulp", "misrounded"):
        header += [f"{what}: unpatched", "patched"]
    return table(header, rows)


def interval_table(results: dict) -> str:
    rows = []
    for source in results["sources"]:
        rms = [attention_rms(source["layers"], p, "clear") for p in PATHS]
        bounds = source["attention_interval"]
        between = "-" if bounds is None else f"{bounds[0]:+.2%} to {bounds[1]:+.2%}"
        rows.append([source["title"], *(percent(x, 4) for x in rms), between])
    header = ["attention output", *PATHS.values(), "patched against unpatched"]
    return table(header, rows)


def overflow_table(results: dict) -> str:
    rows = []
    for source in results["sources"]:
        layers = source["layers"]
        whole = {
            path: [pooled(layers, name, path) for name in ("q", "k", "v", "row")]
            for path in PATHS
        }
        elements = sum(stats["elements"] for stats in whole["patched"])
        beyond = elements - sum(stats["inside"] for stats in whole["patched"])
        nan = [sum(x["nan"] for x in whole[p]) for p in ("unpatched", "patched")]
        largest = max(stats["largest"] for stats in whole["patched"])
        rows.append(
            [source["title"], f"{largest:.4g}", share(beyond, elements)]
            + [share(count, elements) for count in nan]
        )
    header = ["q, k, v, cache row", "largest magnitude", "elements beyond 464"]
    header += ["NaN, unpatched", "NaN, patched"]
    return table(header, rows)


def hit_table(results: dict) -> str:
    rows = []
    for source in results["sources"]:
        attention = [layer["attention"] for layer in source["layers"]]
        whole, hit = (sum(x[key] for x in attention) for key in ("rows", "hit"))
        nan = [
            sum(x[path]["nan_rows"] for x in attention)
            for path in ("unpatched", "patched")
        ]
        rms = [attention_rms(source["layers"], path, "hit") for path in PATHS]
        if nan[0] > 0:
            rms[1] = math.nan
        rows.append(
            [source["title"], share(hit, whole)]
            + [share(count, whole) for count in nan]
            + ["NaN" if x is not None and math.isnan(x) else percent(x) for x in rms]
        )
    header = ["attention rows", "that look at an element beyond 464"]
    header += ["with NaN, unpatched", "with NaN, patched"]
    header += ["their RMS error, BF16", "unpatched", "patched"]
    return table(header, rows)


def server_section(comparisons: Optional[list[dict]]) -> str:
    if comparisons is None:
        return (
            "Not generated: there were no results of the end-to-end run (`--e2e`, a file "
            "that `make e2e` writes on a GPU)."
        )
    rows = []
    for row in comparisons:
        low, high = row["difference_ci"]
        rows.append(
            [row["scenario"], row["backend"]]
            + [f"{row[f'{side}_distance']:.4g}" for side in ("unpatched", "patched")]
            + [
                f"{low:+.3g} to {high:+.3g}",
                f"{row['prompts']:,}",
                f"{row['tokens']:,}",
            ]
        )
    above = sum(row["difference_ci"][0] > 0 for row in comparisons)
    header = ["scenario", "backend", "distance, unpatched", "patched"]
    header += ["patched less unpatched, interval", "prompts", "tokens"]
    return (
        "Distance of the servers' prompt log-probabilities from those of transformers' "
        "own BF16 forward, of the same checkpoint and prompts, as the end-to-end run "
        "measured it; each scenario alone, and what the columns mean, is on [its page]"
        "(e2e/README.md). A difference below zero: the patched server is the nearer one. "
        f"Of {len(comparisons)} comparisons the whole interval is above zero in "
        f"{above}.\n\n{table(header, rows)}"
    )


def plots(results: dict, folder: Path) -> dict[str, str]:
    """Draw the figures; their captions by file name, none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed", file=sys.stderr)
        return {}
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    colors = dict(bf16="0.6", unpatched="tab:orange", patched="tab:blue")
    sources = {source["name"]: source for source in results["sources"]}
    model = sources["model"]

    def save(figure, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=100)
        plt.close(figure)

    def bars(axis, labels, values: dict[str, list], log: bool = False) -> None:
        """Groups of bars, with a word where there is no bar to see."""
        width = 0.8 / len(values)
        heights = [x for series in values.values() for x in series if x]
        top = 1.35 * max(heights, default=1)
        floor = 0.0
        if log:
            top, floor = 2 * top, min(heights, default=1e-6) / 5
            axis.set_yscale("log")
        for i, (path, series) in enumerate(values.items()):
            places = [
                j + (i - (len(values) - 1) / 2) * width for j in range(len(labels))
            ]
            axis.bar(
                places,
                [x or 0 for x in series],
                width,
                label=PATHS[path],
                color=colors[path],
            )
            for place, x in zip(places, series):
                if not x:
                    at = floor * 1.1 if log else top / 100
                    word = "0" if x == 0 else "none"
                    axis.text(place, at, word, ha="center", fontsize=7)
        axis.set_ylim(floor, top)
        if not log:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", ncols=len(values))

    figure, axis = plt.subplots(figsize=(8, 3.6))
    values = {
        path: [pooled(model["layers"], name, path)["rms"] for name in OPERANDS]
        + [attention_rms(model["layers"], path, "clear")]
        for path in PATHS
    }
    labels = [label.replace(", ", ",\n") for label in OPERANDS.values()]
    bars(axis, [*labels, "attention\noutput"], values, log=True)
    axis.set_ylabel("relative RMS error")
    axis.set_title(model["title"], fontsize=10)
    save(figure, "rms_error")

    figure, axis = plt.subplots(figsize=(8, 3.2))
    edges = [i * HISTOGRAM_STEP for i in range(HISTOGRAM_BINS + 1)]
    for path in ("unpatched", "patched"):
        parts = [pooled(model["layers"], name, path) for name in ROTATED]
        counts = [sum(x) for x in zip(*(part["histogram"] for part in parts))]
        whole = sum(counts)
        shares = [x / whole for x in counts]
        color = colors[path]
        axis.stairs(shares, edges, label=PATHS[path], color=color, fill=True, alpha=0.3)
        axis.stairs(shares, edges, color=color, lw=1.5)
    axis.axvline(0.5, color="0.4", linestyle=":", lw=1)
    axis.set_xlim(0.4, edges[-1])
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("error in units of the last place of e4m3")
    axis.set_ylabel("share of elements")
    axis.set_title(f"RoPE parts of q, k and cache row; {model['title']}", fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, "rounding")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    groups = [(f"layer {i}", [x]) for i, x in enumerate(model["layers"])]
    groups += [(s["name"], s["layers"]) for n, s in sources.items() if n != "model"]
    for axis, name in zip(axes, ("q_rope", "row_rope")):
        bars(
            axis,
            [label.replace("_", "\n") for label, _ in groups],
            {
                path: [pooled(layers, name, path)["misrounded"] for _, layers in groups]
                for path in ("unpatched", "patched")
            },
        )
        axis.set_title(OPERANDS[name], fontsize=10)
        axis.tick_params(axis="x", labelsize=7)
    axes[0].set_ylabel("share misrounded")
    save(figure, "misrounded")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    labels = [name.replace("_", "\n") for name in sources]
    nan_rows = {
        path: [
            sum(x["attention"][path]["nan_rows"] for x in source["layers"])
            / sum(x["attention"]["rows"] for x in source["layers"])
            for source in sources.values()
        ]
        for path in ("unpatched", "patched")
    }
    bars(axes[0], labels, nan_rows)
    axes[0].set_title("share of attention rows with NaN", fontsize=10)
    errors = {
        path: [attention_rms(s["layers"], path, "hit") for s in sources.values()]
        for path in ("bf16", "patched")
    }
    bars(axes[1], labels, errors, log=True)
    axes[1].set_title("RMS error of rows that look beyond 464", fontsize=10)
    save(figure, "saturation")
    return {
        "rms_error": "relative RMS error of each operand and of attention",
        "rounding": "errors of rotated elements in units of the last place",
        "misrounded": "share of rotated elements misrounded",
        "saturation": "attention rows with NaN, and the error of saturation",
    }


def render(
    results: dict,
    captions: dict[str, str],
    folder: str,
    comparisons: Optional[list[dict]],
) -> str:
    settings, dims = results["settings"], results["dims"]
    model = results["sources"][0]
    rotated = {
        path: [pooled(model["layers"], name, path) for name in ROTATED]
        for path in ("unpatched", "patched")
    }

    def misrounded(path: str) -> str:
        wrong = sum(x["inside"] - x["correct"] for x in rotated[path])
        return share(wrong, sum(x["inside"] for x in rotated[path]))

    def figure(name: str) -> str:
        if name not in captions:
            return ""
        return f"![{captions[name]}]({folder}/{name}.png)\n\n"

    findings = worse(results)
    verdict = (
        "On none of the inputs is an operand's RMS error larger in the patched path than "
        "in the unpatched one, nor does the attention error's interval below lie above "
        "zero."
    )
    if findings:
        verdict = "**The patched path is worse here:**\n\n" + "\n".join(
            f"- {finding}" for finding in findings
        )
    changes = [
        f"{after['rms'] / before['rms'] - 1:+.2%}"
        for before, after in zip(rotated["unpatched"], rotated["patched"])
    ]
    cast, tokens = results["cast"], sum(settings["lens"])
    if results["gpu"]:
        how = (
            "`unpatched` is what SGLang's own casts gave on this GPU; they differ from "
            f"rounding to nearest even with NaN beyond 464 in {cast['differ']:,} of "
            f"{cast['elements']:,} elements."
        )
    else:
        how = (
            "This is a run without a GPU: kernels ran in Triton's interpreter, and since "
            "torch's cast may saturate on a CPU, the NaN that it makes on a GPU was put "
            "in where the BF16 operand is beyond 464. Else SGLang's casts differ from "
            f"rounding to nearest even in {cast['differ']:,} of {cast['elements']:,} "
            "elements."
        )
    if settings["quick"]:
        how += " Sizes are reduced (`--quick`): a check of the report, not its figures."
    errors = "\n\n".join(
        f"### {source['title']}"
        + (f", {len(source['layers'])} layers" if len(source["layers"]) > 1 else "")
        + f"\n\n{error_table(source)}"
        for source in results["sources"]
    )
    text = f"""# Accuracy

How far q, k, v, the KV-cache row and the attention output are from the definition in
float64, in three paths over the same inputs. This page is generated, on a GPU host by
`make accuracy VENV= SGLANG=/path/to/site-packages`.

| path | |
|---|---|
| {PATHS['bf16']} | unpatched SGLang, BF16 KV cache: RoPE rounded to BF16, no FP8 |
| {PATHS['unpatched']} | unpatched SGLang, FP8 KV cache: RoPE rounded to BF16, then cast by torch to FP8: two roundings, NaN beyond 464 |
| {PATHS['patched']} | patched SGLang: `mla_prefill_quantize_fp8`, rounded to FP8 once from float32, saturating |

All three are SGLang's own attention layer; only the outputs of its projections are put
in. {how}

```
{results['command']}
{results['machine']}
```

Random prompts of {', '.join(map(str, settings['lens']))} tokens ({tokens} together);
{dims['heads']} heads, nope/rope/v/lora
{dims['nope']}/{dims['rope']}/{dims['v']}/{dims['kv_lora']}; seed {settings['seed']} for
prompts and {settings['seed'] + 1} for heavy-tailed inputs. The checkpoint ran in
transformers in BF16; q, the output of `kv_b_proj`, the latent after its norm and k_pe
of every layer were taken before RoPE. Heavy-tailed inputs are as large, with no
projection behind them; with outlier channels, one in {OUTLIER_EVERY} of each tensor is
{OUTLIER_GAINS[0]} to {OUTLIER_GAINS[1]} times the others. Cosines and sines are the
checkpoint's, in float32.

## Rounding

RMS error is relative: over the RMS of the exact values. An ulp is e4m3's at the exact
value; one correct rounding is at most 0.5 off, and a rounding to BF16 before it, which
has 16 steps to one of e4m3, adds up to 1/32. "Misrounded" is the share whose bits are
not those of the float64 value rounded to FP8 once. All of this is of elements within
±464, and of attention rows (a token and a head) that look at no others; the rest is
under Saturation. Attention is computed in float64 from each path's operands.

Of {sum(x['inside'] for x in rotated['patched']):,} rotated elements of the checkpoint's
activations (q, k, cache row), {misrounded('unpatched')} are misrounded in the unpatched
path and {misrounded('patched')} in the patched one; the largest error is
{max(x['max_ulps'] for x in rotated['unpatched']):.4f} and
{max(x['max_ulps'] for x in rotated['patched']):.4f} ulp. What is not rotated is rounded
once in both. FP8's own step is in both: from unpatched to patched the RMS error of
these parts changes by {changes[0]} (q), {changes[1]} (k) and {changes[2]} (cache row).

{verdict}

{figure('rms_error')}{figure('rounding')}{figure('misrounded')}{errors}

### Attention output

The last column is a {CONFIDENCE:.0%} bootstrap interval of the patched path's RMS error
against the unpatched path's ({RESAMPLES:,} draws of whole (layer, prompt, head)
groups): below zero, the patched path is nearer to float64.

{interval_table(results)}

## Saturation

Beyond 464 torch's cast makes NaN, and one NaN in q or k makes NaN of every attention
row that looks at it, all later tokens of the prompt; one in v of one column of them.
The patch saturates at 448: the element is wrong by what it exceeds 448, and the error
stays finite.

{overflow_table(results)}

{hit_table(results)}

The error of these rows in the patched path is that of clipped elements: saturation
keeps a request alive, it does not make FP8 without scales right for such activations.
The BF16 column shows what a wider type would give. NaN is counted by definition; a
kernel that multiplies a masked probability of 0 by NaN spreads it further.

{figure('saturation')}## Servers

{server_section(comparisons)}

## What this does not show

- No real DeepSeek weights: the checkpoint is small and random, and real activations have
  other outliers than the ones drawn here.
- No SM100 attention kernel: attention is float64 from the operands, so what those kernels
  add of their own (FP8 probabilities, their order of summation) is in no figure, and is
  the same on both sides of the patch.
- No prefix: chunks of a cached prefix read the cache row, whose error is above.
- No quality of text: a benchmark on real weights needs a Blackwell GPU.
"""
    return "\n\n".join(map(filled, text.split("\n\n")))


def filled(block: str) -> str:
    """A paragraph in lines of one width; anything else as it is."""
    if block.startswith(("#", "|", "```", "!", "- ", "**")):
        return block
    text = textwrap.fill(block, 88, break_long_words=False, break_on_hyphens=False)
    return text + "\n" * block.endswith("\n")


def options(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sglang", default="0.5.12.post1")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/accuracy"),
        help="folder for data and figures; the report is OUT.md beside it",
    )
    parser.add_argument("--e2e", type=Path, help="results of the end-to-end run, JSON")
    parser.add_argument(
        "--model", type=Path, help="a checkpoint to use instead of the small random one"
    )
    parser.add_argument("--quick", action="store_true", help="small; needs no GPU")
    parser.add_argument(
        "--render-only",
        action="store_true",
        help="write the report again from OUT/results.json and --e2e; measure nothing",
    )
    return parser.parse_args(argv)


def write(results: dict, out: Path, e2e: Optional[Path]) -> Path:
    """Figures and data in the folder `out`, the report beside it."""
    captions = plots(results, out)
    report = out.with_name(out.name + ".md")
    text = render(results, captions, out.name, server_comparisons(e2e))
    report.write_text(text)
    return report


def main(argv: Optional[Sequence[str]] = None) -> int:
    given = options(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    data = given.out / "results.json"
    if given.render_only:
        if not data.is_file():
            sys.exit(f"{data} is not there: run once without --render-only")
        results = json.loads(data.read_text())
    else:
        if not HAS_GPU and not given.quick:
            sys.exit("no GPU: run on a GPU host, or a reduced size here with --quick")
        import patched_sglang

        trees = patched_sglang.lay_out(given.sglang)
        sys.path.insert(0, str(trees.patched))
        # Paths of the host that it ran on say nothing to a reader elsewhere.
        command = "python test/tools/accuracy.py --sglang … --out docs/accuracy --e2e …"
        command += " --model …" * bool(given.model) + " --quick" * given.quick
        results = measure(
            trees.unpatched,
            given.model,
            QUICK if given.quick else Settings(),
            command,
        )
        data.write_text(json.dumps(results) + "\n")
    report = write(results, given.out, given.e2e)
    print(f"wrote {report}")
    findings = worse(results)
    for finding in findings:
        print(f"worse than unpatched: {finding}", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
