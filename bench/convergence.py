"""python -m bench convergence: seconds of training until a target validation loss.

shakespeare_char where it has been prepared, else the text that every machine has; a run a variant
and seed, variants in turn, each in a process of its own. Evaluations always see the same batches
and do not count as training time, nor does compiling, which is shown beside it. Flags of
`fastgpt train` work here too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench import provenance, results, setup, step
from bench.stats import ratio_of_medians, summarize
from bench.tables import table
from bench.variants import Variant, build
from fastgpt import settings
from fastgpt.config import Config, PrepareConfig
from fastgpt.data.batches import Batches, eval_batches
from fastgpt.data.prepare import ensure
from fastgpt.data.tokens import open_dataset
from fastgpt.device import synchronize
from fastgpt.errors import UserError
from fastgpt_kernels._workers import TaskFailed, Worker

PRESET = "shakespeare_char"
# nanoGPT's README ends its GPU run at 1.4697; on the way there 1.5 is met by a steep curve.
TARGETS = {"shakespeare_char": 1.5, "python_stdlib": 1.5}
SMALL_TARGET, SMALL_STEPS = 3.6, 600
MIN_SEEDS_FOR_A_VERDICT = 6


def train_to_target(
    variant: Variant,
    values: dict[str, Any],
    folder: str,
    target: float,
    max_steps: int,
    eval_every: int,
) -> dict[str, Any]:
    """Train until the validation loss is at most `target`, or for max_steps.

    Returns {"seconds", "steps", "warm_up_s", "curve": [[seconds, step, val loss], ...], "reached"}.
    """
    config = setup.with_values(Config(), values)
    device, c = torch.device(config.system.device), config
    if device.type == "cpu":
        torch.set_num_threads(1)
    dataset = open_dataset(Path(folder))
    rows = c.optim.batch_size * c.optim.gradient_accumulation_steps
    T, seed = c.model.block_size, c.run.seed
    batches = Batches(dataset.train, rows_per_step=rows, block_size=T, seed=seed)
    held_out = [
        torch.from_numpy(w).to(device)
        for w in eval_batches(
            dataset.val,
            n_batches=c.log.eval_iters,
            batch_size=c.optim.batch_size,
            block_size=T,
            seed=0,
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        stepper = build(variant, c, dataset.vocab_size)
    started = time.perf_counter()
    stepper.warm_up(torch.from_numpy(batches.tokens(0)).to(device))
    stepper.evaluate(held_out[0])  # compiles too
    synchronize(device)
    warm_up_s, seconds, curve = time.perf_counter() - started, 0.0, []
    for at in range(0, max_steps, eval_every):
        started = time.perf_counter()
        for s in range(at, min(at + eval_every, max_steps)):
            tokens = torch.from_numpy(batches.tokens(s))
            if device.type == "cuda":
                tokens = tokens.pin_memory()
            stepper.step(s, tokens.to(device, non_blocking=True))
        synchronize(device)
        seconds += time.perf_counter() - started
        loss = torch.stack([stepper.evaluate(w) for w in held_out]).mean().item()
        curve.append([seconds, min(at + eval_every, max_steps), loss])
        if not loss > target:
            break
    _, steps, loss = curve[-1]
    reached = loss <= target  # not so where it is NaN
    return {
        "seconds": seconds,
        "steps": steps,
        "warm_up_s": warm_up_s,
        "curve": [point for point in curve if point[2] == point[2]],
        "reached": reached,
    }


def one_run(variant: Variant, values: dict[str, Any], *task: Any, limit_s: float) -> dict[str, Any]:
    worker = Worker(train_to_target, variant, values)
    try:
        return worker.ask(*task, timeout=limit_s)
    finally:
        worker.close()


def row_of(variant: Variant, runs: list[dict[str, Any]], problem: str, target: float) -> dict:
    missed = [r for r in runs if not r["reached"]]
    if missed and not problem:
        best = min((p[2] for r in missed for p in r["curve"]), default=float("nan"))
        problem = f"best loss {best:.3f} after {missed[0]['steps']} steps, target {target:g}"
    row: dict[str, Any] = {"key": f"{PRESET} {variant.name}", "variant": variant.name}
    row |= {"problem": problem, "runs": runs}
    if not problem:
        samples = [1e3 * r["seconds"] for r in runs]
        row |= {"samples_ms": samples, "median_ms": summarize(samples).median}
    return row


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
    parser = argparse.ArgumentParser(
        prog="python -m bench convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--target", type=float, help="validation loss to reach")
    parser.add_argument("--seeds", type=int, default=3 if gpu else 1)
    parser.add_argument("--eval-every", type=int, default=50 if gpu else 20, help="steps")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for one run")
    parser.add_argument("--variants", default="eager,kernels+compile" if gpu else "eager")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout to race")
    parser.add_argument("--out", type=Path, default=results.FOLDER if gpu else None)
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
    for seed in range(args.seeds):
        for v in variants:
            if problems[v.name]:
                continue
            values = settings.to_dict(config) | {"seed": config.run.seed + seed}
            task = (str(folder), target, config.run.max_iters, args.eval_every)
            try:
                runs[v.name].append(one_run(v, values, *task, limit_s=args.limit_seconds))
            except TaskFailed as e:
                problems[v.name] = str(e)
        result.rows[:] = [row_of(v, runs[v.name], problems[v.name], target) for v in variants]
        path = result.save(args.out)
    show(result.rows)
    if path:
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
            compare = f"{row['median_ms'] / base['median_ms']:.3f}"
            if len(seconds) >= MIN_SEEDS_FOR_A_VERDICT:
                r = ratio_of_medians(row["samples_ms"], base["samples_ms"])
                compare += f" [{r.low:.3f}, {r.high:.3f}] {r.verdict}"
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
