"""Losses over whole runs: `bench curves`, and what `bench convergence` shares with it.

Variants take turns, each run in a process of its own. Evaluations always see the same batches and
do not count as training time, nor does compiling.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import results, setup
from bench.setup import at_least
from bench.tables import table
from bench.turns import quietly_built, serve
from bench.variants import Variant
from fastgpt.config import settings
from fastgpt.config.schema import Config, PrepareConfig
from fastgpt.data.loader import Batches, eval_batches
from fastgpt.data.prepare import ensure
from fastgpt.data.token_files import open_dataset
from fastgpt.model.device import synchronize
from fastgpt_kernels.worker import TaskFailed, Worker

PRESET = "shakespeare_char"
ORACLE = "eager fp32"
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73")
EVALUATIONS = 5  # of a curve, besides the first
Rows = list[dict[str, Any]]


class Race:
    """One run in a worker process: `start` builds it, each `advance` trains on to an evaluation."""

    def __init__(self, variant: Variant, values: dict[str, Any], folder: Path):
        self.variant, self.values, self.folder = variant, values, folder

    def start(self) -> float:
        """Build and compile. Returns the seconds that the latter took."""
        c = setup.with_values(Config(), self.values)
        self.device, T = torch.device(c.system.device), c.model.block_size
        data = open_dataset(self.folder)
        self.batches = Batches(
            data.train, rows_per_step=c.optim.rows, block_size=T, seed=c.run.seed
        )
        rows, n = c.optim.batch_size, c.log.eval_iters
        windows = eval_batches(data.val, n_batches=n, batch_size=rows, block_size=T, seed=0)
        self.held_out = [torch.from_numpy(w).to(self.device) for w in windows]
        self.stepper = quietly_built(self.variant, c, data.vocab_size)
        started = time.perf_counter()
        self.stepper.warm_up(torch.from_numpy(self.batches.tokens(0)).to(self.device))
        self.stepper.evaluate(self.held_out[0])  # compiles too
        synchronize(self.device)
        return time.perf_counter() - started

    def advance(self, first: int, end: int, lap: int) -> tuple[list[float], float, float]:
        """Steps first ... end - 1: mean seconds of a step by lap, their mean loss (NaN: no step),
        and then the validation loss."""
        seconds: list[float] = []
        losses: list[torch.Tensor] = []
        # On a CPU one thread computes all: its own time is that of a machine without other work.
        clock = time.perf_counter if self.device.type != "cpu" else time.process_time
        for begin in range(first, end, lap):
            steps = range(begin, min(begin + lap, end))
            started = clock()
            for s in steps:
                tokens = torch.from_numpy(self.batches.tokens(s))
                if self.device.type == "cuda":
                    tokens = tokens.pin_memory()
                loss, _ = self.stepper.step(s, tokens.to(self.device, non_blocking=True))
                losses.append(loss.detach())
            synchronize(self.device)
            seconds.append((clock() - started) / len(steps))
        trained = torch.stack(losses).mean().item() if losses else math.nan
        val_loss = torch.stack([self.stepper.evaluate(w) for w in self.held_out]).mean().item()
        return seconds, trained, val_loss


@dataclass(frozen=True)
class Course:
    """How far a run goes at most, in steps and seconds, and when it has arrived."""

    max_steps: int
    eval_every: int
    lap: int  # steps between two readings of the clock
    limit_s: float
    target: float = -math.inf


def one_run(race: Race, course: Course, progress: Callable[[dict[str, Any]], object]) -> dict:
    """{"seconds", "steps", "warm_up_s", "curve": [[seconds, step, val loss], ...], "train_losses":
    means over the steps before each (0 at the first), "reached", "step_ms": by lap}.

    `progress` sees it after every evaluation. Raises TaskFailed.
    """
    worker, end = Worker(serve, race), time.monotonic() + course.limit_s

    def ask(*task: Any) -> Any:
        return worker.ask(*task, timeout=max(1.0, end - time.monotonic()))

    run: dict[str, Any] = {"seconds": 0.0, "steps": 0, "reached": False}
    run |= {"curve": [], "train_losses": [], "step_ms": []}
    try:
        run["warm_up_s"] = ask("start")
        for last in [*range(0, course.max_steps, course.eval_every), course.max_steps]:
            first = run["steps"]
            laps, trained, loss = ask("advance", first, last, course.lap)
            for begin, seconds in zip(range(first, last, course.lap), laps, strict=True):
                run["seconds"] += seconds * min(course.lap, last - begin)
                run["step_ms"].append(1e3 * seconds)
            run["steps"] = last
            if not math.isfinite(loss):
                break
            run["curve"].append([run["seconds"], last, loss])
            run["train_losses"].append(trained if last else 0.0)
            run["reached"] = last > 0 and loss <= course.target
            progress(run)
            if run["reached"]:
                break
    finally:
        worker.close()
    return run


def in_turn(
    variants: Sequence[Variant],
    config: Config,
    folder: Path,
    seeds: int,
    course: Course,
    progress: Callable[[Variant, dict[str, Any]], object] = lambda variant, run: None,
) -> Iterator[tuple[Variant, int, dict[str, Any], str]]:
    """(variant, seed, run, problem) of every run; a variant that failed does not run again."""
    problems: dict[str, str] = {}
    for seed in range(config.run.seed, config.run.seed + seeds):
        for v in variants:
            run: dict[str, Any] = {}
            if v.name not in problems:
                race = Race(v, settings.to_dict(config) | {"seed": seed}, folder)
                try:
                    run = one_run(race, course, partial(progress, v))
                except TaskFailed as e:
                    problems[v.name] = str(e)
            yield v, seed - config.run.seed, run, problems.get(v.name, "")


def end(
    result: results.Result,
    out: Path | None,
    curves: Sequence[tuple[str, list[list[float]]]],
    title: str,
) -> int:
    """Finish the result, beside it a picture of the (variant, curve)s. The command's exit code."""
    path, also = result.finish(out), ""
    if path and curves and importlib.util.find_spec("matplotlib") is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(name for name, _ in curves))
        for i, (name, curve) in enumerate(curves):
            first = name not in [n for n, _ in curves[:i]]
            colour = COLOURS[names.index(name) % len(COLOURS)]
            steps, losses = [p[-2] for p in curve], [p[-1] for p in curve]
            axes.plot(steps, losses, color=colour, lw=1, label=name if first else None)
        axes.set(xlabel="step", ylabel="validation loss, nats a token", title=title)
        axes.legend()
        picture = path.with_suffix(".png")
        figure.savefig(picture, dpi=150)
        also = f" and {picture.name}"
    return result.end(out, also)


# --- curves --------------------------------------------------------------------------------------


def precisions(preset: str, flags: dict[str, Any]) -> list[Variant]:
    """The oracle and what is held against it; without a GPU that is eager bf16."""
    eager, oracle = {"kernels": "eager", "compile": False}, {"dtype": "float32"}
    system = setup.preset_of(preset, flags | {"dtype": "auto"}).system
    if system.device == "cpu":
        return [
            Variant(ORACLE, eager | oracle),
            Variant("eager bf16", eager | {"dtype": "bfloat16"}),
        ]
    low = {"dtype": system.dtype}
    fast = Variant("fast path", low | {"kernels": "auto", "compile": True}, graph=True)
    return [Variant(ORACLE, eager | oracle), Variant("eager 16-bit", eager | low), fast]


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


def curves(argv: list[str]) -> int:
    """python -m bench curves: does the fast path learn what eager fp32 learns?

    Whole runs, one a variant and seed, in turn: eager in fp32 (the oracle), eager in the device's
    16-bit dtype, and the fast path as users get it. The fast path is accepted if its validation
    losses differ from the oracle's at the same seed, on average over the seeds, by no more than the
    oracle's own differ from seed to seed. Ends with a table and a picture of the curves. Flags of
    `fastgpt train` work here too.
    """
    parser = setup.Parser("curves", inspect.getdoc(curves))
    gpu = torch.cuda.is_available()
    parser.add_argument("preset", nargs="?", default=PRESET if gpu else "laptop")
    parser.add_argument("--steps", type=at_least(EVALUATIONS), default=1000 if gpu else 60)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="for one run")
    args, flags = parser.parse(argv)
    if not gpu:
        print("no GPU: a short run of a small model on the CPU, eager bf16 for the fast path")
    flags = {
        "max_iters": str(args.steps),
        "eval_interval": str(args.steps // EVALUATIONS),
        "eval_iters": "200" if gpu else "10",
        "log_interval": "10",
        **flags,
    }
    with parser.user_errors():
        config, variants = setup.preset_of(args.preset, flags), precisions(args.preset, flags)
        folder = ensure(PrepareConfig.of(config.data))
    log, steps = config.log, config.run.max_iters
    course = Course(steps, log.eval_interval, log.log_interval, args.limit_seconds)
    result = results.Result("curves", argv, {"preset": args.preset, **flags})
    for v, seed, run, problem in in_turn(variants, config, folder, args.seeds, course):
        if run and run["steps"] < steps:
            problem = f"the loss of step {run['steps']} is not finite"
        key = f"{v.name} seed {seed}"
        row: dict[str, Any] = {"key": key, "variant": v.name, "seed": seed, "problem": problem}
        if not problem:
            row |= {"curve": [p[1:] for p in run["curve"]], "samples_ms": run["step_ms"]}
        print(f"  {key}: " + (problem or f"val loss {row['curve'][-1][1]:.4f}"), flush=True)
        result.rows.append(row)
        result.save(args.out)
    result.data["settings"]["verdicts"] = words = show_losses(result.rows)
    runs = [(row["variant"], row["curve"]) for row in result.rows if not row["problem"]]
    code = end(result, args.out, runs, f"{args.preset}, {steps} steps, {args.seeds} seeds")
    return 1 if any("off" in word for word in words.values()) else code


def show_losses(rows: Rows) -> dict[str, str]:
    """The table of the last losses. Returns the variants' verdicts."""
    final: dict[str, dict[int, float]] = {row["variant"]: {} for row in rows}
    for row in rows:
        if not row["problem"]:
            final[row["variant"]][row["seed"]] = row["curve"][-1][1]
    oracle, lines, words = final[ORACLE], [], {}
    for name, losses in final.items():
        shared = sorted(set(losses) & set(oracle))
        cells = [name, ", ".join(f"{losses[s]:.4f}" for s in sorted(losses)) or "--", "", ""]
        if name != ORACLE and shared:
            found = verdict([oracle[s] for s in shared], [losses[s] for s in shared])
            words[name] = cells[3] = found["verdict"]
            cells[2] = f"{found['mean_difference']:+.4f} of {found['seed_spread']:.4f}"
        lines.append(cells)
    print(table(["variant", "val loss by seed", "mean difference, spread", "verdict"], lines))
    return words
