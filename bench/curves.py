"""python -m bench curves [PRESET]: losses of variants over seeds, and races to a target loss.

    python -m bench curves laptop --steps 200 --seeds 3
    python -m bench curves laptop --variants adamw,muon --target first --rates 5e-3,1e-2,2e-2

Whole runs of `fastgpt.fit`, one per variant and seed, each in a process of its own. Variants share
each seed: its first weights and batches. `fastgpt compare` draws them and says which is better.
By default eager fp32 is held against 16 bits and, on a GPU, against the fast path.

--target is a validation loss, or "first": the one at which the first variant ends on that seed.
What each takes to get there is compared pair by pair. --rates tunes each one's learning rate
before, on a seed that does not count afterwards. A variant may bring settings of its own, as in
muon:lr_schedule=wsd. Runs stay in --keep, and are not done again. Flags of `fastgpt train` work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import power, results, setup
from bench.results import Row
from bench.setup import at_least
from bench.stats import paired
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import CompareConfig, Config
from fastgpt.errors import UserError
from fastgpt.train.compare import ONE_PAIR, compare
from fastgpt.train.plots import Curves

# A program for a run's process: what `fastgpt.fit` gets comes as JSON.
FIT = "import json, sys, fastgpt; p, a = json.loads(sys.argv[1]); fastgpt.fit(p, **a)"
EAGER = {"kernels": "eager", "compile": False}
KNOWN: dict[str, dict[str, Any]] = {
    "fp32": EAGER | {"dtype": "float32"},
    "bf16": EAGER | {"dtype": "bfloat16"},
    "fast": {"kernels": "auto", "compile": "auto"},
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
}


@dataclass(frozen=True)
class Run:
    """A finished run, with the energy of all of it, evaluations and saves included."""

    folder: str
    curve: list[list[float]]  # steps, seconds of training, validation loss
    joules: float | None

    def reached(self, target: float) -> list[float] | None:
        """Returns the first point of the curve at or below a loss, or None."""
        return next((p for p in self.curve if p[0] and p[2] <= target), None)


class Runs:
    """All runs of the command: they share a preset, settings, and the folder that keeps them."""

    def __init__(self, preset: str, shared: dict[str, Any], keep: Path, limit_s: float):
        digest = hashlib.sha256(json.dumps([preset, shared], sort_keys=True).encode()).hexdigest()
        self.preset, self.shared, self.limit_s = preset, shared, limit_s
        self.folder, self.gpu = keep.resolve() / digest[:8], power.open_gpu()[0]
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, own: dict[str, Any], seed: int) -> Run:
        """Returns a variant's run, from the folder if it is there. Raises RuntimeError."""
        asked = self.shared | own | {"seed": seed}
        if "learning_rate" in own:
            name = f"{name}-{own['learning_rate']:g}"
            base = settings.replace(PRESETS[self.preset](), **self.shared).optim
            asked["min_lr"] = own["learning_rate"] * base.min_lr / base.learning_rate
        folder = self.folder / f"{results.slug(name)}-seed{seed}"
        done = folder / "joules.json"  # written last
        if not done.exists():
            asked |= {"out_dir": str(folder), "overwrite": True}
            joules = self._fit(asked, folder.with_suffix(".log"))
            done.write_text(json.dumps(joules))
        curves = Curves.of(folder)
        curve = [[e["step"], 3600 * curves.hours(e["step"]), e["val_loss"]] for e in curves.evals]
        return Run(str(folder), curve, json.loads(done.read_text()))

    def _fit(self, asked: dict[str, Any], log: Path) -> float | None:
        """Trains in a process of its own. Returns the joules; raises RuntimeError."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FIT, json.dumps([self.preset, asked])]
        options: Any = {"env": environment, "timeout": self.limit_s}
        with log.open("w") as out, power.Meter(self.gpu) as meter:
            try:
                subprocess.run(command, check=True, **options, stdout=out, stderr=out)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"took over {self.limit_s:g} s") from None
            except subprocess.CalledProcessError:
                raise RuntimeError(log.read_text().strip().splitlines()[-1]) from None
        return meter.joules


def variants_of(names: str) -> dict[str, dict[str, Any]]:
    """Returns each variant's settings by its name. Raises UserError."""
    found = {}
    for text in names.split(","):
        name, *more = text.split(":")
        if name not in KNOWN:
            raise UserError(f"--variants: no {name!r}; there are {', '.join(KNOWN)}")
        flags = dict(a.partition("=")[::2] for a in more)
        values = settings.to_dict(settings.apply_flags(Config(), flags))
        found[text] = KNOWN[name] | {key: values[key] for key in flags}
    return found


def tune(runs: Runs, name: str, own: dict[str, Any], rates: Sequence[float], seed: int) -> Row:
    """Returns the learning rates tried on a seed, and the one whose run ends lowest."""
    found = {rate: runs.run(name, own | {"learning_rate": rate}, seed) for rate in rates}
    tried = {rate: run.curve[-1][2] for rate, run in found.items()}
    best = min(tried, key=lambda rate: tried[rate])
    edge = ", at the edge of what was tried" if best in (min(rates), max(rates)) else ""
    losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
    print(f"  {name}: learning rate {best:g}{edge} ({losses})", flush=True)
    return {"tried": [[*pair] for pair in tried.items()], "taken": best}


def row_of(name: str, done: Sequence[Run], targets: Sequence[float], problem: str) -> Row:
    """Returns a variant's row: its runs by seed, and what they took to the target or to the end."""
    row: Row = {"key": name, "variant": name, "runs": [dataclasses.asdict(run) for run in done]}
    ends = [run.curve[-1] for run in done]
    points = [run.reached(t) for run, t in zip(done, targets, strict=False)] if targets else ends
    arrived = [p for p in points if p is not None]
    if len(arrived) < len(points) and not problem:
        best = min(p[2] for run in done for p in run.curve)
        problem = f"the best loss is {best:.3f}, the target {max(targets):.3f}"
    if problem:
        return row | {"problem": problem}
    row |= {"steps": [p[0] for p in arrived], "seconds": [p[1] for p in arrived], "problem": ""}
    if all(run.joules for run in done):  # of a run the share of its steps
        both = zip(done, arrived, ends, strict=True)
        row["joules"] = [(run.joules or 0) * p[0] / end[0] for run, p, end in both]
    return row | results.timed([1e3 * s for s in row["seconds"]])


def compare_pairs(row: Row, first: Row) -> None:
    """Adds and prints how a row differs from the first one, seed by seed."""
    print(f"{row['variant']} against {first['variant']}, seed by seed:")
    pairs = {"last loss": [[run["curve"][-1][2] for run in r["runs"]] for r in (row, first)]}
    for key in ("steps", "seconds", "joules"):  # by their ratios
        if row.get(key) and first.get(key):
            pairs[key] = [[math.log(x) for x in r[key]] for r in (row, first)]
    for key, (a, b) in pairs.items():
        if n := min(len(a), len(b)):
            row[f"paired {key}"] = mean, low, high = paired(a[:n], b[:n])
            value, form = (math.exp, "{:.3f} times") if key != "last loss" else (float, "{:+.4f}")
            said = ONE_PAIR
            if low is not None and high is not None:
                said = "no difference" if low <= 0 <= high else "lower" if high < 0 else "higher"
                said = f"[{form.format(value(low))}, {form.format(value(high))}], {said}"
            print(f"  {key}: {form.format(value(mean))} {said}")


def main(argv: list[str]) -> int:
    gpu = torch.cuda.is_available()
    parser = setup.Parser("curves", __doc__)
    parser.add_argument("preset", nargs="?", default="shakespeare_char" if gpu else "laptop")
    parser.add_argument("--variants", default="fp32,bf16,fast" if gpu else "fp32,bf16")
    parser.add_argument("--steps", type=at_least(5), default=1000 if gpu else 40)
    parser.add_argument("--seeds", type=at_least(1), default=3 if gpu else 2)
    parser.add_argument("--target", default="", help="a validation loss, or: first")
    parser.add_argument("--rates", default="", help="learning rates to try")
    parser.add_argument("--keep", type=Path, default=Path("out/curves"), help="folder of the runs")
    parser.add_argument("--limit-seconds", type=float, default=1800.0, help="for one run")
    args, flags = parser.parse(argv)
    if args.preset not in PRESETS:
        raise settings.unknown_key(args.preset, list(PRESETS), "", "preset")
    variants, steps = variants_of(args.variants), args.steps
    try:
        rates = [float(rate) for rate in args.rates.split(",") if rate]
        target = [float(args.target)] if args.target not in ("", "first") else []
    except ValueError as e:
        raise UserError(f"--rates and --target: {e}") from None
    given = settings.to_dict(settings.apply_flags(Config(), flags))
    shared = {"max_iters": steps, "eval_interval": max(1, steps // 10), "sample_tokens": 0}
    shared |= {"log_interval": max(1, min(10, steps // 20)), "warmup_iters": steps // 20}
    shared |= {"eval_iters": 50 if gpu else 5}
    shared |= {key: given[key] for key in flags}
    kept = {"target": args.target, "seeds": args.seeds, "flags": flags, "rates": {}}
    result = results.Result("curves", argv, kept)
    runs, first_seed = Runs(args.preset, shared, args.keep, args.limit_seconds), given["seed"]
    done, failed = {name: list[Run]() for name in variants}, dict.fromkeys(variants, "")
    for seed in (None, *range(first_seed, first_seed + args.seeds)):
        for name, own in variants.items():
            try:
                if seed is None and rates:
                    kept["rates"][name] = tune(runs, name, own, rates, first_seed + args.seeds)
                    own["learning_rate"] = kept["rates"][name]["taken"]
                elif seed is not None and not failed[name]:
                    done[name].append(runs.run(name, own, seed))
                    print(f"  {name}, seed {seed}: {done[name][-1].curve[-1][2]:.4f}", flush=True)
            except RuntimeError as e:
                failed[name] = str(e)
    lead = [run.curve[-1][2] for run in next(iter(done.values()))]
    targets = lead if args.target == "first" else target * args.seeds
    result.rows[:] = [row_of(name, done[name], targets, failed[name]) for name in variants]
    if folders := [run.folder for found in done.values() for run in found]:
        compare(folders, CompareConfig(to=str(result.save(args.out).with_suffix(".png"))))
    for row in result.rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")
        if row is not result.rows[0]:
            compare_pairs(row, result.rows[0])
    return result.end(args.out, " and .png" if folders else "")
