"""python -m bench curves: does the fast path learn what eager fp32 learns?

Whole runs of `fastgpt train`, one a variant and seed, in turn: eager in fp32 (the oracle), eager in
the device's 16-bit dtype, and the fast path as users get it. The fast path is accepted where its
validation losses differ from the oracle's at the same seed, on average over the seeds, by no more
than the oracle's own differ from seed to seed. Ends with a table and a picture of the curves. Flags
of `fastgpt train` work here too.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import results, setup
from bench.tables import table
from fastgpt.config.presets import PRESETS
from fastgpt.train import metrics

ROOT = Path(__file__).resolve().parents[1]
ORACLE = "eager fp32"
EVALUATIONS = 5


def variants(gpu: bool) -> dict[str, list[str]]:
    """Flags of each variant; without a GPU the 16-bit path is eager bf16."""
    plain = ["--kernels=eager", "--compile=False"]
    if not gpu:
        return {
            ORACLE: ["--dtype=float32", *plain],
            "eager bf16": ["--dtype=bfloat16", *plain],
        }
    return {
        ORACLE: ["--dtype=float32", *plain],
        "eager 16-bit": ["--dtype=auto", *plain],
        "fast path": ["--dtype=auto", "--kernels=auto", "--compile=True"],
    }


def train(preset: str, flags: Sequence[str], folder: Path, limit_s: float) -> dict[str, Any]:
    """One run: its validation losses by step, and ms of its steps. RuntimeError where it failed."""
    command = [sys.executable, "-m", "fastgpt", "train", preset, *flags, f"--out_dir={folder}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as e:
        raise RuntimeError(f"not done after {limit_s:g} s") from e
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1]}")
    records = metrics.read(folder / "metrics.jsonl")
    return {
        "curve": [[r["step"], r["val_loss"]] for r in records if r["kind"] == "eval"],
        "samples_ms": [r["time_ms"] for r in records if r["kind"] == "train"],
    }


def verdict(oracle: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Final losses by seed, in nats, of the oracle and of another variant.

    The mean difference at equal seeds is held against the range of the oracle's: "within seed
    noise", or "off by more than seeds are". With fewer than three seeds there is no noise to know.
    """
    mean = statistics.mean(b - a for a, b in zip(oracle, other, strict=True))
    spread = max(oracle) - min(oracle)
    if len(oracle) < 3:
        word = "too few seeds to tell"
    else:
        word = "within seed noise" if abs(mean) <= spread else "off by more than seeds are"
    return {"mean_difference": mean, "seed_spread": spread, "verdict": word}


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """All curves of all seeds, a colour a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = ("#000000", "#0072b2", "#d55e00", "#009e73")
    names = list(dict.fromkeys(r["variant"] for r in rows))
    for row in rows:
        if row["problem"]:
            continue
        name = row["variant"]
        steps, losses = zip(*row["curve"], strict=True)
        first = not any(line.get_label() == name for line in axes.get_lines())
        colour = colours[names.index(name) % len(colours)]
        axes.plot(steps, losses, color=colour, lw=1, label=name if first else None)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    parser = setup.parser("curves", __doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("preset", nargs="?", default="shakespeare_char" if gpu else "laptop")
    parser.add_argument("--steps", type=int, default=1000 if gpu else 60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="for one run")
    setup.add_out(parser)
    args, flags = setup.parse(parser, argv)
    if args.preset not in PRESETS:
        parser.error(f"no preset {args.preset!r}: there are {', '.join(PRESETS)}")
    if args.steps < EVALUATIONS or args.seeds < 1:
        parser.error(f"--steps must be at least {EVALUATIONS}, --seeds at least 1")
    if not gpu:
        print("no GPU: a short run of a small model on the CPU, eager bf16 for the fast path")
    common = {
        "max_iters": str(args.steps),
        "eval_interval": str(args.steps // EVALUATIONS),
        "eval_iters": "200" if gpu else "10",
        "log_interval": "10",
        "sample_tokens": "0",
        **({} if gpu else {"device": "cpu"}),
        **flags,
    }
    result = results.Result("curves", argv, {"preset": args.preset, **common})
    chosen = variants(gpu and common.get("device") != "cpu")
    path = None
    with TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, own in chosen.items():
                given = [f"--{k}={v}" for k, v in common.items()] + [*own, f"--seed={1337 + seed}"]
                row: dict[str, Any] = {"key": f"{name} seed {seed}", "variant": name, "seed": seed}
                row["problem"] = ""
                place = Path(folder, row["key"].replace(" ", "-"))
                try:
                    row |= train(args.preset, given, place, args.limit_seconds)
                    print(f"  {row['key']}: val loss {row['curve'][-1][1]:.4f}", flush=True)
                except RuntimeError as e:
                    row["problem"] = str(e)
                    print(f"  {row['key']}: {e}", flush=True)
                result.rows.append(row)
                path = result.save(args.out)
    show(result, chosen)
    path = result.finish(args.out)
    if path:
        title = f"{args.preset}, {args.steps} steps, {args.seeds} seeds"
        draw(result.rows, title, path.with_suffix(".png"))
        print(f"written: {path} and {path.with_suffix('.png').name}")
    wrong = [v for v in result.data["settings"].get("verdicts", {}).values() if "off" in v]
    return 1 if wrong or any(row["problem"] for row in result.rows) else 0


def show(result: results.Result, names: Sequence[str] | dict[str, Any]) -> None:
    """The table, and the verdicts into the result's settings."""
    final: dict[str, dict[int, float]] = {name: {} for name in names}
    for row in result.rows:
        if not row["problem"]:
            final[row["variant"]][row["seed"]] = row["curve"][-1][1]
    oracle, lines, words = final[ORACLE], [], {}
    for name, losses in final.items():
        shared = sorted(set(losses) & set(oracle))
        cells = [name, ", ".join(f"{losses[s]:.4f}" for s in sorted(losses)) or "--", "", ""]
        if name != ORACLE and shared:
            found = verdict([oracle[s] for s in shared], [losses[s] for s in shared])
            words[name] = found["verdict"]
            cells[2] = f"{found['mean_difference']:+.4f} of {found['seed_spread']:.4f}"
            cells[3] = found["verdict"]
        lines.append(cells)
    result.data["settings"]["verdicts"] = words
    print(table(["variant", "val loss by seed", "mean difference, spread", "verdict"], lines))
