"""Variants that take turns: each lives in a process of its own, and one at a time is measured.

A process a variant keeps peak memory honest and lets none profit from another's cache; turns,
shuffled every round, let all see the same clocks and temperatures. A parked variant gives back all
GPU memory but weights and optimizer state. `alive="one"` is for models of which several do not
fit: a variant then gets all its turns before the next is built, and ratios are less certain.
"""

from __future__ import annotations

import contextlib
import gc
import io
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fastgpt
from bench.setup import with_values
from bench.variants import Stepper, Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.model.device import synchronize
from fastgpt_kernels.tools.workers import TaskFailed, Worker

POOL = 8  # batches that the steps rotate through
CHECK_STEPS = 8
ROOT = Path(__file__).resolve().parents[1]


class Seat:
    """What a worker process holds: one variant, and what it is asked for."""

    def __init__(self, variant: Variant, values: dict[str, Any], vocab_size: int):
        self.variant, self.values, self.vocab_size = variant, values, vocab_size
        self.stepper: Stepper | None = None
        self.at = 0

    def build(self) -> dict[str, Any]:
        """Build and compile, then the first steps, all on one batch: their losses and norms."""
        config = with_values(Config(), self.values)
        self.device = torch.device(config.system.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events are recorded on the current one
        generator = torch.Generator().manual_seed(0)
        rows = config.optim.rows
        size = (POOL, rows, config.model.block_size + 1)
        self.batches = torch.randint(self.vocab_size, size, generator=generator).to(self.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # shared cores: waiting threads would cost more than they give
        with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT's model talks
            self.stepper = build(self.variant, config, self.vocab_size)
        started = time.perf_counter()
        self.stepper.warm_up(self.batches[0])
        warm_up_s = time.perf_counter() - started
        first = [self.stepper.step(s, self.batches[0]) for s in range(CHECK_STEPS)]
        self.at = CHECK_STEPS
        self.park()
        return {
            "warm_up_s": warm_up_s,
            "losses": [loss.item() for loss, _ in first],
            "grad_norms": [norm.item() for _, norm in first],
            "choices": self.stepper.choices,
            "source": fastgpt.__file__,
        }

    def _step(self) -> None:
        assert self.stepper is not None
        self.stepper.step(self.at, self.batches[self.at % POOL])
        self.at += 1

    def turn(self, steps: int) -> dict[str, float]:
        """Mean ms of a step over `steps` in a row, launch gaps and all, and the peak memory."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._step()  # memory comes back, clocks rise
        synchronize(self.device)
        if cuda:
            self._step()  # the clock starts with work queued, as in the middle of a run
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for _ in range(steps):
                self._step()
            after.record()
            synchronize(self.device)
            ms = before.elapsed_time(after) / steps
            reserved = torch.cuda.max_memory_reserved(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            if self.stepper is not None and self.stepper.graphed:
                peak = reserved  # what a graph's replay uses was allocated when it was captured
        else:
            start = time.perf_counter()
            for _ in range(steps):
                self._step()
            ms = 1e3 * (time.perf_counter() - start) / steps
            peak = reserved = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.park()
        return {"ms": ms, "peak_bytes": peak, "reserved_bytes": reserved}

    def park(self) -> None:
        synchronize(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _serve(seat: Seat, command: str, *args: Any) -> Any:
    return getattr(seat, command)(*args)


@dataclass
class Measured:
    """A variant's outcome: `problem` says why there are no samples (ms a step, one a round)."""

    variant: Variant
    built: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    peak_bytes: float = 0
    reserved_bytes: float = 0
    problem: str = ""


_starting = threading.Lock()


def _start(worker: Worker, root: str) -> None:
    """Start the process; with `root`, one whose fastgpt and kernels are that checkout's."""
    with _starting, TemporaryDirectory() as folder:
        path = list(sys.path)
        if root:
            Path(folder, "bench").symlink_to(ROOT / "bench")
            sys.path[:0] = [folder, root, f"{root}/kernels"]
        try:
            worker._start()
        finally:
            sys.path[:] = path


def measure(
    variants: Sequence[Variant],
    config: Config,
    vocab_size: int,
    *,
    rounds: int,
    turn_s: float = 1.0,
    alive: str = "all",
    builders: int = 3,
    build_timeout: float = 300.0,
    judge: Callable[[Sequence[Measured]], None] = lambda _: None,
    progress: Callable[[Sequence[Measured]], object] = lambda _: None,
    seed: int = 0,
) -> list[Measured]:
    """Build, `judge` (which may set problems), then `rounds` turns of about `turn_s` each.

    `progress` sees all variants before and after building and after each round of all, so that what
    there is can be kept. Those that have neither samples nor a problem were not measured yet.
    """
    values = settings.to_dict(config)
    found = [Measured(v) for v in variants]
    workers = [Worker(_serve, Seat(v, values, vocab_size)) for v in variants]

    def start(i: int) -> None:
        try:
            _start(workers[i], variants[i].root)
            found[i].built = workers[i].ask("build", timeout=build_timeout)
            found[i].problem = ""
        except TaskFailed as e:
            found[i].problem = str(e)
            workers[i].close()

    def turn(i: int, steps: int) -> float | None:
        m = found[i]
        try:
            got = workers[i].ask("turn", steps, timeout=max(120.0, 20 * turn_s))
        except TaskFailed as e:
            m.problem, m.samples = str(e), []
            workers[i].close()
            return None
        m.peak_bytes = max(m.peak_bytes, got["peak_bytes"])
        m.reserved_bytes = max(m.reserved_bytes, got["reserved_bytes"])
        return got["ms"]

    def take(i: int, steps: int) -> None:
        if (ms := turn(i, steps)) is not None:
            found[i].samples.append(ms)

    def steps_of(i: int) -> int:
        ms = turn(i, 2)
        return max(2, min(50, round(turn_s * 1e3 / ms))) if ms else 0

    def sound() -> list[int]:
        return [i for i, m in enumerate(found) if not m.problem]

    try:
        progress(found)
        if alive == "one":
            for i in range(len(found)):
                start(i)
                steps = 0 if found[i].problem else steps_of(i)
                for _ in range(rounds):
                    if not found[i].problem:
                        take(i, steps)
                workers[i].close()
                progress(found)
            judge(found)
        else:
            with ThreadPoolExecutor(builders) as pool:
                list(pool.map(start, range(len(found))))
            for i, m in enumerate(found):  # together they may not have fitted
                if "OutOfMemoryError" in m.problem:
                    start(i)
            judge(found)
            progress(found)
            counts = {i: steps_of(i) for i in sound()}
            order = random.Random(seed)
            for _ in range(rounds):
                for i in order.sample(sound(), len(sound())):
                    take(i, counts[i])
                progress(found)
    finally:
        for worker in workers:
            worker.close()
    for m in found:
        if m.problem:
            m.samples = []
    return found
