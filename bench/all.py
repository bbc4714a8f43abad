"""python -m bench all --budget SECONDS [--out DIR]: everything, in order of worth.

Correctness tests on the GPU come first. Every part runs in a process of its own and writes its
results as it gets them; one that fails or overruns its share is reported and the rest goes on. Ends
inside the budget with a table of at most 60 lines. A result file of its own says how each part
ended, the tests first, and `all.log` has all that they said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from bench import results, setup
from bench.tables import table
from fastgpt_kernels.stats import MIN_ROUNDS

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 60
TESTS = "correctness tests"
# Packages that the parts import, and who needs them.
NEEDED = {
    "numpy": "everything",
    "safetensors": "convergence, generate",
    "tiktoken": "waterfall, convergence",
    "rich": "waterfall, convergence",
    "pytest": "the correctness tests",
    "hypothesis": "the correctness tests",
    "matplotlib": "pictures only: numbers are written without them",
}
CLOSING_S = 5.0  # kept back for the table


@dataclass(frozen=True)
class Part:
    """A command and the share of what is left of the budget that it may take."""

    name: str
    command: tuple[str, ...]
    share: float


def parts(gpu: bool, peer_path: str) -> list[Part]:
    """What runs, first the most worth knowing."""
    tests = ("-m", "pytest", "tests/kernels", "-m", "cuda", "-x", "-p", "no:cacheprovider")
    peer = (f"--peer-path={peer_path}",) if peer_path else ()
    # Fewer turns in a short budget: an interval that is wider beats a part that is missing.
    turns = ("--rounds=10", "--turn-seconds=0.5") if gpu else ("--rounds=6", "--turn-seconds=0.05")
    rounds = "--rounds=20" if gpu else f"--rounds={MIN_ROUNDS}"

    def bench(name: str, *args: str) -> tuple[str, ...]:
        return ("-m", "bench", name, *args)

    step = ("gpt2", "shakespeare_char") if gpu else ("shakespeare_char",)
    waterfall = ("gpt2",) if gpu else ("laptop", "--seconds=2")
    return [
        Part(TESTS, tests, 0.25),
        Part("step", bench("step", *step, *turns, *peer), 0.4),
        Part("waterfall", bench("waterfall", *waterfall), 0.3),
        Part("kernels", bench("kernels", rounds), 0.4),
        Part("gemms", bench("gemms", rounds, "--without-autotune"), 0.4),
        Part("ablate", bench("ablate", "gpt2", *turns), 0.6),
        Part("generate", bench("generate"), 0.5),
        Part("convergence", bench("convergence", *peer), 1.0),
    ]


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


def outcome(part: Part, code: int | None, said: list[str]) -> str:
    """How a part ended, in a few words."""
    if part.name == TESTS:
        # 5: nothing was collected; with no GPU all are skipped, which is no pass either.
        last = next((line for line in reversed(said) if line.strip()), "")
        if code is None:
            return f"stopped at its time, after {so_far(said)}"
        return last if code in (0, 1) else f"exit code {code}: {last}"
    if code is None:
        return "stopped at its time; what it had is written"
    return "done" if code == 0 else f"exit code {code}: something in it failed"


def so_far(said: list[str]) -> str:
    """What pytest's lines of dots say: "120 passed, 3 failed, 1 skipped"."""
    marks = "".join(m[1] for line in said if (m := re.match(r"([.FEsxX]+)( +\[ *\d+%\])?$", line)))
    counts = {"passed": marks.count("."), "failed": marks.count("F") + marks.count("E")}
    return ", ".join(f"{n} {what}" for what, n in counts.items()) + f", {marks.count('s')} skipped"


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
    end = time.monotonic() + args.budget - CLOSING_S
    out: Path = (args.out or Path("out/bench")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = set(results.files(out))
    if not gpu:
        print("no GPU here: small sizes on the CPU show that this runs; the times say nothing")
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

    with (out / "all.log").open("w+") as log:
        for part in chosen:
            left = end - time.monotonic()
            if left < 5:
                keep(part, "not run, the budget is spent", 0.0)
                failed += 1
                continue
            if part.command[1] == "bench":
                part = replace(part, command=(*part.command, f"--out={out}"))
            place = log.tell()
            # The first parts keep to their share; the last takes what is left.
            seconds = left if part is chosen[-1] else max(5.0, left * part.share)
            code, took = run(part, min(left, seconds), log)
            log.seek(place)
            text = outcome(part, code, log.read().splitlines())
            log.seek(0, os.SEEK_END)
            failed += code != 0
            keep(part, text, took)
    result.finish(out)
    lines = closing(out, before)
    room = MAX_LINES - len(said) - 2
    if len(lines) > room:
        lines = [*lines[: room - 1], f"  ... and {len(lines) - room + 1} more in {out}"]
    print("\n".join([*lines, *said, f"results and all.log: {out}"]))
    return 1 if failed else 0
