"""Statistics of timings: medians with quartiles, ratios with intervals, verdicts.

An interval is a bootstrap's (Efron, 1979), widened for few rounds (Student's t for the normal
quantile, n/(n-1) for the variance) and for rounds that resemble their neighbours. n rounds with a
neighbour correlation r count as n (1 - r)/(1 + r) independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastgpt.train.compare import student_t

# Below six rounds even "all on one side" is no 95 % evidence: 2 / 2^5 = 6 %.
MIN_ROUNDS = 6
NORMAL_QUANTILE = 1.959964  # two-sided 95 %, as all intervals here
MAX_CORRELATION = 0.9
RESAMPLES = 4000
TOO_FEW = f"no interval from fewer than {MIN_ROUNDS} rounds"

Samples = Sequence[float] | np.ndarray


def ratio_of_medians(
    a: Samples, b: Samples, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Returns median(a) / median(b) of samples from the same rounds: ratio, low, high, verdict.

    The bootstrap draws rounds, so that a drift of the clocks, which a[i] and b[i] share, does not
    widen the interval. It is None for fewer than `MIN_ROUNDS`.
    """
    x, y = np.log(a), np.log(b)  # so that a / b and b / a agree
    rounds = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    drawn = np.median(x[rounds], axis=1) - np.median(y[rounds], axis=1)
    center, n = float(np.median(x) - np.median(y)), len(x)
    if n < MIN_ROUNDS:
        return {"ratio": math.exp(center), "low": None, "high": None, "verdict": TOO_FEW}
    correlation = neighbours(x - y)
    factor = (1 + correlation) / (1 - correlation)
    wider = student_t(max(int(n / factor) - 1, 3)) / NORMAL_QUANTILE
    wider *= math.sqrt(factor * n / (n - 1))
    ends = np.quantile(drawn, (0.025, 0.975))
    low, high = (math.exp(center + wider * (float(q) - center)) for q in ends)
    verdict = "faster" if high < 1 else "slower" if low > 1 else "no difference"
    return {"ratio": math.exp(center), "low": low, "high": high, "verdict": verdict}


def describe(r: Mapping[str, Any]) -> str:
    """Returns a ratio with its interval in words."""
    interval = "" if r["low"] is None else f" [{r['low']:.3f}, {r['high']:.3f}]"
    return f"{r['ratio']:.3f}{interval} {r['verdict']}"


def neighbours(samples: Samples) -> float:
    """Returns the rank correlation of successive samples, from 0 to `MAX_CORRELATION`.

    Ranks make one outlier harmless. The estimate's bias, -(1 + 4r)/n, is corrected.
    """
    n, x = len(samples), np.asarray(samples, float)
    if n <= 4 or x.max() == x.min():
        return 0.0
    ranks = x.argsort().argsort() - (n - 1) / 2
    found = float((ranks[1:] * ranks[:-1]).sum() / (ranks * ranks).sum())
    return min(max((n * found + 1) / (n - 4), 0.0), MAX_CORRELATION)


def paired(a: Samples, b: Samples) -> tuple[float, float | None, float | None]:
    """Returns the mean of a[i] - b[i] and its 95 % interval by Student's t, None for one pair."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    n, mean = len(differences), float(differences.mean())
    if n == 1:
        return mean, None, None
    half = student_t(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half
