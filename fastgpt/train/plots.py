"""Loss curves of runs from metrics.jsonl: over steps, tokens and hours, and as a picture."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.storage.atomic import atomic_file
from fastgpt.train import metrics


def loss_curve(run_dir: Path) -> Path | None:
    """Draws RUN/loss.png: losses above, the learning rate below, over steps.

    Returns the picture's path, or None if the run has logged nothing yet.
    """
    curves = Curves.of(run_dir)
    if not curves.train and not curves.evals:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if curves.train:
        steps, losses = ([r[key] for r in curves.train] for key in ("step", "loss"))
        axes.plot(steps, losses, color="tab:blue", lw=0.6, alpha=0.25)
        axes.plot(steps, smooth(losses), color="tab:blue", lw=1.6, label="batches, smoothed")
        rates.plot(steps, [r.get("lr", 0) for r in curves.train], color="tab:green", lw=1.2)
    if best := curves.best:
        steps = [r["step"] for r in curves.evals]
        for key, color in (("train", "tab:gray"), ("val", "tab:orange")):
            losses = [r[f"{key}_loss"] for r in curves.evals]
            label = f"{key}, last {losses[-1]:.4f}"
            axes.plot(steps, losses, "o-", color=color, ms=3.5, lw=1.2, label=label)
        text, where = f"best val {best['val_loss']:.4f}", (best["step"], best["val_loss"])
        axes.plot(*where, "o", ms=9, mfc="none", mec="tab:orange")
        axes.annotate(text, where, (0, 14), textcoords="offset points", ha="right", fontsize=9)
    axes.set(ylabel="loss, nats per token", title=run_dir.name)
    axes.legend(frameon=False, loc="upper right")
    last = (curves.train or curves.evals)[-1]
    hours, tokens = curves.clock[-1][1], metrics.count(last["tokens"])
    unit, scale = time_axis(hours)
    rates.set(xlabel=f"step ({tokens} tokens, {hours * scale:.3g} {unit})", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    return save(figure, run_dir / "loss.png")


def save(figure: Any, path: Path) -> Path:
    """Writes a figure of matplotlib as PNG, with light grids and bare axes. Returns its path."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=120)
    return path


@dataclass(frozen=True)
class Curves:
    """Records of a run, in the order of their steps, up to the first loss that is not finite."""

    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    diverged_at: int | None = None

    @classmethod
    def of(cls, run_dir: Path) -> Curves:
        records = metrics.read(run_dir / "metrics.jsonl")
        losses = ("loss", "train_loss", "val_loss")
        bad = [r["step"] for r in records if not all(math.isfinite(r.get(k, 0)) for k in losses)]
        end = min(bad, default=None)
        records = [r for r in records if end is None or r["step"] < end]
        train, evals = ([r for r in records if r["kind"] == k] for k in ("train", "eval"))
        return cls(train, evals, end)

    @cached_property
    def clock(self) -> list[tuple[int, float]]:
        """Pairs (steps done, hours of training until then), without evaluations and saves.

        A record's time is the mean since the record before it.
        """
        out, seconds, done = [(0, 0.0)], 0.0, 0
        for r in self.train:
            seconds += (r["step"] + 1 - done) * float(r.get("time_ms", 0)) / 1000
            done = r["step"] + 1
            out.append((done, seconds / 3600))
        return out

    def hours(self, step: int) -> float:
        """Returns the hours of training until `step` steps were done.

        Steps after the last record take as long as those before it do on average.
        """
        done, hours = zip(*self.clock, strict=True)
        return float(np.interp(step, done, hours)) * max(1.0, step / (done[-1] or step or 1))

    def median(self, key: str) -> float | None:
        """Returns the median of a value over the log lines."""
        values = [r[key] for r in self.train if isinstance(r.get(key), int | float)]
        return statistics.median(values) if values else None

    @property
    def best(self) -> dict[str, Any] | None:
        """Evaluation with the least validation loss."""
        return min(self.evals, key=lambda r: r["val_loss"], default=None)

    @property
    def useful_range(self) -> tuple[float, float]:
        """Span of losses after the first eighth of the run, in which all runs fall alike."""
        last = (self.train or self.evals)[-1]["step"]
        line = smooth([r["loss"] for r in self.train])
        losses = [x for x, r in zip(line, self.train, strict=True) if r["step"] >= last / 8]
        for key in ("train_loss", "val_loss"):
            losses += [r[key] for r in self.evals if r["step"] >= last / 8]
        low, high = min(losses), max(losses)
        room = max(high - low, 1e-3)
        return low - 0.05 * room, high + 0.1 * room


def time_axis(hours: float) -> tuple[str, float]:
    """Returns the label of a time axis that reaches `hours`, and its units per hour."""
    return ("hours of training", 1.0) if hours >= 1 else ("minutes of training", 60.0)


def smooth(values: list[float]) -> list[float]:
    """Returns running means over a twentieth of the curve."""
    sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, len(values) // 20))
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
