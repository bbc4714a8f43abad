"""python -m bench all --budget SECONDS: the measurements that some minutes of a GPU are worth.

Each part runs in its own process. A small budget goes to the most valuable parts. One that fails or
is cut at its time keeps its results so far, and the next one starts. Rules turn rows into decisions
on defaults. `all.log` has the output, `power.csv` the GPU's power, clock and temperature.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from bench import results, setup, stats
from bench.results import ROOT, Row
from fastgpt.model.device import resolve_device
from fastgpt_kernels.launch import arch_on
from fastgpt_kernels.registry import Sizes, model_specs, specs

CLOSING_S = 5.0  # kept back for the decisions
WORTH_MS = 0.3  # per step: less does not make an implementation the default
# µs per call at gpt2's sizes on an H200, which an implementation has to save
NEEDED_US = {
    "attention hopper backward": 100, "mlp hopper forward": 32, "mlp hopper backward": 60,
    "mlp cublaslt forward": 47, "mlp cublaslt backward": 80,
}  # fmt: skip
POWER = ["nvidia-smi", "--query-gpu=timestamp,power.draw,clocks.sm,temperature.gpu"]
POWER += ["--format=csv", "-lms", "100"]
ON_A_CPU = "mlp", "attention", "step", "waterfall", "kernels"
OVERRUN = 2.0  # times a part's seconds, after which it is cut
clock = time.monotonic


class Part(NamedTuple):
    """Command that needs `least` seconds and takes `wants`. A worth of 1 is the most valuable."""

    name: str
    worth: int
    least: float
    wants: float
    rule: Callable[[Sequence[Row]], list[str]]
    command: str


def keep_what_pays(rows: Sequence[Row]) -> list[str]:
    """Returns the variants' times, and each setting that saves `WORTH_MS` beyond its interval."""
    found = []
    for row in sorted((r for r in rows if not r["problem"]), key=lambda r: r["median_ms"]):
        text = f"{row['key']}: {row['median_ms']:.2f} ms, {100 * row['mfu']:.1f} % MFU"
        ms, low, high = row.get("difference_ms", (0.0, 0.0, 0.0))
        if "=" in row["variant"] and ms <= -WORTH_MS and high is not None and high < 0:
            text += f"; take it: it saves {-ms:.2f} ms [{-high:.2f}, {-low:.2f}]"
        found.append(text)
    return found


def proven_faster(rows: Sequence[Row]) -> list[str]:
    """Returns what saves `NEEDED_US` or fails to, other bits, and all that is proven faster."""
    found = []
    for row in (r for r in rows if "ratio" in r):
        needed = NEEDED_US.get(f"{row['op']} {row['provider']} {row['pass']}")
        text = f"{row['key']}: {stats.describe(row['ratio'])} than {row['ratio']['to']}"
        if needed is not None:
            saved = 1e3 * row["median_ms"] * (1 / row["ratio"]["ratio"] - 1)
            enough = saved >= needed and row["ratio"]["verdict"] == "faster"
            verdict = "take it" if enough else "leave it off"
            if not row.get("same_bits", True):
                verdict = "other bits in a repeat, a race: leave it off"
            text += f"; saves {saved:.0f} of the {needed} µs needed: {verdict}"
        if needed is not None or row["ratio"]["verdict"] == "faster":
            found.append(text)
    return found


def better_configs(rows: Sequence[Row]) -> list[str]:
    """Returns the entries of the faster launch configs."""
    return [row["entry"] for row in rows if "entry" in row]


def largest_gaps(rows: Sequence[Row]) -> list[str]:
    """Returns the three kernels with the most time above their bounds."""
    text = "{kernel} {kind} {shape}: {ms:.3f} ms, of which {bound_ms:.3f} are its bound"
    drawn = [row["waterfall"]["budget"][:3] for row in rows if "waterfall" in row]
    return [text.format(**r) for several in drawn for r in several]


def levers(arch: str) -> str:
    """Returns --swap for each implementation that is no default, and for the newest together."""
    single, newest = [], dict[str, str]()
    for op in model_specs():
        for name in sorted(op.implementations.keys() - {"eager", "flash", "cudnn"}):
            reason = op.unsupported_reason(name, arch, torch.bfloat16, Sizes())
            if not reason and name != op.preferred.get(arch, op.standard):
                single.append(f"op.{op.name}={name}")
                newest |= {op.name: single[-1]} if name != "triton" else {}
    return " ".join(f"--swap={x}" for x in sorted({*single, ",".join(newest.values())} - {""}))


def parts(gpu: bool, peer_path: str) -> list[Part]:
    """Returns the parts in the order in which they run."""
    arch = arch_on(resolve_device("auto"))
    size, n, turns = "gpt2", 20, "--rounds=10 --turn-seconds=0.5"
    if not gpu:
        size, n, turns = "laptop --n_layer=1 --batch_size=4", 6, "--rounds=6 --turn-seconds=0.02"
    fast, peer = f"step {size} {turns} --variants={'kernels+compile' if gpu else 'eager'}", ""
    if peer_path:
        path = Path(peer_path).expanduser().resolve()
        peer = f",peer{'+compile' * gpu} {shlex.quote(f'--peer-path={path}')}"
    others = "layer_norm add_layer_norm bias_gelu linear_cross_entropy cross_entropy"
    sweep = "kernels layer_norm add_layer_norm cross_entropy attention --sweep --rounds=10"
    names = "|".join(kernel for op in specs() for kernel in op.kernels)
    ncu = f"ncu --clock-control=none --set=full --launch-count=40 '--kernel-name=regex:^({names})$'"
    ncu += f" {sys.executable} -m bench kernels --rounds=6"
    alone = f"kernels attention --rounds={n} --repeats={n}"
    found = [
        Part("mlp", 3, 15, 60, proven_faster, f"kernels mlp --rounds={n}"),
        Part("attention", 2, 15, 35, proven_faster, alone),
        Part("step", 1, 30, 90, keep_what_pays, f"{fast}{',compile' * gpu}{peer} {levers(arch)}"),
        Part("micro-batch 64", 6, 15, 20, keep_what_pays, f"{fast} --batch_size=64"),
        Part("waterfall", 4, 15, 30, largest_gaps, f"waterfall {size} --seconds={n / 4}"),
        Part("sustained", 5, 20, 35, largest_gaps, f"waterfall {size} --sustained"),
        Part("configs", 7, 15, 55, better_configs, sweep),
        Part("kernels", 8, 15, 60, proven_faster, f"kernels {others} --rounds={n}"),
        Part("ncu", 9, 30, 120, lambda rows: [], ncu),
    ]
    return found if gpu else [p for p in found if p.name in ON_A_CPU]


def affordable(known: Sequence[Part], seconds: float) -> list[Part]:
    """Returns the most valuable parts that the time is enough for."""
    chosen: list[Part] = []
    for part in sorted(known, key=lambda p: p.worth):
        fits = sum(p.wants for p in chosen) + part.wants <= seconds
        if chosen and not fits:
            break
        chosen += [part] * (fits or part.least <= seconds)
    return chosen


def run(part: Part, out: Path, seconds: float, log: IO[str]) -> int | None:
    """Returns the exit code of a part, or None if it was stopped at its time."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONUNBUFFERED": "1"}
    command = [*shlex.split(part.command), f"--out={out}"]
    if command[0] != "ncu":
        command = [sys.executable, "-m", "bench", *command]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment,
        start_new_session=True,  # so that its workers end with it
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str]) -> int:
    parser = setup.Parser("all", __doc__)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, all in all")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout to compare with")
    args, _ = parser.parse(argv)
    end, out = clock() + args.budget - CLOSING_S, args.out.resolve()
    known = parts(torch.cuda.is_available(), args.peer_path)
    chosen = affordable(known, end - clock())
    result = results.Result("all", argv, {"budget_s": args.budget})
    folder, failed = result.save(out).parent, False
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "all.log").open("w"))
        if shutil.which("nvidia-smi"):
            query = subprocess.Popen([*POWER, "-f", f"{folder}/power.csv"])
            stack.callback(query.kill)
        for part in known:
            row: Row = {"key": part.name, "problem": "", "decisions": []}
            before, started = set(out.glob("**/*.json")), clock()
            later = sum(p.least for p in chosen if known.index(p) > known.index(part))
            seconds = min(OVERRUN * part.wants, end - started - later)
            if part in chosen and seconds >= part.least:
                code = run(part, out, seconds, log)
                ended = {None: "stopped at its time; its results so far are kept", 0: "done"}
                row["outcome"] = ended.get(code, f"exit code {code}: see all.log")
                row["samples_ms"] = [1e3 * (clock() - started)]
                failed |= bool(code)  # None: cut at its time
            else:
                row["problem"] = row["outcome"] = f"not run within {args.budget:g} s"
            for path in set(out.glob("**/*.json")) - before:
                row["decisions"] += part.rule(results.load(path)["rows"])
            result.rows.append(row)
            result.save(out)
            print(f"{part.name}: {row['outcome']}")
            print("".join(f"  {line}\n" for line in row["decisions"]), end="", flush=True)
    said = [line for row in result.rows for line in row["decisions"]]
    print("decisions:", *(line for line in said if "take it" in line), sep="\n  ")
    result.end(out)
    return 1 if failed else 0
