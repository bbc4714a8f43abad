"""python -m bench all --budget SECONDS: what is most worth knowing, in that time, and decisions.

The parts run in order of worth, each in a process of its own and with a share of the time that is
left. They write results as they get them: one that is cut at its time keeps what it has, one that
fails is reported, and the rest goes on. `all.log` has everything that they print. At the end stands
what follows from the results: which implementation to make a default, and where the time goes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from bench import results, setup
from bench.results import ROOT, Row

CLOSING_S = 5.0  # kept back for the decisions
WORTH_MS = 0.3  # per step: less does not make an implementation the default
clock = time.monotonic


@dataclass(frozen=True)
class Part:
    """A command.

    least  seconds without which it has nothing to show: it does not begin with less
    wants  its share of the time, against what the others want
    rule   (its rows) -> what follows from them, a sentence each
    """

    name: str
    command: Sequence[str]
    least: float
    wants: float
    rule: Callable[[Sequence[Row]], list[str]]


def keep_what_pays(rows: Sequence[Row]) -> list[str]:
    """Returns the variants' times, and each setting that saves `WORTH_MS` beyond its interval."""
    found = []
    for row in sorted((r for r in rows if not r["problem"]), key=lambda r: r["median_ms"]):
        text = f"{row['key']}: {row['median_ms']:.2f} ms, {100 * row['mfu']:.1f} % MFU"
        ms, low, high = row.get("difference_ms", (0.0, 0.0, 0.0))
        if "=" in row["variant"] and ms <= -WORTH_MS and high is not None and high < 0:
            text += f"; make it the default: it saves {-ms:.2f} ms [{-high:.2f}, {-low:.2f}]"
        found.append(text)
    return found


def proven_faster(rows: Sequence[Row]) -> list[str]:
    """Returns what is proven to be faster than fastgpt's kernels."""
    faster = [r for r in rows if r.get("ratio", {}).get("verdict") == "faster"]
    return [f"{r['key']}: {results.ratio_text(r)} than {r['ratio']['to']}" for r in faster]


def largest_gaps(rows: Sequence[Row]) -> list[str]:
    """Returns the three kernels with the most time above their bounds."""
    text = "{kernel} {kind} {shape}: {ms:.3f} ms, of which {bound_ms:.3f} are its bound"
    drawn = [row["waterfall"]["budget"][:3] for row in rows if "waterfall" in row]
    return [text.format(**r) for several in drawn for r in several]


def parts(gpu: bool, peer_path: str) -> list[Part]:
    """Returns what runs, the most worth knowing first."""
    preset, small = ("gpt2", ()) if gpu else ("laptop", ("--n_layer=1", "--batch_size=4"))
    turns = ("--rounds=10", "--turn-seconds=0.5") if gpu else ("--rounds=6", "--turn-seconds=0.02")
    step = ("step", preset, *small, *turns)
    long = ("--sustained",) if gpu else ("--seconds=0.5",)
    peer = (f"--peer-path={peer_path}",) if peer_path else ()
    return [
        Part("step", (*step, *peer), 30, 120, keep_what_pays),
        Part("swap", (*step, "--swap=each"), 30, 120, keep_what_pays),
        Part("waterfall", ("waterfall", preset, *small, *long), 20, 60, largest_gaps),
        Part("kernels", ("kernels", f"--rounds={20 if gpu else 6}"), 15, 90, proven_faster),
    ]


def allot(waiting: Sequence[Part], left: float) -> float:
    """Returns the seconds for the first of the parts that wait; 0 if they are too few for it."""
    part = waiting[0]
    if left < part.least:
        return 0.0
    # Up to twice what it wants, since not all take what they get.
    fair = part.wants * min(2.0, left / sum(p.wants for p in waiting))
    return left if len(waiting) == 1 else min(left, max(part.least, fair))


def run(command: Sequence[str], seconds: float, log: IO[str]) -> int | None:
    """Returns the exit code of a bench command, or None if it was stopped at its time."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
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
    peer = str(Path(args.peer_path).expanduser().resolve()) if args.peer_path else ""
    chosen = parts(torch.cuda.is_available(), peer)
    result = results.Result("all", argv, {"budget_s": args.budget})
    log_path, failed = result.save(out).parent / "all.log", False
    with log_path.open("w") as log:
        for i, part in enumerate(chosen):
            left, before = end - clock(), set(results.files(out))
            seconds, started = allot(chosen[i:], left), clock()
            row: Row = {"key": part.name, "problem": "", "decisions": []}
            if seconds:
                code = run([*part.command, f"--out={out}"], seconds, log)
                ended = {None: "stopped at its time; what it had is kept", 0: "done"}
                row["outcome"] = ended.get(code, f"exit code {code}: see {log_path.name}")
                row["samples_ms"] = [1e3 * (clock() - started)]
                failed |= bool(code)  # None: cut at its time
            else:
                row["problem"] = row["outcome"] = (
                    f"not run: it takes {part.least:g} s, {left:.0f} were left"
                )
            for path in set(results.files(out)) - before:
                row["decisions"] += part.rule(results.load(path)["rows"])
            result.rows.append(row)
            result.save(out)
            print(f"{part.name}: {row['outcome']}")
            print("".join(f"  {line}\n" for line in row["decisions"]), end="", flush=True)
    result.end(out)
    return 1 if failed else 0
