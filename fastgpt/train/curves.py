"""What metrics.jsonl says of a run as curves: losses over steps, tokens and hours."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastgpt.train import metrics


@dataclass(frozen=True)
class Curves:
    """A run's records, in the order of their steps."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]

    @classmethod
    def of(cls, run_dir: Path) -> Curves:
        records = metrics.read(run_dir / "metrics.jsonl")
        train, evals = ([r for r in records if r["kind"] == k] for k in ("train", "eval"))
        return cls(run_dir.name, train, evals)

    @cached_property
    def clock(self) -> list[tuple[int, float]]:
        """(steps done, hours of training until then), evaluations and saves left out.

        A record's time is the mean since the one before.
        """
        out, seconds, done = [(0, 0.0)], 0.0, 0
        for r in self.train:
            seconds += (r["step"] + 1 - done) * float(r.get("time_ms", 0)) / 1000
            done = r["step"] + 1
            out.append((done, seconds / 3600))
        return out

    def hours(self, step: int) -> float:
        """Hours of training until `step` steps were done."""
        before, after = self.clock[0], self.clock[-1]
        for point in self.clock:
            if point[0] <= step:
                before = point
            else:
                after = point
                break
        if after[0] <= before[0]:
            return before[1]
        return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])

    def median(self, key: str) -> float | None:
        """The median over the log lines, which a few slow first ones do not move."""
        values = [r[key] for r in self.train if isinstance(r.get(key), int | float)]
        return statistics.median(values) if values else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the least validation loss."""
        return min(self.evals, key=lambda r: r["val_loss"], default=None)

    @property
    def useful_range(self) -> tuple[float, float]:
        """The span of losses that fills a picture: of all but the steep first eighth of the run.

        What lies above is the fall from knowing nothing, which is alike in all runs.
        """
        last = (self.train or self.evals)[-1]["step"]
        line = smooth([r["loss"] for r in self.train])
        losses = [x for x, r in zip(line, self.train, strict=True) if r["step"] >= last / 8]
        for key in ("train_loss", "val_loss"):
            losses += [r[key] for r in self.evals if r["step"] >= last / 8]
        low, high = min(losses), max(losses)
        room = max(high - low, 1e-3)
        return low - 0.05 * room, high + 0.1 * room


def time_axis(hours: float) -> tuple[str, float]:
    """(the label of an axis that reaches so many hours, its units in an hour)."""
    return ("hours of training", 1.0) if hours >= 1 else ("minutes of training", 60.0)


def smooth(values: list[float]) -> list[float]:
    """Running means over a twentieth of the curve, so that a line shows and not its noise."""
    width, out, total = max(1, len(values) // 20), [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out
