"""Ratios of two sides' figures with their 95% confidence intervals, by bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000


class Ratio(NamedTuple):
    value: float
    low: float
    high: float


def ratio_of_sums(new: Sequence[float], old: Sequence[float]) -> Ratio:
    """sum(new) / sum(old), where new[i] and old[i] belong together."""
    return _ratio(np.sum, new, old, paired=True)


def ratio_of_medians(new: Sequence[float], old: Sequence[float]) -> Ratio:
    """median(new) / median(old) of independent measurements."""
    return _ratio(np.median, new, old, paired=False)


def _ratio(
    statistic: Callable, new: Sequence[float], old: Sequence[float], paired: bool
) -> Ratio:
    data = (np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64))
    if not all(np.isfinite(values).all() for values in data):
        raise ValueError("values that are not finite have no ratio")

    def ratio(new: np.ndarray, old: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(new, axis=axis) / statistic(old, axis=axis)

    interval = stats.bootstrap(
        data,
        ratio,
        paired=paired,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(float(ratio(*data)), float(interval.low), float(interval.high))
