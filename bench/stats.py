"""Statistics of timings: medians with quartiles, ratios with intervals, verdicts.

An interval is a bootstrap's (Efron, 1979), widened for what a plain bootstrap misses in timings:
few rounds (Student's t for the normal quantile, n/(n-1) for the variance) and rounds that resemble
their neighbours, which carry less evidence than as many independent ones (n / f^2 of them, with
f^2 = (1 + r)/(1 - r) for a correlation r of neighbours). On synthetic sessions without a difference
that makes 1 to 4 wrong verdicts in 100, at six rounds as at forty; the plain bootstrap makes
20 once neighbours correlate by 0.5; tests hold that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgpt.train.compare import ONE_PAIR, student_t

if TYPE_CHECKING:  # results are read without PyTorch too
    from torch import Tensor

# Below six rounds even "all on one side" is no 95 % evidence: 2 / 2^5 = 6 %.
MIN_ROUNDS = 6
NORMAL_QUANTILE = 1.959964  # two-sided 95 %, as all intervals here
MAX_CORRELATION = 0.9
RESAMPLES = 4000

Samples = Sequence[float]  # or a tensor or an array of them


def _array(samples: Samples | Tensor) -> Tensor:
    import torch

    return torch.as_tensor(samples, dtype=torch.float64)


def _drawn_medians(*series: Tensor, resamples: int, seed: int) -> list[Tensor]:
    """Medians of `resamples` draws, with the same rounds of each series."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    rounds = torch.randint(len(series[0]), (resamples, len(series[0])), generator=draw)
    return [_median(x[rounds]) for x in series]


def _median(samples: Tensor) -> Tensor:
    """Over the last dimension; of two in the middle their mean, unlike torch.median."""
    n = samples.shape[-1]
    ordered = samples.sort(dim=-1).values
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of `count` samples, in the samples' unit."""

    median: float
    q1: float
    q3: float
    count: int


def summarize(samples: Samples) -> Summary:
    """Median and quartiles (linear interpolation) of at least one sample."""
    if len(samples) == 0:
        raise ValueError("summarize: samples must not be empty")
    values = [float(x) for x in samples]
    if len(values) == 1:  # of which Python 3.11 has no quantiles
        return Summary(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, q1, q3, len(values))


@dataclass(frozen=True)
class Ratio:
    """median(a) / median(b) and its 95 % interval; None: too few rounds for one."""

    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Whether a took less time than b: "faster", "slower", "no difference"; or "too few"."""
        if self.low is None or self.high is None:
            return TOO_FEW
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.ratio:.3f} ({TOO_FEW})"
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}] {self.verdict}"


TOO_FEW = f"no interval from fewer than {MIN_ROUNDS} rounds"


def ratio_of_medians(a: Samples, b: Samples, *, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """median(a) / median(b) with a 95 % interval.

    a[i] and b[i] are of the same round, measured one after the other: rounds are drawn, not single
    samples, so that a drift of the clocks, which both share, does not widen the interval.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(
            f"ratio_of_medians: a and b need the same 1 or more rounds, got {len(a)}, {len(b)}"
        )
    x, y = _array(a).log(), _array(b).log()
    # Logarithms, so that an interval widens by a factor and a / b and b / a agree.
    ours, theirs = _drawn_medians(x, y, resamples=resamples, seed=seed)
    center = float(_median(x) - _median(y))
    return _interval(center, ours - theirs, len(x), neighbours(x - y))


def ratio_of_independent_medians(
    a: Samples, b: Samples, *, resamples: int = RESAMPLES, seed: int = 0
) -> Ratio:
    """As `ratio_of_medians`, for samples of two runs: each is drawn from by itself."""
    if not len(a) or not len(b):
        raise ValueError(
            f"ratio_of_independent_medians: 1 or more samples each, got {len(a)}, {len(b)}"
        )
    x, y = _array(a).log(), _array(b).log()
    (ours,) = _drawn_medians(x, resamples=resamples, seed=seed)
    (theirs,) = _drawn_medians(y, resamples=resamples, seed=seed + 1)
    center = float(_median(x) - _median(y))
    correlation = max(neighbours(x), neighbours(y))
    return _interval(center, ours - theirs, min(len(x), len(y)), correlation)


def _interval(center: float, drawn: Tensor, rounds: int, correlation: float) -> Ratio:
    """exp of `center` and of the bootstrap's quantiles, widened (see the module's docstring)."""
    if rounds < MIN_ROUNDS:
        return Ratio(math.exp(center), None, None)
    factor = (1 + correlation) / (1 - correlation)
    wider = student_t(max(int(rounds / factor) - 1, 3)) / NORMAL_QUANTILE
    wider *= math.sqrt(factor * rounds / (rounds - 1))
    ends = drawn.quantile(_array([0.025, 0.975])).tolist()
    low, high = (center + wider * (q - center) for q in ends)
    return Ratio(math.exp(center), math.exp(low), math.exp(high))


def neighbours(samples: Samples | Tensor) -> float:
    """How much successive samples' ranks correlate, from 0 to `MAX_CORRELATION`.

    Ranks, so that one outlier says nothing; corrected for the estimate's bias, -(1 + 4r)/n.
    """
    n, x = len(samples), _array(samples)
    if n <= 4 or x.max() == x.min():
        return 0.0
    ranks = x.argsort().argsort() - (n - 1) / 2
    found = float((ranks[1:] * ranks[:-1]).sum() / (ranks * ranks).sum())
    return min(max((n * found + 1) / (n - 4), 0.0), MAX_CORRELATION)


@dataclass(frozen=True)
class Paired:
    """Mean of the differences of pairs, its 95 % interval and the p-value of "no difference".

    One pair has no interval, and says nothing: None.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def verdict(self) -> str:
        """ "lower", "higher" or "no difference", by whether the interval excludes 0."""
        if self.low is None or self.high is None:
            return ONE_PAIR
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "no difference"


def paired(a: Samples, b: Samples) -> Paired:
    """Student's t test of a[i] - b[i], which share what they owe to chance, such as a seed."""
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Paired(mean, None, None, None)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Paired(mean, mean, mean, float(mean == 0))
    half = student_t(n - 1) * error
    return Paired(mean, mean - half, mean + half, student_p(mean / error, n - 1))


def student_p(t: float, freedom: int) -> float:
    """How likely |Student's t| is to be larger by chance (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if freedom == 1:
        total = 0.0
    inside = math.sin(angle) * total
    return 1.0 - (2 / math.pi * (angle + inside) if odd else inside)
