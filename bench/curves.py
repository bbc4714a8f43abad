"""python -m bench curves [PRESET]: losses of variants over seeds, and races to a target loss.

    python -m bench curves laptop --steps 200 --seeds 3
    python -m bench curves laptop --variants adamw,muon --target first --rates 5e-3,1e-2,2e-2

Each variant and seed is a whole run, in its own process. Variants share a seed's first weights and
batches. --target is a validation loss, or "first", the last loss of the first variant on that seed.
--rates tunes each variant's learning rate on a seed that does not count afterwards. A variant may
have settings, as in muon:lr_schedule=wsd. Finished runs stay in --keep and are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastgpt
from bench import power, results, setup
from bench.results import Row
from bench.setup import at_least
from bench.stats import paired
from bench.variants import EAGER
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import CompareConfig, Config
from fastgpt.errors import UserError
from fastgpt.train.compare import ONE_PAIR, compare
from fastgpt.train.plots import Curves
from fastgpt_kernels.worker import TaskFailed, Worker

LIMIT_S = 86_400.0  # for one run
KNOWN: dict[str, dict[str, Any]] = {
    "fp32": EAGER | {"dtype": "float32"},
    "bf16": EAGER | {"dtype": "bfloat16"},
    "fast": {"kernels": "auto", "compile": "auto"},
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
}


class Runs:
    """Runs of a preset with shared settings, and the folder that keeps them.

    A curve has points of [steps, seconds of training, validation loss].
    """

    def __init__(self, preset: str, shared: dict[str, Any], keep: Path):
        digest = hashlib.sha256(json.dumps([preset, shared], sort_keys=True).encode()).hexdigest()
        self.preset, self.shared = preset, shared
        self.folder, self.gpu = keep.resolve() / digest[:8], power.open_gpu()[0]
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, own: dict[str, Any], seed: int) -> Row:
        """Returns a variant's run, from the folder if it is kept. Raises TaskFailed."""
        asked = self.shared | own | {"seed": seed}
        if "learning_rate" in own:
            name = f"{name}-{own['learning_rate']:g}"
            base = settings.replace(PRESETS[self.preset](), **self.shared).optim
            asked["min_lr"] = own["learning_rate"] * base.min_lr / base.learning_rate
        folder = self.folder / f"{results.slug(name)}-seed{seed}"
        done = folder / "joules.json"  # written last
        if not done.exists():
            asked |= {"out_dir": str(folder), "overwrite": True}
            worker = Worker(fit, self.preset, quiet=True)
            try:
                with power.metered(self.gpu) as energy:
                    worker.ask(asked, timeout=LIMIT_S)
            finally:
                worker.close()
            done.write_text(json.dumps(energy["joules"]))
        curves = Curves.of(folder)
        curve = [[e["step"], 3600 * curves.hours(e["step"]), e["val_loss"]] for e in curves.evals]
        return {"folder": str(folder), "curve": curve, "joules": json.loads(done.read_text())}


def fit(preset: str, asked: dict[str, Any]) -> None:
    """Trains in the process of a run, on one thread of a CPU."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    fastgpt.fit(preset, **asked)


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
    """Returns the learning rates tried on a seed, and the one with the lowest last loss."""
    found = {rate: runs.run(name, own | {"learning_rate": rate}, seed) for rate in rates}
    tried = {rate: run["curve"][-1][2] for rate, run in found.items()}
    best = min(tried, key=lambda rate: tried[rate])
    edge = ", at the edge of what was tried" if best in (min(rates), max(rates)) else ""
    losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
    print(f"  {name}: learning rate {best:g}{edge} ({losses})", flush=True)
    return {"tried": [[*pair] for pair in tried.items()], "taken": best}


def row_of(name: str, done: Sequence[Row], targets: Sequence[float], problem: str) -> Row:
    """Returns a variant's row: its runs by seed, with steps and seconds to the target or end."""
    row: Row = {"key": name, "variant": name, "runs": [*done]}
    ends = [run["curve"][-1] for run in done]
    both = zip(done, targets or [math.inf] * len(done), strict=False)
    after = [[p for p in run["curve"] if p[0] and p[2] <= target] for run, target in both]
    arrived = [points[0] for points in after if points] if targets else ends
    if len(arrived) < len(done) and not problem:
        best = min(p[2] for run in done for p in run["curve"])
        problem = f"the best loss is {best:.3f}, the target {max(targets):.3f}"
    if problem:
        return row | {"problem": problem}
    row |= {"steps": [p[0] for p in arrived], "seconds": [p[1] for p in arrived], "problem": ""}
    if all(run["joules"] for run in done):  # a run's joules, by the share of its steps
        shares = [p[0] / end[0] for p, end in zip(arrived, ends, strict=True)]
        row["joules"] = [run["joules"] * x for run, x in zip(done, shares, strict=True)]
    return row | results.timed([1e3 * s for s in row["seconds"]])


def compare_pairs(row: Row, first: Row) -> None:
    """Adds and prints the differences of a row from the first one, seed by seed."""
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
    runs, first_seed = Runs(args.preset, shared, args.keep), given["seed"]
    done, failed = {name: list[Row]() for name in variants}, dict.fromkeys(variants, "")
    for seed in (None, *range(first_seed, first_seed + args.seeds)):
        for name, own in variants.items():
            try:
                if seed is None and rates:
                    kept["rates"][name] = tune(runs, name, own, rates, first_seed + args.seeds)
                    own["learning_rate"] = kept["rates"][name]["taken"]
                elif seed is not None and not failed[name]:
                    done[name].append(runs.run(name, own, seed))
                    print(
                        f"  {name}, seed {seed}: {done[name][-1]['curve'][-1][2]:.4f}", flush=True
                    )
            except TaskFailed as e:
                failed[name] = str(e)
    lead = [run["curve"][-1][2] for run in next(iter(done.values()))]
    targets = lead if args.target == "first" else target * args.seeds
    result.rows[:] = [row_of(name, done[name], targets, failed[name]) for name in variants]
    if folders := [run["folder"] for found in done.values() for run in found]:
        compare(folders, CompareConfig(to=str(result.save(args.out).with_suffix(".png"))))
    for row in result.rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")
        if row is not result.rows[0]:
            compare_pairs(row, result.rows[0])
    return result.end(args.out, " and .png" if folders else "")
