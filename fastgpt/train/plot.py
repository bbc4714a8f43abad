"""The loss curve of a run as a picture, from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgpt.storage.files import atomic_file
from fastgpt.train.curves import Curves, smooth, time_axis


def loss_curve(run_dir: Path) -> Path | None:
    """Draw RUN/loss.png: losses above, the learning rate below; over steps, tokens and hours.

    The steep beginning runs out of the picture at the top, so that what came after fills it.
    Returns its path, or None if the run has logged nothing yet.
    """
    curves = Curves.of(run_dir)
    if not curves.train and not curves.evals:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if curves.train:
        steps = [r["step"] for r in curves.train]
        losses = [r["loss"] for r in curves.train]
        axes.plot(steps, losses, color="0.85", lw=0.6, label="batch")
        axes.plot(steps, smooth(losses), color="0.6", lw=1)
        rates.plot(steps, [r.get("lr", 0) for r in curves.train], color="tab:green", lw=1.2)
    for key, color in (("train_loss", "tab:blue"), ("val_loss", "tab:orange")):
        losses = [r[key] for r in curves.evals]
        if losses:
            label = f"{key.removesuffix('_loss')}, last {losses[-1]:.4f}"
            steps = [r["step"] for r in curves.evals]
            axes.plot(steps, losses, "o-", color=color, ms=3.5, lw=1.5, label=label)
    if best := curves.best:
        axes.plot(best["step"], best["val_loss"], "o", ms=9, mfc="none", mec="tab:orange")
        text = f"best val {best['val_loss']:.4f}"
        where = (best["step"], best["val_loss"])
        axes.annotate(text, where, (0, 14), textcoords="offset points", ha="right", fontsize=9)
    axes.set_ylim(*curves.useful_range)
    axes.set(ylabel="loss, nats a token", title=run_dir.name)
    axes.legend(frameon=False, loc="upper right")
    rates.set(xlabel="step", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _second_axes(axes, rates, curves)
    for part in (axes, rates):
        part.grid(alpha=0.25)
        part.spines["right"].set_visible(False)
    path = run_dir / "loss.png"
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=120)
    return path


def _second_axes(axes: Any, rates: Any, curves: Curves) -> None:
    """Tokens above the losses, hours of training below the rates."""
    records = curves.train or curves.evals
    per_step = max(r["tokens"] / max(1, r["step"] + (r["kind"] == "train")) for r in records)
    if per_step > 0:
        top = axes.secondary_xaxis(
            "top", functions=(lambda s: s * per_step / 1e6, lambda t: t * 1e6 / per_step)
        )
        top.set_xlabel("tokens, millions")
    last, hours = curves.clock[-1]
    if hours > 0:
        unit, scale = time_axis(hours)
        rate = hours * scale / last  # of the whole run: steps take about as long each
        low = rates.secondary_xaxis(-0.9, functions=(lambda s: s * rate, lambda t: t / rate))
        low.set_xlabel(unit)
