"""How many prefill batches FP8 prefill has taken and declined, by reason.

With ``--enable-metrics`` they are among SGLang's metrics:
``sglang:mla_fp8_prefill_batches_total{model_name, tp_rank, outcome, reason}``. Else the
log has them whenever their sum reaches a power of ten, and not at exit, as a server may
end its schedulers with SIGKILL.

Counted is what reaches the hook: warm-up requests and a draft model's batches too, and
each half of two-batch overlap; nothing that runs absorbed, as in most prefill CUDA graphs,
and no idle rank. Ranks of a tensor-parallel group have a label, as they run the same
batches; those of pipeline and data parallelism with the same label are summed.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Optional

from sglang.jit_kernel.utils import cache_once
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank
from sglang.srt.utils import log_info_on_rank0

if TYPE_CHECKING:
    import prometheus_client

logger = logging.getLogger(__name__)

# The last is declined too, as any batch of the process would be.
TAKEN, DECLINED, UNSUPPORTED = "taken", "declined", "unsupported"


@cache_once
def _metric() -> prometheus_client.Counter:
    # When it is imported it decides whether processes share their samples, by a variable
    # of the environment that SGLang sets before it starts the schedulers.
    from prometheus_client import Counter

    return Counter(
        name="sglang:mla_fp8_prefill_batches_total",
        documentation="Prefill batches that FP8 prefill has taken or declined.",
        labelnames=["model_name", "tp_rank", "outcome", "reason"],
    )


class BatchCounts:
    """Counts of this process's prefill batches by (outcome, reason).

    model_name is the metrics' label; None where they are off.
    """

    def __init__(self, model_name: Optional[str]):
        self.by_outcome: Counter[tuple[str, str]] = Counter()
        self._model_name = model_name
        self._samples = {}
        self._logged_at = 1

    def add(self, outcome: str, reason: Optional[str]) -> None:
        """Count one batch; reason as in the log, None where it is taken."""
        key = outcome, reason or ""
        self.by_outcome[key] += 1
        if self._model_name is None:
            self._log()
            return
        if key not in self._samples:
            labels = self._model_name, get_tensor_model_parallel_rank(), *key
            self._samples[key] = _metric().labels(*labels)
        self._samples[key].inc()

    def _log(self) -> None:
        if sum(self.by_outcome.values()) < self._logged_at:
            return
        counts = (
            f"{count} {outcome}" + (f" ({reason})" if reason else "")
            for (outcome, reason), count in self.by_outcome.items()
        )
        log_info_on_rank0(
            logger, f"FP8 prefill, batches of this process: {', '.join(counts)}"
        )
        self._logged_at *= 10


# One for all backends of a process.
batch_counts = cache_once(BatchCounts)
