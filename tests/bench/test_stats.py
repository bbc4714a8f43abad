"""The statistics of timings: known quantiles, and intervals that cover as often as they claim."""

import numpy as np
import pytest

from bench.stats import TOO_FEW, neighbours, paired, ratio_of_medians


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
    if kind == "clocks fall":
        times *= np.linspace(1, 1.5, rounds)
    return times


KINDS = ("normal", "heavy tails", "outliers", "clocks fall", "neighbours alike")


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
    seen, held = 0, 0
    for _ in range(100):
        a, b = session(kind, 15, draw)
        r = ratio_of_medians(1.05 * a, b, resamples=400)
        assert r.low is not None and r.high is not None
        seen += r.verdict == "slower"
        held += r.low <= 1.05 <= r.high
    assert seen >= 75 and held >= 90


def test_ratios_of_known_samples() -> None:
    same = [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    r = ratio_of_medians(same, same)
    assert (r.ratio, r.low, r.high, r.verdict) == (1.0, 1.0, 1.0, "no difference")
    a, b = session("normal", 12, np.random.default_rng(4))
    r, inverse = ratio_of_medians(a, b), ratio_of_medians(b, a)
    assert r.low and r.high and inverse.low and inverse.high
    assert (r.ratio, r.low) == pytest.approx((1 / inverse.ratio, 1 / inverse.high))
    few = ratio_of_medians([2.0] * 5, [1.0] * 5)
    assert (few.ratio, few.low, few.verdict) == (2.0, None, TOO_FEW)
    assert str(few) == "2.000 (no interval from fewer than 6 rounds)"
    with pytest.raises(ValueError, match="got 3 and 2"):
        ratio_of_medians([1.0, 2.0, 3.0], [1.0, 2.0])


def test_shared_drift_does_not_hide_a_difference() -> None:
    """Clocks that fall by half, in both alike: 2 % is still seen, because rounds are pairs."""
    drift = np.linspace(1, 2, 40)
    noise = np.random.default_rng(3).normal(1, 0.002, size=(2, 40))
    assert ratio_of_medians(1.02 * drift * noise[0], drift * noise[1]).verdict == "slower"
    shuffled = np.random.default_rng(4).permutation(1.02 * drift * noise[0])
    assert ratio_of_medians(shuffled, drift * noise[1]).verdict == "no difference"


def test_neighbours() -> None:
    draw = np.random.default_rng(0)
    assert neighbours(np.ones(20)) == neighbours(np.array([1.0, 2.0])) == 0.0
    assert neighbours(np.tile([1.0, 2.0], 20)) == 0.0  # alternating: no less evidence
    assert neighbours(draw.normal(size=500)) < 0.1 < 0.9 == neighbours(np.arange(40.0))
    alike = np.log(session("neighbours alike", 500, draw))[0]
    assert neighbours(alike) == pytest.approx(0.5, abs=0.1)


def test_pairs() -> None:
    """Differences of 1, 2, 3: 2 +- 4.303 / sqrt(3)."""
    half = 4.3027 / 3**0.5
    found = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-3)
    assert paired([5.0], [1.0]) == (4.0, None, None)
    pairs = np.random.default_rng(0).normal(size=(2000, 2, 5))
    wrong = sum(not low <= 0 <= high for _, low, high in (paired(*pair) for pair in pairs))  # type: ignore[operator]
    assert 0.035 < wrong / 2000 < 0.065
