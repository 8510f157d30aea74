"""Counts of prefill batches in SGLang's metrics and in the log."""

import logging

import mla_harness as harness
import pytest
from batch_runs import native_rope
from mla_harness import TINY, Env, make_env
from patched_sglang import run_python
from sglang_internals import running

from sglang.srt.layers.attention import mla_fp8_prefill, mla_fp8_prefill_counts

NAME = "sglang:mla_fp8_prefill_batches_total"
MODEL = "deepseek"


def make_servers(**server_args) -> tuple[Env, Env]:
    """Two backends of a process, as a target's and a draft model's: one that takes its
    batches, one that declines them."""
    declined = dict(modify_layer=native_rope)
    return tuple(
        make_env(TINY, "trtllm_mla", **changes, **server_args)
        for changes in ({}, declined)
    )


def prefill(env: Env, layers: int = 1) -> None:
    batch = harness.make_batch(env, [5, 3])
    forward_batch = harness.start_batch(env, batch)
    with running(env.backend):
        env.backend.init_forward_metadata(forward_batch)
        for _ in range(layers):
            harness.run_layer(env, forward_batch, batch.hidden)


def serve() -> None:
    """What a scheduler does: three batches of four layers."""
    taken, declined = make_servers(enable_metrics=True, served_model_name=MODEL)
    for env in (taken, declined, taken):
        prefill(env, layers=4)


def test_metrics_are_of_all_processes(unpatched_sglang, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    patched = unpatched_sglang.parents[1] / "patched/python"
    for _ in range(2):
        run_python(patched, __file__)

    from prometheus_client import CollectorRegistry, multiprocess

    collector = multiprocess.MultiProcessCollector(CollectorRegistry(), str(tmp_path))
    samples = [
        (sample.name, sample.labels, sample.value)
        for metric in collector.collect()
        for sample in metric.samples
    ]
    labels = {"model_name": MODEL, "tp_rank": "0"}
    taken = {**labels, "outcome": "taken", "reason": ""}
    declined = {**labels, "outcome": "declined", "reason": "rotary embedding"}
    assert sorted(samples, key=lambda sample: sample[2]) == [
        (NAME, declined, 2.0),
        (NAME, taken, 4.0),
    ]


@pytest.fixture
def counts_log(caplog, monkeypatch):
    """A function that gives the lines of the counts of a new process."""
    name = mla_fp8_prefill_counts.__name__
    batch_counts = mla_fp8_prefill.cache_once(mla_fp8_prefill_counts.BatchCounts)
    monkeypatch.setattr(mla_fp8_prefill, "batch_counts", batch_counts)
    with caplog.at_level(logging.INFO, logger=name):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == name]


def test_without_metrics_the_log_has_them_at_powers_of_ten(counts_log):
    taken, declined = make_servers()
    for env in [declined] * 2 + [taken] * 10:
        prefill(env)
    start = "FP8 prefill, batches of this process"
    assert counts_log() == [
        f"{start}: 1 declined (rotary embedding)",
        f"{start}: 2 declined (rotary embedding), 8 taken",
    ]


def test_batches_that_the_process_cannot_take_are_unsupported(counts_log, monkeypatch):
    monkeypatch.setenv("SGLANG_MLA_FP8_PREFILL", "off")
    prefill(make_servers()[0], layers=2)
    (line,) = counts_log()
    assert line.endswith(": 1 unsupported (SGLANG_MLA_FP8_PREFILL=off)")


if __name__ == "__main__":
    serve()
