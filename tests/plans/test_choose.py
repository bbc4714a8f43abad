"""The choice among candidates that are fast, slow, wrong, broken, hanging or flaky, by a clock
that the test turns."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from fastgpt_kernels.plans.child import Failed
from fastgpt_kernels.plans.choose import Candidate, Found, Trial, choose


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Candidates by name: milliseconds, or what is wrong with them. A check takes a second."""

    parallel = 1

    def __init__(self, seed: int = 0, **ms: float | str):
        self.ms, self.clock, self.noise = ms, Clock(), random.Random(seed)
        self.checked, self.timed = Counter(), Counter()

    @property
    def candidates(self) -> list[Candidate]:
        return [Candidate(name) for name in self.ms]

    def check(self, c: Candidate) -> None:
        self.checked[c.name] += 1
        self.clock.now += 60 if self.ms[c.name] == "hangs" else 1
        if self.ms[c.name] in ("hangs", "wrong", "raises"):
            raise Failed(str(self.ms[c.name]))

    def time(self, c: Candidate) -> float:
        self.timed[c.name] += 1
        self.clock.now += 0.1
        ms = self.ms[c.name]
        if ms == "fails later":
            if self.timed[c.name] > 4:
                raise Failed("CUDA error")
            return 1.0
        if ms == "flaky":  # often much faster, as often much slower
            return self.noise.choice([5.0, 20.0])
        assert isinstance(ms, float)
        return ms * self.noise.lognormvariate(0, 0.003)

    def choose(self, **kwargs) -> Found:
        return choose(self.candidates, self, clock=self.clock, **kwargs)


def test_the_fastest_is_taken_and_what_is_broken_is_named():
    fake = Fake(
        default=10.0, fast=8.0, faster=7.0, slow=12.0, hopeless=30.0, wrong="wrong",
        raises="raises", hangs="hangs", later="fails later", flaky="flaky",
    )  # fmt: skip
    found = fake.choose()
    assert (found.default, found.choice, found.complete) == ("default", "faster", True)
    assert found.gain == pytest.approx(10 / 7, rel=0.01)
    problems = {name: t.problem for name, t in found.trials.items() if t.problem}
    assert problems == {
        "wrong": "wrong", "raises": "raises", "hangs": "hangs", "later": "CUDA error",
    }  # fmt: skip
    assert set(found.trials) == set(fake.ms) and found.trials["faster"].proven
    assert fake.timed["hopeless"] == 3 < fake.timed["slow"]
    assert not any(fake.timed[name] for name in ("wrong", "raises", "hangs"))


@pytest.mark.parametrize("other", [10.0, 9.9, 9.85, 10.5, "flaky", "wrong", "hangs", "fails later"])
def test_never_worse_than_the_default(other):
    """Nor left for one percent, whatever the noise."""
    for seed in range(5):
        found = Fake(seed, default=10.0, other=other).choose()
        assert found.choice == "default" and found.gain == 1.0


def test_a_lucky_one_has_to_say_it_again():
    """Fifty times the same speed, noisy: some look faster, none is taken."""
    fake = Fake(default=10.0, **{f"same{i}": 10.0 for i in range(50)})
    lucky = iter([9.0] * 20)
    time = fake.time
    fake.time = lambda c: next(lucky, 10.0) if c.name == "same7" else time(c)
    found = fake.choose()
    assert found.choice == "default"
    assert found.trials["same7"].proven and not found.trials["same7"].faster


def test_a_default_that_does_not_work_gives_way():
    found = Fake(default="wrong", slow=12.0, fast=9.0).choose()
    assert found.choice == "fast" and found.trials["fast"].against == "slow"
    found = Fake(default="fails later", eager=12.0).choose()
    assert found.choice == "eager"
    found = Fake(default="wrong", other="raises").choose()
    assert found.choice == "" and found.complete


@pytest.mark.parametrize("seconds", [0, 2, 5, 20, 63, 70, 100, 1000])
def test_the_budget_is_held_and_the_rest_comes_the_next_time(seconds):
    speeds = {"default": 10.0, "hangs": "hangs", "fast": 8.0, "slow": 12.0, "raises": "raises"}
    fake, kept = Fake(**speeds), []
    found = fake.choose(seconds=seconds, keep=kept.append)
    # Over by no more than the step that was under way.
    assert fake.clock.now <= seconds + 60
    assert found.choice in ("", "default", "fast")
    starts = 1
    while not found.complete:
        again = Found.of(json.loads(json.dumps(found.to_dict())))
        assert again == found
        found = fake.choose(seconds=max(seconds, 20), known=again, keep=kept.append)
        starts += 1
        assert starts < 10
    assert found.choice == "fast" and kept[-1] == found
    # What is broken was not tried again.
    assert fake.checked["hangs"] == fake.checked["raises"] == 1
    before = sum(fake.timed.values())
    assert fake.choose(known=found).choice == "fast" and sum(fake.timed.values()) == before


def test_a_new_candidate_is_held_against_what_is_known():
    fake = Fake(default=10.0, fast=8.0)
    found = fake.choose()
    fake.ms["newer"] = 7.0
    better = fake.choose(known=found)
    assert better.choice == "newer" and fake.checked == {"default": 1, "fast": 1, "newer": 1}
    del fake.ms["newer"]
    assert fake.choose(known=better).choice == "fast"


def test_a_short_budget_times_some_rather_than_checking_all():
    fake = Fake(default=10.0, fast=8.0, **{f"other{i}": 12.0 for i in range(20)})
    found = fake.choose(seconds=20)
    assert found.trials["fast"].faster and not found.complete
    assert 2 <= len(fake.checked) < 14
    rest = fake.choose(seconds=1000, known=found)
    assert rest.complete and rest.choice == "fast" and max(fake.checked.values()) == 1


def test_of_a_short_budget_something_is_left_to_prove_the_winner():
    fake = Fake(default=10.0, fast=8.0)
    found = fake.choose(seconds=6)  # of which 20 rounds, twice, would take 8
    assert found.choice == "fast" and found.trials["fast"].rounds < 20


def test_a_single_candidate_is_not_timed():
    fake = Fake(default=10.0, wrong="wrong")
    assert fake.choose().choice == "default" and not fake.timed


def test_checks_run_side_by_side():
    fake = Fake(default=10.0, wrong="wrong", fast=8.0)
    fake.parallel = 3
    assert fake.choose().choice == "fast"


GOOD = Found("a", "a", {"a": Trial(ms=1.0)}, True, "2026-01-01 00:00", 1.0).to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"trials": None}, {"trials": {"a": {"ms": "fast"}}}, {"choice": "b"}, {"default": 3},
        {"seconds": "1"}, {"unknown": 1}, {"trials": {"a": {"problem": 1}}}, {"trials": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_kept_is_checked_when_it_is_read(change):
    assert Found.of(GOOD) is not None and Found.of(GOOD).to_dict() == GOOD
    assert Found.of({**GOOD, **change}) is None
    assert Found.of(None) is None
