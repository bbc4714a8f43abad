"""Statistics of timings: intervals that cover as often as they claim, and known samples."""

import numpy as np
import pytest

from bench.stats import TOO_FEW, describe, paired, ratio_of_medians

KINDS = ("normal", "outliers", "clocks fall", "neighbours alike")


def session(kind: str, rounds: int, draw: np.random.Generator) -> np.ndarray:
    """Returns times of two variants that are equally fast, as one session gives them."""
    noise = draw.normal(size=(2, rounds))
    if kind == "neighbours alike":  # each with a correlation of 0.5 from round to round
        for i in range(1, rounds):
            noise[:, i] = 0.5 * noise[:, i - 1] + 0.75**0.5 * noise[:, i]
    times = np.exp(0.01 * noise)
    if kind == "outliers":
        times *= np.where(draw.random((2, rounds)) < 0.08, 1.5, 1.0)
    return times * (np.linspace(1, 1.5, rounds) if kind == "clocks fall" else 1)


def ratios(kind: str, rounds: int, times: float, count: int) -> list[dict]:
    draw = np.random.default_rng(KINDS.index(kind) + 10 * rounds)
    sessions = (session(kind, rounds, draw) for _ in range(count))
    return [ratio_of_medians(times * a, b, resamples=400) for a, b in sessions]


@pytest.mark.parametrize("rounds", [6, 10, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_variants_get_few_wrong_verdicts(kind: str, rounds: int) -> None:
    """Allows 15 of 300, and 30 for few rounds with alike neighbours: a plain bootstrap has 70."""
    wrong = sum(r["verdict"] != "no difference" for r in ratios(kind, rounds, 1.0, 300))
    assert wrong <= (30 if kind == "neighbours alike" and rounds < 30 else 15)


@pytest.mark.parametrize("kind", KINDS)
def test_five_percent_are_seen_in_fifteen_rounds(kind: str) -> None:
    found = ratios(kind, 15, 1.05, 100)
    assert sum(r["verdict"] == "slower" for r in found) >= 75
    assert sum(r["low"] <= 1.05 <= r["high"] for r in found) >= 90


def test_known_samples() -> None:
    same = [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    assert describe(ratio_of_medians(same, same)) == "1.000 [1.000, 1.000] no difference"
    a, b = session("normal", 12, np.random.default_rng(4))
    r, inverse = ratio_of_medians(a, b), ratio_of_medians(b, a)
    assert (r["ratio"], r["high"]) == pytest.approx((1 / inverse["ratio"], 1 / inverse["low"]))
    few = ratio_of_medians([2.0] * 5, [1.0] * 5)
    assert describe(few) == f"2.000 {TOO_FEW}" and few["low"] is None
    half = 4.3027 / 3**0.5  # Student's t with 2 degrees of freedom
    pairs = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert pairs == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-3)
    assert paired([5.0], [1.0]) == (4.0, None, None)
