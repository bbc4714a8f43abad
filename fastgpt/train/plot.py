"""The loss curve as a picture, from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from fastgpt.storage.files import atomic_file
from fastgpt.train import metrics


def loss_curve(run_dir: Path) -> Path | None:
    """Draw RUN/loss.png: batch loss and both evaluation losses over the steps, and over tokens.

    Returns its path, or None if the run has logged nothing yet.
    """
    records = metrics.read(run_dir / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not train and not evals:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps = [r["step"] for r in train]
        axes.plot(steps, [r["loss"] for r in train], color="0.8", lw=0.8, label="batch")
    if evals:
        steps = [r["step"] for r in evals]
        for key, color in (("train_loss", "tab:blue"), ("val_loss", "tab:orange")):
            losses = [r[key] for r in evals]
            label = f"{key.removesuffix('_loss')}, last {losses[-1]:.4f}"
            axes.plot(steps, losses, "o-", color=color, ms=3, lw=1.5, label=label)
        best = min(evals, key=lambda r: r["val_loss"])
        text = f"best val {best['val_loss']:.4f}"
        where = (best["step"], best["val_loss"])
        axes.annotate(text, where, (0, 14), textcoords="offset points", ha="right", fontsize=9)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=run_dir.name)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path = run_dir / "loss.png"
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=120)
    return path
