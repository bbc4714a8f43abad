"""Search launch configs on the GPU at hand and print the entries to paste into the ops' configs.py.

    python -m fastgpt_kernels.tools.tune [op ...] [--rounds 40] [--timeout 60]

What is tuned is what the rooms' `specs.py` list. Every config first has to compile and agree with
the reference, in a worker process that is killed when it takes too long; those that pass are timed
against each other, interleaved, from a cold L2. The present entry stays unless another is faster by
more than the margin.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.host import arch as arch_named
from fastgpt_kernels.specs import Tunable, configs_of, spec_modules
from fastgpt_kernels.tools.timing import interleaved
from fastgpt_kernels.tools.workers import TaskFailed, Worker

MARGIN = 0.01  # a config must be this much faster than the present one to replace it
FINALISTS = 12  # timed against each other at length, after a short round of all


@dataclass(frozen=True)
class Trial:
    """One config: its median time with quartiles in ms, or why it has none."""

    config: Config
    median: float = float("inf")
    quartiles: tuple[float, float] = (0.0, 0.0)
    problem: str = ""


# ---------------------------------------------------------------------------- in the worker process


@functools.lru_cache(maxsize=1)
def _problem(module: str, arch: str, index: int, device: str) -> tuple[Tunable, Any, Any]:
    """(tunable, inputs, wanted outputs): made once for all configs of a tunable."""
    torch.manual_seed(0)
    tunable = list(importlib.import_module(module).tunables(arch))[index]
    inputs = tunable.inputs(torch.device(device))
    return tunable, inputs, tunable.reference(inputs)


def tolerance(dtype: torch.dtype) -> float:
    """Relative Frobenius error that rounding to `dtype`, inside a product too, can explain."""
    return max(2 * torch.finfo(dtype).eps, 1e-3)


def check(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
    """Empty if every output agrees with the reference, else what does not."""
    for i, (x, y) in enumerate(zip(ours, wanted, strict=True)):
        error = ((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-30)).item()
        if not error <= tolerance(x.dtype):  # NaN included
            return f"wrong: relative error {error:.1e} in output {i}"
    return ""


def _task(
    device: str, module: str, arch: str, index: int, configs: Sequence[Config], rounds: int = 0
) -> Any:
    """Milliseconds of each config in each round; without rounds, what is wrong with the first."""
    tunable, inputs, wanted = _problem(module, arch, index, device)
    if not rounds:
        return check(tunable.run(inputs, configs[0]), wanted)
    runs = [functools.partial(tunable.run, inputs, config) for config in configs]
    return interleaved(runs, torch.device(device), rounds)


# --------------------------------------------------------------------------------------- the search


def search(
    worker: Worker, module: str, arch: str, index: int, candidates: Sequence[Config], *,
    rounds: int = 40, timeout: float = 60.0,
) -> list[Trial]:  # fmt: skip
    """A trial a candidate, fastest first, those that failed last; candidates[0] is the present."""
    task = (module, arch, index)
    failed, sound = [], []
    for config in candidates:
        try:
            problem = worker.ask(*task, [config], timeout=timeout)
        except TaskFailed as error:
            problem = str(error)
        if problem:
            failed.append(Trial(config, problem=problem))
        else:
            sound.append(config)

    def timed(tried: list[Config], rounds: int) -> list[Trial]:
        patience = timeout * (1 + len(tried) / 4)
        samples = worker.ask(*task, tried, rounds, timeout=patience)
        trials = []
        for config, times in zip(tried, samples, strict=True):
            low, median, high = statistics.quantiles(times, n=4)
            trials.append(Trial(config, median, (low, high)))
        return sorted(trials, key=lambda trial: trial.median)

    if not sound:
        return failed
    trials = timed(sound, 5)
    finalists = [t.config for t in trials[:FINALISTS]]
    # The present entry is always in the final: it is what the others are compared with.
    finalists += [c for c in candidates[:1] if c in sound and c not in finalists]
    rest = [trial for trial in trials if trial.config not in finalists]
    return timed(finalists, rounds) + rest + failed


def choose(trials: Sequence[Trial], present: Config) -> Trial | None:
    """The fastest trial, or the present config's if that is within the margin; None without any."""
    sound = [trial for trial in trials if not trial.problem]
    kept = [t for t in sound if t.config == present and t.median <= sound[0].median * (1 + MARGIN)]
    return next(iter(kept or sound), None)


def entry(key: int, config: Config) -> str:
    """One line of a table in configs.py."""
    stages = "" if config.num_stages == 1 else f", num_stages={config.num_stages}"
    return f"{key}: Config({dict(config.blocks)}, num_warps={config.num_warps}{stages}),"


def report(tunable: Tunable, trials: Sequence[Trial], present: Config) -> str:
    """The trials as text, the present entry marked."""
    lines = [f"{tunable.table} {tunable.key}"]
    for trial in trials:
        sizes = " ".join(f"{k}={v}" for k, v in trial.config.blocks.items())
        name = f"{sizes} warps={trial.config.num_warps} stages={trial.config.num_stages}"
        low, high = trial.quartiles
        result = trial.problem or f"{trial.median:8.4f} ms  [{low:.4f}, {high:.4f}]"
        lines.append(f"  {name:48} {result}{'   (present)' if trial.config == present else ''}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m fastgpt_kernels.tools.tune"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("ops", nargs="*", help="such as attention or layer_norm; default: all")
    parser.add_argument("--table", nargs="+", default=(), help="only these tables of configs.py")
    parser.add_argument("--rounds", type=int, default=40, help="timings of each finalist")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one config")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no GPU here: nothing to measure", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    arch = arch_named(device.index)
    print(f"{torch.cuda.get_device_name(device)} ({arch}), PyTorch {torch.__version__}", flush=True)
    worker = Worker(_task, str(device))
    chosen: dict[str, list[str]] = {}
    try:
        for module in spec_modules(args.ops):
            for index, tunable in enumerate(importlib.import_module(module).tunables(arch)):
                if args.table and tunable.table not in args.table:
                    continue
                present = lookup(getattr(configs_of(module), tunable.table), arch, tunable.key)
                candidates = [present, *(c for c in tunable.candidates if c != present)]
                trials = search(
                    worker, module, arch, index, candidates,
                    rounds=args.rounds, timeout=args.timeout,
                )  # fmt: skip
                print(report(tunable, trials, present), flush=True)
                best = choose(trials, present)
                config = best.config if best else present
                chosen.setdefault(tunable.table, []).append(entry(tunable.key, config))
    finally:
        worker.close()
    print(f"\n# Measured on {torch.cuda.get_device_name(device)}, Triton as installed:")
    for table, lines in chosen.items():
        print(f'# {table}\n    "{arch}": {{')
        print("\n".join(f"        {line}" for line in lines))
        print("    },")
    return 0


if __name__ == "__main__":
    sys.exit(main())
