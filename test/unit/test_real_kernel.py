"""The kernels for SM100 that the stand-ins are of, up to their launch: they take what the
hook hands them, and what they refuse or would misread, the stand-ins refuse."""

import re

import pytest
import torch
from gpu_stand_ins import TOKENSPEED
from mla_harness import make_batch, make_env, reference, run_prefill
from mla_standin import kernels
from real_kernels import LAUNCHED, outcomes

from sglang.srt.layers.attention import trtllm_mla_backend

DIMS = reference.MODELS["deepseek-v3"]._replace(heads=4)
# A backend's kernel, where SGLang finds it, and its package.
KERNELS = {
    "tokenspeed_mla": ("tokenspeed_mla_prefill", TOKENSPEED, "tokenspeed-mla"),
    "trtllm_mla": (
        "trtllm_ragged_attention_deepseek",
        trtllm_mla_backend.flashinfer.prefill,
        "flashinfer-python",
    ),
}
# What SGLang's releases pin, and the newest tokenspeed_mla.
VERSIONS = {
    "tokenspeed_mla": ("0.1.1", "0.1.7", "0.1.8", "2.0.4"),
    "trtllm_mla": (
        *("0.6.11.post1", "0.6.12", "0.6.14", "0.6.15.post1", "0.6.17", "0.6.18"),
        *("0.7.1", "0.7.2"),
    ),
}
IN_MAKE_TEST = ("0.1.1", "2.0.4", "0.6.11.post1")


def handed_over(backend: str, producer: str, monkeypatch) -> dict[str, dict]:
    """The arguments of the kernel's calls for one batch that the hook takes: the new
    tokens, with rows of padding, and two chunks of a prefix that one request has."""
    kernel, home, _ = KERNELS[backend]
    monkeypatch.setenv("SGLANG_MLA_FP8_PREFILL", producer)
    env = make_env(DIMS, backend)
    calls, stand_in = {}, getattr(home, kernel)

    def recorded(**arguments):
        calls[f"{producer} {len(calls)}"] = arguments
        return stand_in(**arguments)

    batch = make_batch(env, [5, 3], [8, 0], chunks=2, pad_rows=2)
    with monkeypatch.context() as patch:
        patch.setattr(home, kernel, recorded)
        run_prefill(env, batch)
    assert len(calls) == 3
    return calls


def first_64(x: torch.Tensor) -> torch.Tensor:
    return x[..., :64].contiguous()


def in_wider_rows(x: torch.Tensor) -> torch.Tensor:
    return x.repeat(1, 1, 2)[..., : x.shape[2]]


def at_8_bytes(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.flatten()[:8], x.flatten()])[8:].view(x.shape)


def one_row_less(x: torch.Tensor) -> torch.Tensor:
    return x[1:]


def lens(*cumulated: int):
    return lambda x: torch.tensor(cumulated, dtype=x.dtype, device=x.device)


NOT_FP8 = "argument #{} .*expected dtype=float8_e4m3fn"
NOT_ALIGNED = "argument #{} .*expected data alignment=16"
NO_SUCH_SHAPE = "shape .* is invalid for input of size"
# An argument, what is wrong with it, and what becomes of the call; a launch would read
# other memory than is meant. tokenspeed_mla's kernel takes all operands for packed;
# FlashInfer hands trtllm-gen's no strides of the query.
WRONG = {
    "tokenspeed_mla": [
        ("key", torch.Tensor.bfloat16, NOT_FP8.format(1)),
        ("value", torch.Tensor.bfloat16, NOT_FP8.format(2)),
        ("query", at_8_bytes, NOT_ALIGNED.format(0)),
        ("key", at_8_bytes, NOT_ALIGNED.format(1)),
        ("value", at_8_bytes, NOT_ALIGNED.format(2)),
        ("value", lambda v: v.repeat(1, 1, 2)[..., ::2], r"strides\[4\] .* to be 1"),
        ("query", lambda q: q.flatten(1), "not enough values to unpack"),
        ("key", first_64, NO_SUCH_SHAPE),
        ("value", first_64, r"Must be \(192, 128\), but got \(192, 64\)"),
        ("key", one_row_less, NO_SUCH_SHAPE),
        ("value", one_row_less, NO_SUCH_SHAPE),
        ("key", lambda k: k[:, :1].contiguous(), NO_SUCH_SHAPE),
        (
            "cum_seq_lens_q",
            lens(0, 8),
            r"cum_seqlen_k.shape\[0\] .*to match cum_seqlen_q",
        ),
        ("query", in_wider_rows, LAUNCHED),
        ("key", in_wider_rows, LAUNCHED),
        ("value", in_wider_rows, LAUNCHED),
        ("batch_size", lambda n: n + 1, LAUNCHED),
        ("cum_seq_lens", lens(0, 9, 8), LAUNCHED),
        ("cum_seq_lens", lens(0, 5, 11), LAUNCHED),
        ("cum_seq_lens_q", lens(0, 5, 11), LAUNCHED),
        ("max_seq_len", lambda n: n - 1, LAUNCHED),
        ("max_seq_len_q", lambda n: n - 1, LAUNCHED),
    ],
    "trtllm_mla": [
        ("key", first_64, "192 query and 128 value|key=64"),
        ("value", first_64, "192 query and 128 value|value=64"),
        ("out", lambda out: out.to(torch.float8_e4m3fn), "FP8 output is not supported"),
        ("out", one_row_less, "out must have shape"),
        ("query", in_wider_rows, LAUNCHED),
    ],
}


@pytest.mark.parametrize(
    "backend, version",
    [
        pytest.param(
            *(backend, version),
            marks=[] if version in IN_MAKE_TEST else pytest.mark.every_release,
        )
        for backend, versions in VERSIONS.items()
        for version in versions
    ],
)
def test_kernel_and_stand_in(backend, version, flashinfer, log, monkeypatch, tmp_path):
    kernel, home, package = KERNELS[backend]
    flashinfer(True)
    taken = handed_over(backend, "fused", monkeypatch)
    first = taken["fused 0"]
    taken |= handed_over(backend, "composed", monkeypatch)
    producers = [line.partition(" preparation ")[2] for line in log()]
    assert producers == ["with the fused producer", "with the composed producer"]
    wrong, expected = {}, dict.fromkeys(taken, LAUNCHED)
    for argument, change, outcome in WRONG[backend]:
        name = f"{len(wrong)}, {argument}"
        wrong[name] = {**first, argument: change(first[argument])}
        expected[name] = outcome
    # 150 MB, for the launcher.
    omitted = {"workspace_buffer": None} if backend == "trtllm_mla" else {}
    calls = {name: call | omitted for name, call in (taken | wrong).items()}
    found = outcomes(kernel, f"{package}=={version}", calls, tmp_path)
    for name, outcome in expected.items():
        assert re.search(outcome, found[name]), (name, found[name])

    monkeypatch.setattr(kernels, "SETTINGS", kernels.Settings())
    stand_in = getattr(home, kernel)
    for call in taken.values():
        stand_in(**call)
    for name, call in wrong.items():
        with pytest.raises(ValueError):
            stand_in(**call)
            pytest.fail(f"takes {name}")
