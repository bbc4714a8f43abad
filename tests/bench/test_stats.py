"""The statistics of timings: known quantiles, and intervals that cover as often as they claim."""

import numpy as np
import pytest
import torch

from bench.stats import (
    ONE_PAIR,
    TOO_FEW,
    neighbours,
    paired,
    ratio_of_independent_medians,
    ratio_of_medians,
    student_p,
    student_t,
    summarize,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small operations, for which a second thread is in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_summary_of_known_samples() -> None:
    s = summarize([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (s.median, s.q1, s.q3, s.count) == (3.0, 2.0, 4.0, 5)
    assert summarize([7.0]).median == 7.0


def test_nothing_to_summarize() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        summarize([])


def test_ratio_of_identical_samples_is_one() -> None:
    same = [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    r = ratio_of_medians(same, same)
    assert (r.ratio, r.low, r.high) == (1.0, 1.0, 1.0)
    assert r.verdict == "no difference"


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.1, "slower")])
def test_a_clear_difference_is_seen(factor: float, verdict: str) -> None:
    noise = np.random.default_rng(1).normal(1, 0.01, size=(2, 40))
    r = ratio_of_medians(factor * noise[0], noise[1])
    assert r.verdict == verdict
    assert r.low and r.high and r.low < factor < r.high


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
    wrong = 0
    for _ in range(300):
        r = ratio_of_medians(*session(kind, rounds, draw), resamples=400)
        wrong += r.verdict != "no difference"
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


def test_a_and_b_change_places() -> None:
    a, b = session("normal", 12, np.random.default_rng(4))
    r, inverse = ratio_of_medians(a, b), ratio_of_medians(b, a)
    assert r.low and r.high and inverse.low and inverse.high
    assert r.ratio == pytest.approx(1 / inverse.ratio)
    assert (r.low, r.high) == pytest.approx((1 / inverse.high, 1 / inverse.low))


def test_too_few_rounds_for_an_interval() -> None:
    r = ratio_of_medians([2.0] * 5, [1.0] * 5)
    assert (r.ratio, r.low, r.high) == (2.0, None, None)
    assert str(r) == "2.000 (no interval from fewer than 6 rounds)" and r.verdict == TOO_FEW
    assert ratio_of_medians([2.0] * 6, [1.0] * 6).verdict == "slower"
    assert ratio_of_independent_medians([2.0] * 5, [1.0] * 40).verdict == TOO_FEW


def test_students_t_is_what_tables_say() -> None:
    for freedom, t in ((3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert student_t(freedom) == pytest.approx(t, abs=5e-4)


def test_neighbours() -> None:
    draw = np.random.default_rng(0)
    assert neighbours(np.ones(20)) == neighbours(np.array([1.0, 2.0])) == 0.0
    assert neighbours(np.tile([1.0, 2.0], 20)) == 0.0  # alternating: no less evidence
    assert neighbours(draw.normal(size=500)) < 0.1
    alike = np.log(session("neighbours alike", 500, draw))[0]
    assert neighbours(alike) == pytest.approx(0.5, abs=0.1)
    assert neighbours(np.arange(40.0)) == 0.9


def test_shared_drift_does_not_hide_a_difference() -> None:
    """Clocks that fall by half, in both alike: 2 % is still seen, because rounds are pairs."""
    drift = np.linspace(1, 2, 40)
    noise = np.random.default_rng(3).normal(1, 0.002, size=(2, 40))
    assert ratio_of_medians(1.02 * drift * noise[0], drift * noise[1]).verdict == "slower"
    shuffled = np.random.default_rng(4).permutation(1.02 * drift * noise[0])
    assert ratio_of_medians(shuffled, drift * noise[1]).verdict == "no difference"


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="same 1 or more rounds, got 3, 2"):
        ratio_of_medians([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "no difference"), (1.05, "slower"), (0.95, "faster")]
)
def test_two_runs_of_different_length(factor: float, verdict: str) -> None:
    draw = np.random.default_rng(5)
    a, b = factor * draw.normal(1, 0.01, 25), draw.normal(1, 0.01, 40)
    r = ratio_of_independent_medians(a, b)
    assert r.verdict == verdict and r.low and r.high and r.low <= factor <= r.high


def test_independent_interval_covers_too() -> None:
    draw = np.random.default_rng(6)
    verdicts = [
        ratio_of_independent_medians(*draw.lognormal(0, 0.05, size=(2, n)), resamples=400).verdict
        for n in [6, 31] * 100
    ]
    assert verdicts.count("no difference") >= 190


def test_no_sample_is_no_evidence() -> None:
    with pytest.raises(ValueError, match="1 or more samples each, got 0, 2"):
        ratio_of_independent_medians([], [1.0, 2.0])


@pytest.mark.parametrize(
    ("freedom", "t"),  # two-sided 5 %, from the tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (29, 2.045), (30, 2.042)],
)
def test_students_p(freedom: int, t: float) -> None:
    assert student_p(t, freedom) == pytest.approx(0.05, rel=2e-3)
    assert student_p(-t, freedom) == student_p(t, freedom) and student_p(0.0, freedom) == 1


def test_pairs_of_known_differences() -> None:
    """Differences of 1, 2, 3: 2 +- 4.303 / sqrt(3), and t = 2 sqrt(3)."""
    found = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    half = 4.3027 / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-4)
    assert found.p == pytest.approx(0.0742, abs=1e-4) and found.verdict == "no difference"
    assert paired([1.0, 2.0, 3.1], [2.0, 3.0, 4.0]).verdict == "lower"
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.1]).verdict == "higher"
    assert paired([5.0], [1.0]).verdict == ONE_PAIR
    same = paired([1.0, 2.0], [1.0, 2.0])
    assert same.p == 1 and same.verdict == "no difference"


def test_pairs_without_a_difference_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(2000, 2, 5))
    wrong = sum(paired(*pair).verdict != "no difference" for pair in pairs)
    assert 0.035 < wrong / 2000 < 0.065
