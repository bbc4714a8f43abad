"""Comparison of runs, `fastgpt compare RUN RUN ...`: a table, a picture, and a verdict.

Runs that differ only in their seed belong to one recipe, and the spread of their losses is the
noise. A recipe is called better if the 95 % interval of the difference, at the last step that all
runs evaluated,"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgpt.config import settings
from fastgpt.config.schema import CompareConfig, Config
from fastgpt.errors import UserError
from fastgpt.storage import run_dir as run
from fastgpt.storage.atomic import atomic_file
from fastgpt.train.metrics import count
from fastgpt.train.plots import Curves, smooth, time_axis

_NOT_THE_RUN = ("seed", "out_dir", "overwrite", "wandb_run_name", "wandb_log", "tensorboard")
_DATA = ("dataset", "input", "tokenizer", "val_fraction")
ONE_PAIR = "a single run is never enough"


@dataclass(frozen=True)
class Compared:
    """Run to compare: its name in the table, its curves and its settings."""

    name: str
    curves: Curves
    config: Config

    @property
    def recipe(self) -> tuple:
        """Settings without the seed and names, equal for runs that differ only by chance."""
        return tuple(
            (k, v) for k, v in settings.to_dict(self.config).items() if k not in _NOT_THE_RUN
        )


def compare(folders: Sequence[str], config: CompareConfig) -> int:
    """Prints the table and the verdict, and draws --to. Returns the exit code."""
    runs = _named_apart([_open(folder) for folder in folders])
    print(table(runs))
    data = {tuple(settings.to_dict(r.config)[k] for k in _DATA) for r in runs}
    if len(data) > 1:
        print("the runs have other data or tokenizers: their losses are not of the same thing")
    for r in runs:
        if r.curves.diverged_at is not None:
            print(f"{r.name}: diverged at step {r.curves.diverged_at}; later steps are left out")
    for line in verdict(runs):
        print(line)
    print(f"curves {draw(runs, Path(config.to))}")
    return 0


def _open(folder: str) -> Compared:
    run_dir = run.find(folder)
    curves = Curves.of(run_dir)
    if not curves.evals:
        raise UserError(f"{run_dir}: has no evaluation with finite losses in its metrics.jsonl")
    return Compared(str(run_dir), curves, run.load_config(run_dir))


def _named_apart(runs: Sequence[Compared]) -> list[Compared]:
    """Returns the runs named without the folders that they have in common."""
    paths = [os.path.abspath(r.name) for r in runs]
    common = os.path.commonpath([os.path.dirname(p) for p in paths])
    return [replace(r, name=os.path.relpath(p, common)) for r, p in zip(runs, paths, strict=True)]


def table(runs: Sequence[Compared]) -> str:
    """Returns a line per run with steps, tokens, hours, losses, speed and MFU."""
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def verdict(runs: Sequence[Compared]) -> list[str]:
    """Returns a line per pair of recipes: the better one and by how much, or no difference."""
    groups: dict[tuple, list[Compared]] = {}
    for r in runs:
        groups.setdefault(r.recipe, []).append(r)
    parts = list(groups.values())
    if len(parts) > 1:
        return [_pair(a, b) for i, a in enumerate(parts) for b in parts[i + 1 :]]
    step, losses = _last_losses(parts)
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
    names = [_names(g) for g in (a, b)]
    step, losses = _last_losses([a, b])
    if step is None:
        return f"{names[0]} and {names[1]}: no step was evaluated in both"
    means = [statistics.mean(g) for g in losses]
    better, worse = (0, 1) if means[0] < means[1] else (1, 0)
    gap = means[worse] - means[better]
    where = f"val loss {means[0]:.4f} and {means[1]:.4f} at step {step}"
    if min(map(len, losses)) == 1:
        apart = f"apart by {gap:.4f}; {ONE_PAIR}: give runs of other seeds of each"
        return f"{names[0]} and {names[1]}: {where}, {apart}"
    freedom = sum(len(g) - 1 for g in losses)
    squares = sum((x - statistics.mean(g)) ** 2 for g in losses for x in g)
    error = math.sqrt(squares / freedom * sum(1 / len(g) for g in losses))
    interval = f"{gap:.4f} +- {student_t(freedom) * error:.4f}"
    if gap <= student_t(freedom) * error:
        no = "no difference beyond noise"
        return (
            f"{names[0]} and {names[1]}: {no}: {where}, apart by {interval} (95 %, between seeds)"
        )
    verb = f"{names[better]} is better than {names[worse]} by"
    return f"{verb} {interval} (95 %, between seeds): {where}"


def draw(runs: Sequence[Compared], path: Path) -> Path:
    """Draws validation losses over steps, tokens and hours, with one colour per recipe.

    The panel over tokens is left out where all runs have the same tokens per step.
    """
    from matplotlib.figure import Figure

    unit, scale = time_axis(max(r.curves.clock[-1][1] for r in runs))
    per_step = {
        round(r.curves.evals[-1]["tokens"] / max(1, r.curves.evals[-1]["step"])) for r in runs
    }
    labels = ["step", *(["tokens, millions"] if len(per_step) > 1 else []), unit]
    figure = Figure(figsize=(4 * len(labels), 4.2), layout="constrained")
    panels = dict(zip(labels, figure.subplots(1, len(labels), sharey=True), strict=True))
    recipes = list(dict.fromkeys(r.recipe for r in runs))
    labelled = set()
    for r in runs:
        label = None if r.recipe in labelled else _names([x for x in runs if x.recipe == r.recipe])
        labelled.add(r.recipe)
        color, train, evals = f"C{recipes.index(r.recipe)}", r.curves.train, r.curves.evals
        line = smooth([t["loss"] for t in train])
        xs = {
            "step": [[e["step"] for e in part] for part in (train, evals)],
            "tokens, millions": [[e["tokens"] / 1e6 for e in part] for part in (train, evals)],
            unit: [[scale * r.curves.hours(e["step"]) for e in part] for part in (train, evals)],
        }
        for name, axes in panels.items():
            axes.plot(xs[name][0], line, color=color, lw=0.7, alpha=0.4)
            losses = [e["val_loss"] for e in evals]
            axes.plot(xs[name][1], losses, "o-", color=color, ms=3, label=label)
    spans = [r.curves.useful_range for r in runs]
    for name, axes in panels.items():
        axes.set(xlabel=name, ylim=(min(s[0] for s in spans), max(s[1] for s in spans)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels["step"].set_ylabel("validation loss, nats per token (thin: training)")
    panels["step"].legend(frameon=False, fontsize=8)
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=120)
    return path


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student_t(freedom: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t (Cornish-Fisher from 10 degrees on)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    return 1.96 + 2.372 / freedom + 2.823 / freedom**2
