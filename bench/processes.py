"""Variants interleaved: each lives in a process of its own, and one at a time runs.

A process per variant keeps peak memory honest, and turns in an order shuffled every round let all
see the same clocks. All take their first steps on one batch from the same weights: a variant whose
losses differ gets no time.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
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
from bench import power, results, setup
from bench.interleave import mark, ms_between
from bench.variants import Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.model.device import synchronize
from fastgpt_kernels.worker import TaskFailed, Worker

POOL = 8  # batches that the steps rotate through
CHECK_STEPS = 8
# Relative difference from the first variant that rounding explains, and dropout's other masks.
LOSS_TOLERANCE, NORM_TOLERANCE, DROPOUT_FACTOR = 0.01, 0.05, 4
BUILDERS = 3  # variants built at the same time on a GPU
PAUSE_S = 0.2  # before each turn, so that all begin from the same clock and temperature
SETTLED = 0.003  # the spread of three turns' times below which the clock counts as settled


class Seat:
    """Content of a variant's process: builds the stepper, then runs turns of it."""

    def __init__(self, variant: Variant, values: dict[str, Any], vocab_size: int):
        self.variant, self.values, self.vocab_size = variant, values, vocab_size
        self.at = 0

    def build(self) -> dict[str, Any]:
        """Builds and compiles, then takes the first steps, all on one batch."""
        config = setup.with_values(Config(), self.values)
        self.device = torch.device(config.system.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        elif self.device.index is not None:
            torch.cuda.set_device(self.device)  # events are recorded on the current one
        self.gpu = power.open_gpu()[0] if self.device.type == "cuda" else None
        size = (POOL, config.optim.rows, config.model.block_size + 1)
        generator = torch.Generator().manual_seed(0)
        self.batches = torch.randint(self.vocab_size, size, generator=generator).to(self.device)
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
            "ops": self.stepper.ops,
            "source": fastgpt.__file__,
        }

    def call(self, method: str, *args: Any) -> Any:
        """Returns what a method returns, in the seat's process."""
        return getattr(self, method)(*args)

    def turn(self, steps: int, sustained_s: float) -> dict[str, Any]:
        """Returns the mean ms per step, launch gaps and all, with memory, energy and clock."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            time.sleep(0 if sustained_s else PAUSE_S)
        self.run(1)  # memory comes back, clocks rise
        end, times = time.monotonic() + sustained_s, list[float]()
        while time.monotonic() < end and not settled(times[-3:]):
            times.append(self.timed(steps))
        with power.Meter(self.gpu) as meter:
            ms = self.timed(steps)
        peak = reserved = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if cuda:
            peak = reserved = torch.cuda.max_memory_reserved(self.device)
            if not self.stepper.graphed:  # a graph's memory was allocated when it was captured
                peak = torch.cuda.max_memory_allocated(self.device)
        self.park()
        return {
            "ms": ms,
            "joules": None if meter.joules is None else meter.joules / (steps + 1),
            "clock_mhz": meter.clock_mhz,
            "throttled": meter.throttled,
            "peak_bytes": peak,
            "reserved_bytes": reserved,
        }

    def timed(self, steps: int) -> float:
        """Runs a step, which queues work, and `steps` timed ones. Returns the mean ms of these."""
        synchronize(self.device)
        self.run(1)
        before = mark(self.device)
        self.run(steps)
        after = mark(self.device)
        synchronize(self.device)
        return ms_between(before, after) / steps

    def run(self, count: int) -> None:
        """Runs steps on the batches in turn, without waiting for the device."""
        for _ in range(count):
            self.stepper.step(self.at, self.batches[self.at % POOL])
            self.at += 1

    def park(self) -> None:
        """Waits for the device, and gives memory back that no tensor needs."""
        synchronize(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def settled(times: Sequence[float]) -> bool:
    """Returns True for three times that differ by less than `SETTLED`."""
    return len(times) == 3 and max(times) - min(times) < SETTLED * min(times)


_starting = threading.Lock()


def start(worker: Worker, root: str) -> None:
    """Starts a process that imports the checkout `root`, or this one if it is empty."""
    before = list(sys.path)
    with _starting, TemporaryDirectory() as folder:  # the process gets the path as it is now
        Path(folder, "bench").symlink_to(results.ROOT / "bench")
        sys.path[:0] = [folder, root, f"{root}/kernels"] if root else []
        try:
            worker.spawn()
            worker.ready()
        finally:
            sys.path[:] = before


@dataclass
class Measured:
    """A variant's outcome: one turn per round, or the problem for which there is none."""

    variant: Variant
    built: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    worker: Worker | None = None

    def ask(self, *task: Any, timeout: float) -> dict[str, Any]:
        """Returns the answer of the variant's process; {} if there is none: then `problem` is."""
        assert self.worker is not None
        try:
            if task[0] == "build":
                start(self.worker, self.variant.root)
            return self.worker.ask(*task, timeout=timeout)
        except TaskFailed as e:
            self.problem, self.turns = str(e), []
            self.worker.close()
            return {}

    @property
    def samples(self) -> list[float]:
        """Returns the ms per step, one sample per round."""
        return [turn["ms"] for turn in self.turns]


def judge(found: Sequence[Measured], dropout: float) -> None:
    """Marks variants whose first losses or gradient norms are not the first sound variant's."""

    def apart(a: Sequence[float], b: Sequence[float]) -> float:
        finite = all(map(math.isfinite, [*a, *b]))
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)) if finite else math.inf

    built = [m for m in found if m.built and not m.problem]
    for m in built:
        mine, first = m.built, built[0].built
        loss_off = apart(mine["losses"], first["losses"])
        # Norms of later steps differ as the weights drift apart; the first sees all gradients.
        norm_off = apart(mine["grad_norms"][:1], first["grad_norms"][:1])
        factor = DROPOUT_FACTOR if dropout else 1
        if not (loss_off <= factor * LOSS_TOLERANCE and norm_off <= factor * NORM_TOLERANCE):
            whose = f"wrong: losses differ from {built[0].variant.name}'s"
            m.problem = f"{whose} by {loss_off:.1%}, the first gradient norm by {norm_off:.1%}"


def measure(
    variants: Sequence[Variant],
    config: Config,
    vocab_size: int,
    rounds: int,
    turn_s: float,
    sustained_s: float = 0.0,
    progress: Callable[[Sequence[Measured]], object] = lambda found: None,
) -> list[Measured]:
    """Builds and judges the variants, then gives each one turn per round.

    sustained_s  a turn is timed once the step's time has settled under load, or after so many
                 seconds of it; 0: after a pause
    progress     sees all of them before and after building and after each round, so that partial
                 results can be kept
    """
    values, found = settings.to_dict(config), [Measured(v) for v in variants]
    builders = BUILDERS if config.system.device != "cpu" else 1
    # Those that compile at the same time share the cores: each begins processes of its own for it.
    threads = max(1, (os.cpu_count() or 1) // builders)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))

    def build_one(m: Measured) -> None:
        m.worker = Worker(Seat.call, Seat(m.variant, values, vocab_size))
        m.built = m.ask("build", timeout=300)

    def turn(m: Measured, steps: int) -> dict[str, Any]:
        return m.ask("turn", steps, sustained_s, timeout=120 + 20 * turn_s)

    try:
        progress(found)
        with ThreadPoolExecutor(builders) as pool:
            list(pool.map(build_one, found))
        judge(found, config.model.dropout)
        progress(found)
        first = [turn(m, 2) if not m.problem else {} for m in found]
        counts = [max(2, min(50, round(turn_s * 1e3 / f.get("ms", 1e9)))) for f in first]
        order = random.Random(0)
        for _ in range(rounds):
            for m, count in order.sample([*zip(found, counts, strict=True)], len(found)):
                if not m.problem and (got := turn(m, count)):
                    m.turns.append(got)
            progress(found)
    finally:
        for m in found:
            if m.worker is not None:
                m.worker.close()
    return found
