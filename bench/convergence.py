"""python -m bench convergence: seconds of training until a target validation loss.

shakespeare_char where it has been prepared, else the text that every machine has; a run a variant
and seed, variants in turn, each in a process of its own. Evaluations always see the same batches
and do not count as training time, nor does compiling, which is shown beside it. Flags of
`fastgpt train` work here too.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import provenance, results, setup, step
from bench.stats import Ratio, ratio_of_medians, summarize
from bench.tables import table
from bench.variants import Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config, PrepareConfig
from fastgpt.data.batches import Batches, eval_batches
from fastgpt.data.prepare import ensure
from fastgpt.data.tokens import open_dataset
from fastgpt.errors import UserError
from fastgpt.model.device import synchronize
from fastgpt_kernels.tools.workers import TaskFailed, Worker

PRESET = "shakespeare_char"
# nanoGPT's README ends its GPU run at 1.4697; on the way there 1.5 is met by a steep curve.
TARGETS = {"shakespeare_char": 1.5, "python_stdlib": 1.5}
SMALL_TARGET, SMALL_STEPS = 3.6, 600


class Race:
    """One run in a worker process: `start` builds it, each `advance` trains on to an evaluation."""

    def __init__(self, variant: Variant, values: dict[str, Any], folder: str):
        self.variant, self.values, self.folder = variant, values, folder

    def start(self) -> float:
        """Build and compile. Returns the seconds that the latter took."""
        self.config = c = setup.with_values(Config(), self.values)
        self.device = torch.device(c.system.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        dataset = open_dataset(Path(self.folder))
        rows = c.optim.rows
        T = c.model.block_size
        self.batches = Batches(dataset.train, rows_per_step=rows, block_size=T, seed=c.run.seed)
        windows = eval_batches(
            dataset.val,
            n_batches=c.log.eval_iters,
            batch_size=c.optim.batch_size,
            block_size=T,
            seed=0,
        )
        self.held_out = [torch.from_numpy(w).to(self.device) for w in windows]
        with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT's model talks
            self.stepper = build(self.variant, c, dataset.vocab_size)
        started = time.perf_counter()
        self.stepper.warm_up(torch.from_numpy(self.batches.tokens(0)).to(self.device))
        self.stepper.evaluate(self.held_out[0])  # compiles too
        synchronize(self.device)
        return time.perf_counter() - started

    def advance(self, first: int, end: int) -> tuple[float, float]:
        """Steps first ... end - 1: the seconds they took, and then the validation loss."""
        started = time.perf_counter()
        for s in range(first, end):
            tokens = torch.from_numpy(self.batches.tokens(s))
            if self.device.type == "cuda":
                tokens = tokens.pin_memory()
            self.stepper.step(s, tokens.to(self.device, non_blocking=True))
        synchronize(self.device)
        seconds = time.perf_counter() - started
        loss = torch.stack([self.stepper.evaluate(w) for w in self.held_out]).mean().item()
        return seconds, loss


def _serve(race: Race, command: str, *args: Any) -> Any:
    return getattr(race, command)(*args)


@dataclass(frozen=True)
class Course:
    """How far a run goes at most, in steps and seconds, and when it has arrived."""

    target: float
    max_steps: int
    eval_every: int
    limit_s: float


def one_run(race: Race, course: Course, progress: Callable[[dict[str, Any]], object]) -> dict:
    """{"seconds", "steps", "warm_up_s", "curve": [[seconds, step, val loss], ...], "reached"}.

    `progress` sees it after every evaluation. Raises TaskFailed.
    """
    worker, end = Worker(_serve, race), time.monotonic() + course.limit_s

    def ask(*task: Any) -> Any:
        return worker.ask(*task, timeout=max(1.0, end - time.monotonic()))

    run: dict[str, Any] = {"seconds": 0.0, "steps": 0, "curve": [], "reached": False}
    try:
        run["warm_up_s"] = ask("start")
        while run["steps"] < course.max_steps:
            first, last = run["steps"], min(run["steps"] + course.eval_every, course.max_steps)
            seconds, loss = ask("advance", first, last)
            run |= {"seconds": run["seconds"] + seconds, "steps": last}
            if not math.isfinite(loss):
                break
            run["curve"].append([run["seconds"], last, loss])
            run["reached"] = loss <= course.target
            progress(run)
            if run["reached"]:
                break
    finally:
        worker.close()
    return run


def row_of(variant: Variant, runs: list[dict[str, Any]], problem: str, target: float) -> dict:
    missed = [r for r in runs if not r["reached"]]
    if missed and not problem:
        best = min((p[2] for r in missed for p in r["curve"]), default=float("nan"))
        problem = f"best loss {best:.3f} after {missed[0]['steps']} steps, target {target:g}"
    row: dict[str, Any] = {"key": f"{PRESET} {variant.name}", "variant": variant.name}
    row |= {"problem": problem or ("" if runs else results.NOT_YET), "runs": runs}
    if not row["problem"]:
        samples = [1e3 * r["seconds"] for r in runs]
        row |= {"samples_ms": samples, "median_ms": summarize(samples).median}
    return row


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times over the first row's that has one, over the seeds that both have run."""
    timed = [row for row in rows if not row["problem"]]
    for row in timed[1:]:
        pairs = list(zip(row["samples_ms"], timed[0]["samples_ms"], strict=False))
        r = ratio_of_medians(*zip(*pairs, strict=True))
        row["ratio"] = results.ratio(timed[0]["variant"], r)
    return rows


def open_data(flags: dict[str, str]) -> tuple[Path, str]:
    """The token folder and the corpus's name: what flags name, shakespeare_char, or local text."""
    if {"dataset", "input"} & set(flags):
        config = settings.apply_flags(setup.PRESETS[PRESET](), flags)
        return ensure(PrepareConfig(**vars(config.data))), config.data.dataset
    for name in ("shakespeare_char", "python_stdlib"):
        config = settings.apply_flags(setup.PRESETS[PRESET](), {"dataset": name} | flags)
        try:
            return ensure(PrepareConfig(**vars(config.data))), name
        except UserError:
            if name == "python_stdlib":
                raise
            print("shakespeare_char is not prepared here: Python's standard library instead")
    raise AssertionError("the loop returns or raises")


def main(argv: list[str]) -> int:
    parser = setup.parser("convergence", __doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--target", type=float, help="validation loss to reach")
    parser.add_argument("--seeds", type=int, default=3 if gpu else 1)
    parser.add_argument("--eval-every", type=int, default=50 if gpu else 20, help="steps")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for one run")
    parser.add_argument("--variants", default="eager,kernels+compile" if gpu else "eager")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout to race")
    setup.add_out(parser)
    args, flags = setup.parse(parser, argv)
    setup.say_small()
    if min(args.seeds, args.eval_every) < 1:
        parser.error("--seeds and --eval-every must be at least 1")
    gpu = gpu and flags.get("device") != "cpu"
    small = {} if gpu else {"eval_iters": "10", "max_iters": str(SMALL_STEPS), "dropout": "0.0"}
    flags = {"decay_lr": "True", **small, **flags}
    names = args.variants
    if args.peer_path and "peer" not in names:
        names += ",peer+compile" if gpu else ",peer"
    try:
        variants, _ = step.contenders(names, args.peer_path, gpu)
        folder, corpus = open_data(flags)
        config, _ = setup.configure(PRESET, flags)
    except UserError as e:
        parser.error(str(e))
    target = args.target or (TARGETS.get(corpus, 1.5) if gpu else SMALL_TARGET)
    result = results.Result("convergence", argv, {"target": target, "corpus": corpus})
    if args.peer_path:
        peer = Path(args.peer_path).expanduser()
        result.data["settings"]["peer_commit"] = provenance.commit(peer)
    print(f"{corpus} to a validation loss of {target:g}, {args.seeds} seed(s)", flush=True)
    runs: dict[str, list] = {v.name: [] for v in variants}
    problems = dict.fromkeys(runs, "")
    course = Course(target, config.run.max_iters, args.eval_every, args.limit_seconds)

    def keep(running: str = "", run: dict[str, Any] | None = None) -> None:
        """Save what there is; the run under way has its curve so far but no time yet."""
        rows = [row_of(v, runs[v.name], problems[v.name], target) for v in variants]
        for row in rows:
            if run is not None and row["variant"] == running:
                row["under_way"] = run
        result.rows[:] = with_ratios(rows)
        result.save(args.out)

    keep()
    for seed in range(args.seeds):
        for v in variants:
            if problems[v.name]:
                continue
            values = settings.to_dict(config) | {"seed": config.run.seed + seed}
            try:
                run = one_run(Race(v, values, str(folder)), course, partial(keep, v.name))
                runs[v.name].append(run)
            except TaskFailed as e:
                problems[v.name] = str(e)
            keep()
    show(result.rows)
    if path := result.finish(args.out):
        print(f"written: {path}")
    return 1 if any(row["problem"] for row in result.rows) else 0


def show(rows: list[dict[str, Any]]) -> None:
    lines, base = [], next((r for r in rows if not r["problem"]), None)
    for row in rows:
        if row["problem"] or base is None:
            print(f"  {row['variant']}: {row['problem']}")
            continue
        seconds = [r["seconds"] for r in row["runs"]]
        compare = ""
        if row is not base:
            r = row["ratio"]
            compare = str(Ratio(r["ratio"], r["low"], r["high"]))
        lines.append(
            [
                row["variant"],
                f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]",
                f"{statistics.median(r['steps'] for r in row['runs']):.0f}",
                f"{statistics.median(r['warm_up_s'] for r in row['runs']):.1f}",
                compare,
            ]
        )
    print(table(["variant", "seconds [range]", "steps", "compiling s", "time ratio"], lines))
