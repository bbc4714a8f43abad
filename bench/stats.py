"""Statistics of timings: medians with quartiles, ratios with intervals, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of `count` samples, in the samples' unit."""

    median: float
    q1: float
    q3: float
    count: int


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles (linear interpolation) of at least one sample."""
    if len(samples) == 0:
        raise ValueError("summarize: samples must not be empty")
    q1, median, q3 = np.quantile(np.asarray(samples, dtype=np.float64), [0.25, 0.5, 0.75])
    return Summary(float(median), float(q1), float(q3), len(samples))


@dataclass(frozen=True)
class Ratio:
    """median(a) / median(b) and its bootstrap interval."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether a took less time than b: "faster", "slower" or "no difference"."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference"


def ratio_of_medians(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Ratio:
    """median(a) / median(b) with a percentile bootstrap interval (Efron, 1979).

    a[i] and b[i] are of the same round, measured one after the other: rounds are drawn, not single
    samples, so that a drift of the clocks, which both share, does not widen the interval.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"ratio_of_medians: a and b need the same 2 or more rounds, got {len(a)}, {len(b)}"
        )
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    rounds = np.random.default_rng(seed).integers(0, len(x), size=(resamples, len(x)))
    ratios = np.median(x[rounds], axis=1) / np.median(y[rounds], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Ratio(float(np.median(x) / np.median(y)), float(low), float(high))


def ratio_of_independent_medians(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Ratio:
    """As `ratio_of_medians`, for samples of two runs: each is drawn from by itself."""
    if len(a) < 2 or len(b) < 2:
        raise ValueError(
            f"ratio_of_independent_medians: 2 or more samples each, got {len(a)}, {len(b)}"
        )
    draw = np.random.default_rng(seed)
    x, y = (np.asarray(samples, dtype=np.float64) for samples in (a, b))
    medians = [np.median(draw.choice(s, size=(resamples, len(s))), axis=1) for s in (x, y)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return Ratio(float(np.median(x) / np.median(y)), float(low), float(high))
