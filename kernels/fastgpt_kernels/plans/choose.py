"""Which of several candidates is taken: right first, then measured in turns, then proven.

`choose` checks each candidate once, times those that are right against the default, interleaved,
and takes the fastest whose interval says that it is faster by `MARGIN` or more. It has to say so
again in a second, independent series: the best of many is too often a lucky one. Without such a
candidate the default stays, so a plan is never worse than having none.

What was found out is kept after each step. A candidate that is wrong, raises, hangs or has no
memory is not tried again; what the budget did not reach is tried the next time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from fastgpt_kernels.plans.child import Failed, Spent
from fastgpt_kernels.stats import MIN_ROUNDS, ratio_of_medians, summarize
from fastgpt_kernels.telling import EVERY_S

MARGIN = 0.02
SCREEN_ROUNDS = 3
HOPELESS = 1.5  # times the default's: such a candidate gets no more turns
ROUNDS = 20
FIRST_SHARE = 0.6  # of what is left of a budget, for the first series
CHECK_SHARE = 0.6  # of the budget, after which no further candidate is checked


@dataclass(frozen=True)
class Candidate:
    """A name, unique among the candidates, and what a `Measurer` has to know to make it."""

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)


class Measurer(Protocol):
    """Where candidates are tried. `parallel`: how many are checked at the same time."""

    parallel: int

    def check(self, candidate: Candidate) -> None:
        """Raises Failed if it is not right, or does not run; Spent."""

    def time(self, candidate: Candidate) -> float:
        """Milliseconds of a turn. Raises Failed; Spent."""
        ...


@dataclass(frozen=True)
class Trial:
    """What is known of a candidate: why it cannot be used, or its time.

    ratio, low, high  its time over that of `against`, and the interval's ends
    proven            a second series said so too
    """

    problem: str = ""
    ms: float = 0.0
    q1: float = 0.0
    q3: float = 0.0
    rounds: int = 0
    against: str = ""
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    proven: bool = False

    @property
    def faster(self) -> bool:
        """Whether the interval says that it is faster by the margin or more."""
        return bool(self.against) and 0 < self.high <= 1 - MARGIN


@dataclass(frozen=True)
class Found:
    """The outcome, as it is kept: `choice` is empty if no candidate could be used.

    complete  all candidates were tried
    date      of the last measurement, UTC
    seconds   that all of them took
    """

    default: str
    choice: str = ""
    trials: Mapping[str, Trial] = field(default_factory=dict)
    complete: bool = False
    date: str = ""
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """How many times the default's speed the choice has."""
        trial = self.trials.get(self.choice)
        return 1 / trial.ratio if trial and trial.ratio else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "trials": {name: asdict(t) for name, t in self.trials.items()}}

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None) -> Found | None:
        """The way back; None for an entry that does not have what it should."""
        try:
            given = dict(entry or {})
            trials = {str(name): Trial(**t) for name, t in given.pop("trials").items()}
            found = cls(**given, trials=trials)
            numbers = [found.seconds]
            for t in trials.values():
                numbers += [t.ms, t.q1, t.q3, t.ratio, t.low, t.high]
                if not isinstance(t.problem, str) or not isinstance(t.against, str):
                    return None
            good = all(isinstance(x, int | float) for x in numbers)
            texts = (found.default, found.choice, found.date)
            good &= all(isinstance(x, str) for x in texts)
            return found if good and (not found.choice or found.choice in trials) else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def choose(
    candidates: Sequence[Candidate],
    measurer: Measurer,
    *,
    known: Found | None = None,
    seconds: float = float("inf"),
    rounds: int = ROUNDS,
    keep: Callable[[Found], object] = lambda found: None,
    say: Callable[[str], object] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
) -> Found:
    """The fastest of the candidates, of which the first is the default; within about `seconds`.

    `known` is what an earlier call found out; `keep` gets what there is after each step.
    """
    search = _Search(candidates, measurer, known, clock() + seconds, rounds, keep, say, clock, seed)
    return search.run()


@dataclass
class _Search:
    candidates: Sequence[Candidate]
    measurer: Measurer
    known: Found | None
    end: float
    rounds: int
    keep: Callable[[Found], object]
    say: Callable[[str], object]
    clock: Callable[[], float]
    seed: int

    def run(self) -> Found:
        names = {c.name for c in self.candidates}
        old = self.known.trials if self.known else {}
        self.trials = {name: t for name, t in old.items() if name in names}
        self.began = self.phase = self.said = self.clock()
        self.order = random.Random(self.seed)
        fresh = [c for c in self.candidates if c.name not in self.trials]
        if self.known and not fresh and self._settled():
            return replace(self._found(True), date=self.known.date, seconds=self.known.seconds)
        right = self._check(fresh)
        base = self._base(right)
        if base is None:
            return self._keep(all(c.name in self.trials for c in self.candidates))
        if others := [c for c in fresh if c in right and c != base]:
            self._series(base, others)
        else:  # nothing to hold it against
            self.trials.setdefault(base.name, Trial())
        while not self._settled():
            best = self._best()
            assert best is not None
            if not self._series(base, [best], prove=True):
                return self._keep(False)
        return self._keep(all(c.name in self.trials for c in self.candidates))

    def _progress(self, what: str, done: int, of: int) -> None:
        """How far it is, every few seconds."""
        now = self.clock()
        if now - self.said >= EVERY_S:
            left = (of - done) * (now - self.phase) / done
            self.said = now
            self.say(f"{what} {done} of {of}, ETA {max(0.0, min(left, self.end - now)):.0f} s")

    def _spent(self) -> bool:
        return self.clock() >= self.end

    def _check(self, fresh: Sequence[Candidate]) -> list[Candidate]:
        """Those that are right; the others' reasons are kept."""

        done: list[str] = []

        def one(c: Candidate) -> bool:
            # Of a short budget, enough is left to time those that were checked.
            late = self.clock() >= self.began + CHECK_SHARE * (self.end - self.began)
            if self._spent() or late and len(done) >= 2:
                return False
            try:
                self.measurer.check(c)
                return True
            except Failed as e:
                self._drop(c, str(e))
            except Spent:
                pass
            finally:
                done.append(c.name)
                self._progress("checked", len(done), len(fresh))
            return False

        if fresh:
            self.say(f"checking {len(fresh)} candidate{'s' * (len(fresh) > 1)}")
        if self.measurer.parallel > 1:
            with ThreadPoolExecutor(self.measurer.parallel) as pool:
                right = list(pool.map(one, fresh))
        else:
            right = [one(c) for c in fresh]
        return [c for c, good in zip(fresh, right, strict=True) if good]

    def _drop(self, c: Candidate, problem: str) -> None:
        self.trials[c.name] = Trial(problem=problem)
        self.say(f"{c.name}: {problem}")
        self._keep(False)

    def _base(self, right: Sequence[Candidate]) -> Candidate | None:
        """What the others are held against: the default, else the first that can be used."""

        def usable(c: Candidate) -> bool:
            trial = self.trials.get(c.name)
            return c in right or trial is not None and not trial.problem

        return next((c for c in self.candidates if usable(c)), None)

    def _series(self, base: Candidate, others: Sequence[Candidate], prove: bool = False) -> bool:
        """Time candidates in turns with the base. False: the budget ended before there was a
        verdict, and nothing is kept of it.
        """
        field_ = [base, *others]
        samples: dict[str, list[float]] = {c.name: [] for c in field_}
        spent, self.phase = False, self.clock()
        # The winner has to say so in a second series, which takes its time too.
        enough = self.end if prove else self.phase + FIRST_SHARE * (self.end - self.phase)
        for r in range(self.rounds):
            turn = self.order.sample(field_, len(field_))
            for c in turn:
                spent = spent or self._spent()
                if spent:
                    break
                try:
                    samples[c.name].append(self.measurer.time(c))
                except Failed as e:
                    self._drop(c, str(e))
                    field_.remove(c)
                except Spent:
                    spent = True
            if base not in field_:  # the yardstick itself is broken: the next one, from the start
                new = self._base(field_)
                rest = [c for c in field_ if c != new]
                return new is not None and self._series(new, rest, prove)
            if spent:
                break
            if r + 1 == SCREEN_ROUNDS and not prove:
                limit = HOPELESS * summarize(samples[base.name]).median
                for c in [c for c in field_ if c != base]:
                    if min(samples[c.name]) > limit:
                        self._note(c, base, samples)
                        field_.remove(c)
            self._progress("round", r + 1, self.rounds)
            if r + 1 >= MIN_ROUNDS and self.clock() >= enough:
                break
        count = min((len(samples[c.name]) for c in field_), default=0)
        if count < MIN_ROUNDS:
            return False
        for c in field_:
            kept = {c.name: samples[c.name][:count], base.name: samples[base.name][:count]}
            if c != base or not prove:
                self._note(c, base, kept, prove)
        self._keep(False)
        return True

    def _note(
        self, c: Candidate, base: Candidate, samples: Mapping[str, list[float]], prove: bool = False
    ) -> None:
        mine = samples[c.name]
        theirs = samples[base.name][: len(mine)]
        s, r = summarize(mine), ratio_of_medians(mine, theirs, resamples=1000)
        self.trials[c.name] = Trial(
            ms=s.median, q1=s.q1, q3=s.q3, rounds=s.count, against=base.name, ratio=r.ratio,
            low=r.low or 0.0, high=r.high or 0.0, proven=prove,
        )  # fmt: skip

    def _best(self) -> Candidate | None:
        faster = [
            c
            for c in self.candidates
            if (t := self.trials.get(c.name)) and not t.problem and t.faster
        ]
        return min(faster, key=lambda c: self.trials[c.name].ratio, default=None)

    def _settled(self) -> bool:
        best = self._best()
        return best is None or self.trials[best.name].proven

    def _found(self, complete: bool) -> Found:
        best = self._best()
        choice = best if best and self.trials[best.name].proven else self._measured_base()
        name = choice.name if choice else ""
        return Found(self.candidates[0].name, name, dict(self.trials), complete)

    def _measured_base(self) -> Candidate | None:
        """The first candidate that was timed and has no problem."""
        return next((c for c in self.candidates if self._timed(c)), None)

    def _timed(self, c: Candidate) -> bool:
        trial = self.trials.get(c.name)
        return trial is not None and not trial.problem

    def _keep(self, complete: bool) -> Found:
        before = self.known.seconds if self.known else 0.0
        date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        seconds = round(before + self.clock() - self.began, 1)
        found = replace(self._found(complete), date=date, seconds=seconds)
        self.keep(found)
        return found
