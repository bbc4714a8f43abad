"""`fastgpt compare RUN RUN ...`: curves, figures, and which is better, if noise lets one say it.

Noise is told by runs that differ in their seed alone, if there are any: the spread of their loss.
Else by the curves themselves: how the difference of their last evaluations scatters. Runs are
called different if their losses, at the last step that both evaluated, differ by more than twice
the noise of that difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.config import settings
from fastgpt.config.schema import CompareConfig, Config
from fastgpt.errors import UserError
from fastgpt.storage import run
from fastgpt.storage.files import atomic_file
from fastgpt.train.curves import Curves, smooth, time_axis
from fastgpt.train.metrics import count

_NOT_THE_RUN = ("seed", "out_dir", "overwrite", "wandb_run_name", "wandb_log", "tensorboard")
_DATA = ("dataset", "input", "tokenizer", "val_fraction")
_TAIL = 6  # evaluations whose scatter is looked at


@dataclass(frozen=True)
class Compared:
    """A run to compare: its curves, its settings, and what it is called in the table."""

    name: str
    curves: Curves
    config: Config

    @property
    def recipe(self) -> tuple:
        """All settings but the seed and names: equal for runs that differ by chance alone."""
        return tuple(
            (k, v) for k, v in settings.to_dict(self.config).items() if k not in _NOT_THE_RUN
        )


def compare(folders: Sequence[str], config: CompareConfig) -> int:
    """Print the table and the verdict, draw --to. Returns the exit code."""
    runs = [_open(folder) for folder in folders]
    print(table(runs))
    data = {tuple(settings.to_dict(r.config)[k] for k in _DATA) for r in runs}
    if len(data) > 1:
        print("the runs have other data or tokenizers: their losses are not of the same thing")
    for line in verdict(runs):
        print(line)
    print(f"curves {draw(runs, Path(config.to))}")
    return 0


def _open(folder: str) -> Compared:
    run_dir = run.find(folder)
    curves = Curves.of(run_dir)
    if not curves.evals:
        raise UserError(f"{run_dir}: has no evaluation in its metrics.jsonl yet")
    return Compared(str(run_dir), curves, run.load_config(run_dir))


def table(runs: Sequence[Compared]) -> str:
    """Steps, tokens, hours, losses, speed and MFU of each run, a line each."""
    head = ("run", "steps", "tokens", "hours", "train", "val", "best val", "tok/s", "mfu")
    rows = [head]
    for r in runs:
        last, best = r.curves.evals[-1], r.curves.best
        assert best is not None
        speed, mfu = r.curves.median("tokens_per_second"), r.curves.median("mfu")
        rows.append(
            (
                r.name,
                f"{last['step']}",
                count(last["tokens"]),
                f"{r.curves.hours(last['step']):.2f}",
                f"{last['train_loss']:.4f}",
                f"{last['val_loss']:.4f}",
                f"{best['val_loss']:.4f} at {best['step']}",
                count(speed) if speed else "-",
                f"{100 * mfu:.1f}%" if mfu else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def scatter(losses: Sequence[float]) -> float | None:
    """The noise of the last values of a curve: a standard deviation; None with fewer than four.

    From second differences, in which a slope cancels: for independent noise their variance is six
    times its own.
    """
    tail = list(losses)[-_TAIL:]
    if len(tail) < 4:
        return None
    bends = [x - 2 * y + z for x, y, z in zip(tail, tail[1:], tail[2:], strict=False)]
    return math.sqrt(sum(b * b for b in bends) / len(bends) / 6)


def verdict(runs: Sequence[Compared]) -> list[str]:
    """A line for each pair of recipes: which is better, by how much, or that noise hides it."""
    groups: dict[tuple, list[Compared]] = {}
    for r in runs:
        groups.setdefault(r.recipe, []).append(r)
    if len(groups) == 1 and len(runs) > 1:
        return _seeds_alone(runs)
    parts = sorted(groups.values(), key=lambda g: runs.index(g[0]))
    repeated = any(len(g) > 1 for g in parts)
    return [_pair(a, b, repeated) for i, a in enumerate(parts) for b in parts[i + 1 :]]


def _at(r: Compared, step: int) -> float:
    return next(e["val_loss"] for e in r.curves.evals if e["step"] == step)


def _last_common(runs: Sequence[Compared]) -> int | None:
    steps = set.intersection(*({e["step"] for e in r.curves.evals} for r in runs))
    return max(steps, default=None)


def _seeds_alone(runs: Sequence[Compared]) -> list[str]:
    step = _last_common(runs)
    if step is None:
        return ["no step was evaluated in all runs"]
    losses = [_at(r, step) for r in runs]
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    return [
        f"the runs differ in their seed alone: val loss {mean:.4f} at step {step}, and the seeds' "
        f"standard deviation is {sd:.4f}"
    ]


def _pair(a: list[Compared], b: list[Compared], repeated: bool) -> str:
    step = _last_common([*a, *b])
    names = ["+".join(r.name for r in g) for g in (a, b)]
    if step is None:
        return f"{names[0]} and {names[1]}: no step was evaluated in both"
    losses = [[_at(r, step) for r in g] for g in (a, b)]
    means = [statistics.mean(g) for g in losses]
    noise, source = _noise((a, b), losses, step, repeated)
    better, worse = (0, 1) if means[0] < means[1] else (1, 0)
    gap = means[worse] - means[better]
    where = f"val loss {means[0]:.4f} and {means[1]:.4f} at step {step}"
    if noise is None:
        return f"{names[0]} and {names[1]}: {where}; too few evaluations to tell noise from more"
    if gap <= 2 * noise:
        return (
            f"{names[0]} and {names[1]}: no difference beyond noise: {where}, apart by {gap:.4f}, "
            f"noise {noise:.4f} ({source})"
        )
    return (
        f"{names[better]} is better than {names[worse]} by {gap:.4f}: {where}, "
        f"noise {noise:.4f} ({source})"
    )


def _noise(
    groups: tuple[list[Compared], list[Compared]],
    losses: list[list[float]],
    step: int,
    repeated: bool,
) -> tuple[float | None, str]:
    """(standard deviation of the difference of the means, where it is from)."""
    if repeated and any(len(g) > 1 for g in losses):
        degrees = sum(len(g) - 1 for g in losses)
        squares = sum((x - statistics.mean(g)) ** 2 for g in losses for x in g)
        return math.sqrt(squares / degrees * sum(1 / len(g) for g in losses)), "between seeds"
    # Of the difference itself: what both curves share, as the batches evaluated, cancels.
    a, b = ({e["step"]: e["val_loss"] for e in g[0].curves.evals} for g in groups)
    common = sorted(k for k in a.keys() & b.keys() if k <= step)
    return scatter([a[k] - b[k] for k in common]), "scatter of their difference"


def draw(runs: Sequence[Compared], path: Path) -> Path:
    """Validation loss over steps, tokens and hours, one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    spans = [r.curves.useful_range for r in runs]
    unit, scale = time_axis(max(r.curves.clock[-1][1] for r in runs))
    for i, r in enumerate(runs):
        color, train, evals = f"C{i}", r.curves.train, r.curves.evals
        times = [scale * r.curves.hours(e["step"]) for e in evals]
        line = smooth([t["loss"] for t in train])
        xs = (
            ([t["step"] for t in train], [e["step"] for e in evals]),
            ([t["tokens"] / 1e6 for t in train], [e["tokens"] / 1e6 for e in evals]),
            ([scale * h for _, h in r.curves.clock[1:]], times),
        )
        for axes, (x_train, x_val) in zip(panels, xs, strict=True):
            axes.plot(x_train, line, color=color, lw=0.7, alpha=0.4)
            axes.plot(x_val, [e["val_loss"] for e in evals], "o-", color=color, ms=3, label=r.name)
    for axes, label in zip(panels, ("step", "tokens, millions", unit), strict=True):
        axes.set_xlabel(label)
        axes.set_ylim(min(s[0] for s in spans), max(s[1] for s in spans))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats a token (thin: training)")
    panels[0].legend(frameon=False, fontsize=8)
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=120)
    return path
