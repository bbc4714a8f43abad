"""The statistics of timings: known quantiles, and intervals that cover as often as they claim."""

import numpy as np
import pytest

from bench.stats import ratio_of_independent_medians, ratio_of_medians, summarize


def test_summary_of_known_samples() -> None:
    s = summarize([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (s.median, s.q1, s.q3, s.count) == (3.0, 2.0, 4.0, 5)
    assert summarize([7.0]).median == 7.0


def test_nothing_to_summarize() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        summarize([])


def test_ratio_of_identical_samples_is_one() -> None:
    r = ratio_of_medians([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (r.ratio, r.low, r.high) == (1.0, 1.0, 1.0)
    assert r.verdict == "no difference"


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.1, "slower")])
def test_a_clear_difference_is_seen(factor: float, verdict: str) -> None:
    noise = np.random.default_rng(1).normal(1, 0.01, size=(2, 40))
    r = ratio_of_medians(factor * noise[0], noise[1])
    assert r.verdict == verdict
    assert r.low < factor < r.high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 experiments without a difference: about 10 verdicts too many at 95 %."""
    draw = np.random.default_rng(2)
    verdicts = [
        ratio_of_medians(*draw.lognormal(0, 0.05, size=(2, 31)), resamples=500).verdict
        for _ in range(200)
    ]
    assert 180 <= verdicts.count("no difference") <= 200


def test_shared_drift_does_not_hide_a_difference() -> None:
    """Clocks that fall by half, in both alike: 2 % is still seen, because rounds are pairs."""
    drift = np.linspace(1, 2, 40)
    noise = np.random.default_rng(3).normal(1, 0.002, size=(2, 40))
    assert ratio_of_medians(1.02 * drift * noise[0], drift * noise[1]).verdict == "slower"
    shuffled = np.random.default_rng(4).permutation(1.02 * drift * noise[0])
    assert ratio_of_medians(shuffled, drift * noise[1]).verdict == "no difference"


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="same 2 or more rounds, got 3, 2"):
        ratio_of_medians([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "no difference"), (1.05, "slower"), (0.95, "faster")]
)
def test_two_runs_of_different_length(factor: float, verdict: str) -> None:
    draw = np.random.default_rng(5)
    a, b = factor * draw.normal(1, 0.01, 25), draw.normal(1, 0.01, 40)
    r = ratio_of_independent_medians(a, b)
    assert r.verdict == verdict and r.low <= factor <= r.high


def test_independent_interval_covers_too() -> None:
    draw = np.random.default_rng(6)
    verdicts = [
        ratio_of_independent_medians(*draw.lognormal(0, 0.05, size=(2, 31)), resamples=500).verdict
        for _ in range(200)
    ]
    assert 180 <= verdicts.count("no difference") <= 200


def test_one_sample_is_no_evidence() -> None:
    with pytest.raises(ValueError, match="2 or more samples each, got 1, 2"):
        ratio_of_independent_medians([1.0], [1.0, 2.0])
