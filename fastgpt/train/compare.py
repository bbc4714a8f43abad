"""Comparison of runs, `fastgpt compare RUN RUN ...`: a table, a picture, and a verdict.

Runs that differ only in their seed belong to one recipe, and the spread of their losses is the
noise. A recipe is called better if the 95 % interval of the difference, at the last step that all
runs evaluated, leaves out 0.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.config import settings
from fastgpt.config.schema import CompareConfig, Config
from fastgpt.errors import UserError
from fastgpt.storage import run_dir as run
from fastgpt.train.metrics import count
from fastgpt.train.plots import Curves, save, smooth, time_axis

_NOT_THE_RUN = ("seed", "out_dir", "overwrite", "wandb_run_name", "wandb_log", "tensorboard")
_DATA = ("dataset", "input", "tokenizer", "val_fraction")
ONE_PAIR = "a single run is never enough"


@dataclass(frozen=True)
class Compared:
    """Run to compare: its name in the table, its curves and its settings."""

    name: str
    curves: Curves
    config: Config


def compare(folders: Sequence[str], config: CompareConfig) -> int:
    """Prints the table and the verdict, and draws --to. Returns the exit code."""
    runs = open_runs(folders)
    print(table(runs))
    data = {tuple(settings.to_dict(r.config)[k] for k in _DATA) for r in runs}
    if len(data) > 1:
        print("the runs have other data or tokenizers: their losses are not of the same thing")
    for r in runs:
        if r.curves.diverged_at is not None:
            print(f"{r.name}: diverged at step {r.curves.diverged_at}; later steps are left out")
    print(*verdict(runs), f"curves {draw(runs, Path(config.to))}", sep="\n")
    return 0


def open_runs(folders: Sequence[str]) -> list[Compared]:
    """Returns the runs, named without the folders that they have in common."""
    found = {os.path.abspath(path): path for path in map(run.find, folders)}
    common = os.path.commonpath([os.path.dirname(path) for path in found])
    runs = []
    for absolute, run_dir in found.items():
        curves = Curves.of(run_dir)
        if not curves.evals:
            raise UserError(f"{run_dir}: has no evaluation with finite losses in its metrics.jsonl")
        name = os.path.relpath(absolute, common)
        runs.append(Compared(name, curves, run.load_config(run_dir)))
    return runs


def _recipes(runs: Sequence[Compared]) -> list[list[Compared]]:
    """Returns the runs by recipe: all settings but the seed and names."""
    groups: dict[tuple, list[Compared]] = {}
    for r in runs:
        flat = settings.to_dict(r.config).items()
        recipe = tuple((name, value) for name, value in flat if name not in _NOT_THE_RUN)
        groups.setdefault(recipe, []).append(r)
    return [*groups.values()]


def table(runs: Sequence[Compared]) -> str:
    """Returns a line per run with steps, tokens, hours, losses, speed and MFU."""
    rows: list[tuple[str, ...]] = [
        ("run", "steps", "tokens", "hours", "train", "val", "best val", "tok/s", "mfu")
    ]
    for r in runs:
        last, best = r.curves.evals[-1], r.curves.best or {}
        speed, mfu = r.curves.median("tokens_per_second"), r.curves.median("mfu")
        row = f"{last['step']} {count(last['tokens'])} {r.curves.hours(last['step']):.2f} "
        row += f"{last['train_loss']:.4f} {last['val_loss']:.4f}"
        best_val = f"{best['val_loss']:.4f} at {best['step']}"
        speeds = count(speed) if speed else "-", f"{100 * mfu:.1f}%" if mfu else "-"
        rows.append((r.name, *row.split(), best_val, *speeds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def verdict(runs: Sequence[Compared]) -> list[str]:
    """Returns a line per pair of recipes: the better one and by how much, or no difference."""
    recipes = _recipes(runs)
    if len(recipes) > 1:
        return [_pair(a, b) for a, b in itertools.combinations(recipes, 2)]
    step, losses = _last_losses(recipes)
    if step is None or len(runs) == 1:
        return ["no step was evaluated in all runs"] if step is None else []
    mean, sd = statistics.mean(losses[0]), statistics.stdev(losses[0])
    return [
        f"the runs differ only in their seed: val loss {mean:.4f} at step {step}, and the seeds' "
        f"standard deviation is {sd:.4f}"
    ]


def _last_losses(groups: Sequence[Sequence[Compared]]) -> tuple[int | None, list[list[float]]]:
    """Returns the last step that all runs evaluated, and their losses there, by group."""
    by_step = [[{e["step"]: e["val_loss"] for e in r.curves.evals} for r in g] for g in groups]
    common = set.intersection(*({*losses} for g in by_step for losses in g))
    step = max(common, default=None)
    return step, [] if step is None else [[losses[step] for losses in g] for g in by_step]


def _names(group: Sequence[Compared]) -> str:
    """Returns one name for the runs of a recipe."""
    if len(group) > 2:
        return f"{group[0].name} (and {len(group) - 1} more)"
    return "+".join(r.name for r in group)


def _pair(a: list[Compared], b: list[Compared]) -> str:
    names = [_names(a), _names(b)]
    pair, (step, losses) = " and ".join(names), _last_losses([a, b])
    if step is None:
        return f"{pair}: no step was evaluated in both"
    means = [statistics.mean(g) for g in losses]
    gap = abs(means[0] - means[1])
    where = f"val loss {means[0]:.4f} and {means[1]:.4f} at step {step}"
    if min(map(len, losses)) == 1:
        return f"{pair}: {where}, apart by {gap:.4f}; {ONE_PAIR}: give runs of other seeds of each"
    freedom = sum(len(g) - 1 for g in losses)
    squares = sum((x - statistics.mean(g)) ** 2 for g in losses for x in g)
    error = math.sqrt(squares / freedom * sum(1 / len(g) for g in losses))
    margin = student_t(freedom) * error
    interval = f"{gap:.4f} +- {margin:.4f} (95 %, between seeds)"
    if gap <= margin:
        return f"{pair}: no difference beyond noise: {where}, apart by {interval}"
    better, worse = names if means[0] < means[1] else names[::-1]
    return f"{better} is better than {worse} by {interval}: {where}"


def draw(runs: Sequence[Compared], path: Path) -> Path:
    """Draws validation losses over steps, tokens and hours, with one colour per recipe.

    The panel over tokens is left out where all runs have the same tokens per step.
    """
    from matplotlib.figure import Figure

    unit, scale = time_axis(max(r.curves.clock[-1][1] for r in runs))
    positions: dict[str, Callable[[Curves, dict], float]] = {
        "step": lambda curves, e: e["step"],
        "tokens, millions": lambda curves, e: e["tokens"] / 1e6,
        unit: lambda curves, e: scale * curves.hours(e["step"]),
    }
    lasts = [r.curves.evals[-1] for r in runs]
    if len({round(e["tokens"] / max(1, e["step"])) for e in lasts}) == 1:
        del positions["tokens, millions"]
    figure = Figure(figsize=(4 * len(positions), 4.2), layout="constrained")
    panels = figure.subplots(1, len(positions), sharey=True)
    for i, recipe in enumerate(_recipes(runs)):
        for r in recipe:
            label, color = _names(recipe) if r is recipe[0] else None, f"C{i}"
            line = smooth([t["loss"] for t in r.curves.train])
            losses = [e["val_loss"] for e in r.curves.evals]
            for axes, x in zip(panels, positions.values(), strict=True):
                steps = [x(r.curves, t) for t in r.curves.train]
                axes.plot(steps, line, color=color, lw=0.7, alpha=0.4)
                steps = [x(r.curves, e) for e in r.curves.evals]
                axes.plot(steps, losses, "o-", color=color, ms=3, label=label)
    low, high = zip(*(r.curves.useful_range for r in runs), strict=True)
    for axes, name in zip(panels, positions, strict=True):
        axes.set(xlabel=name, ylim=(min(low), max(high)))
    panels[0].set_ylabel("validation loss, nats per token (thin: training)")
    panels[0].legend(frameon=False, fontsize=8)
    return save(figure, path)


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student_t(freedom: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t (Cornish-Fisher from 10 degrees on)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    return 1.96 + 2.372 / freedom + 2.823 / freedom**2
