"""What the accuracy report measures, on a tiny checkpoint: the patch rounds once, SGLang
without it twice, and what is beyond FP8's range saturates."""

import math

import accuracy
import pytest
import torch
from accuracy import QUICK_PROMPTS


@pytest.fixture(scope="module")
def checkpoint():
    return accuracy.load_checkpoint("tiny", QUICK_PROMPTS)


@pytest.fixture(scope="module")
def errors():
    return accuracy.measure("tiny", QUICK_PROMPTS)


@pytest.mark.parametrize("source", ["checkpoint", "outliers"])
def test_patched_rounds_once_and_unpatched_twice(errors, source):
    for operand in ("q, rotated part", "k", "cache row, rotated part"):
        before, after = errors[source, operand].values()
        # A GPU's float32 rotation can end on the other side of a tie.
        assert after.misrounded < 1e-3
        assert 0.005 < before.misrounded < 0.1
        # Before torch 2.13 the unpatched error of outliers on a GPU is NaN.
        assert not before.relative <= after.relative
    before, after = errors[source, "v"].values()
    assert after.misrounded == 0 and not before.relative < after.relative


def test_patched_attention_is_near_float64(errors):
    assert 0.01 < errors["checkpoint", "attention output"]["patched"].relative < 0.1


def test_outliers_saturate(checkpoint, errors):
    config, layers = checkpoint
    layers = [accuracy.with_outliers(layer) for layer in layers]
    patched, exact = accuracy.prepare(config, layers, QUICK_PROMPTS, "fused")
    beyond = exact.k.abs() > 464
    assert beyond.any()
    assert patched.k.float()[beyond].equal(448 * exact.k[beyond].sign().float())
    for (_, operand), paths in errors.items():
        assert paths["patched"].nan_rows == 0, operand


@pytest.mark.parametrize(
    "operand, place, rows",
    [("q", (3, 1, 0), [3]), ("k", (3, 1, 2), [3, 4]), ("v", (0, 1, 1), [0, 1])],
)
def test_nan_reaches_the_attention_rows_that_look_at_it(operand, place, rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, 4, generator=generator).double()
    clean = accuracy.attend(q, k, v, (2, 3), 0.5)
    dict(q=q, k=k, v=v)[operand][place] = math.nan
    out = accuracy.attend(q, k, v, (2, 3), 0.5)
    wanted = clean.clone()
    wanted[rows, place[1]] = math.nan
    torch.testing.assert_close(out, wanted, equal_nan=True)


def test_attention_is_the_causal_softmax_of_each_prompt():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, 4, generator=generator).double()
    out = accuracy.attend(q, k, v, (2, 3), 0.5)
    weights = (k[2:5, 1] @ q[4, 1] * 0.5).softmax(0)
    torch.testing.assert_close(out[4, 1], weights @ v[2:5, 1])
    torch.testing.assert_close(out[2, 0], v[2, 0])
