"""The statistics of timings: known quantiles, and intervals that cover as often as they claim."""

import numpy as np
import pytest

from bench.stats import TOO_FEW, paired, ratio_of_medians

KINDS = ("normal", "heavy tails", "outliers", "clocks fall", "neighbours alike")


def session(kind: str, rounds: int, draw: np.random.Generator) -> np.ndarray:
    """Times of two variants that are equally fast, as one session would give them."""
    noise = draw.normal(size=(2, rounds))
    if kind == "heavy tails":
        noise = draw.standard_t(3, size=(2, rounds))
    if kind == "neighbours alike":  # a correlation of 0.5 from round to round, in each by itself
        for i in range(1, rounds):
            noise[:, i] = 0.5 * noise[:, i - 1] + 0.75**0.5 * noise[:, i]
    times = np.exp(0.01 * noise)
    if kind == "outliers":
        times *= np.where(draw.random((2, rounds)) < 0.08, 1.5, 1.0)
    return times * (np.linspace(1, 1.5, rounds) if kind == "clocks fall" else 1)


@pytest.mark.parametrize("rounds", [6, 10, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_claimed_no_oftener_than_one_is_wrong(kind: str, rounds: int) -> None:
    """300 sessions without a difference, 15 wrong verdicts allowed at 95 %.

    Neighbours that are alike are hard to see in six rounds: 30 there, where a plain bootstrap makes
    about 70 at any number of rounds.
    """
    draw = np.random.default_rng(KINDS.index(kind) + 10 * rounds)
    found = [ratio_of_medians(*session(kind, rounds, draw), resamples=400) for _ in range(300)]
    wrong = sum(r.verdict != "no difference" for r in found)
    assert wrong <= (30 if kind == "neighbours alike" and rounds < 30 else 15)


@pytest.mark.parametrize("kind", KINDS)
def test_five_percent_are_seen_in_fifteen_rounds(kind: str) -> None:
    """Of 100 sessions with 1 % of noise, at least 3 in 4; and the interval holds the truth."""
    draw = np.random.default_rng(KINDS.index(kind))
    sessions = (session(kind, 15, draw) for _ in range(100))
    found = [ratio_of_medians(1.05 * a, b, resamples=400) for a, b in sessions]
    assert sum(r.verdict == "slower" for r in found) >= 75
    assert sum(r.low <= 1.05 <= r.high for r in found if r.low and r.high) >= 90


def test_ratios_of_known_samples() -> None:
    same = [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    assert str(ratio_of_medians(same, same)) == "1.000 [1.000, 1.000] no difference"
    a, b = session("normal", 12, np.random.default_rng(4))
    r, inverse = ratio_of_medians(a, b), ratio_of_medians(b, a)
    assert (1 / r.ratio, 1 / (r.high or 0)) == pytest.approx((inverse.ratio, inverse.low))
    few = ratio_of_medians([2.0] * 5, [1.0] * 5)
    assert (few.ratio, few.low, few.verdict) == (2.0, None, TOO_FEW)
    assert str(few) == "2.000 (no interval from fewer than 6 rounds)"
    with pytest.raises(ValueError, match="got 3 and 2"):
        ratio_of_medians([1.0, 2.0, 3.0], [1.0, 2.0])


def test_pairs() -> None:
    """Differences of 1, 2, 3: 2 +- 4.303 / sqrt(3)."""
    half = 4.3027 / 3**0.5
    found = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-3)
    assert paired([5.0], [1.0]) == (4.0, None, None)
