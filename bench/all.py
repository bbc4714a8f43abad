"""python -m bench all --budget SECONDS [--out DIR]: everything, in order of worth.

First all is compiled, in parallel; then the whole step, the picture of where its time goes, the
kernels, whether each op is right, and what a plan measured on this device chooses; then what time
is left for. Every part runs in a process of its own and writes its results as it gets them: one
that is cut at its time keeps what it has, which is no error, one that fails is reported, and the
rest goes on. Ends inside the budget with a table of at most 60 lines. A result file of its own says
how each part ended, and `all.log` has all that they said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from bench import results, setup
from bench.cases import CASES
from bench.stats import MIN_ROUNDS
from bench.tables import table

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 60
# Packages that the parts import, and who needs them.
NEEDED = {
    "numpy": "everything",
    "safetensors": "convergence",
    "tiktoken": "waterfall, convergence",
    "rich": "waterfall, convergence",
    "matplotlib": "pictures only: numbers are written without them",
}
CLOSING_S = 5.0  # kept back for the table
STARTING_S = 10.0  # of a command that is told its own budget
clock = time.monotonic


@dataclass(frozen=True)
class Part:
    """A command.

    least  seconds without which it has nothing to show: it does not begin with less
    wants  seconds that it should have of `USUAL_S`; more or less of another budget
    rest   it gets what time is left, after all that are not
    """

    name: str
    command: tuple[str, ...]
    least: float
    wants: float
    rest: bool = False


def parts(gpu: bool, peer_path: str) -> list[Part]:
    """What runs, first the most worth knowing."""
    peer = (f"--peer-path={peer_path}",) if peer_path else ()
    # Fewer turns in a short budget: an interval that is wider beats a part that is missing.
    turns = ("--rounds=10", "--turn-seconds=0.5") if gpu else ("--rounds=6", "--turn-seconds=0.05")
    rounds = "--rounds=20" if gpu else f"--rounds={MIN_ROUNDS}"
    preset, own = ("gpt2", "gpt2") if gpu else ("shakespeare_char", "laptop")
    first = ["attention", "linear_cross_entropy"]
    ops = [*first, *(op for op in CASES if op not in first)]

    def bench(name: str, *args: str) -> tuple[str, ...]:
        return ("-m", "bench", name, *args)

    waterfall = (own,) if gpu else (own, "--seconds=2")
    return [
        Part("step", bench("step", preset, *turns, *peer), 40, 150),
        Part("waterfall", bench("waterfall", *waterfall), 30, 100),
        Part("kernels", bench("kernels", *ops, rounds), 20, 90),
        Part("ablate", bench("ablate", preset, *turns), 90, 240, rest=True),
        Part("convergence", bench("convergence", *peer), 60, 600, rest=True),
    ]


def allot(waiting: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that wait; 0: too few for it.

    The time that is left is shared as the parts want it, those for the rest of the time aside; one
    gets up to twice what it wants, since not all take what they get.
    """
    part = waiting[0]
    if left < part.least:
        return 0.0
    sharing = [p for p in waiting if p.rest == part.rest]
    fair = part.wants * min(2.0, left / sum(p.wants for p in sharing))
    return left if len(waiting) == 1 else min(left, max(part.least, fair))


def run(part: Part, seconds: float, log: IO[str]) -> tuple[int | None, float]:
    """The exit code (None: stopped at its time) and the seconds it took. Output goes to the log."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    log.write(f"\n=== {part.name}: python {' '.join(part.command)}\n")
    log.flush()
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its workers end with it
    )
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, time.monotonic() - started


def outcome(code: int | None) -> str:
    """How a part ended, in a few words."""
    if code is None:
        return "stopped at its time; what it had is written"
    if code:
        return f"exit code {code}: something in it failed"
    return "done"


def missing(modules: Mapping[str, str] = NEEDED) -> list[str]:
    """What of `modules` cannot be imported here, and what will lack it."""
    return [f"{m} ({what})" for m, what in modules.items() if importlib.util.find_spec(m) is None]


def closing(folder: Path, since: set[Path]) -> list[str]:
    """A table of one line a measured row of the files that came since."""
    lines: list[list[str]] = []
    for path in results.files(folder):
        if path in since:
            continue
        try:
            data = results.load(path)
        except ValueError as e:
            lines.append(["?", str(e)[:60], "", "", ""])
            continue
        name = data["name"] if data["complete"] else f"{data['name']}, cut short"
        for row in data["rows"]:
            others = data["name"] == "kernels" and row.get("provider") != "fastgpt"
            if row.get("problem") or others or data["name"] == "all":
                continue
            ratio, ms = row.get("ratio"), results.median_ms(row)
            mfu = f"{100 * row['mfu']:.1f}" if "mfu" in row else ""
            against = f"{ratio['ratio']:.3f} {ratio['verdict']}" if ratio else ""
            lines.append([name, row["key"][:60], f"{ms:.3f}", mfu, against])
    if not lines:
        return []
    return table(["part", "what", "ms", "MFU %", "against, ratio"], lines).splitlines()


def main(argv: list[str]) -> int:
    parser = setup.Parser("all", __doc__)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, all in all")
    gpu = torch.cuda.is_available()
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout to compare with")
    parser.add_argument("--parts", default="", help="only these, comma-separated")
    args = parser.parse_args(argv)
    end = clock() + args.budget - CLOSING_S
    out: Path = (args.out or Path("out/bench")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = set(results.files(out))
    if not gpu:
        print("no GPU here: small sizes on the CPU show that this runs; the times say nothing")
    if not args.peer_path:
        print("nanoGPT is not compared with: --peer-path=FOLDER names a checkout")
    peer = str(Path(args.peer_path).expanduser().resolve()) if args.peer_path else ""
    chosen = parts(gpu, peer)
    names = [p.name for p in chosen]
    wanted = args.parts.split(",") if args.parts else names
    if unknown := [w for w in wanted if w not in names]:
        parser.error(f"--parts: no {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [p for p in chosen if p.name in wanted]
    if absent := missing():
        print(f"not installed here: {', '.join(absent)}", flush=True)
    result = results.Result("all", argv, {"budget_s": args.budget, "missing": absent})
    said, failed = [], 0

    def keep(part: Part, text: str, took: float) -> None:
        """Say and record how a part ended."""
        said.append(f"{part.name}: {text}" + (f" ({took:.0f} s)" if took else ""))
        print(said[-1], flush=True)
        timed = {"problem": "", "samples_ms": [1e3 * took]} if took else {"problem": text}
        result.rows.append({"key": part.name, "outcome": text, **timed})
        result.save(out)

    with (out / "all.log").open("w") as log:
        for i, part in enumerate(chosen):
            left = end - clock()
            seconds = allot(chosen[i:], left)
            if not seconds:
                short = f"it takes {part.least:g} s, {max(left, 0):.0f} s were left"
                keep(part, f"not run: {short}", 0.0)
                continue
            command = part.command
            if command[1] == "bench":
                command += (f"--out={out}",)
            code, took = run(replace(part, command=command), seconds, log)
            failed += bool(code)  # None: cut at its time
            keep(part, outcome(code), took)
    result.finish(out)
    lines = closing(out, before)
    room = MAX_LINES - len(said) - 3
    if len(lines) > room:
        lines = [*lines[: room - 1], f"  ... and {len(lines) - room + 1} more in {out}"]
    pictures = sorted(out.glob("*/*-waterfall.png"), key=lambda p: p.stat().st_mtime)
    print("\n".join([*lines, *said, f"results and all.log: {out}"]))
    print(f"picture: {pictures[-1]}" if pictures else "picture: none, the waterfall has not run")
    return 1 if failed else 0
